/* Unicorn, loaded at run time, and engines of it that begin as a CPU does. Traps in it, and their cures:
 *
 * - An engine opened in 16-bit mode can't be resumed once its guest has left real mode. All are opened in 64-bit mode, and
 *   take over the saved state of a CPU that is in the mode wanted.
 * - Registers' hidden parts (a segment's base, whether code is 16, 32 or 64-bit) have no names in unicorn's interface, but
 *   a saved context holds them. Where, is found out by writing known values and looking for them.
 */
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

enum {
	/* Just too small for a huge page, which unicorn asks for and the kernel would clear at each launch. A guest with more
	 * code has it translated once more now and then; unicorn's default is 1 GiB. */
	TRANSLATIONS = (2 << 20) - 4096,
	SCRATCH = 1 << 16,
	ENTER = 0x1000,
	FCW_RESET = 0x37f, /* as KVM leaves the FPU after reset, so that SSE and x87 exceptions are masked */
	MXCSR_RESET = 0x1f80,
	MSR_EFER = 0xc0000080u,
};
#define MARK 0x5e1f0badcafe0000ull

unsigned orc_unicorn_control(const struct orc_unicorn *u, int type, int arguments)
{
	/* uc_ctl's macro of that name: direction, number of arguments, type (unicorn.h, UC_CTL) */
	return (unsigned)type | (unsigned)arguments << 26 | (unsigned)u->n.UC_CTL_IO_WRITE << 30;
}

static bool find(const void *context, size_t size, uint64_t value, size_t *at)
{
	for (size_t i = 0; i + sizeof value <= size; i += 4)
		if (!memcmp((const char *)context + i, &value, sizeof value)) {
			*at = i;
			return true;
		}
	return false;
}

static void register_numbers(const struct orc_unicorn *u, int number[16])
{
	const int *first = &u->n.UC_X86_REG_RAX; /* the hardware's order, as in orc_unicorn_numbers */

	memcpy(number, first, 16 * sizeof *number);
}

/* Where a saved context has the general registers and the segments. */
static bool find_state(struct orc_unicorn *u, uc_engine *uc, void *context)
{
	int number[16];
	size_t at, fs, gs, debug;
	uint64_t value;

	register_numbers(u, number);
	for (unsigned i = 0; i < 16; i++) {
		value = MARK + i;
		if (u->uc_reg_write(uc, number[i], &value))
			return false;
	}
	value = MARK + 16;
	u->uc_reg_write(uc, u->n.UC_X86_REG_FS_BASE, &value);
	value = MARK + 17;
	u->uc_reg_write(uc, u->n.UC_X86_REG_GS_BASE, &value);
	value = MARK + 18;
	u->uc_reg_write(uc, u->n.UC_X86_REG_DR0, &value);
	if (u->uc_context_save(uc, context))
		return false;
	for (unsigned i = 0; i < 16; i++)
		if (!find(context, u->context_size, MARK + i, &at) || (i && at != u->at_registers + 8 * i))
			return false;
		else if (!i)
			u->at_registers = at;
	if (!find(context, u->context_size, MARK + 16, &fs) || !find(context, u->context_size, MARK + 17, &gs) ||
	    gs - fs != sizeof(struct orc_segment_cache) || !find(context, u->context_size, MARK + 18, &debug))
		return false;
	u->at_segments = fs - offsetof(struct orc_segment_cache, base) - 4 * sizeof(struct orc_segment_cache);
	/* As target/i386/cpu.h has it, CPUX86State: registers, eip, eflags, cc_dst, cc_src, cc_src2, cc_op, df, hflags, hflags2,
	 * segments. enter_modes() sees whether hflags are. */
	u->at_flags = u->at_registers + 18 * sizeof(uint64_t);
	u->at_hflags = u->at_flags + ORC_FLAGS_SIZE + 2 * sizeof(uint32_t);
	/* And after dr[8] and cpu_breakpoint[4] old_exception. */
	u->at_exception = debug + 12 * sizeof(uint64_t);
	return u->at_segments == u->at_hflags + 2 * sizeof(uint32_t) && u->at_exception + sizeof(int32_t) <= u->context_size &&
	       *(const int32_t *)((const char *)context + u->at_exception) == -1;
}

