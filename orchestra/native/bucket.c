#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

#define UNIT 65536.0 /* ticket numbers per token: 1.5e-5 tokens */
#define FAR ((double)(INT64_MAX / 4))

/* Ticket numbers and made tokens wrap (after 39 hours at 1e9 a second, which is what "practically unlimited" gets set
 * to): only their differences mean anything. No debt is larger than this: bursts are at most 1e9 tokens, and beyond the
 * burst a bucket owes each vCPU that waits what its last exit was charged, which is a page of bytes at most, so 4096
 * tokens. A `last` that seems further ahead lies far behind. */
#define DEBT ((int64_t)1 << 50)

/* Once is enough unless the limit changes meanwhile. More changes than these in the time of one reading (tens of ns), of one
 * word's writing, of one change of our own, or of one charge, are an attack on the budget by one who shares it, which no
 * number would outlast. */
enum { READ_TRIES = 1000, WORD_TRIES = 20, SET_TRIES = 100, CHARGE_TRIES = 1000 };

/* The bucket of one process, with what only that process needs. */
struct private_bucket {
	orc_bucket bucket;
	struct orc_share share;
};

struct limit {
	bool limited;
	orc_ns since, max_delay;
	int64_t made, tolerance, owed, freed;
	double part, per_ns;
};

static orc_bucket *writable(const orc_bucket *b)
{
	return (orc_bucket *)b; /* C11 atomic loads want it without const */
}

/* Value and number at once, if they are still these; else what they are. All CPUs that have VMX or SVM have the instruction. gcc
 * would call a library, which may take a lock, and ThreadSanitizer takes one: of its own process. */
static bool exchange_word(struct orc_word *w, int64_t *value, uint64_t *number, int64_t to_value, uint64_t to_number)
{
	bool done;

	__asm__ volatile("lock cmpxchg16b %1"
			 : "=@ccz"(done), "+m"(*w), "+a"(*value), "+d"(*number)
			 : "b"(to_value), "c"(to_number)
			 : "memory");
	return done;
}

static double get_double(struct orc_word *w)
{
	int64_t bits = atomic_load_explicit(&w->value, memory_order_acquire);
	double x;

	memcpy(&x, &bits, sizeof x);
	return x;
}

static int64_t get(struct orc_word *w)
{
	return atomic_load_explicit(&w->value, memory_order_acquire);
}

/* The limit in force when `control` was what it returns. */
ORC_HOT static uint64_t read_limit(const orc_bucket *constant, struct limit *l)
{
	orc_bucket *b = writable(constant);
	uint64_t control = atomic_load_explicit(&b->control, memory_order_acquire), before;
	int tries = READ_TRIES;

	do {
		struct orc_word *w = b->slot[control & ORC_SLOT];

		before = control;
		l->limited = control & ORC_LIMITED;
		l->since = get(&w[ORC_SINCE]);
		l->made = get(&w[ORC_MADE]);
		l->part = get_double(&w[ORC_PART]);
		l->per_ns = get_double(&w[ORC_PER_NS]);
		l->tolerance = get(&w[ORC_TOLERANCE]);
		l->max_delay = get(&w[ORC_MAX_DELAY]);
		l->owed = get(&w[ORC_OWED]);
		l->freed = get(&w[ORC_FREED]);
		control = atomic_load_explicit(&b->control, memory_order_acquire);
	} while (control != before && --tries);
	return control;
}

/* Into a slot that the change `number` has claimed. False: a later one has, or it is written to all the time: those who keep
 * to the rules write a word once for each claim, with numbers that only grow. */
static bool write_word(struct orc_word *w, uint64_t number, int64_t to)
{
	uint64_t was = atomic_load_explicit(&w->number, memory_order_relaxed);
	int64_t value = atomic_load_explicit(&w->value, memory_order_relaxed);

	for (int tries = WORD_TRIES; tries && was < number; tries--)
		if (exchange_word(w, &value, &was, to, number))
			return true;
	return false;
}

