/* An io_uring of one submitter: reads, writes and flushes of files.
 *
 * By the three system calls and not by liburing: what is needed of it is the hundred lines of uring.c, and whoever builds from
 * source needs no library and no -dev package for them. Headers or a kernel without io_uring, and a container that forbids it,
 * are the same to the caller: orc_uring_new fails, and a thread does the work (store.c). */
#ifndef ORC_URING_H
#define ORC_URING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

typedef struct orc_uring orc_uring;
enum orc_uring_kind { ORC_URING_READ, ORC_URING_WRITE, ORC_URING_WRITE_DURABLE, ORC_URING_FLUSH };

/* For at most so many at the same time: a power of two. 0 or a negative errno. */
int orc_uring_new(unsigned entries, orc_uring **out);
void orc_uring_free(orc_uring *); /* nothing is in flight */
int orc_uring_fd(const orc_uring *); /* readable while something is done */

/* Puts it into the ring. The pieces stay where they are until it is done. False: it is full. */
bool orc_uring_push(orc_uring *, enum orc_uring_kind, int fd, const struct iovec *, unsigned pieces, uint64_t offset,
		    void *what);
/* The kernel takes what was pushed, in this order: how many of them. The others are no longer in the ring. */
unsigned orc_uring_submit(orc_uring *);
/* The next one that is done, and its result: bytes, or a negative errno. */
bool orc_uring_next(orc_uring *, void **what, int *result);

#endif
