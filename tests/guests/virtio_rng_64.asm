; A driver of a virtio entropy device in slot 1 of the PCI bus, by virtio 1.2: turns it on, negotiates, asks for 64 bytes,
; is interrupted by an MSI (vector 0x30), and ends with how many interrupts there were when the bytes were there. Before
; it makes the request available, it waits for as long as there is a zero at 0x7010. The queue (8 entries) is at 0x8000: descriptors, at 0x8100 the
; available ring, at 0x8200 the used one. The bytes are for 0x9000.
bits 64
org 0x1000
CONFIG  equ 0xe0008000
APIC    equ 0xfee00000
COUNT   equ 0x7000
IDT     equ 0x6000
        mov al, 0xff                    ; the PICs stay quiet
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
        mov ebx, CONFIG
        cmp dword [rbx], 0x10441af4
        jne failed
        mov edi, [rbx + 0x10]           ; where the BAR was put for us
        and edi, ~0xf
        mov word [rbx + 4], 6           ; memory and bus master
        movzx eax, byte [rbx + 0x34]    ; MSI-X: find it
find:   test eax, eax
        jz failed
        cmp byte [rbx + rax], 0x11
        je found
        movzx eax, byte [rbx + rax + 1]
        jmp find
found:  mov word [rbx + rax + 2], 0x8000        ; it is on
        mov dword [rdi + 0x4010], APIC  ; entry 1
        mov dword [rdi + 0x4014], 0
        mov dword [rdi + 0x4018], 0x30
        mov dword [rdi + 0x401c], 0
        mov byte [rdi + 0x14], 0        ; reset, acknowledge, driver
        mov byte [rdi + 0x14], 1
        mov byte [rdi + 0x14], 3
        mov dword [rdi + 0x8], 1        ; VERSION_1
        mov dword [rdi + 0xc], 1
        mov byte [rdi + 0x14], 0xb
        test byte [rdi + 0x14], 8
        jz failed
        mov word [rdi + 0x16], 0        ; queue 0
        mov word [rdi + 0x18], 8
        mov word [rdi + 0x1a], 1        ; its vector
        cmp word [rdi + 0x1a], 1
        jne failed
        mov dword [rdi + 0x20], 0x8000
        mov dword [rdi + 0x28], 0x8100
        mov dword [rdi + 0x30], 0x8200
        mov word [rdi + 0x1c], 1
        mov byte [rdi + 0x14], 0xf      ; driver OK
        mov qword [0x8000], 0x9000      ; the request
        mov dword [0x8008], 64
        mov dword [0x800c], 2           ; to be written
        mov word [0x8104], 0
ready:  pause
        cmp byte [0x7010], 0
        je ready
        mov word [0x8102], 1            ; it is available
        mov word [rdi + 0x3000], 0      ; rings
wait_:  cli
        cmp dword [COUNT], 1
        jae served
        sti                             ; takes effect behind hlt, which an interrupt in between would end
        hlt
        jmp wait_
served: cmp word [0x8202], 1
        jne failed
        cmp dword [0x8208], 64
        jne failed
        mov eax, [COUNT]
        mov dx, 0xf4
        out dx, al
failed: mov al, 0xee
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
