; xchg across a cache line, 16-bit.
bits 16
org 0x1000
%macro LOCKED 0
        xchg [ADDRESS], ebx
%endmacro
%include "locks.inc"
