; Sets the alarm of tests/alarm.py to the milliseconds at 0x8000, waits for its interrupt (line 5, held until it is
; acknowledged, or an edge), three times, and ends with how many there were.
bits 16
org 0x1000
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
        mov word [4 * 13], handler      ; IRQ 5
        mov word [4 * 13 + 2], 0
        mov al, [0x8006]                ; the first PIC, level- (0x19) or edge-triggered (0x11): vectors from 8, IRQ 5
        out 0x20, al
        mov al, 8
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xdf
        out 0x21, al
        xor cx, cx
next:   inc cx
        mov dx, 0x600
        mov eax, [0x8000]
        out dx, eax                     ; arms it
wait_:  cli
        cmp [0x8004], cx
        jae served
        sti
        hlt
        jmp wait_
served: cmp cx, 3
        jb next
        mov ax, [0x8004]
        mov dx, 0xf4
        out dx, al
handler:
        push ax
        push dx
        mov dx, 0x604
        in eax, dx                      ; acknowledges: the line falls
        inc word [0x8004]
        mov al, 0x20
        out 0x20, al
        pop dx
        pop ax
        iret
