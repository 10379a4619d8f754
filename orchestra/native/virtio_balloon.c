/* A memory balloon (virtio 1.2, 5.5): pages that the guest does not use go back to the host.
 *
 *   inflate    page numbers                      -> given back
 *   deflate    page numbers                      -> counted; a page comes back by itself when it is touched
 *   statistics the guest's figures of its memory -> kept; the buffer is used when they are asked for again
 *   reports    buffers of free memory            -> given back; the guest may use it again at any time after
 *
 * The numbers of queues: Linux up to 6.10 leaves out those that were not negotiated, and newer ones go by the specification. So
 * what comes behind deflate is told by the features. (Free page hints, whose queue is 3, are not offered.) */
#include <errno.h>
#include <linux/virtio_balloon.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "virtio.h"

/* Older kernel headers: include/uapi/linux/virtio_balloon.h of Linux 6.1. */
#ifndef VIRTIO_BALLOON_F_PAGE_POISON
#define VIRTIO_BALLOON_F_PAGE_POISON 4
#endif
#ifndef VIRTIO_BALLOON_F_REPORTING
#define VIRTIO_BALLOON_F_REPORTING 5
#endif

enum { INFLATE, DEFLATE, QUEUES_ALWAYS = 3, QUEUES_REPORTING = 5 };
enum role { PAGES_IN, PAGES_OUT, STATISTICS, REPORTS, NOTHING };
enum {
	QUEUE = 64,
	PAGE = 1 << VIRTIO_BALLOON_PFN_SHIFT,
	/* Of a list of pages, in one turn: as Linux sends them. A page takes a microsecond or two, most of it the flush of the
	 * CPUs' translations, and whoever wants the device's lock waits so long. */
	BATCH = 256,
	LONGEST_LIST = 4096,        /* pages: of a driver that sends more in one buffer, the device asks for a reset */
	SLICE = 4 << 20,            /* bytes of a report in one turn: half a millisecond, if the guest had touched all of it */
	LONGEST_STATISTICS = 64,    /* of 10 that there are; what is behind them is not read */
};
/* struct virtio_balloon_config of Linux 5.7 and newer; headers differ in what they have of it. */
enum { TARGET_AT = 0, ACTUAL_AT = 4, POISON_AT = 12, CONFIG = 16 };

struct balloon {
	orc_virtio virtio;
	unsigned flags;
	orc_ns interval; /* between two statistics; 0: those of the driver's start alone */
	bool fresh;      /* the statistics that are available were not read */
	bool wanted;     /* newer ones are */
	struct {
		uint16_t head;
		orc_u64 bytes; /* of the chain with that head, which was given back to its queue */
	} done[QUEUES_REPORTING];
	pthread_mutex_t look; /* over the counters alone: who looks at them never waits for a page. Last of all locks */
	struct orc_balloon_counters counters;
};

/* ---- pages ------------------------------------------------------------------------------------------------------ */

static void count(struct balloon *b, orc_u64 *counter, orc_u64 more)
{
	pthread_mutex_lock(&b->look);
	*counter += more;
	pthread_mutex_unlock(&b->look);
}

/* Whole pages; what is there is lost. */
static void give_back(struct balloon *b, uint8_t *host, size_t size)
{
	bool gone = b->flags & ORC_BALLOON_SHARED && !madvise(host, size, MADV_REMOVE); /* of the memfd, for all who map it */

	if (!gone && (!(b->flags & ORC_BALLOON_SHARED) || errno == EINVAL)) /* a region beside the RAM is anonymous */
		gone = !madvise(host, size, MADV_DONTNEED);
	orc_guest_memory_wrote(b->virtio.memory, host, size);
	count(b, gone ? &b->counters.given_back : &b->counters.failed, size);
}