/* Runs the program that enters the modes, and keeps the state of each. */
static const char *enter_modes(struct orc_unicorn *u, uc_engine *uc, uint8_t *scratch)
{
	static const uint32_t expected[] = {0, HFLAG_CODE_32, HFLAG_CODE_32 | HFLAG_CODE_64};
	const int all = u->n.UC_PROT_READ | u->n.UC_PROT_WRITE | u->n.UC_PROT_EXEC;
	uint64_t rip = ENTER;
	uint32_t hflags;

	if (u->uc_context_restore(uc, u->fresh[0]) || u->uc_mem_map_ptr(uc, 0, SCRATCH, (uint32_t)all, scratch))
		return "a fresh CPU can't be set up";
	for (int mode = 0; mode < 3; mode++) {
		if (mode) {
			if (u->uc_emu_start(uc, rip, 0, 0, 0) || u->uc_context_alloc(uc, &u->fresh[mode]) ||
			    u->uc_context_save(uc, u->fresh[mode]))
				return "it does not get into protected and long mode";
			u->uc_reg_read(uc, u->n.UC_X86_REG_RIP, &rip);
		}
		hflags = *(const uint32_t *)((const char *)u->fresh[mode] + u->at_hflags);
		if ((hflags & (HFLAG_CODE_32 | HFLAG_CODE_64 | HFLAG_CPL)) != expected[mode])
			return "its CPU state is not laid out as in the versions that orchestra knows";
	}
	return NULL;
}

static const char *prepare(struct orc_unicorn *u, const uint8_t *enter, size_t enter_size)
{
	uc_engine *real = NULL, *uc = NULL;
	uint8_t *scratch = enter_size < SCRATCH - ENTER ? aligned_alloc(4096, SCRATCH) : NULL;
	void *context = NULL;
	const char *problem = "no memory for its engines";
	uint32_t word;

	if (!scratch || u->uc_open(u->n.UC_ARCH_X86, u->n.UC_MODE_16, &real) ||
	    u->uc_open(u->n.UC_ARCH_X86, u->n.UC_MODE_64, &uc))
		goto out;
	memset(scratch, 0, SCRATCH);
	memcpy(scratch + ENTER, enter, enter_size);
	u->uc_ctl(real, orc_unicorn_control(u, u->n.UC_CTL_TCG_BUFFER_SIZE, 1), TRANSLATIONS);
	u->uc_ctl(uc, orc_unicorn_control(u, u->n.UC_CTL_TCG_BUFFER_SIZE, 1), TRANSLATIONS);
	u->uc_ctl(uc, orc_unicorn_control(u, u->n.UC_CTL_UC_USE_EXITS, 1), 1);
	u->context_size = u->uc_context_size(uc);
	if (u->uc_context_alloc(real, &u->fresh[0]) || u->uc_context_alloc(uc, &context))
		goto out;
	word = FCW_RESET;
	u->uc_reg_write(real, u->n.UC_X86_REG_FPCW, &word);
	word = MXCSR_RESET;
	u->uc_reg_write(real, u->n.UC_X86_REG_MXCSR, &word);
	if (u->uc_context_save(real, u->fresh[0]))
		goto out;
	problem = find_state(u, uc, context) ? enter_modes(u, uc, scratch) : "its CPU state was not found where it saves it";
out:
	if (context)
		u->uc_context_free(context);
	if (real)
		u->uc_close(real);
	if (uc)
		u->uc_close(uc);
	free(scratch);
	return problem;
}

orc_unicorn *orc_unicorn_load(const char *path, const struct orc_unicorn_numbers *numbers, const uint8_t *enter,
			      size_t enter_size, char *problem, size_t room)
{
	struct orc_unicorn *u = calloc(1, sizeof *u);
	const char *failed = NULL;

	if (!u) {
		snprintf(problem, room, "no memory");
		return NULL;
	}
	u->n = *numbers;
	u->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!u->library) {
		snprintf(problem, room, "%s", dlerror());
		goto failed;
	}
