; A noisy neighbour: a locked instruction whose operand crosses a cache line, again and again.
%macro ACT 0
        lock inc dword [rdi + EDGE]
%endmacro
%include "guest.inc"
