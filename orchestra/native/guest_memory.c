/* Guest memory as devices see it: where an address is, and who is told of what they write. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "virtqueue.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* include/uapi/asm-generic/mman-common.h of Linux 5.14 */
#endif

static int by_start(const void *a, const void *b)
{
	const struct orc_region *x = a, *y = b;

	return (x->start > y->start) - (x->start < y->start);
}

/* Puts them in order, and makes one of what goes on in each other. How many there are; 0: they overlap, or there is none. */
static size_t tidy(struct orc_region *region, size_t n)
{
	size_t kept = 0;

	qsort(region, n, sizeof *region, by_start);
	for (size_t i = 0; i < n; i++) {
		struct orc_region *last = kept ? &region[kept - 1] : NULL;

		if (!region[i].size || region[i].size - 1 > UINT64_MAX - region[i].start)
			return 0;
		if (last && region[i].start - last->start < last->size)
			return 0;
		if (last && region[i].start - last->start == last->size && region[i].host == last->host + last->size &&
		    region[i].writable == last->writable)
			last->size += region[i].size;
		else
			region[kept++] = region[i];
	}
	return kept;
}

orc_guest_memory *orc_guest_memory_new(const struct kvm_userspace_memory_region *slot, size_t slots, orc_dirty *dirty)
{
	orc_guest_memory *m = calloc(1, sizeof *m + slots * sizeof m->region[0]);

	if (!m) {
		errno = ENOMEM;
		return NULL;
	}
	m->dirty = dirty;
	for (size_t i = 0; i < slots; i++)
		m->region[i] = (struct orc_region){
			.start = slot[i].guest_phys_addr, .size = slot[i].memory_size,
			.host = (uint8_t *)(uintptr_t)slot[i].userspace_addr, .writable = !(slot[i].flags & KVM_MEM_READONLY)};
	m->n = tidy(m->region, slots);
	if (!m->n) {
		free(m);
		errno = EINVAL;
		return NULL;
	}
	return m;
}

void orc_guest_memory_free(orc_guest_memory *m)
{
	free(m);
}

static const struct orc_region *find(const orc_guest_memory *m, orc_u64 address)
{
	size_t low = 0, high = m->n;

	while (low < high) { /* the last one that begins at the address or before it */
		size_t middle = low + (high - low) / 2;

		if (m->region[middle].start <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low && address - m->region[low - 1].start < m->region[low - 1].size ? &m->region[low - 1] : NULL;
}

enum orc_queue_error orc_guest_memory_map(const orc_guest_memory *m, orc_u64 address, orc_u64 size, bool write,
					  struct iovec *out, size_t room, size_t *n)
{
	if (!size)
		return ORC_QUEUE_EMPTY;
	if (size - 1 > UINT64_MAX - address)
		return ORC_QUEUE_OVERFLOW;
	while (size) {
		const struct orc_region *r = find(m, address);
		orc_u64 offset, piece;

		if (!r)
			return ORC_QUEUE_OUTSIDE;
		if (write && !r->writable)
			return ORC_QUEUE_READ_ONLY;
		if (*n == room)
			return ORC_QUEUE_TOO_MANY;
		offset = address - r->start;
		piece = r->size - offset < size ? r->size - offset : size;
		out[(*n)++] = (struct iovec){r->host + offset, piece};
		address += piece; /* 0 after the last byte that there can be: then nothing is left */
		size -= piece;
	}
	return ORC_QUEUE_FINE;
}

void *orc_guest_memory_piece(const orc_guest_memory *m, orc_u64 address, orc_u64 size, bool write)
{
	const struct orc_region *r = find(m, address);

	if (!r || (write && !r->writable) || size > r->size - (address - r->start))
		return NULL;
	return r->host + (address - r->start);
}

void orc_guest_memory_wrote(const orc_guest_memory *m, const void *host, size_t size)
{
	if (!m->dirty)
		return;
	for (size_t i = 0; i < m->n; i++) {
		const struct orc_region *r = &m->region[i];
		uintptr_t offset = (uintptr_t)host - (uintptr_t)r->host;

		if (offset < r->size) { /* a piece lies within one region */
			orc_dirty_mark(m->dirty, r->start + offset, size);
			return;
		}
	}
}

/* ---- pages before they are touched ------------------------------------------------------------------------------ */

void orc_touch(void *host, size_t size)
{
	enum { PAGE = 4096 };

	for (size_t i = 0; i < size; i += PAGE)
		__atomic_fetch_or((uint8_t *)host + i, 0, __ATOMIC_RELAXED);
}

/* The kernel holds the lock of the process's mappings over a call. A thread that maps or unmaps, such as an event loop, waits for
 * it: 80 ms at p99 where all was asked for at once. */
enum { PIECE = 256 * 1024 };

static int populate_piece(void *host, size_t size)
{
	while (madvise(host, size, MADV_POPULATE_WRITE)) {
		if (errno == EINVAL) {
			orc_touch(host, size);
			return 0;
		}
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	}
	return 0;
}

int orc_populate(void *host, size_t size)
{
	int rc = 0;

	for (size_t done = 0; done < size && !rc; done += PIECE)
		rc = populate_piece((uint8_t *)host + done, size - done < PIECE ? size - done : PIECE);
	return rc;
}
