/* IN, OUT, INS, OUTS. The guest stops before the instruction, and we execute it: record, answer, registers, memory, RIP.
 * Unicorn's own hooks for them tell the answer in time, but stop only at the end of the block. */
#include <string.h>

#include "emulate.h"

enum { AX, CX, DX, SI = 6, DI };

static uint32_t port_of(const struct orc_emulator *e, const struct orc_insn *insn)
{
	return insn->port >= 0 ? (uint32_t)insn->port : (uint32_t)(orc_state_registers(e)[DX] & 0xffff);
}

/* ---- permission ----------------------------------------------------------------------------------------------- */

/* Whether the task's permission map lets this code touch those ports: Intel SDM vol. 1, 19.5.2. */
static bool is_in_map(struct orc_emulator *e, uint32_t port, unsigned size)
{
	enum { TSS_32 = 9, BUSY = 2, MAP_BASE = 0x66 };
	uc_x86_mmr task = {0};
	uint16_t map = 0, bits = 0;

	e->u->uc_reg_read(e->uc, e->u->n.UC_X86_REG_TR, &task);
	if (((task.flags >> 8) & 15 & ~BUSY) != TSS_32 || task.limit < MAP_BASE + 1)
		return false;
	if (!orc_memory_read(e, task.base + MAP_BASE, &map, sizeof map))
		goto hidden;
	if (map + port / 8 + 1 > task.limit)
		return false;
	if (!orc_memory_read(e, task.base + map + port / 8, &bits, sizeof bits))
		goto hidden;
	return !(bits >> (port & 7) & ((1u << size) - 1));
hidden:
	e->failed = "it does not read a port permission map that user code can't; the kvm backend can";
	orc_emulator_stop(e);
	return false;
}

bool orc_port_is_permitted(struct orc_emulator *e, const struct orc_insn *insn)
{
	uint64_t flags = orc_flags(e);
	uint32_t level = orc_state_hflags(e) & HFLAG_CPL;

	if (!level || (!(flags & EFLAGS_VM) && level <= ((flags >> EFLAGS_IOPL_SHIFT) & 3)))
		return true;
	return is_in_map(e, port_of(e, insn), insn->size);
}

/* ---- registers ------------------------------------------------------------------------------------------------ */

static void set_general(struct orc_emulator *e, int number, uint64_t value, int bits)
{
	int register_ = orc_unicorn_general(e->u)[number];
	uint64_t old = orc_register(e, register_);

	/* 32-bit results clear the upper half; 8 and 16-bit ones leave the rest: Intel SDM vol. 1, 3.4.1.1. */
	orc_set_register(e, register_, bits < 32 ? (old & ~orc_masked(~0ull, bits)) | orc_masked(value, bits)
						  : orc_masked(value, bits));
}

static bool goes_down(const struct orc_emulator *e)
{
	return orc_flags(e) & EFLAGS_DF;
}

static bool is_string(const struct orc_insn *insn)
{
	return insn->kind == ORC_INSN_INS || insn->kind == ORC_INSN_OUTS;
}

/* How many elements a string instruction has to do. */
static uint64_t elements_left(const struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->met.insn;

	return insn->rep ? orc_masked(orc_state_registers(e)[CX], insn->address_bits) : 1;
}

static uint64_t string_address(const struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->met.insn;
	bool in = insn->kind == ORC_INSN_INS;
	uint64_t offset = orc_masked(orc_state_registers(e)[in ? DI : SI], insn->address_bits);

	return orc_masked(offset + orc_state_base(e, in ? SEGMENT_ES : insn->segment), orc_state_bits(e) == 64 ? 64 : 32);
}

/* A string instruction did `count` elements: counters and pointers, and the next instruction once all are done. */
static void advance(struct orc_emulator *e, uint32_t count)
{
	const struct orc_insn *insn = &e->met.insn;
	int pointer = insn->kind == ORC_INSN_INS ? DI : SI, bits = insn->address_bits;
	uint64_t step = (uint64_t)count * insn->size, left = elements_left(e) - count;
	uint64_t at = orc_state_registers(e)[pointer];

	set_general(e, pointer, goes_down(e) ? at - step : at + step, bits);
	if (insn->rep)
		set_general(e, CX, left, bits);
	if (!left)
		orc_meet_done(e);
}

