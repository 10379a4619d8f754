; Crashes as a kernel does: an exception, and no table to look its handler up in.
%macro ACT 0
        lidt [rel no_table]
        ud2
no_table:
        dw 0
        dq 0
%endmacro
%include "guest.inc"
