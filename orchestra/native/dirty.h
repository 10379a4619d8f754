/* What dirty.c and dirty_ring.c share: the owner of a dirty log. */
#ifndef ORC_DIRTY_H
#define ORC_DIRTY_H

#include "core.h"

enum { PAGE_SHIFT = 12, WORD = 64 };
#define ORC_DIRTY_NO_RING UINT32_MAX

struct orc_dirty_reader {
	orc_dirty *log;
	struct orc_dirty_reader *next;
	uint64_t *bitmap; /* of all slots in a row, as `first` has them */
};

/* Of one vCPU. */
struct orc_dirty_ring {
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
	bool kept;            /* there are pages in counting.bitmap, collected for others and not counted yet */
	_Atomic bool read;    /* there are some */
	struct orc_dirty_ring *ring;
	uint32_t rings, entries; /* entries: of each ring; 0: the kernel keeps bitmaps */
	pthread_mutex_t sums_lock; /* over these alone, so that whoever looks never waits for the kernel */
	struct orc_dirty_sums sums;
};

static inline size_t orc_dirty_pages_of(const struct kvm_userspace_memory_region *slot)
{
	return slot->memory_size >> PAGE_SHIFT;
}

/* The kernel fills whole words (api.rst, KVM_GET_DIRTY_LOG), and leaves the bits past the last page clear. */
static inline size_t orc_dirty_words_of(const struct kvm_userspace_memory_region *slot)
{
	return (orc_dirty_pages_of(slot) + WORD - 1) / WORD;
}

/* With `lock` held: collects all rings into `fresh`. `full`: the number of the one that the kernel calls full, or
 * ORC_DIRTY_NO_RING. 0 or a negative errno. */
int orc_dirty_collect_rings(orc_dirty *, uint32_t full);
void orc_dirty_unmap_rings(orc_dirty *);

#endif
