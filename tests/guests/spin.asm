; Counts at 0x8000 for ever, and never leaves the guest.
bits 16
org 0x1000
again:  inc dword [0x8000]
        jmp again
