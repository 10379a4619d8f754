/* A disk (virtio 1.2, 5.2) of one queue. Data go between its store and guest memory, and are not copied here.
 *
 *   take -> check -> limits -> orc_store_start -> ... -> the store's descriptor -> status byte -> put
 *
 * A request that must wait for a limit is given back to the queue. So nothing of it is in flight, and a pause, a reset or a new
 * limit need not wait for its turn. What is reserved of the buckets is the disk's and not the request's: the next one uses it. */
#include <errno.h>
#include <limits.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "core.h"
#include "store.h"
#include "virtio.h"

enum {
	QUEUE = 128,
	IN_FLIGHT = 64, /* of which a file system or an NVMe device is busy */
	/* Bytes that are read, written or zeroed at the same time, with the last request whole: a millisecond of the fastest devices. A
	 * hold, and a capped guest's rest, wait for no more than these: at most a second of slow ones, or for a long request some. */
	BYTES_IN_FLIGHT = 16 << 20,
	SECTOR = 512,
	/* With header and status a chain of a full ring. Half of ORC_CHAIN_MOST, so that each piece may lie in two regions. */
	SEGMENTS = QUEUE - 2,
	SEGMENT = 1 << 20, /* the pages of a longer one hardly lie side by side */
	/* Of a discard or of zeroes: a file system frees so much in milliseconds. One range for each request: Linux sends no more
	 * unless they lie side by side. */
	RANGE = 1 << 30,
	/* Bytes of the requests that are started in one turn, with the last one whole. What the page cache has is copied at once, with
	 * the device's lock held: a quarter of a millisecond, or for the longest request some ten. */
	TURN = 2 << 20,
	HEADER = 16, /* struct virtio_blk_outhdr */
	ALIGNMENT = 4096, /* of what is discarded: less than a page frees nothing */
};

struct request {
	struct orc_operation operation;
	struct orc_chain chain;
	struct request *next;
	uint32_t data; /* bytes that the guest is given, if it is done */
	orc_u64 cost[ORC_BLK_METERS];
	struct iovec iov[ORC_CHAIN_MOST];
};

/* What a disk has of a bucket: tokens that it has waited for and not used, and a ticket for more. */
struct account {
	orc_bucket *bucket; /* NULL: none */
	orc_u64 credit, reserved; /* `reserved` 0: it has no ticket */
	struct orc_ticket ticket;
};

struct disk {
	orc_virtio virtio;
	orc_store *store;
	char id[VIRTIO_BLK_ID_BYTES];
	struct request *request, *free; /* all of them; and a list of those that were in flight and are done */
	unsigned begun; /* so many of the first were ever in flight: the memory of the others is not touched, and costs none */
	orc_u64 in_flight; /* bytes */
	int timer; /* -1: it has no buckets */
	struct account account[ORC_BLK_METERS][ORC_BLK_LEVELS];
	/* Over what follows: who looks at the figures never waits for a request. Last of all locks. Whoever changes them has the
	 * device's lock as well, and with that alone they can be read. */
	pthread_mutex_t look;
	struct orc_blk_counters counters;
	int waits_for; /* the level that the request at the queue's head waits for; -1: it does not wait */
	orc_ns looked; /* when that was found */
};

/* ---- limits ----------------------------------------------------------------------------------------------------- */

/* What a disk reserves of a bucket that it shares, at once: a millisecond's worth, so that its thread wakes no more often. */
static orc_u64 quantum(const orc_bucket *b, int m, orc_ns now)
{
	enum { LEAST_SECTORS = 8 };
	const double least = m == ORC_BLK_SECTORS ? LEAST_SECTORS : 1;
	struct orc_limit l;

	orc_bucket_limit(b, now, &l);
	return (orc_u64)(l.rate / 1000 > least ? l.rate / 1000 : least);
}

static void leave(struct account *a)
{
	if (a->reserved)
		orc_bucket_leave(a->bucket, &a->ticket);
	a->reserved = 0;
}

