; Reads a number from a device in each round, which must be the next one, and writes it back.
bits 32
org 0x1000
%include "soak.inc"
again:  mov eax, [0xe0000000]
        cmp eax, [ROUNDS]
        jne wrong
        mov [0xe0000004], eax
        mov dx, 0x500
        out dx, al
        inc dword [ROUNDS]
        cmp dword [FINISH], 0
        je again
        hlt
wrong:  ud2
