/* One attempt to execute an instruction that accesses memory that nobody backs, or writes to such as may only be read: by
 * itself, with windows mapped where those pages are, which give the answers known and take the writes.
 *
 * Unicorn takes accesses to pieces: it reads an unaligned word as the two aligned ones around it, and a long one in halves,
 * and writes one byte by byte. on_access() sees the access as the instruction makes it (`outer`), so pieces can be told to
 * belong together. One that crosses pages is two, as on KVM. */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

static uint64_t page_of(uint64_t address)
{
	return address & ~(uint64_t)(PAGE - 1);
}

/* ---- what is accessed ----------------------------------------------------------------------------------------- */

/* The part of what is accessed that lies on the page of `address`, where one of unicorn's pieces of it is. */
static struct orc_touch part_of(const struct orc_attempt *a, uint64_t address)
{
	struct orc_touch part = a->outer;
	unsigned first = PAGE - (unsigned)(part.address & (PAGE - 1)); /* bytes up to the end of its page */

	if (page_of(part.address) != page_of(address)) { /* it goes on there */
		part.address = page_of(address);
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
	const struct orc_touch *outer = &e->attempt.outer;

	return !(address & (PAGE - 1)) && (outer->address & (PAGE - 1)) + outer->size > PAGE &&
	       (address == page_of(outer->address + outer->size) || orc_register(e, e->u->n.UC_X86_REG_CR0) & CR0_PG);
}

bool orc_on_touch(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;
	struct orc_attempt *a = &e->attempt;
	const struct orc_unicorn_numbers *n = &e->u->n;
	bool write = type != n->UC_MEM_READ_UNMAPPED;

	(void)uc;
	/* on_access() is not called for a read that begins here, but was for one that goes on here. */
	if (!a->running || (!write && !goes_on(e, address)))
		a->outer = (struct orc_touch){.address = address, .value = (uint64_t)value, .size = (uint8_t)size};
	if (!a->running && write) /* to see whether the guest goes on before it stops */
		e->u->uc_context_save(e->uc, e->rollback);
	a->touch = part_of(a, address);
	a->touch.write = write;
	a->touch.rom = type == n->UC_MEM_WRITE_PROT;
	a->touch_rip = orc_rip(e);
	return false;
}

static struct orc_touch *add_write(struct orc_attempt *a, struct orc_touch part)
{
	if (a->written == ORC_TOUCHES) {
		a->problem = "an instruction writes more of unbacked memory than is supported; the kvm backend can";
		return NULL;
	}
	part.write = true;
	a->writes[a->written] = part;
	return &a->writes[a->written++];
}

/* The instruction accesses memory: what of it is seen as a touch or at a window may be pieces. */
static void on_access(uc_engine *uc, int type, uint64_t address, int size, int64_t value, void *data)
{
	struct orc_emulator *e = data;
	struct orc_attempt *a = &e->attempt;
	const struct orc_memory *m = orc_memory_at(e, address);

	(void)uc;
	a->outer = (struct orc_touch){.address = address, .value = (uint64_t)value, .size = (uint8_t)size};
	a->part = NULL;
	if (type != e->u->n.UC_MEM_WRITE)
		return;
	if (m && m->readonly)
		add_write(a, part_of(a, address));
	else if ((address & (PAGE - 1)) + (unsigned)size > PAGE)
		for (unsigned i = 0; i < a->windows; i++)
			if (a->window[i].rom) /* done in part, and not to be undone */
				a->problem = "a write goes from memory into such as may only be read; the kvm backend can";
}

bool orc_attempt_wrote(const struct orc_emulator *e, uint64_t physical, uint8_t *value)
{
	const struct orc_touch *w = e->attempt.writes;
	bool wrote = false;

	for (unsigned i = 0; i < e->attempt.written; i++)
		if (physical - w[i].address < w[i].size) {
			*value = (uint8_t)(w[i].value >> 8 * (physical - w[i].address));
			wrote = true;
		}
	return wrote;
}

/* ---- windows -------------------------------------------------------------------------------------------------- */

/* Which answer the read that `part` is of has. NULL: none is known. */
static struct orc_touch *find_answer(struct orc_emulator *e, const struct orc_touch *part)
{
	struct orc_attempt *a = &e->attempt;
	struct orc_replay *r = &e->replay;

