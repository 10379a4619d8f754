#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

orc_ns orc_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (orc_ns)t.tv_sec * 1000000000 + t.tv_nsec;
}

orc_vcpu *orc_vcpu_new(orc_fleet *f, uint32_t id, uint32_t ring_records)
{
	orc_vcpu *v = orc_stock_vcpu(&f->stock);

	if (!v) {
		errno = ENOMEM;
		return NULL;
	}
	v->fleet = f;
	v->id = id;
	v->fd = -1;
	v->accesses = 1;
	v->ring.mask = ring_records - 1;
	atomic_fetch_add_explicit(&f->vcpus, 1, memory_order_relaxed);
	return v;
}

/* It waits no more for what it holds tickets of. */
static void leave(orc_vcpu *v)
{
	for (int meter = 0; meter < ORC_METERS; meter++)
		for (int level = 0; level < ORC_LEVELS; level++)
			if (v->ticket[meter][level].waits)
				orc_bucket_leave(v->bucket[meter][level], &v->ticket[meter][level]);
	v->waiting = false;
}

static size_t ring_size(const orc_vcpu *v)
{
	return ((size_t)v->ring.mask + 1) * sizeof(struct orc_record);
}

static void let_go(orc_vcpu *v)
{
	orc_vcpu_cap(v, 1); /* first: until then the capper may be about to kick it */
	v->run = NULL;
	v->fd = -1;
	v->dirty = NULL;
	v->emulator = NULL;
	v->witness = NULL;
	v->slot = NULL;
	v->slots = 0;
}

void orc_vcpu_unbind(orc_vcpu *v)
{
	let_go(v);
	orc_stock_trim(&v->fleet->stock); /* here, as whoever has many vCPUs does this on another thread than the owner's */
}

void orc_vcpu_free(orc_vcpu *v)
{
	if (!v)
		return;
	let_go(v);
	orc_leave_buses(v);
	leave(v);
	orc_profile_free(v);
	if (v->ring.records)
		munmap(v->ring.records, ring_size(v));
	orc_retire(v);
}

void orc_vcpu_set_bucket(orc_vcpu *v, int meter, int level, orc_bucket *b)
{
	v->bucket[meter][level] = b;
}

void orc_vcpu_set_buckets(orc_vcpu *v, orc_bucket *const buckets[ORC_METERS * ORC_LEVELS])
{
	for (int meter = 0; meter < ORC_METERS; meter++)
		for (int level = 0; level < ORC_LEVELS; level++)
			v->bucket[meter][level] = buckets[meter * ORC_LEVELS + level];
}

void orc_vcpu_name(orc_vcpu *v, uint32_t vm, uint32_t vcpu)
{
	v->vm = vm;
	v->number = vcpu;
}

int orc_vcpu_subscribe(orc_vcpu *v, orc_u64 mask)
{
	if (mask && !v->ring.records) {
		/* Only now: a vCPU that nobody listens to needs no ring, and each mapping of a process makes its next
		 * KVM_CREATE_VM slower. Mapped, so that it costs memory only as it is written. */
		void *records = mmap(NULL, ring_size(v), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
				     -1, 0);

		if (records == MAP_FAILED)
			return -errno;
		v->ring.records = records;
	}
	/* Release: whoever sees the mask sees the ring. */
	atomic_store_explicit(&v->event_mask, mask, memory_order_release);
	return 0;
}

void orc_vcpu_hold(orc_vcpu *v)
{
	atomic_fetch_or_explicit(&v->commands, ORC_HOLD, memory_order_seq_cst);
}

/* ---- accounting ----------------------------------------------------------------------------------------------- */

/* Takes a ticket for `n` events of each limited bucket. *waits is set if one's turn has not come. */
static bool charge(orc_vcpu *v, int meter, orc_u64 n, orc_ns now, bool *waits)
{
	bool charged = false;

	for (int level = 0; level < ORC_LEVELS; level++) {
		orc_bucket *b = v->bucket[meter][level];

		/* number 0: no ticket. (Numbers wrap, so one real ticket in 2^64 goes free.) */
		v->ticket[meter][level].number = 0;
		if (b && orc_bucket_limited(b)) {
			*waits |= orc_bucket_charge_many(b, n, now, &v->ticket[meter][level]);
			charged = true;
		}
	}
	return charged;
}

