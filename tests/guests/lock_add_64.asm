; add across a cache line, 64-bit.
bits 64
org 0x1000
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
