/* A host's buckets in a file that processes share. budget.h has the layout, and what a death at any point leaves behind. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

/* include/uapi/linux/futex.h of Linux 5.16, and its number in the x86-64 table. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#ifndef FUTEX_32
#define FUTEX_32 2
struct futex_waitv {
	uint64_t val, uaddr;
	uint32_t flags, __reserved;
};
#endif
#ifndef F_ADD_SEALS /* include/uapi/linux/fcntl.h */
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#define F_SEAL_SEAL 1
#define F_SEAL_SHRINK 2
#define F_SEAL_GROW 4
#endif

/* A limit that was set ahead of our clock by more is of another clock: CPUs' clocks differ by less than a microsecond, and a
 * setter reads the clock before it sets. */
enum { AHEAD_NS = 1000 * 1000 * 1000 };

static const struct orc_budget_file new_file = {
	.magic = ORC_BUDGET_MAGIC,
	.version = ORC_BUDGET_VERSION,
	.size = sizeof(struct orc_budget_file),
	.bucket_size = sizeof(struct orc_bucket),
	.meters = ORC_METERS,
};

int orc_budget_create(void)
{
	int fd = memfd_create("orchestra-budget", MFD_CLOEXEC | MFD_ALLOW_SEALING), error;

	if (fd < 0)
		return -errno;
	if (pwrite(fd, &new_file, sizeof new_file, 0) == (ssize_t)sizeof new_file &&
	    !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return fd;
	error = errno ? errno : EIO;
	close(fd);
	return -error;
}

/* What is wrong with a file that can't shrink any more; NULL: nothing. */
static const char *wrong(struct orc_budget_file *file)
{
	if (file->magic != ORC_BUDGET_MAGIC)
		return "it does not begin as a budget does";
	if (file->version != ORC_BUDGET_VERSION)
		return "it is of another version of orchestra";
	if (file->size != sizeof *file || file->bucket_size != sizeof(struct orc_bucket) || file->meters != ORC_METERS)
		return "its layout has other sizes than this version's";
	for (int meter = 0; meter < ORC_METERS; meter++)
		for (int slot = 0; slot < 2; slot++)
			if (atomic_load(&file->bucket[meter].slot[slot][ORC_SINCE].value) > orc_now() + AHEAD_NS)
				return "its limits were set by a clock that is ahead of this process's: are they in one time namespace?";
	return NULL;
}

/* What is wrong: with the host if errno is set, else with the file. NULL: nothing. */
static const char *map(orc_budget *b, int fd)
{
	struct stat about;
	int seals = fcntl(fd, F_GET_SEALS);
	bool sealed = seals >= 0 && seals & F_SEAL_SHRINK;

	errno = 0;
	/* First: what is sealed keeps its size, and what it has no pages for would kill who looks. */
	if (!sealed)
		return "it is not a memfd that is sealed against shrinking";
	if (fstat(fd, &about) || about.st_size != (off_t)sizeof *b->file)
		return "its size is not that of a budget";
	b->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (b->fd < 0)
		return "dup: raise the limit on open files (ulimit -n)";
	b->file = mmap(NULL, sizeof *b->file, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
	if (b->file == MAP_FAILED) {
		b->file = NULL;
		if (errno != ENOMEM)
			errno = 0;
		return "it can't be mapped for reading and writing";
	}
	return wrong(b->file);
}

orc_budget *orc_budget_attach(int fd, const char **problem)
{
	orc_budget *b = calloc(1, sizeof *b);
	int error;

	*problem = "no memory";
	if (!b)
		return NULL;
	b->fd = -1;
	*problem = map(b, fd);
	if (!*problem)
		return b;
	error = errno;
	orc_budget_detach(b);
	errno = error;
	return NULL;
}

void orc_budget_detach(orc_budget *b)
{
	if (!b)
		return;
	if (b->file)
		munmap(b->file, sizeof *b->file);
	if (b->fd >= 0)
		close(b->fd);
	free(b);
}

int orc_budget_fd(const orc_budget *b)
{
	return b->fd;
}

orc_bucket *orc_budget_bucket(orc_budget *b, int meter)
{
	return &b->file->bucket[meter];
}

uint32_t orc_budget_changes(const orc_budget *b)
{
	return atomic_load_explicit(&b->file->changes, memory_order_seq_cst);
}

void orc_budget_changed(orc_budget *b)
{
	/* After the limit was published: who read `changes` before this and sleeps is woken, who reads it later finds the new
	 * limit. Not FUTEX_PRIVATE: the sleepers are in all processes. */
	atomic_fetch_add_explicit(&b->file->changes, 1, memory_order_seq_cst);
	syscall(SYS_futex, &b->file->changes, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void orc_fleet_share(orc_fleet *f, orc_budget *b)
{
	f->budget = b;
}

void orc_budget_wait(orc_budget *b, _Atomic uint32_t *word, uint32_t seen, uint32_t changes, orc_ns until)
{
	bool alone = atomic_load_explicit(&b->alone, memory_order_relaxed);
	orc_ns look = orc_now() + (alone ? ORC_LOOK_ALONE : ORC_LOOK_AGAIN);
	struct timespec time;
	struct futex_waitv words[] = {
		{.val = seen, .uaddr = (uintptr_t)word, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG},
		{.val = changes, .uaddr = (uintptr_t)&b->file->changes, .flags = FUTEX_32},
	};

	if (until > look)
		until = look;
	if (alone) {
		orc_futex_wait_until(word, seen, until);
		return;
	}
	time = (struct timespec){.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
	/* EINTR, EAGAIN, ETIMEDOUT, woken: the caller looks. EPERM is what seccomp filters say of calls that they don't know. */
	if (syscall(SYS_futex_waitv, words, 2, 0, &time, CLOCK_MONOTONIC) < 0 && (errno == ENOSYS || errno == EPERM))
		atomic_store_explicit(&b->alone, true, memory_order_relaxed);
}
