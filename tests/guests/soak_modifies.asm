; Writes a new constant into an instruction in each round, and a lock prefix before another in every second one.
bits 32
org 0x1000
%include "soak.inc"
NO_PREFIX   equ 0x90
LOCK_PREFIX equ 0xf0
again:  inc ecx
        mov [constant + 1], cl
        xor byte [prefix], NO_PREFIX ^ LOCK_PREFIX
constant:
        mov al, 0
        cmp al, cl
        jne wrong
prefix: db NO_PREFIX
        add dword [SPLIT], 1
        inc dword [ROUNDS]
        cmp dword [FINISH], 0
        je again
        hlt
wrong:  ud2
