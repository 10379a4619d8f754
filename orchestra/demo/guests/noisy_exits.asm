; A noisy neighbour: an exit storm. It counts each write to the port as a unit of work.
bits 32
org 0x1000
again:  out 0x80, al
        inc dword [0x8000]
        jmp again
