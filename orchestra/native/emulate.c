/* The run loop on unicorn. It keeps what kvm.c promises: the same records, counters, turns and commands, and at an exit the
 * registers that KVM would show.
 *
 * How an instruction that concerns us is met:
 *
 *   translated   on_translated() looks for bus-locking instructions, port accesses and HLT in each new block, and hooks
 *                those it finds; the block is thrown away and translated once more, now with calls to on_instruction().
 *   executed     on_instruction() decides before the instruction runs. A lock is counted right there, and the guest goes on
 *                without leaving unicorn, unless it has to wait. Port accesses and HLT stop; we execute them ourselves.
 *   memory       what nobody backs stops the instruction before it has done anything. Once the answer to its read is known,
 *                replay() executes it again, alone, with a window mapped there that gives the answer and takes its writes.
 *
 * Each block begins with on_block(), which sees commands: uc_emu_stop from another thread is lost if it comes before
 * unicorn's loop is entered, and its timeout is as well.
 */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

enum {
	PAGE = 4096,
	SITES = 4096, /* hooked at the same time; unicorn walks through all of them at each */
	FIRST_CODE_PAGES = 64,
	CODE_CHUNK = 1 << 18,
	CACHE_LINE = 64,
	EFLAGS_TF = 1 << 8,
	EFLAGS_DF = 1 << 10,
	EFLAGS_IOPL_SHIFT = 12,
	EXCEPTION_DB = 1,
	EXCEPTION_BP = 3,
	EXCEPTION_UD = 6,
	REGISTER_CX = 1,
	REGISTER_DX = 2,
	REGISTER_SI = 6,
	REGISTER_DI = 7,
};
#define NOWHERE UINT64_MAX

static bool stopping(const struct orc_emulator *e)
{
	return atomic_load_explicit(&e->v->commands, memory_order_relaxed) || e->v->waiting;
}

static void stop(struct orc_emulator *e)
{
	e->u->uc_emu_stop(e->uc);
}

/* ---- guest memory --------------------------------------------------------------------------------------------- */

static struct orc_memory *memory_at(const struct orc_emulator *e, uint64_t physical)
{
	for (size_t i = 0; i < e->memories; i++)
		if (physical - e->memory[i].start < e->memory[i].size)
			return &e->memory[i];
	return NULL;
}

static uint8_t *page_bit(struct orc_memory *m, uint64_t physical, uint8_t *bit)
{
	uint64_t page = (physical - m->start) / PAGE;

	*bit = (uint8_t)(1u << (page & 7));
	return (uint8_t *)&m->executed[page >> 3];
}

static bool was_executed(struct orc_memory *m, uint64_t physical)
{
	uint8_t bit, *at = page_bit(m, physical, &bit);

	return atomic_load_explicit((_Atomic uint8_t *)at, memory_order_seq_cst) & bit;
}

/* Copies between a buffer and guest memory at a linear address. False if a page is not there, or not memory, or may not be
 * written: nothing is written then. */
static bool copy(struct orc_emulator *e, uint64_t linear, void *buffer, size_t size, bool write)
{
	uint32_t access = (uint32_t)(write ? e->u->n.UC_PROT_WRITE : e->u->n.UC_PROT_READ);

	for (int doing = write ? 0 : 1; doing < 2; doing++) {
		for (size_t done = 0; done < size;) {
			size_t part = PAGE - ((linear + done) & (PAGE - 1));
			uint64_t physical;
			struct orc_memory *m;

			if (part > size - done)
				part = size - done;
			if (e->u->uc_vmem_translate(e->uc, linear + done, access, &physical) || !(m = memory_at(e, physical)) ||
			    (write && m->readonly))
				return false;
			if (doing && write) {
				memcpy(m->host + (physical - m->start), (char *)buffer + done, part);
				if (was_executed(m, physical))
					atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
			} else if (doing) {
				memcpy((char *)buffer + done, m->host + (physical - m->start), part);
			}
			done += part;
		}
	}
	return true;
}

static size_t fetch(struct orc_emulator *e, uint64_t linear, uint8_t *code, size_t most)
{
	size_t first = PAGE - (linear & (PAGE - 1));

	if (first >= most)
		return copy(e, linear, code, most, false) ? most : 0;
	if (!copy(e, linear, code, first, false))
		return 0;
	return copy(e, linear + first, code + first, most - first, false) ? most : first;
}

void orc_emulator_written(orc_emulator *e, uint64_t address, uint64_t size)
{
	/* The write comes before the look at the bits, as a bit comes before the fetch of what is translated: one of the two
	 * threads sees the other. */
	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t page = address & ~(uint64_t)(PAGE - 1); page < address + size; page += PAGE) {
		struct orc_memory *m = memory_at(e, page);

		if (m && was_executed(m, page)) {
			atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
			return;
		}
	}
}

/* ---- sites: which instructions are hooked --------------------------------------------------------------------- */

static unsigned ctl(const struct orc_emulator *e, int type, int arguments)
{
	return (unsigned)type | (unsigned)arguments << 26 | (unsigned)e->u->n.UC_CTL_IO_WRITE << 30;
}

static void forget_translations(struct orc_emulator *e)
{
	e->u->uc_ctl(e->uc, ctl(e, e->u->n.UC_CTL_TB_FLUSH, 0));
}

