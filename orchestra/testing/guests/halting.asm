; Ends well.
%macro ACT 0
        hlt
%endmacro
%include "guest.inc"
