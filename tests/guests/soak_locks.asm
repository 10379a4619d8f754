; A lock across a cache line in each round.
bits 64
org 0x1000
%include "soak.inc"
again:  lock add dword [SPLIT], 1
        inc dword [ROUNDS]
        cmp dword [FINISH], 0
        je again
        hlt