static bool write_limit(struct orc_word *w, uint64_t number, const struct limit *l)
{
	int64_t part, per_ns;

	memcpy(&part, &l->part, sizeof part);
	memcpy(&per_ns, &l->per_ns, sizeof per_ns);
	return write_word(&w[ORC_SINCE], number, l->since) && write_word(&w[ORC_MADE], number, l->made) &&
	       write_word(&w[ORC_PART], number, part) && write_word(&w[ORC_PER_NS], number, per_ns) &&
	       write_word(&w[ORC_TOLERANCE], number, l->tolerance) && write_word(&w[ORC_MAX_DELAY], number, l->max_delay) &&
	       write_word(&w[ORC_OWED], number, l->owed) && write_word(&w[ORC_FREED], number, l->freed);
}

/* Also of what is no number, which a file may hold. */
static int64_t to_int(double x)
{
	return !(x < FAR) ? INT64_MAX / 4 : x <= -FAR ? -(INT64_MAX / 4) : (int64_t)x;
}

static int64_t plus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a + (uint64_t)b);
}

static int64_t minus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a - (uint64_t)b);
}

/* Units made between `since` and `t`, with the part that there was. */
ORC_HOT static double more(const struct limit *l, orc_ns t)
{
	/* A runner may have read the clock just before the limit was set: time never runs backwards here. */
	return t <= l->since ? l->part : l->part + (double)minus(t, l->since) * l->per_ns;
}

/* Tokens made by `t`, in whole units; *part is what there is of the next one. */
ORC_HOT static int64_t tokens(const struct limit *l, orc_ns t, double *part)
{
	double m = more(l, t);

	*part = 0;
	if (!(m < FAR)) /* it wraps: 1e9 a second for as long as a clock counts is below 2^94. What is no number makes none */
		return m < 0x1p100 ? plus(l->made, (int64_t)(uint64_t)(unsigned __int128)m) : l->made;
	*part = m - (double)to_int(m);
	return plus(l->made, to_int(m));
}

orc_bucket *orc_bucket_new(void)
{
	struct private_bucket *b = aligned_alloc(ORC_CACHE_LINE, sizeof *b);

	if (!b)
		return NULL;
	memset(b, 0, sizeof *b);
	return &b->bucket;
}

void orc_bucket_free(orc_bucket *b)
{
	if (b)
		free(ORC_CONTAINER(b, struct private_bucket, bucket));
}

struct orc_share *orc_bucket_share(orc_bucket *b)
{
	return &ORC_CONTAINER(b, struct private_bucket, bucket)->share;
}

ORC_HOT bool orc_bucket_limited(const orc_bucket *b)
{
	return atomic_load_explicit(&writable(b)->control, memory_order_relaxed) & ORC_LIMITED;
}

/* How far ahead of the tokens the last ticket is. */
ORC_HOT static int64_t debt_of(int64_t last, int64_t made)
{
	int64_t debt = minus(last, made);

	return debt < 0 || debt > DEBT ? 0 : debt;
}

/* What is still owed of a burst that was enlarged. It counts in time since then, which does not wrap. */
ORC_HOT static int64_t still_owed(const struct limit *l, orc_ns now)
{
	double made = more(l, now);

	return l->owed > 0 && l->owed <= DEBT && made < (double)l->owed ? l->owed - to_int(made) : 0;
}

/* A limit is set again: of what the bucket owes beyond its burst, the part of those who went while there was none. They went
 * free; if the others paid for them, each change to and fro would put the next turn further off. */
static int64_t gone_free(orc_bucket *b, const struct limit *old, int64_t made)
{
	int64_t owed = minus(debt_of(atomic_load_explicit(&b->last, memory_order_acquire), made), old->tolerance);
	int64_t freed = minus(atomic_load_explicit(&b->freed, memory_order_acquire), old->freed);

	return owed <= 0 || freed <= 0 ? 0 : owed < freed ? owed : freed;
}

