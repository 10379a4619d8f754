; Reads 1, 2, 4 and 8 bytes at 0xd0000000 to 0x8000, and writes 0x8877665544332211 there as each of them.
bits 64
org 0x1000
        mov ebx, 0xd0000000
        mov al, [rbx]
        mov [0x8000], al
        mov ax, [rbx]
        mov [0x8008], ax
        mov eax, [rbx]
        mov [0x8010], eax
        mov rax, [rbx]
        mov [0x8018], rax
        mov rax, 0x8877665544332211
        mov [rbx], al
        mov [rbx], ax
        mov [rbx], eax
        mov [rbx], rax
        hlt
