; The first processor starts the others by INIT and SIPI, waits until as many came as it was told to wait for, and ends
; the VM with 42. Each of the others counts itself, and leaves what it found.
bits 32
org 0x1000

COUNT   equ 0x4004              ; how many others came
FOUND   equ 0x4008              ; their CS and mode: 0 in real mode
WANTED  equ 0x4010              ; how many must come, written by the host
FIRST   equ 0x4014              ; how often somebody started here
CODE    equ 0x8000              ; where the others start: page 8
APIC    equ 0xfee00000
SVR     equ APIC + 0xf0
ICR     equ APIC + 0x300
OTHERS  equ 0xc4000             ; all but the sender, asserted

        lock inc dword [FIRST]
        mov eax, [SVR]
        or eax, 0x100               ; the local APIC is on
        mov [SVR], eax
        mov esi, other
        mov edi, CODE
        mov ecx, other_end - other
        rep movsb
        mov dword [ICR], OTHERS | 0x500 ; INIT
        mov dword [ICR], OTHERS | 0x600 | CODE >> 12 ; SIPI
.wait:
        mov eax, [COUNT]
        cmp eax, [WANTED]
        jne .wait
        mov dx, 0xf4
        mov al, 42
        out dx, al
.end:
        hlt
        jmp .end

bits 16
other:
        xor ax, ax
        mov ds, ax
        mov [FOUND], cs
        smsw ax
        and ax, 1                   ; protection enabled
        mov [FOUND + 2], ax
        lock inc dword [COUNT]
.end:
        hlt
        jmp .end
other_end:
