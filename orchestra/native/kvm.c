#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "core.h"

/* ---- ioctls --------------------------------------------------------------------------------------------------- */

long orc_ioctl(int fd, unsigned long request, void *argument)
{
	return orc_ioctl_value(fd, request, (unsigned long)argument);
}

long orc_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
	long rc;

	/* KVM_CREATE_VM returns EINTR on loaded hosts when a signal comes while it waits (QEMU retries likewise). */
	do
		rc = ioctl(fd, request, argument);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : rc;
}

/* ---- the run loop --------------------------------------------------------------------------------------------- */

void orc_vcpu_bind_kvm(orc_vcpu *v, int fd, struct kvm_run *run, bool sync_regs)
{
	v->fd = fd;
	v->run = run;
	v->sync_regs = sync_regs;
	v->witness = &orc_kvm_witness;
}

void orc_vcpu_set_dirty(orc_vcpu *v, orc_dirty *dirty, uint32_t ring)
{
	v->dirty = dirty;
	v->dirty_ring = ring;
}

void orc_take_data(struct orc_record *r, const void *data, size_t size)
{
	r->data_size = (uint8_t)(size < sizeof r->data ? size : sizeof r->data);
	memcpy(r->data, data, r->data_size);
}

/* What counting and charging need. */
static void name(struct orc_record *r, const struct kvm_run *run, unsigned flags)
{
	r->reason = (uint16_t)(run->exit_reason < 0xffff ? run->exit_reason : 0xffff);
	r->flags = (uint16_t)flags;
	r->has_rip = 0;
}

/* What an exit says, in the order that orchestra/native/records.py reads it: only where somebody will look. */
static void describe(struct orc_record *r, const struct kvm_run *run)
{
	r->data_size = 0;
	memset(r->arg, 0, sizeof r->arg);
	switch (run->exit_reason) {
	case KVM_EXIT_UNKNOWN:
		r->arg[0] = run->hw.hardware_exit_reason;
		break;
	case KVM_EXIT_EXCEPTION:
		r->arg[0] = run->ex.exception;
		r->arg[1] = run->ex.error_code;
		break;
	case KVM_EXIT_IO:
		r->arg[0] = run->io.port;
		r->arg[1] = run->io.size;
		r->arg[2] = run->io.count;
		r->arg[3] = run->io.direction == KVM_EXIT_IO_OUT;
		if (r->arg[3])
			orc_take_data(r, (const char *)run + run->io.data_offset, (size_t)run->io.size * run->io.count);
		break;
	case KVM_EXIT_MMIO:
		r->arg[0] = run->mmio.phys_addr;
		r->arg[1] = run->mmio.len;
		r->arg[2] = run->mmio.is_write;
		if (run->mmio.is_write)
			orc_take_data(r, run->mmio.data, run->mmio.len <= 8 ? run->mmio.len : 8);
		break;
	case KVM_EXIT_HYPERCALL:
		r->arg[0] = run->hypercall.nr;
		for (int i = 0; i < 3; i++)
			r->arg[1 + i] = run->hypercall.args[i];
		break;
	case KVM_EXIT_DEBUG:
		r->arg[0] = run->debug.arch.exception;
		r->arg[1] = run->debug.arch.pc;
		r->arg[2] = run->debug.arch.dr6;
		r->arg[3] = run->debug.arch.dr7;
		break;
	case KVM_EXIT_FAIL_ENTRY:
		r->arg[0] = run->fail_entry.hardware_entry_failure_reason;
		r->arg[1] = run->fail_entry.cpu;
		break;
	case KVM_EXIT_SET_TPR:
		r->arg[0] = run->cr8;
		break;
	case KVM_EXIT_TPR_ACCESS:
		r->arg[0] = run->tpr_access.rip;
		r->arg[1] = run->tpr_access.is_write;
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		r->arg[0] = run->internal.suberror;
		if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata >= 3 &&
		    run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
			orc_take_data(r, run->emulation_failure.insn_bytes,
				  run->emulation_failure.insn_size <= 15 ? run->emulation_failure.insn_size : 15);
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		r->arg[0] = run->system_event.type;
		r->arg[1] = run->system_event.ndata;
		for (int i = 0; i < 3; i++)
			r->arg[2 + i] = run->system_event.data[i];
		break;
	case KVM_EXIT_IOAPIC_EOI:
		r->arg[0] = run->eoi.vector;
		break;
	case KVM_EXIT_HYPERV:
		r->arg[0] = run->hyperv.type;
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		r->arg[0] = run->msr.index;
		r->arg[1] = run->msr.reason;
		r->arg[2] = run->msr.data;
		break;
	case KVM_EXIT_XEN:
		r->arg[0] = run->xen.type;
		break;
	case KVM_EXIT_NOTIFY:
	case KVM_EXIT_MEMORY_FAULT: /* read through `hw`, the union's start: older headers have no member for them */
		memcpy(r->arg, &run->hw, (run->exit_reason == KVM_EXIT_NOTIFY ? 4 : 24));
		break;
	default:
		break;
	}
}