static int by_number(const void *a, const void *b)
{
	const uint32_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

/* False: there is a page among them that is no memory, or that the guest may not write. Those before it may be gone. */
static bool give_back_pages(struct balloon *b, uint32_t *page, size_t n)
{
	qsort(page, n, sizeof *page, by_number); /* a call for pages in a row, and not for each */
	for (size_t i = 0, next; i < n; i = next) {
		struct iovec piece[BATCH];
		size_t pieces = 0;

		for (next = i + 1; next < n && page[next] - page[next - 1] <= 1; next++)
			;
		if (orc_guest_memory_map(b->virtio.memory, (orc_u64)page[i] << VIRTIO_BALLOON_PFN_SHIFT,
					 ((orc_u64)(page[next - 1] - page[i]) + 1) << VIRTIO_BALLOON_PFN_SHIFT, true, piece, BATCH, &pieces))
			return false;
		for (size_t k = 0; k < pieces; k++)
			give_back(b, piece[k].iov_base, piece[k].iov_len);
	}
	return true;
}

/* ---- chains of which a part is seen to in each turn ------------------------------------------------------------------ */

static orc_u64 done_before(struct balloon *b, uint16_t queue, const struct orc_chain *c)
{
	return b->done[queue].head == c->head ? b->done[queue].bytes : 0;
}

/* So much of it is done: it is put, or given back to its queue. What the driver makes of it meanwhile is its own affair. */
static void went_on(struct balloon *b, uint16_t queue, const struct orc_chain *c, orc_u64 bytes, orc_u64 all)
{
	struct orc_queue *q = &b->virtio.queue[queue];

	b->done[queue].head = c->head;
	b->done[queue].bytes = bytes < all ? bytes : 0;
	if (bytes < all)
		orc_queue_give_back(q, c);
	else
		orc_queue_put(q, c, 0);
}

static void take_list(struct balloon *b, uint16_t queue, const struct orc_chain *c)
{
	uint32_t page[BATCH];
	orc_u64 done = done_before(b, queue, c);
	size_t n;

	if (c->writable || c->readable_bytes % sizeof *page || c->readable_bytes > LONGEST_LIST * sizeof *page) {
		orc_queue_refuse(&b->virtio.queue[queue], c);
		return;
	}
	n = orc_chain_read(c, done, page, sizeof page) / sizeof *page;
	count(b, queue == INFLATE ? &b->counters.inflated : &b->counters.deflated, n);
	if (queue == INFLATE && !give_back_pages(b, page, n))
		orc_queue_refuse(&b->virtio.queue[queue], c);
	else
		went_on(b, queue, c, done + n * sizeof *page, c->readable_bytes);
}

/* A guest that poisons free pages finds its poison there, or nothing was done: 5.5.6.7.1. */
static bool may_give_back(const struct balloon *b)
{
	uint32_t poison;

	memcpy(&poison, b->virtio.config + POISON_AT, sizeof poison);
	return !orc_virtio_has(&b->virtio, VIRTIO_BALLOON_F_PAGE_POISON) || !poison;
}

static void take_report(struct balloon *b, uint16_t queue, const struct orc_chain *c)
{
	orc_u64 done = done_before(b, queue, c);
	struct iovec part[ORC_CHAIN_MOST];
	size_t n;

	if (c->readable) {
		orc_queue_refuse(&b->virtio.queue[queue], c);
		return;
	}
	n = orc_iov_slice(c->iov, c->writable, done, SLICE, part);
	for (size_t i = 0; i < n; i++) {
		uintptr_t begin = ((uintptr_t)part[i].iov_base + PAGE - 1) & ~(uintptr_t)(PAGE - 1);
		uintptr_t end = ((uintptr_t)part[i].iov_base + part[i].iov_len) & ~(uintptr_t)(PAGE - 1);

		done += part[i].iov_len;
		count(b, &b->counters.reported, part[i].iov_len);
		if (end > begin && may_give_back(b))
			give_back(b, (uint8_t *)begin, end - begin);
	}
	went_on(b, queue, c, done, c->writable_bytes);
}

/* ---- statistics --------------------------------------------------------------------------------------------------- */

static void read_statistics(struct balloon *b, const struct orc_chain *c)
{
	struct virtio_balloon_stat stat[LONGEST_STATISTICS];
	size_t n = orc_chain_read(c, 0, stat, sizeof stat) / sizeof *stat;

	pthread_mutex_lock(&b->look);
	for (size_t i = 0; i < n; i++) {
		if (stat[i].tag >= ORC_BALLOON_STATISTICS) /* of a later version */
			continue;
		b->counters.statistic[stat[i].tag] = stat[i].val;
		b->counters.known |= 1u << stat[i].tag;
	}
	b->counters.updates++;
	b->counters.updated = orc_now();
	pthread_mutex_unlock(&b->look);
}

/* 5.5.6.3: the driver's buffer stays with the device until newer figures are wanted. It is left in its queue so long, and is not in
 * flight, as a pause waits for what is. */
static enum orc_served serve_statistics(struct balloon *b, struct orc_queue *q)
{
	struct orc_chain c;

	if (!b->fresh && !b->wanted)
		return ORC_WAITING;
	if (!orc_queue_take(q, &c))
		return ORC_DRAINED;
	if (c.writable) {
		orc_queue_refuse(q, &c);
		return ORC_DRAINED;
	}
	if (b->fresh)
		read_statistics(b, &c);
	b->fresh = b->wanted;
	if (!b->wanted) {
		orc_queue_give_back(q, &c);
		return ORC_WAITING;
	}
	b->wanted = false;
	orc_queue_put(q, &c, 0);
	return ORC_MORE;
}

static void ticked(orc_virtio *v, int fd)
{
	uint64_t expired;

	if (read(fd, &expired, sizeof expired) == sizeof expired)
		((struct balloon *)v)->wanted = true;
}

static void tick_each(struct balloon *b, orc_ns interval)
{
	const struct timespec t = {.tv_sec = interval / 1000000000, .tv_nsec = interval % 1000000000};

	timerfd_settime(b->virtio.watched, 0, &(struct itimerspec){.it_interval = t, .it_value = t}, NULL);
}

/* ---- the device --------------------------------------------------------------------------------------------------- */

static enum role role_of(const orc_virtio *v, uint16_t queue)
{
	if (queue <= DEFLATE)
		return queue == INFLATE ? PAGES_IN : PAGES_OUT;
	if (queue == 2 && orc_virtio_has(v, VIRTIO_BALLOON_F_STATS_VQ))
		return STATISTICS;
	return orc_virtio_has(v, VIRTIO_BALLOON_F_REPORTING) ? REPORTS : NOTHING;
}

/* One chain, or a part of one, in each turn: the I/O thread sees to other devices between. */
static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	struct balloon *b = (struct balloon *)v;
	struct orc_queue *q = &v->queue[queue];
	enum role role = role_of(v, queue);
	struct orc_chain c;

	if (role == STATISTICS)
		return serve_statistics(b, q);
	if (!orc_queue_take(q, &c))
		return ORC_DRAINED;
	switch (role) {
	case PAGES_IN:
	case PAGES_OUT:
		take_list(b, queue, &c);
		break;
	case REPORTS:
		take_report(b, queue, &c);
		break;
	default:
		orc_queue_refuse(q, &c);
	}
	return ORC_MORE;
}

