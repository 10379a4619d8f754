; An exception without a table to look its handler up in.
bits 32
org 0x1000
        lidt [none]
        int3
none:   dw 0
        dd 0
