; Ends itself through the exit port, with 42.
bits 16
org 0x1000
        mov al, 42
        out 0xf4, al
        hlt
        jmp $
