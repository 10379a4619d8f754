; vCPU 0 counts at 0x8000 for ever, the others halt.
bits 16
org 0x1000
        test di, di
        jz again
        hlt
again:  inc dword [0x8000]
        jmp again
