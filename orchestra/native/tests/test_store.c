/* Stores: what is read is what was written, whoever does the work; and what of it survives. */
#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>

#include "../store.h"
#include "driver.h"
#include "files.h"

/* No multiple of an overlay's block of 64 KiB. */
enum { BLOCK = 4096, BLOCKS = 68, ROOM = BLOCKS * BLOCK, BATCH = 16 };

/* A store and who waits for it. */
struct bench {
	orc_store *s;
	int epoll;
};

static struct bench bench_of(orc_store *s)
{
	struct bench b = {s, epoll_create1(EPOLL_CLOEXEC)};

	CHECK(b.epoll >= 0 && !orc_store_watch(s, b.epoll));
	return b;
}

static void bench_end(struct bench *b)
{
	orc_store_free(b->s);
	close(b->epoll);
}

/* All of them at the same time; each has its result then. */
static void run_all(struct bench *b, struct orc_operation *o, unsigned n)
{
	struct epoll_event e;

	for (unsigned i = 0; i < n; i++)
		orc_store_start(b->s, &o[i]);
	orc_store_submit(b->s);
	while (n) {
		int ready = epoll_wait(b->epoll, &e, 1, (int)(PATIENCE / 1000000));

		/* io_uring ends the call to have its own work done by this thread. */
		CHECK(ready == 1 || (ready < 0 && errno == EINTR), "%u are not done", n);
		for (struct orc_operation *done = orc_store_done(b->s); done; done = done->next)
			n--;
	}
	CHECK(!orc_store_done(b->s));
}

static int run_one(struct bench *b, enum orc_operation_kind kind, uint64_t offset, void *data, uint64_t size)
{
	struct iovec iov = {data, size};
	struct orc_operation o = {.kind = kind, .offset = offset, .size = size, .iov = &iov, .pieces = 1};

	run_all(b, &o, 1);
	return o.result;
}

/* ---- against a model ---------------------------------------------------------------------------------------------- */

struct part { /* of a random batch */
	struct orc_operation o;
	uint64_t offset, size;
	struct iovec iov[8];
	uint8_t *data;
};

/* Cuts the data into pieces, at any byte. */
static unsigned cut(struct part *p, uint64_t *seed)
{
	unsigned n = 0;

	for (uint64_t at = 0; at < p->size; n++) {
		uint64_t left = p->size - at, piece = n == 7 ? left : 1 + random_number(seed) % left;

		p->iov[n] = (struct iovec){p->data + at, piece};
		at += piece;
	}
	return n;
}

static void check_part(const struct part *p, uint8_t *model, struct bench *b)
{
	static uint8_t now[ROOM];

	CHECK(!p->o.result, "%d", p->o.result);
	switch (p->o.kind) {
	case ORC_OPERATION_READ:
		CHECK(!memcmp(p->data, model + p->offset, p->size));
		break;
	case ORC_OPERATION_WRITE:
		memcpy(model + p->offset, p->data, p->size);
		break;
	case ORC_OPERATION_ZERO:
		memset(model + p->offset, 0, p->size);
		break;
	case ORC_OPERATION_DISCARD: /* old or zero, and from now on the same */
		CHECK(!run_one(b, ORC_OPERATION_READ, p->offset, now, p->size));
		for (uint64_t i = 0; i < p->size; i++)
			CHECK(!now[i] || now[i] == model[p->offset + i]);
		memcpy(model + p->offset, now, p->size);
		break;
	default:
		break;
	}
}

