; cmpxchg8b across a cache line, 32-bit.
bits 32
org 0x1000
%macro LOCKED 0
        lock cmpxchg8b [ADDRESS]
%endmacro
%include "locks.inc"
