/* A whole VM in one call: the interpreter lock is given up once and not a dozen times, which is what makes launches that
 * happen together overlap. The order of the ioctls is that of Documentation/virt/kvm/api.rst. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "orc.h"

void orc_cpuid_set_apic_id(struct kvm_cpuid2 *cpuid, uint32_t id)
{
	/* Where a leaf carries the (initial, x2, extended) APIC id: Intel SDM vol. 2 CPUID, AMD APM vol. 3 app. E. */
	for (uint32_t i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		if (e->function == 0x1)
			e->ebx = (e->ebx & 0x00ffffff) | (id & 0xff) << 24;
		else if (e->function == 0xb || e->function == 0x1f)
			e->edx = id;
		else if (e->function == 0x8000001e) {
			e->eax = id;
			e->ebx = (e->ebx & 0xffffff00) | (id / ((e->ebx >> 8 & 0xff) + 1) & 0xff); /* of which core */
		}
	}
}

/* Who a vCPU is stays the kernel's to say: its APIC base has the address, and marks the boot processor. Nor does an entry
 * state have an interrupt that is on its way. */
static void enter_at(struct kvm_sregs *s, const struct kvm_sregs *entry)
{
	__u64 apic_base = s->apic_base;

	*s = *entry;
	s->apic_base = apic_base;
	memset(s->interrupt_bitmap, 0, sizeof s->interrupt_bitmap);
}

/* As firmware leaves a local APIC for a guest that has not looked at it yet: the PICs' interrupts come in by LINT0, and
 * NMIs by LINT1 (Intel MultiProcessor Specification 1.4, 3.6.2.2, virtual wire mode). */
static void wire_lints(struct kvm_lapic_state *apic)
{
	enum { LINT0 = 0x350, LINT1 = 0x360, DELIVERY = 7 << 8, NMI = 4 << 8, EXT_INT = 7 << 8, MASKED = 1 << 16 };
	uint32_t value;

	memcpy(&value, apic->regs + LINT0, sizeof value);
	value = (value & ~(uint32_t)(DELIVERY | MASKED)) | EXT_INT;
	memcpy(apic->regs + LINT0, &value, sizeof value);
	memcpy(&value, apic->regs + LINT1, sizeof value);
	value = (value & ~(uint32_t)(DELIVERY | MASKED)) | NMI;
	memcpy(apic->regs + LINT1, &value, sizeof value);
}

/* The name stays behind for the message. */
#define STEP(name, fd, argument)                                                          \
	do {                                                                              \
		plan->step = #name;                                                       \
		if ((rc = orc_ioctl_value(fd, name, (unsigned long)(argument))) < 0)      \
			return (int)rc;                                                   \
	} while (0)

/* The order counts: CPUID says which MSRs there are; MSRs come before registers, which they give their meaning. */
static int set_up(struct orc_plan *plan, uint32_t i)
{
	const struct orc_entry *entry = &plan->entry[i];
	int vcpu = plan->vcpu[i];
	struct kvm_sregs sregs;
	long rc;

	orc_cpuid_set_apic_id(plan->cpuid, i);
	for (uint32_t leaf = 0; leaf < plan->cpuid->nent; leaf++) {
		if (plan->cpuid->entries[leaf].function != 0x40000010)
			continue;
		STEP(KVM_GET_TSC_KHZ, vcpu, 0); /* the guest's rate, known only now that it has a vCPU */
		plan->cpuid->entries[leaf].eax = (uint32_t)rc;
	}
	STEP(KVM_SET_CPUID2, vcpu, plan->cpuid);
	if (entry->msrs) {
		STEP(KVM_SET_MSRS, vcpu, entry->msrs);
		if (rc < (long)entry->msrs->nmsrs) { /* the number of those that were set, before one that was refused */
			plan->msr = entry->msrs->entries[rc].index;
			plan->step = "KVM_SET_MSRS of MSR";
			return -EINVAL;
		}
	}
	if (plan->irqchip) {
		struct kvm_lapic_state apic;

		STEP(KVM_GET_LAPIC, vcpu, &apic);
		wire_lints(&apic);
		STEP(KVM_SET_LAPIC, vcpu, &apic);
	}
	if (entry->waits)
		return 0; /* KVM has made it so: all but the boot processor wait for INIT and SIPI where there are local APICs */
	STEP(KVM_GET_SREGS, vcpu, &sregs);
	enter_at(&sregs, entry->special);
	STEP(KVM_SET_SREGS, vcpu, &sregs);
	STEP(KVM_SET_REGS, vcpu, &entry->registers);
	if (plan->irqchip && i) {
		struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};

		STEP(KVM_SET_MP_STATE, vcpu, &runnable);
	}
	return 0;
}

int orc_kvm_build(struct orc_plan *plan)
{
	return orc_kvm_build_in(plan, -1);
}

int orc_kvm_build_in(struct orc_plan *plan, int vm)
{
	long rc;

	plan->vm = vm;
	plan->vcpus_made = 0;
	if (vm < 0) {
		STEP(KVM_CREATE_VM, plan->kvm, 0);
		plan->vm = (int)rc;
	}
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
	if (plan->irqchip == ORC_FULL_IRQCHIP)
		STEP(KVM_CREATE_IRQCHIP, plan->vm, 0);
	if (plan->pit) {
		struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};

		STEP(KVM_CREATE_PIT2, plan->vm, &pit);
	}
	if (plan->dirty_ring) {
		/* Before the first vCPU, whose ring is made with it. */
		struct kvm_enable_cap cap = {.args = {plan->dirty_ring * sizeof(struct kvm_dirty_gfn)}};

		STEP(KVM_CHECK_EXTENSION, plan->vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
		cap.cap = rc ? KVM_CAP_DIRTY_LOG_RING_ACQ_REL : KVM_CAP_DIRTY_LOG_RING;
		STEP(KVM_ENABLE_CAP, plan->vm, &cap);
	}
	for (uint32_t i = 0; i < plan->slots; i++)
		STEP(KVM_SET_USER_MEMORY_REGION, plan->vm, &plan->slot[i]);
	for (uint32_t i = 0; i < plan->vcpus; i++) {
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
		rc = set_up(plan, i);
		if (rc)
			return (int)rc;
	}
	return 0;
}
