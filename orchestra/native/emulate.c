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
 *
 * Traps in unicorn that shape what is below:
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
 * - SYSCALL is a NOP; so is a LOCK prefix where none may be; IN and OUT look at no permission. See orc_insn_kind.
 */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

enum {
	PAGE = 4096,
	SITES = 2048, /* hooked at the same time; unicorn walks through all of them at each */
	FIRST_CODE_PAGES = 64,
	CODE_CHUNK = 1 << 18,
	CACHE_LINE = 64,
	EFLAGS_TF = 1 << 8,
	EFLAGS_DF = 1 << 10,
	EFLAGS_OF = 1 << 11,
	EFLAGS_IOPL_SHIFT = 12,
	EFLAGS_VM = 1 << 17,
	EXCEPTION_DB = 1,
	EXCEPTION_BP = 3,
	EXCEPTION_OF = 4,
	EXCEPTION_UD = 6,
	EXCEPTION_GP = 13,
	EXCEPTION_PF = 14,
	MSR_SYSENTER_CS = 0x174,
	MSR_EFER = 0xc0000080u,
	EFER_SCE = 1,
	EFER_LMA = 1 << 10,
	CR0_PG = 1u << 31,
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

static uint8_t page_bit(const struct orc_memory *m, uint64_t physical, _Atomic uint8_t **at)
{
	uint64_t page = (physical - m->start) / PAGE;

	*at = &m->executed[page >> 3];
	return (uint8_t)(1u << (page & 7));
}

static bool was_executed(const struct orc_memory *m, uint64_t physical)
{
	_Atomic uint8_t *at;
	uint8_t bit = page_bit(m, physical, &at);

	return atomic_load_explicit(at, memory_order_seq_cst) & bit;
}

static void mark_executed(struct orc_memory *m, uint64_t physical)
{
	_Atomic uint8_t *at;
	uint8_t bit = page_bit(m, physical, &at);

	atomic_fetch_or_explicit(at, bit, memory_order_seq_cst);
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

/* As many bytes as there are, on one page or two. */
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

static void forget_translations(struct orc_emulator *e)
{
	e->u->uc_ctl(e->uc, orc_unicorn_control(e->u, e->u->n.UC_CTL_TB_FLUSH, 0));
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
	uint64_t end = begin + size;
	bool found = false;
	size_t n;
	int bits;

	if (size > sizeof code)
		size = sizeof code;
	n = fetch(e, begin, code, size);
	orc_emulator_look(e);
	bits = orc_state_bits(e);
	for (size_t i = 0; i < n; i++) {
		struct orc_insn insn;

		if (!orc_may_matter(code + i, n - i))
			continue;
		/* It may begin with prefixes before this byte. */
		for (size_t start = i;; start--) {
			if (orc_decode(code + start, n - start, bits, &insn)) {
				found |= hook_site(e, begin + start);
				if (insn.kind == ORC_INSN_LOCK && e->trap_like) {
					uint64_t next = begin + start + insn.length;

					found |= hook_site(e, next); /* where it is counted; maybe in another block */
					end = next < end ? end : next + 1;
				}
			}
			if (!start || i - start >= ORC_INSN_MAX - 1 || !orc_is_prefix(code[start - 1], bits))
				break;
		}
	}
	for (int i = 0; i < 4; i++)
		if (e->debug & KVM_GUESTDBG_USE_HW_BP && e->breakpoint[i] - begin < size)
			found |= hook_site(e, e->breakpoint[i]);
	if (found)
		mark_stale(e, begin, end);
}

/* ---- hooks ---------------------------------------------------------------------------------------------------- */

static void on_block(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;

	(void)uc, (void)address, (void)size;
	if (!(atomic_load_explicit(&e->attention, memory_order_relaxed) |
	      atomic_load_explicit(&e->v->commands, memory_order_relaxed) |
	      atomic_load_explicit(&e->v->fleet->urgent, memory_order_relaxed)) || e->alone)
		return;
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

/* A locked access takes the bus if it crosses a cache line, or if what it accesses is not cached: Intel SDM vol. 3, 9.1.2.
 * One that faults does not, *code: it may be translated code that is written. */
static bool takes_the_bus(struct orc_emulator *e, uint64_t linear, unsigned size, bool *code)
{
	bool split = (linear & (CACHE_LINE - 1)) + size > CACHE_LINE, cached = true;

	*code = false;
	if (size == 16 && linear & 15)
		return false; /* CMPXCHG16B faults */
	for (uint64_t at = linear; at < linear + size; at = (at | (PAGE - 1)) + 1) {
		struct orc_memory *m;
		uint64_t physical;

		if (e->u->uc_vmem_translate(e->uc, at, (uint32_t)e->u->n.UC_PROT_WRITE, &physical))
			return false;
		m = memory_at(e, physical);
		cached &= m != NULL;
		*code |= m && was_executed(m, physical);
	}
	return split || !cached;
}

static void meet_lock(struct orc_emulator *e, const struct orc_insn *insn, uint64_t address, uint64_t rip, int bits)
{
	bool code;

	if (!e->bus_locks || !takes_the_bus(e, operand_address(e, insn, rip, bits), insn->size, &code))
		return;
	if (e->trap_like) {
		e->armed = address + insn->length;
		e->armed_rip = masked(rip + insn->length, bits);
		return;
	}
	count_lock(e, rip);
	if (code) {
		e->alone = true;
		stop(e);
	} else if (stopping(e)) {
		e->pass = address;
		stop(e);
	}
}

static uint64_t msr(const struct orc_emulator *e, uint32_t number)
{
	uc_x86_msr value = {.rid = number};

	e->u->uc_reg_read(e->uc, e->u->n.UC_X86_REG_MSR, &value);
	return value.value;
}

/* Whether the task's permission map lets this code touch those ports: Intel SDM vol. 1, 19.5.2. */
static bool is_permitted(struct orc_emulator *e, uint32_t port, unsigned size)
{
	enum { TSS_32 = 9, BUSY = 2, MAP_BASE = 0x66 };
	uc_x86_mmr task = {0};
	uint16_t map = 0, bits = 0;

	e->u->uc_reg_read(e->uc, e->u->n.UC_X86_REG_TR, &task);
	if (((task.flags >> 8) & 15 & ~BUSY) != TSS_32 || task.limit < MAP_BASE + 1)
		return false;
	if (!copy(e, task.base + MAP_BASE, &map, sizeof map, false))
		goto hidden;
	if (map + port / 8 + 1 > task.limit)
		return false;
	if (!copy(e, task.base + map + port / 8, &bits, sizeof bits, false))
		goto hidden;
	return !(bits >> (port & 7) & ((1u << size) - 1));
hidden:
	e->failed = "it does not read a port permission map that user code can't; the kvm backend can";
	stop(e);
	return false;
}

/* Whether code of this privilege may touch ports. */
static bool may_touch_ports(struct orc_emulator *e, const struct orc_insn *insn)
{
	uint64_t flags = orc_register(e, e->u->n.UC_X86_REG_EFLAGS);
	uint32_t hflags = orc_state_hflags(e), level = hflags & HFLAG_CPL;

	if (!level || (!(flags & EFLAGS_VM) && level <= ((flags >> EFLAGS_IOPL_SHIFT) & 3)))
		return true;
	return is_permitted(e, insn->port >= 0 ? (uint32_t)insn->port : (uint32_t)(orc_state_registers(e)[REGISTER_DX] & 0xffff),
			    insn->size);
}

static bool is_breakpoint(const struct orc_emulator *e, uint64_t address)
{
	if (e->debug & KVM_GUESTDBG_USE_HW_BP)
		for (int i = 0; i < 4; i++)
			if (e->breakpoint[i] == address)
				return true;
	return false;
}

static void raise_here(struct orc_emulator *e, int vector)
{
	e->exception = vector;
	stop(e);
}

/* SYSCALL and SYSENTER: unicorn takes them for a NOP. */
static void meet_syscall(struct orc_emulator *e, const struct orc_insn *insn, int bits)
{
	if (insn->opcode == 0x05 && (bits != 64 || !(msr(e, MSR_EFER) & EFER_SCE)))
		raise_here(e, EXCEPTION_UD);
	else if (insn->opcode == 0x34 && !(msr(e, MSR_SYSENTER_CS) & 0xfffc))
		raise_here(e, EXCEPTION_GP);
	else {
		e->failed = "it does not execute SYSCALL and SYSENTER; the kvm backend can";
		stop(e);
	}
}

static void on_instruction(uc_engine *uc, uint64_t address, uint32_t size, void *data)
{
	struct orc_emulator *e = data;
	struct orc_insn insn;
	uint8_t code[ORC_INSN_MAX];
	uint64_t rip;
	bool counted, debugged;
	int bits;

	(void)uc;
	if (e->alone)
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
	counted = e->pass == address;
	debugged = e->pass_debug == address;
	e->pass = e->pass_debug = NOWHERE;
	orc_emulator_look(e);
	bits = orc_state_bits(e);
	e->met = rip = address - segment_base(e, 1, bits);
	e->met_lock = false;
	e->negated_size = 0;
	if (!counted && !debugged && is_breakpoint(e, address)) {
		e->insn_rip = rip;
		raise_here(e, EXCEPTION_DB);
		return;
	}
	/* `size` is the instruction's, and what it says otherwise when it has none: no byte of another page is looked up. */
	if (!orc_decode(code, size <= sizeof code ? fetch(e, address, code, size) : 0, bits, &insn))
		return;
	switch (insn.kind) {
	case ORC_INSN_FLAGS:
		return; /* for touched() */
	case ORC_INSN_LOCK:
		e->met_lock = true;
		if (!counted)
			meet_lock(e, &insn, address, rip, bits);
		if ((insn.opcode & 0xfe) == 0xf6 && insn.reg == 3) {
			e->negated = operand_address(e, &insn, rip, bits);
			e->negated_size = insn.size;
		} else if (insn.opcode != 0xc7) {
			return;
		}
		/* fall through */
	case ORC_INSN_WIDE: /* unicorn gets its flags wrong, unless they have just been set (translate.c, case 0x1c7) */
		e->alone = true;
		e->pass = NOWHERE; /* it is not met again before it is done, and the next time it is another lock */
		stop(e);
		return;
	case ORC_INSN_ILLEGAL:
		raise_here(e, EXCEPTION_UD);
		return;
	case ORC_INSN_SYSCALL:
		meet_syscall(e, &insn, bits);
		return;
	case ORC_INSN_INT:
		if (insn.opcode != 0xce || orc_register(e, e->u->n.UC_X86_REG_EFLAGS) & EFLAGS_OF)
			raise_here(e, insn.port); /* here and not behind it, where unicorn raises it */
		return;
	case ORC_INSN_HLT:
		if (orc_state_hflags(e) & HFLAG_CPL)
			return; /* unicorn raises the exception */
		break;
	default:
		if (!may_touch_ports(e, &insn)) { /* unicorn would not look */
			if (!e->failed)
				raise_here(e, EXCEPTION_GP);
			return;
		}
	}
	e->insn = insn;
	e->insn_rip = rip;
	stop(e);
}

/* Whether the armed lock is done: execution came to the instruction behind it. */
static void settle_armed(struct orc_emulator *e)
{
	if (e->armed == NOWHERE || orc_register(e, e->u->n.UC_X86_REG_RIP) != e->armed_rip)
		return;
	e->armed = NOWHERE;
	count_lock(e, e->armed_rip);
}

static void on_interrupt(uc_engine *uc, uint32_t vector, void *data)
{
	struct orc_emulator *e = data;

	(void)uc;
	if (vector == EXCEPTION_DB && e->stepping) {
		e->stepped = true; /* the instruction is done, and a lock it made is still to be counted */
	} else {
		e->exception = (int)vector;
		settle_armed(e);
		e->armed = NOWHERE;
	}
	stop(e);
}

/* The part of what is accessed that lies on the page of `address`, where one of unicorn's pieces of it is. */
static struct orc_touch part_of(const struct orc_emulator *e, uint64_t address)
{
	struct orc_touch part = e->outer;
	unsigned first = PAGE - (unsigned)(part.address & (PAGE - 1)); /* bytes up to the end of its page */

	if ((part.address ^ address) & ~(uint64_t)(PAGE - 1)) { /* it goes on there */
		part.address = address & ~(uint64_t)(PAGE - 1);
		part.size = part.size > first ? (uint8_t)(part.size - first) : part.size;
		part.value >>= (8 * first) & 63;
	} else if (part.size > first) {
		part.size = (uint8_t)first;
	}
	return part;
}

/* Whether it is the second page of what is accessed. */
static bool goes_on(const struct orc_emulator *e, uint64_t address)
{
	uint64_t end = e->outer.address + e->outer.size;

	return !(address & (PAGE - 1)) && (e->outer.address & (PAGE - 1)) + e->outer.size > PAGE &&
	       (address == (end & ~(uint64_t)(PAGE - 1)) || orc_register(e, e->u->n.UC_X86_REG_CR0) & CR0_PG);
}

/* Memory that nobody backs, or that may not be written. False: the instruction is given up. */
static bool on_touch(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;
	const struct orc_unicorn_numbers *n = &e->u->n;
	bool write = type != n->UC_MEM_READ_UNMAPPED;

	(void)uc;
	/* on_access() is not called for a read that begins here, but was for one that goes on here. */
	if (!e->replaying || (!write && !goes_on(e, address)))
		e->outer = (struct orc_touch){.address = address, .value = (uint64_t)value, .size = (uint8_t)size};
	if (!e->replaying && write) /* to see whether the guest goes on before it stops */
		e->u->uc_context_save(e->uc, e->rollback);
	e->touch = part_of(e, address);
	e->touch.write = write;
	e->touch.rom = type == n->UC_MEM_WRITE_PROT;
	e->touch_rip = orc_register(e, n->UC_X86_REG_RIP);
	return false;
}

static struct orc_touch *add_write(struct orc_emulator *e, struct orc_touch part)
{
	if (e->written == ORC_TOUCHES) {
		e->too_many = true;
		return NULL;
	}
	part.write = true;
	e->writes[e->written] = part;
	return &e->writes[e->written++];
}

/* The instruction being replayed accesses memory: what of it is seen as a touch or at a window may be pieces. */
static void on_access(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;
	const struct orc_memory *m = memory_at(e, address);

	(void)uc;
	e->outer = (struct orc_touch){.address = address, .value = (uint64_t)value, .size = (uint8_t)size};
	e->part = NULL;
	if (type != e->u->n.UC_MEM_WRITE)
		return;
	if (m && m->readonly)
		add_write(e, part_of(e, address));
	else if ((address & (PAGE - 1)) + (unsigned)size > PAGE)
		for (unsigned i = 0; i < e->windows; i++)
			e->torn |= e->window[i].rom != NULL; /* done in part, and not to be undone */
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

static void settle(struct orc_emulator *e)
{
	e->answered = e->written = e->delivered = e->windows = 0;
	e->pending = PENDING_NOTHING;
}

static enum orc_why fail(struct orc_emulator *e, const char *why)
{
	settle(e);
	e->failed = why;
	return ORC_ERROR;
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
		e->pending = PENDING_DONE; /* nothing to answer */
		return ORC_COMMAND;
	}
	if (insn->kind == ORC_INSN_OUT) {
		memcpy(e->data, &r[0], insn->size);
	} else if (insn->kind == ORC_INSN_OUTS) {
		if (!copy(e, string_address(e), e->data, insn->size, false))
			return fail(e, "OUTS from memory that is not there; the kvm backend can");
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
		e->pending = PENDING_DONE;
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
	if (e->answered == ORC_TOUCHES)
		return fail(e, "an instruction reads more of unbacked memory than is supported; the kvm backend can");
	e->touch.value = 0;
	e->answers[e->answered] = e->touch;
	return tell_mmio(e, &e->touch, 0);
}

/* Unicorn reads an unaligned word as the two aligned ones around it, and a long one in halves. */
static uint64_t window_read(uc_engine *uc, uint64_t offset, unsigned size, void *data)
{
	struct orc_window *w = data;
	struct orc_emulator *e = w->e;
	uint64_t address = w->page + offset, value = 0;
	struct orc_touch part = part_of(e, address);

	(void)uc;
	if (e->missing)
		return 0;
	if (e->once && (!e->part || e->part->address != part.address)) /* LOCK NEG reads what it compares with again */
		for (unsigned i = 0; i < e->used; i++)
			if (e->answers[i].address == part.address)
				e->part = &e->answers[i];
	if (!e->part || e->part->address != part.address) {
		if (e->used == e->answered || e->answers[e->used].address != part.address) {
			e->missing = true;
			e->touch = part;
			e->answered = e->used; /* it accesses something else than the last time: memory has changed */
			stop(e);
			return 0;
		}
		e->part = &e->answers[e->used++];
	}
	for (unsigned byte = 0; byte < size; byte++)
		if (address + byte - part.address < part.size)
			value |= ((e->part->value >> 8 * (address + byte - part.address)) & 0xff) << (8 * byte);
	return value;
}

/* It writes one byte by byte. */
static void window_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *data)
{
	struct orc_window *w = data;
	struct orc_emulator *e = w->e;
	struct orc_touch part = part_of(e, w->page + offset);

	(void)uc, (void)size, (void)value;
	if (!e->part || e->part->address != part.address)
		e->part = add_write(e, part);
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
	if (w->rom && !w->before && !(w->before = malloc(PAGE)))
		return false;
	e->windows++;
	return true;
}

static int open_windows(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	int rc = e->u->uc_hook_add(e->uc, &e->access_hook, n->UC_HOOK_MEM_READ | n->UC_HOOK_MEM_WRITE, (void *)on_access, e,
				   (uint64_t)1, (uint64_t)0);

	for (e->opened = 0; e->opened < e->windows && !rc; e->opened++) {
		struct orc_window *w = &e->window[e->opened];

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

	while (e->opened) {
		struct orc_window *w = &e->window[--e->opened];

		if (w->rom) {
			memcpy(w->rom->host + (w->page - w->rom->start), w->before, PAGE);
			e->u->uc_mem_protect(e->uc, w->page, PAGE, (uint32_t)(n->UC_PROT_READ | n->UC_PROT_EXEC));
			mark_executed(w->rom, w->page);
			atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
		} else {
			e->u->uc_mem_unmap(e->uc, w->page, PAGE);
		}
	}
	e->u->uc_hook_del(e->uc, e->access_hook);
}

/* Executes one instruction, by the trap flag (unicorn's own count makes it throw all translations away). */
static int step(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	uint64_t flags = orc_register(e, n->UC_X86_REG_EFLAGS), dr6 = orc_register(e, n->UC_X86_REG_DR6);
	int rc;

	orc_set_register(e, n->UC_X86_REG_EFLAGS, flags | EFLAGS_TF);
	e->stepped = false;
	e->stepping = true;
	rc = e->u->uc_emu_start(e->uc, orc_register(e, n->UC_X86_REG_RIP), 0, 0, 0);
	e->stepping = false;
	orc_set_register(e, n->UC_X86_REG_DR6, dr6);
	if (!(flags & EFLAGS_TF))
		orc_set_register(e, n->UC_X86_REG_EFLAGS, orc_register(e, n->UC_X86_REG_EFLAGS) & ~(uint64_t)EFLAGS_TF);
	else if (e->stepped && !(e->debug & KVM_GUESTDBG_SINGLESTEP))
		e->exception = EXCEPTION_DB; /* the guest's own trap */
	return rc;
}

/* LOCK NEG is done: its flags, from its result. Unicorn takes them from what was there before (translate.c, case 3 of
 * 0xf6). */
static void mend_flags(struct orc_emulator *e)
{
	enum { CF = 1, PF = 1 << 2, AF = 1 << 4, ZF = 1 << 6, SF = 1 << 7 };
	uint64_t flags = orc_register(e, e->u->n.UC_X86_REG_EFLAGS) & ~(uint64_t)(CF | PF | AF | ZF | SF | EFLAGS_OF), result = 0;
	uint64_t sign = 1ull << (8 * e->negated_size - 1);

	for (unsigned byte = 0; byte < e->negated_size; byte++) {
		uint64_t physical = 0;
		const struct orc_memory *m;
		uint8_t value = 0;

		e->u->uc_vmem_translate(e->uc, e->negated + byte, (uint32_t)e->u->n.UC_PROT_WRITE, &physical);
		m = memory_at(e, physical);
		if (m && !m->readonly)
			value = m->host[physical - m->start];
		for (unsigned i = 0; i < e->written; i++)
			if (physical - e->writes[i].address < e->writes[i].size)
				value = (uint8_t)(e->writes[i].value >> 8 * (physical - e->writes[i].address));
		result |= (uint64_t)value << 8 * byte;
	}
	flags |= (result ? CF : ZF) | (result & sign ? SF : 0) | (result & 15 ? AF : 0) | (result == sign ? EFLAGS_OF : 0);
	flags |= __builtin_parity((unsigned)result & 0xff) ? 0 : PF;
	orc_set_register(e, e->u->n.UC_X86_REG_EFLAGS, flags);
	e->negated_size = 0;
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

/* Executes the instruction once more, with the answers there are. */
static enum orc_why replay(struct orc_emulator *e)
{
	for (int attempt = 0; attempt <= ORC_WINDOWS; attempt++) {
		int rc;

		e->u->uc_context_save(e->uc, e->rollback);
		e->used = e->written = e->delivered = 0;
		e->part = NULL;
		e->missing = e->too_many = e->torn = false;
		e->touch.size = 0;
		if ((rc = open_windows(e))) {
			close_windows(e);
			return fail(e, e->u->uc_strerror(rc));
		}
		e->alone = e->replaying = true;
		rc = step(e);
		e->alone = e->replaying = false;
		close_windows(e);
		if (e->torn || e->too_many)
			e->u->uc_context_restore(e->uc, e->rollback);
		if (e->torn)
			return fail(e, "a write goes from memory into such as may only be read; the kvm backend can");
		if (e->too_many)
			return fail(e, "an instruction writes more of unbacked memory than is supported; the kvm backend can");
		if (rc == e->u->n.UC_ERR_INSN_INVALID)
			e->exception = EXCEPTION_UD;
		if (e->exception >= 0 && !e->stepped) {
			settle(e);
			return ORC_COMMAND; /* it faulted otherwise: the loop sees to it */
		}
		if (e->stepped && !e->missing) {
			if (e->negated_size)
				mend_flags(e);
			return deliver(e);
		}
		e->u->uc_context_restore(e->uc, e->rollback);
		if (!e->touch.size)
			return fail(e, e->u->uc_strerror(rc));
		if (!e->touch.write)
			return ask(e);
		if (!add_window(e, &e->touch))
			break;
	}
	return fail(e, "an instruction reaches too far into unbacked memory; the kvm backend can");
}

static enum orc_why touched(struct orc_emulator *e)
{
	struct orc_touch touch = e->touch;

	settle(e);
	e->once = e->met_lock && e->met == e->touch_rip;
	if (e->met == e->touch_rip) {
		/* Flags that unicorn had worked out for the instruction, and it says that it had not: as they were before. */
		e->u->uc_context_save(e->uc, e->rollback);
		memcpy((char *)e->rollback + e->u->at_flags, (char *)e->context + e->u->at_flags, ORC_FLAGS_SIZE);
		e->u->uc_context_restore(e->uc, e->rollback);
	}
	if (!touch.write) /* at the start of a page it may be the rest of one that began before: a replay tells */
		return touch.address & (PAGE - 1) || touch.size == 1 ? ask(e) : replay(e);
	/* What a helper of unicorn's writes does not stop at once, and what came after it can't be undone. */
	orc_emulator_look(e);
	if (orc_register(e, e->u->n.UC_X86_REG_RIP) != e->touch_rip ||
	    memcmp(orc_state_registers(e), (char *)e->rollback + e->u->at_registers, 16 * sizeof(uint64_t))) {
		e->u->uc_context_restore(e->uc, e->rollback);
		return fail(e, "an instruction that unicorn can't restart wrote to unbacked memory; the kvm backend can");
	}
	if (!add_window(e, &touch))
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
		e->pending = PENDING_NOTHING;
		return ORC_COMMAND;
	}
}

/* ---- the loop ------------------------------------------------------------------------------------------------- */

void orc_vcpu_bind_emulator(orc_vcpu *v, orc_emulator *e, orc_ports *ports, bool trap_like, bool bus_locks)
{
	v->emulator = e;
	v->witness = &orc_emulator_witness;
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

bool orc_emulator_let_execute(struct orc_emulator *e, uint64_t address)
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
	for (uint64_t page = begin; page < begin + size; page += PAGE)
		mark_executed(m, page);
	/* What splits gets other numbers, by which unicorn finds translations again; where addresses are not physical ones it
	 * does not throw the old away (memory_unmap). */
	if (pages && orc_register(e, e->u->n.UC_X86_REG_CR0) & CR0_PG)
		forget_translations(e);
	return !e->u->uc_mem_protect(e->uc, begin, size,
				     (uint32_t)(e->u->n.UC_PROT_READ | e->u->n.UC_PROT_EXEC |
						(m->readonly ? 0 : e->u->n.UC_PROT_WRITE)));
}

static void attend(struct orc_emulator *e)
{
	uint32_t attention = atomic_exchange(&e->attention, 0);
	uint64_t fault = orc_register(e, e->u->n.UC_X86_REG_CR2);

	if (e->site_count > SITES) {
		unhook_all(e);
	} else if (attention & ATTENTION_WRITTEN) {
		forget_translations(e);
	} else if (attention & ATTENTION_STALE) {
		/* Page by page, as unicorn takes what is behind the first for what is behind it in its own order. */
		for (uint64_t at = e->stale, next; at < e->stale_end; at = next) {
			next = (at | (PAGE - 1)) + 1;
			if (next > e->stale_end)
				next = e->stale_end;
			e->u->uc_ctl(e->uc, orc_unicorn_control(e->u, e->u->n.UC_CTL_TB_REMOVE_CACHE, 2), at, next);
		}
		orc_set_register(e, e->u->n.UC_X86_REG_CR2, fault); /* a page may not be there */
	}
}

/* Whether the guest set a handler up: an entry of its interrupt table that a CPU would take. */
static bool has_handler(struct orc_emulator *e, int vector, const uc_x86_mmr *idt, bool protected)
{
	uint8_t gate[16] = {0};
	int size = !protected ? 4 : msr(e, MSR_EFER) & EFER_LMA ? 16 : 8;
	uint64_t fault = orc_register(e, e->u->n.UC_X86_REG_CR2);
	bool known;

	if ((uint64_t)vector * (unsigned)size + (unsigned)size - 1 > idt->limit)
		return false;
	if (!protected)
		return true; /* whatever is there is an address */
	known = copy(e, idt->base + (uint64_t)vector * (unsigned)size, gate, (size_t)size, false);
	orc_set_register(e, e->u->n.UC_X86_REG_CR2, fault);
	if (!known)
		return orc_state_hflags(e) & HFLAG_CPL; /* user code can't read it, and does it have one */
	return gate[5] & 0x80;
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
	enum { DOUBLE_FAULT = 8, NOT_PRESENT = 11, DR6_FIXED = 0xffff0ff0 };
	const struct orc_unicorn_numbers *n = &e->u->n;
	int vector = e->exception;
	uint64_t rip = orc_register(e, n->UC_X86_REG_RIP), linear;
	bool protected = orc_register(e, n->UC_X86_REG_CR0) & 1;
	uc_x86_mmr idt = {0};
	struct orc_record *r;

	e->exception = -1;
	e->armed = NOWHERE;
	if (vector > 255)
		return fail(e, "it does not execute guests of a guest; the kvm backend can");
	if (vector == EXCEPTION_PF && !e->careful) {
		e->careful = true;
		/* It was not raised: the next one is not a double fault. */
		e->u->uc_context_save(e->uc, e->rollback);
		memset((char *)e->rollback + e->u->at_exception, 0xff, sizeof(int32_t));
		e->u->uc_context_restore(e->uc, e->rollback);
		return ORC_COMMAND;
	}
	e->careful = false;
	orc_emulator_look(e);
	linear = rip + segment_base(e, 1, orc_state_bits(e));
	if (vector == EXCEPTION_DB && is_breakpoint(e, linear) && rip == e->insn_rip) {
		e->pass_debug = linear;
		return tell_debug(e, EXCEPTION_DB, rip, DR6_FIXED | 1);
	}
	if (vector == EXCEPTION_BP && e->debug & KVM_GUESTDBG_USE_SW_BP)
		return tell_debug(e, EXCEPTION_BP, rip, DR6_FIXED);
	e->u->uc_reg_read(e->uc, n->UC_X86_REG_IDTR, &idt);
	r = blank(e);
	r->arg[0] = (uint64_t)vector;
	r->arg[2] = vector == EXCEPTION_PF ? orc_register(e, n->UC_X86_REG_CR2) : rip;
	/* Without a handler, for it and for what follows from having none, a CPU shuts down: Intel SDM vol. 3, 6.15. */
	if (has_handler(e, vector, &idt, protected) || has_handler(e, NOT_PRESENT, &idt, protected) ||
	    has_handler(e, EXCEPTION_GP, &idt, protected) || has_handler(e, DOUBLE_FAULT, &idt, protected))
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
			return ORC_COMMAND; /* see raised() */
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
	if (rc == n->UC_ERR_FETCH_PROT && orc_emulator_let_execute(e, e->fetch))
		return ORC_COMMAND;
	if (rc == n->UC_ERR_FETCH_UNMAPPED || rc == n->UC_ERR_FETCH_PROT) {
		if (e->careful) {
			e->careful = false;
			return cant_emulate(e);
		}
		e->careful = true;
		return ORC_COMMAND;
	}
	if (rc == n->UC_ERR_INSN_INVALID) {
		e->exception = EXCEPTION_UD;
		return ORC_COMMAND;
	}
	e->failed = e->u->uc_strerror(rc);
	return ORC_ERROR;
}

static enum orc_why enter(struct orc_emulator *e)
{
	bool alone = e->alone;
	enum orc_why why;
	int rc;

	if (atomic_load_explicit(&e->attention, memory_order_acquire))
		attend(e);
	e->insn.kind = ORC_INSN_OTHER;
	e->exception = -1;
	if (alone)
		orc_emulator_look(e); /* as on_instruction() does, which lets it pass */
	else
		e->met = NOWHERE;
	e->stepped = false;
	if (alone || e->careful || e->debug & KVM_GUESTDBG_SINGLESTEP)
		rc = step(e);
	else
		rc = e->u->uc_emu_start(e->uc, orc_register(e, e->u->n.UC_X86_REG_RIP), 0, 0, 0);
	if (e->stepped)
		e->careful = false;
	if (alone && e->stepped && e->negated_size)
		mend_flags(e);
	if (alone) /* unless it was stopped before it began */
		e->alone = rc == e->u->n.UC_ERR_OK && !e->stepped && e->exception < 0;
	why = came_back(e, rc);
	if (why == ORC_COMMAND && atomic_load_explicit(&e->v->commands, memory_order_relaxed))
		orc_count(&e->v->kicks, 1);
	return why;
}

enum orc_why orc_emulator_run(orc_vcpu *v)
{
	struct orc_emulator *e = v->emulator;

	for (;;) {
		enum orc_why why;
		bool completed = e->pending;

		if (!e->pending)
			settle_armed(e);
		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			if (!e->pending) {
				if (orc_commanded(v))
					return ORC_COMMAND;
				continue;
			}
		} else if (v->waiting && !orc_wait_turn(v)) {
			continue;
		}
		/* As KVM: an access is completed when the guest is entered again. */
		why = e->pending ? finish(e) : enter(e);
		if (why == ORC_COMMAND && !e->pending && e->exception >= 0)
			why = raised(e);
		if (why == ORC_COMMAND && !e->pending && (completed || e->stepped) && e->debug & KVM_GUESTDBG_SINGLESTEP) {
			settle_armed(e);
			why = tell_debug(e, EXCEPTION_DB, orc_register(e, e->u->n.UC_X86_REG_RIP), 0xffff0ff0 | 1 << 14);
		}
		if (why != ORC_COMMAND)
			return why;
	}
}