static uint64_t *slot(uint64_t *sites, uint32_t room, uint64_t address)
{
	uint32_t i = (uint32_t)((address * 0x9e3779b97f4a7c15ull) >> 32);

	while (sites[i & (room - 1)] && sites[i & (room - 1)] != address + 1)
		i++;
	return &sites[i & (room - 1)];
}

static bool grow(struct orc_emulator *e)
{
	uint32_t room = e->site_room ? e->site_room * 2 : 64;
	uint64_t *sites = calloc(room, sizeof *sites);
	size_t *hooks = realloc(e->hooks, room / 2 * sizeof *hooks);

	if (hooks)
		e->hooks = hooks;
	if (!sites || !hooks) {
		free(sites);
		return false;
	}
	for (uint32_t i = 0; i < e->site_room; i++)
		if (e->sites[i])
			*slot(sites, room, e->sites[i] - 1) = e->sites[i];
	free(e->sites);
	e->sites = sites;
	e->site_room = room;
	return true;
}

static void on_instruction(uc_engine *, uint64_t address, uint32_t size, void *data);

/* Has on_instruction called at an address. True if it is new: what is translated there has no call yet. */
static bool hook_site(struct orc_emulator *e, uint64_t address)
{
	uint64_t *at;

	if (e->site_count * 2 >= e->site_room && !grow(e)) {
		e->failed = "no memory";
		return false;
	}
	at = slot(e->sites, e->site_room, address);
	if (*at)
		return false;
	if (e->u->uc_hook_add(e->uc, &e->hooks[e->site_count], e->u->n.UC_HOOK_CODE, (void *)on_instruction, e, address,
			      address)) {
		e->failed = "no memory";
		return false;
	}
	*at = address + 1;
	e->site_count++;
	return true;
}

static void unhook_all(struct orc_emulator *e)
{
	for (uint32_t i = 0; i < e->site_count; i++)
		e->u->uc_hook_del(e->uc, e->hooks[i]);
	memset(e->sites, 0, e->site_room * sizeof *e->sites);
	e->site_count = 0;
	forget_translations(e);
}

static void mark_stale(struct orc_emulator *e, uint64_t begin, uint64_t end)
{
	e->stale = begin;
	e->stale_end = end;
	atomic_fetch_or_explicit(&e->attention, ATTENTION_STALE, memory_order_relaxed);
}

/* Looks through a block that was just translated. Instructions need not be told apart: unicorn calls a hook only where one
 * begins, so one too many in the middle of another does no harm. */
static void scan(struct orc_emulator *e, uint64_t begin, uint32_t size)
{
	uint8_t code[PAGE + ORC_INSN_MAX];
	bool found = false;
	size_t n;
	int bits;

	if (size > PAGE)
		size = PAGE;
	n = fetch(e, begin, code, size);
	orc_emulator_look(e);
	bits = orc_state_bits(e);
	for (size_t i = 0; i < n; i++) {
		struct orc_insn insn;

		switch (code[i]) {
		case 0xf0:
			if (!e->bus_locks)
				continue;
			break;
		case 0x86: case 0x87:
			if (!e->bus_locks)
				continue;
			break;
		case 0xe4: case 0xe5: case 0xe6: case 0xe7: case 0xec: case 0xed: case 0xee: case 0xef:
		case 0x6c: case 0x6d: case 0x6e: case 0x6f: case 0xf4:
			break;
		default:
			continue;
		}
		/* It may begin with prefixes before this byte. */
		for (size_t start = i;; start--) {
			if (orc_decode(code + start, n - start, bits, &insn))
				found |= hook_site(e, begin + start);
			if (!start || i - start >= ORC_INSN_MAX - 1 || !orc_is_prefix(code[start - 1], bits))
				break;
		}
	}
	for (int i = 0; i < 4; i++)
		if (e->debug & KVM_GUESTDBG_USE_HW_BP && e->breakpoint[i] - begin < size)
			found |= hook_site(e, e->breakpoint[i]);
	if (found)
		mark_stale(e, begin, begin + size);
}

/* ---- hooks ---------------------------------------------------------------------------------------------------- */

static void on_block(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;
	uint32_t attention = atomic_load_explicit(&e->attention, memory_order_relaxed);

	(void)uc;
	if (!(attention | atomic_load_explicit(&e->v->commands, memory_order_relaxed) |
	      atomic_load_explicit(&e->v->fleet->urgent, memory_order_relaxed)) || e->replaying)
		return;
	if (attention & ATTENTION_FIRST) { /* unicorn tells of translations from the second on */
		atomic_fetch_and(&e->attention, ~(uint32_t)ATTENTION_FIRST);
		scan(e, address, size);
	}
	orc_make_way(e->v);
	if (atomic_load(&e->attention) || atomic_load(&e->v->commands))
		stop(e);
}