/* Batches of operations that do not touch each other, as those at the same time have no order. */
static void play(struct bench *b, uint8_t *model, uint64_t seed, unsigned rounds)
{
	static struct part part[BATCH];
	static uint8_t data[ROOM];

	for (unsigned round = 0; round < rounds; round++) {
		struct orc_operation o[BATCH];
		uint64_t at = 0;
		unsigned n = 0;

		while (n < BATCH && at < ROOM) {
			struct part *p = &part[n];
			uint64_t most = random_number(&seed) & 7 ? 24 : 400, left, gap = random_number(&seed) % 8 * b->s->block;

			if (gap >= ROOM - at)
				break;
			at += gap;
			left = (ROOM - at) / b->s->block;
			*p = (struct part){.offset = at, .size = (1 + random_number(&seed) % (left < most ? left : most)) * b->s->block};
			p->data = data + at;
			at += p->size;
			p->o = (struct orc_operation){.kind = random_number(&seed) % ORC_OPERATIONS, .offset = p->offset,
						      .size = p->size, .iov = p->iov, .durable = !(random_number(&seed) & 7)};
			if (p->o.kind == ORC_OPERATION_WRITE)
				memset(p->data, (int)(1 + random_number(&seed) % 255), p->size);
			if (p->o.kind <= ORC_OPERATION_WRITE)
				p->o.pieces = cut(p, &seed);
			if (p->o.kind == ORC_OPERATION_FLUSH)
				p->o.size = p->o.offset = 0;
			o[n++] = p->o;
		}
		run_all(b, o, n);
		for (unsigned i = 0; i < n; i++) {
			part[i].o.result = o[i].result;
			check_part(&part[i], model, b);
		}
	}
	CHECK(!run_one(b, ORC_OPERATION_READ, 0, data, ROOM) && !memcmp(data, model, ROOM));
}

static void a_file_is_as_a_model_of_it_with_io_uring_and_without(void)
{
	const unsigned flags[] = {0, ORC_STORE_NO_URING, ORC_STORE_DIRECT, ORC_STORE_DIRECT | ORC_STORE_NO_URING};
	static uint8_t model[ROOM], found[ROOM];
	uint64_t seed = 1;

	for (unsigned f = 0; f < 4; f++) {
		bool direct = flags[f] & ORC_STORE_DIRECT;
		int fd = new_file(ROOM, direct ? O_DIRECT : 0), plain;
		struct bench b;

		if (direct && fd < 0) /* this file system has no O_DIRECT */
			continue;
		plain = dup(fd);
		memset(model, 0, sizeof model);
		b = bench_of(file_store(fd, ROOM, flags[f]));
		CHECK(!(flags[f] & ORC_STORE_NO_URING) || !b.s->ring);
		play(&b, model, random_number(&seed), 150);
		bench_end(&b);
		CHECK(!direct || !fcntl(plain, F_SETFL, 0));
		CHECK(pread(plain, found, ROOM, 0) == ROOM && !memcmp(found, model, ROOM));
		close(plain);
	}
}

static void memory_that_is_not_aligned_goes_through_a_buffer_with_o_direct(void)
{
	static _Alignas(4096) uint8_t data[3 * 256 * 1024 + 4096], back[3 * 256 * 1024];
	const size_t size = sizeof back; /* longer than the buffer */
	int fd = new_file(size, O_DIRECT);
	uint64_t seed = 3;
	struct bench b;

	if (fd < 0) {
		skipped = "no O_DIRECT here";
		return;
	}
	b = bench_of(file_store(fd, size, ORC_STORE_DIRECT));
	for (size_t i = 0; i < sizeof data; i++)
		data[i] = (uint8_t)random_number(&seed);
	CHECK(!run_one(&b, ORC_OPERATION_WRITE, 0, data + 1, size));
	CHECK(b.s->started, "the thread did it");
	CHECK(!run_one(&b, ORC_OPERATION_READ, 0, back, size) && !memcmp(back, data + 1, size));
	CHECK(!run_one(&b, ORC_OPERATION_READ, 0, data + 3, size) && !memcmp(back, data + 3, size));
	bench_end(&b);
}