/* The slowest bucket's turn, and which bucket that is; *by_tokens: had there been no max_delay. */
static orc_ns turn(const orc_vcpu *v, orc_ns *by_tokens, unsigned *slowest)
{
	orc_ns at = ORC_NEVER;

	*by_tokens = ORC_NEVER;
	*slowest = 0;
	for (int meter = 0; meter < ORC_METERS; meter++) {
		if (!v->charged[meter])
			continue;
		for (int level = 0; level < ORC_LEVELS; level++) {
			orc_ns tokens, delay;

			if (!v->ticket[meter][level].number)
				continue;
			orc_bucket_turn(v->bucket[meter][level], &v->ticket[meter][level], &tokens, &delay);
			if (tokens > *by_tokens)
				*by_tokens = tokens;
			if ((tokens < delay ? tokens : delay) > at) {
				at = tokens < delay ? tokens : delay;
				*slowest = (unsigned)(meter * ORC_LEVELS + level);
			}
		}
	}
	return at;
}

orc_ns orc_vcpu_turn(const orc_vcpu *v)
{
	orc_ns by_tokens;
	unsigned slowest;

	return v->waiting ? turn(v, &by_tokens, &slowest) : ORC_NEVER;
}

void orc_vcpu_weigh(orc_vcpu *v, uint32_t accesses)
{
	v->accesses = accesses;
}

void orc_vcpu_answered(orc_vcpu *v, uint32_t accesses, orc_ns now)
{
	bool waits = false;
	orc_ns by_tokens;
	unsigned slowest;

	orc_count(&v->answered, accesses);
	/* A later ticket of a bucket is behind an earlier one: it stands for both. */
	for (int level = 0; level < ORC_LEVELS; level++)
		if (v->ticket[ORC_ANSWERS][level].waits)
			orc_bucket_leave(v->bucket[ORC_ANSWERS][level], &v->ticket[ORC_ANSWERS][level]);
	v->charged[ORC_ANSWERS] = charge(v, ORC_ANSWERS, accesses, now, &waits);
	if (waits && turn(v, &by_tokens, &slowest) > now)
		v->waiting = true;
	else if (!v->waiting)
		leave(v);
}

enum orc_why orc_run(orc_vcpu *v, enum orc_why (*guest)(orc_vcpu *))
{
	orc_ns now = v->gated ? orc_gate_leave(v) : 0;

	for (;; now = 0) {
		enum orc_why why;

		if (v->access.count) /* so many were answered, which may be fewer than Python was asked for */
			orc_vcpu_answered(v, v->access.count, now ? now : orc_now());
		v->accounted = 0;
		why = guest(v);
		if (why != ORC_IO && why != ORC_MMIO)
			return why;
		if (!v->access.task) {
			orc_gate_enter(v);
			return why;
		}
		orc_ask(v, orc_now());
		if (!orc_ask_wait(v))
			return ORC_ASKED;
	}
}

orc_ns orc_vcpu_account(orc_vcpu *v, struct orc_record *record, orc_ns now)
{
	return orc_account(v, record, now, orc_is_subscribed(v, record->reason, record->flags));
}

orc_ns orc_account(orc_vcpu *v, struct orc_record *record, orc_ns now, bool subscribed)
{
	unsigned reason = record->reason < ORC_REASONS ? record->reason : ORC_REASONS - 1;
	bool bus_lock = record->flags & KVM_RUN_X86_BUS_LOCK, waits = false;
	orc_ns at = ORC_NEVER, by_tokens;
	unsigned slowest;

	v->accounted = now;
	if (bus_lock) {
		orc_count(&v->bus_locks, 1);
		orc_profile_lock(v, record);
	}
	/* seq_cst: counted before orc_push reads `queued`, so that whoever takes us from the stack sees this exit. */
	atomic_store_explicit(&v->exits[reason], atomic_load_explicit(&v->exits[reason], memory_order_relaxed) + 1,
			      memory_order_seq_cst);
	orc_push(&v->fleet->active, &v->active);

	if (v->waiting) /* the turn it waited for is another's now: what completed its last access was an exit as well */
		leave(v);
	v->charged[ORC_BUS_LOCKS] = bus_lock && charge(v, ORC_BUS_LOCKS, 1, now, &waits);
	v->charged[ORC_EXITS] = charge(v, ORC_EXITS, v->accesses, now, &waits);
	v->charged[ORC_ANSWERS] = false; /* who answers is not known yet: orc_vcpu_answered */
	v->accesses = 1;
	if (waits) {
		at = turn(v, &by_tokens, &slowest);
		v->waiting = at > now;
		if (!v->waiting) {
			leave(v);
			at = ORC_NEVER;
		}
	}
	v->wait_counted = false;

	if (subscribed) {
		record->time = (orc_u64)now;
		record->wait = at == ORC_NEVER ? 0 : (orc_u64)(at - now);
		record->id = v->id;
		record->vm = v->vm;
		record->vcpu = v->number;
		orc_ring_put(v, record);
	}
	return at;
}