/* The limit after `old`. Nothing but reading: until it is published, nothing has changed. */
static struct limit changed(orc_bucket *b, const struct limit *old, bool begun, double rate, double burst, orc_ns max_delay,
			    orc_ns now)
{
	struct limit l = *old;

	l.limited = rate > 0;
	l.made = tokens(old, now, &l.part);
	l.since = now > old->since ? now : old->since;
	l.owed = still_owed(old, now);
	if (!l.limited) {
		/* It goes on as it is, and nobody is charged: taking a limit off and setting it again makes no tokens that the
		 * old rate would not have made. */
		if (old->limited)
			l.freed = atomic_load_explicit(&b->freed, memory_order_acquire);
		return l;
	}
	l.tolerance = to_int((burst - 1.0) * UNIT);
	l.per_ns = rate * UNIT / 1e9;
	l.max_delay = max_delay;
	if (!begun) {
		l.made = atomic_load_explicit(&b->last, memory_order_acquire); /* its first limit: it starts full */
		return l;
	}
	if (!old->limited)
		l.made = plus(l.made, gone_free(b, old, l.made));
	/* Whoever waits keeps its distance in tokens, and so does the bucket: what was used of a larger burst is no debt to be
	 * paid at the new rate, and a larger one is earned and not given, or changing it to and fro would make tokens. The
	 * latter is what is owed: a full bucket's `last` lies somewhere behind, and must not be moved from here, where a later
	 * change may be in force by then. */
	l.made = plus(l.made, minus(old->tolerance, l.tolerance));
	l.owed = plus(l.owed, minus(l.tolerance, old->tolerance));
	if (l.owed < 0)
		l.owed = 0;
	return l;
}

int orc_bucket_set(orc_bucket *b, double rate, double burst, orc_ns max_delay, orc_ns now)
{
	const uint64_t one = ORC_FLAGS + 1;

	for (int tries = SET_TRIES; tries; tries--) {
		uint64_t before = atomic_load_explicit(&b->control, memory_order_acquire), claimed = before + one, published;
		struct limit old, l;

		if (!atomic_compare_exchange_strong_explicit(&b->control, &before, claimed, memory_order_seq_cst,
							     memory_order_relaxed))
			continue;
		if (read_limit(b, &old) == claimed) { /* else there is another claim, which will win */
			l = changed(b, &old, claimed & ORC_BEGUN, rate, burst, max_delay, now);
			published = ((claimed + one) ^ ORC_SLOT) & ~(uint64_t)ORC_LIMITED;
			published |= l.limited ? ORC_LIMITED | ORC_BEGUN : 0;
			if (write_limit(b->slot[~claimed & ORC_SLOT], claimed / one, &l) &&
			    atomic_compare_exchange_strong_explicit(&b->control, &claimed, published, memory_order_seq_cst,
								    memory_order_relaxed))
				return 0;
		}
		sched_yield(); /* or two that claim in turn might go on for long */
	}
	return -EBUSY;
}

bool orc_bucket_charge(orc_bucket *b, orc_ns now, struct orc_ticket *out)
{
	return orc_bucket_charge_many(b, 1, now, out);
}

/* Units of debt that max_delay lets pile up. */
ORC_HOT static int64_t most(const struct limit *l)
{
	return l->max_delay < 0 ? INT64_MAX : plus(l->tolerance, to_int((double)l->max_delay * l->per_ns));
}

/* So many of `units` as are left of what is given once. */
ORC_HOT static int64_t from_once(orc_bucket *b, int64_t units)
{
	int64_t once = atomic_load_explicit(&b->once, memory_order_relaxed);

	for (int tries = CHARGE_TRIES; once > 0 && tries; tries--) {
		int64_t used = once < units ? once : units;

		if (atomic_compare_exchange_weak_explicit(&b->once, &once, once - used, memory_order_acq_rel,
							  memory_order_relaxed))
			return used;
	}
	return 0;
}

void orc_bucket_set_once(orc_bucket *b, double tokens)
{
	int64_t most = to_int(tokens * UNIT), given = atomic_load_explicit(&b->once_given, memory_order_relaxed);
	int64_t once = atomic_load_explicit(&b->once, memory_order_relaxed), left;

	if (most > given)
		atomic_store_explicit(&b->once_given, most, memory_order_relaxed);
	do {
		left = plus(once, most > given ? minus(most, given) : 0);
		left = left < most ? left : most;
	} while (!atomic_compare_exchange_weak_explicit(&b->once, &once, left, memory_order_acq_rel, memory_order_relaxed));
}

