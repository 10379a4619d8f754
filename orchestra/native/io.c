/* A VM's I/O thread: waits for notifications, and serves the queues of its devices in turn, a ring's worth of each.
 *
 *   kick_fd, or orc_virtio_again  -> virtio->kicked -> orc_virtio_serve
 *   what a device watches         -> its callback
 *
 * All is done with io->lock held, and it waits without. So whoever has the lock knows that no device is being served, and that
 * none is as long as `holds` says so.
 *
 * It works for its guest, and rests as the guest's vCPUs do (io_rest.h). In a rest it looks at nothing but `wake`. A hold, a stop
 * and a lifted cap end one. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"
#include "io_rest.h"
#include "virtio.h"

enum {
	DEVICES = 32,               /* as many as functions on a bus */
	STACK = 256 * 1024,         /* a chain or two, and what a library call needs */
	WATCHED = ORC_VIRTIO_QUEUES, /* number of a source behind those of queues */
	WAKE = DEVICES,             /* likewise of a device */
	SOURCES = WATCHED + 1,
};

struct orc_io {
	int epoll, wake;
	orc_vcpu *voice;
	pthread_t thread;
	_Atomic int tid; /* 0: it has ended */
	_Atomic orc_u64 others; /* ns of CPU that other threads have used for its devices */
	struct orc_cap *cap; /* owner; NULL: it has none */
	struct orc_rest rest;
	bool started; /* owner: and not joined */
	/* Who holds it. Counted up before the lock is taken: a thread that has work takes the lock again and again, and would be in
	 * front of whoever wants it. */
	_Atomic unsigned holds;
	/* The owner counts holds by orc_io_hold_soon; the thread writes the number of the one in which it found that nothing is in
	 * flight. By a number, and not by a flag: the next hold may begin while the thread looks. */
	_Atomic unsigned hold, still;
	pthread_mutex_t lock; /* what follows */
	pthread_cond_t quiet; /* something may not be in flight any more */
	bool stopping;
	orc_virtio *device[DEVICES]; /* NULL: none of that number */
};

static uint64_t source(unsigned device, unsigned number)
{
	return (uint64_t)device * SOURCES + number;
}

/* ---- the thread ------------------------------------------------------------------------------------------------- */

static void clear(int eventfd)
{
	uint64_t count;

	while (read(eventfd, &count, sizeof count) < 0 && errno == EINTR)
		;
}

/* One that was detached meanwhile may still be told: nobody is there, or another one, who finds nothing. */
static void told(orc_io *io, uint64_t what)
{
	orc_virtio *v;
	unsigned number = (unsigned)(what % SOURCES);

	if (what == source(WAKE, 0)) {
		clear(io->wake);
		return;
	}
	v = io->device[what / SOURCES];
	if (!v)
		return;
	pthread_mutex_lock(&v->lock);
	if (number == WATCHED) {
		orc_virtio_called(v);
	} else {
		v->kicks++;
		io->rest.notified++;
		atomic_fetch_or(&v->kicked, 1ull << number);
	}
	pthread_mutex_unlock(&v->lock);
}

/* How many requests it took. */
static orc_u64 serve_queue(orc_virtio *v, uint16_t i)
{
	const struct orc_queue *q = &v->queue[i];
	orc_u64 before = q->requests + q->in_flight;

	orc_virtio_serve(v, i);
	return q->requests + q->in_flight - before;
}

static void serve(orc_io *io, orc_virtio *v)
{
	orc_u64 kicked = atomic_exchange(&v->kicked, 0);

	if (!kicked)
		return;
	pthread_mutex_lock(&v->lock);
	if (kicked & ORC_KICKED_CONFIG) {
		if (atomic_load(&io->holds))
			atomic_fetch_or(&v->kicked, ORC_KICKED_CONFIG);
		else
			orc_virtio_configure(v);
	}
	for (uint16_t i = 0; i < v->queues; i++) {
		if (!(kicked >> i & 1))
			continue;
		if (atomic_load(&io->holds)) /* it began meanwhile: what is left is served later */
			atomic_fetch_or(&v->kicked, 1ull << i);
		else
			io->rest.taken += serve_queue(v, i);
	}
	pthread_mutex_unlock(&v->lock);
}

static bool has_work(orc_io *io)
{
	if (atomic_load(&io->holds))
		return false;
	for (unsigned i = 0; i < DEVICES; i++)
		if (io->device[i] && atomic_load(&io->device[i]->kicked))
			return true;
	return false;
}