/* Has a ticket for so many tokens in all. The guest may have made a longer request of it while it waited: it pays for the rest. */
static void reserve(struct account *a, orc_u64 tokens, orc_ns now)
{
	orc_u64 more = tokens - a->reserved;

	if (tokens <= a->reserved)
		return;
	leave(a);
	orc_bucket_charge_many(a->bucket, more, now, &a->ticket);
	a->reserved = tokens;
}

static orc_ns turn_of(const struct account *a)
{
	orc_ns by_tokens, by_delay;

	orc_bucket_turn(a->bucket, &a->ticket, &by_tokens, &by_delay);
	return by_delay < by_tokens ? by_delay : by_tokens;
}

/* When the account has so much, at the latest; `now` or before: it has. What a disk alone uses it reserves as a whole. Of what it
 * shares it has a quantum reserved at a time, so that nobody waits for the long request of another; and keeps what is left of
 * one, so that long and short requests get the same share. */
static orc_ns look(struct account *a, int m, int l, orc_u64 cost, orc_ns now)
{
	if (!a->bucket || !orc_bucket_limited(a->bucket)) {
		if (a->bucket)
			leave(a);
		return ORC_NEVER;
	}
	while (a->credit < cost) {
		orc_ns turn;

		if (!l)
			reserve(a, cost - a->credit, now);
		else if (!a->reserved)
			reserve(a, quantum(a->bucket, m, now), now);
		turn = turn_of(a);
		if (turn > now)
			return turn;
		a->credit += a->reserved;
		leave(a);
	}
	return ORC_NEVER;
}

static void arm(const struct disk *d, orc_ns turn)
{
	const struct itimerspec t = {.it_value = {turn / 1000000000, turn % 1000000000}};

	timerfd_settime(d->timer, TFD_TIMER_ABSTIME, &t, NULL);
}

/* The time since the last look counts for the level that it waited for. `look` held. */
static void count_wait(const struct disk *d, orc_ns now, struct orc_blk_counters *c)
{
	if (d->waits_for >= 0 && now > d->looked)
		c->waited[d->waits_for] += (orc_u64)(now - d->looked);
}

/* The request at the queue's head waits for that level from now on; -1: for none. */
static void wait_for(struct disk *d, int level, orc_ns now)
{
	pthread_mutex_lock(&d->look);
	count_wait(d, now, &d->counters);
	d->counters.waits += level >= 0 && d->waits_for < 0;
	d->waits_for = level;
	d->looked = now;
	pthread_mutex_unlock(&d->look);
}

/* Whether a bucket has a limit, or had one when the disk last looked. Most disks have none, and their requests cost no more. */
static bool is_limited(const struct disk *d)
{
	bool limited = d->waits_for >= 0;

	for (int m = 0; m < ORC_BLK_METERS; m++)
		for (int l = 0; l < ORC_BLK_LEVELS; l++) {
			const struct account *a = &d->account[m][l];

			limited |= a->bucket && (a->reserved || orc_bucket_limited(a->bucket));
		}
	return limited;
}

static bool may_go(struct disk *d, const struct request *r)
{
	orc_ns now, turn = ORC_NEVER;
	int waits_for = -1;

	if (!is_limited(d))
		return true;
	now = orc_now();
	for (int m = 0; m < ORC_BLK_METERS; m++)
		for (int l = 0; l < ORC_BLK_LEVELS; l++) {
			orc_ns t = look(&d->account[m][l], m, l, r->cost[m], now);

			if (t > now && t > turn) {
				turn = t;
				waits_for = l;
			}
		}
	wait_for(d, waits_for, now);
	if (waits_for >= 0) {
		arm(d, turn);
		return false;
	}
	for (int m = 0; m < ORC_BLK_METERS; m++)
		for (int l = 0; l < ORC_BLK_LEVELS; l++) {
			struct account *a = &d->account[m][l];

			a->credit -= a->credit < r->cost[m] ? a->credit : r->cost[m]; /* less, if its limit was taken off */
		}
	return true;
}