ORC_HOT bool orc_bucket_charge_many(orc_bucket *b, orc_u64 n, orc_ns now, struct orc_ticket *out)
{
	int64_t events = (int64_t)n * (int64_t)UNIT;
	struct limit l;
	double part;
	int64_t made, owed, last, debt, kept, limit, least;
	int tries = CHARGE_TRIES;

	read_limit(b, &l);
	made = tokens(&l, now, &part);
	events -= from_once(b, events);
	if (!events) {
		*out = (struct orc_ticket){.number = made, .charged = now};
		return false;
	}
	least = events < (int64_t)UNIT ? events : (int64_t)UNIT;
	owed = still_owed(&l, now);
	limit = most(&l);
	last = atomic_load_explicit(&b->last, memory_order_relaxed);
	do {
		debt = debt_of(last, made);
		if (debt < owed)
			debt = owed;
		kept = debt + events;
		/* What max_delay lets go early must not pile up as a debt that others pay for long afterwards. */
		if (kept > limit)
			kept = limit > debt ? limit : debt;
		if (kept < least) /* a max_delay shorter than a token still leaves this event's own */
			kept = debt + least;
		if (!tries--) { /* an addition always succeeds: the others still pay for this ticket */
			atomic_fetch_add_explicit(&b->last, kept - debt, memory_order_acq_rel);
			break;
		}
	} while (!atomic_compare_exchange_weak_explicit(&b->last, &last, plus(made, kept), memory_order_acq_rel,
							memory_order_relaxed));
	out->number = plus(made, debt + events);
	out->charged = now;
	out->waits = debt + events > l.tolerance ? kept - debt : 0;
	return debt + events > l.tolerance;
}

void orc_bucket_leave(orc_bucket *b, struct orc_ticket *ticket)
{
	struct limit l;
	int64_t ahead;

	if (ticket->waits && !orc_bucket_limited(b)) {
		read_limit(b, &l);
		ahead = minus(minus(ticket->number, l.made), l.tolerance); /* made when the limit was taken off */
		if (!l.limited && ahead > 0) /* it goes free */
			atomic_fetch_add_explicit(&b->freed, ahead < ticket->waits ? ahead : ticket->waits, memory_order_acq_rel);
	}
	ticket->waits = 0;
}

void orc_bucket_turn(const orc_bucket *b, const struct orc_ticket *ticket, orc_ns *by_tokens, orc_ns *by_delay)
{
	struct limit l;
	orc_ns from;
	int64_t ahead;
	double part;

	read_limit(b, &l);
	from = ticket->charged > l.since ? ticket->charged : l.since;
	*by_tokens = ORC_NEVER;
	*by_delay = INT64_MAX;
	if (!l.limited)
		return;
	ahead = minus(minus(ticket->number, tokens(&l, from, &part)), l.tolerance);
	if (ahead > 0)
		*by_tokens = plus(from, to_int(((double)ahead - part) / l.per_ns + 1.0));
	if (l.max_delay >= 0)
		*by_delay = plus(ticket->charged, l.max_delay);
}

void orc_bucket_limit(const orc_bucket *b, orc_ns now, struct orc_limit *out)
{
	struct limit l;
	int64_t debt, owed;
	double part;

	read_limit(b, &l);
	debt = debt_of(atomic_load_explicit(&writable(b)->last, memory_order_acquire), tokens(&l, now, &part));
	owed = still_owed(&l, now);
	out->rate = l.limited ? l.per_ns * 1e9 / UNIT : 0;
	out->burst = (double)l.tolerance / UNIT + 1;
	out->debt = (double)(debt > owed ? debt : owed) / UNIT;
	out->max_delay = l.max_delay;
	out->once = (double)atomic_load_explicit(&writable(b)->once, memory_order_relaxed) / UNIT;
}
