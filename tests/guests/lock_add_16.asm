; add across a cache line, 16-bit.
bits 16
org 0x1000
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