/* The disk is done with its buckets. A reset is not: what was reserved stays its own, or a guest that resets its disk again and
 * again would use up what others share with it. */
static void leave_all(struct disk *d)
{
	wait_for(d, -1, orc_now());
	for (int m = 0; m < ORC_BLK_METERS; m++)
		for (int l = 0; l < ORC_BLK_LEVELS; l++)
			leave(&d->account[m][l]);
}

static void idle(struct disk *d) /* the driver has nothing that waits any more */
{
	if (d->waits_for >= 0)
		wait_for(d, -1, orc_now());
}

/* ---- one request ------------------------------------------------------------------------------------------------- */

static void count_error(struct disk *d, int result)
{
	pthread_mutex_lock(&d->look);
	d->counters.errors++;
	d->counters.no_space += result == -ENOSPC || result == -EDQUOT;
	pthread_mutex_unlock(&d->look);
}

static void finish(struct disk *d, struct request *r, uint8_t status)
{
	const struct iovec *last = &r->chain.iov[r->chain.readable + r->chain.writable - 1];
	uint32_t written = 0;

	if (orc_queue_is_open(&d->virtio.queue[0]))
		((uint8_t *)last->iov_base)[last->iov_len - 1] = status;
	if (status != VIRTIO_BLK_S_OK)
		count_error(d, r->operation.result);
	/* 2.7.8.2: so many from the first one on. The status is the last one. */
	if (r->chain.writable_bytes == 1)
		written = 1;
	else if (status == VIRTIO_BLK_S_OK)
		written = r->data + (r->data + 1 == r->chain.writable_bytes);
	orc_queue_put(&d->virtio.queue[0], &r->chain, written);
}

static bool has(const struct disk *d, unsigned feature)
{
	return orc_virtio_has(&d->virtio, feature);
}

/* Within the disk, and as its blocks are. */
static bool is_range(const struct disk *d, orc_u64 sector, orc_u64 size)
{
	const orc_u64 sectors = d->store->size / SECTOR;

	return size && sector < sectors && size / SECTOR <= sectors - sector &&
	       !((sector * SECTOR | size) & (d->store->block - 1));
}

static uint8_t check_transfer(const struct disk *d, struct request *r, orc_u64 sector, bool write, uint32_t in, uint32_t out)
{
	const struct orc_chain *c = &r->chain;
	uint32_t size = write ? out : in;

	if (write ? in : out)
		return VIRTIO_BLK_S_IOERR;
	if (size > (uint32_t)SEGMENTS * SEGMENT || !is_range(d, sector, size) || (write && d->store->readonly))
		return VIRTIO_BLK_S_IOERR;
	r->operation = (struct orc_operation){.kind = write ? ORC_OPERATION_WRITE : ORC_OPERATION_READ,
					      .offset = sector * SECTOR, .size = size, .iov = r->iov};
	r->operation.pieces = (unsigned)(write ? orc_iov_slice(c->iov, c->readable, HEADER, size, r->iov)
					       : orc_iov_slice(c->iov + c->readable, c->writable, 0, size, r->iov));
	r->data = in;
	r->cost[ORC_BLK_SECTORS] = size / SECTOR;
	return VIRTIO_BLK_S_OK;
}

static uint8_t check_flush(const struct disk *d, struct request *r, uint32_t in, uint32_t out)
{
	if (!has(d, VIRTIO_BLK_F_FLUSH))
		return VIRTIO_BLK_S_UNSUPP;
	if (in || out)
		return VIRTIO_BLK_S_IOERR;
	r->operation = (struct orc_operation){.kind = ORC_OPERATION_FLUSH};
	return VIRTIO_BLK_S_OK;
}