static void on_translated(uc_engine *uc, uc_tb *block, uc_tb *before, void *data)
{
	(void)uc, (void)before;
	scan(data, block->pc, block->size);
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

/* A record whose details the caller fills in. */
static struct orc_record *blank(struct orc_emulator *e)
{
	struct orc_record *r = &e->v->record;

	memset(r->arg, 0, sizeof r->arg);
	r->data_size = 0;
	return r;
}

static void count_lock(struct orc_emulator *e, uint64_t rip)
{
	blank(e);
	account(e, KVM_EXIT_X86_BUS_LOCK, e->bus_locks ? KVM_RUN_X86_BUS_LOCK : 0, rip, true);
}

static uint64_t masked(uint64_t value, int bits)
{
	return bits == 64 ? value : value & ((1ull << bits) - 1);
}

static uint64_t sign_extended(uint64_t value, int bytes)
{
	return bytes == 8 ? value : bytes == 4 ? (uint64_t)(int64_t)(int32_t)value : (uint64_t)(int64_t)(int16_t)value;
}

static uint64_t segment_base(const struct orc_emulator *e, int segment, int bits)
{
	/* In 64-bit code only FS and GS have one: Intel SDM vol. 1, 3.4.2.1. */
	return bits == 64 && segment < 4 ? 0 : orc_state_segments(e)[segment].base;
}

/* Where the instruction's operand is, by the state looked at last. */
static uint64_t operand_address(const struct orc_emulator *e, const struct orc_insn *insn, uint64_t rip, int bits)
{
	const uint64_t *r = orc_state_registers(e);
	uint64_t offset = (uint64_t)insn->displacement;

	if (insn->relative)
		offset += rip + insn->length;
	if (insn->base != ORC_NO_REGISTER)
		offset += r[insn->base];
	if (insn->index != ORC_NO_REGISTER)
		offset += r[insn->index] * insn->scale;
	if (insn->bit_offset != ORC_NO_REGISTER) {
		/* A bit string: the operand is the word that holds the bit (Intel SDM vol. 2, 3.1.1.9). */
		int64_t bit = (int64_t)sign_extended(r[insn->bit_offset], insn->size);

		offset += (uint64_t)(bit >> (insn->size == 8 ? 6 : insn->size == 4 ? 5 : 4)) * insn->size;
	}
	offset = masked(offset, insn->address_bits) + segment_base(e, insn->segment, bits);
	return masked(offset, bits == 64 ? 64 : 32);
}

/* A locked access takes the bus if it crosses a cache line, or if what it accesses is not cached: Intel SDM vol. 3, 9.1.2. */
static bool takes_the_bus(struct orc_emulator *e, uint64_t linear, unsigned size)
{
	uint64_t physical;

	if ((linear & (CACHE_LINE - 1)) + size > CACHE_LINE)
		return true;
	return !e->u->uc_vmem_translate(e->uc, linear, (uint32_t)e->u->n.UC_PROT_READ, &physical) && !memory_at(e, physical);
}

static void meet_lock(struct orc_emulator *e, const struct orc_insn *insn, uint64_t address, uint64_t rip, int bits)
{
	if (!e->bus_locks || !takes_the_bus(e, operand_address(e, insn, rip, bits), insn->size))
		return;
	if (e->trap_like) {
		uint64_t next = address + insn->length;

		e->armed = next;
		e->armed_rip = rip + insn->length;
		if (hook_site(e, next)) { /* we would not hear of it */
			e->armed = NOWHERE;
			mark_stale(e, address, next + 1);
			stop(e);
		}
		return;
	}
	count_lock(e, rip);
	if (stopping(e)) {
		e->pass = address;
		stop(e);
	}
}

/* Whether code of this privilege may touch ports without a look at the task's permission map. */
static bool may_touch_ports(const struct orc_emulator *e)
{
	uint32_t level = (orc_state_segments(e)[2].flags >> SEGMENT_DPL_SHIFT) & 3;
	uint64_t flags = orc_register(e, e->u->n.UC_X86_REG_EFLAGS);

	return level <= ((flags >> EFLAGS_IOPL_SHIFT) & 3);
}

static bool is_breakpoint(const struct orc_emulator *e, uint64_t address)
{
	if (e->debug & KVM_GUESTDBG_USE_HW_BP)
		for (int i = 0; i < 4; i++)
			if (e->breakpoint[i] == address)
				return true;
	return false;
}

static void on_instruction(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;
	struct orc_insn insn;
	uint8_t code[ORC_INSN_MAX];
	uint64_t rip;
	int bits;

	(void)uc, (void)size;
	if (e->replaying)
		return;
	if (e->armed != NOWHERE) {
		bool done = e->armed == address;

		e->armed = NOWHERE;
		if (done) {
			count_lock(e, e->armed_rip);
			if (stopping(e)) {
				stop(e);
				return;
			}
		}
	}
	if (e->pass == address) {
		e->pass = NOWHERE;
		return;
	}
	orc_emulator_look(e);
	bits = orc_state_bits(e);
	rip = address - segment_base(e, 1, bits);
	if (is_breakpoint(e, address)) {
		e->exception = EXCEPTION_DB;
		e->insn_rip = rip;
		stop(e);
		return;
	}
	if (!orc_decode(code, fetch(e, address, code, sizeof code), bits, &insn))
		return;
	switch (insn.kind) {
	case ORC_INSN_LOCK:
		meet_lock(e, &insn, address, rip, bits);
		return;
	case ORC_INSN_HLT:
		if ((orc_state_segments(e)[2].flags >> SEGMENT_DPL_SHIFT) & 3)
			return; /* unicorn raises the exception */
		break;
	default:
		if (!may_touch_ports(e))
			return;
	}
	e->insn = insn;
	e->insn_rip = rip;
	stop(e);
}

static void on_interrupt(uc_engine *uc, uint32_t vector, void *data)
{
	struct orc_emulator *e = data;

	(void)uc;
	if (vector == EXCEPTION_DB && (e->replaying || e->debug & KVM_GUESTDBG_SINGLESTEP))
		e->stepped = true; /* the instruction is done, and a lock it made is still to be counted */
	else
		e->exception = (int)vector, e->armed = NOWHERE;
	stop(e);
}

/* Memory that nobody backs, or that may not be written. False: the instruction is given up. */
static bool on_touch(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;
	const struct orc_unicorn_numbers *n = &e->u->n;

	(void)uc;
	e->touch = (struct orc_touch){.address = address, .value = (uint64_t)value, .size = (uint8_t)size,
				      .write = type != n->UC_MEM_READ_UNMAPPED, .rom = type == n->UC_MEM_WRITE_PROT};
	e->touch_rip = orc_register(e, n->UC_X86_REG_RIP);
	return false;
}

static bool on_fetch(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;

	(void)uc, (void)type, (void)size, (void)value;
	e->fetch = address;
	e->fetch_failed = !memory_at(e, address);
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
		{n->UC_HOOK_EDGE_GENERATED, (void *)on_translated},
		{n->UC_HOOK_INTR, (void *)on_interrupt},
		{n->UC_HOOK_MEM_READ_UNMAPPED | n->UC_HOOK_MEM_WRITE_UNMAPPED | n->UC_HOOK_MEM_WRITE_PROT, (void *)on_touch},
		{n->UC_HOOK_MEM_FETCH_UNMAPPED | n->UC_HOOK_MEM_FETCH_PROT, (void *)on_fetch},
	};

	for (size_t i = 0; i < sizeof hooks / sizeof *hooks; i++) {
		size_t hook;
		int rc = e->u->uc_hook_add(e->uc, &hook, hooks[i].type, hooks[i].function, e, (uint64_t)1, (uint64_t)0);

		if (rc)
			return rc;
	}
	return grow(e) ? 0 : -1;
}

