; Tables of its own: 4 KiB pages one to one from 0 to 0x40000, but for the one at 0x31000. Then it goes to 0x30ff0. 64-bit.
bits 64
org 0x1000
        mov edi, 0x20000
        mov ecx, 0x4000 / 8
        xor eax, eax
        cld
        rep stosq
        mov qword [0x20000], 0x21003
        mov qword [0x21000], 0x22003
        mov qword [0x22000], 0x23003
        mov ecx, 0x40
        mov eax, 3
        mov edi, 0x23000
.more:  stosq
        add eax, 0x1000
        loop .more
        mov qword [0x23000 + 8 * 0x31], 0
        mov eax, 0x20000
        mov cr3, rax
        mov ebx, 0x803e
        mov eax, 0x30ff0
        jmp rax
