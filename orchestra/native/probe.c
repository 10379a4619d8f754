/* The host probe: what locked operations and memory cost one who shares neither with anybody. */
#include <emmintrin.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core.h"

enum {
	LOCKS = 32,      /* of a sample: a clock costs as much as several of them */
	READS = 16,
	STRIDE = 4096,   /* each read in a page of its own: no prefetcher crosses one */
	SAMPLES = 1024,  /* that wait to be fetched, a power of two: 5 s at 200 a second */
};

struct orc_probe {
	/* One writer (the thread), one reader (the owner). */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t head;
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t tail;
	_Alignas(2 * ORC_CACHE_LINE) _Atomic orc_u64 line; /* nobody else's, the neighbour that is prefetched with it too */
	_Alignas(2 * ORC_CACHE_LINE) orc_ns period;
	unsigned each;
	char *pages;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t stop;
	bool stopping; /* lock */
	struct orc_probe_sample samples[SAMPLES];
};

static double time_locks(struct orc_probe *p)
{
	orc_ns start;

	atomic_fetch_add(&p->line, 1); /* the line is here, and the CPU awake */
	start = orc_now();
	for (int i = 0; i < LOCKS; i++)
		atomic_fetch_add(&p->line, 1);
	return (double)(orc_now() - start) / LOCKS;
}

static double time_reads(struct orc_probe *p)
{
	void **at = (void **)p->pages;
	orc_ns start;

	for (int i = 0; i < READS; i++)
		_mm_clflush(p->pages + (size_t)i * STRIDE);
	_mm_mfence();
	start = orc_now();
	for (int i = 0; i < READS; i++)
		at = *(void *volatile *)at; /* each says where the next is, so none begins before the last has come */
	__asm__ volatile("" : : "r"(at) : "memory");
	return (double)(orc_now() - start) / READS;
}

static void measure(struct orc_probe *p)
{
	uint32_t head = atomic_load_explicit(&p->head, memory_order_relaxed);
	struct orc_probe_sample sample = { time_locks(p), time_reads(p) };

	if (head - atomic_load_explicit(&p->tail, memory_order_acquire) >= SAMPLES)
		return; /* nobody fetches them */
	p->samples[head % SAMPLES] = sample;
	atomic_store_explicit(&p->head, head + 1, memory_order_release);
}

static void *run(void *argument)
{
	struct orc_probe *p = argument;
	orc_ns next = orc_now();

	orc_prefer_no_more(ORC_PREFERRED); /* it measures what a guest would have */
	pthread_setname_np(pthread_self(), "orchestra-probe");
	pthread_mutex_lock(&p->lock);
	while (!p->stopping) {
		orc_ns now = orc_now();
		struct timespec until;

		if (now >= next) {
			pthread_mutex_unlock(&p->lock);
			for (unsigned i = 0; i < p->each; i++)
				measure(p);
			pthread_mutex_lock(&p->lock);
			/* Late ones are left out: what was then can't be measured any more. */
			next = next + p->period > orc_now() ? next + p->period : orc_now() + p->period;
			continue;
		}
		until.tv_sec = next / 1000000000;
		until.tv_nsec = next % 1000000000;
		pthread_cond_timedwait(&p->stop, &p->lock, &until);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* A ring through all pages, in an order that is not theirs. */
static void link_pages(char *pages)
{
	for (int i = 0; i < READS; i++) {
		int from = i * 7 % READS, to = (i + 1) * 7 % READS;

		*(void **)(pages + (size_t)from * STRIDE) = pages + (size_t)to * STRIDE;
	}
}

static void release(struct orc_probe *p)
{
	free(p->pages);
	free(p);
}

orc_probe *orc_probe_start(orc_ns period, unsigned each)
{
	struct orc_probe *p = aligned_alloc(2 * ORC_CACHE_LINE, sizeof *p);
	pthread_condattr_t attributes;
	int result;

	if (!p) {
		errno = ENOMEM;
		return NULL;
	}
	memset(p, 0, sizeof *p);
	p->period = period;
	p->each = each;
	p->pages = aligned_alloc(STRIDE, (size_t)READS * STRIDE);
	if (!p->pages) {
		release(p);
		errno = ENOMEM;
		return NULL;
	}
	link_pages(p->pages);
	pthread_mutex_init(&p->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&p->stop, &attributes);
	pthread_condattr_destroy(&attributes);
	result = orc_thread_start(&p->thread, "orchestra-probe", 0, run, p);
	if (result) {
		pthread_cond_destroy(&p->stop);
		pthread_mutex_destroy(&p->lock);
		release(p);
		errno = -result;
		return NULL;
	}
	return p;
}

size_t orc_probe_take(orc_probe *p, struct orc_probe_sample *out, size_t most)
{
	uint32_t tail = atomic_load_explicit(&p->tail, memory_order_relaxed);
	uint32_t waiting = atomic_load_explicit(&p->head, memory_order_acquire) - tail;
	size_t taken = waiting < most ? waiting : most;

	for (size_t i = 0; i < taken; i++)
		out[i] = p->samples[(tail + i) % SAMPLES];
	atomic_store_explicit(&p->tail, tail + (uint32_t)taken, memory_order_release);
	return taken;
}

void orc_probe_stop(orc_probe *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	p->stopping = true;
	pthread_cond_signal(&p->stop);
	pthread_mutex_unlock(&p->lock);
	pthread_join(p->thread, NULL);
	pthread_cond_destroy(&p->stop);
	pthread_mutex_destroy(&p->lock);
	release(p);
}
