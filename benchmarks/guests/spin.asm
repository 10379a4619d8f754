; Does nothing, for ever: no exit, one core.
bits 16
org 0x1000
again:  jmp again
