; The 4 KiB at 0x8000 to the serial port, and once more to the debug console.
bits 16
org 0x1000
        cld
        mov dx, 0x3f8
        mov si, 0x8000
        mov cx, 4096
        rep outsb
        mov dx, 0xe9
        mov si, 0x8000
        mov cx, 4096
        rep outsb
        hlt
