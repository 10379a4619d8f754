/* A store that is a file or a block device, byte for byte; and blocking calls on files, for all stores.
 *
 * With O_DIRECT, memory must be aligned as the file's blocks are. A guest need not have it so: such a request goes through
 * one buffer of the store's thread, piece by piece. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "store.h"
#include "virtqueue.h"

enum { BOUNCE = 256 * 1024 }; /* where a longer one is hardly faster; a multiple of any block */

struct file {
	orc_store store;
	bool direct;
	uint8_t *bounce; /* the thread's; NULL: it was not needed yet */
};

/* ---- calls that wait -------------------------------------------------------------------------------------------- */

static int all(bool write, int fd, struct iovec *iov, unsigned pieces, orc_u64 offset)
{
	orc_iov_advance(&iov, &pieces, 0);
	while (pieces) {
		ssize_t n = write ? pwritev(fd, iov, (int)pieces, (off_t)offset) : preadv(fd, iov, (int)pieces, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -EIO;
		offset += (orc_u64)n;
		orc_iov_advance(&iov, &pieces, (size_t)n);
	}
	return 0;
}

int orc_read_all(int fd, struct iovec *iov, unsigned pieces, orc_u64 offset)
{
	return all(false, fd, iov, pieces, offset);
}

int orc_write_all(int fd, struct iovec *iov, unsigned pieces, orc_u64 offset)
{
	return all(true, fd, iov, pieces, offset);
}

int orc_flush(int fd)
{
	while (fdatasync(fd))
		if (errno != EINTR)
			return -errno;
	return 0;
}

static int punch(int fd, int mode, orc_u64 offset, orc_u64 size)
{
	while (fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size))
		if (errno != EINTR)
			return -errno;
	return 0;
}

static bool cant(int rc) /* this file system or device, and not this one time */
{
	return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EINVAL;
}

int orc_zero(int fd, orc_u64 offset, orc_u64 size)
{
	static const _Alignas(4096) uint8_t zeroes[64 * 1024];
	int rc = punch(fd, FALLOC_FL_PUNCH_HOLE, offset, size);

	if (cant(rc))
		rc = punch(fd, FALLOC_FL_ZERO_RANGE, offset, size);
	if (!cant(rc))
		return rc;
	for (rc = 0; !rc && size;) {
		size_t n = size < sizeof zeroes ? (size_t)size : sizeof zeroes;
		struct iovec iov = {(void *)(uintptr_t)zeroes, n};

		rc = orc_write_all(fd, &iov, 1, offset);
		offset += n;
		size -= n;
	}
	return rc;
}

/* ---- O_DIRECT ---------------------------------------------------------------------------------------------------- */

int orc_file_block(int fd)
{
	enum { USUAL = 4096 }; /* the largest that there is in practice */
	struct stat st;
	int block = 0;

	if (fstat(fd, &st))
		return -errno;
	if (S_ISBLK(st.st_mode))
		return ioctl(fd, BLKSSZGET, &block) ? -errno : block;
#if defined(STATX_DIOALIGN) && defined(__NR_statx)
	struct statx stx = {0};

	if (!syscall(__NR_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) && stx.stx_mask & STATX_DIOALIGN) {
		uint32_t most = stx.stx_dio_mem_align > stx.stx_dio_offset_align ? stx.stx_dio_mem_align : stx.stx_dio_offset_align;

		if (!stx.stx_dio_offset_align || most > USUAL)
			return -EINVAL;
		return most < 512 ? 512 : (int)most;
	}
#endif
	return USUAL;
}

static bool is_aligned(const orc_store *s, const struct orc_operation *o)
{
	for (unsigned i = 0; i < o->pieces; i++)
		if (((uintptr_t)o->iov[i].iov_base | o->iov[i].iov_len) & (s->block - 1))
			return false;
	return !((o->offset | o->size) & (s->block - 1)); /* the rest of a short one need not be */
}

/* Between the pieces and the buffer. */
static void copy(struct iovec *iov, unsigned pieces, uint8_t *buffer, size_t size, bool from_pieces)
{
	for (unsigned i = 0; i < pieces && size; i++) {
		size_t n = iov[i].iov_len < size ? iov[i].iov_len : size;

		if (from_pieces)
			memcpy(buffer, iov[i].iov_base, n);
		else
			memcpy(iov[i].iov_base, buffer, n);
		buffer += n;
		size -= n;
	}
}

static int by_bounce(struct file *f, struct orc_operation *o)
{
	const orc_u64 mask = f->store.block - 1;

	if (!f->bounce)
		f->bounce = aligned_alloc(4096, BOUNCE);
	if (!f->bounce)
		return -ENOMEM;
	while (o->size) {
		size_t n = o->size < BOUNCE ? (size_t)o->size : BOUNCE;
		struct iovec whole = {f->bounce, n};
		int rc;

		if (o->offset & mask || n & mask) /* the rest of one that ended within a block, which no file system does */
			return -EIO;
		if (o->kind == ORC_OPERATION_WRITE) {
			copy(o->iov, o->pieces, f->bounce, n, true);
			rc = orc_write_all(f->store.fd, &whole, 1, o->offset);
		} else {
			rc = orc_read_all(f->store.fd, &whole, 1, o->offset);
			if (!rc)
				copy(o->iov, o->pieces, f->bounce, n, false);
		}
		if (rc)
			return rc;
		orc_iov_advance(&o->iov, &o->pieces, n);
		o->offset += n;
		o->size -= n;
	}
	return 0;
}

/* ---- the store -------------------------------------------------------------------------------------------------- */

static bool by_ring(const orc_store *s, const struct orc_operation *o)
{
	return o->kind == ORC_OPERATION_FLUSH || !((const struct file *)s)->direct || is_aligned(s, o);
}

static int transfer(struct file *f, struct orc_operation *o)
{
	if (f->direct && !is_aligned(&f->store, o))
		return by_bounce(f, o);
	return all(o->kind == ORC_OPERATION_WRITE, f->store.fd, o->iov, o->pieces, o->offset);
}

static int execute(orc_store *s, struct orc_operation *o)
{
	int rc = 0;

	switch (o->kind) {
	case ORC_OPERATION_READ:
	case ORC_OPERATION_WRITE:
		rc = transfer((struct file *)s, o);
		break;
	case ORC_OPERATION_DISCARD:
		rc = punch(s->fd, FALLOC_FL_PUNCH_HOLE, o->offset, o->size);
		if (cant(rc))
			rc = 0; /* it is a hint */
		break;
	case ORC_OPERATION_ZERO:
		rc = orc_zero(s->fd, o->offset, o->size);
		break;
	default:
		return orc_flush(s->fd);
	}
	return !rc && o->durable ? orc_flush(s->fd) : rc;
}

static void free_file(orc_store *s)
{
	orc_store_fini(s);
	free(((struct file *)s)->bounce);
	free(s);
}

static const struct orc_store_ops ops = {.execute = execute, .by_ring = by_ring, .free = free_file};

int orc_file_new(int fd, orc_u64 size, uint32_t block, unsigned flags, orc_store **out)
{
	struct file *f;
	int rc;

	if (!size || block < 512 || block & (block - 1) || size & (block - 1) || size > INT64_MAX)
		return -EINVAL;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	f->direct = flags & ORC_STORE_DIRECT;
	rc = orc_store_init(&f->store, &ops, fd, size, block, flags);
	if (rc)
		free(f);
	else
		*out = &f->store;
	return rc;
}