static bool is_quiet(orc_io *io)
{
	uint32_t in_flight = 0;

	for (unsigned i = 0; i < DEVICES; i++) {
		orc_virtio *v = io->device[i];

		if (!v)
			continue;
		pthread_mutex_lock(&v->lock);
		in_flight += orc_virtio_in_flight(v);
		pthread_mutex_unlock(&v->lock);
	}
	return !in_flight;
}

/* While it is held: whether nothing is in flight, and whoever asked for it by orc_io_hold_soon is told, once. */
static void settle(orc_io *io)
{
	unsigned hold = atomic_load(&io->hold);

	if (!atomic_load(&io->holds))
		return;
	pthread_cond_broadcast(&io->quiet);
	if (atomic_load(&io->still) == hold || !is_quiet(io))
		return;
	atomic_store(&io->still, hold);
	if (io->voice)
		orc_talk(io->voice);
}

/* ---- the thread's life ------------------------------------------------------------------------------------------ */

static void *run(void *argument)
{
	enum { EVENTS = 32 };
	orc_io *io = argument;
	struct epoll_event event[EVENTS];

	atomic_store(&io->tid, gettid());
	orc_prefer_no_more(ORC_PREFERRED);
	pthread_mutex_lock(&io->lock);
	pthread_cond_broadcast(&io->quiet);
	while (!io->stopping) {
		bool work = has_work(io);
		orc_ns until;
		int n;

		pthread_mutex_unlock(&io->lock);
		until = atomic_load(&io->holds) ? ORC_NEVER : orc_rest_until(&io->rest);
		if (until != ORC_NEVER) {
			orc_rest_sleep(io->wake, until);
			clear(io->wake);
			pthread_mutex_lock(&io->lock);
			settle(io);
			continue;
		}
		n = epoll_wait(io->epoll, event, EVENTS, work ? 0 : -1);
		pthread_mutex_lock(&io->lock);
		for (int i = 0; i < n; i++)
			told(io, event[i].data.u64);
		for (unsigned i = 0; i < DEVICES && !io->stopping; i++)
			if (io->device[i])
				serve(io, io->device[i]);
		orc_rest_account(&io->rest);
		settle(io);
	}
	orc_rest_leave(&io->rest);
	atomic_store(&io->tid, 0);
	pthread_mutex_unlock(&io->lock);
	return NULL;
}

/* ---- the owner's side ------------------------------------------------------------------------------------------- */

void orc_io_wake(orc_io *io)
{
	const uint64_t one = 1;

	while (write(io->wake, &one, sizeof one) < 0 && errno == EINTR)
		;
}