/* ---- port accesses -------------------------------------------------------------------------------------------- */

static void set_gpr(struct orc_emulator *e, int number, uint64_t value, int bits)
{
	const int *numbers = &e->u->n.UC_X86_REG_RAX;
	uint64_t old = orc_register(e, numbers[number]);

	/* 32-bit results clear the upper half; 8 and 16-bit ones leave the rest: Intel SDM vol. 1, 3.4.1.1. */
	if (bits < 32)
		value = (old & ~((1ull << bits) - 1)) | (value & ((1ull << bits) - 1));
	orc_set_register(e, numbers[number], masked(value, bits < 32 ? 64 : bits));
}

static void move_on(struct orc_emulator *e)
{
	int bits = orc_state_bits(e);

	orc_set_register(e, e->u->n.UC_X86_REG_RIP, masked(e->insn_rip + e->insn.length, bits));
}

/* A string instruction did `count` elements: counters and pointers, and the next instruction once all are done. */
static void advance(struct orc_emulator *e, uint32_t count)
{
	const struct orc_insn *insn = &e->insn;
	const uint64_t *r = orc_state_registers(e);
	int pointer = insn->kind == ORC_INSN_INS ? REGISTER_DI : REGISTER_SI, bits = insn->address_bits;
	int64_t step = (int64_t)count * insn->size;
	uint64_t left = masked(r[REGISTER_CX], bits) - count;

	if (orc_register(e, e->u->n.UC_X86_REG_EFLAGS) & EFLAGS_DF)
		step = -step;
	set_gpr(e, pointer, r[pointer] + (uint64_t)step, bits);
	if (insn->rep)
		set_gpr(e, REGISTER_CX, left, bits);
	if (!insn->rep || !masked(left, bits))
		move_on(e);
}

static uint64_t string_address(const struct orc_emulator *e)
{
	const struct orc_insn *insn = &e->insn;
	int in = insn->kind == ORC_INSN_INS, bits = orc_state_bits(e);
	uint64_t offset = masked(orc_state_registers(e)[in ? REGISTER_DI : REGISTER_SI], insn->address_bits);

	return masked(offset + segment_base(e, in ? 0 : insn->segment, bits), bits == 64 ? 64 : 32);
}

/* How many elements of INS are asked for at once: as KVM's emulator does (arch/x86/kvm/emulate.c, pio_in_emulated). */
static uint32_t read_ahead(struct orc_emulator *e, uint64_t address, uint64_t left)
{
	uint64_t in_page = orc_register(e, e->u->n.UC_X86_REG_EFLAGS) & EFLAGS_DF ? address & (PAGE - 1)
										     : PAGE - (address & (PAGE - 1));
	uint64_t n = ORC_IO_BYTES / e->insn.size;

	if (n > in_page)
		n = in_page;
	if (n > left)
		n = left;
	return n ? (uint32_t)n : 1;
}

/* The instruction that e->insn stopped before. */
static enum orc_why port_io(struct orc_emulator *e)
{
	orc_vcpu *v = e->v;
	const struct orc_insn *insn = &e->insn;
	const uint64_t *r;
	struct orc_record *record;
	bool string = insn->kind == ORC_INSN_INS || insn->kind == ORC_INSN_OUTS;
	bool write = insn->kind == ORC_INSN_OUT || insn->kind == ORC_INSN_OUTS;
	uint32_t port, count = 1;