#define F(result, name, arguments)                                                   \
	if (!failed && !(*(void **)&u->name = dlsym(u->library, #name)))             \
		failed = #name;
	ORC_UNICORN_FUNCTIONS(F)
#undef F
	if (failed) {
		snprintf(problem, room, "it has no %s", failed);
		goto failed;
	}
	failed = prepare(u, enter, enter_size);
	if (failed) {
		snprintf(problem, room, "%s", failed);
		goto failed;
	}
	return u;
failed:
	orc_unicorn_free(u);
	return NULL;
}

void orc_unicorn_free(orc_unicorn *u)
{
	if (!u)
		return;
	for (int i = 0; i < 3; i++)
		if (u->fresh[i])
			u->uc_context_free(u->fresh[i]);
	if (u->library)
		dlclose(u->library);
	free(u);
#ifdef __GLIBC__
	/* An engine's half a MiB of hash tables is in the heap from the second one on, among what lives longer: without this
	 * the process would keep a GiB after 1000 of them. */
	malloc_trim(0);
#endif
}

/* ---- one CPU -------------------------------------------------------------------------------------------------- */

uint64_t orc_register(const struct orc_emulator *e, int number)
{
	uint64_t value = 0; /* unicorn writes as many bytes as the register has */

	e->u->uc_reg_read(e->uc, number, &value);
	return value;
}

void orc_set_register(const struct orc_emulator *e, int number, uint64_t value)
{
	e->u->uc_reg_write(e->uc, number, &value);
}

void orc_emulator_look(struct orc_emulator *e)
{
	e->u->uc_context_save(e->uc, e->context);
}

static int set_up(struct orc_emulator *e, const struct orc_entry *entry)
{
	const struct orc_unicorn *u = e->u;
	/* After reset: Intel SDM vol. 3, table 9-1. */
	uc_x86_mmr gdt = {.base = entry->gdt_base, .limit = entry->mode == 16 ? 0xffff : entry->gdt_limit};
	uc_x86_mmr idt = {.limit = 0xffff}, task = {.limit = 0xffff, .flags = 0x8b00}, local = {.limit = 0xffff, .flags = 0x8200};
	int rc, number[16];

	if ((rc = u->uc_context_restore(e->uc, u->fresh[entry->mode == 16 ? 0 : entry->mode == 32 ? 1 : 2])))
		return rc;
	register_numbers(u, number);
	for (int i = 0; i < 16; i++)
		orc_set_register(e, number[i], 0);
	if (entry->mode != 16) {
		orc_set_register(e, u->n.UC_X86_REG_CR4, entry->cr4);
		orc_set_register(e, u->n.UC_X86_REG_CR3, entry->cr3);
		orc_set_register(e, u->n.UC_X86_REG_CR0, entry->cr0);
	} else {
		orc_set_register(e, u->n.UC_X86_REG_CR0, 0x60000010);
	}
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_GDTR, &gdt);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_TR, &task);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_LDTR, &local);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_IDTR, &idt);
	orc_set_register(e, u->n.UC_X86_REG_CR2, 0);
	orc_set_register(e, u->n.UC_X86_REG_RIP, entry->rip);
	orc_set_register(e, u->n.UC_X86_REG_RSP, entry->rsp);
	orc_set_register(e, u->n.UC_X86_REG_RDI, entry->rdi);
	orc_set_register(e, u->n.UC_X86_REG_EFLAGS, 2);
	return 0;
}

