/* The run loop on unicorn. It keeps what kvm.c promises: the same records, counters, turns and commands, and at an exit the
 * registers that KVM would show.
 *
 * How an instruction that concerns us is met:
 *
 *   translated   orc_on_translated() looks for bus-locking instructions, port accesses and HLT in each new block, and hooks
 *                those it finds; the block is thrown away and translated once more, now with calls to orc_on_instruction().
 *   executed     orc_on_instruction() decides before the instruction runs. A lock is counted right there, and the guest
 *                goes on without leaving unicorn, unless it has to wait. Port accesses and HLT stop; we execute them.
 *   memory       what nobody backs stops the instruction before it has done anything. Once the answer to its read is known
 *                it is executed again, alone, with a window mapped there that gives the answer and takes its writes.
 *
 * Each block begins with on_block(), which sees commands: uc_emu_stop from another thread is lost if it comes before
 * unicorn's loop is entered, and its timeout is as well.
 *
 * Traps in unicorn that shape all this:
 *
 * - uc_vmem_translate of what is not mapped leaves a page fault pending (x86_cpu_tlb_fill, probe): in a hook, only what the
 *   instruction accesses anyway may be looked up.
 * - A block is translated as a whole, and a fault of its last instruction's fetch comes before its first was executed.
 * - An instruction that writes into its own block is executed once more after it had no effect yet (cflags_next_tb in
 *   tb_invalidate_phys_page_range__locked), and its hook is called twice.
 * - What a store does where it may not is seen after the instruction or, of a store by a helper, some instructions later.
 * - Its translator has 512 temporaries for a block of up to 512 instructions, does not check, and leaks two for most x87
 *   instructions and one for AAM, AAD, INTO and PSHUFW: a block of 250 such in a row crashes the process (seen with 2.1.4).
 *   Nothing is called before a block is translated, so we can't prevent it: no backend for guests that attack their host.
 */
#include "emulate.h"

void orc_vcpu_bind_emulator(orc_vcpu *v, orc_emulator *e, bool trap_like, bool bus_locks)
{
	v->emulator = e;
	v->witness = &orc_emulator_witness;
	e->v = v;
	e->trap_like = trap_like;
	e->bus_locks = bus_locks;
}

enum orc_why orc_emulator_fail(struct orc_emulator *e, const char *why)
{
	e->failed = why;
	return ORC_ERROR;
}

const char *orc_emulator_failed(const orc_emulator *e)
{
	return e->failed ? e->failed : "";
}

/* ---- hooks that are always there ------------------------------------------------------------------------------ */

static void on_block(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;

	(void)uc, (void)address, (void)size;
	if (!(atomic_load_explicit(&e->attention, memory_order_relaxed) |
	      atomic_load_explicit(&e->v->commands, memory_order_relaxed) |
	      atomic_load_explicit(&e->v->fleet->urgent, memory_order_relaxed)) || e->alone || e->attempt.running)
		return;
	orc_make_way(e->v);
	if (atomic_load(&e->attention) || atomic_load(&e->v->commands))
		orc_emulator_stop(e);
}

static void on_interrupt(uc_engine *uc, uint32_t vector, void *data)
{
	struct orc_emulator *e = data;

	(void)uc;
	if (vector == EXCEPTION_DB && e->stepping) {
		e->stepped = true; /* the instruction is done, and a lock it made is still to be counted */
	} else {
		e->exception = (int)vector;
		orc_lock_settle(e);
		orc_lock_take(e); /* it was not done */
	}
	orc_emulator_stop(e);
}

static bool on_fetch(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;

	(void)uc, (void)type, (void)size, (void)value;
	e->fetch = address;
	return false;
}

int orc_emulator_hook(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	const struct {
		int type;
		void *function;
	} hooks[] = {
		{n->UC_HOOK_BLOCK, (void *)on_block},
		{n->UC_HOOK_EDGE_GENERATED, (void *)orc_on_translated},
		{n->UC_HOOK_INTR, (void *)on_interrupt},
		{n->UC_HOOK_MEM_READ_UNMAPPED | n->UC_HOOK_MEM_WRITE_UNMAPPED | n->UC_HOOK_MEM_WRITE_PROT, (void *)orc_on_touch},
		{n->UC_HOOK_MEM_FETCH_UNMAPPED | n->UC_HOOK_MEM_FETCH_PROT, (void *)on_fetch},
	};

	for (size_t i = 0; i < sizeof hooks / sizeof *hooks; i++) {
		size_t hook;
		int rc = e->u->uc_hook_add(e->uc, &hook, hooks[i].type, hooks[i].function, e, (uint64_t)1, (uint64_t)0);

		if (rc)
			return rc;
	}
	return 0;
}

/* ---- into the guest ------------------------------------------------------------------------------------------- */

static int go(struct orc_emulator *e)
{
	return e->u->uc_emu_start(e->uc, orc_rip(e), 0, 0, 0);
}

