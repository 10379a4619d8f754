; A guest that does to its devices what no driver does, at random: the same seed does the same again. Its bus has a disk, an
; entropy device and a console, in this order. At 0x7000 are, of 8 bytes each: the seed, how many rounds, whether it is tame
; (then it leaves alone what ends or stops a VM), how much memory there is, the round it is in, how many requests it has made
; that a device should have served, and how often it has found a device that wanted a reset. It ends by the exit port, if it
; gets there.
;
; Several vCPUs do the same at once, in the same memory, each by its own seed. Kept all the time: r12 random state, r13 the round. A device's BAR is in rbx, its queue's memory in rbp.
bits 64
org 0x1000
SEED    equ 0x7000
ROUNDS  equ 0x7008
TAME    equ 0x7010
MEMORY  equ 0x7018
ROUND   equ 0x7020
GOOD    equ 0x7028
BROKEN  equ 0x7030
NUMBER  equ 0x7038              ; of the device that is looked at
IDT     equ 0x6000
QUEUES  equ 0x10000             ; 8 KiB for each device, 4 KiB for each of its queues
BUFFERS equ 0x100000
ECAM    equ 0xe0000000
BARS    equ 0xc0000000
DEVICES equ 3
        cld
        mov rax, ignore                 ; an NMI, which a vector may be made
        mov [IDT + 0x20], ax
        mov word [IDT + 0x22], 0x10
        mov word [IDT + 0x24], 0x8e00
        shr rax, 16
        mov [IDT + 0x26], ax
        mov qword [IDT + 0x28], 0
        lidt [rel idtr]
        mov r12, [SEED]                 ; each vCPU its own
        lea rax, [rdi + rdi * 2]
        add r12, rax
        xor r13d, r13d
        xor ecx, ecx
first:  call device_at
        call drive
        mov ecx, [NUMBER]
        inc ecx
        cmp ecx, DEVICES
        jb first
again:  mov [ROUND], r13
        call random
        and eax, 15
        call [actions + rax * 8]
        inc r13
        cmp r13, [ROUNDS]
        jb again
        mov [ROUND], r13
        xor eax, eax
        out 0xf4, al
        jmp $

actions:
        dq configuration, configuration, ports, ports, string, registers, registers, registers
        dq descriptors, indices, table, good, good, reset, drive_one, window

; ---- chance

random:                                 ; rax. xorshift64: Marsaglia, J. Stat. Software 8 (2003)
        mov rax, r12
        shl rax, 13
        xor r12, rax
        mov rax, r12
        shr rax, 7
        xor r12, rax
        mov rax, r12
        shl rax, 17
        xor r12, rax
        mov rax, r12
        ret

value:                                  ; rax: any value, but more often one that is a limit of something
        push rcx
        call random
        mov ecx, eax
        shr rax, 8
        and ecx, 7
        jmp [.kinds + rcx * 8]
.kinds: dq .any, .small, .end, .buffer, .top, .zero, .bar, .bit
.any:   call random
        jmp .out
.small: and eax, 0xffff
        jmp .out
.end:   movzx eax, al                   ; near the end of memory, on both sides
        add rax, [MEMORY]
        sub rax, 0x80
        jmp .out
.buffer:
        and eax, 0xfffff
        add eax, BUFFERS
        jmp .out
.top:   and eax, 0x1fff
        not rax
        jmp .out
.zero:  xor eax, eax
        jmp .out
.bar:   and eax, 0x7fff                 ; a device's own registers
        or eax, BARS
        jmp .out
.bit:   mov ecx, eax
        mov eax, 1
        shl rax, cl
.out:   pop rcx
        ret

device_one:                             ; any of them
        call random
        xor edx, edx
        mov ecx, DEVICES
        shr rax, 5
        div rcx
        mov ecx, edx
device_at:                              ; ecx: which. rbx: its BAR, rbp: memory for its queues
        mov [NUMBER], ecx
        mov ebx, ecx
        shl ebx, 15
        mov edx, ECAM + 0x8010
        add edx, ebx
        mov eax, [rdx]
        mov edx, [rdx + 4]
        add ebx, BARS
        mov ebp, ecx
        shl ebp, 13
        add ebp, QUEUES
        and eax, ~0xf
        test edx, edx
        jnz .out
        cmp eax, BARS                   ; below there is memory, and this program in it
        jb .out
        cmp qword [TAME], 0
        je .there
        cmp eax, 0xfe000000             ; the interrupt controllers are the CPU's
        jae .out
