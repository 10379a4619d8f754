; Each vCPU does [ROUNDS] split locks on a cache line pair of its own and counts them in a word of its own:
; COUNTS + 64 * number. The number comes in EDI. 64-bit.
bits 64
org 0x1000
COUNTS equ 0x9000
ROUNDS equ 0x8004
        mov ebx, edi
        shl ebx, 8
        add ebx, 0x203e         ; 0x203e, 0x213e, ...
        shl edi, 6
        mov dword [rdi + COUNTS], 0
        mov dword [rbx + 2], 0
again:  lock add dword [rbx], 1
        inc dword [rdi + COUNTS]
        mov eax, [ROUNDS]
        test eax, eax
        jz again
        cmp [rdi + COUNTS], eax
        jb again
        hlt
        jmp $