/* 5.2.6.2 */
static uint8_t check_range(const struct disk *d, struct request *r, bool zero, uint32_t in, uint32_t out)
{
	struct virtio_blk_discard_write_zeroes range;

	if (!has(d, zero ? VIRTIO_BLK_F_WRITE_ZEROES : VIRTIO_BLK_F_DISCARD))
		return VIRTIO_BLK_S_UNSUPP;
	if (in || out != sizeof range)
		return VIRTIO_BLK_S_IOERR;
	orc_chain_read(&r->chain, HEADER, &range, sizeof range);
	if (range.flags & ~(zero ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0u))
		return VIRTIO_BLK_S_UNSUPP;
	if (range.num_sectors > RANGE / SECTOR || !is_range(d, range.sector, (orc_u64)range.num_sectors * SECTOR))
		return VIRTIO_BLK_S_IOERR;
	r->operation = (struct orc_operation){.kind = zero ? ORC_OPERATION_ZERO : ORC_OPERATION_DISCARD,
					      .offset = range.sector * SECTOR, .size = (orc_u64)range.num_sectors * SECTOR};
	r->cost[ORC_BLK_SECTORS] = zero ? range.num_sectors : 0; /* a store may have to write them */
	return VIRTIO_BLK_S_OK;
}

/* Whether it may be started. VIRTIO_BLK_S_OK with an operation of no kind (ORC_OPERATIONS): it is done already. */
static uint8_t check(struct disk *d, struct request *r)
{
	struct virtio_blk_outhdr header;
	const uint32_t in = r->chain.writable_bytes - 1;
	uint32_t out;

	r->data = 0;
	r->operation.result = 0;
	r->cost[ORC_BLK_OPERATIONS] = 1;
	r->cost[ORC_BLK_SECTORS] = 0;
	if (orc_chain_read(&r->chain, 0, &header, sizeof header) != HEADER)
		return VIRTIO_BLK_S_IOERR;
	out = r->chain.readable_bytes - HEADER;
	switch (header.type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		return check_transfer(d, r, header.sector, header.type == VIRTIO_BLK_T_OUT, in, out);
	case VIRTIO_BLK_T_FLUSH:
		return check_flush(d, r, in, out);
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return check_range(d, r, header.type == VIRTIO_BLK_T_WRITE_ZEROES, in, out);
	case VIRTIO_BLK_T_GET_ID:
		r->operation.kind = ORC_OPERATIONS;
		if (out || !in)
			return VIRTIO_BLK_S_IOERR;
		return VIRTIO_BLK_S_OK;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}

static void give_id(struct disk *d, struct request *r)
{
	uint32_t room = r->chain.writable_bytes - 1;

	r->data = (uint32_t)orc_chain_write(&r->chain, 0, d->id, room < sizeof d->id ? room : sizeof d->id);
	finish(d, r, VIRTIO_BLK_S_OK);
}

static size_t requests_size(void)
{
	return IN_FLIGHT * sizeof(struct request);
}

/* One that is not in flight, of those that were before, if it can be. NULL: all are. */
static struct request *idle_request(const struct disk *d)
{
	if (d->free)
		return d->free;
	return d->begun < IN_FLIGHT ? &d->request[d->begun] : NULL;
}

/* What idle_request gave is in flight from now on. */
static void begin_request(struct disk *d)
{
	if (d->free)
		d->free = d->free->next;
	else
		d->begun++;
}

static orc_u64 bytes_of(const struct request *r)
{
	return r->cost[ORC_BLK_SECTORS] * SECTOR;
}

static bool is_full(const struct disk *d) /* until a request is done */
{
	return !idle_request(d) || d->in_flight >= BYTES_IN_FLIGHT;
}

static enum orc_served take_all(struct disk *d, struct orc_queue *q)
{
	enum orc_served served = ORC_MORE;
	orc_u64 bytes = 0;

	for (unsigned left = q->size; left && bytes < TURN; left--) {
		struct request *r = idle_request(d);
		uint8_t status;

		if (is_full(d)) {
			served = ORC_WAITING;
			break;
		}
		if (!orc_queue_take(q, &r->chain)) {
			idle(d);
			served = ORC_DRAINED;
			break;
		}
		if (!r->chain.writable) { /* nowhere to put a status: 5.2.6 */
			orc_queue_refuse(q, &r->chain);
			continue;
		}
		status = check(d, r);
		if (status != VIRTIO_BLK_S_OK) {
			finish(d, r, status);
			continue;
		}
		if (!may_go(d, r)) {
			orc_queue_give_back(q, &r->chain);
			served = ORC_WAITING; /* for the timer */
			break;
		}
		if (r->operation.kind == ORC_OPERATIONS) {
			give_id(d, r);
			continue;
		}
		begin_request(d);
		bytes += bytes_of(r);
		d->in_flight += bytes_of(r);
		/* 5.2.6.2: a driver that can't flush takes what is written for durable. */
		r->operation.durable = !has(d, VIRTIO_BLK_F_FLUSH);
		orc_store_start(d->store, &r->operation);
	}
	orc_store_submit(d->store);
	return served;
}

/* ---- what is done ------------------------------------------------------------------------------------------------ */

static void count(struct disk *d, const struct request *r)
{
	const orc_u64 bytes = bytes_of(r);
	struct orc_blk_counters *c = &d->counters;

	pthread_mutex_lock(&d->look);
	switch (r->operation.kind) {
	case ORC_OPERATION_READ:
		c->reads++;
		c->read_bytes += bytes;
		break;
	case ORC_OPERATION_WRITE:
		c->writes++;
		c->written_bytes += bytes;
		break;
	case ORC_OPERATION_FLUSH:
		c->flushes++;
		break;
	case ORC_OPERATION_DISCARD:
		c->discards++;
		break;
	default:
		c->zeroes++;
	}
	pthread_mutex_unlock(&d->look);
}

static void put_done(struct disk *d)
{
	struct orc_operation *next;

	for (struct orc_operation *o = orc_store_done(d->store); o; o = next) {
		struct request *r = ORC_CONTAINER(o, struct request, operation);

		next = o->next;
		if (!o->result)
			count(d, r);
		finish(d, r, o->result ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
		d->in_flight -= bytes_of(r);
		r->next = d->free;
		d->free = r;
	}
	orc_io_spent(&d->virtio, orc_store_spent(d->store));
}

static void ready(orc_virtio *v, int epoll)
{
	struct disk *d = (struct disk *)v;
	uint64_t expired;

	(void)epoll; /* what it has is read one by one */
	if (d->timer >= 0)
		while (read(d->timer, &expired, sizeof expired) < 0 && errno == EINTR)
			;
	put_done(d);
}

/* What the host's page cache has is done when it has been submitted: it is put at once, without another turn of the thread. */
static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	struct disk *d = (struct disk *)v;
	enum orc_served served = take_all(d, &v->queue[queue]);
	const bool full = is_full(d);

	put_done(d);
	return full && !is_full(d) ? ORC_MORE : served;
}

static void reset(orc_virtio *v)
{
	idle((struct disk *)v);
}

static void reset_queue(orc_virtio *v, uint16_t queue)
{
	(void)queue; /* it has one */
	reset(v);
}

/* ---- the device ------------------------------------------------------------------------------------------------- */

static void free_disk(orc_virtio *v)
{
	struct disk *d = (struct disk *)v;

	orc_virtio_blk_close(v);
	orc_virtio_fini(v);
	pthread_mutex_destroy(&d->look);
	munmap(d->request, requests_size());
	free(d);
}

static const struct orc_virtio_ops ops = {
	.type = VIRTIO_ID_BLOCK, .queues = 1, .queue_size = QUEUE,
	/* Up to the part that newer headers have more of. */
	.config_size = offsetof(struct virtio_blk_config, write_zeroes_may_unmap) + 4,
	.features = 1ull << VIRTIO_BLK_F_SIZE_MAX | 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
		    1ull << VIRTIO_BLK_F_FLUSH,
	.serve = serve, .reset = reset, .queue_reset = reset_queue, .free = free_disk,
};

static void configure(struct disk *d)
{
	const orc_store *s = d->store;
	const uint32_t range = RANGE / SECTOR;
	struct virtio_blk_config c = {.capacity = s->size / SECTOR, .size_max = SEGMENT, .seg_max = SEGMENTS, .blk_size = s->block};

	if (!s->readonly) {
		c.max_discard_sectors = c.max_write_zeroes_sectors = range;
		c.max_discard_seg = c.max_write_zeroes_seg = 1;
		c.discard_sector_alignment = ALIGNMENT / SECTOR;
		c.write_zeroes_may_unmap = 1;
	}
	memcpy(d->virtio.config, &c, ops.config_size);
}

int orc_virtio_blk_new(const orc_guest_memory *memory, orc_store *store, const char *id, orc_virtio **out)
{
	const orc_u64 features = store->readonly ? 1ull << VIRTIO_BLK_F_RO
						 : 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
	struct disk *d = calloc(1, sizeof *d);
	int epoll = epoll_create1(EPOLL_CLOEXEC), rc = 0;
	/* Mapped, so that it costs memory only as it is used; calloc may give memory that was used before, and clears it. */
	void *requests = mmap(NULL, requests_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (epoll < 0)
		rc = -errno;
	else if (!d || requests == MAP_FAILED)
		rc = -ENOMEM;
	else
		rc = orc_store_watch(store, epoll);
	if (rc) {
		if (epoll >= 0)
			close(epoll);
		if (requests != MAP_FAILED)
			munmap(requests, requests_size());
		free(d);
		return rc;
	}
	d->request = requests;
	pthread_mutex_init(&d->look, NULL);
	d->store = store;
	d->timer = d->waits_for = -1;
	memcpy(d->id, id, strnlen(id, sizeof d->id));
	orc_virtio_init(&d->virtio, &ops, memory, 0, features);
	orc_virtio_watch(&d->virtio, epoll, ready);
	configure(d);
	*out = &d->virtio;
	return 0;
}

int orc_virtio_blk_set_bucket(orc_virtio *v, int meter, int level, orc_bucket *b)
{
	struct epoll_event event = {.events = EPOLLIN};
	struct disk *d = (struct disk *)v;

	if (d->timer < 0) {
		int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);

		if (timer < 0 || epoll_ctl(v->watched, EPOLL_CTL_ADD, timer, &event)) {
			int rc = -errno;

			if (timer >= 0)
				close(timer);
			return rc;
		}
		d->timer = timer;
	}
	d->account[meter][level].bucket = b;
	return 0;
}

void orc_virtio_blk_limit_changed(orc_virtio *v)
{
	orc_virtio_again(v, 0);
}

int orc_virtio_blk_thread(orc_virtio *v)
{
	struct disk *d = (struct disk *)v;

	return d->store ? atomic_load(&d->store->tid) : 0;
}

void orc_virtio_blk_close(orc_virtio *v)
{
	struct disk *d = (struct disk *)v;

	if (!d->store) /* it was closed, and its buckets may be gone */
		return;
	pthread_mutex_lock(&v->lock);
	leave_all(d);
	if (d->timer >= 0)
		close(d->timer);
	d->timer = -1;
	pthread_mutex_unlock(&v->lock);
	orc_store_free(d->store); /* it may take long */
	d->store = NULL;
}

void orc_virtio_blk_look(orc_virtio *v, struct orc_blk_counters *out)
{
	struct disk *d = (struct disk *)v;

	pthread_mutex_lock(&d->look);
	*out = d->counters;
	count_wait(d, orc_now(), out);
	pthread_mutex_unlock(&d->look);
}
