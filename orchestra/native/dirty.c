/* Which pages guests write: KVM's dirty logs, read without the interpreter lock.
 *
 * A log has one owner, orc_dirty: whoever reads it out of the kernel takes the pages away from everybody else. So all that
 * want to know are readers of the owner. Each has a bitmap of its own, and what is read for one is added to all of them.
 * Counting, for the policies' rates, is the reader that is always there.
 *
 *     kernel ── collect() ──→ fresh ──→ bitmap of each reader ──→ orc_dirty_read: counted
 *     (a log or the rings)                                    └─→ orc_dirty_take: handed out
 *
 * The bitmap: KVM_GET_DIRTY_LOG fetches it, clears it and write-protects what it named, all in one call. With
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it would only fetch, and KVM_CLEAR_DIRTY_LOG do the rest in pieces (Linux
 * 2a31b9db1535). What we hand out is copied afterwards, so nothing is lost by protecting at once, and it is one call and
 * not two. Nor does KVM_DIRTY_LOG_INITIALLY_SET help: it saves the pass over the page tables when logging begins by calling
 * every page dirty, so that pass came with the first reading, and that reading would say nothing.
 *
 * The rings: each vCPU writes the pages into a ring of its own, mapped here, and leaves KVM_RUN when it is nearly full. An
 * entry goes from dirty to collected, by us, and with KVM_RESET_DIRTY_RINGS to free, when the kernel protects its page again
 * (linux/kvm.h, struct kvm_dirty_gfn). Where the CPU logs pages by itself (PML), those of a vCPU that is in the guest come
 * with its next exit: late, and not lost. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"

enum { PAGE_SHIFT = 12, WORD = 64 };
#define NONE UINT32_MAX

struct orc_dirty_reader {
	orc_dirty *log;
	struct orc_dirty_reader *next;
	uint64_t *bitmap; /* of all slots in a row, as `first` has them */
};

/* Of one vCPU. */
struct ring {
	struct kvm_dirty_gfn *entry; /* NULL: it is not mapped */
	uint32_t next;               /* the first that was not collected; goes on beyond `entries` */
	bool ran_over;               /* the kernel goes on behind it, nobody knows where */
};

struct orc_dirty {
	pthread_mutex_t lock; /* over all but the sums: one reader at a time, and none once the VM is closed */
	int vm;               /* -1: closed */
	struct kvm_userspace_memory_region *slot;
	size_t slots, words;  /* words: of all bitmaps together */
	size_t *first;        /* of each slot: the word where its bitmap begins */
	bool *wanted;         /* of each slot: its pages are to be counted, or: whoever reads, it is logged */
	uint64_t *fresh;      /* what was just collected */
	struct orc_dirty_reader counting, *readers; /* the latter do not have the former among them */
	_Atomic bool read;    /* there are some */
	struct ring *ring;
	uint32_t rings, entries; /* entries: of each ring; 0: the kernel keeps bitmaps */
	pthread_mutex_t sums_lock; /* over these alone, so that whoever looks never waits for the kernel */
	struct orc_dirty_sums sums;
};

static size_t pages_of(const struct kvm_userspace_memory_region *slot)
{
	return slot->memory_size >> PAGE_SHIFT;
}

/* The kernel fills whole words (api.rst, KVM_GET_DIRTY_LOG), and leaves the bits past the last page clear. */
static size_t words_of(const struct kvm_userspace_memory_region *slot)
{
	return (pages_of(slot) + WORD - 1) / WORD;
}

orc_u64 orc_dirty_ones(const uint64_t *bitmap, size_t words)
{
	orc_u64 ones = 0;

	for (size_t i = 0; i < words; i++)
		if (bitmap[i]) /* most are not */
			ones += (orc_u64)__builtin_popcountll(bitmap[i]);
	return ones;
}

static bool is_counted(const orc_dirty *d)
{
	for (size_t i = 0; i < d->slots; i++)
		if (d->wanted[i])
			return true;
	return false;
}

/* ---- making ---------------------------------------------------------------------------------------------------- */

