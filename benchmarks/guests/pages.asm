; Writes a word of each of so many pages in turn, for ever, and counts the writes. Whoever runs it says how many pages.
PAGES equ 0x8000
COUNT equ 0x8004
FIRST equ 0x10000
bits 32
org 0x1000
again:  mov ecx, [PAGES]
        mov edi, FIRST
        jecxz again
next:   inc dword [edi]
        inc dword [COUNT]
        add edi, 4096
        dec ecx
        jnz next
        jmp again
