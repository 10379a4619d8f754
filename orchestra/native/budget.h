/* What processes share: a bucket, and the file of one host's buckets. This is an ABI: whoever changes a line that is in the
 * file gives ORC_BUDGET_VERSION another number, and processes of two versions refuse each other by name.
 *
 * A bucket on a process's heap is the same struct, and goes through the same functions.
 *
 * The rule for all of it: each change is one compare-and-swap or one addition of a word that is right before and after, so
 * a process may die, or be stopped, between any two instructions, and leaves nothing that another waits for. What each
 * death leaves behind:
 *
 *   in a charge           `last` was moved, or not. If it was, the ticket is lost: others wait for tokens that nobody uses.
 *   while it waits        the same. Of each bucket a vCPU has one ticket at most, of what its last exit was charged (one
 *                         token; a string instruction's elements, a page of bytes at most): the others lose so much once,
 *                         and have the exact rate from then on. Nobody counts who waits, so no count is wrong.
 *   on its way out while there is no limit
 *                         `freed` has it, or not. If not, its tokens stay owed: lost as above, and no more than those.
 *   in a change of limit  before the last compare-and-swap: the old limit is in force, and the half-written one is where no
 *                         reader looks and the next writer writes. After it: the new one is.
 *   after that, before waiters are woken
 *                         they look by themselves after ORC_LOOK_AGAIN at the latest.
 *   in attaching, creating, waking
 *                         nothing of it is in the file. Descriptors, mappings and futex queues are the kernel's to clean up.
 *
 * Trust: whoever has the file may set its limits, and so stop or free all that share it. It can do no other harm: the file
 * can't shrink (sealed), holds no pointer and no index but one bit, and what is read from it is used as numbers only, of any
 * value. Loops over it are bounded. */
#ifndef ORC_BUDGET_H
#define ORC_BUDGET_H

#include "orc.h"

enum {
	ORC_BUDGET_VERSION = 2,
	/* A waiter looks at the limit again after so long, if nothing wakes it: a process that died after it had changed the
	 * limit and before it woke anybody makes them late by no more. Ten looks a second cost 0.03 % of a CPU. */
	ORC_LOOK_AGAIN = 100 * 1000 * 1000,
	/* The same where the kernel can't wait for two words at once (before Linux 5.16), and so nobody wakes it: for 0.4 %. */
	ORC_LOOK_ALONE = 5 * 1000 * 1000,
};
#define ORC_BUDGET_MAGIC 0x746567647562726full /* "orbudget" in the file */

/* A word of a limit, with the number of the change that wrote it. Both are written at once (16 bytes), and only if the
 * number grows: so a writer that slept too long changes nothing that a later one wrote. Readers need the value alone. */
struct orc_word {
	_Alignas(16) _Atomic int64_t value;
	_Atomic uint64_t number;
};

/* A limit. All times are CLOCK_MONOTONIC's, all tokens in units of 1/65536. */
enum orc_limit_word {
	ORC_SINCE,     /* from when on it counts; tokens(since) == made + part */
	ORC_MADE,
	ORC_PART,      /* double: of the next unit. Who changes a slow limit often would else never see one made */
	ORC_PER_NS,    /* double: units a nanosecond */
	ORC_TOLERANCE, /* (burst - 1) units */
	ORC_MAX_DELAY, /* < 0: unbounded */
	ORC_OWED,      /* at `since` the bucket owes at least so much: a larger burst is earned and not given */
	ORC_FREED,     /* `freed`, when the limit was taken off */
	ORC_LIMIT_WORDS
};

/* `control`: which slot is in force, and what is known of it without reading it; the rest is a number that grows by one
 * with each claim and each publication. */
enum { ORC_SLOT = 1, ORC_LIMITED = 2, ORC_BEGUN = 4 /* it has had a limit */, ORC_FLAGS = 7 };

/* How a limit changes, without a lock:
 *
 *   claim      control: number k - 1 → k                    by compare-and-swap. From now on nobody else's publication of an
 *                                                           earlier claim can succeed
 *   write      each word of the slot that is not in force   unless its number is k or more: then another has claimed it
 *   publish    control: number k → k + 1, the other slot    if it is still k. Else all of it was for nothing: once more
 *
 * A published slot's words bear the number of its writer's claim, and every claim of that slot before it was smaller, so no
 * writer of that time can touch them any more. Those that come later write to the other slot until the next
 * publication. A reader looks whether `control` stayed the same while it read. */
struct orc_bucket {
	_Alignas(ORC_CACHE_LINE) _Atomic int64_t last; /* the last ticket given */
	_Atomic int64_t freed; /* units of tickets whose holders went free, while there was no limit; wraps */
	/* Units of the burst that is given once: what is left of it, and the largest that was ever given. No host's bucket has one,
	 * and who writes it there can do no more than by a limit. */
	_Atomic int64_t once, once_given;
	_Alignas(ORC_CACHE_LINE) _Atomic uint64_t control;
	_Alignas(ORC_CACHE_LINE) struct orc_word slot[2][ORC_LIMIT_WORDS];
};

struct orc_budget_file {
	uint64_t magic;
	uint32_t version;
	uint32_t size, bucket_size, meters; /* of this struct, of a bucket; how many */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t changes; /* a futex, of all processes: grows with each change of a limit */
	struct orc_bucket bucket[ORC_METERS]; /* ORC_BUS_LOCKS, ORC_EXITS, ORC_ANSWERS */
};
_Static_assert(sizeof(struct orc_word) == 16 && sizeof(struct orc_bucket) == 384 && offsetof(struct orc_bucket, control) == 64 &&
	       offsetof(struct orc_bucket, slot) == 128 && offsetof(struct orc_budget_file, changes) == 64 &&
	       offsetof(struct orc_budget_file, bucket) == 128 && sizeof(struct orc_budget_file) == 128 + 3 * 384,
	       "version 2 of the file");
_Static_assert(__atomic_always_lock_free(8, 0) && __atomic_always_lock_free(4, 0), "a lock would be one process's own");

/* A process's view of the file. */
struct orc_budget {
	struct orc_budget_file *file;
	int fd;
	_Atomic bool alone; /* the kernel can't wait for two words: ORC_LOOK_ALONE */
};

/* Runner: until `*word` (its own, private to the process) is not `seen` any more, a limit of the budget is changed after
 * `changes` was read, or an absolute time; or sooner: the caller looks. */
void orc_budget_wait(orc_budget *, _Atomic uint32_t *word, uint32_t seen, uint32_t changes, orc_ns until);

#endif