static void a_file_that_has_become_shorter_is_an_error_and_no_wrong_data(void)
{
	const unsigned flags[] = {0, ORC_STORE_NO_URING};
	static uint8_t data[8192];

	for (unsigned f = 0; f < 2; f++) {
		int fd = new_file(8192, 0);
		struct bench b = bench_of(file_store(fd, 8192, flags[f]));

		CHECK(!run_one(&b, ORC_OPERATION_READ, 0, data, 8192));
		CHECK(!ftruncate(fd, 4096));
		CHECK(run_one(&b, ORC_OPERATION_READ, 0, data, 8192) == -EIO, "the half that is there is not enough");
		CHECK(run_one(&b, ORC_OPERATION_READ, 4096, data, 4096) == -EIO);
		CHECK(!run_one(&b, ORC_OPERATION_READ, 0, data, 4096));
		bench_end(&b);
	}
}

static void what_the_kernel_refuses_is_the_result(void)
{
	const unsigned flags[] = {0, ORC_STORE_NO_URING};
	static uint8_t data[512];

	for (unsigned f = 0; f < 2; f++) {
		int fd = new_file(8192, 0), readonly;
		char path[64];
		struct bench b;

		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		readonly = open(path, O_RDONLY | O_CLOEXEC);
		close(fd);
		b = bench_of(file_store(readonly, 8192, flags[f]));
		CHECK(run_one(&b, ORC_OPERATION_WRITE, 0, data, 512) == -EBADF);
		CHECK(run_one(&b, ORC_OPERATION_ZERO, 0, NULL, 512) == -EBADF);
		CHECK(run_one(&b, ORC_OPERATION_DISCARD, 0, NULL, 512) == -EBADF);
		CHECK(!run_one(&b, ORC_OPERATION_READ, 0, data, 512) && !run_one(&b, ORC_OPERATION_FLUSH, 0, NULL, 0));
		bench_end(&b);
	}
}

static void a_store_that_can_not_be_is_refused_and_the_descriptor_left(void)
{
	int fd = new_file(8192, 0);
	orc_store *s;

	CHECK(orc_file_new(fd, 0, 512, 0, &s) == -EINVAL);
	CHECK(orc_file_new(fd, 513, 512, 0, &s) == -EINVAL);
	CHECK(orc_file_new(fd, 512, 4096, 0, &s) == -EINVAL, "no multiple of its block");
	CHECK(orc_file_new(fd, 8192, 256, 0, &s) == -EINVAL);
	CHECK(orc_file_new(fd, 8192, 1536, 0, &s) == -EINVAL);
	CHECK(orc_file_new(fd, 1ull << 63, 512, 0, &s) == -EINVAL);
	CHECK(fcntl(fd, F_GETFD) >= 0);
	CHECK(orc_file_block(fd) >= 512);
	close(fd);
}

/* ---- an overlay --------------------------------------------------------------------------------------------------- */

static int base_of(uint8_t *content, uint64_t seed)
{
	int fd = new_file(ROOM, 0);

	for (unsigned i = 0; i < ROOM; i++)
		content[i] = (uint8_t)(1 + random_number(&seed) % 255);
	CHECK(pwrite(fd, content, ROOM, 0) == ROOM);
	return fd;
}

static orc_store *overlay_of(int fd, int base)
{
	orc_store *s;
	int rc = orc_overlay_new(dup(fd), dup(base), ROOM, 0, &s);

	CHECK(!rc, "%d", rc);
	return s;
}

static int new_overlay(void)
{
	int fd = new_file(0, 0);

	CHECK(!orc_overlay_create(fd, ROOM));
	return fd;
}