	orc_emulator_look(e);
	r = orc_state_registers(e);
	port = insn->port >= 0 ? (uint32_t)insn->port : (uint32_t)(r[REGISTER_DX] & 0xffff);
	if (string && insn->rep && !masked(r[REGISTER_CX], insn->address_bits)) {
		move_on(e);
		return ORC_COMMAND; /* nothing to answer */
	}
	if (insn->kind == ORC_INSN_OUT) {
		memcpy(e->data, &r[0], insn->size);
	} else if (insn->kind == ORC_INSN_OUTS) {
		if (!copy(e, string_address(e), e->data, insn->size, false))
			return ORC_ERROR;
	} else if (insn->kind == ORC_INSN_INS && insn->rep) {
		count = read_ahead(e, string_address(e), masked(r[REGISTER_CX], insn->address_bits));
	}
	e->io_count = count;
	record = blank(e);
	record->arg[0] = port;
	record->arg[1] = insn->size;
	record->arg[2] = count;
	record->arg[3] = write;
	if (write)
		orc_take_data(record, e->data, insn->size);
	account(e, KVM_EXIT_IO, 0, 0, false);
	if (insn->kind == ORC_INSN_OUTS) { /* KVM's emulator is done with it before it tells */
		advance(e, 1);
		e->pending = PENDING_NOTHING;
	} else {
		e->pending = PENDING_IO;
	}
	if (!orc_is_claimed(e->ports, port)) {
		orc_count(&v->unclaimed, 1);
		if (!write)
			memset(e->data, 0xff, (size_t)insn->size * count);
		return ORC_COMMAND;
	}
	v->access = (struct orc_access){.address = port, .size = insn->size, .count = count, .write = write, .data = e->data};
	return ORC_IO;
}

/* The access was answered: the instruction has its effect. */
static bool finish_io(struct orc_emulator *e)
{
	e->pending = PENDING_NOTHING;
	orc_emulator_look(e);
	if (e->insn.kind == ORC_INSN_INS) {
		uint64_t address = string_address(e);
		bool down = orc_register(e, e->u->n.UC_X86_REG_EFLAGS) & EFLAGS_DF;

		for (uint32_t i = 0; i < e->io_count; i++, address += (uint64_t)(down ? -e->insn.size : e->insn.size))
			if (!copy(e, address, e->data + (size_t)i * e->insn.size, e->insn.size, true))
				return false;
		advance(e, e->io_count);
		return true;
	}
	if (e->insn.kind == ORC_INSN_IN) {
		uint32_t value = 0;

		memcpy(&value, e->data, e->insn.size);
		set_gpr(e, 0, value, e->insn.size * 8);
	}
	move_on(e);
	return true;
}

/* ---- memory that nobody backs --------------------------------------------------------------------------------- */

static enum orc_why tell_mmio(struct orc_emulator *e, const struct orc_touch *t, unsigned flags)
{
	struct orc_record *record = blank(e);

	record->arg[0] = t->address;
	record->arg[1] = t->size;
	record->arg[2] = t->write;
	memcpy(e->data, &t->value, sizeof t->value);
	if (t->write)
		orc_take_data(record, e->data, t->size);
	account(e, KVM_EXIT_MMIO, flags, e->armed_rip, flags != 0);
	e->v->access = (struct orc_access){.address = t->address, .size = t->size, .count = 1, .write = t->write,
					   .data = e->data};
	e->pending = t->write ? PENDING_WRITE : PENDING_READ;
	return ORC_MMIO;
}

static enum orc_why ask(struct orc_emulator *e)
{
	if (e->answered == ORC_TOUCHES) {
		e->failed = "an instruction reads more of unbacked memory than is supported; the kvm backend can";
		return ORC_ERROR;
	}
	e->touch.write = e->touch.rom = false;
	e->touch.value = 0;
	/* KVM asks for each page by itself. */
	if (e->touch.address == e->rest_at)
		e->touch.size = e->rest;
	if ((e->touch.address & (PAGE - 1)) + e->touch.size > PAGE) {
		e->rest = (uint8_t)((e->touch.address & (PAGE - 1)) + e->touch.size - PAGE);
		e->touch.size = (uint8_t)(e->touch.size - e->rest);
		e->rest_at = e->touch.address + e->touch.size;
	}
	e->answers[e->answered] = e->touch;
	return tell_mmio(e, &e->touch, 0);
}

static uint64_t window_read(uc_engine *uc, uint64_t offset, unsigned size, void *data)
{
	struct orc_window *w = data;
	struct orc_emulator *e = w->e;
	uint64_t address = w->page + offset, value = 0;
	bool known = false;

	(void)uc;
	/* By bytes: unicorn reads an unaligned word as the two aligned ones around it, and a long one in halves. */
	for (unsigned byte = 0; byte < size; byte++)
		for (unsigned i = 0; i < e->answered; i++) {
			uint64_t at = address + byte - e->answers[i].address;

			if (at < e->answers[i].size) {
				value |= ((e->answers[i].value >> (8 * at)) & 0xff) << (8 * byte);
				known = true;
			}
		}
	if (!known && !e->missing) {
		e->missing = true;
		e->touch = (struct orc_touch){.address = address, .size = (uint8_t)size};
	}
	return value;
}

static void window_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *data)
{
	struct orc_window *w = data;
	struct orc_emulator *e = w->e;
	uint64_t address = w->page + offset;

	(void)uc;
	if (size < 8)
		value &= (1ull << (8 * size)) - 1;
	if (e->written) { /* unicorn writes an unaligned word byte by byte, and a long one in halves */
		struct orc_touch *last = &e->writes[e->written - 1];

		if (last->address + last->size == address && last->size + size <= 8) {
			last->value |= value << (8 * last->size);
			last->size = (uint8_t)(last->size + size);
			return;
		}
	}
	if (e->written == ORC_TOUCHES)
		e->too_many = true;
	else
		e->writes[e->written++] = (struct orc_touch){.address = address, .value = value, .size = (uint8_t)size,
							     .write = true};
}

