/* A whole VM in one call: the interpreter lock is given up once and not a dozen times, which is what makes launches that
 * happen together overlap. The order of the ioctls is that of Documentation/virt/kvm/api.rst. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "orc.h"

enum { SEGMENT_DATA = 0x3, SEGMENT_CODE = 0xb }; /* accessed, and writable or readable (Intel SDM vol. 3, table 3-1) */

void orc_cpuid_set_apic_id(struct kvm_cpuid2 *cpuid, uint32_t id)
{
	/* Where a leaf carries the (initial, x2, extended) APIC id: Intel SDM vol. 2 CPUID, AMD APM vol. 3 app. E. */
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		if (e->function == 0x1)
			e->ebx = (e->ebx & 0x00ffffff) | (id & 0xff) << 24;
		else if (e->function == 0xb || e->function == 0x1f)
			e->edx = id;
		else if (e->function == 0x8000001e)
			e->eax = id;
	}
}

static void set_segment(struct kvm_segment *s, uint16_t selector, uint8_t type)
{
	*s = (struct kvm_segment){.limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .db = 1, .s = 1,
				  .g = 1};
}

static void enter_at(struct kvm_sregs *s, const struct orc_entry *entry)
{
	if (entry->mode == 16) {
		s->cs.base = 0;
		s->cs.selector = 0;
		return;
	}
	set_segment(&s->cs, entry->code_selector, SEGMENT_CODE);
	if (entry->mode == 64) {
		s->cs.l = 1;
		s->cs.db = 0;
	}
	set_segment(&s->ds, entry->data_selector, SEGMENT_DATA);
	s->es = s->fs = s->gs = s->ss = s->ds;
	s->gdt.base = entry->gdt_base;
	s->gdt.limit = entry->gdt_limit;
	s->cr0 = entry->cr0;
	s->cr3 = entry->cr3;
	s->cr4 = entry->cr4;
	s->efer = entry->efer;
}

/* The name stays behind for the message. */
#define STEP(name, fd, argument)                                                          \
	do {                                                                              \
		plan->step = #name;                                                       \
		if ((rc = orc_ioctl_value(fd, name, (unsigned long)(argument))) < 0)      \
			return (int)rc;                                                   \
	} while (0)

int orc_kvm_build(struct orc_plan *plan)
{
	long rc;

	plan->vm = -1;
	plan->vcpus_made = 0;
	STEP(KVM_CREATE_VM, plan->kvm, 0);
	plan->vm = (int)rc;
	STEP(KVM_SET_IDENTITY_MAP_ADDR, plan->vm, &plan->identity_map);
	STEP(KVM_SET_TSS_ADDR, plan->vm, plan->tss);
	if (plan->bus_locks) {
		/* Before the first vCPU: the kernel accepts it later as well, and leaves those that exist uncovered. */
		struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_BUS_LOCK_EXIT, .args = {KVM_BUS_LOCK_DETECTION_EXIT}};

		STEP(KVM_CHECK_EXTENSION, plan->vm, KVM_CAP_X86_BUS_LOCK_EXIT);
		if (!(rc & KVM_BUS_LOCK_DETECTION_EXIT))
			return -EOPNOTSUPP; /* KVM_ENABLE_CAP would return 0 and do nothing */
		STEP(KVM_ENABLE_CAP, plan->vm, &cap);
	}
	if (plan->irqchip == ORC_SPLIT_IRQCHIP) {
		/* No pin is kept for an I/O APIC in user space: there is none. */
		struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {0}};

		STEP(KVM_ENABLE_CAP, plan->vm, &cap);
	}
	if (plan->irqchip == ORC_FULL_IRQCHIP) {
		struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};

		STEP(KVM_CREATE_IRQCHIP, plan->vm, 0);
		STEP(KVM_CREATE_PIT2, plan->vm, &pit);
	}
	for (uint32_t i = 0; i < plan->slots; i++)
		STEP(KVM_SET_USER_MEMORY_REGION, plan->vm, &plan->slot[i]);
	for (uint32_t i = 0; i < plan->vcpus; i++) {
		struct orc_entry *entry = &plan->entry[i];
		struct kvm_regs regs = {.rip = entry->rip, .rsp = entry->rsp, .rdi = entry->rdi, .rflags = 2};
		struct kvm_sregs sregs;
		void *run;

		STEP(KVM_CREATE_VCPU, plan->vm, i);
		plan->vcpu[i] = (int)rc;
		run = mmap(NULL, plan->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, plan->vcpu[i], 0);
		if (run == MAP_FAILED) {
			plan->step = "mmap of a vCPU";
			rc = -errno;
			close(plan->vcpu[i]);
			return (int)rc;
		}
		plan->run[i] = run;
		plan->vcpus_made = i + 1;
		orc_cpuid_set_apic_id(plan->cpuid, i);
		STEP(KVM_SET_CPUID2, plan->vcpu[i], plan->cpuid);
		STEP(KVM_GET_SREGS, plan->vcpu[i], &sregs);
		enter_at(&sregs, entry);
		STEP(KVM_SET_SREGS, plan->vcpu[i], &sregs);
		STEP(KVM_SET_REGS, plan->vcpu[i], &regs);
		if (plan->irqchip != ORC_NO_IRQCHIP) {
			/* With local APICs all but the first would wait for INIT and SIPI. */
			struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};

			STEP(KVM_SET_MP_STATE, plan->vcpu[i], &runnable);
		}
	}
	return 0;
}
