/* Who may enter Python: one vCPU's thread of a fleet at a time, and of those that wait the one whose tenant, and then whose
 * VM, had the interpreter for the shortest time.
 *
 * They would only fight for the interpreter's lock otherwise, which knows no order: eight guests that flood a port keep
 * the event loop from it for tens of milliseconds, as whoever is woken for it finds it taken again. Here they wait
 * without it, and the event loop has one rival at most.
 *
 * Start-time fair queuing (Goyal, Vin, Cheng, SIGCOMM 1996), on time held, in two levels: whoever was away starts where
 * the others are now, and has saved nothing up.
 *
 * What is behind the gate is other people's Python: a device may block. So the gate is no lock that anything relies on:
 * who has been in for longer than the gate's patience is passed, and who is commanded (to stop, to park) does not wait at all.
 * Nor did who blocked have the interpreter: of such a stay only the CPU time counts. By the clock, a device that blocks for a
 * second would come in again only when all the other tenants have had a second each. */
#include <time.h>

#include "core.h"

/* Entries. To ask for the CPU time of a thread costs about as much as an answer, so it is asked for only after a stay that was
 * too long, which itself counts as the gate's patience: one in so many is charged too little at the most. */
enum { WATCHED = 1000 };

static struct orc_share *share(const orc_vcpu *v, int level)
{
	orc_bucket *b = v->bucket[ORC_ANSWERS][level];

	return b ? orc_bucket_share(b) : NULL;
}

static int64_t get(const _Atomic int64_t *value)
{
	return atomic_load_explicit((_Atomic int64_t *)value, memory_order_relaxed);
}

static int64_t used(const struct orc_share *s)
{
	return s ? get(&s->used) : 0;
}

/* Whoever was away starts where the others are. */
static void catch_up(struct orc_share *s, int64_t now)
{
	int64_t was = used(s);

	/* If it fails, one that has passed who was in is adding to it: then it was not away. */
	if (s && was < now)
		atomic_compare_exchange_strong_explicit(&s->used, &was, now, memory_order_relaxed, memory_order_relaxed);
}

static void advance(_Atomic int64_t *now, int64_t to)
{
	if (to > get(now))
		atomic_store_explicit(now, to, memory_order_relaxed);
}

static void arrive(struct orc_gate *g, orc_vcpu *v)
{
	struct orc_share *tenant = share(v, ORC_TENANT);

	catch_up(tenant, get(&g->now));
	catch_up(share(v, ORC_VM), tenant ? get(&tenant->below) : get(&g->now));
}

static orc_ns cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (orc_ns)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* For how long it had the interpreter. */
static orc_ns had(const struct orc_gate *g, orc_vcpu *v, orc_ns now)
{
	orc_ns stay = now - v->gate_entered, ran = v->gate_watched ? cpu_time() - v->gate_cpu : 0;

	if (v->gate_watched)
		v->gate_watched--;
	if (stay <= g->patience)
		return stay;
	v->gate_watched = WATCHED;
	if (ran < g->patience)
		return g->patience;
	return ran < stay ? ran : stay;
}

/* It holds the gate from now on. */
static void admit(struct orc_gate *g, orc_vcpu *v, orc_ns now)
{
	struct orc_share *tenant = share(v, ORC_TENANT);

	v->gated = true;
	if (v->gate_watched)
		v->gate_cpu = cpu_time();
	v->gate_entered = now;
	atomic_store_explicit(&g->since, v->gate_entered, memory_order_relaxed);
	advance(&g->now, used(tenant));
	if (tenant)
		advance(&tenant->below, used(share(v, ORC_VM)));
}

/* g->lock. */
static void unlink_waiter(struct orc_gate *g, orc_vcpu *v)
{
	orc_vcpu **link = &g->first;

	while (*link != v)
		link = &(*link)->gate_next;
	*link = v->gate_next;
	atomic_fetch_sub_explicit(&g->waiting, 1, memory_order_seq_cst);
}

static bool before(const orc_vcpu *a, const orc_vcpu *b)
{
	int64_t ours = used(share(a, ORC_TENANT)), theirs = used(share(b, ORC_TENANT));

	return ours != theirs ? ours < theirs : used(share(a, ORC_VM)) < used(share(b, ORC_VM));
}

