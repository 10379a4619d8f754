; A quiet tenant: works, and writes to a port that nobody listens at once every 1024 units.
%macro RARELY 0
        out 0x80, al
%endmacro
%include "quiet.inc"
