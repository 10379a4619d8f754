/* An engine: a CPU of unicorn's with a guest's memory, from its making to its end, and its registers as KVM shows them. */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

/* ---- state ---------------------------------------------------------------------------------------------------- */

void orc_emulator_look(struct orc_emulator *e)
{
	e->u->uc_context_save(e->uc, e->context);
}

void orc_emulator_patch(struct orc_emulator *e, size_t at, const void *bytes, size_t size)
{
	e->u->uc_context_save(e->uc, e->rollback);
	memcpy((char *)e->rollback + at, bytes, size);
	e->u->uc_context_restore(e->uc, e->rollback);
}

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

uint64_t orc_msr(const struct orc_emulator *e, uint32_t number)
{
	uc_x86_msr msr = {.rid = number};

	e->u->uc_reg_read(e->uc, e->u->n.UC_X86_REG_MSR, &msr);
	return msr.value;
}

/* ---- making one ----------------------------------------------------------------------------------------------- */

static int set_up(struct orc_emulator *e, const struct orc_entry *entry)
{
	const struct orc_unicorn *u = e->u;
	const struct kvm_regs *r = &entry->registers;
	const struct kvm_sregs *s = entry->special;
	/* in the order of unicorn's numbers */
	const uint64_t general[] = {r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
				    r->r8,  r->r9,  r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};
	uc_x86_mmr gdt = {.base = s->gdt.base, .limit = s->gdt.limit}, idt = {.base = s->idt.base, .limit = s->idt.limit};
	/* After reset: Intel SDM vol. 3, table 9-1. */
	uc_x86_mmr task = {.limit = 0xffff, .flags = 0x8b00}, local = {.limit = 0xffff, .flags = 0x8200};
	int rc;

	if ((rc = u->uc_context_restore(e->uc, u->fresh[entry->bits == 16 ? 0 : entry->bits == 32 ? 1 : 2])))
		return rc;
	for (int i = 0; i < 16; i++)
		orc_set_register(e, orc_unicorn_general(u)[i], general[i]);
	if (entry->bits != 16) {
		orc_set_register(e, u->n.UC_X86_REG_CR4, s->cr4);
		orc_set_register(e, u->n.UC_X86_REG_CR3, s->cr3);
	}
	orc_set_register(e, u->n.UC_X86_REG_CR0, s->cr0);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_GDTR, &gdt);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_TR, &task);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_LDTR, &local);
	u->uc_reg_write(e->uc, u->n.UC_X86_REG_IDTR, &idt);
	orc_set_register(e, u->n.UC_X86_REG_CR2, s->cr2);
	orc_set_register(e, u->n.UC_X86_REG_RIP, r->rip);
	orc_set_register(e, u->n.UC_X86_REG_EFLAGS, r->rflags);
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

	address = address < m->size && address <= UINT32_MAX ? address & ~(uint64_t)(PAGE - 1) : m->start;
	if (!orc_memory_let_execute(e, address))
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
	e->exception = -1;
	e->met.rip = e->met.counted = e->met.reported = e->lock.armed = NOWHERE;
	rc = orc_unicorn_open(u, u->n.UC_MODE_64, &e->uc);
	if (!rc) {
		/* "until" is an address like any other, and a guest may run there: we have none */
		u->uc_ctl(e->uc, orc_unicorn_control(u, u->n.UC_CTL_UC_USE_EXITS, 1), 1);
		rc = u->uc_context_alloc(e->uc, &e->context);
	}
	if (!rc)
		rc = u->uc_context_alloc(e->uc, &e->rollback);
	if (!rc)
		rc = orc_memory_map(e, regions, n);
	if (!rc)
		rc = run_in(e, entry->registers.rip);
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
	orc_attempt_free(e);
	orc_sites_free(e);
	orc_memory_free(e);
	free(e);
}

/* ---- registers, as KVM shows them ---------------------------------------------------------------------------- */

void orc_emulator_registers(orc_emulator *e, struct kvm_regs *r)
{
	const uint64_t *state;

	orc_emulator_look(e);
	state = orc_state_registers(e); /* the hardware's order; kvm_regs has another */
	*r = (struct kvm_regs){
		.rax = state[0], .rcx = state[1], .rdx = state[2], .rbx = state[3], .rsp = state[4], .rbp = state[5],
		.rsi = state[6], .rdi = state[7], .r8 = state[8], .r9 = state[9], .r10 = state[10], .r11 = state[11],
		.r12 = state[12], .r13 = state[13], .r14 = state[14], .r15 = state[15],
		.rip = orc_rip(e), .rflags = orc_flags(e),
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
	s->efer = orc_msr(e, MSR_EFER);
	s->cr0 = orc_register(e, n->UC_X86_REG_CR0);
	s->cr2 = orc_register(e, n->UC_X86_REG_CR2);
	s->cr3 = orc_register(e, n->UC_X86_REG_CR3);
	s->cr4 = orc_register(e, n->UC_X86_REG_CR4);
	s->cr8 = orc_register(e, n->UC_X86_REG_CR8);
}
