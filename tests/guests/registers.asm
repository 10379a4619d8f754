; Known values in the registers, then for ever the same instruction.
bits 16
org 0x1000
        mov eax, 0x11111111
        mov ebx, 0x22222222
        mov ecx, 0x33333333
        mov edx, 0x44444444
        jmp $
