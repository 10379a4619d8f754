; Counts, as fast as it can.
bits 16
org 0x1000
%include "soak.inc"
again:  inc dword [ROUNDS]
        cmp dword [FINISH], 0
        je again
        hlt
