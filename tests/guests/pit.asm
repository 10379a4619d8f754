; Programs channel 0 of a PIT, asks for its status, and ends with that as its code: 0x34 (low byte then high byte, mode 2)
; in the low six bits where there is a PIT, and all ones where nobody answers.
bits 16
org 0x1000
        mov al, 0x34
        out 0x43, al
        mov al, 0
        out 0x40, al
        out 0x40, al
        mov al, 0xe2                    ; read back the status of channel 0
        out 0x43, al
        in al, 0x40
        and al, 0x3f
        mov dx, 0xf4
        out dx, al
