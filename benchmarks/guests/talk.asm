; Writes to the serial port and to the debug console, by string instructions and byte by byte.
bits 16
org 0x1000
        cld
again:  mov dx, 0x3f8
        mov si, 0x1000
        mov cx, 0x400
        rep outsb
        mov dx, 0xe9
        mov si, 0x1000
        mov cx, 0x400
        rep outsb
        mov cx, 0x100
each:   mov dx, 0x3f8
        out dx, al
        mov dx, 0xe9
        out dx, al
        loop each
        jmp again
