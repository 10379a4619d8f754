; A loop of two instructions, the dearest there is for a call at each block, and a lock across a cache line for each 1000
; instructions; for as many rounds as the word at ROUNDS says (0: 2^32).
bits 64
org 0x1000
%define ROUNDS 0x8000
round:  mov ecx, 498
inner:  dec ecx
        jnz inner
        lock add dword [0x1203e], 1
        dec dword [ROUNDS]
        jnz round
        hlt
