/* How many pages guests write: KVM's dirty logs, read and counted without the interpreter lock.
 *
 * KVM_GET_DIRTY_LOG fetches the bitmap, clears it and write-protects what it named, all in one call. With
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it would only fetch, and KVM_CLEAR_DIRTY_LOG do the rest in pieces: for who copies the
 * pages in between, and is told of no page that was not written since it was copied (Linux 2a31b9db1535). Who only counts
 * copies nothing, and would pay two calls for one. Nor does KVM_DIRTY_LOG_INITIALLY_SET help: it saves the pass over the
 * page tables when logging begins by calling every page dirty, so that pass came with the first reading, and that reading
 * would say nothing. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { PAGE_SHIFT = 12, WORD = 64 };

struct orc_dirty {
	pthread_mutex_t lock; /* over the ioctls: one reader at a time, and none once the VM is closed */
	int vm;               /* -1: closed */
	struct kvm_userspace_memory_region *slot;
	size_t slots, words; /* words: of the largest bitmap */
	pthread_mutex_t sums_lock; /* over this alone, so that whoever looks never waits for the kernel */
	struct orc_dirty_sums sums;
};

/* The kernel fills whole words (api.rst, KVM_GET_DIRTY_LOG), and leaves the bits past the last page clear. */
static size_t words_of(const struct kvm_userspace_memory_region *slot)
{
	return ((slot->memory_size >> PAGE_SHIFT) + WORD - 1) / WORD;
}

orc_u64 orc_dirty_ones(const uint64_t *bitmap, size_t words)
{
	orc_u64 ones = 0;

	for (size_t i = 0; i < words; i++)
		if (bitmap[i]) /* most are not */
			ones += (orc_u64)__builtin_popcountll(bitmap[i]);
	return ones;
}

static bool is_logged(const orc_dirty *d)
{
	for (size_t i = 0; i < d->slots; i++)
		if (d->slot[i].flags & KVM_MEM_LOG_DIRTY_PAGES)
			return true;
	return false;
}

orc_dirty *orc_dirty_new(int vm, struct kvm_userspace_memory_region *slot, size_t slots)
{
	orc_dirty *d = calloc(1, sizeof(*d));

	if (!d)
		return NULL;
	d->vm = vm;
	d->slot = slot;
	d->slots = slots;
	for (size_t i = 0; i < slots; i++)
		if (words_of(&slot[i]) > d->words)
			d->words = words_of(&slot[i]);
	d->sums.on = is_logged(d);
	pthread_mutex_init(&d->lock, NULL);
	pthread_mutex_init(&d->sums_lock, NULL);
	return d;
}

void orc_dirty_free(orc_dirty *d)
{
	if (!d)
		return;
	pthread_mutex_destroy(&d->lock);
	pthread_mutex_destroy(&d->sums_lock);
	free(d);
}

void orc_dirty_close(orc_dirty *d)
{
	pthread_mutex_lock(&d->lock);
	d->vm = -1;
	pthread_mutex_unlock(&d->lock);
}

void orc_dirty_sums(orc_dirty *d, struct orc_dirty_sums *out)
{
	pthread_mutex_lock(&d->sums_lock);
	*out = d->sums;
	pthread_mutex_unlock(&d->sums_lock);
}

/* With `lock` held. What was read before an error still counts: it is in no log any more. */
static int read_slots(orc_dirty *d, uint64_t *bitmap)
{
	orc_ns now = orc_now();
	orc_u64 pages = 0;
	bool any = false;
	int error = 0;

	for (size_t i = 0; i < d->slots; i++) {
		struct kvm_dirty_log log = {.slot = d->slot[i].slot, .dirty_bitmap = bitmap};
		long rc;

		if (!(d->slot[i].flags & KVM_MEM_LOG_DIRTY_PAGES))
			continue;
		rc = orc_ioctl(d->vm, KVM_GET_DIRTY_LOG, &log);
		if (rc < 0) {
			error = (int)rc;
			continue;
		}
		any = true;
		pages += orc_dirty_ones(bitmap, words_of(&d->slot[i]));
	}
	if (any) {
		pthread_mutex_lock(&d->sums_lock);
		d->sums.pages += pages;
		d->sums.read = now;
		pthread_mutex_unlock(&d->sums_lock);
	}
	return error;
}

int orc_dirty_read(orc_dirty *const logs[], size_t n)
{
	size_t words = 0;
	uint64_t *bitmap;
	int error = 0;

	for (size_t i = 0; i < n; i++)
		if (logs[i]->words > words)
			words = logs[i]->words;
	bitmap = malloc(words * sizeof(*bitmap));
	if (!bitmap)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++) {
		pthread_mutex_lock(&logs[i]->lock);
		if (logs[i]->vm >= 0) {
			int rc = read_slots(logs[i], bitmap);

			if (rc)
				error = rc;
		}
		pthread_mutex_unlock(&logs[i]->lock);
	}
	free(bitmap);
	return error;
}

/* With `lock` held. "When changing an existing slot, [...] its flags may be modified" (api.rst,
 * KVM_SET_USER_MEMORY_REGION), also while vCPUs run. */
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

/* With `lock` held; `was`: room for as many as there are slots. */
static int set_flags(orc_dirty *d, bool on, bool *was)
{
	for (size_t i = 0; i < d->slots; i++) {
		struct kvm_userspace_memory_region *slot = &d->slot[i];
		int rc;

		was[i] = slot->flags & KVM_MEM_LOG_DIRTY_PAGES;
		rc = set_flag(d, slot, on && !(slot->flags & KVM_MEM_READONLY));
		if (rc) {
			while (i--)
				set_flag(d, &d->slot[i], was[i]);
			return rc;
		}
	}
	return 0;
}

int orc_dirty_log(orc_dirty *d, bool on)
{
	bool *was = malloc(d->slots * sizeof(*was));
	uint64_t *bitmap = malloc(d->words * sizeof(*bitmap));
	int rc = -ENOMEM;

	if (was && bitmap) {
		pthread_mutex_lock(&d->lock);
		if (d->vm >= 0)
			read_slots(d, bitmap); /* a slot that is not logged any more has lost its log */
		rc = set_flags(d, on, was);
		pthread_mutex_lock(&d->sums_lock);
		d->sums.on = is_logged(d);
		pthread_mutex_unlock(&d->sums_lock);
		pthread_mutex_unlock(&d->lock);
	}
	free(bitmap);
	free(was);
	return rc;
}
