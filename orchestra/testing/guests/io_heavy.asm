; Writes to a port all the time.
%macro ACT 0
        mov dx, [rel port]
        xor eax, eax
        out dx, al
%endmacro
%include "guest.inc"
