; xchg across a cache line, 32-bit.
bits 32
org 0x1000
%macro LOCKED 0
        xchg [ADDRESS], ebx
%endmacro
%include "locks.inc"
