; A quiet tenant: works, and makes one split lock every 1024 units.
%macro RARELY 0
        lock add dword [0x903e], 1
%endmacro
%include "quiet.inc"