/* `events`: EPOLLIN, and with EPOLLET each write to an eventfd is told once, so that nobody needs to read it. */
static int add(orc_io *io, int fd, uint32_t events, uint64_t what)
{
	struct epoll_event event = {.events = events, .data.u64 = what};

	return epoll_ctl(io->epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static void free_it(orc_io *io)
{
	if (io->epoll >= 0)
		close(io->epoll);
	if (io->wake >= 0)
		close(io->wake);
	pthread_cond_destroy(&io->quiet);
	pthread_mutex_destroy(&io->lock);
	free(io);
}

int orc_io_start(const char *name, orc_io **out)
{
	orc_io *io = calloc(1, sizeof *io);
	int rc = 0;

	if (!io)
		return -ENOMEM;
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->quiet, NULL);
	io->wake = -1;
	io->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (io->epoll >= 0)
		io->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (io->epoll < 0 || io->wake < 0)
		rc = -errno;
	if (!rc)
		rc = add(io, io->wake, EPOLLIN, source(WAKE, 0));
	if (!rc)
		rc = orc_thread_start(&io->thread, name, STACK, run, io);
	if (rc) {
		free_it(io);
	} else {
		io->started = true;
		/* Who isolates the VM, or looks at its threads, from now on finds this one. */
		pthread_mutex_lock(&io->lock);
		while (!atomic_load(&io->tid))
			pthread_cond_wait(&io->quiet, &io->lock);
		pthread_mutex_unlock(&io->lock);
		*out = io;
	}
	return rc;
}

void orc_io_set_bucket(orc_io *io, int level, orc_bucket *b)
{
	io->rest.bucket[level] = b;
}

struct orc_cap **orc_io_cap_of(orc_io *io)
{
	return &io->cap;
}

int orc_io_tid(const orc_io *io)
{
	return atomic_load(&((orc_io *)io)->tid);
}

void orc_io_spent(orc_virtio *v, orc_u64 ns)
{
	orc_io *io = atomic_load(&v->io);

	if (io)
		atomic_fetch_add_explicit(&io->others, ns, memory_order_relaxed);
}

orc_u64 orc_io_others(const orc_io *io)
{
	return atomic_load_explicit(&((orc_io *)io)->others, memory_order_relaxed);
}

void orc_io_rest(orc_io *io, bool on)
{
	atomic_store(&io->rest.held, on);
	orc_io_wake(io);
}

void orc_io_set_voice(orc_io *io, orc_vcpu *v)
{
	pthread_mutex_lock(&io->lock);
	io->voice = v;
	pthread_mutex_unlock(&io->lock);
}

orc_vcpu *orc_io_voice(orc_virtio *v)
{
	orc_io *io = atomic_load(&v->io);

	return io ? io->voice : NULL;
}

/* Its lock, with the thread out of the way. */
static void enter(orc_io *io)
{
	atomic_fetch_add(&io->holds, 1);
	pthread_mutex_lock(&io->lock);
}

static void leave(orc_io *io)
{
	pthread_mutex_unlock(&io->lock);
	orc_io_let_go(io);
}

void orc_io_let_go(orc_io *io)
{
	if (atomic_fetch_sub(&io->holds, 1) == 1)
		orc_io_wake(io);
}

static void wait_until_quiet(orc_io *io)
{
	while (io->started && !is_quiet(io))
		pthread_cond_wait(&io->quiet, &io->lock);
}

void orc_io_hold_soon(orc_io *io)
{
	atomic_fetch_add(&io->hold, 1);
	atomic_fetch_add(&io->holds, 1);
	if (!orc_io_is_still(io))
		orc_io_wake(io); /* it may be at a queue, and finish it with nothing in flight; or rest */
}

/* A device whose lock we had since the hold began, with nothing in flight, takes nothing any more: the thread looks at `holds`
 * with that lock held. */
bool orc_io_is_still(const orc_io *io)
{
	if (atomic_load(&io->still) == atomic_load(&io->hold))
		return true;
	for (unsigned i = 0; i < DEVICES; i++)
		if (io->device[i] && orc_virtio_outstanding(io->device[i]))
			return false;
	return true;
}

void orc_io_hold(orc_io *io)
{
	orc_io_hold_soon(io);
	orc_io_wait(io);
}

void orc_io_wait(orc_io *io)
{
	pthread_mutex_lock(&io->lock);
	wait_until_quiet(io);
	pthread_mutex_unlock(&io->lock);
}

static void remove_sources(orc_io *io, const orc_virtio *v)
{
	for (unsigned i = 0; i < v->queues; i++)
		if (v->kick_fd[i] >= 0)
			epoll_ctl(io->epoll, EPOLL_CTL_DEL, v->kick_fd[i], NULL);
	if (v->watched >= 0)
		epoll_ctl(io->epoll, EPOLL_CTL_DEL, v->watched, NULL);
}

static int add_sources(orc_io *io, const orc_virtio *v, unsigned number)
{
	int rc = v->watched < 0 ? 0 : add(io, v->watched, EPOLLIN, source(number, WATCHED));

	for (unsigned i = 0; !rc && i < v->queues; i++)
		if (v->kick_fd[i] >= 0)
			rc = add(io, v->kick_fd[i], EPOLLIN | EPOLLET, source(number, i));
	if (rc)
		remove_sources(io, v);
	return rc;
}

int orc_io_attach(orc_io *io, orc_virtio *v)
{
	unsigned number = 0;
	int rc = -ENOSPC;

	enter(io);
	while (number < DEVICES && io->device[number])
		number++;
	if (number < DEVICES)
		rc = add_sources(io, v, number);
	if (!rc) {
		io->device[number] = v;
		atomic_store(&v->io, io); /* what was kicked before is seen to when the hold ends */
	}
	leave(io);
	return rc;
}

void orc_io_detach(orc_io *io, orc_virtio *v)
{
	enter(io);
	wait_until_quiet(io);
	for (unsigned i = 0; i < DEVICES; i++) {
		if (io->device[i] != v)
			continue;
		io->device[i] = NULL;
		remove_sources(io, v);
		atomic_store(&v->io, NULL); /* whoever has work for it wakes nobody any more: orc_io_free may be next */
	}
	leave(io);
}

void orc_io_stop(orc_io *io)
{
	if (!io->started)
		return;
	enter(io);
	wait_until_quiet(io);
	io->stopping = true;
	leave(io);
	orc_io_wake(io); /* others may hold it */
	pthread_join(io->thread, NULL);
	io->started = false;
}

void orc_io_free(orc_io *io)
{
	if (!io)
		return;
	orc_io_stop(io);
	free_it(io);
}
