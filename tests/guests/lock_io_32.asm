; A lock across a cache line and a port write, in turn. 32-bit.
bits 32
org 0x1000
%define OUT_PORT 0x80
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
