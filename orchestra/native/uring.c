#include <errno.h>
#include <stdlib.h>

#include "uring.h"

#if __has_include(<linux/io_uring.h>)
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__NR_io_uring_setup) && defined(IORING_FEAT_SINGLE_MMAP)

struct orc_uring {
	int fd;
	unsigned entries, pushed;
	uint8_t *rings; /* both */
	size_t rings_size;
	struct io_uring_sqe *sqe;
	uint32_t *sq_head, *sq_tail, *sq_array, sq_mask;
	uint32_t *cq_head, *cq_tail, cq_mask;
	struct io_uring_cqe *cqe;
};

static int map(orc_uring *u, const struct io_uring_params *p)
{
	size_t submissions = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	size_t completions = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);

	u->rings_size = submissions > completions ? submissions : completions;
	u->rings = mmap(NULL, u->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, IORING_OFF_SQ_RING);
	if (u->rings == MAP_FAILED)
		return -errno;
	u->sqe = mmap(NULL, p->sq_entries * sizeof *u->sqe, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd,
		      IORING_OFF_SQES);
	if (u->sqe == MAP_FAILED)
		return -errno;
	u->entries = p->sq_entries;
	u->sq_head = (uint32_t *)(u->rings + p->sq_off.head);
	u->sq_tail = (uint32_t *)(u->rings + p->sq_off.tail);
	u->sq_array = (uint32_t *)(u->rings + p->sq_off.array);
	u->sq_mask = *(uint32_t *)(u->rings + p->sq_off.ring_mask);
	u->cq_head = (uint32_t *)(u->rings + p->cq_off.head);
	u->cq_tail = (uint32_t *)(u->rings + p->cq_off.tail);
	u->cq_mask = *(uint32_t *)(u->rings + p->cq_off.ring_mask);
	u->cqe = (struct io_uring_cqe *)(u->rings + p->cq_off.cqes);
	return 0;
}

int orc_uring_new(unsigned entries, orc_uring **out)
{
	struct io_uring_params p;
	orc_uring *u = malloc(sizeof *u);
	int rc;

	if (!u)
		return -ENOMEM;
	*u = (orc_uring){.rings = MAP_FAILED, .sqe = MAP_FAILED};
	memset(&p, 0, sizeof p);
	u->fd = (int)syscall(__NR_io_uring_setup, entries, &p); /* close-on-exec: io_uring_setup(2) */
	/* Linux 5.4. One without it has too many bugs to be worth a second way. */
	rc = u->fd < 0 ? -errno : p.features & IORING_FEAT_SINGLE_MMAP ? map(u, &p) : -ENOSYS;
	if (rc)
		orc_uring_free(u);
	else
		*out = u;
	return rc;
}

void orc_uring_free(orc_uring *u)
{
	if (!u)
		return;
	if (u->sqe != MAP_FAILED)
		munmap(u->sqe, u->entries * sizeof *u->sqe);
	if (u->rings != MAP_FAILED)
		munmap(u->rings, u->rings_size);
	if (u->fd >= 0)
		close(u->fd);
	free(u);
}

int orc_uring_fd(const orc_uring *u)
{
	return u->fd;
}

bool orc_uring_push(orc_uring *u, enum orc_uring_kind kind, int fd, const struct iovec *iov, unsigned pieces,
		    uint64_t offset, void *what)
{
	uint32_t tail = *u->sq_tail, i = tail & u->sq_mask;
	struct io_uring_sqe *s = &u->sqe[i];

	if (tail - __atomic_load_n(u->sq_head, __ATOMIC_ACQUIRE) == u->entries)
		return false;
	memset(s, 0, sizeof *s);
	s->fd = fd;
	s->user_data = (uintptr_t)what;
	if (kind == ORC_URING_FLUSH) {
		s->opcode = IORING_OP_FSYNC;
		s->fsync_flags = IORING_FSYNC_DATASYNC;
	} else {
		s->opcode = kind == ORC_URING_READ ? IORING_OP_READV : IORING_OP_WRITEV;
		s->addr = (uintptr_t)iov;
		s->len = pieces;
		s->off = offset;
		s->rw_flags = kind == ORC_URING_WRITE_DURABLE ? RWF_DSYNC : 0;
	}
	u->sq_array[i] = i;
	__atomic_store_n(u->sq_tail, tail + 1, __ATOMIC_RELEASE);
	u->pushed++;
	return true;
}

unsigned orc_uring_submit(orc_uring *u)
{
	unsigned taken = 0;

	while (u->pushed) {
		long n = syscall(__NR_io_uring_enter, u->fd, u->pushed, 0, 0, NULL, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) { /* EAGAIN, EBUSY: no memory for them */
			__atomic_store_n(u->sq_tail, *u->sq_tail - u->pushed, __ATOMIC_RELEASE);
			u->pushed = 0;
			break;
		}
		taken += (unsigned)n;
		u->pushed -= (unsigned)n;
	}
	return taken;
}

bool orc_uring_next(orc_uring *u, void **what, int *result)
{
	uint32_t head = *u->cq_head;
	const struct io_uring_cqe *c = &u->cqe[head & u->cq_mask];

	if (head == __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE))
		return false;
	*what = (void *)(uintptr_t)c->user_data;
	*result = c->res;
	__atomic_store_n(u->cq_head, head + 1, __ATOMIC_RELEASE);
	return true;
}

#else /* these headers are older than Linux 5.4 */

int orc_uring_new(unsigned entries, orc_uring **out)
{
	(void)entries;
	(void)out;
	return -ENOSYS;
}

void orc_uring_free(orc_uring *u)
{
	(void)u;
}

int orc_uring_fd(const orc_uring *u)
{
	(void)u;
	return -1;
}

bool orc_uring_push(orc_uring *u, enum orc_uring_kind kind, int fd, const struct iovec *iov, unsigned pieces,
		    uint64_t offset, void *what)
{
	(void)u, (void)kind, (void)fd, (void)iov, (void)pieces, (void)offset, (void)what;
	return false;
}

unsigned orc_uring_submit(orc_uring *u)
{
	(void)u;
	return 0;
}

bool orc_uring_next(orc_uring *u, void **what, int *result)
{
	(void)u, (void)what, (void)result;
	return false;
}

#endif
