; xchg across a cache line, 64-bit.
bits 64
org 0x1000
%macro LOCKED 0
        xchg [ADDRESS], ebx
%endmacro
%include "locks.inc"
