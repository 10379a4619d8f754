; Locked, but within a cache line: no bus lock. 16-bit.
bits 16
org 0x1000
%define ADDRESS 0x2040
%macro LOCKED 0
        lock add dword [ADDRESS], 1
%endmacro
%include "locks.inc"
