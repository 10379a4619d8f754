/* Accesses that a task answers: the runner asks and waits without the interpreter, the owner takes what was asked and settles
 * it. A vCPU has one question at a time.
 *
 *   runner   NONE --ask--> OPEN ------------------------ settled, or withdrawn as it is to stop --> NONE
 *   owner                   `--orc_vcpu_settle--> ANSWERED, AGAIN or NOBODY ---^
 *
 * One word holds the state and the question's number: whoever settles names the number, so an answer that comes too late
 * meets another word, and changes nothing. */
#include <string.h>

#include "core.h"

static orc_u64 word(uint32_t number, enum orc_asked state)
{
	return (orc_u64)number << 8 | state;
}

static enum orc_asked state(const orc_vcpu *v)
{
	return (enum orc_asked)(atomic_load_explicit(&((orc_vcpu *)v)->ask.word, memory_order_acquire) & 0xff);
}

static bool change(orc_vcpu *v, uint32_t number, enum orc_asked from, enum orc_asked to)
{
	orc_u64 expected = word(number, from);

	return atomic_compare_exchange_strong_explicit(&v->ask.word, &expected, word(number, to), memory_order_acq_rel,
						       memory_order_acquire);
}

/* ---- the runner's side ---------------------------------------------------------------------------------------- */

void orc_ask(orc_vcpu *v, orc_ns now)
{
	const struct orc_access *a = &v->access;

	v->ask.question = (struct orc_question){.vcpu = v->id, .number = v->ask.question.number + 1, .bus = v->io.why,
						.size = a->size, .write = a->write, .claim = a->claim,
						.address = a->address, .since = now};
	if (a->write)
		memcpy(v->ask.question.data, a->data, a->size);
	/* Release: who sees it open sees the question. */
	atomic_store_explicit(&v->ask.word, word(v->ask.question.number, ORC_ASK_OPEN), memory_order_release);
	orc_push(&v->fleet->asking, &v->asking);
	orc_bell_ring(&v->fleet->asked);
}

void orc_ask_question(const orc_vcpu *v, struct orc_question *out)
{
	*out = v->ask.question;
}

bool orc_ask_open(const orc_vcpu *v)
{
	return state(v) == ORC_ASK_OPEN;
}

void orc_ask_settled(orc_vcpu *v)
{
	struct orc_access *a = &v->access;
	uint32_t number = v->ask.question.number;

	if (change(v, number, ORC_ASK_OPEN, ORC_ASK_NONE)) { /* withdrawn */
		a->count = 0;
		return;
	}
	switch (state(v)) {
	case ORC_ASK_ANSWERED:
		a->count = 1;
		if (!a->write)
			memcpy(a->data, v->ask.answer, a->size);
		break;
	case ORC_ASK_NOBODY:
		a->count = 1;
		if (!a->write)
			memset(a->data, 0xff, a->size);
		break;
	default:
		a->count = 0; /* the core looks up again */
	}
	atomic_store_explicit(&v->ask.word, word(number, ORC_ASK_NONE), memory_order_relaxed);
}

bool orc_ask_wait(orc_vcpu *v)
{
	for (;;) {
		/* Read first: an answer or a command that comes later changes it. */
		uint32_t seen = orc_vcpu_wakes(v);

		if (!orc_ask_open(v)) {
			orc_ask_settled(v);
			return true;
		}
		if (orc_vcpu_commands(v) & ~(uint32_t)ORC_CAP) /* one that is capped uses nothing meanwhile */
			return false;
		orc_futex_wait(&v->wakes, seen);
	}
}

/* ---- the owner's side ----------------------------------------------------------------------------------------- */

bool orc_ask_take(orc_vcpu *v, struct orc_question *out)
{
	if (!orc_ask_open(v)) /* it was withdrawn, or asked before and settled: then the link was pushed once for both */
		return false;
	*out = v->ask.question;
	return true;
}

bool orc_vcpu_settle(orc_vcpu *v, uint32_t number, enum orc_asked how, const void *answer, size_t size)
{
	if (atomic_load_explicit(&v->ask.word, memory_order_acquire) != word(number, ORC_ASK_OPEN))
		return false;
	if (how == ORC_ASK_ANSWERED)
		memcpy(v->ask.answer, answer, size < sizeof v->ask.answer ? size : sizeof v->ask.answer);
	if (!change(v, number, ORC_ASK_OPEN, how))
		return false;
	orc_vcpu_wake(v);
	return true;
}
