; An exception that has no vector: a triple fault, which resets a PC.
bits 16
org 0x1000
        lidt [none]
        ud2
none:   dw 0
        dd 0
