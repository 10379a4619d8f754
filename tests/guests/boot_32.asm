; What a 32-bit guest finds when it starts, and that the GDT's descriptors can be loaded again. Each vCPU leaves it in
; 64 bytes at 0x4000 + 64 * its number, which it finds in EDI.
bits 32
org 0x1000
        mov ebx, edi
        shl ebx, 6
        add ebx, 0x4000
        pushfd                      ; the stack works
        pop edx
        mov [ebx], edi
        mov [ebx + 4], esp
        mov [ebx + 8], edx          ; flags
        mov [ebx + 12], cs
        mov [ebx + 16], ds
        mov [ebx + 20], ss
        sgdt [ebx + 24]             ; 2 bytes limit, 4 bytes base
        mov eax, cr0
        mov [ebx + 40], eax
        mov eax, cr4
        mov [ebx + 44], eax
        mov ax, ds
        mov es, ax                  ; a load reads the descriptor
        mov dword [ebx + 48], 1
        jmp 0x08:reloaded
reloaded:
        mov dword [ebx + 48], 2
        hlt
