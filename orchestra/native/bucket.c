#include <stdlib.h>

#include "core.h"

#define UNIT 65536.0 /* ticket numbers per token: 1.5e-5 tokens */
#define FAR ((double)(INT64_MAX / 4))

/* Ticket numbers and made tokens wrap (after 39 hours at 1e9 a second, which is what "practically unlimited" gets set
 * to): only their differences mean anything. No debt is larger than this: bursts are at most 1e9 tokens, and beyond the
 * burst a bucket owes each vCPU that waits what its last exit was charged, which is a page of bytes at most, so 4096
 * tokens. A `last` that seems further ahead lies far behind. */
#define DEBT ((int64_t)1 << 50)

struct orc_bucket {
	_Alignas(ORC_CACHE_LINE) _Atomic int64_t last; /* the last ticket given */
	_Atomic int64_t waiting; /* units of it whose turn had not come, and whose holders have not gone */

	/* The limit, by a sequence lock: writers are rare (the owner), readers are the runners' every charge. */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t version; /* odd while being written */
	_Atomic bool limited;
	_Atomic orc_ns since;         /* tokens(since) == made + part */
	_Atomic int64_t made;
	_Atomic double part;          /* of the next unit: who changes a slow limit often would else never see one made */
	_Atomic double per_ns;        /* units a nanosecond */
	_Atomic int64_t tolerance;    /* (burst - 1) units */
	_Atomic orc_ns max_delay;     /* < 0: unbounded */
	_Atomic int64_t most;         /* units of debt that max_delay lets pile up */
	pthread_mutex_t lock;         /* among writers */
	bool begun;                   /* it has had a limit; lock */
	struct orc_share share;
};

struct limit {
	bool limited;
	orc_ns since, max_delay;
	int64_t made, tolerance, most;
	double part, per_ns;
};

static struct limit read_limit(const orc_bucket *constant)
{
	orc_bucket *b = (orc_bucket *)constant; /* C11 atomic loads want it without const */
	struct limit l;
	uint32_t before, after;

	do {
		before = atomic_load_explicit(&b->version, memory_order_acquire);
		l.limited = atomic_load_explicit(&b->limited, memory_order_acquire);
		l.since = atomic_load_explicit(&b->since, memory_order_acquire);
		l.made = atomic_load_explicit(&b->made, memory_order_acquire);
		l.part = atomic_load_explicit(&b->part, memory_order_acquire);
		l.per_ns = atomic_load_explicit(&b->per_ns, memory_order_acquire);
		l.tolerance = atomic_load_explicit(&b->tolerance, memory_order_acquire);
		l.max_delay = atomic_load_explicit(&b->max_delay, memory_order_acquire);
		l.most = atomic_load_explicit(&b->most, memory_order_acquire);
		after = atomic_load_explicit(&b->version, memory_order_relaxed);
	} while ((before & 1) || before != after);
	return l;
}

static int64_t to_int(double x)
{
	return x >= FAR ? INT64_MAX / 4 : x <= -FAR ? -(INT64_MAX / 4) : (int64_t)x;
}

static int64_t plus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a + (uint64_t)b);
}

static int64_t minus(int64_t a, int64_t b)
{
	return (int64_t)((uint64_t)a - (uint64_t)b);
}

/* Tokens made by `t`, in whole units; *part is what there is of the next one. */
static int64_t tokens(const struct limit *l, orc_ns t, double *part)
{
	double more;

	*part = l->part;
	/* A runner may have read the clock just before the limit was set: time never runs backwards here. */
	if (t <= l->since)
		return l->made;
	more = l->part + (double)(t - l->since) * l->per_ns;
	if (more >= FAR) {
		*part = 0;
		return plus(l->made, (int64_t)(uint64_t)(unsigned __int128)more);
	}
	*part = more - (double)(int64_t)more;
	return plus(l->made, (int64_t)more);
}

orc_bucket *orc_bucket_new(void)
{
	orc_bucket *b = aligned_alloc(ORC_CACHE_LINE, sizeof *b);

	if (!b)
		return NULL;
	*b = (orc_bucket){0};
	pthread_mutex_init(&b->lock, NULL);
	return b;
}

void orc_bucket_free(orc_bucket *b)
{
	if (!b)
		return;
	pthread_mutex_destroy(&b->lock);
	free(b);
}

struct orc_share *orc_bucket_share(orc_bucket *b)
{
	return &b->share;
}

bool orc_bucket_limited(const orc_bucket *b)
{
	return atomic_load_explicit(&((orc_bucket *)b)->limited, memory_order_relaxed);
}

/* How far ahead of the tokens the last ticket is. */
static int64_t debt_of(int64_t last, int64_t made)
{
	int64_t debt = minus(last, made);

	return debt < 0 || debt > DEBT ? 0 : debt;
}

/* What a bucket made beyond its burst is void, before the burst becomes another. `last` is raised and `made` not lowered, as a
 * charge that is at it just now would take what is between the two for a debt. */
static void overflow(orc_bucket *b, int64_t made)
{
	int64_t last = atomic_load_explicit(&b->last, memory_order_acquire);

	while (!debt_of(last, made) &&
	       !atomic_compare_exchange_weak_explicit(&b->last, &last, made, memory_order_acq_rel, memory_order_acquire))
		;
}

