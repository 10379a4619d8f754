; Nothing to do.
bits 16
org 0x1000
        hlt
