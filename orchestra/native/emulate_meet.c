/* A hooked instruction, before it is executed: what it is by the state the CPU is in, and what becomes of it.
 *
 *   it locks                     see emulate_locks.c; it goes on inside unicorn
 *   port access, HLT             the guest stops: we execute it
 *   what unicorn gets wrong      it raises what a CPU raises, is executed by itself, or ends the guest
 *   other code stands there now  it goes on
 *
 * Unicorn takes SYSCALL for a NOP, and a LOCK prefix where none may be as well; its IN and OUT look at no permission; INT
 * is raised behind the instruction. See orc_insn_kind. */
#include "emulate.h"

enum {
	MSR_SYSENTER_CS = 0x174,
	SYSCALL = 0x05,
	SYSENTER = 0x34,
	INTO = 0xce,
};

static bool is_breakpoint(const struct orc_emulator *e, uint64_t address)
{
	for (unsigned i = 0; i < e->debug.breakpoints; i++)
		if (e->debug.breakpoint[i] == address)
			return true;
	return false;
}

static void alone(struct orc_emulator *e)
{
	e->alone = true;
	orc_emulator_stop(e);
}

static void ours(struct orc_emulator *e)
{
	e->met.ours = true;
	orc_emulator_stop(e);
}

/* SYSCALL and SYSENTER. */
static void meet_syscall(struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->met.insn;

	if (insn->opcode == SYSCALL && (orc_state_bits(e) != 64 || !(orc_msr(e, MSR_EFER) & EFER_SCE))) {
		orc_emulator_raise(e, EXCEPTION_UD);
	} else if (insn->opcode == SYSENTER && !(orc_msr(e, MSR_SYSENTER_CS) & 0xfffc)) {
		orc_emulator_raise(e, EXCEPTION_GP);
	} else {
		e->failed = "it does not execute SYSCALL and SYSENTER; the kvm backend can";
		orc_emulator_stop(e);
	}
}

static void meet(struct orc_emulator *e, uint64_t address, bool counted)
{
	const struct orc_insn *insn = &e->met.insn;

	switch (insn->kind) {
	case ORC_INSN_FLAGS:
		break; /* for orc_replay_touched() */
	case ORC_INSN_LOCK:
		switch (orc_lock_meet(e, address, counted)) {
		case ORC_LOCK_GOES_ON:
			break;
		case ORC_LOCK_WAITS:
			e->met.counted = address;
			orc_emulator_stop(e);
			break;
		case ORC_LOCK_ALONE:
			alone(e);
		}
		break;
	case ORC_INSN_WIDE: /* unicorn gets its flags wrong, unless they have just been set (translate.c, case 0x1c7) */
		alone(e);
		break;
	case ORC_INSN_ILLEGAL:
		orc_emulator_raise(e, EXCEPTION_UD);
		break;
	case ORC_INSN_SYSCALL:
		meet_syscall(e);
		break;
	case ORC_INSN_INT:
		if (insn->opcode != INTO || orc_flags(e) & EFLAGS_OF)
			orc_emulator_raise(e, insn->port);
		break;
	case ORC_INSN_HLT:
		if (!(orc_state_hflags(e) & HFLAG_CPL)) /* else unicorn raises the exception */
			ours(e);
		break;
	default:
		if (orc_port_is_permitted(e, insn))
			ours(e);
		else if (!e->failed)
			orc_emulator_raise(e, EXCEPTION_GP);
	}
}

void orc_on_instruction(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;
	uint8_t code[ORC_INSN_MAX];
	bool counted, reported;

	(void)uc;
	if (e->alone || e->attempt.running || orc_lock_arrive(e, address))
		return;
	counted = e->met.counted == address;
	reported = e->met.reported == address;
	e->met.counted = e->met.reported = NOWHERE;
	orc_emulator_look(e);
	e->met.rip = address - orc_state_base(e, SEGMENT_CS);
	e->met.insn.kind = ORC_INSN_OTHER;
	if (!counted && !reported && is_breakpoint(e, address)) {
		e->met.breakpoint = true;
		orc_emulator_raise(e, EXCEPTION_DB);
		return;
	}
	/* `size` is the instruction's, and what it says otherwise when it has none: no byte of another page is looked up. */
	if (orc_decode(code, size <= sizeof code ? orc_memory_fetch(e, address, code, size) : 0, orc_state_bits(e),
		       &e->met.insn))
		meet(e, address, counted);
}

void orc_meet_begin(struct orc_emulator *e)
{
	e->met.ours = e->met.breakpoint = false;
	if (e->alone)
		orc_emulator_look(e); /* as orc_on_instruction() does, which lets it pass */
	else
		e->met.rip = NOWHERE;
}

void orc_meet_done(struct orc_emulator *e)
{
	orc_set_register(e, e->u->n.UC_X86_REG_RIP, orc_masked(e->met.rip + e->met.insn.length, orc_state_bits(e)));
}

void orc_meet_reported(struct orc_emulator *e)
{
	e->met.reported = e->met.rip + orc_state_base(e, SEGMENT_CS);
}

void orc_emulator_debug(orc_emulator *e, const struct kvm_guest_debug *debug)
{
	struct orc_debug *d = &e->debug;

	d->control = debug->control & KVM_GUESTDBG_ENABLE ? debug->control : 0;
	d->breakpoints = 0;
	for (int i = 0; i < 4; i++)
		if (d->control & KVM_GUESTDBG_USE_HW_BP && debug->arch.debugreg[7] >> (2 * i) & 3)
			d->breakpoint[d->breakpoints++] = debug->arch.debugreg[i];
	orc_sites_forget(e); /* blocks are looked through again, and breakpoints found */
}
