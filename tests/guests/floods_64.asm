; 500 rounds of what needs nobody: MMIO and ports that nobody claims, the serial port, the debug console, and reads of the
; exit port.
bits 64
org 0x1000
        mov ebx, 0xd0000000
        mov ecx, 500
again:  mov rax, [rbx]
        mov [rbx], eax
        in al, 0x80
        out 0x80, al
        mov dx, 0x3fd
        in al, dx
        mov dx, 0x3f8
        out dx, al
        out 0xe9, al
        in al, 0xe9
        in eax, 0xf4
        dec ecx
        jnz again
        hlt
