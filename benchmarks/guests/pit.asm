; Halts until its PIT interrupts, which it asks for 100,000 times a second, for ever. Needs an irqchip with a PIT.
bits 16
org 0x1000
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x8000
        mov word [8 * 4], handler       ; IRQ 0, as the PIC has it after reset and below
        mov word [8 * 4 + 2], ax
        mov al, 0x11                    ; ICW1 to 4: cascaded, vectors from 8 up, 8086 mode
        out 0x20, al
        mov al, 8
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xfe                    ; all but IRQ 0 masked
        out 0x21, al
        mov al, 0x34                    ; PIT channel 0, mode 2, a divisor of 12
        out 0x43, al
        mov al, 12
        out 0x40, al
        mov al, 0
        out 0x40, al
again:  sti
        hlt
        jmp again
handler:
        push ax
        mov al, 0x20
        out 0x20, al
        pop ax
        iret
