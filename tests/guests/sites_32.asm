; Two guilty instructions, 32-bit.
bits 32
org 0x1000
%include "sites.inc"
