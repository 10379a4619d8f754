; add across a cache line, 32-bit.
bits 32
org 0x1000
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