/* ---- waiting -------------------------------------------------------------------------------------------------- */

/* The runner's own view. */
static struct orc_wait *wait_in_force(orc_vcpu *v)
{
	return &v->wait[atomic_load_explicit(&v->wait_version, memory_order_relaxed) & 1];
}

/* What was waited since the last such step was for the bucket that was the slowest then; from `since` on it is for this one
 * (0: no wait). Tickets stay as they are, so which bucket is the slowest changes with limits only.
 *
 * All or nothing: a reader that saw the sum with a wait in it and that wait still on would count it twice. It writes what
 * no reader looks at, and then says that this is in force: a runner that loses its CPU in between (a guest can be capped,
 * and have used up its part) keeps nobody waiting, as it would with one copy and a version that is odd meanwhile. */
static void wait_step(orc_vcpu *v, orc_ns now, orc_ns since, unsigned slowest)
{
	uint32_t version = atomic_load_explicit(&v->wait_version, memory_order_relaxed) + 1;
	struct orc_wait *next = &v->wait[version & 1], *past = wait_in_force(v);
	orc_ns before = atomic_load_explicit(&past->since, memory_order_relaxed);
	unsigned whose = atomic_load_explicit(&past->slowest, memory_order_relaxed);

	/* Release: a reader that sees one of them also sees the version before this one, and so that its copy is changing. */
	for (unsigned i = 0; i < ORC_METERS * ORC_LEVELS; i++)
		atomic_store_explicit(&next->held[i], atomic_load_explicit(&past->held[i], memory_order_relaxed) +
				      (before && i == whose ? (orc_u64)(now - before) : 0), memory_order_release);
	atomic_store_explicit(&next->slowest, slowest, memory_order_release);
	atomic_store_explicit(&next->since, since, memory_order_release);
	/* seq_cst: it waits before orc_push reads `queued`, as the owner clears `queued` before it asks whether it does. */
	atomic_store_explicit(&v->wait_version, version, memory_order_seq_cst);
}

bool orc_vcpu_waits(orc_vcpu *v)
{
	uint32_t version = atomic_load_explicit(&v->wait_version, memory_order_seq_cst);

	return atomic_load_explicit(&v->wait[version & 1].since, memory_order_relaxed);
}

void orc_vcpu_wait_begin(orc_vcpu *v, orc_ns now)
{
	orc_ns by_tokens;
	unsigned slowest;

	if (!v->wait_counted) /* one wait until it is served, however often it is interrupted */
		orc_count(&v->waits, 1);
	v->wait_counted = true;

	turn(v, &by_tokens, &slowest);
	wait_step(v, now, now, slowest);
	orc_push(&v->fleet->throttled, &v->throttled);
}

void orc_vcpu_wait_end(orc_vcpu *v, orc_ns now, bool served)
{
	orc_ns by_tokens;
	unsigned slowest;

	wait_step(v, now, 0, 0);
	if (!served)
		return;
	v->wait_counted = false; /* what Python answers of the same exit may have to wait as well */
	turn(v, &by_tokens, &slowest);
	if (by_tokens > now)
		orc_count(&v->released, 1);
	leave(v);
}

static void futex_wait_until(_Atomic uint32_t *word, uint32_t seen, const struct timespec *until)
{
	/* An absolute time on CLOCK_MONOTONIC: late wake-ups do not add up. EINTR, EAGAIN, ETIMEDOUT: the caller looks. */
	syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, seen, until, NULL, FUTEX_BITSET_MATCH_ANY);
}

void orc_futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
	futex_wait_until(word, seen, NULL);
}

void orc_futex_wait_until(_Atomic uint32_t *word, uint32_t seen, orc_ns until)
{
	struct timespec time = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};

	futex_wait_until(word, seen, &time);
}

