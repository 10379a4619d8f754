/* Memory that nobody backs, and writes to memory that may only be read.
 *
 * An access to such a page gives its instruction up before that has done anything. Once the answer to its read is known the
 * instruction is attempted again. If it reads what is not known yet the CPU is put back, and that is asked for next; else
 * its writes are delivered, one by one. Nothing is asked or delivered twice.
 *
 *   touched --> ask --> replay --> ask --> replay --> deliver --> deliver --> the guest goes on
 *      `- a write ------^ */
#include <string.h>

#include "emulate.h"

static enum orc_why take_answer(struct orc_emulator *e);

static void settle(struct orc_emulator *e)
{
	e->replay.answered = e->replay.delivered = 0;
	orc_attempt_end(e);
}

/* The record, and the data of the access; the caller accounts it. */
static void describe(struct orc_emulator *e, const struct orc_touch *t)
{
	struct orc_record *record = orc_exit_blank(e);

	record->arg[0] = t->address;
	record->arg[1] = t->size;
	record->arg[2] = t->write;
	memcpy(e->data, &t->value, sizeof t->value);
	if (t->write)
		orc_take_data(record, e->data, t->size);
}

static enum orc_why answer(struct orc_emulator *e, const struct orc_touch *t)
{
	return orc_exit_answer(e, ORC_MMIO, t->address, t->size, 1, t->write);
}

static enum orc_why ask(struct orc_emulator *e)
{
	struct orc_replay *r = &e->replay;

	if (r->answered == ORC_TOUCHES)
		return orc_emulator_fail(
			e, "an instruction reads more of unbacked memory than is supported; the kvm backend can");
	r->answers[r->answered] = e->attempt.touch;
	r->answers[r->answered].value = 0;
	describe(e, &r->answers[r->answered]);
	orc_exit_account(e, KVM_EXIT_MMIO);
	e->pending = take_answer;
	return answer(e, &r->answers[r->answered]);
}

/* The next write of the instruction, or the end of it. */
static enum orc_why deliver(struct orc_emulator *e)
{
	unsigned n = e->replay.delivered++, written = e->attempt.written;
	uint64_t lock = n + 1 >= written ? orc_lock_take(e) : NOWHERE;

	if (n < written) {
		describe(e, &e->attempt.writes[n]);
		if (lock != NOWHERE) /* it rides on it, as on Intel */
			orc_exit_account_lock(e, KVM_EXIT_MMIO, lock);
		else
			orc_exit_account(e, KVM_EXIT_MMIO);
		e->pending = deliver;
		return answer(e, &e->attempt.writes[n]);
	}
	if (lock != NOWHERE)
		orc_lock_count(e, lock);
	settle(e);
	return ORC_COMMAND;
}

static enum orc_why replay(struct orc_emulator *e)
{
	struct orc_attempt *a = &e->attempt;

	for (int i = 0; i <= ORC_WINDOWS; i++) {
		int rc = orc_attempt(e);

		if (a->problem) {
			e->u->uc_context_restore(e->uc, e->rollback);
			return orc_emulator_fail(e, a->problem);
		}
		if (rc == e->u->n.UC_ERR_INSN_INVALID)
			e->exception = EXCEPTION_UD;
		if (e->exception >= 0 && !e->stepped) {
			settle(e);
			return ORC_COMMAND; /* it faulted otherwise: the loop sees to it */
		}
		if (e->stepped && !a->missing) {
			orc_lock_mend(e);
			return deliver(e);
		}
		e->u->uc_context_restore(e->uc, e->rollback);
		if (a->missing)
			e->replay.answered = a->used; /* and those behind are to other reads than it makes now */
		if (!a->touch.size)
			return orc_emulator_fail(e, e->u->uc_strerror(rc));
		if (!a->touch.write)
			return ask(e);
		if (!orc_attempt_open(e, &a->touch))
			break;
	}
	return orc_emulator_fail(e, "an instruction reaches too far into unbacked memory; the kvm backend can");
}

static enum orc_why take_answer(struct orc_emulator *e)
{
	struct orc_touch *answer = &e->replay.answers[e->replay.answered++];

	memcpy(&answer->value, e->data, sizeof answer->value);
	if (!orc_attempt_open(e, answer))
		return orc_emulator_fail(e, "an instruction reaches too far into unbacked memory; the kvm backend can");
	return replay(e);
}

enum orc_why orc_replay_touched(struct orc_emulator *e)
{
	struct orc_attempt *a = &e->attempt;
	const struct orc_touch *touch = &a->touch;
	bool met = e->met.rip == a->touch_rip;

	settle(e);
	e->replay.once = met && e->met.insn.kind == ORC_INSN_LOCK;
	if (met) /* Flags that unicorn had worked out for the instruction, and it says that it had not: as they were before. */
		orc_emulator_patch(e, e->u->at_flags, (char *)e->context + e->u->at_flags, ORC_FLAGS_SIZE);
	if (!touch->write) /* at the start of a page it may be the rest of one that began before: a replay tells */
		return touch->address & (PAGE - 1) || touch->size == 1 ? ask(e) : replay(e);
	/* What a helper of unicorn's writes does not stop at once, and what came after it can't be undone. */
	orc_emulator_look(e);
	if (orc_rip(e) != a->touch_rip ||
	    memcmp(orc_state_registers(e), (char *)e->rollback + e->u->at_registers, 16 * sizeof(uint64_t))) {
		e->u->uc_context_restore(e->uc, e->rollback);
		return orc_emulator_fail(
			e, "an instruction that unicorn can't restart wrote to unbacked memory; the kvm backend can");
	}
	if (!orc_attempt_open(e, touch))
		return orc_emulator_fail(e, "no memory");
	return replay(e);
}
