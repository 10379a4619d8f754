/* Bus locks: which locked accesses take the bus, and that each is counted once.
 *
 *   fault-like   counted before the instruction. If the guest has to wait, it stops there, and passes the next time.
 *   trap-like    armed, and counted when execution arrives behind the instruction: at a hook there, or when the guest has
 *                stopped. What comes between the two, an exception, disarms it.
 *
 * A lock within its limit is counted without leaving unicorn. */
#include "emulate.h"

enum {
	CACHE_LINE = 64,
	CMPXCHG_WIDE = 0xc7, /* CMPXCHG8B, CMPXCHG16B */
	NEG = 3,             /* in ModR/M, of the opcodes 0xf6 and 0xf7 */
};

static uint64_t sign_extended(uint64_t value, int bytes)
{
	return bytes == 8 ? value : bytes == 4 ? (uint64_t)(int64_t)(int32_t)value : (uint64_t)(int64_t)(int16_t)value;
}

/* Where the operand of the instruction met is. */
static uint64_t operand_address(const struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->met.insn;
	const uint64_t *r = orc_state_registers(e);
	uint64_t offset = (uint64_t)insn->displacement;

	if (insn->relative)
		offset += e->met.rip + insn->length;
	if (insn->base != ORC_NO_REGISTER)
		offset += r[insn->base];
	if (insn->index != ORC_NO_REGISTER)
		offset += r[insn->index] * insn->scale;
	if (insn->bit_offset != ORC_NO_REGISTER) {
		/* A bit string: the operand is the word that holds the bit (Intel SDM vol. 2, 3.1.1.9). */
		int64_t bit = (int64_t)sign_extended(r[insn->bit_offset], insn->size);

		offset += (uint64_t)(bit >> (insn->size == 8 ? 6 : insn->size == 4 ? 5 : 4)) * insn->size;
	}
	offset = orc_masked(offset, insn->address_bits) + orc_state_base(e, insn->segment);
	return orc_masked(offset, orc_state_bits(e) == 64 ? 64 : 32);
}

/* A locked access takes the bus if it crosses a cache line, or if what it accesses is not cached: Intel SDM vol. 3, 9.1.2.
 * One that faults does not. *code: it may be translated code that is written. */
static bool takes_the_bus(const struct orc_emulator *e, uint64_t linear, unsigned size, bool *code)
{
	bool split = (linear & (CACHE_LINE - 1)) + size > CACHE_LINE, cached = true;

	*code = false;
	if (size == 16 && linear & 15)
		return false; /* CMPXCHG16B faults */
	for (uint64_t at = linear; at < linear + size; at = (at | (PAGE - 1)) + 1) {
		struct orc_memory *m;
		uint64_t physical;

		if (!orc_memory_translate(e, at, true, &physical))
			return false;
		m = orc_memory_at(e, physical);
		cached &= m != NULL;
		*code |= m && orc_memory_was_executed(m, physical);
	}
	return split || !cached;
}

void orc_lock_count(struct orc_emulator *e, uint64_t rip)
{
	orc_exit_blank(e);
	orc_exit_account_lock(e, KVM_EXIT_X86_BUS_LOCK, rip);
}

bool orc_lock_arrive(struct orc_emulator *e, uint64_t address)
{
	struct orc_lock *lock = &e->lock;
	bool done = lock->armed == address && lock->armed != NOWHERE;

	lock->armed = NOWHERE;
	lock->negated_size = 0;
	if (!done)
		return false;
	orc_lock_count(e, lock->armed_rip);
	if (!orc_emulator_must_stop(e))
		return false;
	orc_emulator_stop(e);
	return true;
}

enum orc_lock_met orc_lock_meet(struct orc_emulator *e, uint64_t address, bool counted)
{
	const struct orc_insn *insn = &e->met.insn;
	struct orc_lock *lock = &e->lock;
	uint64_t linear = operand_address(e);
	bool code = false, now = !counted && e->bus_locks && takes_the_bus(e, linear, insn->size, &code);

	if (now && e->trap_like) {
		lock->armed = address + insn->length;
		lock->armed_rip = orc_masked(e->met.rip + insn->length, orc_state_bits(e));
	} else if (now) {
		orc_lock_count(e, e->met.rip);
	}
	if ((insn->opcode & 0xfe) == 0xf6 && insn->reg == NEG) {
		lock->negated = linear;
		lock->negated_size = insn->size;
		return ORC_LOCK_ALONE;
	}
	if (insn->opcode == CMPXCHG_WIDE) /* as ORC_INSN_WIDE */
		return ORC_LOCK_ALONE;
	if (!now || e->trap_like)
		return ORC_LOCK_GOES_ON;
	/* What writes into its own block is executed twice, and would be counted twice. */
	return code ? ORC_LOCK_ALONE : orc_emulator_must_stop(e) ? ORC_LOCK_WAITS : ORC_LOCK_GOES_ON;
}

uint64_t orc_lock_take(struct orc_emulator *e)
{
	uint64_t rip = e->lock.armed != NOWHERE ? e->lock.armed_rip : NOWHERE;

	e->lock.armed = NOWHERE;
	return rip;
}

void orc_lock_settle(struct orc_emulator *e)
{
	if (e->lock.armed != NOWHERE && orc_rip(e) == e->lock.armed_rip)
		orc_lock_count(e, orc_lock_take(e));
}

/* Unicorn takes them from what was there before (translate.c, case 3 of 0xf6). */
void orc_lock_mend(struct orc_emulator *e)
{
	enum { CF = 1, PF = 1 << 2, AF = 1 << 4, ZF = 1 << 6, SF = 1 << 7 };
	unsigned size = e->lock.negated_size;
	uint64_t flags, result = 0, sign;

	if (!size)
		return;
	for (unsigned byte = 0; byte < size; byte++) {
		uint64_t physical = 0;
		const struct orc_memory *m;
		uint8_t value = 0;

		orc_memory_translate(e, e->lock.negated + byte, true, &physical);
		m = orc_memory_at(e, physical);
		if (!orc_attempt_wrote(e, physical, &value) && m && !m->readonly)
			value = m->host[physical - m->start];
		result |= (uint64_t)value << 8 * byte;
	}
	sign = 1ull << (8 * size - 1);
	flags = orc_flags(e) & ~(uint64_t)(CF | PF | AF | ZF | SF | EFLAGS_OF);
	flags |= (result ? CF : ZF) | (result & sign ? SF : 0) | (result & 15 ? AF : 0) | (result == sign ? EFLAGS_OF : 0);
	flags |= __builtin_parity((unsigned)result & 0xff) ? 0 : PF;
	orc_set_register(e, e->u->n.UC_X86_REG_EFLAGS, flags);
	e->lock.negated_size = 0;
}
