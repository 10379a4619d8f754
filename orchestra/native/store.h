/* Where a disk's bytes are: a file (file.c), or a base and what was written over it (overlay.c).
 *
 *   one thread, the caller     start -> submit -> ... -> done    (a VM's I/O thread: none of these waits)
 *   io_uring, if it is there   reads, writes and flushes that are as the file wants them
 *   a thread of the store      all others, one at a time, by calls that wait; begun when the first one needs it
 *
 * A write is there for later reads once it is done, and survives the host's crash after a flush that was started then. Those that
 * go on at the same time have no order. */
#ifndef ORC_STORE_H
#define ORC_STORE_H

#include <pthread.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "orc.h"
#include "uring.h"

enum orc_operation_kind {
	ORC_OPERATION_READ,
	ORC_OPERATION_WRITE,
	ORC_OPERATION_FLUSH,
	ORC_OPERATION_DISCARD, /* what is read there later is old or zero */
	ORC_OPERATION_ZERO,    /* zeroes, and the room may be given back */
	ORC_OPERATIONS,
};

/* The caller's until it is started, and once it is done. */
struct orc_operation {
	enum orc_operation_kind kind;
	bool durable;        /* what it changes survives without a flush */
	orc_u64 offset, size; /* within the store, multiples of its block */
	struct iovec *iov;   /* of a read or write: `size` bytes in all; used up by it */
	unsigned pieces;
	int result;          /* 0 or a negative errno */
	struct orc_operation *next; /* the store's */
};

typedef struct orc_store orc_store;
struct orc_store_ops {
	/* Does all of it, on the store's thread. 0 or a negative errno. */
	int (*execute)(orc_store *, struct orc_operation *);
	/* Whether io_uring can do it by the store's `fd` as it is. NULL: none. */
	bool (*by_ring)(const orc_store *, const struct orc_operation *);
	void (*free)(orc_store *); /* frees it, after orc_store_fini */
};

enum { ORC_STORE_MOST = 128 }; /* operations at the same time: a disk's queue full */

/* First member of each kind's own structure. */
struct orc_store {
	const struct orc_store_ops *ops;
	orc_u64 size;
	uint32_t block;  /* bytes: offsets and sizes are multiples of it */
	bool readonly;
	int fd;
	orc_uring *ring; /* NULL: its thread does all */
	struct orc_operation *pushed[ORC_STORE_MOST]; /* into the ring, and not submitted */
	unsigned n_pushed;

	int wake; /* an eventfd: the thread has done something */
	pthread_t thread;
	bool started;
	pthread_mutex_t lock; /* what follows */
	pthread_cond_t more;
	bool stopping;
	struct orc_operation *first, **last; /* to be done by the thread */
	struct orc_operation *done;
	_Atomic int tid; /* of the thread; 0: there is none */
	_Atomic orc_u64 spent; /* ns of CPU that it has used */
	orc_u64 told; /* of these, by orc_store_spent */
};

/* ---- for a disk ------------------------------------------------------------------------------------------------- */

void orc_store_start(orc_store *, struct orc_operation *);
void orc_store_submit(orc_store *); /* after some were started */
struct orc_operation *orc_store_done(orc_store *); /* a list, by `next`. What goes on in pieces is submitted */
orc_u64 orc_store_spent(orc_store *); /* ns of CPU that its thread has used since the last call. The caller's thread */
int orc_store_watch(orc_store *, int epoll); /* which is readable then when orc_store_done should be called. 0 or a negative errno */
void orc_store_free(orc_store *); /* nothing is going on */

/* ---- kinds ------------------------------------------------------------------------------------------------------ */

enum { ORC_STORE_READONLY = 1, ORC_STORE_DIRECT = 2, ORC_STORE_NO_URING = 4 };

/* A file or block device of that many bytes. `block`: 512, or with ORC_STORE_DIRECT what O_DIRECT wants (orc_file_block). It
 * closes `fd` when it is freed, and not if this fails. 0 or a negative errno. */
int orc_file_new(int fd, orc_u64 size, uint32_t block, unsigned flags, orc_store **out);
/* What offsets, sizes and memory must be multiples of for this descriptor with O_DIRECT. 0 or less: it can't be. */
int orc_file_block(int fd);

/* What is written over a base of that size, in a new file. */
int orc_overlay_create(int fd, orc_u64 size);
/* Such a file over its base, of which both descriptors are the store's then. A negative errno: EBADMSG: it is no such file; ESTALE:
 * it is for a base of another size. */
int orc_overlay_new(int fd, int base, orc_u64 base_size, unsigned flags, orc_store **out);

/* ---- for kinds -------------------------------------------------------------------------------------------------- */

int orc_store_init(orc_store *, const struct orc_store_ops *, int fd, orc_u64 size, uint32_t block, unsigned flags);
void orc_store_fini(orc_store *); /* its thread has ended; fd is closed */
/* So many bytes of the pieces were transferred. */
void orc_iov_advance(struct iovec **, unsigned *pieces, size_t bytes);
/* All of it, or a negative errno; a file that ends before is EIO. They use the pieces up. */
int orc_read_all(int fd, struct iovec *, unsigned pieces, orc_u64 offset);
int orc_write_all(int fd, struct iovec *, unsigned pieces, orc_u64 offset);
int orc_flush(int fd);
/* Zeroes, by a hole if the file can have one, else written. */
int orc_zero(int fd, orc_u64 offset, orc_u64 size);

#endif