/* Opens the page that was touched. A page that may only be read does not tell what is written to it: it remembers. */
static bool add_window(struct orc_emulator *e, const struct orc_touch *touch)
{
	uint64_t page = touch->address & ~(uint64_t)(PAGE - 1);
	struct orc_window *w;

	for (unsigned i = 0; i < e->windows; i++)
		if (e->window[i].page == page)
			return true;
	if (e->windows == ORC_WINDOWS)
		return false;
	w = &e->window[e->windows];
	w->e = e;
	w->page = page;
	w->rom = touch->rom ? memory_at(e, page) : NULL;
	w->write = *touch;
	if (w->rom && !w->before && !(w->before = malloc(PAGE)))
		return false;
	e->windows++;
	return true;
}

static int open_windows(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	int rc = 0;

	for (unsigned i = 0; i < e->windows && !rc; i++) {
		struct orc_window *w = &e->window[i];

		if (w->rom) { /* writable for this one instruction: what it holds is put back */
			memcpy(w->before, w->rom->host + (w->page - w->rom->start), PAGE);
			rc = e->u->uc_mem_protect(e->uc, w->page, PAGE,
						  (uint32_t)(n->UC_PROT_READ | n->UC_PROT_WRITE | n->UC_PROT_EXEC));
		} else {
			rc = e->u->uc_mmio_map(e->uc, w->page, PAGE, window_read, w, window_write, w);
		}
	}
	return rc;
}

static void close_windows(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;

	for (unsigned i = 0; i < e->windows; i++) {
		struct orc_window *w = &e->window[i];

		if (w->rom) {
			memcpy(w->rom->host + (w->page - w->rom->start), w->before, PAGE);
			e->u->uc_mem_protect(e->uc, w->page, PAGE, (uint32_t)(n->UC_PROT_READ | n->UC_PROT_EXEC));
			atomic_fetch_or_explicit(&w->rom->executed[(w->page - w->rom->start) / PAGE >> 3],
						 (uint8_t)(1u << (((w->page - w->rom->start) / PAGE) & 7)), memory_order_seq_cst);
			atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
		} else {
			e->u->uc_mem_unmap(e->uc, w->page, PAGE);
		}
	}
}

/* Executes one instruction, by the trap flag (unicorn's own count makes it throw all translations away). */
static int step(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	uint64_t flags = orc_register(e, n->UC_X86_REG_EFLAGS), dr6 = orc_register(e, n->UC_X86_REG_DR6);
	int rc;

	orc_set_register(e, n->UC_X86_REG_EFLAGS, flags | EFLAGS_TF);
	e->stepped = false;
	e->touch.size = 0;
	rc = e->u->uc_emu_start(e->uc, orc_register(e, n->UC_X86_REG_RIP), 0, 0, 0);
	if (!(flags & EFLAGS_TF))
		orc_set_register(e, n->UC_X86_REG_EFLAGS, orc_register(e, n->UC_X86_REG_EFLAGS) & ~(uint64_t)EFLAGS_TF);
	orc_set_register(e, n->UC_X86_REG_DR6, dr6);
	return rc;
}

static void settle(struct orc_emulator *e)
{
	e->answered = e->written = e->delivered = e->windows = 0;
	e->rest_at = NOWHERE;
	e->pending = PENDING_NOTHING;
}

/* The next write of a replayed instruction, or the end of it. */
static enum orc_why deliver(struct orc_emulator *e)
{
	bool lock = e->armed != NOWHERE && e->delivered + 1 >= e->written;
	unsigned flags = lock && e->bus_locks ? KVM_RUN_X86_BUS_LOCK : 0;

	if (lock)
		e->armed = NOWHERE;
	if (e->delivered < e->written)
		return tell_mmio(e, &e->writes[e->delivered++], flags); /* a lock rides on it, as on Intel */
	if (lock)
		count_lock(e, e->armed_rip);
	settle(e);
	return ORC_COMMAND;
}

static enum orc_why fail(struct orc_emulator *e, const char *why)
{
	settle(e);
	e->failed = why;
	return ORC_ERROR;
}

/* Executes the instruction once more, with the answers there are. */
static enum orc_why replay(struct orc_emulator *e)
{
	for (int attempt = 0; attempt < 2 * ORC_WINDOWS; attempt++) {
		int rc;

		e->u->uc_context_save(e->uc, e->rollback);
		e->written = e->delivered = 0;
		e->missing = e->too_many = false;
		for (unsigned i = 0; i < e->windows; i++)
			if (e->window[i].rom)
				e->writes[e->written++] = e->window[i].write;
		if ((rc = open_windows(e))) {
			close_windows(e);
			return fail(e, e->u->uc_strerror(rc));
		}
		e->replaying = true;
		rc = step(e);
		e->replaying = false;
		close_windows(e);
		if (e->exception >= 0) {
			settle(e);
			return ORC_COMMAND; /* it faulted otherwise: the loop sees to it */
		}
		if (e->stepped && !e->missing) {
			if (e->too_many)
				return fail(e, "an instruction writes more of unbacked memory than is supported; the kvm backend can");
			return deliver(e);
		}
		e->u->uc_context_restore(e->uc, e->rollback);
		if (!e->touch.size)
			return fail(e, e->u->uc_strerror(rc));
		if (e->missing || !e->touch.write)
			return ask(e);
		if (!add_window(e, &e->touch))
			break;
	}
	return fail(e, "an instruction reaches too far into unbacked memory; the kvm backend can");
}

