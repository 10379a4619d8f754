#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"

orc_fleet *orc_fleet_new(void)
{
	orc_fleet *f = aligned_alloc(ORC_CACHE_LINE, sizeof *f);

	if (!f) {
		errno = ENOMEM;
		return NULL;
	}
	memset(f, 0, sizeof *f);
	f->reported.eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	f->asked.eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (f->reported.eventfd < 0 || f->asked.eventfd < 0) {
		int error = errno;

		if (f->reported.eventfd >= 0)
			close(f->reported.eventfd);
		free(f);
		errno = error;
		return NULL;
	}
	pthread_mutex_init(&f->gate.lock, NULL);
	orc_stock_init(&f->stock);
	f->gate.patience = ORC_PATIENCE;
	return f;
}

int orc_fleet_eventfd(const orc_fleet *f)
{
	return f->reported.eventfd;
}

int orc_fleet_asked_eventfd(const orc_fleet *f)
{
	return f->asked.eventfd;
}

void orc_push(struct orc_stack *s, struct orc_link *link)
{
	struct orc_link *top;

	/* The taker clears `queued` before it looks at what the caller published, and the caller published (seq_cst)
	 * before this load: if it still reads true, the taker has not looked yet. */
	if (atomic_load_explicit(&link->queued, memory_order_seq_cst))
		return;
	if (atomic_exchange_explicit(&link->queued, true, memory_order_acq_rel))
		return;
	top = atomic_load_explicit(&s->top, memory_order_relaxed);
	do
		atomic_store_explicit(&link->next, top, memory_order_relaxed);
	while (!atomic_compare_exchange_weak_explicit(&s->top, &top, link, memory_order_seq_cst, memory_order_relaxed));
}

/* The owner takes the stack, once it has done with what it took before. What is pushed from now on is for the next time: if it
 * took again until nothing is left, those who push would decide when that is. */
static void gather(struct orc_stack *s, struct orc_link **taken)
{
	if (!*taken)
		*taken = atomic_exchange_explicit(&s->top, NULL, memory_order_acq_rel);
}

/* The owner's next link. Links are the owner's until it clears `queued`. */
static struct orc_link *take(struct orc_link **taken)
{
	struct orc_link *link = *taken;

	if (!link)
		return NULL;
	*taken = atomic_load_explicit(&link->next, memory_order_relaxed);
	atomic_exchange_explicit(&link->queued, false, memory_order_seq_cst);
	return link;
}

void orc_bell_ring(struct orc_bell *b)
{
	uint64_t one = 1;

	if (atomic_load_explicit(&b->asleep, memory_order_seq_cst) &&
	    atomic_exchange_explicit(&b->asleep, false, memory_order_acq_rel))
		while (write(b->eventfd, &one, sizeof one) < 0 && errno == EINTR)
			;
}

/* The owner, before it looks at the stacks for the last time. */
static void listen_for(struct orc_bell *b)
{
	uint64_t count;

	while (read(b->eventfd, &count, sizeof count) < 0 && errno == EINTR)
		;
	atomic_store_explicit(&b->asleep, true, memory_order_seq_cst);
}

static bool is_empty(struct orc_stack *s, const struct orc_link *taken)
{
	return !taken && !atomic_load_explicit(&s->top, memory_order_seq_cst);
}

/* Whether that vCPU was freed while it was on a list; its memory goes with its last link. */
static bool is_dead(orc_vcpu *v)
{
	if (!v->dead)
		return false;
	if (!orc_is_listed(v)) {
		v->fleet->dead--;
		orc_stock_vcpu_back(&v->fleet->stock, v);
	}
	return true;
}

void orc_ring_put(orc_vcpu *v, const struct orc_record *record)
{
	struct orc_ring *r = &v->ring;
	orc_fleet *f = v->fleet;
	uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);

	/* Acquire: the slot's old contents were copied out before tail moved past them. */
	if (head - atomic_load_explicit(&r->tail, memory_order_acquire) > r->mask) {
		orc_count(&v->missed, 1);
		return;
	}
	r->records[head & r->mask] = *record;
	/* seq_cst, a full barrier on x86: the record is published before orc_push reads `queued`, as the consumer clears
	 * `queued` before it reads head. One of the two sees the other. */
	atomic_store_explicit(&r->head, head + 1, memory_order_seq_cst);
	orc_push(&f->ready, &v->ready);
	orc_bell_ring(&f->reported);
}

void orc_talk(orc_vcpu *v)
{
	orc_push(&v->fleet->talking, &v->talking);
	orc_bell_ring(&v->fleet->reported);
}

bool orc_fleet_sleep(orc_fleet *f)
{
	listen_for(&f->reported);
	if (is_empty(&f->ready, f->draining) && is_empty(&f->talking, f->hearing))
		return true;
	atomic_store_explicit(&f->reported.asleep, false, memory_order_relaxed);
	return false;
}

bool orc_fleet_asked_sleep(orc_fleet *f)
{
	listen_for(&f->asked);
	if (is_empty(&f->asking, f->answering))
		return true;
	atomic_store_explicit(&f->asked.asleep, false, memory_order_relaxed);
	return false;
}

static size_t drain_one(orc_vcpu *v, struct orc_record *out, size_t most)
{
	struct orc_ring *r = &v->ring;
	uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
	uint32_t n = atomic_load_explicit(&r->head, memory_order_seq_cst) - tail, first;

	if (n > most)
		n = (uint32_t)most;
	first = r->mask + 1 - (tail & r->mask);
	if (first > n)
		first = n;
	memcpy(out, &r->records[tail & r->mask], first * sizeof *out);
	memcpy(out + first, r->records, (n - first) * sizeof *out);
	atomic_store_explicit(&r->tail, tail + n, memory_order_release);
	return n;
}

