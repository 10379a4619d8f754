/* A store over a base that many share and nobody writes: blocks that were written are in a sparse file of its own.
 *
 *   header    4096 bytes
 *   bitmap    from 4096 on, a bit for each block: it is here, and not the base's
 *   data      from the next multiple of a block on, each block at its place
 *
 * A block comes here as a whole, before its bit is set: the bit in memory at once, that in the file by the next flush. A flush
 * makes data durable, then writes bits, and then makes those durable. So whenever it ends, a bit in the file has its block behind
 * it: a write that was flushed is there, and another is there or is not, each sector of it. What lies in a block without a bit is
 * of no meaning, and is written over as a whole.
 *
 * All is done by the store's thread, one operation at a time: the bitmap needs no lock. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store.h"
#include "virtqueue.h"

enum {
	/* qcow2's cluster: a first write copies no more than a disk reads at a time anyway, and 1 TiB has a bitmap of 2 MiB. */
	BLOCK = 64 * 1024,
	PAGE = 4096, /* of the bitmap: what is written of it at a time */
	PAGE_BITS = PAGE * 8,
	VERSION = 1,
};

struct header { /* little-endian, as the machine is */
	char magic[8];
	uint32_t version, block;
	orc_u64 size; /* bytes of the disk, and of the base */
};
static const char magic[8] = "orcover";

struct overlay {
	orc_store store;
	int base;
	orc_u64 pages, data;    /* of the bitmap; where data begin */
	uint8_t *bitmap;
	bool *changed; /* pages that the file has otherwise */
	int broken;    /* a flush failed for good, with this */
	uint8_t buffer[BLOCK];
};

/* ---- layout ------------------------------------------------------------------------------------------------------ */

static orc_u64 pages_of(orc_u64 size)
{
	return (size - 1) / BLOCK / PAGE_BITS + 1;
}

static orc_u64 data_of(orc_u64 size)
{
	return ((1 + pages_of(size)) * PAGE + BLOCK - 1) / BLOCK * BLOCK;
}

static bool is_size(orc_u64 size)
{
	return size && !(size & 511) && size <= 1ull << 60;
}

static int put_bytes(int fd, const void *data, size_t size, orc_u64 offset)
{
	struct iovec iov = {(void *)(uintptr_t)data, size};

	return orc_write_all(fd, &iov, 1, offset);
}

static int get_bytes(int fd, void *data, size_t size, orc_u64 offset)
{
	struct iovec iov = {data, size};

	return orc_read_all(fd, &iov, 1, offset);
}

int orc_overlay_create(int fd, orc_u64 size)
{
	struct header h = {.version = VERSION, .block = BLOCK, .size = size};
	int rc;

	memcpy(h.magic, magic, sizeof magic);
	if (!is_size(size))
		return -EINVAL;
	if (ftruncate(fd, (off_t)(data_of(size) + size)))
		return -errno;
	rc = put_bytes(fd, &h, sizeof h, 0);
	return rc ? rc : orc_flush(fd);
}

/* ---- the bitmap -------------------------------------------------------------------------------------------------- */

static bool is_here(const struct overlay *v, orc_u64 block)
{
	return v->bitmap[block / 8] >> block % 8 & 1;
}

static void set_here(struct overlay *v, orc_u64 block)
{
	if (is_here(v, block))
		return;
	v->bitmap[block / 8] |= (uint8_t)(1 << block % 8);
	v->changed[block / PAGE_BITS] = true;
}

static int flush(struct overlay *v)
{
	bool wrote = false;

	/* The kernel tells of a block that it could not write once. A later flush would succeed, and set a bit of what is lost. */
	if (!v->broken)
		v->broken = orc_flush(v->store.fd);
	if (v->broken)
		return v->broken;
	for (orc_u64 i = 0; i < v->pages; i++) {
		int rc = v->changed[i] ? put_bytes(v->store.fd, v->bitmap + i * PAGE, PAGE, (1 + i) * PAGE) : 0;

		if (rc)
			return rc;
		wrote = wrote || v->changed[i];
		v->changed[i] = false;
	}
	if (wrote)
		v->broken = orc_flush(v->store.fd);
	return v->broken;
}

/* ---- operations ---------------------------------------------------------------------------------------------------- */

static orc_u64 minimum(orc_u64 a, orc_u64 b)
{
	return a < b ? a : b;
}

static orc_u64 end_of(const struct overlay *v, orc_u64 block) /* the last one may be short */
{
	return minimum((block + 1) * BLOCK, v->store.size);
}

static bool is_whole(const struct overlay *v, orc_u64 from, orc_u64 to)
{
	return !(from % BLOCK) && to == end_of(v, from / BLOCK);
}

/* A part of one block that is not here yet: with the rest of it, which is the base's. `iov`: NULL for zeroes. */
static int bring(struct overlay *v, orc_u64 from, orc_u64 to, const struct iovec *iov, size_t pieces)
{
	orc_u64 begin = from / BLOCK * BLOCK, end = end_of(v, from / BLOCK);
	uint8_t *at = v->buffer + (from - begin);
	int rc = get_bytes(v->base, v->buffer, (size_t)(end - begin), begin);

	if (rc)
		return rc;
	if (!iov)
		memset(at, 0, (size_t)(to - from));
	for (size_t i = 0; i < pieces; i++) {
		memcpy(at, iov[i].iov_base, iov[i].iov_len);
		at += iov[i].iov_len;
	}
	rc = put_bytes(v->store.fd, v->buffer, (size_t)(end - begin), v->data + begin);
	if (!rc)
		set_here(v, begin / BLOCK);
	return rc;
}

