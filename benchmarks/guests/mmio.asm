; Reads and writes an address that no memory is at, for ever.
bits 16
org 0x1000
        mov ax, 0x2000
        mov ds, ax
again:  mov al, [0]
        mov [8], ax
        jmp again