	if (a->part && a->part->address == part->address)
		return a->part;
	if (r->once) /* LOCK NEG reads what it compares with again */
		for (unsigned i = 0; i < a->used; i++)
			if (r->answers[i].address == part->address)
				return &r->answers[i];
	/* If it accesses something else than the last time, memory has changed. */
	return a->used < r->answered && r->answers[a->used].address == part->address ? &r->answers[a->used++] : NULL;
}

static uint64_t window_read(uc_engine *uc, uint64_t offset, unsigned size, void *data)
{
	struct orc_window *w = data;
	struct orc_attempt *a = &w->e->attempt;
	uint64_t address = w->page + offset, value = 0;
	struct orc_touch part = part_of(a, address), *answer;

	(void)uc;
	if (a->missing)
		return 0;
	answer = find_answer(w->e, &part);
	if (!answer) {
		a->missing = true;
		a->touch = part;
		orc_emulator_stop(w->e);
		return 0;
	}
	a->part = answer;
	for (unsigned byte = 0; byte < size; byte++)
		if (address + byte - part.address < part.size)
			value |= ((answer->value >> 8 * (address + byte - part.address)) & 0xff) << (8 * byte);
	return value;
}

static void window_write(uc_engine *uc, uint64_t offset, unsigned size, uint64_t value, void *data)
{
	struct orc_window *w = data;
	struct orc_attempt *a = &w->e->attempt;
	struct orc_touch part = part_of(a, w->page + offset);

	(void)uc, (void)size, (void)value;
	if (!a->part || a->part->address != part.address)
		a->part = add_write(a, part);
}

bool orc_attempt_open(struct orc_emulator *e, const struct orc_touch *touch)
{
	struct orc_attempt *a = &e->attempt;
	uint64_t page = page_of(touch->address);
	struct orc_window *w;

	for (unsigned i = 0; i < a->windows; i++)
		if (a->window[i].page == page)
			return true;
	if (a->windows == ORC_WINDOWS)
		return false;
	w = &a->window[a->windows];
	w->e = e;
	w->page = page;
	w->rom = touch->rom ? orc_memory_at(e, page) : NULL;
	if (w->rom && !w->before && !(w->before = malloc(PAGE)))
		return false;
	a->windows++;
	return true;
}

static int open_windows(struct orc_emulator *e)
{
	const struct orc_unicorn_numbers *n = &e->u->n;
	struct orc_attempt *a = &e->attempt;
	int rc = e->u->uc_hook_add(e->uc, &a->access_hook, n->UC_HOOK_MEM_READ | n->UC_HOOK_MEM_WRITE, (void *)on_access, e,
				   (uint64_t)1, (uint64_t)0);

	for (a->opened = 0; a->opened < a->windows && !rc; a->opened++) {
		struct orc_window *w = &a->window[a->opened];

		if (w->rom)
			rc = orc_memory_unprotect(e, w->rom, w->page, w->before);
		else
			rc = e->u->uc_mmio_map(e->uc, w->page, PAGE, window_read, w, window_write, w);
	}
	return rc;
}

static void close_windows(struct orc_emulator *e)
{
	struct orc_attempt *a = &e->attempt;

	while (a->opened) {
		struct orc_window *w = &a->window[--a->opened];

		if (w->rom)
			orc_memory_protect(e, w->rom, w->page, w->before);
		else
			e->u->uc_mem_unmap(e->uc, w->page, PAGE);
	}
	e->u->uc_hook_del(e->uc, a->access_hook);
}

/* ---- the attempt ---------------------------------------------------------------------------------------------- */

int orc_attempt(struct orc_emulator *e)
{
	struct orc_attempt *a = &e->attempt;
	int rc;

	e->u->uc_context_save(e->uc, e->rollback);
	a->used = a->written = 0;
	a->part = NULL;
	a->missing = false;
	a->problem = NULL;
	a->touch.size = 0;
	rc = open_windows(e);
	if (rc) {
		a->problem = e->u->uc_strerror(rc);
	} else {
		a->running = true;
		rc = orc_emulator_step(e);
		a->running = false;
	}
	close_windows(e);
	return rc;
}

void orc_attempt_end(struct orc_emulator *e)
{
	e->attempt.windows = e->attempt.written = 0;
}

void orc_attempt_free(struct orc_emulator *e)
{
	for (unsigned i = 0; i < ORC_WINDOWS; i++)
		free(e->attempt.window[i].before);
}
