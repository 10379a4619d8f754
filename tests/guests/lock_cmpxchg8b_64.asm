; cmpxchg8b across a cache line, 64-bit.
bits 64
org 0x1000
%macro LOCKED 0
        lock cmpxchg8b [ADDRESS]
%endmacro
%include "locks.inc"
