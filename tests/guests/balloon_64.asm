; A driver of a memory balloon in slot 1 of the PCI bus, by virtio 1.2, without interrupts. It writes to 4 MiB from 2 MiB on. Then it
; looks again and again how many pages it shall do without, and puts so many of these 4 MiB into the balloon, or takes them out and
; writes to them. It ends when there is a number at 0x7010. Queues of 8 entries: inflate at 0x8000, deflate at 0x8400; in each,
; 0x100 on, the available ring, and 0x200 on, the used one. The list of pages is at 0xa000.
bits 64
org 0x1000
CONFIG  equ 0xe0008000
LIST    equ 0xa000
FIRST   equ 0x200
PAGES   equ 0x400
        mov ebx, CONFIG
        cmp dword [rbx], 0x10451af4
        jne failed
        mov edi, [rbx + 0x10]           ; where the BAR was put for us
        and edi, ~0xf
        mov word [rbx + 4], 6           ; memory and bus master
        mov byte [rdi + 0x14], 0        ; reset, acknowledge, driver
        mov byte [rdi + 0x14], 1
        mov byte [rdi + 0x14], 3
        mov dword [rdi + 0x8], 1        ; VERSION_1
        mov dword [rdi + 0xc], 1
        mov byte [rdi + 0x14], 0xb
        test byte [rdi + 0x14], 8
        jz failed
        xor ecx, ecx                    ; queues 0 and 1
        mov ebp, 0x8000
queue:  mov [rdi + 0x16], cx
        mov word [rdi + 0x18], 8
        mov [rdi + 0x20], ebp
        lea eax, [rbp + 0x100]
        mov [rdi + 0x28], eax
        add eax, 0x100
        mov [rdi + 0x30], eax
        mov word [rdi + 0x1c], 1
        mov qword [rbp], LIST           ; its only descriptor
        mov dword [rbp + 0xc], 0        ; to be read
        mov word [rbp + 0x104], 0       ; in the first entry; it never changes, but for the seven others
        mov qword [rbp + 0x106], 0
        mov dword [rbp + 0x10e], 0
        mov word [rbp + 0x112], 0
        add ebp, 0x400
        inc ecx
        cmp ecx, 2
        jb queue
        mov byte [rdi + 0x14], 0xf      ; driver OK
        xor esi, esi                    ; pages in the balloon
        mov eax, FIRST
        mov ecx, PAGES
        call touch
look:   pause
        cmp byte [0x7010], 0
        jne done
        mov ecx, [rdi + 0x2000]         ; what it shall do without
        cmp ecx, PAGES
        ja failed
        sub ecx, esi
        je look
        jl out_of_it
        lea eax, [rsi + FIRST]          ; into it: ecx pages from there on
        add esi, ecx
        mov ebp, 0x8000
        xor edx, edx
        call tell
        jmp said
out_of_it:
        neg ecx
        sub esi, ecx
        lea eax, [rsi + FIRST]
        mov ebp, 0x8400
        mov edx, 1
        call tell
        call touch
said:   mov [rdi + 0x2004], esi         ; what is in it
        jmp look
done:   mov al, 1
        mov dx, 0xf4
        out dx, al
failed: mov al, 0xee
        mov dx, 0xf4
        out dx, al

tell:   push rax                        ; that list to queue edx, whose rings are at rbp; back when it was used
        push rcx
        lea r9d, [rcx * 4]
        mov [rbp + 8], r9d
        mov r8d, LIST
fill:   mov [r8], eax
        add r8d, 4
        inc eax
        dec ecx
        jnz fill
        inc word [rbp + 0x102]          ; it is available
        mov [rdi + rdx * 4 + 0x3000], dx        ; rings
used:   pause
        mov ax, [rbp + 0x202]
        cmp ax, [rbp + 0x102]
        jne used
        pop rcx
        pop rax
        ret

touch:  mov r8d, eax                    ; ecx pages from page eax on
        shl r8, 12
more:   mov dword [r8], 0xaaaaaaaa
        add r8, 0x1000
        dec ecx
        jnz more
        ret