static void sample_rip(orc_vcpu *v)
{
	struct kvm_regs regs;

	if (v->run->kvm_valid_regs & KVM_SYNC_X86_REGS) /* as it was set for this run: listeners may have come since */
		v->record.rip = v->run->s.regs.regs.rip;
	else if (!ioctl(v->fd, KVM_GET_REGS, &regs))
		v->record.rip = regs.rip;
	else
		return;
	v->record.has_rip = 1;
}

static bool finishes_on_entry(unsigned reason)
{
	return reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO || reason == KVM_EXIT_X86_RDMSR ||
	       reason == KVM_EXIT_X86_WRMSR || reason == KVM_EXIT_HYPERCALL || reason == KVM_EXIT_HYPERV ||
	       reason == KVM_EXIT_XEN;
}

/* The guest's access, if this exit is one. ORC_ANSWERED: it may go on. */
static enum orc_why answer(orc_vcpu *v)
{
	struct kvm_run *run = v->run;

	if (run->exit_reason == KVM_EXIT_IO)
		return orc_access_begin(v, ORC_IO, run->io.port, run->io.size, run->io.count,
					run->io.direction == KVM_EXIT_IO_OUT, (char *)run + run->io.data_offset);
	return orc_access_begin(v, ORC_MMIO, run->mmio.phys_addr, run->mmio.len, 1, run->mmio.is_write, run->mmio.data);
}

static enum orc_why run_guest(orc_vcpu *v)
{
	struct kvm_run *run = v->run;

	for (;;) {
		enum orc_why why;
		orc_u64 mask;
		unsigned reason;
		bool subscribed;
		int rc;

		if (v->io.open && (why = orc_access_resume(v)) != ORC_ANSWERED)
			return why;
		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			if (!v->unfinished) {
				if (orc_commanded(v))
					return ORC_COMMAND;
				continue;
			}
			/* KVM completes the last I/O on entry; with this flag it does no more than that, and registers
			 * are then what the guest would see (api.rst, KVM_EXIT_IO and immediate_exit). */
			__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		} else if (v->waiting && !orc_wait_turn(v)) {
			continue;
		}

		mask = atomic_load_explicit(&v->event_mask, memory_order_relaxed);
		run->kvm_valid_regs = v->sync_regs && mask & (1ull << ORC_EVENT_BUS_LOCK) ? KVM_SYNC_X86_REGS : 0;
		atomic_store_explicit(&v->in_guest, true, memory_order_seq_cst);
		rc = ioctl(v->fd, KVM_RUN, 0);
		v->error = errno;
		/* Release is enough: a kick that still reads true sends a signal that finds nothing to interrupt. */
		atomic_store_explicit(&v->in_guest, false, memory_order_release);

		if (rc < 0) {
			/* `flags` may be left from an earlier run: not looked at. */
			if (v->error == EINTR || v->error == EAGAIN) {
				/* Cleared before `commands` is read again: a kick that comes later sets it again. */
				__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
				v->unfinished = false;
				orc_count(&v->kicks, 1);
				continue;
			}
			if (v->error != EFAULT || run->exit_reason != KVM_EXIT_MEMORY_FAULT)
				return ORC_ERROR;
			name(&v->record, run, 0);
			describe(&v->record, run);
			orc_vcpu_account(v, &v->record, orc_now()); /* described whoever listens */
			return ORC_EXIT;
		}

		reason = run->exit_reason;
		name(&v->record, run, run->flags);
		subscribed = orc_is_subscribed(v, reason, run->flags);
		if (subscribed) {
			describe(&v->record, run);
			if (run->flags & KVM_RUN_X86_BUS_LOCK)
				sample_rip(v);
		}
		if (reason == KVM_EXIT_IO)
			orc_vcpu_weigh(v, run->io.count); /* up to a page of a string instruction */
		orc_account(v, &v->record, orc_now(), subscribed);
		v->unfinished = finishes_on_entry(reason);

		switch (reason) {
		case KVM_EXIT_X86_BUS_LOCK:
		case KVM_EXIT_INTR:
		case KVM_EXIT_IRQ_WINDOW_OPEN:
		case KVM_EXIT_SET_TPR: /* a guest without an irqchip makes as many as it likes, by CR8 */
		case KVM_EXIT_TPR_ACCESS:
		case KVM_EXIT_IOAPIC_EOI:
			break; /* nothing is to be done: not a matter for Python, which no meter would charge for */
		case KVM_EXIT_DIRTY_RING_FULL:
			if (!v->dirty)
				return ORC_EXIT;
			rc = orc_dirty_drain(v->dirty, v->dirty_ring);
			if (rc) {
				v->error = -rc;
				return ORC_ERROR;
			}
			break;
		case KVM_EXIT_IO:
		case KVM_EXIT_MMIO:
			why = answer(v);
			if (why != ORC_ANSWERED)
				return why;
			break;
		default:
			if (!subscribed)
				describe(&v->record, run);
			return ORC_EXIT;
		}
	}
}

enum orc_why orc_kvm_run(orc_vcpu *v)
{
	return orc_run(v, run_guest);
}
