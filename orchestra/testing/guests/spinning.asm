; Keeps its CPU busy and never exits.
bits 64
org 0x1000
        shl edi, 8              ; this vCPU's number
again:  inc qword [0x2000 + edi]
        jmp again
        align 8, nop
