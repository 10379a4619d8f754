/* Who answers where on a bus, and the accesses that vCPUs wait for: whatever needs no Python is answered here.
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

int orc_bus_replace(orc_bus *b, const struct orc_claim *claims, size_t n)
{
	struct orc_table *old, *t;
	bool device_goes = false;

	if (!in_order(claims, n))
		return -EINVAL;
	t = table_new(claims, n);
	if (!t)
		return -ENOMEM;
	pthread_mutex_lock(&b->lock);
	/* seq_cst, here and in hold(): a runner that is not seen to read the old table sees the new one. */
	old = (struct orc_table *)atomic_exchange_explicit(&b->table, t, memory_order_seq_cst);
	old->older = b->old;
	b->old = old;
	for (size_t i = 0; i < old->n; i++)
		device_goes = device_goes || (old->claim[i].device && !has_version(claims, n, old->claim[i].version));
	/* A device of ours is called with its table held, for microseconds. A handler in Python is not: its claim has a lock. */
	while (device_goes && is_read(b, old))
		sched_yield();
	reclaim(b);
	pthread_mutex_unlock(&b->lock);
	return 0;
}

/* Who claims an address. NULL: nobody. *last: where that ends, the last address of it. */
static const struct orc_claim *find(const struct orc_table *t, orc_u64 address, orc_u64 *last)
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
	claim = find(atomic_load_explicit(&b->table, memory_order_acquire), address, &last);
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

static const struct orc_table *hold(struct orc_reader *r)
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

static void let_go(struct orc_reader *r)
{
	atomic_store_explicit(&r->reading, NULL, memory_order_release); /* all that was read of it was read before */
}

/* ---- an access ------------------------------------------------------------------------------------------------ */

/* `size` bytes of the access are answered, or `count` whole elements. */
static void advance(struct orc_io *io, uint32_t size, uint32_t count)
{
	if (size == io->size) {
		io->done += count;
		return;
	}
	io->byte += size;
	if (io->byte == io->size) {
		io->byte = 0;
		io->done++;
	}
}

static bool is_device_size(uint32_t size)
{
	return size <= 8 && !(size & (size - 1));
}

/* The naturally aligned piece that begins there, as hardware would transfer it. */
static uint32_t aligned_piece(orc_u64 address, uint32_t most)
{
	uint32_t size = 8;

	while (size > most || address & (size - 1))
		size /= 2;
	return size;
}

/* The next piece of the access: answers it, or sets v->access and returns that Python is to. */
static bool go_on(orc_vcpu *v, const struct orc_table *t)
{
	struct orc_io *io = &v->io;
	orc_u64 address = io->address + io->byte, last;
	const struct orc_claim *claim = find(t, address, &last);
	uint8_t *data = io->data + (size_t)io->done * io->size + io->byte;
	uint32_t size = io->size - io->byte, count = 1;

	if (last - address < size - 1) /* as far as this claim, or this gap, goes */
		size = (uint32_t)(last - address) + 1;
	if (claim && (size != io->size || !is_device_size(size)))
		size = aligned_piece(address, size);
	if (size == io->size)
		count = io->count - io->done;
	if (!claim) { /* Nobody drives the bus: it reads as ones. */
		if (!io->write)
			memset(data, 0xff, (size_t)size * count);
		io->nobody = true;
		advance(io, size, count);
		return false;
	}
	v->access = (struct orc_access){.address = address, .offset = address - claim->start, .claim = claim->version,
					.size = size, .count = count, .write = io->write, .data = data};
	if (claim->device && claim->device->answer(claim->device, v, &v->access)) {
		advance(io, size, count);
		return false;
	}
	if (count > ORC_CHUNK)
		v->access.count = ORC_CHUNK;
	return true;
}

bool orc_access_next(orc_vcpu *v)
{
	struct orc_io *io = &v->io;
	struct orc_reader *r = io->why == ORC_IO ? &v->on_ports : &v->on_mmio;
	const struct orc_table *t;
	bool python = false;

	if (!io->open)
		return false;
	if (v->access.count)
		advance(io, v->access.size, v->access.count); /* that was answered since */
	v->access.count = 0;
	t = hold(r);
	while (io->done < io->count && !python)
		python = go_on(v, t);
	let_go(r);
	if (python)
		return true;
	orc_count(&v->unclaimed, io->nobody);
	v->access.count = 0;
	io->open = false;
	return false;
}

void orc_access_abandon(orc_vcpu *v)
{
	struct orc_io *io = &v->io;
	size_t answered = (size_t)io->done * io->size + io->byte;

	if (io->open && !io->write)
		memset(io->data + answered, 0xff, (size_t)io->count * io->size - answered);
	v->access.count = 0;
	io->open = false;
}

enum orc_why orc_access_up(orc_vcpu *v)
{
	return v->io.why;
}

enum orc_why orc_access_begin(orc_vcpu *v, enum orc_why why, orc_u64 address, uint32_t size, uint32_t count, bool write,
			      void *data)
{
	v->io = (struct orc_io){.why = why, .open = true, .address = address, .size = size, .count = count, .write = write,
				.data = data};
	v->access.count = 0;
	return orc_access_next(v) ? orc_access_up(v) : ORC_ANSWERED;
}

enum orc_why orc_access_resume(orc_vcpu *v)
{
	while (orc_access_next(v)) {
		uint32_t commands = orc_vcpu_commands(v);

		if (commands & ORC_STOP) {
			orc_access_abandon(v);
			break;
		}
		if (commands) {
			v->access.count = 0; /* not asked after all: when it goes on, somebody else may be there */
			if (orc_commanded(v))
				return ORC_COMMAND;
			continue;
		}
		if (v->waiting && !orc_wait_turn(v)) {
			v->access.count = 0;
			continue;
		}
		return orc_access_up(v);
	}
	return ORC_ANSWERED;
}

bool orc_device_answer(orc_device *d, orc_u64 offset, uint32_t size, uint32_t count, bool write, void *data)
{
	const struct orc_access access = {.offset = offset, .size = size, .count = count, .write = write, .data = data};

	return d->answer(d, NULL, &access);
}

void orc_device_free(orc_device *d)
{
	if (d)
		d->free(d);
}
