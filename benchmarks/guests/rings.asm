; Rings the doorbell of a digest device at 0x20000 for ever, with a request each time: 16 KiB, by the descriptor at 0.
bits 16
org 0x1000
        xor ax, ax
        mov es, ax
        mov ax, 0x2000
        mov ds, ax
        mov dword [es:8], 0x4000
again:  mov dword [es:12], 1
        mov dword [0x20], 1
        jmp again
