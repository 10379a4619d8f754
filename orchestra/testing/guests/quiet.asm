; A good neighbour: writes to a port now and then, and never locks the bus.
%macro ACT 0
        mov dx, [rel port]
        xor eax, eax
        out dx, al
%endmacro
%include "guest.inc"