.there:
        mov ebx, eax
.out:   ret

access:                                 ; edi: where. Reads, or writes rax, in one of four sizes
        mov rdx, rax
        call random
        test eax, 0x70
        jz .read
        mov ecx, eax
        mov rax, rdx
        and ecx, 3
        jmp [.sizes + rcx * 8]
.sizes: dq .byte, .word, .dword, .qword
.byte:  mov [rdi], al
        ret
.word:  mov [rdi], ax
        ret
.dword: mov [rdi], eax
        ret
.qword: mov [rdi], rax
        ret
.read:  test eax, 0x80
        jz .less
        mov rax, [rdi]
        ret
.less:  movzx eax, byte [rdi]
        ret

; ---- what it does

configuration:                          ; of devices that are there, and of one that is not
        call random
        mov edi, eax
        mov ecx, eax
        and edi, 0xff
        test ecx, 0x30000
        jnz .low
        mov edi, eax
        and edi, 0xfff
.low:   shr ecx, 20
        and ecx, 7
        shl ecx, 15
        or edi, ecx
        test eax, 0x40000
        jz .ports
        add edi, ECAM
        call value
        jmp access
.ports: mov eax, edi                    ; by 0xcf8: bus 0, the device number from bit 11 on, the offset
        shr ecx, 4
        and eax, 0xff
        or eax, ecx
        or eax, 0x80000000
        mov dx, 0xcf8
        out dx, eax
        call value
        mov ecx, eax
        mov dl, 0xfc
        test ecx, 0x100
        jnz .odd
        out dx, eax
        in eax, dx
        ret
.odd:   and cl, 3
        add dl, cl
        out dx, al
        in al, dx
        in ax, dx
        ret

port:                                   ; dx: one of all there are
        call random
        movzx ecx, al
        shr eax, 8
        and ecx, 31
        movzx edx, word [.first + rcx * 2]
        and eax, 7
        add edx, eax
        cmp qword [TAME], 0
        je .out
        cmp edx, 0x64                   ; reset, panic, power and exit
        je port
        cmp edx, 0xf0
        jb .more
        cmp edx, 0xff
        jb port
.more:  cmp edx, 0x4fd
        jb .out
        cmp edx, 0x604
        jb port
.out:   ret
.first: dw 0x3f8, 0x3f8, 0x3f8, 0x3f8, 0x60, 0x60, 0x70, 0x70
        dw 0x604, 0x604, 0x608, 0x60c, 0xcf8, 0xcf8, 0x20, 0xa0
        dw 0x40, 0x61, 0x80, 0x92, 0x2f8, 0x2f8, 0x4fe, 0x600
        dw 0x5fa, 0x60c, 0xe9, 0xfffb, 0, 0xe9, 0x4d0, 0x3e8

ports:  call port
        call value
        mov ecx, eax
        test ecx, 0x300
        jz .read
        test ecx, 0x400
        jnz .byte
        test ecx, 0x800
        jnz .word
        out dx, eax
        ret
.byte:  out dx, al
        ret
.word:  out dx, ax
        ret
.read:  in al, dx
        in ax, dx
        in eax, dx
        ret

string: call random                     ; once in a while: it takes long
        test eax, 0x700
        jnz .out
        call port
        mov ecx, eax
        and ecx, 0x7ff
        mov esi, BUFFERS
        mov edi, BUFFERS
        test eax, 0x1000
        jz .in
        test eax, 0x2000
        jz .words
        rep outsb
        ret
.words: shr ecx, 2
        rep outsd
        ret
.in:    test eax, 0x2000
        jz .inw
        rep insb
        ret
.inw:   shr ecx, 1
        rep insw
.out:   ret

registers:                              ; of a device: those that mean something, and any
        call device_one
        call random
        movzx ecx, al
        and ecx, 15
        shr eax, 8
        mov edi, [.parts + rcx * 8]
        and eax, [.parts + rcx * 8 + 4]
        add edi, eax
        add edi, ebx
        call value
        mov ecx, edi
        sub ecx, ebx
        and ecx, 0x7000
        cmp ecx, 0x4000
        jne access
        cmp qword [TAME], 0
        je access
        mov rcx, 0xfffff8fffffff8ff     ; a vector that is an interrupt, and not the end of this CPU's program
        and rax, rcx
        jmp access
