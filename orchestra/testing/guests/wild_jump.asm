; Crashes in a way that the hypervisor can't go on from: goes on where no memory is.
%macro ACT 0
        mov eax, 0xd0000000     ; between the end of RAM and the interrupt controllers
        jmp rax
%endmacro
%include "guest.inc"
