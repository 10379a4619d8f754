; Halts until its local APIC's timer interrupts, as often as KVM lets it, for ever. Needs an irqchip.
bits 16
org 0x1000
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x8000
        mov word [0x40 * 4], handler
        mov word [0x40 * 4 + 2], ax
        mov ecx, 0x1b                   ; IA32_APIC_BASE: x2APIC, whose registers are MSRs
        rdmsr
        or ax, 0xc00
        wrmsr
        xor edx, edx
        mov ecx, 0x80f                  ; spurious interrupts' vector; the APIC is on
        mov eax, 0x1ff
        wrmsr
        mov ecx, 0x83e                  ; divided by 1
        mov eax, 0xb
        wrmsr
        mov ecx, 0x832                  ; the timer: periodic
        mov eax, 0x20040
        wrmsr
        mov ecx, 0x838                  ; its period in bus cycles (KVM has 1 GHz): 10 us
        mov eax, 10000
        wrmsr
again:  sti
        hlt
        jmp again
handler:
        push eax
        push ecx
        push edx
        mov ecx, 0x80b                  ; end of interrupt
        xor eax, eax
        xor edx, edx
        wrmsr
        pop edx
        pop ecx
        pop eax
        iret
