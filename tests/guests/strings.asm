; Five bytes in from port 0x500 to 0x8000, two words to 0x8010; then five bytes out, and two words.
bits 16
org 0x1000
        cld
        mov dx, 0x500
        mov di, 0x8000
        mov cx, 5
        rep insb
        mov di, 0x8010
        mov cx, 2
        rep insw
        mov si, text
        mov cx, 5
        rep outsb
        mov si, text
        mov cx, 2
        rep outsw
        hlt
text:   db "abcde"
