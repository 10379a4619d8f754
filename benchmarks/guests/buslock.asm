; Locks across a cache line for ever: one bus lock each time round.
bits 16
org 0x1000
again:  lock add dword [0x203e], 1
        jmp again
