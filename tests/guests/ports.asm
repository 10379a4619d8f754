; Reads a byte, a word and a doubleword from port 0x500 to 0x8000, and writes 0x44332211 back as each of them.
bits 16
org 0x1000
        mov dx, 0x500
        in al, dx
        mov [0x8000], al
        in ax, dx
        mov [0x8004], ax
        in eax, dx
        mov [0x8008], eax
        mov eax, 0x44332211
        out dx, al
        out dx, ax
        out dx, eax
        hlt
