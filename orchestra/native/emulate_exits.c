/* What the guest did, as records: those that KVM would make of it. */
#include <string.h>

#include "emulate.h"

struct orc_record *orc_exit_blank(struct orc_emulator *e)
{
	struct orc_record *r = &e->v->record;

	memset(r->arg, 0, sizeof r->arg);
	r->data_size = 0;
	return r;
}

static void account(struct orc_emulator *e, unsigned reason, unsigned flags, uint64_t rip, bool has_rip)
{
	struct orc_record *r = &e->v->record;

	r->reason = (uint16_t)reason;
	r->flags = (uint16_t)flags;
	r->rip = rip;
	r->has_rip = has_rip;
	orc_vcpu_account(e->v, r, orc_now());
}

void orc_exit_account(struct orc_emulator *e, unsigned reason)
{
	account(e, reason, 0, 0, false);
}

void orc_exit_account_lock(struct orc_emulator *e, unsigned reason, uint64_t rip)
{
	account(e, reason, KVM_RUN_X86_BUS_LOCK, rip, true);
}

enum orc_why orc_exit_answer(struct orc_emulator *e, enum orc_why bus, uint64_t address, uint32_t size, uint32_t count,
			     bool write)
{
	enum orc_why why = orc_access_begin(e->v, bus, address, size, count, write, e->data);

	return why == ORC_ANSWERED ? ORC_COMMAND : why;
}

static enum orc_why tell(struct orc_emulator *e, unsigned reason)
{
	orc_exit_account(e, reason);
	return ORC_EXIT;
}

enum orc_why orc_exit_halted(struct orc_emulator *e)
{
	orc_exit_blank(e);
	return tell(e, KVM_EXIT_HLT);
}

enum orc_why orc_exit_not_code(struct orc_emulator *e)
{
	struct orc_record *r = orc_exit_blank(e);
	uint8_t code[ORC_INSN_MAX];

	r->arg[0] = KVM_INTERNAL_ERROR_EMULATION;
	orc_emulator_look(e);
	orc_take_data(r, code, orc_memory_fetch(e, orc_rip(e) + orc_state_base(e, SEGMENT_CS), code, sizeof code));
	return tell(e, KVM_EXIT_INTERNAL_ERROR);
}

/* ---- the debugger's ------------------------------------------------------------------------------------------- */

enum { DR6_FIXED = 0xffff0ff0, DR6_BREAKPOINT_0 = 1, DR6_STEP = 1 << 14 };

static enum orc_why report_debug(struct orc_emulator *e, int vector, uint32_t dr6)
{
	struct orc_record *r = orc_exit_blank(e);

	r->arg[0] = (uint64_t)vector;
	r->arg[1] = orc_rip(e);
	r->arg[2] = dr6;
	r->arg[3] = orc_register(e, e->u->n.UC_X86_REG_DR7);
	return tell(e, KVM_EXIT_DEBUG);
}

enum orc_why orc_exit_stepped(struct orc_emulator *e)
{
	return report_debug(e, EXCEPTION_DB, DR6_FIXED | DR6_STEP);
}

/* ---- exceptions ----------------------------------------------------------------------------------------------- */

/* Whether the guest set a handler up: an entry of its interrupt table that a CPU would take. */
static bool has_handler(struct orc_emulator *e, int vector)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	bool protected = orc_register(e, n->UC_X86_REG_CR0) & 1, known;
	unsigned size = !protected ? 4 : orc_msr(e, MSR_EFER) & EFER_LMA ? 16 : 8;
	uint64_t at = (uint64_t)vector * size, fault;
	uint8_t gate[16] = {0};
	uc_x86_mmr idt = {0};

	e->u->uc_reg_read(e->uc, n->UC_X86_REG_IDTR, &idt);
	if (at + size - 1 > idt.limit)
		return false;
	if (!protected)
		return true; /* whatever is there is an address */
	fault = orc_register(e, n->UC_X86_REG_CR2);
	known = orc_memory_read(e, idt.base + at, gate, size);
	orc_set_register(e, n->UC_X86_REG_CR2, fault);
	if (!known)
		return orc_state_hflags(e) & HFLAG_CPL; /* user code can't read it, and does it have one */
	return gate[5] & 0x80;
}

enum orc_why orc_exit_exception(struct orc_emulator *e, int vector)
{
	enum { DOUBLE_FAULT = 8, NOT_PRESENT = 11 };
	struct orc_record *r;

	if (e->met.breakpoint) {
		orc_emulator_look(e);
		orc_meet_reported(e);
		return report_debug(e, EXCEPTION_DB, DR6_FIXED | DR6_BREAKPOINT_0);
	}
	if (vector == EXCEPTION_BP && e->debug.control & KVM_GUESTDBG_USE_SW_BP)
		return report_debug(e, EXCEPTION_BP, DR6_FIXED);
	orc_emulator_look(e);
	r = orc_exit_blank(e);
	r->arg[0] = (uint64_t)vector;
	r->arg[2] = vector == EXCEPTION_PF ? orc_register(e, e->u->n.UC_X86_REG_CR2) : orc_rip(e);
	/* Without a handler, for it and for what follows from having none, a CPU shuts down: Intel SDM vol. 3, 6.15. */
	if (has_handler(e, vector) || has_handler(e, NOT_PRESENT) || has_handler(e, EXCEPTION_GP) ||
	    has_handler(e, DOUBLE_FAULT))
		return tell(e, KVM_EXIT_EXCEPTION);
	return tell(e, KVM_EXIT_SHUTDOWN);
}
