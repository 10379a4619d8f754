/* For Linux guests: a VMM of its own, by /dev/kvm. Its guest, in real mode, makes as many split locks as it is told, and halts.
 *
 *     nested COUNT */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { CODE = 0x1000, ACROSS = 0x203f, MEMORY = 0x4000 };

static const uint8_t guest[] = {
	0x66, 0xb9, 0, 0, 0, 0,			     /* mov ecx, COUNT */
	0xf0, 0xff, 0x06, ACROSS & 0xff, ACROSS >> 8, /* again: lock inc word [ACROSS] */
	0x66, 0x49,				     /* dec ecx */
	0x75, 0xf7,				     /* jnz again */
	0xf4,					     /* hlt */
};

static int failed(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	uint32_t count = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
	struct kvm_userspace_memory_region region = {.memory_size = MEMORY};
	struct kvm_regs registers = {.rip = CODE, .rflags = 2};
	struct kvm_sregs segments;
	int kvm, vm, vcpu;
	struct kvm_run *run;
	uint8_t *memory;

	if ((kvm = open("/dev/kvm", O_RDWR)) < 0)
		return failed("/dev/kvm");
	if ((vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0)
		return failed("KVM_CREATE_VM");
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return failed("mmap");
	memset(memory, 0, MEMORY);
	memcpy(memory + CODE, guest, sizeof guest);
	memcpy(memory + CODE + 2, &count, sizeof count);
	region.userspace_addr = (uintptr_t)memory;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		return failed("KVM_SET_USER_MEMORY_REGION");
	if ((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0)
		return failed("KVM_CREATE_VCPU");
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		return failed("kvm_run");
	if (ioctl(vcpu, KVM_GET_SREGS, &segments))
		return failed("KVM_GET_SREGS");
	segments.cs.base = segments.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &segments) || ioctl(vcpu, KVM_SET_REGS, &registers))
		return failed("registers");
	if (ioctl(vcpu, KVM_RUN, 0))
		return failed("KVM_RUN");
	printf("exit %u, %u split locks in a nested guest\n", run->exit_reason, *(uint16_t *)(memory + ACROSS));
	return 0;
}
