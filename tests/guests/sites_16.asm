; Two guilty instructions, 16-bit.
bits 16
org 0x1000
%include "sites.inc"