static enum orc_why touched(struct orc_emulator *e)
{
	/* What a helper of unicorn's writes does not stop at once: what came after it can't be undone. */
	if (orc_register(e, e->u->n.UC_X86_REG_RIP) != e->touch_rip)
		return fail(e, "an instruction that unicorn can't restart wrote to unbacked memory; the kvm backend can");
	settle(e);
	if (!e->touch.write)
		return ask(e);
	if (!add_window(e, &e->touch))
		return fail(e, "no memory");
	return replay(e);
}

static enum orc_why finish(struct orc_emulator *e)
{
	switch (e->pending) {
	case PENDING_IO:
		return finish_io(e) ? ORC_COMMAND : fail(e, "INS into memory that is not there; the kvm backend can");
	case PENDING_READ: {
		struct orc_touch *answer = &e->answers[e->answered++];

		memcpy(&answer->value, e->data, sizeof answer->value);
		if (!add_window(e, answer))
			return fail(e, "an instruction reaches too far into unbacked memory; the kvm backend can");
		return replay(e);
	}
	case PENDING_WRITE:
		return deliver(e);
	default:
		return ORC_COMMAND;
	}
}

/* ---- the loop ------------------------------------------------------------------------------------------------- */

void orc_vcpu_bind_emulator(orc_vcpu *v, orc_emulator *e, orc_ports *ports, bool trap_like, bool bus_locks)
{
	v->emulator = e;
	e->v = v;
	e->ports = ports;
	e->trap_like = trap_like;
	e->bus_locks = bus_locks;
}

void orc_emulator_debug(orc_emulator *e, const struct kvm_guest_debug *debug)
{
	e->debug = debug->control & KVM_GUESTDBG_ENABLE ? debug->control : 0;
	for (int i = 0; i < 4; i++)
		e->breakpoint[i] = debug->arch.debugreg[7] >> (2 * i) & 3 ? debug->arch.debugreg[i] : NOWHERE;
	unhook_all(e); /* blocks are looked through again, and breakpoints found */
}

/* Code was fetched from a page for the first time. */
static bool let_execute(struct orc_emulator *e, uint64_t address)
{
	struct orc_memory *m = memory_at(e, address);
	uint64_t begin, size = PAGE, pages = 0;

	if (!m)
		return false;
	/* Each change of protection splits a region of unicorn's, so a guest with much code gets more at a time. */
	for (uint64_t i = 0; i <= m->size / PAGE / 8 && pages <= FIRST_CODE_PAGES; i++)
		pages += (uint64_t)__builtin_popcount(m->executed[i]);
	if (pages > FIRST_CODE_PAGES)
		size = CODE_CHUNK;
	begin = m->start + ((address - m->start) & ~(size - 1));
	if (size > m->start + m->size - begin)
		size = m->start + m->size - begin;
	for (uint64_t page = begin; page < begin + size; page += PAGE) {
		uint8_t bit, *at = page_bit(m, page, &bit);

		atomic_fetch_or_explicit((_Atomic uint8_t *)at, bit, memory_order_seq_cst);
	}
	return !e->u->uc_mem_protect(e->uc, begin, size,
				     (uint32_t)(e->u->n.UC_PROT_READ | e->u->n.UC_PROT_EXEC |
						(m->readonly ? 0 : e->u->n.UC_PROT_WRITE)));
}

static void attend(struct orc_emulator *e)
{
	uint32_t attention = atomic_fetch_and(&e->attention, ATTENTION_FIRST);

	if (e->site_count > SITES)
		unhook_all(e);
	else if (attention & ATTENTION_WRITTEN)
		forget_translations(e);
	else if (attention & ATTENTION_STALE)
		e->u->uc_ctl(e->uc, ctl(e, e->u->n.UC_CTL_TB_REMOVE_CACHE, 2), e->stale, e->stale_end);
}

/* Whether the guest set a handler up: an entry of its interrupt table that a CPU would take. */
static bool has_handler(struct orc_emulator *e, int vector, const uc_x86_mmr *idt, bool protected)
{
	uint8_t gate[16] = {0};
	int size = !protected ? 4 : orc_state_bits(e) == 64 ? 16 : 8;

	if ((uint64_t)vector * (unsigned)size + (unsigned)size - 1 > idt->limit)
		return false;
	if (!protected)
		return true; /* whatever is there is an address */
	return copy(e, idt->base + (uint64_t)vector * (unsigned)size, gate, (size_t)size, false) && gate[5] & 0x80;
}

static enum orc_why tell(struct orc_emulator *e, unsigned reason)
{
	account(e, reason, 0, 0, false);
	return ORC_EXIT;
}

static enum orc_why tell_debug(struct orc_emulator *e, uint64_t exception, uint64_t rip, uint64_t dr6)
{
	struct orc_record *r = blank(e);

	r->arg[0] = exception;
	r->arg[1] = rip;
	r->arg[2] = dr6;
	r->arg[3] = orc_register(e, e->u->n.UC_X86_REG_DR7);
	return tell(e, KVM_EXIT_DEBUG);
}

