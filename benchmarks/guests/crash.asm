; Goes where no memory is: KVM can't emulate what it can't fetch, and the VM fails at once.
bits 16
org 0x1000
        jmp 0x2000:0
