; Copies a word of the read-only region at 0x200000 to the other at 0x300000, and tries to write to the first.
bits 32
org 0x1000
        mov eax, [0x200000]
        mov [0x300000], eax
        mov dword [0x200004], 0x12345678
        mov eax, [0x200004]
        mov [0x300004], eax
        hlt
