; Says where it says it: on the debug console, then on the serial port.
bits 16
org 0x1000
        mov si, debug
        mov dx, 0xe9
        call say
        mov si, serial
        mov dx, 0x3f8
        call say
        hlt
say:    lodsb
        test al, al
        jz .done
        out dx, al
        jmp say
.done:  ret
debug:  db "debug ", 0
serial: db "serial", 0