bool orc_wait_turn(orc_vcpu *v)
{
	orc_budget *budget = v->fleet->budget;
	orc_ns now = orc_now(), at, by_tokens;
	unsigned slowest;
	bool served;

	orc_vcpu_wait_begin(v, now);
	for (;;) {
		uint32_t seen = atomic_load_explicit(&v->wakes, memory_order_seq_cst);
		uint32_t changes = budget ? orc_budget_changes(budget) : 0;

		/* Read after `wakes` and `changes`: a command or limit that comes later also changes one of them, and the futex
		 * returns. */
		if (atomic_load_explicit(&v->commands, memory_order_seq_cst)) {
			served = false;
			break;
		}
		at = turn(v, &by_tokens, &slowest);
		if (at <= now) {
			served = true;
			break;
		}
		if (slowest != atomic_load_explicit(&wait_in_force(v)->slowest, memory_order_relaxed)) /* a limit changed */
			wait_step(v, now, now, slowest);
		if (budget)
			orc_budget_wait(budget, &v->wakes, seen, changes, at);
		else
			orc_futex_wait_until(&v->wakes, seen, at);
		now = orc_now();
	}
	orc_vcpu_wait_end(v, now, served);
	return served;
}

uint32_t orc_vcpu_wakes(const orc_vcpu *v)
{
	return atomic_load_explicit(&((orc_vcpu *)v)->wakes, memory_order_seq_cst);
}

void orc_vcpu_sleep(orc_vcpu *v, uint32_t seen)
{
	bool gated = v->gated;

	orc_gate_leave(v); /* what it waits for may be another vCPU's doing */
	while (orc_vcpu_wakes(v) == seen)
		futex_wait_until(&v->wakes, seen, NULL);
	if (gated)
		orc_gate_enter(v);
}

