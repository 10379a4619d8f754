/* What all stores have: operations that go on by io_uring, or on a thread that waits for them. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "store.h"

/* ---- the thread ------------------------------------------------------------------------------------------------- */

static void finish(orc_store *s, struct orc_operation *o, int result)
{
	o->result = result;
	o->next = s->done;
	s->done = o;
}

static void wake(orc_store *s)
{
	const uint64_t one = 1;

	while (write(s->wake, &one, sizeof one) < 0 && errno == EINTR)
		;
}

static void *run(void *argument)
{
	orc_store *s = argument;

	pthread_mutex_lock(&s->lock);
	for (;;) {
		struct orc_operation *o = s->first;
		int result;

		if (!o) {
			if (s->stopping)
				break;
			pthread_cond_wait(&s->more, &s->lock);
			continue;
		}
		s->first = o->next;
		if (!s->first)
			s->last = &s->first;
		pthread_mutex_unlock(&s->lock);
		result = s->ops->execute(s, o);
		pthread_mutex_lock(&s->lock);
		finish(s, o, result);
		wake(s);
	}
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

static int begin(orc_store *s) /* no signal comes to it, as to any thread of ours */
{
	enum { STACK = 128 * 1024 }; /* no call of it goes deep, and a fleet has many disks */
	pthread_attr_t attributes;
	sigset_t all, before;
	int rc = -pthread_attr_init(&attributes);

	if (rc)
		return rc;
	pthread_attr_setstacksize(&attributes, STACK);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	rc = -pthread_create(&s->thread, &attributes, run, s);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (rc)
		return rc;
	pthread_setname_np(s->thread, "orchestra-disk");
	s->started = true;
	return 0;
}

static void to_thread(orc_store *s, struct orc_operation *o)
{
	int rc = s->started ? 0 : begin(s);

	pthread_mutex_lock(&s->lock);
	if (rc) {
		finish(s, o, rc);
		wake(s);
	} else {
		o->next = NULL;
		*s->last = o;
		s->last = &o->next;
		pthread_cond_signal(&s->more);
	}
	pthread_mutex_unlock(&s->lock);
}

/* ---- what a disk asks for ----------------------------------------------------------------------------------------- */

static enum orc_uring_kind ring_kind(const struct orc_operation *o)
{
	switch (o->kind) {
	case ORC_OPERATION_READ:
		return ORC_URING_READ;
	case ORC_OPERATION_WRITE:
		return o->durable ? ORC_URING_WRITE_DURABLE : ORC_URING_WRITE;
	default:
		return ORC_URING_FLUSH;
	}
}

void orc_store_start(orc_store *s, struct orc_operation *o)
{
	bool ring = s->ring && o->kind <= ORC_OPERATION_FLUSH && s->ops->by_ring && s->ops->by_ring(s, o);

	if (ring && s->n_pushed < ORC_STORE_MOST &&
	    orc_uring_push(s->ring, ring_kind(o), s->fd, o->iov, o->pieces, o->offset, o))
		s->pushed[s->n_pushed++] = o;
	else
		to_thread(s, o);
}

void orc_store_submit(orc_store *s)
{
	unsigned taken = s->n_pushed ? orc_uring_submit(s->ring) : 0;

	for (unsigned i = taken; i < s->n_pushed; i++) /* the kernel has no memory for them now */
		to_thread(s, s->pushed[i]);
	s->n_pushed = 0;
}

void orc_iov_advance(struct iovec **iov, unsigned *pieces, size_t bytes)
{
	while (*pieces && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		++*iov;
		--*pieces;
	}
	if (*pieces) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

/* The kernel has done a part of it at least, or failed. True: there is more to do. */
static bool goes_on(orc_store *s, struct orc_operation *o, int result)
{
	if (o->kind == ORC_OPERATION_FLUSH)
		return false;
	if (result == -EAGAIN || result == -EINTR) {
		to_thread(s, o); /* which waits */
		return true;
	}
	if (result <= 0 || (orc_u64)result >= o->size)
		return false;
	orc_iov_advance(&o->iov, &o->pieces, (size_t)result);
	o->offset += (unsigned)result;
	o->size -= (unsigned)result;
	orc_store_start(s, o);
	return true;
}

static int result_of(const struct orc_operation *o, int result)
{
	if (result < 0 || o->kind == ORC_OPERATION_FLUSH)
		return result;
	return (orc_u64)result >= o->size ? 0 : -EIO; /* the file is shorter than it was */
}

struct orc_operation *orc_store_done(orc_store *s)
{
	struct orc_operation *all;
	void *what;
	uint64_t count;
	int result;

	pthread_mutex_lock(&s->lock);
	all = s->done;
	s->done = NULL;
	if (all) /* else nobody has written to it: what goes by io_uring alone costs no call here */
		while (read(s->wake, &count, sizeof count) < 0 && errno == EINTR)
			;
	pthread_mutex_unlock(&s->lock);
	while (s->ring && orc_uring_next(s->ring, &what, &result)) {
		struct orc_operation *o = what;

		if (goes_on(s, o, result))
			continue;
		o->result = result_of(o, result);
		o->next = all;
		all = o;
	}
	orc_store_submit(s);
	return all;
}

static int add(int epoll, int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int orc_store_watch(orc_store *s, int epoll)
{
	int rc = add(epoll, s->wake);

	return !rc && s->ring ? add(epoll, orc_uring_fd(s->ring)) : rc;
}

void orc_store_free(orc_store *s)
{
	if (s)
		s->ops->free(s);
}

/* ---- for kinds -------------------------------------------------------------------------------------------------- */

int orc_store_init(orc_store *s, const struct orc_store_ops *ops, int fd, orc_u64 size, uint32_t block, unsigned flags)
{
	s->ops = ops;
	s->fd = fd;
	s->size = size;
	s->block = block;
	s->readonly = flags & ORC_STORE_READONLY;
	s->last = &s->first;
	s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (s->wake < 0)
		return -errno;
	if (!ops->by_ring || flags & ORC_STORE_NO_URING || orc_uring_new(ORC_STORE_MOST, &s->ring))
		s->ring = NULL; /* whatever the reason is: it works all the same */
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->more, NULL);
	return 0;
}

void orc_store_fini(orc_store *s)
{
	if (s->started) {
		pthread_mutex_lock(&s->lock);
		s->stopping = true;
		pthread_cond_signal(&s->more);
		pthread_mutex_unlock(&s->lock);
		pthread_join(s->thread, NULL);
	}
	orc_uring_free(s->ring);
	pthread_cond_destroy(&s->more);
	pthread_mutex_destroy(&s->lock);
	close(s->wake);
	close(s->fd);
}