.parts: dd 0, 0x3f, 0, 0x3f, 0, 0x3f, 0x14, 0, 0x16, 3, 0x18, 7, 0x1c, 3, 0x20, 0x1f
        dd 0x20, 0x1c, 0x1000, 7, 0x2000, 0x7f, 0x3000, 0xf, 0x3000, 0xc, 0x4000, 0x3f, 0x5000, 0xf, 0, 0x7fff

one_queue:                              ; rbp: a queue's memory, of a device that rbx is the BAR of; ecx: which queue
        call device_one
        call random
        mov ecx, eax
        and ecx, 1
        mov eax, ecx
        shl eax, 12
        add ebp, eax
        ret

ring:                                   ; ecx: the queue
        call random
        test eax, 0xf
        jz .any
        mov word [rbx + 0x3000 + rcx * 4], 0
        ret
.any:   mov [rbx + 0x3000 + rcx * 4], eax
        ret

descriptors:                            ; anything in any field, and a notification
        call one_queue
        push rcx
        call random
        mov edi, eax
        and edi, 0xff0                  ; of the direct ones, of an indirect table, and of both rings
        add edi, ebp
        call value
        mov [rdi], rax
        call value
        mov [rdi + 8], eax
        call random
        and eax, 0xf0007                ; flags; next
        test eax, 0x80000
        jz .next
        call random
.next:  mov [rdi + 12], eax
        pop rcx
        jmp ring

indices:                                ; of the available ring: back, far, and what it names
        call one_queue
        push rcx
        call random
        mov ecx, eax
        shr eax, 8
        and ecx, 3
        jz .back
        cmp ecx, 1
        je .far
        cmp ecx, 2
        je .head
        call random
        mov [rbp + 0x100], eax          ; flags and index in one
        jmp .out
.back:  sub word [rbp + 0x102], 3
        jmp .out
.far:   add word [rbp + 0x102], ax
        jmp .out
.head:  mov ecx, eax
        and ecx, 7
        shr eax, 4
        mov [rbp + 0x104 + rcx * 2], ax
        inc word [rbp + 0x102]
.out:   pop rcx
        jmp ring

table:                                  ; an indirect one: with a loop, too long, outside, of no whole entry
        call one_queue
        push rcx
        lea edi, [rbp + 0x800]
        mov ecx, 16
.fill:  call value
        mov [rdi], rax
        call value
        and eax, 0xfffff
        mov [rdi + 8], eax
        call random
        and eax, 0x70007
        mov [rdi + 12], eax
        add edi, 16
        loop .fill
        lea eax, [rbp + 0x800]
        mov [rbp], rax
        call value
        test eax, 1
        jz .whole
        mov eax, 256
.whole: mov [rbp + 8], eax
        mov dword [rbp + 12], 4
        pop rcx
        jmp submit

good:                                   ; what a driver would ask, of a device that may be driven or not
        call one_queue
        push rcx
        call random
        and eax, 0xff000
        add eax, BUFFERS
        mov edi, eax
        call random
        cmp dword [NUMBER], 0
        jne .plain
        xor ecx, ecx                    ; a disk: type, sector; data; status
        mov [rsp], rcx
        and ebp, ~0x1000
        mov ecx, eax
        and ecx, 13                     ; in, out, flush, id, and others
        mov [rdi], ecx
        mov dword [rdi + 4], 0
        shr eax, 8
        and eax, 0x3f
        mov [rdi + 8], rax
        mov [rbp], rdi
        mov dword [rbp + 8], 16
        mov dword [rbp + 12], 0x10001
        lea eax, [rdi + 0x200]
        mov [rbp + 16], rax
        call random
        and eax, 0xe00
        add eax, 0x200
        mov [rbp + 24], eax
        xor edx, edx
        test cl, 1                      ; what is written is read by the device
        setz dl
        lea edx, [rdx * 2 + 0x20001]
        mov [rbp + 28], edx
        lea eax, [rdi + 0x100]
        mov [rbp + 32], rax
        mov dword [rbp + 40], 1
        mov dword [rbp + 44], 2
        jmp .made
.plain: mov [rbp], rdi
        and eax, 0xff
        inc eax
        mov [rbp + 8], eax
        mov edx, 2
        cmp dword [NUMBER], 2           ; a console's second queue is the one that it reads
        jne .in
        cmp dword [rsp], 0
        je .in
        xor edx, edx