/* A limit is set again: of what the bucket owes beyond its burst, the part of those who went while there was none. They went
 * free; if the others paid for them, each change to and fro would put the next turn further off. */
static int64_t gone_free(orc_bucket *b, int64_t made, int64_t tolerance)
{
	int64_t owed = debt_of(atomic_load_explicit(&b->last, memory_order_acquire), made) - tolerance;
	int64_t waiting = atomic_load_explicit(&b->waiting, memory_order_acquire);

	return owed > waiting ? owed - waiting : 0;
}

static void put(orc_bucket *b, const struct limit *l)
{
	atomic_fetch_add_explicit(&b->version, 1, memory_order_acq_rel);
	/* Release stores: a reader that sees one of them also sees the odd version. */
	atomic_store_explicit(&b->limited, l->limited, memory_order_release);
	atomic_store_explicit(&b->since, l->since, memory_order_release);
	atomic_store_explicit(&b->made, l->made, memory_order_release);
	atomic_store_explicit(&b->part, l->part, memory_order_release);
	atomic_store_explicit(&b->per_ns, l->per_ns, memory_order_release);
	atomic_store_explicit(&b->tolerance, l->tolerance, memory_order_release);
	atomic_store_explicit(&b->max_delay, l->max_delay, memory_order_release);
	atomic_store_explicit(&b->most, l->most, memory_order_release);
	atomic_fetch_add_explicit(&b->version, 1, memory_order_release);
}

void orc_bucket_set(orc_bucket *b, double rate, double burst, orc_ns max_delay, orc_ns now)
{
	struct limit l, old;

	pthread_mutex_lock(&b->lock);
	l = old = read_limit(b);
	l.limited = rate > 0;
	l.made = tokens(&old, now, &l.part);
	l.since = now > old.since ? now : old.since;
	if (l.limited) {
		l.tolerance = to_int((burst - 1.0) * UNIT);
		l.per_ns = rate * UNIT / 1e9;
		l.max_delay = max_delay;
		l.most = max_delay < 0 ? INT64_MAX : l.tolerance + to_int((double)max_delay * l.per_ns);
		if (!b->begun) {
			atomic_store_explicit(&b->last, l.made, memory_order_release); /* its first limit: it starts full */
		} else {
			overflow(b, l.made);
			if (!old.limited)
				l.made = plus(l.made, gone_free(b, l.made, old.tolerance));
			/* Whoever waits keeps its distance in tokens, and so does the bucket: what was used of a larger burst
			 * is no debt to be paid at the new rate, and a larger one is earned and not given, or changing it to
			 * and fro would make tokens. */
			l.made = plus(l.made, old.tolerance - l.tolerance);
		}
		b->begun = true;
	}
	/* Else it goes on as it is, and nobody is charged: taking a limit off and setting it again makes no tokens that the old
	 * rate would not have made. */
	put(b, &l);
	pthread_mutex_unlock(&b->lock);
}

bool orc_bucket_charge(orc_bucket *b, orc_ns now, struct orc_ticket *out)
{
	return orc_bucket_charge_many(b, 1, now, out);
}

bool orc_bucket_charge_many(orc_bucket *b, orc_u64 n, orc_ns now, struct orc_ticket *out)
{
	const int64_t events = (int64_t)n * (int64_t)UNIT;
	struct limit l = read_limit(b);
	double part;
	int64_t made = tokens(&l, now, &part), last, debt, kept;

	last = atomic_load_explicit(&b->last, memory_order_relaxed);
	do {
		debt = debt_of(last, made);
		kept = debt + events;
		/* What max_delay lets go early must not pile up as a debt that others pay for long afterwards. */
		if (kept > l.most)
			kept = l.most > debt ? l.most : debt;
		if (kept < (int64_t)UNIT) /* a max_delay shorter than a token still leaves this event's own */
			kept = debt + (int64_t)UNIT;
	} while (!atomic_compare_exchange_weak_explicit(&b->last, &last, plus(made, kept), memory_order_acq_rel,
							memory_order_relaxed));
	out->number = plus(made, debt + events);
	out->charged = now;
	out->waits = debt + events > l.tolerance ? events : 0;
	if (out->waits)
		atomic_fetch_add_explicit(&b->waiting, out->waits, memory_order_acq_rel);
	return out->waits;
}

void orc_bucket_leave(orc_bucket *b, struct orc_ticket *ticket)
{
	if (ticket->waits)
		atomic_fetch_sub_explicit(&b->waiting, ticket->waits, memory_order_acq_rel);
	ticket->waits = 0;
}

void orc_bucket_turn(const orc_bucket *b, const struct orc_ticket *ticket, orc_ns *by_tokens, orc_ns *by_delay)
{
	struct limit l = read_limit(b);
	orc_ns from = ticket->charged > l.since ? ticket->charged : l.since;
	int64_t ahead;
	double part;

	*by_tokens = ORC_NEVER;
	*by_delay = INT64_MAX;
	if (!l.limited)
		return;
	ahead = minus(ticket->number, tokens(&l, from, &part)) - l.tolerance;
	if (ahead > 0)
		*by_tokens = from + to_int(((double)ahead - part) / l.per_ns + 1.0);
	if (l.max_delay >= 0)
		*by_delay = ticket->charged + l.max_delay;
}
