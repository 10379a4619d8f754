; Guilty instructions in two rings and two address spaces: the same `kernel` instruction 2 * ROUNDS times in the space
; whose tables are at TABLES and ROUNDS times in the one at OTHER, then `user` in ring 3, in the latter, 3 * ROUNDS times.
; It ends in ring 3 by a write to the exit port. At 0x1008: where `kernel` and `user` begin and end, then the tables.
bits 64
org 0x1000
COUNT   equ 0x8000
ROUNDS  equ 0x8004
STACK   equ 0x9000
TABLES  equ 0x10000             ; a PML4, a page-directory pointer table, a page directory
OTHER   equ 0x14000
EXIT    equ 0xf4
        jmp short start
        times 8 - ($ - $$) nop
        dd kernel, kernel_end, user, user_end, TABLES, OTHER
start:
        mov rsp, STACK
        mov dword [0x2000], 0
        mov dword [COUNT], 0
        mov edi, TABLES
        call map
        mov edi, OTHER
        call map
        lgdt [gdtr]
        mov eax, TABLES
        mov cr3, rax
        mov ecx, [ROUNDS]
        shl ecx, 1
        call locks
        mov eax, OTHER
        mov cr3, rax
        mov ecx, [ROUNDS]
        call locks
        push 0x18 | 3           ; SS, RSP, RFLAGS with IOPL 3, CS, RIP
        push STACK
        push 0x3002
        push 0x10 | 3
        push in_user
        iretq

locks:
kernel: lock add dword [0x203e], 1
kernel_end:
        inc dword [COUNT]
        dec ecx
        jnz kernel
        ret

in_user:
        mov ecx, [ROUNDS]
        lea ecx, [ecx + 2 * ecx]
user:   lock xadd [0x203e], eax
user_end:
        inc dword [COUNT]
        dec ecx
        jnz user
        xor eax, eax
        out EXIT, al
        jmp $

; 2 MiB from 0, one to one, for every ring. edi: where the tables go
map:    mov edx, edi
        mov ecx, 3 * 4096 / 8
        xor eax, eax
        rep stosq
        lea eax, [edx + 0x1007]
        mov [rdx], rax
        lea eax, [edx + 0x2007]
        mov [rdx + 0x1000], rax
        mov qword [rdx + 0x2000], 0x87
        ret

        align 8
gdt:    dq 0, 0x00af9b000000ffff, 0x00affb000000ffff, 0x00cff3000000ffff
gdtr:   dw $ - gdt - 1
        dq gdt
