/* Files of tests, which have no name any more, and stores of them. */
#ifndef FILES_H
#define FILES_H

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "../store.h"
#include "check.h"

/* Of zeroes; `flags` of open(2). -1: this file system has no such flag. In build/, as /tmp may be one without O_DIRECT. */
static inline int new_file(size_t size, int flags)
{
	char name[] = "build/file-XXXXXX";
	int made = mkstemp(name), fd;

	CHECK(made >= 0 && !ftruncate(made, (off_t)size));
	fd = open(name, O_RDWR | O_CLOEXEC | flags);
	close(made);
	unlink(name);
	return fd;
}

static inline orc_store *file_store(int fd, size_t size, unsigned flags)
{
	int block = flags & ORC_STORE_DIRECT ? orc_file_block(fd) : 512;
	orc_store *s;

	CHECK(fd >= 0 && block >= 512 && !orc_file_new(fd, size, (uint32_t)block, flags, &s));
	return s;
}

#endif
