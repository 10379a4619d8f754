; Rings the two doorbells of tests/bells.py: the first three times, the second by its value; writes another value there,
; and one of another size to the first, which are no rings; and ends with the code that a read gives it.
bits 64
org 0x1000
        mov ebx, 0xd0000000
        mov dword [rbx], 1
        mov dword [rbx], 2
        mov dword [rbx], 3
        mov dword [rbx + 8], 7
        mov dword [rbx + 8], 8
        mov word [rbx], 9
        mov eax, [rbx + 0x10]
        mov dx, 0xf4
        out dx, al
