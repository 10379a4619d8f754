; Locked, but within a cache line: no bus lock. 64-bit.
bits 64
org 0x1000
%define ADDRESS 0x2040
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