size_t orc_vcpu_drain(orc_vcpu *v, struct orc_record *out, size_t most)
{
	return v->ring.records ? drain_one(v, out, most) : 0;
}

size_t orc_fleet_drain(orc_fleet *f, struct orc_record *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	/* What was left of the last time, and then the stack; and not again, however much is pushed meanwhile. */
	for (int round = 0; round < 2 && n < most; round++) {
		gather(&f->ready, &f->draining);
		while (n < most && (link = take(&f->draining))) {
			orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, ready);

			if (is_dead(v))
				continue;
			n += drain_one(v, out + n, most - n);
			if (n == most)
				orc_push(&f->ready, link); /* it may have more: its turn comes again after the others */
		}
	}
	return n;
}

void orc_fleet_look(orc_fleet *f)
{
	gather(&f->active, &f->activating);
}

size_t orc_fleet_active(orc_fleet *f, uint32_t *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	while (n < most && (link = take(&f->activating))) {
		orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, active);

		if (!is_dead(v))
			out[n++] = v->id;
	}
	return n;
}

size_t orc_fleet_talking(orc_fleet *f, uint32_t *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	gather(&f->talking, &f->hearing);
	while (n < most && (link = take(&f->hearing))) {
		orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, talking);

		if (!is_dead(v))
			out[n++] = v->id;
	}
	return n;
}

size_t orc_fleet_asked(orc_fleet *f, struct orc_question *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	gather(&f->asking, &f->answering);
	while (n < most && (link = take(&f->answering))) {
		orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, asking);

		if (!is_dead(v) && orc_ask_take(v, &out[n]))
			n++;
	}
	return n;
}

/* Takes the dead off a list and off its stack; `member`: where in a vCPU the list's links are. */
static void sweep(struct orc_stack *s, struct orc_link **taken, size_t member)
{
	struct orc_link *lists[] = {*taken, atomic_exchange_explicit(&s->top, NULL, memory_order_acq_rel)}, *next;

	*taken = NULL;
	for (int i = 0; i < 2; i++) {
		for (struct orc_link *link = lists[i]; link; link = next) {
			orc_vcpu *v = (orc_vcpu *)((char *)link - member);

			next = atomic_load_explicit(&link->next, memory_order_relaxed);
			if (v->dead) {
				atomic_store_explicit(&link->queued, false, memory_order_relaxed);
				is_dead(v);
			} else {
				atomic_store_explicit(&link->next, *taken, memory_order_relaxed);
				*taken = link;
			}
		}
	}
}

static void sweep_all(orc_fleet *f)
{
	struct orc_link *waited = NULL, *next;

	sweep(&f->ready, &f->draining, offsetof(orc_vcpu, ready));
	sweep(&f->active, &f->activating, offsetof(orc_vcpu, active));
	sweep(&f->talking, &f->hearing, offsetof(orc_vcpu, talking));
	sweep(&f->asking, &f->answering, offsetof(orc_vcpu, asking));
	sweep(&f->throttled, &waited, offsetof(orc_vcpu, throttled));
	for (; waited; waited = next) { /* of this one the owner keeps no part */
		next = atomic_load_explicit(&waited->next, memory_order_relaxed);
		atomic_store_explicit(&waited->queued, false, memory_order_seq_cst);
		orc_push(&f->throttled, waited);
	}
}

void orc_retire(orc_vcpu *v)
{
	enum { FEW = 64 };
	orc_fleet *f = v->fleet;
	uint32_t left = atomic_fetch_sub_explicit(&f->vcpus, 1, memory_order_relaxed) - 1;

	if (!orc_is_listed(v)) {
		orc_stock_vcpu_back(&v->fleet->stock, v);
		return;
	}
	/* In the middle of a stack, which has no way back: it stays until the owner comes to it, or until as many as live have
	 * gathered there, which nobody may look at. So freeing one costs the same however busy the others are. */
	v->dead = true;
	if (++f->dead > (left > FEW ? left : FEW))
		sweep_all(f);
}

void orc_fleet_free(orc_fleet *f)
{
	if (!f)
		return;
	orc_capper_stop(f->capper);
	sweep_all(f); /* no vCPU is left but the dead */
	orc_stock_free(&f->stock);
	close(f->reported.eventfd);
	close(f->asked.eventfd);
	pthread_mutex_destroy(&f->gate.lock);
	free(f);
}

void orc_fleet_limits_changed(orc_fleet *f)
{
	struct orc_link *link = atomic_exchange_explicit(&f->throttled.top, NULL, memory_order_acq_rel), *next;

	/* Whoever begins to wait pushes itself, and then reads the limit: either we find it here, or it finds the new limit, as
	 * its push comes after our exchange. It takes itself off no list: it does not wait any more when we come to it. */
	for (; link; link = next) {
		orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, throttled);

		next = atomic_load_explicit(&link->next, memory_order_relaxed);
		atomic_exchange_explicit(&link->queued, false, memory_order_seq_cst);
		if (is_dead(v) || !orc_vcpu_waits(v))
			continue;
		orc_push(&f->throttled, link);
		orc_vcpu_wake(v);
	}
}

void orc_fleet_urgent(orc_fleet *f, bool begins)
{
	enum { MOST = 200 * 1000 * 1000 }; /* longer is none of the others' business */

	if (!f)
		return;
	if (begins)
		atomic_store_explicit(&f->urgent_until, orc_now() + MOST, memory_order_relaxed);
	atomic_fetch_add(&f->urgent, begins ? 1 : UINT32_MAX);
}