static void write_config(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	struct balloon *b = (struct balloon *)v;
	uint32_t value;

	if (size != sizeof value || (offset != ACTUAL_AT && offset != POISON_AT))
		return;
	memcpy(&value, data, size);
	memcpy(v->config + offset, data, size);
	if (offset != ACTUAL_AT)
		return;
	pthread_mutex_lock(&b->look);
	b->counters.actual = value;
	pthread_mutex_unlock(&b->look);
}

static void begin(orc_virtio *v)
{
	struct balloon *b = (struct balloon *)v;
	uint32_t actual;

	memcpy(&actual, v->config + ACTUAL_AT, sizeof actual); /* of a saved state */
	pthread_mutex_lock(&b->look);
	b->counters.actual = actual;
	b->counters.driver = true;
	pthread_mutex_unlock(&b->look);
	b->fresh = true;
	if (b->interval && orc_virtio_has(v, VIRTIO_BALLOON_F_STATS_VQ))
		tick_each(b, b->interval);
}

static void reset(orc_virtio *v)
{
	struct balloon *b = (struct balloon *)v;

	tick_each(b, 0);
	b->fresh = b->wanted = false;
	memset(b->done, 0, sizeof b->done);
	memset(v->config + ACTUAL_AT, 0, CONFIG - ACTUAL_AT); /* what the driver wrote; and a driver that is gone has no pages */
	pthread_mutex_lock(&b->look);
	b->counters.actual = 0;
	b->counters.driver = false;
	pthread_mutex_unlock(&b->look);
}

static void free_balloon(orc_virtio *v)
{
	pthread_mutex_destroy(&((struct balloon *)v)->look);
	orc_virtio_fini(v);
	free(v);
}

static const struct orc_virtio_ops balloon = {
	.type = VIRTIO_ID_BALLOON, .queue_size = QUEUE, .config_size = CONFIG, .features = 1ull << VIRTIO_BALLOON_F_STATS_VQ,
	.serve = serve, .config_write = write_config, .start = begin, .reset = reset, .free = free_balloon,
};

int orc_virtio_balloon_new(const orc_guest_memory *memory, unsigned flags, orc_ns interval, orc_virtio **out)
{
	const bool reporting = flags & ORC_BALLOON_REPORTING;
	struct balloon *b = calloc(1, sizeof *b);
	orc_u64 features = 0;
	int timer;

	if (!b)
		return -ENOMEM;
	timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (timer < 0) {
		free(b);
		return -errno;
	}
	b->flags = flags;
	b->interval = interval;
	pthread_mutex_init(&b->look, NULL);
	if (flags & ORC_BALLOON_DEFLATE_ON_OOM)
		features |= 1ull << VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
	if (flags & ORC_BALLOON_MUST_TELL_HOST)
		features |= 1ull << VIRTIO_BALLOON_F_MUST_TELL_HOST;
	if (reporting)
		features |= 1ull << VIRTIO_BALLOON_F_REPORTING;
	/* What a guest that clears or poisons free pages needs to report any: pages of a file come back as they are there. */
	if (reporting && !(flags & ORC_BALLOON_FILE))
		features |= 1ull << VIRTIO_BALLOON_F_PAGE_POISON;
	orc_virtio_init(&b->virtio, &balloon, memory, reporting ? QUEUES_REPORTING : QUEUES_ALWAYS, features);
	orc_virtio_watch(&b->virtio, timer, ticked);
	*out = &b->virtio;
	return 0;
}

void orc_virtio_balloon_set_target(orc_virtio *v, uint32_t pages)
{
	orc_virtio_config_set(v, TARGET_AT, &pages, sizeof pages);
}

void orc_virtio_balloon_look(orc_virtio *v, struct orc_balloon_counters *out)
{
	struct balloon *b = (struct balloon *)v;

	pthread_mutex_lock(&b->look);
	*out = b->counters;
	pthread_mutex_unlock(&b->look);
}