orc_dirty *orc_dirty_new(int vm, struct kvm_userspace_memory_region *slot, size_t slots)
{
	orc_dirty *d = calloc(1, sizeof(*d));

	if (!d)
		return NULL;
	d->vm = vm;
	d->slot = slot;
	d->slots = slots;
	d->first = calloc(slots + 1, sizeof(*d->first));
	d->wanted = calloc(slots + 1, sizeof(*d->wanted));
	for (size_t i = 0; d->first && d->wanted && i < slots; i++) {
		d->first[i] = d->words;
		d->words += words_of(&slot[i]);
		d->wanted[i] = slot[i].flags & KVM_MEM_LOG_DIRTY_PAGES;
	}
	/* a bit for each page; of what is never logged not a byte is touched */
	d->fresh = calloc(d->words + 1, sizeof(*d->fresh));
	d->counting.bitmap = calloc(d->words + 1, sizeof(*d->counting.bitmap));
	pthread_mutex_init(&d->lock, NULL);
	pthread_mutex_init(&d->sums_lock, NULL);
	if (!d->first || !d->wanted || !d->fresh || !d->counting.bitmap) {
		orc_dirty_free(d);
		return NULL;
	}
	d->sums.on = is_counted(d);
	return d;
}

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

static void unmap_rings(orc_dirty *d)
{
	while (d->rings)
		munmap(d->ring[--d->rings].entry, ring_bytes(d));
}

void orc_dirty_free(orc_dirty *d)
{
	if (!d)
		return;
	unmap_rings(d);
	pthread_mutex_destroy(&d->lock);
	pthread_mutex_destroy(&d->sums_lock);
	free(d->ring);
	free(d->counting.bitmap);
	free(d->fresh);
	free(d->wanted);
	free(d->first);
	free(d);
}

/* ---- out of the kernel; all with `lock` held ----------------------------------------------------------------------- */

/* What was read before an error still counts: it is in no log any more. */
static int collect_bitmaps(orc_dirty *d, bool *any)
{
	int error = 0;

	for (size_t i = 0; i < d->slots; i++) {
		struct kvm_dirty_log log = {.slot = d->slot[i].slot, .dirty_bitmap = d->fresh + d->first[i]};
		long rc;

		if (!(d->slot[i].flags & KVM_MEM_LOG_DIRTY_PAGES))
			continue;
		rc = orc_ioctl(d->vm, KVM_GET_DIRTY_LOG, &log);
		if (rc < 0) {
			error = (int)rc;
			memset(d->fresh + d->first[i], 0, words_of(&d->slot[i]) * sizeof(*d->fresh));
		} else {
			*any = true;
		}
	}
	return error;
}

static void note(orc_dirty *d, uint32_t number, uint64_t page)
{
	for (size_t i = 0; i < d->slots; i++)
		if (d->slot[i].slot == number && page < pages_of(&d->slot[i]))
			d->fresh[d->first[i] + page / WORD] |= 1ull << page % WORD;
}

static bool is_dirty(const struct ring *ring, uint32_t number, const orc_dirty *d)
{
	/* The kernel writes `flags` last, and frees what it finds collected: so ours are an acquire and a release (api.rst,
	 * KVM_CAP_DIRTY_LOG_RING_ACQ_REL). */
	const struct kvm_dirty_gfn *e = &ring->entry[number & (d->entries - 1)];

	return (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_MASK) == KVM_DIRTY_GFN_F_DIRTY;
}

