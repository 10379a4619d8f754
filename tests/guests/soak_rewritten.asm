; Shows, in each round, a constant that the host writes into its first instruction.
bits 64
org 0x1000
%include "soak.inc"
SHOWN  equ 0x8008
again:  mov eax, 0
        mov [SHOWN], eax
        inc dword [ROUNDS]
        cmp dword [FINISH], 0
        je again
        hlt