/* ---- the access ----------------------------------------------------------------------------------------------- */

/* How many elements of INS are asked for at once: as KVM's emulator does (arch/x86/kvm/emulate.c, pio_in_emulated). */
static uint32_t read_ahead(const struct orc_emulator *e)
{
	uint64_t at = string_address(e) & (PAGE - 1), left = elements_left(e), n = ORC_IO_BYTES / e->met.insn.size;
	uint64_t in_page = goes_down(e) ? at : PAGE - at;

	if (n > in_page)
		n = in_page;
	if (n > left)
		n = left;
	return n ? (uint32_t)n : 1;
}

/* Each of these completes an access, when the guest is entered again. */

static enum orc_why nothing(struct orc_emulator *e)
{
	(void)e;
	return ORC_COMMAND;
}

static enum orc_why finish_out(struct orc_emulator *e)
{
	orc_emulator_look(e);
	orc_meet_done(e);
	return ORC_COMMAND;
}

static enum orc_why finish_in(struct orc_emulator *e)
{
	uint32_t value = 0;

	orc_emulator_look(e);
	memcpy(&value, e->data, e->met.insn.size);
	set_general(e, AX, value, e->met.insn.size * 8);
	orc_meet_done(e);
	return ORC_COMMAND;
}

static enum orc_why finish_ins(struct orc_emulator *e)
{
	unsigned size = e->met.insn.size;
	uint64_t address;

	orc_emulator_look(e);
	address = string_address(e);
	for (uint32_t i = 0; i < e->io_count; i++) {
		if (!orc_memory_write(e, address, e->data + (size_t)i * size, size))
			return orc_emulator_fail(e, "INS into memory that is not there; the kvm backend can");
		address += goes_down(e) ? -(uint64_t)size : size;
	}
	advance(e, e->io_count);
	return ORC_COMMAND;
}

/* Tells of the access. Unless Python is to answer, the guest need not stop. */
static enum orc_why tell(struct orc_emulator *e, bool write, uint32_t count)
{
	const struct orc_insn *insn = &e->met.insn;
	uint32_t port = port_of(e, insn);
	struct orc_record *record = orc_exit_blank(e);

	record->arg[0] = port;
	record->arg[1] = insn->size;
	record->arg[2] = count;
	record->arg[3] = write;
	if (write)
		orc_take_data(record, e->data, insn->size);
	orc_vcpu_weigh(e->v, count);
	orc_exit_account(e, KVM_EXIT_IO);
	return orc_exit_answer(e, ORC_IO, port, insn->size, count, write);
}

enum orc_why orc_port_io(struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->met.insn;
	enum orc_why why;

	orc_emulator_look(e);
	if (is_string(insn) && !elements_left(e)) {
		orc_meet_done(e);
		e->pending = nothing;
		return ORC_COMMAND;
	}
	switch (insn->kind) {
	case ORC_INSN_IN:
		e->pending = finish_in;
		return tell(e, false, 1);
	case ORC_INSN_INS:
		e->pending = finish_ins;
		e->io_count = insn->rep ? read_ahead(e) : 1;
		return tell(e, false, e->io_count);
	case ORC_INSN_OUT:
		memcpy(e->data, &orc_state_registers(e)[AX], insn->size);
		e->pending = finish_out;
		return tell(e, true, 1);
	default: /* OUTS; KVM's emulator is done with it before it tells */
		if (!orc_memory_read(e, string_address(e), e->data, insn->size))
			return orc_emulator_fail(e, "OUTS from memory that is not there; the kvm backend can");
		why = tell(e, true, 1);
		advance(e, 1);
		e->pending = nothing;
		return why;
	}
}
