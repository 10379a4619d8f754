"""The kvm backend: the host's /dev/kvm, at the kernel's three levels (system, VM, vCPU)."""