void orc_vcpu_wake(orc_vcpu *v)
{
	atomic_fetch_add_explicit(&v->wakes, 1, memory_order_seq_cst);
	syscall(SYS_futex, &v->wakes, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

/* ---- commands and kicks --------------------------------------------------------------------------------------- */

void orc_vcpu_command(orc_vcpu *v, uint32_t set, uint32_t clear)
{
	atomic_fetch_or_explicit(&v->commands, set, memory_order_seq_cst);
	atomic_fetch_and_explicit(&v->commands, ~clear, memory_order_seq_cst);
	if (set)
		orc_vcpu_kick(v);
	else
		orc_vcpu_wake(v); /* it is parked or runs: nothing to interrupt */
}

uint32_t orc_vcpu_commands(const orc_vcpu *v)
{
	return atomic_load_explicit(&((orc_vcpu *)v)->commands, memory_order_seq_cst);
}

void orc_make_way(orc_vcpu *v)
{
	/* They look every now and then whether it is over, and are not woken: all at once they would take the cores from the
	 * event loop, which has just heard what it waited for. The more of them, the less often, as looking costs as well. */
	enum { LOOK_NS = 1000 * 1000, LOOK_EACH_NS = 64 * 1000 };
	orc_fleet *f = v->fleet;

	atomic_fetch_add(&f->making_way, 1);
	for (;;) {
		uint32_t seen = atomic_load_explicit(&v->wakes, memory_order_seq_cst);
		orc_ns now = orc_now(), at = now + LOOK_NS + (orc_ns)atomic_load(&f->making_way) * LOOK_EACH_NS;
		struct timespec until = {.tv_sec = at / 1000000000, .tv_nsec = at % 1000000000};

		if (!atomic_load_explicit(&f->urgent, memory_order_relaxed) ||
		    atomic_load_explicit(&v->commands, memory_order_seq_cst) ||
		    now >= atomic_load_explicit(&f->urgent_until, memory_order_relaxed))
			break;
		futex_wait_until(&v->wakes, seen, &until);
	}
	atomic_fetch_sub(&f->making_way, 1);
}

void orc_vcpu_kick(orc_vcpu *v)
{
	/* First the flag, then the signal (Documentation/virt/kvm/api.rst, immediate_exit): a signal that lands before
	 * KVM_RUN is entered is not lost, as KVM looks at the flag on entry. The runner clears it. */
	if (v->run)
		__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	/* It can't fail but for a thread that is gone, and so not in a guest: orc_signal_install has tried it, and a standard
	 * signal needs no memory. */
	if (atomic_load_explicit(&v->in_guest, memory_order_seq_cst))
		orc_signal_send(atomic_load_explicit(&v->tid, memory_order_seq_cst));
	orc_vcpu_wake(v);
}

void orc_vcpu_attach(orc_vcpu *v)
{
	sigset_t mask;

	/* The program may block the signal in its threads: kicks would be lost. */
	sigemptyset(&mask);
	sigaddset(&mask, orc_signal_number());
	pthread_sigmask(SIG_UNBLOCK, &mask, NULL);
	/* The default slack of 50 microseconds would make every throttled wait late by as much. */
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	atomic_store_explicit(&v->tid, (int)syscall(SYS_gettid), memory_order_seq_cst);
	for (;;) {
		uint32_t seen = orc_vcpu_wakes(v);

		if ((orc_vcpu_commands(v) & (ORC_HOLD | ORC_STOP)) != ORC_HOLD)
			break;
		orc_vcpu_sleep(v, seen);
	}
}

void orc_vcpu_detach(orc_vcpu *v)
{
	orc_gate_leave(v);
	/* A thread that lives on gets its slack back; a late signal to it would only run the empty handler. */
	atomic_store_explicit(&v->tid, 0, memory_order_seq_cst);
	prctl(PR_SET_TIMERSLACK, 0, 0, 0, 0);
}

/* ---- reading -------------------------------------------------------------------------------------------------- */

static orc_u64 get(const _Atomic orc_u64 *counter)
{
	return atomic_load_explicit((_Atomic orc_u64 *)counter, memory_order_relaxed);
}

/* By bucket, and the sum. */
static orc_u64 throttled(const orc_vcpu *constant, orc_ns now, orc_u64 held[ORC_METERS * ORC_LEVELS], orc_ns *since)
{
	orc_vcpu *v = (orc_vcpu *)constant;
	uint32_t version;
	unsigned slowest;
	orc_u64 sum = 0;

	do { /* again only if a whole wait began or ended meanwhile */
		version = atomic_load_explicit(&v->wait_version, memory_order_acquire);
		*since = atomic_load_explicit(&v->wait[version & 1].since, memory_order_acquire);
		slowest = atomic_load_explicit(&v->wait[version & 1].slowest, memory_order_acquire);
		for (int i = 0; i < ORC_METERS * ORC_LEVELS; i++)
			held[i] = atomic_load_explicit(&v->wait[version & 1].held[i], memory_order_acquire);
	} while (version != atomic_load_explicit(&v->wait_version, memory_order_relaxed));
	if (*since && now > *since)
		held[slowest] += (orc_u64)(now - *since);
	for (int i = 0; i < ORC_METERS * ORC_LEVELS; i++)
		sum += held[i];
	return sum;
}

void orc_vcpu_counters(const orc_vcpu *v, struct orc_counters *out, orc_ns now)
{
	for (int i = 0; i < ORC_REASONS; i++)
		out->exits[i] = get(&v->exits[i]);
	out->bus_locks = get(&v->bus_locks);
	out->throttled = throttled(v, now, out->held, &out->throttled_since);
	out->capped = get(&v->capped);
	out->waits = get(&v->waits);
	out->released = get(&v->released);
	out->missed = get(&v->missed);
	out->kicks = get(&v->kicks);
	out->unclaimed = get(&v->unclaimed);
	out->answers = get(&v->answered);
}

int orc_vcpu_look(const orc_vcpu *v, struct orc_sums *out, orc_u64 seen[ORC_REASONS], struct orc_more *more, orc_ns now)
{
	orc_ns since;
	int n = 0;

	for (int i = 0; i < ORC_REASONS; i++) {
		orc_u64 exits = get(&v->exits[i]);

		if (exits != seen[i]) {
			more[n++] = (struct orc_more){.reason = (uint32_t)i, .exits = exits - seen[i]};
			seen[i] = exits;
		}
	}
	out->bus_locks = get(&v->bus_locks);
	out->throttled = throttled(v, now, out->held, &since);
	out->answers = get(&v->answered);
	return n;
}

struct orc_access *orc_vcpu_access(orc_vcpu *v)
{
	return &v->access;
}

struct orc_record *orc_vcpu_record(orc_vcpu *v)
{
	return &v->record;
}

int orc_vcpu_errno(const orc_vcpu *v)
{
	return v->error;
}