static int map(struct orc_emulator *e, const struct kvm_userspace_memory_region *regions, size_t n)
{
	const struct orc_unicorn_numbers *number = &e->u->n;
	int rc;

	e->memory = calloc(n ? n : 1, sizeof *e->memory);
	if (!e->memory)
		return -1;
	for (size_t i = 0; i < n; i++) {
		struct orc_memory *m = &e->memory[e->memories++];

		m->start = regions[i].guest_phys_addr;
		m->size = regions[i].memory_size;
		m->host = (uint8_t *)(uintptr_t)regions[i].userspace_addr;
		m->readonly = regions[i].flags & KVM_MEM_READONLY;
		m->executed = calloc(m->size / 4096 / 8 + 1, 1);
		if (!m->executed)
			return -1;
		/* Not executable until code is fetched: a write to a page that is costs three times as much. */
		rc = e->u->uc_mem_map_ptr(e->uc, m->start, m->size,
					  (uint32_t)(number->UC_PROT_READ | (m->readonly ? 0 : number->UC_PROT_WRITE)), m->host);
		if (rc)
			return rc;
	}
	return 0;
}

/* Unicorn tells of what it translates only once a block has run to its end, and those that we stop do not. So one has to
 * that is not the guest's: it stands for a moment in the guest's first page, whose code is wanted anyway. */
static int run_in(struct orc_emulator *e, uint64_t address)
{
	static const uint8_t code[] = {0xeb, 0x00, 0xf4}; /* jmp to the next; hlt */
	const struct orc_unicorn *u = e->u;
	uint8_t before[sizeof code];
	const struct orc_memory *m = &e->memory[0]; /* RAM, from address 0 */
	uint8_t *host;
	int rc;

	address = address < m->size && address <= UINT32_MAX ? address & ~(uint64_t)4095 : m->start;
	if (!orc_emulator_let_execute(e, address))
		return -1;
	host = m->host + (address - m->start);
	memcpy(before, host, sizeof before);
	memcpy(host, code, sizeof code);
	rc = u->uc_context_restore(e->uc, u->fresh[0]);
	if (!rc)
		rc = u->uc_emu_start(e->uc, address, 0, 0, 0);
	memcpy(host, before, sizeof before);
	u->uc_ctl(e->uc, orc_unicorn_control(u, u->n.UC_CTL_TB_REMOVE_CACHE, 2), address, address + sizeof code);
	return rc;
}

orc_emulator *orc_emulator_new(const orc_unicorn *u, const struct kvm_userspace_memory_region *regions, size_t n,
			       const struct orc_entry *entry, const char **failed)
{
	struct orc_emulator *e = calloc(1, sizeof *e);
	int rc;

	*failed = "no memory";
	if (!e)
		return NULL;
	e->u = u;
	e->pass = e->pass_debug = e->armed = UINT64_MAX;
	memset(e->breakpoint, 0xff, sizeof e->breakpoint);
	e->exception = -1;
	rc = u->uc_open(u->n.UC_ARCH_X86, u->n.UC_MODE_64, &e->uc);
	if (!rc) {
		u->uc_ctl(e->uc, orc_unicorn_control(u, u->n.UC_CTL_TCG_BUFFER_SIZE, 1), TRANSLATIONS);
		/* "until" is an address like any other, and a guest may run there: we have none */
		u->uc_ctl(e->uc, orc_unicorn_control(u, u->n.UC_CTL_UC_USE_EXITS, 1), 1);
		rc = u->uc_context_alloc(e->uc, &e->context);
	}
	if (!rc)
		rc = u->uc_context_alloc(e->uc, &e->rollback);
	if (!rc)
		rc = map(e, regions, n);
	if (!rc)
		rc = run_in(e, entry->rip);
	if (!rc)
		rc = set_up(e, entry);
	if (!rc)
		rc = orc_emulator_hook(e);
	if (!rc)
		return e;
	if (rc > 0)
		*failed = u->uc_strerror(rc);
	orc_emulator_free(e);
	return NULL;
}