/* How far it goes on in the same way as its begin does. */
static orc_u64 run_of(const struct overlay *v, orc_u64 from, orc_u64 to, bool *here)
{
	orc_u64 at = minimum(to, end_of(v, from / BLOCK));

	*here = is_here(v, from / BLOCK);
	while (at < to && is_here(v, at / BLOCK) == *here)
		at = minimum(to, end_of(v, at / BLOCK));
	return at;
}

static int read_part(struct overlay *v, orc_u64 from, bool here, struct iovec *iov, unsigned pieces)
{
	return here ? orc_read_all(v->store.fd, iov, pieces, v->data + from) : orc_read_all(v->base, iov, pieces, from);
}

/* Of blocks that are all here, or of one that is not. */
static int write_part(struct overlay *v, orc_u64 from, orc_u64 to, bool here, struct iovec *iov, unsigned pieces)
{
	int rc;

	if (!here && !is_whole(v, from, to))
		return bring(v, from, to, iov, pieces);
	rc = orc_write_all(v->store.fd, iov, pieces, v->data + from);
	if (!rc)
		set_here(v, from / BLOCK);
	return rc;
}

static int zero_part(struct overlay *v, orc_u64 from, orc_u64 to, bool here)
{
	int rc;

	if (!here && !is_whole(v, from, to))
		return bring(v, from, to, NULL, 0);
	rc = orc_zero(v->store.fd, v->data + from, to - from); /* also of one that is not here: who knows what lies there */
	if (!rc)
		set_here(v, from / BLOCK);
	return rc;
}

static int do_part(struct overlay *v, struct orc_operation *o, orc_u64 from, orc_u64 to, bool here)
{
	struct iovec part[ORC_CHAIN_MOST];
	unsigned n = 0;

	if (o->kind <= ORC_OPERATION_WRITE)
		n = (unsigned)orc_iov_slice(o->iov, o->pieces, from - o->offset, to - from, part);
	switch (o->kind) {
	case ORC_OPERATION_READ:
		return read_part(v, from, here, part, n);
	case ORC_OPERATION_WRITE:
		return write_part(v, from, to, here, part, n);
	case ORC_OPERATION_ZERO:
		return zero_part(v, from, to, here);
	default: /* a discard: what is the base's can't be given back */
		return here ? orc_zero(v->store.fd, v->data + from, to - from) : 0;
	}
}

static int execute(orc_store *s, struct orc_operation *o)
{
	struct overlay *v = (struct overlay *)s;
	const orc_u64 end = o->offset + o->size;
	int rc = 0;

	if (o->kind == ORC_OPERATION_FLUSH)
		return flush(v);
	for (orc_u64 from = o->offset, to; !rc && from < end; from = to) {
		bool here;

		to = run_of(v, from, end, &here);
		if (!here && o->kind != ORC_OPERATION_READ) /* each of them is another case */
			to = minimum(to, end_of(v, from / BLOCK));
		rc = do_part(v, o, from, to, here);
	}
	return !rc && o->durable ? flush(v) : rc;
}

/* ---- the store ---------------------------------------------------------------------------------------------------- */

static void free_overlay(orc_store *s)
{
	struct overlay *v = (struct overlay *)s;

	if (!s->readonly)
		flush(v); /* what was written is there for the next run, as it is in a file. An error has nobody to go to */
	orc_store_fini(s);
	close(v->base);
	free(v->bitmap);
	free(v->changed);
	free(v);
}

static const struct orc_store_ops ops = {.execute = execute, .free = free_overlay};

/* The bitmap, and what the store needs besides. */
static int load(struct overlay *v, int fd, orc_u64 size)
{
	v->pages = pages_of(size);
	v->data = data_of(size);
	v->bitmap = malloc(v->pages * PAGE);
	v->changed = calloc(v->pages, sizeof *v->changed);
	return v->bitmap && v->changed ? get_bytes(fd, v->bitmap, v->pages * PAGE, PAGE) : -ENOMEM;
}

int orc_overlay_new(int fd, int base, orc_u64 base_size, unsigned flags, orc_store **out)
{
	struct header h;
	struct overlay *v;
	int rc = get_bytes(fd, &h, sizeof h, 0);

	if (rc)
		return rc == -EIO ? -EBADMSG : rc; /* too short */
	if (memcmp(h.magic, magic, sizeof magic) || h.version != VERSION || h.block != BLOCK || !is_size(h.size))
		return -EBADMSG;
	if (h.size != base_size)
		return -ESTALE;
	v = calloc(1, sizeof *v);
	if (!v)
		return -ENOMEM;
	rc = load(v, fd, h.size);
	if (!rc)
		rc = orc_store_init(&v->store, &ops, fd, h.size, 512, flags);
	if (rc) {
		free(v->bitmap);
		free(v->changed);
		free(v);
		return rc;
	}
	v->base = base;
	*out = &v->store;
	return 0;
}
