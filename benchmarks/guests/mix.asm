; Compute-bound: loads, stores, arithmetic and branches, 1000 instructions for each lock across a cache line, for as many
; rounds as the word at ROUNDS says (0: 2^32).
bits 64
org 0x1000
%define ROUNDS 0x8000
        mov rbx, 0x10000
        xor r8d, r8d
round:  mov ecx, 110
inner:  mov rax, [rbx + rcx * 8]
        add rax, rcx
        imul rax, rax, 31
        xor rax, r8
        mov [rbx + rcx * 8], rax
        shr rax, 7
        add r8, rax
        dec ecx
        jnz inner
        mov ecx, 1
        lock add dword [rbx + 0x203e], 1
        dec dword [ROUNDS]
        jnz round
        hlt
