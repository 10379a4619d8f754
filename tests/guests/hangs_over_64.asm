; Accesses that hang over an end: 8 bytes over that of a page, at 0xd0000ffd, and 4 bytes at port 0x503. Each is read to
; 0x8000 and 0x8008, and then written.
bits 64
org 0x1000
        mov ebx, 0xd0000ffd
        mov rax, [rbx]
        mov [0x8000], rax
        mov rax, 0x8877665544332211
        mov [rbx], rax
        mov dx, 0x503
        in eax, dx
        mov [0x8008], eax
        mov eax, 0x44332211
        out dx, eax
        hlt