/* Whose turn it is; NULL: nobody waits. g->lock. */
static orc_vcpu *next_in_line(const struct orc_gate *g)
{
	orc_vcpu *best = g->first;

	for (orc_vcpu *v = best ? best->gate_next : NULL; v; v = v->gate_next)
		if (!before(best, v)) /* of two the same the one that came first, which is the later in the list */
			best = v;
	return best;
}

static bool take(struct orc_gate *g, orc_vcpu *from, orc_vcpu *to)
{
	return atomic_compare_exchange_strong_explicit(&g->holder, &from, to, memory_order_seq_cst, memory_order_relaxed);
}

/* In line until it holds the gate, or is commanded. g->lock. */
static bool wait_in_line(struct orc_gate *g, orc_vcpu *v)
{
	for (;;) {
		/* Read first: a command that comes later, and whoever hands the gate over, changes it. */
		uint32_t seen = atomic_load_explicit(&v->wakes, memory_order_seq_cst);
		orc_vcpu *holder = atomic_load_explicit(&g->holder, memory_order_seq_cst);
		orc_ns now = orc_now(), until;

		if (v->gate_given) /* and unlinked; if it slept too long to be passed as well, it goes in all the same */
			return true;
		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			unlink_waiter(g, v);
			return false;
		}
		until = get(&g->since) + g->patience;
		if ((!holder || now >= until) && next_in_line(g) == v) {
			if (!take(g, holder, v))
				continue;
			unlink_waiter(g, v);
			return true;
		}
		if (now >= until) /* somebody else is to pass who is in. The more wait, the less often each looks. */
			until = now + g->patience * (orc_ns)atomic_load_explicit(&g->waiting, memory_order_relaxed);
		pthread_mutex_unlock(&g->lock);
		orc_futex_wait_until(&v->wakes, seen, until);
		pthread_mutex_lock(&g->lock);
	}
}

void orc_gate_enter(orc_vcpu *v)
{
	struct orc_gate *g = &v->fleet->gate;
	bool held;

	arrive(g, v);
	if (take(g, NULL, v)) {
		/* An exit that comes straight here was accounted a moment ago: reading the clock is no small part of an answer. */
		admit(g, v, v->accounted ? v->accounted : orc_now());
		return;
	}
	pthread_mutex_lock(&g->lock);
	v->gate_given = false;
	v->gate_next = g->first;
	g->first = v;
	/* seq_cst, before the holder is looked at: who leaves stores the holder, and then looks at this. */
	atomic_fetch_add_explicit(&g->waiting, 1, memory_order_seq_cst);
	held = wait_in_line(g, v);
	pthread_mutex_unlock(&g->lock);
	if (held)
		admit(g, v, orc_now());
}

orc_ns orc_gate_leave(orc_vcpu *v)
{
	struct orc_gate *g = &v->fleet->gate;
	orc_vcpu *holder = v, *next;
	orc_ns now, time;

	if (!v->gated)
		return 0;
	v->gated = false;
	now = orc_now();
	time = had(g, v, now);
	for (int level = ORC_TENANT; level <= ORC_VM; level++) {
		struct orc_share *s = share(v, level);

		if (s)
			atomic_fetch_add_explicit(&s->used, time, memory_order_relaxed);
	}
	if (!atomic_load_explicit(&g->waiting, memory_order_seq_cst)) {
		if (!take(g, v, NULL)) /* it was passed: the gate is another's */
			return now;
		/* seq_cst: either who has just come to wait finds the gate free, or it is seen here. */
		if (!atomic_load_explicit(&g->waiting, memory_order_seq_cst))
			return now;
		holder = NULL;
	}
	pthread_mutex_lock(&g->lock);
	next = next_in_line(g);
	if (take(g, holder, next) && next) {
		atomic_store_explicit(&g->since, now, memory_order_relaxed);
		unlink_waiter(g, next);
		next->gate_given = true;
		orc_vcpu_wake(next); /* by the lock: it can't be gone before */
	}
	pthread_mutex_unlock(&g->lock);
	return now;
}