static void an_overlay_is_as_a_model_of_it_and_its_base_is_as_it_was(void)
{
	static uint8_t model[ROOM], content[ROOM], found[ROOM];
	int base = base_of(content, 7), fd = new_overlay();

	memcpy(model, content, ROOM);
	for (int run = 0; run < 12; run++) { /* what a run wrote is there in the next one, flushed or not */
		struct bench b = bench_of(overlay_of(fd, base));

		CHECK(!run_one(&b, ORC_OPERATION_READ, 0, found, ROOM) && !memcmp(found, model, ROOM));
		play(&b, model, 100 + run, run < 4 ? 1 : 20);
		bench_end(&b);
	}
	CHECK(pread(base, found, ROOM, 0) == ROOM && !memcmp(found, content, ROOM));
	close(base);
	close(fd);
}

static void what_is_no_overlay_or_one_of_another_base_is_told(void)
{
	static uint8_t content[ROOM];
	int base = base_of(content, 7), fd = new_overlay(), empty = new_file(0, 0), other = new_file(ROOM, 0);
	uint32_t version = 2;
	orc_store *s;

	CHECK(orc_overlay_new(empty, base, ROOM, 0, &s) == -EBADMSG && orc_overlay_new(other, base, ROOM, 0, &s) == -EBADMSG);
	CHECK(orc_overlay_new(fd, base, ROOM - 512, 0, &s) == -ESTALE);
	CHECK(pwrite(fd, &version, 4, 8) == 4 && orc_overlay_new(fd, base, ROOM, 0, &s) == -EBADMSG);
	version = 1;
	CHECK(pwrite(fd, &version, 4, 8) == 4 && !ftruncate(fd, 4096 + 100) && orc_overlay_new(fd, base, ROOM, 0, &s) < 0, "cut");
	CHECK(orc_overlay_create(fd, 0) == -EINVAL && orc_overlay_create(fd, 513) == -EINVAL);
	CHECK(orc_overlay_create(fd, 1ull << 61) == -EINVAL);
	close(base);
	close(fd);
	close(empty);
	close(other);
}

/* A host that loses its power: of what was written since the last fdatasync, each sector of the file is there or not. The test
 * looks at what would be left before each fdatasync that the overlay makes, and after it. */
enum { SECTORS = ROOM / 512, MOST = 64 };
static struct {
	bool watching;
	int fd, base;
	uint64_t seed, looks;
	uint8_t *safe, *now; /* the file as it was after the last fdatasync, and as it is */
	size_t size;
	uint32_t may_be[SECTORS][MOST]; /* what a sector may hold: since the last flush, and the one before that */
	unsigned n[SECTORS];
} power;

int __real_fdatasync(int);
int __wrap_fdatasync(int);

static void read_file(uint8_t *to)
{
	CHECK(pread(power.fd, to, power.size, 0) == (ssize_t)power.size);
}

static void cut_power(void)
{
	static uint8_t found[ROOM];
	int fd = new_file(0, 0);
	struct bench b;

	for (size_t at = 0; at < power.size; at += 512) {
		const uint8_t *from = memcmp(power.safe + at, power.now + at, 512) && random_number(&power.seed) & 1 ? power.now : power.safe;

		CHECK(pwrite(fd, from + at, 512, (off_t)at) == 512);
	}
	b = bench_of(overlay_of(fd, power.base));
	CHECK(!run_one(&b, ORC_OPERATION_READ, 0, found, ROOM));
	for (unsigned i = 0; i < SECTORS; i++) {
		bool fine = false;
		uint32_t word;

		memcpy(&word, found + 512 * i, 4);
		for (unsigned k = 4; k < 512; k += 4)
			CHECK(!memcmp(found + 512 * i, found + 512 * i + k, 4), "a sector of two writes");
		for (unsigned k = 0; k < power.n[i]; k++)
			fine = fine || power.may_be[i][k] == word;
		CHECK(fine, "sector %u holds %x", i, word);
	}
	bench_end(&b);
	close(fd);
	power.looks++;
}

int __wrap_fdatasync(int fd)
{
	int rc;

	if (!power.watching)
		return __real_fdatasync(fd);
	power.watching = false; /* the overlay that is looked at has flushes too */
	read_file(power.now);
	cut_power();
	rc = __real_fdatasync(fd);
	memcpy(power.safe, power.now, power.size);
	cut_power();
	power.watching = true;
	return rc;
}

