; What a 16-bit guest finds when it starts, left at 0x4000: CR0, CS, DS, SS, FLAGS; and how many vCPUs came here.
bits 16
org 0x1000
        mov [cs:0x4004], cs
        mov [cs:0x4006], ds
        mov [cs:0x4008], ss
        lock inc byte [0x4010 + di] ; DI: the vCPU's number
        mov sp, 0x3000              ; 16-bit guests bring their own stack
        pushf
        pop word [0x400a]
        mov eax, cr0
        mov [0x4000], eax
        hlt
