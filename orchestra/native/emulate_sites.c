/* Which instructions are hooked. Each block that unicorn translates is searched for those that concern us; if it has new
 * ones they are hooked, and the block is thrown away and translated once more, now with calls to orc_on_instruction().
 *
 * Nobody ever unhooks one site: a hook where other code came to stand decodes that, and lets it pass. Unicorn walks through
 * all hooks at each, so when there are too many, all are forgotten, and those still needed found again. */
#include <stdlib.h>
#include <string.h>

#include "emulate.h"

enum { SITES = 2048, FIRST_ROOM = 64 };

/* ---- the table ------------------------------------------------------------------------------------------------ */

static uint64_t *slot(uint64_t *table, uint32_t room, uint64_t address)
{
	uint32_t i = (uint32_t)((address * 0x9e3779b97f4a7c15ull) >> 32);

	while (table[i & (room - 1)] && table[i & (room - 1)] != address + 1)
		i++;
	return &table[i & (room - 1)];
}

static bool grow(struct orc_sites *s)
{
	uint32_t room = s->room ? s->room * 2 : FIRST_ROOM;
	uint64_t *table = calloc(room, sizeof *table);
	size_t *hook = realloc(s->hook, room / 2 * sizeof *hook);

	if (hook)
		s->hook = hook;
	if (!table || !hook) {
		free(table);
		return false;
	}
	for (uint32_t i = 0; i < s->room; i++)
		if (s->address[i])
			*slot(table, room, s->address[i] - 1) = s->address[i];
	free(s->address);
	s->address = table;
	s->room = room;
	return true;
}

/* Has orc_on_instruction called at an address. True if it is new: what is translated there has no call yet. */
static bool hook(struct orc_emulator *e, uint64_t address)
{
	struct orc_sites *s = &e->sites;
	uint64_t *at;

	if (s->count * 2 >= s->room && !grow(s)) {
		e->failed = "no memory";
		return false;
	}
	at = slot(s->address, s->room, address);
	if (*at)
		return false;
	if (e->u->uc_hook_add(e->uc, &s->hook[s->count], e->u->n.UC_HOOK_CODE, (void *)orc_on_instruction, e, address,
			      address)) {
		e->failed = "no memory";
		return false;
	}
	*at = address + 1;
	s->count++;
	return true;
}

void orc_sites_free(struct orc_emulator *e)
{
	free(e->sites.address);
	free(e->sites.hook);
}

/* ---- finding them --------------------------------------------------------------------------------------------- */

/* Hooks what may begin at code[i], or up to 14 prefixes before it. True if something is new: up to *end then. */
static bool hook_around(struct orc_emulator *e, const uint8_t *code, size_t n, size_t i, uint64_t begin, uint64_t *end)
{
	int bits = orc_state_bits(e);
	bool found = false;
	struct orc_insn insn;

	for (size_t start = i;; start--) {
		if (orc_decode(code + start, n - start, bits, &insn)) {
			found |= hook(e, begin + start);
			if (insn.kind == ORC_INSN_LOCK && e->trap_like) {
				uint64_t next = begin + start + insn.length;

				found |= hook(e, next); /* where it is counted; maybe in another block */
				*end = next < *end ? *end : next + 1;
			}
		}
		if (!start || i - start >= ORC_INSN_MAX - 1 || !orc_is_prefix(code[start - 1], bits))
			return found;
	}
}

/* Instructions need not be told apart: unicorn calls a hook only where one begins, so one too many in the middle of another
 * does no harm. */
void orc_on_translated(uc_engine *uc, uc_tb *block, uc_tb *before, void *data)
{
	struct orc_emulator *e = data;
	uint8_t code[PAGE + ORC_INSN_MAX];
	uint64_t begin = block->pc, end = begin + block->size;
	uint32_t size = block->size < sizeof code ? block->size : sizeof code;
	size_t n = orc_memory_fetch(e, begin, code, size);
	bool found = false;

	(void)uc, (void)before;
	orc_emulator_look(e);
	for (size_t i = 0; i < n; i++)
		if (orc_may_matter(code + i, n - i))
			found |= hook_around(e, code, n, i, begin, &end);
	for (unsigned i = 0; i < e->debug.breakpoints; i++)
		if (e->debug.breakpoint[i] - begin < size)
			found |= hook(e, e->debug.breakpoint[i]);
	if (!found)
		return;
	e->sites.stale = begin;
	e->sites.stale_end = end;
	atomic_fetch_or_explicit(&e->attention, ATTENTION_STALE, memory_order_relaxed);
}

/* ---- translations --------------------------------------------------------------------------------------------- */

void orc_sites_retranslate(struct orc_emulator *e)
{
	e->u->uc_ctl(e->uc, orc_unicorn_control(e->u, e->u->n.UC_CTL_TB_FLUSH, 0));
}

void orc_sites_forget(struct orc_emulator *e)
{
	struct orc_sites *s = &e->sites;

	for (uint32_t i = 0; i < s->count; i++)
		e->u->uc_hook_del(e->uc, s->hook[i]);
	if (s->room)
		memset(s->address, 0, s->room * sizeof *s->address);
	s->count = 0;
	orc_sites_retranslate(e);
}

static void retranslate_stale(struct orc_emulator *e)
{
	uint64_t fault = orc_register(e, e->u->n.UC_X86_REG_CR2);

	/* Page by page, as unicorn takes what is behind the first for what is behind it in its own order. */
	for (uint64_t at = e->sites.stale, next; at < e->sites.stale_end; at = next) {
		next = (at | (PAGE - 1)) + 1;
		if (next > e->sites.stale_end)
			next = e->sites.stale_end;
		e->u->uc_ctl(e->uc, orc_unicorn_control(e->u, e->u->n.UC_CTL_TB_REMOVE_CACHE, 2), at, next);
	}
	orc_set_register(e, e->u->n.UC_X86_REG_CR2, fault); /* a page may not be there */
}

void orc_sites_attend(struct orc_emulator *e)
{
	uint32_t attention = atomic_exchange(&e->attention, 0);

	if (e->sites.count > SITES)
		orc_sites_forget(e);
	else if (attention & ATTENTION_WRITTEN)
		orc_sites_retranslate(e);
	else if (attention & ATTENTION_STALE)
		retranslate_stale(e);
}
