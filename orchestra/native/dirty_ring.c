/* Rings of written pages, one for each vCPU.
 *
 * Each vCPU writes the pages into a ring of its own, mapped here, and leaves KVM_RUN when it is nearly full. An
 * entry goes from dirty to collected, by us, and with KVM_RESET_DIRTY_RINGS to free, when the kernel protects its page again
 * (linux/kvm.h, struct kvm_dirty_gfn). Where the CPU logs pages by itself (PML), those of a vCPU that is in the guest come
 * with its next exit: late, and not lost. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dirty.h"

static size_t ring_bytes(const orc_dirty *d)
{
	return d->entries * sizeof(struct kvm_dirty_gfn);
}

int orc_dirty_rings(orc_dirty *d, uint32_t entries, const int *vcpu, uint32_t vcpus)
{
	d->ring = calloc(vcpus + 1, sizeof(*d->ring));
	if (!d->ring)
		return -ENOMEM;
	d->entries = entries;
	for (; d->rings < vcpus; d->rings++) {
		void *entry = mmap(NULL, ring_bytes(d), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu[d->rings],
				   KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE));

		if (entry == MAP_FAILED)
			return -errno;
		d->ring[d->rings].entry = entry;
	}
	return 0;
}

void orc_dirty_unmap_rings(orc_dirty *d)
{
	while (d->rings)
		munmap(d->ring[--d->rings].entry, ring_bytes(d));
}

static void note(orc_dirty *d, uint32_t number, uint64_t page)
{
	for (size_t i = 0; i < d->slots; i++)
		if (d->slot[i].slot == number && page < orc_dirty_pages_of(&d->slot[i]))
			d->fresh[d->first[i] + page / WORD] |= 1ull << page % WORD;
}

static bool is_dirty(const struct orc_dirty_ring *ring, uint32_t number, const orc_dirty *d)
{
	/* The kernel writes `flags` last, and frees what it finds collected: so ours are an acquire and a release (api.rst,
	 * KVM_CAP_DIRTY_LOG_RING_ACQ_REL). */
	const struct kvm_dirty_gfn *e = &ring->entry[number & (d->entries - 1)];

	return (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_MASK) == KVM_DIRTY_GFN_F_DIRTY;
}

static void set_collected(const struct orc_dirty_ring *ring, uint32_t number, const orc_dirty *d)
{
	__atomic_store_n(&ring->entry[number & (d->entries - 1)].flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
}

static void note_entry(orc_dirty *d, const struct orc_dirty_ring *ring)
{
	const struct kvm_dirty_gfn *e = &ring->entry[ring->next & (d->entries - 1)];

	note(d, e->slot & 0xffff, e->offset); /* above that: the address space, which is SMM's or not */
}

/* How many entries of it were collected. */
static uint32_t collect_ring(orc_dirty *d, struct orc_dirty_ring *ring)
{
	uint32_t n = 0;

	for (; n < d->entries && is_dirty(ring, ring->next, d); n++, ring->next++) {
		note_entry(d, ring);
		set_collected(ring, ring->next, d);
	}
	return n;
}

/* Pages are lost: each may be one. Only for those who need to know which; what is counted stays what was seen. */
static void suspect_all(orc_dirty *d)
{
	for (size_t i = 0; i < d->slots; i++) {
		size_t pages = orc_dirty_pages_of(&d->slot[i]);

		if (d->slot[i].flags & KVM_MEM_LOG_DIRTY_PAGES)
			for (struct orc_dirty_reader *r = d->readers; r; r = r->next)
				for (size_t page = 0; page < pages; page++)
					r->bitmap[d->first[i] + page / WORD] |= 1ull << page % WORD;
	}
}

static int reset(orc_dirty *d)
{
	long rc = orc_ioctl(d->vm, KVM_RESET_DIRTY_RINGS, NULL);

	return rc < 0 ? (int)rc : 0;
}

/* The kernel has gone round once more since `next`, and is behind the dirty entries that begin there. Collects all of it,
 * and has the kernel, which counts the entries that it wrote over, count them as collected too. */
static uint32_t collect_round(orc_dirty *d, struct orc_dirty_ring *ring)
{
	uint32_t start = ring->next, n = collect_ring(d, ring);

	suspect_all(d);
	if (n == d->entries)
		return n; /* where it goes on nobody knows */
	for (; ring->next != start + d->entries; ring->next++) {
		if (is_dirty(ring, ring->next, d))
			note_entry(d, ring);
		set_collected(ring, ring->next, d);
	}
	reset(d);
	for (ring->next = start; ring->next != start + n; ring->next++)
		set_collected(ring, ring->next, d);
	ring->ran_over = false;
	return 1;
}

/* Of a ring that ran over, or that the kernel calls full. The kernel goes on somewhere behind `next`, and waits for the
 * entries before that to be collected. If it is full of nothing, that is far behind: a quarter of it is fewer than the kernel
 * takes for used, which is all but 64 entries, or all but 576 (PML) of 1,024 or more. It says again that it is full until
 * enough are collected. */
static uint32_t catch_up(orc_dirty *d, struct orc_dirty_ring *ring, bool full)
{
	uint32_t gap = 0;

	if (is_dirty(ring, ring->next, d)) {
		if (ring->ran_over && is_dirty(ring, ring->next - 1, d))
			return collect_round(d, ring);
		ring->ran_over = false;
		return collect_ring(d, ring);
	}
	while (gap < d->entries && !is_dirty(ring, ring->next + gap, d))
		gap++;
	if (gap == d->entries && !full)
		return 0; /* nothing was written since */
	ring->ran_over = gap == d->entries;
	if (ring->ran_over)
		gap = d->entries / 4;
	for (uint32_t i = 0; i < gap; i++)
		set_collected(ring, ring->next++, d);
	return gap + (ring->ran_over ? 0 : collect_ring(d, ring));
}

/* A ring never becomes quite full where a vCPU leaves KVM_RUN as soon as the kernel sees that it is about to: of the last
 * entries it needs a few. A KVM that executes many instructions before it looks (one without hardware does) writes over
 * the oldest. `full`: the number of the one that is, or ORC_DIRTY_NO_RING. */
int orc_dirty_collect_rings(orc_dirty *d, uint32_t full)
{
	bool any = false;

	for (uint32_t i = 0; i < d->rings; i++) {
		struct orc_dirty_ring *ring = &d->ring[i];
		bool astray = ring->ran_over || i == full;
		uint32_t n = astray ? catch_up(d, ring, i == full) : collect_ring(d, ring);

		if (n == d->entries) {
			ring->ran_over = true;
			suspect_all(d);
		}
		any = any || n;
	}
	return any ? reset(d) : 0;
}
