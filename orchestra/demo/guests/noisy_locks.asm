; A noisy neighbour: nothing but split locks, across the line at 0x9040. It counts each as a unit of work.
bits 32
org 0x1000
again:  lock add dword [0x903e], 1
        inc dword [0x8000]
        jmp again
