; What user code may do with ports: the word at 0x2000 is EFLAGS's I/O privilege level (0x3000: all ports), the bytes from
; 0x3000 are the task's permission map for ports up to 0x7ff. User code is at 0x4000. 32-bit.
bits 32
org 0x1000
        lgdt [table]
        mov ax, 0x28
        ltr ax
        mov esi, 0x3000
        mov edi, map
        mov ecx, 0x100
        cld
        rep movsb
        mov eax, [0x2000]
        or eax, 2
        push dword 0x23
        push dword 0x7000
        push eax
        push dword 0x1b
        push dword 0x4000
        iret
        align 8
table:  dw segments.end - segments - 1
        dd segments
        align 8
segments:
        dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff
        dw map.end - task - 1, task
        db 0, 0x89, 0, 0
.end:
        align 8
task:   times 0x66 db 0
        dw map - task
map:    times 0x100 db 0
        db 0xff
.end:
