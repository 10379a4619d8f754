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
 * The rings: dirty_ring.c. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "dirty.h"

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
		d->words += orc_dirty_words_of(&slot[i]);
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

static void free_reader(struct orc_dirty_reader *reader)
{
	if (reader)
		free(reader->bitmap);
	free(reader);
}

void orc_dirty_free(orc_dirty *d)
{
	if (!d)
		return;
	orc_dirty_unmap_rings(d);
	while (d->readers) { /* that nobody shut */
		struct orc_dirty_reader *reader = d->readers;

		d->readers = reader->next;
		free_reader(reader);
	}
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
			memset(d->fresh + d->first[i], 0, orc_dirty_words_of(&d->slot[i]) * sizeof(*d->fresh));
		} else {
			*any = true;
		}
	}
	return error;
}

/* Gives what was collected to all readers. `count`: takes what there is to be counted, and returns how many pages. */
static orc_u64 share_out(orc_dirty *d, bool count)
{
	orc_u64 pages = 0;
	bool kept = false;

	for (size_t i = 0; i < d->slots; i++) {
		uint64_t *fresh = d->fresh + d->first[i], *counting = d->counting.bitmap + d->first[i];

		for (size_t w = 0, words = orc_dirty_words_of(&d->slot[i]); w < words; w++) {
			uint64_t all = fresh[w];

			if (all) { /* most are not, and pages of a bitmap that is all clear stay untouched */
				for (struct orc_dirty_reader *r = d->readers; r; r = r->next)
					r->bitmap[d->first[i] + w] |= all;
				fresh[w] = 0;
				all = d->wanted[i] ? all : 0;
			}
			if (d->kept && counting[w]) {
				all |= counting[w];
				counting[w] = 0;
			}
			if (all && count) {
				pages += (orc_u64)__builtin_popcountll(all);
			} else if (all) {
				counting[w] = all;
				kept = true;
			}
		}
	}
	d->kept = kept;
	return pages;
}

/* Reads what is in the log into `fresh`. *any: some of it could be read. */
static int collect_some(orc_dirty *d, uint32_t full, bool *any)
{
	*any = d->entries != 0;
	return d->entries ? orc_dirty_collect_rings(d, full) : collect_bitmaps(d, any);
}

/* For all readers; what is to be counted is kept. */
static int collect(orc_dirty *d, uint32_t full)
{
	bool any;
	int error = collect_some(d, full, &any);

	share_out(d, false);
	return error;
}

/* Takes what there is to be counted. */
static int count(orc_dirty *d)
{
	orc_ns now = orc_now();
	orc_u64 pages;
	bool any;
	int error;

	if (d->vm < 0 || !is_counted(d))
		return 0;
	error = collect_some(d, ORC_DIRTY_NO_RING, &any);
	if (!any)
		return error;
	pages = share_out(d, true);
	pthread_mutex_lock(&d->sums_lock);
	d->sums.pages += pages;
	d->sums.read = now;
	pthread_mutex_unlock(&d->sums_lock);
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
			collect(d, ORC_DIRTY_NO_RING); /* what is logged for others until now is not counted */
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

int orc_dirty_open(orc_dirty *d, struct orc_dirty_reader **out)
{
	struct orc_dirty_reader *reader = calloc(1, sizeof(*reader));
	bool *was = malloc((d->slots + 1) * sizeof(*was));
	int rc = -ENOMEM;

	if (reader)
		reader->bitmap = calloc(d->words + 1, sizeof(*reader->bitmap));
	if (was && reader && reader->bitmap) {
		pthread_mutex_lock(&d->lock);
		rc = d->vm < 0 ? -EBADF : collect(d, ORC_DIRTY_NO_RING); /* what was written before is the others' */
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
	rc = d->vm < 0 ? 0 : collect(d, ORC_DIRTY_NO_RING);
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
		collect(d, ORC_DIRTY_NO_RING); /* for the others: what is not logged any more has lost its log */
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
	int rc;

	pthread_mutex_lock(&d->lock);
	rc = d->vm < 0 ? 0 : collect(d, ring);
	pthread_mutex_unlock(&d->lock);
	return rc;
}

void orc_dirty_close(orc_dirty *d)
{
	pthread_mutex_lock(&d->lock);
	if (d->vm >= 0 && d->readers)
		collect(d, ORC_DIRTY_NO_RING); /* what was written last, for who takes it later */
	d->vm = -1;
	orc_dirty_unmap_rings(d);
	pthread_mutex_unlock(&d->lock);
}
