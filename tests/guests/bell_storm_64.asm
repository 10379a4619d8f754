; Rings the first doorbell of tests/bells.py for ever.
bits 64
org 0x1000
        mov ebx, 0xd0000000
again:  mov dword [rbx], 1
        jmp again
