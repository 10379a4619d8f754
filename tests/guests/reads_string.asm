; 1024 bytes in from port 0x500 to 0x8000.
bits 16
org 0x1000
        cld
        mov dx, 0x500
        mov di, 0x8000
        mov cx, 1024
        rep insb
        hlt