.in:    mov [rbp + 12], edx
.made:  inc qword [GOOD]
        pop rcx
submit: movzx eax, word [rbp + 0x102]   ; the first descriptor is available
        and eax, 7
        mov word [rbp + 0x104 + rax * 2], 0
        inc word [rbp + 0x102]
        jmp ring

reset:                                  ; while requests are in flight
        call good
        call random
        test al, 3
        jnz .queue
        mov byte [rbx + 0x14], 0
        test al, 4
        jz drive
        ret
.queue: mov word [rbx + 0x16], 0
        mov word [rbx + 0x38], 1
        ret

drive_one:
        call random
        test eax, 0x30
        jnz .out
        call device_one
        jmp drive
.out:   ret

drive:                                  ; a device as its driver does it, whatever was before. rbx: its BAR
        mov ecx, [NUMBER]
        mov edi, ecx
        shl edi, 15
        add edi, ECAM + 0x8000
        mov eax, ecx
        shl eax, 15
        add eax, BARS
        mov dword [rdi + 0x10], eax
        mov dword [rdi + 0x14], 0
        mov ebx, eax
        mov word [rdi + 4], 6
        movzx eax, byte [rdi + 0x34]
.find:  test eax, eax
        jz .found
        cmp byte [rdi + rax], 0x11
        je .msix
        movzx eax, byte [rdi + rax + 1]
        jmp .find
.msix:  mov word [rdi + rax + 2], 0x8000
.found: mov ebp, ecx
        shl ebp, 13
        add ebp, QUEUES
        test byte [rbx + 0x14], 0x40    ; DEVICE_NEEDS_RESET
        jz .fine
        inc qword [BROKEN]
.fine:  mov byte [rbx + 0x14], 0
        mov byte [rbx + 0x14], 1
        mov byte [rbx + 0x14], 3
        mov dword [rbx], 0
        call random
        mov dword [rbx + 8], 0
        and eax, [rbx + 4]
        mov [rbx + 0xc], eax
        mov dword [rbx + 8], 1
        mov dword [rbx + 0xc], 1        ; VERSION_1
        mov byte [rbx + 0x14], 0xb
        xor ecx, ecx
.queue: mov dword [rbx + 0x4000], 0xfee00000
        mov dword [rbx + 0x4008], 0x30
        mov dword [rbx + 0x400c], 0
        mov edi, ebp                    ; nothing is available
        push rcx
        mov ecx, 0x300 / 8
        xor eax, eax
        rep stosq
        pop rcx
        mov [rbx + 0x16], cx
        mov word [rbx + 0x18], 8
        mov word [rbx + 0x1a], 0
        mov [rbx + 0x20], ebp
        mov dword [rbx + 0x24], 0
        lea eax, [rbp + 0x100]
        mov [rbx + 0x28], eax
        mov dword [rbx + 0x2c], 0
        lea eax, [rbp + 0x200]
        mov [rbx + 0x30], eax
        mov dword [rbx + 0x34], 0
        mov word [rbx + 0x1c], 1
        add ebp, 0x1000
        inc ecx
        cmp ecx, 2
        jb .queue
        mov byte [rbx + 0x14], 0xf
        ret

window:                                 ; VIRTIO_PCI_CAP_PCI_CFG: the BAR by configuration space
        call device_one
        mov edi, [NUMBER]
        shl edi, 15
        add edi, ECAM + 0x8000
        movzx eax, byte [rdi + 0x34]
.find:  test eax, eax
        jz .out
        cmp byte [rdi + rax], 9
        jne .next
        cmp byte [rdi + rax + 3], 5
        je .found
.next:  movzx eax, byte [rdi + rax + 1]
        jmp .find
.found: lea edi, [rdi + rax]
        call value
        mov [rdi + 4], al               ; the BAR; offset; length
        test ah, 3
        jz .any
        mov byte [rdi + 4], 0
.any:   call value
        test eax, 0x10000
        jz .wide
        and eax, 0x3ff
.wide:  mov ecx, eax
        and ecx, 0x7000
        cmp ecx, 0x4000                 ; not the vectors
        je .out
        mov [rdi + 8], eax
        call random
        and eax, 7
        mov [rdi + 12], eax
        call value
        mov [rdi + 16], eax
        mov eax, [rdi + 16]
.out:   ret

ignore: iretq
idtr:   dw 0xfff
        dq IDT