static void set_collected(const struct ring *ring, uint32_t number, const orc_dirty *d)
{
	__atomic_store_n(&ring->entry[number & (d->entries - 1)].flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
}

static void note_entry(orc_dirty *d, const struct ring *ring)
{
	const struct kvm_dirty_gfn *e = &ring->entry[ring->next & (d->entries - 1)];

	note(d, e->slot & 0xffff, e->offset); /* above that: the address space, which is SMM's or not */
}

/* How many entries of it were collected. */
static uint32_t collect_ring(orc_dirty *d, struct ring *ring)
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
		size_t pages = pages_of(&d->slot[i]);

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
static uint32_t collect_round(orc_dirty *d, struct ring *ring)
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
static uint32_t catch_up(orc_dirty *d, struct ring *ring, bool full)
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
 * the oldest. `full`: the number of the one that is, or NONE. */
static int collect_rings(orc_dirty *d, uint32_t full)
{
	bool any = false;

	for (uint32_t i = 0; i < d->rings; i++) {
		struct ring *ring = &d->ring[i];
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

static void add(uint64_t *to, const uint64_t *from, size_t words)
{
	for (size_t i = 0; i < words; i++)
		if (from[i]) /* so that a page of a bitmap that is all clear stays untouched */
			to[i] |= from[i];
}

static void add_counted(orc_dirty *d)
{
	for (size_t i = 0; i < d->slots; i++)
		if (d->wanted[i])
			add(d->counting.bitmap + d->first[i], d->fresh + d->first[i], words_of(&d->slot[i]));
}

/* Reads what is in the log, and gives it to all readers. *any: some of it could be read. */
static int collect_some(orc_dirty *d, uint32_t full, bool *any)
{
	int error = d->entries ? collect_rings(d, full) : collect_bitmaps(d, any);

	*any = *any || d->entries;
	add_counted(d);
	for (struct orc_dirty_reader *r = d->readers; r; r = r->next)
		add(r->bitmap, d->fresh, d->words);
	for (size_t i = 0; i < d->words; i++)
		if (d->fresh[i])
			d->fresh[i] = 0;
	return error;
}

static int collect(orc_dirty *d)
{
	bool any = false;

	return collect_some(d, NONE, &any);
}

/* Takes what there is to be counted. */
static int count(orc_dirty *d)
{
	orc_ns now = orc_now();
	bool any = false;
	int error;

	if (d->vm < 0 || !is_counted(d))
		return 0;
	error = collect_some(d, NONE, &any);
	if (!any)
		return error;
	pthread_mutex_lock(&d->sums_lock);
	d->sums.pages += orc_dirty_ones(d->counting.bitmap, d->words);
	d->sums.read = now;
	pthread_mutex_unlock(&d->sums_lock);
	for (size_t i = 0; i < d->words; i++)
		if (d->counting.bitmap[i])
			d->counting.bitmap[i] = 0;
	return error;
}

/* "When changing an existing slot, [...] its flags may be modified" (api.rst, KVM_SET_USER_MEMORY_REGION), also while vCPUs
 * run. */
static int set_flag(orc_dirty *d, struct kvm_userspace_memory_region *slot, bool on)
{
	struct kvm_userspace_memory_region changed = *slot;
	long rc;

	changed.flags = on ? changed.flags | KVM_MEM_LOG_DIRTY_PAGES : changed.flags & ~KVM_MEM_LOG_DIRTY_PAGES;
	if (changed.flags == slot->flags)
		return 0;
	rc = d->vm < 0 ? 0 : orc_ioctl(d->vm, KVM_SET_USER_MEMORY_REGION, &changed);
	if (!rc)
		slot->flags = changed.flags;
	return (int)rc;
}

/* Logs each slot that somebody wants logged, and no other. All or, with an error, none; `was`: room for as many. */
static int set_flags(orc_dirty *d, bool *was)
{
	for (size_t i = 0; i < d->slots; i++) {
		struct kvm_userspace_memory_region *slot = &d->slot[i];
		int rc;

		was[i] = slot->flags & KVM_MEM_LOG_DIRTY_PAGES;
		rc = set_flag(d, slot, d->wanted[i] || (d->readers && !(slot->flags & KVM_MEM_READONLY)));
		if (rc) {
			while (i--)
				set_flag(d, &d->slot[i], was[i]);
			return rc;
		}
	}
	return 0;
}

/* ---- counting --------------------------------------------------------------------------------------------------- */

void orc_dirty_sums(orc_dirty *d, struct orc_dirty_sums *out)
{
	pthread_mutex_lock(&d->sums_lock);
	*out = d->sums;
	pthread_mutex_unlock(&d->sums_lock);
}

int orc_dirty_read(orc_dirty *const logs[], size_t n)
{
	int error = 0;

	for (size_t i = 0; i < n; i++) {
		int rc;

		pthread_mutex_lock(&logs[i]->lock);
		rc = count(logs[i]);
		pthread_mutex_unlock(&logs[i]->lock);
		if (rc)
			error = rc;
	}
	return error;
}

int orc_dirty_log(orc_dirty *d, bool on)
{
	bool *was = malloc((d->slots + 1) * sizeof(*was)), *before = malloc((d->slots + 1) * sizeof(*before));
	int rc = -ENOMEM;

	if (was && before) {
		pthread_mutex_lock(&d->lock);
		count(d); /* a slot that is not logged any more has lost its log */
		if (d->vm >= 0 && d->readers && !is_counted(d))
			collect(d); /* what is logged for others until now is not counted */
		memcpy(before, d->wanted, d->slots * sizeof(*before));
		for (size_t i = 0; i < d->slots; i++)
			d->wanted[i] = on && !(d->slot[i].flags & KVM_MEM_READONLY);
		rc = set_flags(d, was);
		if (rc)
			memcpy(d->wanted, before, d->slots * sizeof(*before));
		pthread_mutex_lock(&d->sums_lock);
		d->sums.on = is_counted(d);
		pthread_mutex_unlock(&d->sums_lock);
		pthread_mutex_unlock(&d->lock);
	}
	free(before);
	free(was);
	return rc;
}

/* ---- readers ---------------------------------------------------------------------------------------------------- */

static void unlink_reader(struct orc_dirty_reader *reader)
{
	struct orc_dirty_reader **at = &reader->log->readers;

	while (*at != reader)
		at = &(*at)->next;
	*at = reader->next;
	atomic_store(&reader->log->read, reader->log->readers != NULL);
}

static void free_reader(struct orc_dirty_reader *reader)
{
	if (reader)
		free(reader->bitmap);
	free(reader);
}

int orc_dirty_open(orc_dirty *d, struct orc_dirty_reader **out)
{
	struct orc_dirty_reader *reader = calloc(1, sizeof(*reader));
	bool *was = malloc((d->slots + 1) * sizeof(*was));
	int rc = -ENOMEM;

	if (reader)
		reader->bitmap = calloc(d->words + 1, sizeof(*reader->bitmap));
	if (was && reader && reader->bitmap) {
		pthread_mutex_lock(&d->lock);
		rc = d->vm < 0 ? -EBADF : collect(d); /* what was written before is the others' */
		if (!rc) {
			reader->log = d;
			reader->next = d->readers;
			d->readers = reader;
			atomic_store(&d->read, true);
			rc = set_flags(d, was);
			if (rc)
				unlink_reader(reader);
		}
		pthread_mutex_unlock(&d->lock);
	}
	free(was);
	if (rc)
		free_reader(reader);
	else
		*out = reader;
	return rc;
}

size_t orc_dirty_words(const orc_dirty *d)
{
	return d->words;
}

int orc_dirty_take(struct orc_dirty_reader *reader, uint64_t *bitmap)
{
	orc_dirty *d = reader->log;
	int rc;

	pthread_mutex_lock(&d->lock);
	rc = d->vm < 0 ? 0 : collect(d);
	memcpy(bitmap, reader->bitmap, d->words * sizeof(*bitmap));
	memset(reader->bitmap, 0, d->words * sizeof(*bitmap));
	pthread_mutex_unlock(&d->lock);
	return rc;
}

int orc_dirty_shut(struct orc_dirty_reader *reader)
{
	orc_dirty *d = reader->log;
	bool *was = malloc((d->slots + 1) * sizeof(*was));
	int rc = -ENOMEM;

	pthread_mutex_lock(&d->lock);
	if (d->vm >= 0)
		collect(d); /* for the others: what is not logged any more has lost its log */
	unlink_reader(reader);
	if (was)
		rc = set_flags(d, was);
	pthread_mutex_unlock(&d->lock);
	free(was);
	free_reader(reader);
	return rc;
}

/* ---- what is written without a vCPU, and when its log is full --------------------------------------------------------- */

void orc_dirty_mark(orc_dirty *d, orc_u64 address, orc_u64 size)
{
	if (!size || !atomic_load(&d->read))
		return;
	pthread_mutex_lock(&d->lock);
	for (size_t i = 0; i < d->slots; i++) {
		const struct kvm_userspace_memory_region *slot = &d->slot[i];
		orc_u64 from = address > slot->guest_phys_addr ? address - slot->guest_phys_addr : 0;
		orc_u64 last = address + size - 1; /* no memory is so high that this overflows */

		if (last < slot->guest_phys_addr || from >= slot->memory_size)
			continue;
		last -= slot->guest_phys_addr;
		if (last >= slot->memory_size)
			last = slot->memory_size - 1;
		for (orc_u64 page = from >> PAGE_SHIFT; page <= last >> PAGE_SHIFT; page++)
			for (struct orc_dirty_reader *r = d->readers; r; r = r->next)
				r->bitmap[d->first[i] + page / WORD] |= 1ull << page % WORD;
	}
	pthread_mutex_unlock(&d->lock);
}

int orc_dirty_drain(orc_dirty *d, uint32_t ring)
{
	bool any = false;
	int rc;

	pthread_mutex_lock(&d->lock);
	rc = d->vm < 0 ? 0 : collect_some(d, ring, &any);
	pthread_mutex_unlock(&d->lock);
	return rc;
}

void orc_dirty_close(orc_dirty *d)
{
	pthread_mutex_lock(&d->lock);
	if (d->vm >= 0 && d->readers)
		collect(d); /* what was written last, for who takes it later */
	d->vm = -1;
	unmap_rings(d);
	pthread_mutex_unlock(&d->lock);
}
