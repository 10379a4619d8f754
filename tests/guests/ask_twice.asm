; Each vCPU reads port 0x500 + its number, once, to 0x8000 + 4 times its number.
bits 16
org 0x1000
        mov dx, di
        add dx, 0x500
        shl di, 2
        in eax, dx
        mov [di + 0x8000], eax
        hlt