static enum orc_why raised(struct orc_emulator *e)
{
	enum { DOUBLE_FAULT = 8, NOT_PRESENT = 11, GENERAL = 13, PAGE_FAULT = 14, DR6_FIXED = 0xffff0ff0 };
	const struct orc_unicorn_numbers *n = &e->u->n;
	int vector = e->exception;
	uint64_t rip = orc_register(e, n->UC_X86_REG_RIP);
	bool protected = orc_register(e, n->UC_X86_REG_CR0) & 1;
	uc_x86_mmr idt = {0};
	struct orc_record *r;

	e->exception = -1;
	e->armed = NOWHERE;
	if (vector == EXCEPTION_DB && is_breakpoint(e, e->insn_rip) && rip == e->insn_rip) {
		orc_emulator_look(e);
		e->pass = rip + segment_base(e, 1, orc_state_bits(e));
		return tell_debug(e, EXCEPTION_DB, rip, DR6_FIXED | 1);
	}
	if (vector == EXCEPTION_BP && e->debug & KVM_GUESTDBG_USE_SW_BP) {
		orc_set_register(e, n->UC_X86_REG_RIP, rip - 1); /* on the instruction, as KVM has it */
		return tell_debug(e, EXCEPTION_BP, rip - 1, DR6_FIXED);
	}
	e->u->uc_reg_read(e->uc, n->UC_X86_REG_IDTR, &idt);
	orc_emulator_look(e);
	r = blank(e);
	r->arg[0] = (uint64_t)vector;
	r->arg[2] = vector == PAGE_FAULT ? orc_register(e, n->UC_X86_REG_CR2) : rip;
	/* Without a handler, for it and for what follows from having none, a CPU shuts down: Intel SDM vol. 3, 6.15. */
	if (has_handler(e, vector, &idt, protected) || has_handler(e, NOT_PRESENT, &idt, protected) ||
	    has_handler(e, GENERAL, &idt, protected) || has_handler(e, DOUBLE_FAULT, &idt, protected))
		return tell(e, KVM_EXIT_EXCEPTION);
	return tell(e, KVM_EXIT_SHUTDOWN);
}

static enum orc_why cant_emulate(struct orc_emulator *e)
{
	struct orc_record *r = blank(e);
	uint8_t code[ORC_INSN_MAX];
	uint64_t rip = orc_register(e, e->u->n.UC_X86_REG_RIP);

	r->arg[0] = KVM_INTERNAL_ERROR_EMULATION;
	orc_emulator_look(e);
	orc_take_data(r, code, fetch(e, rip + segment_base(e, 1, orc_state_bits(e)), code, sizeof code));
	return tell(e, KVM_EXIT_INTERNAL_ERROR);
}

/* unicorn came back. ORC_COMMAND: nothing to tell, go on. */
static enum orc_why came_back(struct orc_emulator *e, int rc)
{
	const struct orc_unicorn_numbers *n = &e->u->n;

	if (e->failed)
		return ORC_ERROR;
	if (rc == n->UC_ERR_OK) {
		if (e->exception >= 0)
			return raised(e);
		if (e->insn.kind == ORC_INSN_HLT) {
			orc_emulator_look(e);
			move_on(e);
			blank(e);
			return tell(e, KVM_EXIT_HLT);
		}
		return e->insn.kind ? port_io(e) : ORC_COMMAND;
	}
	if (rc == n->UC_ERR_READ_UNMAPPED || rc == n->UC_ERR_WRITE_UNMAPPED || rc == n->UC_ERR_WRITE_PROT)
		return touched(e);
	if (rc == n->UC_ERR_FETCH_PROT && let_execute(e, e->fetch))
		return ORC_COMMAND;
	if (rc == n->UC_ERR_FETCH_UNMAPPED || rc == n->UC_ERR_FETCH_PROT) {
		if (e->armed != NOWHERE)
			count_lock(e, e->armed_rip);
		e->armed = NOWHERE;
		return cant_emulate(e);
	}
	if (rc == n->UC_ERR_INSN_INVALID) {
		e->exception = EXCEPTION_UD;
		return raised(e);
	}
	e->failed = e->u->uc_strerror(rc);
	return ORC_ERROR;
}

enum orc_why orc_emulator_run(orc_vcpu *v)
{
	struct orc_emulator *e = v->emulator;
	const struct orc_unicorn_numbers *n = &e->u->n;

	for (;;) {
		enum orc_why why;
		int rc;

		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			if (!e->pending)
				return ORC_COMMAND;
		} else if (v->waiting && !orc_wait_turn(v)) {
			continue;
		}
		if (e->pending) { /* as KVM: the access is completed when the guest is entered again */
			why = finish(e);
			if (why == ORC_COMMAND && e->exception >= 0)
				why = raised(e);
			if (why != ORC_COMMAND)
				return why;
			continue;
		}
		if (atomic_load_explicit(&e->attention, memory_order_acquire))
			attend(e);
		e->insn.kind = ORC_INSN_OTHER;
		e->exception = -1;
		if (e->debug & KVM_GUESTDBG_SINGLESTEP) {
			rc = step(e);
			if (e->stepped)
				return tell_debug(e, EXCEPTION_DB, orc_register(e, n->UC_X86_REG_RIP), 0xffff0ff0 | 1 << 14);
		} else {
			rc = e->u->uc_emu_start(e->uc, orc_register(e, n->UC_X86_REG_RIP), 0, 0, 0);
		}
		why = came_back(e, rc);
		if (why != ORC_COMMAND)
			return why;
		if (atomic_load_explicit(&v->commands, memory_order_relaxed))
			orc_count(&v->kicks, 1);
	}
}
