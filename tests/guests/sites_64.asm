; Two guilty instructions, 64-bit.
bits 64
org 0x1000
%include "sites.inc"
