/* Guest memory of the emulated backend: what is where, and where code was.
 *
 * A page becomes executable at its first fetch, which tells where code is: a write to a page that is executable costs three
 * times as much, and whoever writes code behind unicorn's back has to have its translations thrown away (ATTENTION_WRITTEN).
 *
 * uc_vmem_translate of what is not mapped leaves a page fault pending (x86_cpu_tlb_fill, probe). */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

enum {
	FIRST_CODE_PAGES = 64,
	CODE_CHUNK = 1 << 18,
};

int orc_memory_map(struct orc_emulator *e, const struct kvm_userspace_memory_region *regions, size_t n)
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
		m->executed = calloc(m->size / PAGE / 8 + 1, 1);
		if (!m->executed)
			return -1;
		rc = e->u->uc_mem_map_ptr(e->uc, m->start, m->size,
					  (uint32_t)(number->UC_PROT_READ | (m->readonly ? 0 : number->UC_PROT_WRITE)), m->host);
		if (rc)
			return rc;
	}
	return 0;
}

void orc_memory_free(struct orc_emulator *e)
{
	for (size_t i = 0; i < e->memories; i++)
		free(e->memory[i].executed);
	free(e->memory);
}

/* ---- what is where -------------------------------------------------------------------------------------------- */

bool orc_memory_translate(const struct orc_emulator *e, uint64_t linear, bool write, uint64_t *physical)
{
	uint32_t access = (uint32_t)(write ? e->u->n.UC_PROT_WRITE : e->u->n.UC_PROT_READ);

	return !e->u->uc_vmem_translate(e->uc, linear, access, physical);
}

/* What there is at a linear address, up to the end of its page. */
struct piece {
	struct orc_memory *m;
	uint64_t physical;
	uint8_t *host;
	size_t size;
};

static bool find(const struct orc_emulator *e, uint64_t linear, size_t most, bool write, struct piece *p)
{
	size_t on_page = PAGE - (linear & (PAGE - 1));

	if (!orc_memory_translate(e, linear, write, &p->physical) || !(p->m = orc_memory_at(e, p->physical)))
		return false;
	p->host = p->m->host + (p->physical - p->m->start);
	p->size = most < on_page ? most : on_page;
	return !write || !p->m->readonly;
}

size_t orc_memory_fetch(const struct orc_emulator *e, uint64_t linear, void *bytes, size_t most)
{
	struct piece p;
	size_t done = 0;

	for (; done < most && find(e, linear + done, most - done, false, &p); done += p.size)
		memcpy((uint8_t *)bytes + done, p.host, p.size);
	return done;
}

bool orc_memory_read(const struct orc_emulator *e, uint64_t linear, void *bytes, size_t size)
{
	return orc_memory_fetch(e, linear, bytes, size) == size;
}

bool orc_memory_write(struct orc_emulator *e, uint64_t linear, const void *bytes, size_t size)
{
	struct piece p;

	for (size_t done = 0; done < size; done += p.size)
		if (!find(e, linear + done, size - done, true, &p))
			return false;
	for (size_t done = 0; done < size && find(e, linear + done, size - done, true, &p); done += p.size) {
		memcpy(p.host, (const uint8_t *)bytes + done, p.size);
		if (orc_memory_was_executed(p.m, p.physical))
			atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
	}
	return true;
}

/* ---- where code was ------------------------------------------------------------------------------------------- */

static uint8_t page_bit(const struct orc_memory *m, uint64_t physical, _Atomic uint8_t **at)
{
	uint64_t page = (physical - m->start) / PAGE;

	*at = &m->executed[page >> 3];
	return (uint8_t)(1u << (page & 7));
}

bool orc_memory_was_executed(const struct orc_memory *m, uint64_t physical)
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

bool orc_memory_let_execute(struct orc_emulator *e, uint64_t physical)
{
	struct orc_memory *m = orc_memory_at(e, physical);
	uint64_t begin, size = PAGE, pages = 0;

	if (!m)
		return false;
	/* Each change of protection splits a region of unicorn's, so a guest with much code gets more at a time. */
	for (uint64_t i = 0; i <= m->size / PAGE / 8 && pages <= FIRST_CODE_PAGES; i++)
		pages += (uint64_t)__builtin_popcount(m->executed[i]);
	if (pages > FIRST_CODE_PAGES)
		size = CODE_CHUNK;
	begin = m->start + ((physical - m->start) & ~(size - 1));
	if (size > m->start + m->size - begin)
		size = m->start + m->size - begin;
	for (uint64_t page = begin; page < begin + size; page += PAGE)
		mark_executed(m, page);
	/* What splits gets other numbers, by which unicorn finds translations again; where addresses are not physical ones it
	 * does not throw the old away (memory_unmap). */
	if (pages && orc_register(e, e->u->n.UC_X86_REG_CR0) & CR0_PG)
		orc_sites_retranslate(e);
	return !e->u->uc_mem_protect(e->uc, begin, size,
				     (uint32_t)(e->u->n.UC_PROT_READ | e->u->n.UC_PROT_EXEC |
						(m->readonly ? 0 : e->u->n.UC_PROT_WRITE)));
}

int orc_memory_unprotect(struct orc_emulator *e, struct orc_memory *m, uint64_t page, void *before)
{
	const struct orc_unicorn_numbers *n = &e->u->n;

	memcpy(before, m->host + (page - m->start), PAGE);
	return e->u->uc_mem_protect(e->uc, page, PAGE, (uint32_t)(n->UC_PROT_READ | n->UC_PROT_WRITE | n->UC_PROT_EXEC));
}

void orc_memory_protect(struct orc_emulator *e, struct orc_memory *m, uint64_t page, const void *before)
{
	memcpy(m->host + (page - m->start), before, PAGE);
	e->u->uc_mem_protect(e->uc, page, PAGE, (uint32_t)(e->u->n.UC_PROT_READ | e->u->n.UC_PROT_EXEC));
	mark_executed(m, page);
	atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
}

void orc_emulator_written(orc_emulator *e, uint64_t address, uint64_t size)
{
	/* The write comes before the look at the bits, as a bit comes before the fetch of what is translated: one of the two
	 * threads sees the other. */
	atomic_thread_fence(memory_order_seq_cst);
	for (uint64_t page = address & ~(uint64_t)(PAGE - 1); page < address + size; page += PAGE) {
		struct orc_memory *m = orc_memory_at(e, page);

		if (m && orc_memory_was_executed(m, page)) {
			atomic_fetch_or(&e->attention, ATTENTION_WRITTEN);
			return;
		}
	}
}
