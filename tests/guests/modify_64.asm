; Code that changes while it runs. 64-bit.
bits 64
org 0x1000
%include "modify.inc"
