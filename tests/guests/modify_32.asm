; Code that changes while it runs. 32-bit.
bits 32
org 0x1000
%include "modify.inc"
