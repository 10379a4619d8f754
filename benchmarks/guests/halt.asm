; Halts for good: with an in-kernel irqchip KVM_RUN then blocks, as no interrupt can come.
bits 16
org 0x1000
        cli
again:  hlt
        jmp again
