; What a 64-bit guest finds when it starts, as boot_32.asm.
bits 64
org 0x1000
        mov ebx, edi
        shl ebx, 6
        add ebx, 0x4000
        pushfq                      ; the stack works
        pop rdx
        mov [rbx], edi
        mov [rbx + 4], esp
        mov [rbx + 8], edx          ; flags
        mov [rbx + 12], cs
        mov [rbx + 16], ds
        mov [rbx + 20], ss
        sgdt [rbx + 24]             ; 2 bytes limit, 8 bytes base
        mov rax, cr0
        mov [rbx + 40], eax
        mov rax, cr4
        mov [rbx + 44], eax
        mov ax, ds
        mov es, ax                  ; a load reads the descriptor
        mov dword [rbx + 48], 1
        push 0x10
        lea rax, [rel reloaded]
        push rax
        retfq
reloaded:
        mov dword [rbx + 48], 2
        mov ecx, 0xc0000080         ; EFER
        rdmsr
        mov [rbx + 52], eax
        mov rax, 0xffffffff         ; the last byte that is mapped reads, as nobody is there, as ones
        movzx eax, byte [rax]
        mov [rbx + 56], eax
        hlt
