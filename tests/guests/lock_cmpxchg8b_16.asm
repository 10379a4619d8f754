; cmpxchg8b across a cache line, 16-bit.
bits 16
org 0x1000
%macro LOCKED 0
        lock cmpxchg8b [ADDRESS]
%endmacro
%include "locks.inc"
