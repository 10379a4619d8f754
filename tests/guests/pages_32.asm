; Writes a word of each of so many pages in turn, round after round, and nothing else: the word counts the rounds. Whoever
; runs it says how many, and where the first is; and that it is to ask before each round, or not.
PAGES equ 0x8000
FIRST equ 0x8004
ASKS  equ 0x8008
PORT  equ 0x500
bits 32
org 0x1000
again:  cmp dword [ASKS], 0
        jz go
        mov edx, PORT
        out dx, al
go:     mov ecx, [PAGES]
        mov edi, [FIRST]
        jecxz again
next:   inc dword [edi]
        add edi, 4096
        dec ecx
        jnz next
        jmp again
