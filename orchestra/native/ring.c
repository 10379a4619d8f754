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
	f->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (f->eventfd < 0) {
		free(f);
		return NULL;
	}
	pthread_mutex_init(&f->throttled_lock, NULL);
	pthread_mutex_init(&f->gate.lock, NULL);
	f->gate.patience = ORC_PATIENCE;
	return f;
}

void orc_fleet_free(orc_fleet *f)
{
	if (!f)
		return;
	orc_capper_stop(f->capper);
	close(f->eventfd);
	pthread_mutex_destroy(&f->throttled_lock);
	pthread_mutex_destroy(&f->gate.lock);
	free(f);
}

int orc_fleet_eventfd(const orc_fleet *f)
{
	return f->eventfd;
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

/* The owner's next link: what it took before, or all that is on the stack now. Links taken are the owner's until it
 * clears `queued`. */
static struct orc_link *take(struct orc_stack *s, struct orc_link **taken)
{
	struct orc_link *link = *taken;

	if (!link)
		link = atomic_exchange_explicit(&s->top, NULL, memory_order_acq_rel);
	if (!link)
		return NULL;
	*taken = atomic_load_explicit(&link->next, memory_order_relaxed);
	atomic_exchange_explicit(&link->queued, false, memory_order_seq_cst);
	return link;
}

void orc_ring_put(orc_vcpu *v, const struct orc_record *record)
{
	struct orc_ring *r = &v->ring;
	orc_fleet *f = v->fleet;
	uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
	uint64_t one = 1;

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
	/* Likewise: pushed before `asleep` is read, as the consumer sets `asleep` before it looks at the stack. */
	if (atomic_load_explicit(&f->asleep, memory_order_seq_cst) &&
	    atomic_exchange_explicit(&f->asleep, false, memory_order_acq_rel))
		while (write(f->eventfd, &one, sizeof one) < 0 && errno == EINTR)
			;
}

bool orc_fleet_sleep(orc_fleet *f)
{
	uint64_t count;

	while (read(f->eventfd, &count, sizeof count) < 0 && errno == EINTR)
		;
	atomic_store_explicit(&f->asleep, true, memory_order_seq_cst);
	if (!f->draining && !atomic_load_explicit(&f->ready.top, memory_order_seq_cst))
		return true;
	atomic_store_explicit(&f->asleep, false, memory_order_relaxed);
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

size_t orc_fleet_drain(orc_fleet *f, struct orc_record *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	while (n < most && (link = take(&f->ready, &f->draining))) {
		orc_vcpu *v = ORC_CONTAINER(link, orc_vcpu, ready);

		n += drain_one(v, out + n, most - n);
		if (n == most)
			orc_push(&f->ready, link); /* it may have more: its turn comes again after the others */
	}
	return n;
}

size_t orc_fleet_active(orc_fleet *f, uint32_t *out, size_t most)
{
	struct orc_link *link;
	size_t n = 0;

	while (n < most && (link = take(&f->active, &f->activating)))
		out[n++] = ORC_CONTAINER(link, orc_vcpu, active)->id;
	return n;
}

/* Keeps a dying vCPU's link from being found again: everything is taken, and the others are put back. */
static void forget(struct orc_stack *s, struct orc_link **taken, struct orc_link *dying)
{
	struct orc_link *link, *keep = NULL, *next;

	while ((link = take(s, taken))) {
		if (link == dying)
			continue;
		/* Linked privately only while `queued` is ours: another push of it meanwhile is fine, it is on the stack
		 * then and needs no keeping. */
		if (!atomic_exchange_explicit(&link->queued, true, memory_order_acq_rel)) {
			atomic_store_explicit(&link->next, keep, memory_order_relaxed);
			keep = link;
		}
	}
	for (; keep; keep = next) {
		next = atomic_load_explicit(&keep->next, memory_order_relaxed);
		atomic_store_explicit(&keep->next, *taken, memory_order_relaxed);
		*taken = keep;
	}
}

void orc_forget(orc_fleet *f, orc_vcpu *v)
{
	if (atomic_load_explicit(&v->ready.queued, memory_order_acquire))
		forget(&f->ready, &f->draining, &v->ready);
	if (atomic_load_explicit(&v->active.queued, memory_order_acquire))
		forget(&f->active, &f->activating, &v->active);
}

void orc_fleet_limits_changed(orc_fleet *f)
{
	orc_vcpu *v;

	pthread_mutex_lock(&f->throttled_lock);
	for (v = f->throttled; v; v = v->throttled_next)
		orc_vcpu_wake(v);
	pthread_mutex_unlock(&f->throttled_lock);
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
