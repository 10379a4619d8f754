; Code that changes while it runs. 16-bit.
bits 16
org 0x1000
%include "modify.inc"
