; A guilty instruction at 0xc0001000 and up, which is mapped to where it is loaded: 32-bit paging, 4 MiB pages.
; As in sites.inc: COUNT, ROUNDS. At 0x1008: where `lock` begins and ends, and the page directory.
bits 32
org 0x1000
HIGH    equ 0xc0000000
COUNT   equ 0x8000
ROUNDS  equ 0x8004
TABLE   equ 0xa000
        jmp short start
        times 8 - ($ - $$) nop
        dd HIGH + locked, HIGH + behind, TABLE
start:
        mov dword [0x2000], 0
        mov dword [COUNT], 0
        mov edi, TABLE
        mov ecx, 1024
        xor eax, eax
        rep stosd
        mov dword [TABLE], 0x83         ; 4 MiB at 0, present, writable; and the same at HIGH
        mov dword [TABLE + (HIGH >> 22) * 4], 0x83
        mov eax, cr4
        or eax, 0x10                    ; PSE
        mov cr4, eax
        mov eax, TABLE
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        mov eax, HIGH + locked
        jmp eax
locked: lock inc dword [0x203e]
behind: inc dword [COUNT]
        mov eax, [ROUNDS]
        cmp [COUNT], eax
        jb locked
        hlt
        jmp $
