; Reads a port by string instructions: as many elements to an exit as KVM takes.
bits 16
org 0x1000
        cld
        mov dx, 0x80
again:  mov di, 0x4000
        mov cx, 0x4000
        rep insb
        jmp again
