; Goes through the modes as an operating system does, and halts in each, so that the CPU's state in it can be kept: what a
; guest begins with. nasm -f bin -o enter.bin enter.asm
%define CR0_PE          1
%define CR0_PG          1 << 31
%define CR4_PAE         1 << 5
%define MSR_EFER        0xc0000080
%define EFER_LME        1 << 8
%define PAGE_TABLES     0x2000
org 0x1000
bits 16
        lgdt [gdtr]
        mov eax, cr0
        or eax, CR0_PE
        mov cr0, eax
        jmp dword 0x08:protected
bits 32
protected:
        mov ax, 0x18
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        mov ss, ax
        hlt

        mov dword [PAGE_TABLES], PAGE_TABLES + 0x1003           ; one 2 MiB page from 0
        mov dword [PAGE_TABLES + 0x1000], PAGE_TABLES + 0x2003
        mov dword [PAGE_TABLES + 0x2000], 0x83
        mov eax, cr4
        or eax, CR4_PAE
        mov cr4, eax
        mov eax, PAGE_TABLES
        mov cr3, eax
        mov ecx, MSR_EFER
        rdmsr
        or eax, EFER_LME
        wrmsr
        mov eax, cr0
        or eax, CR0_PG
        mov cr0, eax
        jmp 0x10:long_mode
bits 64
long_mode:
        hlt

align 8
gdt:    dq 0
        dq 0x00cf9b000000ffff           ; 0x08: code, 32-bit
        dq 0x00af9b000000ffff           ; 0x10: code, 64-bit
        dq 0x00cf93000000ffff           ; 0x18: data
gdtr:   dw gdtr - gdt - 1
        dd gdt
