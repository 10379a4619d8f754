/* Who answers where on a bus.
 *
 * A table of claims is never changed. The owner publishes another one in its place, and runners, who take no lock, see the
 * one or the other as a whole. A runner names the table that it reads in its `reading` (a hazard pointer: M. Michael, "Hazard
 * Pointers: Safe Memory Reclamation for Lock-Free Objects", 2004), and keeps it there while a device of the table answers. An
 * old table is freed once nobody names it, so there are never more old ones than readers. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

struct orc_table {
	struct orc_table *older; /* owner: the next one that is waiting to be freed */
	size_t n;
	struct orc_claim claim[];
};

struct orc_bus {
	_Atomic(const struct orc_table *) table;
	pthread_mutex_t lock; /* what follows; nothing is locked within */
	struct orc_table *old;
	struct orc_reader *readers;
};

static const struct orc_table nobody; /* of a vCPU that is on no bus */

/* ---- the owner's side ----------------------------------------------------------------------------------------- */

static struct orc_table *table_new(const struct orc_claim *claims, size_t n)
{
	struct orc_table *t = calloc(1, sizeof *t + n * sizeof *claims);

	if (!t)
		return NULL;
	t->n = n;
	if (n)
		memcpy(t->claim, claims, n * sizeof *claims);
	return t;
}

orc_bus *orc_bus_new(void)
{
	orc_bus *b = calloc(1, sizeof *b);

	if (!b)
		return NULL;
	atomic_init(&b->table, table_new(NULL, 0));
	if (!atomic_load(&b->table)) {
		free(b);
		return NULL;
	}
	pthread_mutex_init(&b->lock, NULL);
	return b;
}

static bool is_read(const orc_bus *b, const struct orc_table *t)
{
	for (struct orc_reader *r = b->readers; r; r = r->next)
		if (atomic_load_explicit(&r->reading, memory_order_seq_cst) == t)
			return true;
	return false;
}

/* Frees the old tables that nobody reads. */
static void reclaim(orc_bus *b)
{
	struct orc_table **link = &b->old, *t;

	while ((t = *link)) {
		if (is_read(b, t)) {
			link = &t->older;
			continue;
		}
		*link = t->older;
		free(t);
	}
}

void orc_bus_free(orc_bus *b)
{
	if (!b)
		return;
	reclaim(b);
	free((void *)atomic_load(&b->table));
	pthread_mutex_destroy(&b->lock);
	free(b);
}

static bool in_order(const struct orc_claim *claims, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (claims[i].last < claims[i].start || !claims[i].version || (i && claims[i].start <= claims[i - 1].last))
			return false;
	return true;
}

static bool has_version(const struct orc_claim *claims, size_t n, orc_u64 version)
{
	for (size_t i = 0; i < n; i++)
		if (claims[i].version == version)
			return true;
	return false;
}

/* It names a device that is not among these claims. */
static bool has_other_device(const struct orc_table *t, const struct orc_claim *claims, size_t n)
{
	for (size_t i = 0; i < t->n; i++)
		if (t->claim[i].device && !has_version(claims, n, t->claim[i].version))
			return true;
	return false;
}

int orc_bus_replace(orc_bus *b, const struct orc_claim *claims, size_t n)
{
	struct orc_table *old, *t;

	if (!in_order(claims, n))
		return -EINVAL;
	t = table_new(claims, n);
	if (!t)
		return -ENOMEM;
	pthread_mutex_lock(&b->lock);
	/* seq_cst, here and in orc_table_hold(): a runner that is not seen to read the old table sees the new one. */
	old = (struct orc_table *)atomic_exchange_explicit(&b->table, t, memory_order_seq_cst);
	old->older = b->old;
	b->old = old;
	/* A device of ours is called with its table held, for microseconds. (A handler in Python is not: its claim has a lock.)
	 * That may be a table of several changes ago, all of which had the device. */
	for (const struct orc_table *before = old; before; before = before->older)
		while (has_other_device(before, claims, n) && is_read(b, before))
			sched_yield();
	reclaim(b);
	pthread_mutex_unlock(&b->lock);
	return 0;
}

const struct orc_claim *orc_table_find(const struct orc_table *t, orc_u64 address, orc_u64 *last)
{
	size_t low = 0, high = t->n;

	while (low < high) { /* the first claim that ends at the address or behind it */
		size_t middle = low + (high - low) / 2;

		if (t->claim[middle].last < address)
			low = middle + 1;
		else
			high = middle;
	}
	if (low < t->n && t->claim[low].start <= address) {
		*last = t->claim[low].last;
		return &t->claim[low];
	}
	*last = low < t->n ? t->claim[low].start - 1 : UINT64_MAX;
	return NULL;
}

orc_u64 orc_bus_find(orc_bus *b, orc_u64 address)
{
	const struct orc_claim *claim;
	orc_u64 version, last;

	pthread_mutex_lock(&b->lock); /* a table is freed with it held only */
	claim = orc_table_find(atomic_load_explicit(&b->table, memory_order_acquire), address, &last);
	version = claim ? claim->version : 0;
	pthread_mutex_unlock(&b->lock);
	return version;
}

size_t orc_bus_tables(orc_bus *b)
{
	size_t n = 1;

	pthread_mutex_lock(&b->lock);
	for (const struct orc_table *t = b->old; t; t = t->older)
		n++;
	pthread_mutex_unlock(&b->lock);
	return n;
}

/* ---- readers -------------------------------------------------------------------------------------------------- */

static void join_bus(struct orc_reader *r, orc_bus *b)
{
	r->bus = b;
	pthread_mutex_lock(&b->lock);
	r->next = b->readers;
	b->readers = r;
	pthread_mutex_unlock(&b->lock);
}

static void leave_bus(struct orc_reader *r)
{
	struct orc_reader **link;

	if (!r->bus)
		return;
	pthread_mutex_lock(&r->bus->lock);
	for (link = &r->bus->readers; *link != r; link = &(*link)->next)
		;
	*link = r->next;
	reclaim(r->bus);
	pthread_mutex_unlock(&r->bus->lock);
	r->bus = NULL;
}

void orc_vcpu_set_buses(orc_vcpu *v, orc_bus *ports, orc_bus *mmio)
{
	join_bus(&v->on_ports, ports);
	join_bus(&v->on_mmio, mmio);
}

void orc_leave_buses(orc_vcpu *v)
{
	leave_bus(&v->on_ports);
	leave_bus(&v->on_mmio);
}

const struct orc_table *orc_table_hold(struct orc_reader *r)
{
	const struct orc_table *t;

	if (!r->bus)
		return &nobody;
	do {
		t = atomic_load_explicit(&r->bus->table, memory_order_acquire);
		atomic_store_explicit(&r->reading, t, memory_order_seq_cst);
		/* Replaced meanwhile: it may be freed already. If it still is the one there, whoever replaces it later sees
		 * that we read it. */
	} while (atomic_load_explicit(&r->bus->table, memory_order_seq_cst) != t);
	return t;
}

void orc_table_let_go(struct orc_reader *r)
{
	atomic_store_explicit(&r->reading, NULL, memory_order_release); /* all that was read of it was read before */
}
