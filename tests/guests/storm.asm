; Writes to port 0x80, where nobody is, for ever; counts at 0x8000.
bits 16
org 0x1000
again:  out 0x80, al
        inc dword [0x8000]
        jmp again
