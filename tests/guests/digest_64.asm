; Has the digest device compute three CRCs, is interrupted by an MSI (vector 0x30) for each, and ends with how many
; interrupts there were. The descriptors are at 0x8000, 0x8020 and 0x8040, the data at 0x9000: 16, 32 and 48 bytes.
bits 64
org 0x1000
DEVICE  equ 0xd0000000
APIC    equ 0xfee00000
COUNT   equ 0x7000
IDT     equ 0x6000
        mov al, 0xff                    ; the PICs, where there are any, stay quiet
        out 0x21, al
        out 0xa1, al
        mov rax, handler                ; vector 0x30: a 64-bit interrupt gate
        mov [IDT + 0x300], ax
        mov word [IDT + 0x302], 0x10
        mov word [IDT + 0x304], 0x8e00
        shr rax, 16
        mov [IDT + 0x306], ax
        mov qword [IDT + 0x308], 0
        lidt [rel idtr]
        mov ebx, APIC
        mov dword [rbx + 0xf0], 0x1ff   ; the local APIC is on
        mov ebx, DEVICE
        mov eax, APIC
        mov [rbx + 0x10], rax
        mov dword [rbx + 0x18], 0x30
        mov rdi, 0x8000
        xor esi, esi
next:   inc esi
        mov qword [rdi], 0x9000
        mov eax, esi
        shl eax, 4
        mov [rdi + 8], eax
        mov dword [rdi + 12], 1         ; asked
        mov [rbx + 8], rdi
        mov dword [rbx + 0x20], 1       ; rings
wait_:  cli
        cmp [COUNT], esi
        jae served
        sti                             ; takes effect behind hlt, which an interrupt in between would end
        hlt
        jmp wait_
served: add rdi, 0x20
        cmp esi, 3
        jb next
        mov eax, [COUNT]
        mov dx, 0xf4
        out dx, al
handler:
        push rax
        inc dword [COUNT]
        mov eax, APIC
        mov dword [rax + 0xb0], 0       ; end of interrupt
        pop rax
        iretq
idtr:   dw 0xfff
        dq IDT
