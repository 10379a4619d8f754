; Asks for CPUID leaves and reads and writes MSRs, for ever: the kernel answers.
bits 16
org 0x1000
again:  xor eax, eax
        xor ecx, ecx
        cpuid
        mov ecx, 0x10           ; the time-stamp counter
        rdmsr
        mov ecx, 0x277          ; the page attribute table
        rdmsr
        wrmsr
        jmp again
