; A division by zero, without a table to look its handler up in.
bits 32
org 0x1000
        lidt [none]
        xor ecx, ecx
        div ecx
        hlt
none:   dw 0
        dd 0
