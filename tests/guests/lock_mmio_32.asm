; A lock across a cache line of memory that nobody backs: MMIO. 32-bit.
bits 32
org 0x1000
%define ADDRESS 0xd000003e
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%define NO_TOUCH
%include "locks.inc"