static void fill(uint8_t *to, uint32_t with, uint64_t size)
{
	for (uint64_t i = 0; i < size; i += 4)
		memcpy(to + i, &with, 4);
}

/* A write or zeroes: either that, or what may have been there, until a flush. */
static void change(struct bench *b, uint32_t value)
{
	static uint8_t data[ROOM];
	uint64_t first = random_number(&power.seed) % SECTORS, n = 1 + random_number(&power.seed) % (random_number(&power.seed) & 3 ? 20 : 200);
	bool zero = !(random_number(&power.seed) & 3);

	if (n > SECTORS - first)
		n = SECTORS - first;
	for (uint64_t i = first; i < first + n; i++) {
		CHECK(power.n[i] < MOST);
		power.may_be[i][power.n[i]++] = zero ? 0 : value;
	}
	fill(data, value, n * 512);
	CHECK(!run_one(b, zero ? ORC_OPERATION_ZERO : ORC_OPERATION_WRITE, first * 512, data, n * 512));
}

/* Of a new overlay, as a block's first write is where the order matters. */
static void play_power(const uint8_t *content, unsigned rounds)
{
	uint32_t value = 100000;
	struct bench b;

	for (unsigned i = 0; i < SECTORS; i++) {
		memcpy(&power.may_be[i][0], content + 512 * i, 4);
		power.n[i] = 1;
	}
	power.fd = new_overlay();
	read_file(power.safe);
	b = bench_of(overlay_of(power.fd, power.base));
	while (rounds--) {
		for (unsigned i = random_number(&power.seed) % 5; i; i--)
			change(&b, value++);
		power.watching = true;
		CHECK(!run_one(&b, ORC_OPERATION_FLUSH, 0, NULL, 0));
		power.watching = false;
		for (unsigned i = 0; i < SECTORS; i++) {
			power.may_be[i][0] = power.may_be[i][power.n[i] - 1];
			power.n[i] = 1;
		}
		memcpy(power.now, power.safe, power.size);
		cut_power(); /* nothing but what was written last */
	}
	bench_end(&b);
	close(power.fd);
}

static void what_was_flushed_survives_the_loss_of_power_and_nothing_else_is_invented(void)
{
	enum { GAMES = 20, ROUNDS = 5 };
	static uint8_t content[ROOM];
	int fd = new_overlay();

	for (unsigned i = 0; i < SECTORS; i++)
		fill(content + 512 * i, i + 1, 512);
	power.base = new_file(ROOM, 0);
	CHECK(pwrite(power.base, content, ROOM, 0) == ROOM);
	power.seed = 5;
	power.size = (size_t)lseek(fd, 0, SEEK_END);
	close(fd);
	power.safe = malloc(power.size);
	power.now = malloc(power.size);
	CHECK(power.safe && power.now);
	for (int i = 0; i < GAMES; i++)
		play_power(content, ROUNDS);
	CHECK(power.looks >= GAMES * ROUNDS * 3);
	close(power.base);
	free(power.safe);
	free(power.now);
}

const struct test store_tests[] = {
	TEST(a_file_is_as_a_model_of_it_with_io_uring_and_without),
	TEST(memory_that_is_not_aligned_goes_through_a_buffer_with_o_direct),
	TEST(a_file_that_has_become_shorter_is_an_error_and_no_wrong_data),
	TEST(what_the_kernel_refuses_is_the_result),
	TEST(a_store_that_can_not_be_is_refused_and_the_descriptor_left),
	TEST(an_overlay_is_as_a_model_of_it_and_its_base_is_as_it_was),
	TEST(what_is_no_overlay_or_one_of_another_base_is_told),
	TEST(what_was_flushed_survives_the_loss_of_power_and_nothing_else_is_invented),
	{0},
};
