; Reads a port for ever: one exit, which must be answered, each time round.
bits 16
org 0x1000
again:  in al, 0x80
        jmp again
