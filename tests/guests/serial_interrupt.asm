; Enables the serial port's interrupt for an empty transmitter, which comes at once, and ends with the cause it tells.
bits 16
org 0x1000
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
        mov word [4 * 12], handler      ; IRQ 4
        mov word [4 * 12 + 2], 0
        mov al, 0x11                    ; the first PIC: vectors from 8, IRQ 4 alone
        out 0x20, al
        mov al, 8
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xef
        out 0x21, al
        mov dx, 0x3f9
        mov al, 2
        out dx, al
        sti
wait_:  hlt
        jmp wait_
handler:
        mov dx, 0x3fa
        in al, dx
        mov dx, 0xf4
        out dx, al