/* By the trap flag: unicorn's own count makes it throw all translations away. */
int orc_emulator_step(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	uint64_t flags = orc_flags(e), dr6 = orc_register(e, n->UC_X86_REG_DR6);
	int rc;

	orc_set_register(e, n->UC_X86_REG_EFLAGS, flags | EFLAGS_TF);
	e->stepped = false;
	e->stepping = true;
	rc = go(e);
	e->stepping = false;
	orc_set_register(e, n->UC_X86_REG_DR6, dr6);
	if (!(flags & EFLAGS_TF))
		orc_set_register(e, n->UC_X86_REG_EFLAGS, orc_flags(e) & ~(uint64_t)EFLAGS_TF);
	else if (e->stepped && !(e->debug.control & KVM_GUESTDBG_SINGLESTEP))
		e->exception = EXCEPTION_DB; /* the guest's own trap */
	return rc;
}

/* unicorn came back. ORC_COMMAND: nothing to tell, go on. */
static enum orc_why came_back(struct orc_emulator *e, int rc)
{
	const struct orc_unicorn_numbers *n = &e->u->n;

	if (e->failed)
		return ORC_ERROR;
	if (rc == n->UC_ERR_OK) {
		if (e->exception >= 0 || !e->met.ours)
			return ORC_COMMAND; /* see raised() */
		if (e->met.insn.kind != ORC_INSN_HLT)
			return orc_port_io(e);
		orc_emulator_look(e);
		orc_meet_done(e);
		return orc_exit_halted(e);
	}
	if (rc == n->UC_ERR_READ_UNMAPPED || rc == n->UC_ERR_WRITE_UNMAPPED || rc == n->UC_ERR_WRITE_PROT)
		return orc_replay_touched(e);
	if (rc == n->UC_ERR_FETCH_PROT && orc_memory_let_execute(e, e->fetch))
		return ORC_COMMAND;
	if (rc == n->UC_ERR_FETCH_UNMAPPED || rc == n->UC_ERR_FETCH_PROT) {
		e->careful = !e->careful;
		return e->careful ? ORC_COMMAND : orc_exit_not_code(e);
	}
	if (rc == n->UC_ERR_INSN_INVALID) {
		e->exception = EXCEPTION_UD;
		return ORC_COMMAND;
	}
	return orc_emulator_fail(e, e->u->uc_strerror(rc));
}

static enum orc_why enter(struct orc_emulator *e)
{
	bool alone = e->alone;
	enum orc_why why;
	int rc;

	if (atomic_load_explicit(&e->attention, memory_order_acquire))
		orc_sites_attend(e);
	orc_meet_begin(e);
	e->exception = -1;
	e->stepped = false;
	if (alone || e->careful || e->debug.control & KVM_GUESTDBG_SINGLESTEP)
		rc = orc_emulator_step(e);
	else
		rc = go(e);
	if (e->stepped)
		e->careful = false;
	if (alone && e->stepped)
		orc_lock_mend(e);
	if (alone) /* unless it was stopped before it began */
		e->alone = rc == e->u->n.UC_ERR_OK && !e->stepped && e->exception < 0;
	why = came_back(e, rc);
	if (why == ORC_COMMAND && atomic_load_explicit(&e->v->commands, memory_order_relaxed))
		orc_count(&e->v->kicks, 1);
	return why;
}

/* ---- the loop ------------------------------------------------------------------------------------------------- */

/* The guest has an exception, which may be of an instruction that it has not come to yet. */
static enum orc_why raised(struct orc_emulator *e)
{
	int vector = e->exception;

	e->exception = -1;
	orc_lock_take(e); /* it was not done */
	if (vector > 255)
		return orc_emulator_fail(e, "it does not execute guests of a guest; the kvm backend can");
	if (vector == EXCEPTION_PF && !e->careful) {
		static const int32_t none = -1;

		e->careful = true;
		/* It was not raised: the next one is not a double fault. */
		orc_emulator_patch(e, e->u->at_exception, &none, sizeof none);
		return ORC_COMMAND;
	}
	e->careful = false;
	return orc_exit_exception(e, vector);
}

static enum orc_why run_guest(orc_vcpu *v)
{
	struct orc_emulator *e = v->emulator;

	for (;;) {
		enum orc_why (*pending)(struct orc_emulator *) = e->pending, why;

		if (v->io.open && (why = orc_access_resume(v)) != ORC_ANSWERED)
			return why;
		if (!pending)
			orc_lock_settle(e);
		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			if (!pending) {
				if (orc_commanded(v))
					return ORC_COMMAND;
				continue;
			}
		} else if (v->waiting && !orc_wait_turn(v)) {
			continue;
		}
		/* As KVM: an access is completed when the guest is entered again. */
		e->pending = NULL;
		why = pending ? pending(e) : enter(e);
		if (why == ORC_COMMAND && !e->pending && e->exception >= 0)
			why = raised(e);
		if (why == ORC_COMMAND && !e->pending && (pending || e->stepped) && e->debug.control & KVM_GUESTDBG_SINGLESTEP) {
			orc_lock_settle(e);
			why = orc_exit_stepped(e);
		}
		if (why != ORC_COMMAND)
			return why;
	}
}

enum orc_why orc_emulator_run(orc_vcpu *v)
{
	return orc_run(v, run_guest);
}