void orc_emulator_free(orc_emulator *e)
{
	if (!e)
		return;
	if (e->context)
		e->u->uc_context_free(e->context);
	if (e->rollback)
		e->u->uc_context_free(e->rollback);
	if (e->uc)
		e->u->uc_close(e->uc);
	for (size_t i = 0; i < e->memories; i++)
		free(e->memory[i].executed);
	for (unsigned i = 0; i < ORC_WINDOWS; i++)
		free(e->window[i].before);
	free(e->memory);
	free(e->sites);
	free(e->hooks);
	free(e);
}

const char *orc_emulator_failed(const orc_emulator *e)
{
	return e->failed ? e->failed : "";
}

/* ---- registers ------------------------------------------------------------------------------------------------ */

void orc_emulator_registers(orc_emulator *e, struct kvm_regs *r)
{
	const uint64_t *state;

	orc_emulator_look(e);
	state = orc_state_registers(e); /* the hardware's order; kvm_regs has another */
	*r = (struct kvm_regs){
		.rax = state[0], .rcx = state[1], .rdx = state[2], .rbx = state[3], .rsp = state[4], .rbp = state[5],
		.rsi = state[6], .rdi = state[7], .r8 = state[8], .r9 = state[9], .r10 = state[10], .r11 = state[11],
		.r12 = state[12], .r13 = state[13], .r14 = state[14], .r15 = state[15],
		.rip = orc_register(e, e->u->n.UC_X86_REG_RIP), .rflags = orc_register(e, e->u->n.UC_X86_REG_EFLAGS),
	};
}

static void take_segment(struct kvm_segment *s, const struct orc_segment_cache *c)
{
	/* The descriptor's second word, as the CPU loaded it: Intel SDM vol. 3, 3.4.5. */
	*s = (struct kvm_segment){
		.base = c->base, .limit = c->limit, .selector = (uint16_t)c->selector, .type = (c->flags >> 8) & 15,
		.s = (c->flags >> 12) & 1, .dpl = (c->flags >> 13) & 3, .present = (c->flags >> 15) & 1,
		.avl = (c->flags >> 20) & 1, .l = (c->flags >> 21) & 1, .db = (c->flags >> 22) & 1, .g = (c->flags >> 23) & 1,
	};
}

static void take_system_segment(const struct orc_emulator *e, int number, struct kvm_segment *s)
{
	uc_x86_mmr value = {0};

	e->u->uc_reg_read(e->uc, number, &value);
	take_segment(s, &(struct orc_segment_cache){.selector = value.selector, .base = value.base, .limit = value.limit,
						    .flags = value.flags});
}

void orc_emulator_special_registers(orc_emulator *e, struct kvm_sregs *s)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	const struct orc_segment_cache *c;
	struct kvm_segment *segment[] = {&s->es, &s->cs, &s->ss, &s->ds, &s->fs, &s->gs};
	uc_x86_mmr table = {0};
	uc_x86_msr efer = {.rid = MSR_EFER};

	memset(s, 0, sizeof *s);
	orc_emulator_look(e);
	c = orc_state_segments(e);
	for (int i = 0; i < 6; i++)
		take_segment(segment[i], &c[i]);
	take_system_segment(e, n->UC_X86_REG_TR, &s->tr);
	take_system_segment(e, n->UC_X86_REG_LDTR, &s->ldt);
	e->u->uc_reg_read(e->uc, n->UC_X86_REG_GDTR, &table);
	s->gdt = (struct kvm_dtable){.base = table.base, .limit = (uint16_t)table.limit};
	e->u->uc_reg_read(e->uc, n->UC_X86_REG_IDTR, &table);
	s->idt = (struct kvm_dtable){.base = table.base, .limit = (uint16_t)table.limit};
	e->u->uc_reg_read(e->uc, n->UC_X86_REG_MSR, &efer);
	s->efer = efer.value;
	s->cr0 = orc_register(e, n->UC_X86_REG_CR0);
	s->cr2 = orc_register(e, n->UC_X86_REG_CR2);
	s->cr3 = orc_register(e, n->UC_X86_REG_CR3);
	s->cr4 = orc_register(e, n->UC_X86_REG_CR4);
	s->cr8 = orc_register(e, n->UC_X86_REG_CR8);
}
