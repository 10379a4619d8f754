/* A disk through its queue, served by the I/O thread: from a request's descriptors to bytes in a file, and back. */
#include <linux/virtio_blk.h>
#include <sched.h>
#include <semaphore.h>

#include "driver.h"
#include "files.h"

enum {
	SIZE = 128, W = VRING_DESC_F_WRITE, N = VRING_DESC_F_NEXT,
	RINGS = LOW, HEADERS = LOW + 0x2000, STATUS = LOW + 0x3000, TABLE = LOW + 0x4000, DATA = LOW + 0x10000,
	CAPACITY = 4 << 20, SECTORS = CAPACITY / 512,
	PENDING = 0xee, /* a status that no device writes */
};

struct bench {
	struct guest g;
	orc_io *io;
	orc_virtio *v;
	struct driver d;
	int kick, vector, file;
};

#define F_DISK                                                                                                         \
	(1ull << VIRTIO_BLK_F_FLUSH | 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES | F_RINGS | F_VERSION_1)

static void drive(struct bench *b, uint64_t features)
{
	b->d = driver_at(&b->g, RINGS, SIZE);
	memset(at(&b->g, RINGS), 0, 0x2000);
	CHECK(negotiate(b->v, features));
	set_up(b->v, 0, &b->d, features, 0);
	go(b->v);
}

/* Not attached yet, and without a driver. */
static void make(struct bench *b, unsigned flags)
{
	int fd = new_file(CAPACITY, 0);

	guest_begin(&b->g, NULL);
	b->file = dup(fd);
	CHECK(!orc_io_start("io", &b->io) && !orc_virtio_blk_new(b->g.memory, file_store(fd, CAPACITY, flags), "disk-1", &b->v));
	orc_virtio_set_kick_fd(b->v, 0, b->kick = new_eventfd());
	orc_virtio_set_vector_fd(b->v, 0, b->vector = new_eventfd());
}

static void begin(struct bench *b, unsigned flags)
{
	make(b, flags);
	CHECK(!orc_io_attach(b->io, b->v));
	drive(b, flags & ORC_STORE_READONLY ? F_DISK & ~(1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES) : F_DISK);
}

static void end(struct bench *b)
{
	orc_io_stop(b->io);
	orc_device_free(orc_virtio_device(b->v));
	orc_io_free(b->io);
	close(b->kick);
	close(b->vector);
	close(b->file);
	guest_end(&b->g);
}

static volatile uint8_t *status_of(struct bench *b, unsigned slot)
{
	return (volatile uint8_t *)at(&b->g, STATUS) + slot;
}

static void header(struct bench *b, unsigned slot, uint32_t type, uint64_t sector)
{
	const struct virtio_blk_outhdr h = {.type = type, .sector = sector};

	memcpy(at(&b->g, HEADERS + 16 * slot), &h, sizeof h);
	*status_of(b, slot) = PENDING;
}

static void kick(struct bench *b)
{
	if (must_notify(&b->d))
		notify(b->kick);
}

/* A request of three descriptors, or of two if it has no data. */
static void ask(struct bench *b, unsigned slot, uint32_t type, uint64_t sector, uint64_t data, uint32_t size, uint16_t flags)
{
	uint16_t i = (uint16_t)(3 * slot);

	header(b, slot, type, sector);
	describe(&b->d, i, HEADERS + 16 * slot, 16, N, size ? i + 1 : i + 2);
	describe(&b->d, i + 1, data, size, flags | N, i + 2);
	describe(&b->d, i + 2, STATUS + slot, 1, W, 0);
	offer(&b->d, i);
	kick(b);
}

static struct vring_used_elem await_used(struct bench *b)
{
	struct vring_used_elem e;

	for (;;) {
		ask_for_interrupt(&b->d);
		if (reap(&b->d, &e))
			return e;
		await(b->vector);
	}
}

static uint8_t result(struct bench *b, unsigned slot)
{
	CHECK(await_used(b).id == 3 * slot);
	return *status_of(b, slot);
}

static uint8_t one(struct bench *b, uint32_t type, uint64_t sector, uint64_t data, uint32_t size, uint16_t flags)
{
	ask(b, 0, type, sector, data, size, flags);
	return result(b, 0);
}

static uint8_t range(struct bench *b, uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
	const struct virtio_blk_discard_write_zeroes r = {.sector = sector, .num_sectors = sectors, .flags = flags};

	memcpy(at(&b->g, DATA), &r, sizeof r);
	return one(b, type, 0, DATA, sizeof r, 0);
}

static void check_file(struct bench *b, uint64_t offset, const void *want, size_t size)
{
	uint8_t *found = malloc(size);

	CHECK(found && pread(b->file, found, size, (off_t)offset) == (ssize_t)size && !memcmp(found, want, size));
	free(found);
}

enum { IN = VIRTIO_BLK_T_IN, OUT = VIRTIO_BLK_T_OUT, FLUSH = VIRTIO_BLK_T_FLUSH, GET_ID = VIRTIO_BLK_T_GET_ID,
       DISCARD = VIRTIO_BLK_T_DISCARD, ZEROES = VIRTIO_BLK_T_WRITE_ZEROES };
enum { OK = VIRTIO_BLK_S_OK, IOERR = VIRTIO_BLK_S_IOERR, UNSUPP = VIRTIO_BLK_S_UNSUPP };
static const unsigned engines[] = {0, ORC_STORE_NO_URING};

/* ---- what it says of itself ---------------------------------------------------------------------------------------- */

static void the_configuration_has_capacity_and_limits(void)
{
	struct bench b;

	begin(&b, 0);
	CHECK(orc_virtio_type(b.v) == 2 && orc_virtio_queues(b.v) == 1 && orc_virtio_config_size(b.v) == 60);
	CHECK(get(b.v, ORC_BAR_DEVICE, 8) == SECTORS);
	CHECK(get(b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, seg_max), 4) == 126);
	CHECK(get(b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, size_max), 4) == 1 << 20);
	CHECK(get(b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, blk_size), 4) == 512);
	CHECK(get(b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, max_discard_seg), 4) == 1);
	CHECK(!(b.v->offered >> VIRTIO_BLK_F_RO & 1));
	end(&b);
	make(&b, ORC_STORE_READONLY);
	CHECK(b.v->offered >> VIRTIO_BLK_F_RO & 1 && !(b.v->offered >> VIRTIO_BLK_F_DISCARD & 1));
	CHECK(!get(b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, max_discard_sectors), 4));
	end(&b);
}

/* ---- every request -------------------------------------------------------------------------------------------------- */

static void each_kind_of_request_does_what_it_says(void)
{
	for (int e = 0; e < 2; e++) {
		static uint8_t zeroes[8192];
		uint8_t pattern[8192];
		struct orc_blk_counters c;
		struct bench b;

		begin(&b, engines[e]);
		for (int i = 0; i < 8192; i++)
			pattern[i] = (uint8_t)(i * 7 + 1);
		memcpy(at(&b.g, DATA), pattern, 8192);
		CHECK(one(&b, OUT, 100, DATA, 8192, 0) == OK);
		check_file(&b, 100 * 512, pattern, 8192);
		CHECK(one(&b, FLUSH, 0, 0, 0, 0) == OK);
		ask(&b, 1, IN, 101, DATA + 8192, 1024, W);
		CHECK(await_used(&b).len == 1025 && *status_of(&b, 1) == OK);
		CHECK(!memcmp(at(&b.g, DATA + 8192), pattern + 512, 1024));
		CHECK(one(&b, IN, SECTORS - 1, DATA, 512, W) == OK && !memcmp(at(&b.g, DATA), zeroes, 512));
		CHECK(range(&b, ZEROES, 100, 8, 0) == OK && range(&b, ZEROES, 108, 8, 1) == OK);
		check_file(&b, 100 * 512, zeroes, 8192);
		memcpy(at(&b.g, DATA), pattern, 8192);
		CHECK(one(&b, OUT, 64, DATA, 8192, 0) == OK && range(&b, DISCARD, 64, 16, 0) == OK);
		check_file(&b, 64 * 512, zeroes, 8192); /* as this file system does it */
		ask(&b, 2, GET_ID, 0, DATA, 20, W);
		CHECK(await_used(&b).len == 21 && *status_of(&b, 2) == OK && !strcmp(at(&b.g, DATA), "disk-1"));
		orc_virtio_blk_look(b.v, &c);
		CHECK(c.reads == 2 && c.read_bytes == 1536 && c.writes == 2 && c.written_bytes == 16384);
		CHECK(c.flushes == 1 && c.discards == 1 && c.zeroes == 2 && !c.errors && !c.waits);
		end(&b);
	}
}

static void what_can_not_be_done_is_an_error_for_the_guest(void)
{
	struct orc_blk_counters c;
	struct orc_virtio_counters all;
	unsigned errors = 0;
	struct bench b;

	begin(&b, 0);
#define FAILS(expected, call)                                                                                          \
	do {                                                                                                           \
		CHECK((call) == (expected));                                                                           \
		errors++;                                                                                              \
	} while (0)
	for (uint32_t type = IN; type <= OUT; type++) {
		uint16_t w = type == IN ? W : 0;

		FAILS(IOERR, one(&b, type, SECTORS, DATA, 512, w));
		FAILS(IOERR, one(&b, type, SECTORS - 1, DATA, 1024, w));
		FAILS(IOERR, one(&b, type, UINT64_MAX, DATA, 512, w));
		FAILS(IOERR, one(&b, type, UINT64_MAX / 512 + 1, DATA, 512, w)); /* 0, if it were multiplied */
		FAILS(IOERR, one(&b, type, 1ull << 55, DATA, 512, w));
		FAILS(IOERR, one(&b, type, 0, DATA, 513, w));
		FAILS(IOERR, one(&b, type, 0, DATA, 1, w));
		FAILS(IOERR, one(&b, type, 0, 0, 0, w));
		FAILS(IOERR, one(&b, type, 0, DATA, 512, w ^ W)); /* the wrong way */
	}
	FAILS(IOERR, one(&b, FLUSH, 0, DATA, 512, 0));
	FAILS(IOERR, one(&b, FLUSH, 0, DATA, 512, W));
	FAILS(IOERR, one(&b, GET_ID, 0, DATA, 20, 0));
	FAILS(IOERR, one(&b, GET_ID, 0, 0, 0, 0));
	for (uint32_t type = DISCARD; type <= ZEROES; type += 2) {
		FAILS(IOERR, one(&b, type, 0, DATA, 15, 0));
		FAILS(IOERR, one(&b, type, 0, DATA, 32, 0)); /* two ranges */
		FAILS(IOERR, one(&b, type, 0, DATA, 16, W));
		FAILS(IOERR, range(&b, type, 0, 0, 0));
		FAILS(IOERR, range(&b, type, SECTORS, 1, 0));
		FAILS(IOERR, range(&b, type, 1, SECTORS, 0));
		FAILS(IOERR, range(&b, type, UINT64_MAX, 2, 0));
		FAILS(IOERR, range(&b, type, 0, UINT32_MAX, 0));
		FAILS(UNSUPP, range(&b, type, 0, 8, 2));
	}
	FAILS(UNSUPP, range(&b, DISCARD, 0, 8, 1));
	FAILS(UNSUPP, one(&b, 3, 0, DATA, 512, W));
	FAILS(UNSUPP, one(&b, UINT32_MAX, 0, DATA, 512, 0));
	/* No header, but room for an answer. */
	*status_of(&b, 0) = PENDING;
	describe(&b.d, 0, HEADERS, 15, N, 1);
	describe(&b.d, 1, STATUS, 1, W, 0);
	offer(&b.d, 0);
	kick(&b);
	FAILS(IOERR, result(&b, 0));
	describe(&b.d, 0, STATUS, 1, W, 0);
	offer(&b.d, 0);
	kick(&b);
	FAILS(IOERR, result(&b, 0));
	orc_virtio_blk_look(b.v, &c);
	CHECK(c.errors == errors && !c.reads && !c.writes && !c.discards && !c.zeroes, "%u", (unsigned)c.errors);
	orc_virtio_look(b.v, &all);
	CHECK(!all.error && all.requests == errors);
	CHECK(one(&b, IN, 0, DATA, 512, W) == OK, "and it goes on");
	end(&b);
}

static void a_request_without_room_for_its_status_ends_the_device_until_a_reset(void)
{
	struct orc_virtio_counters c;
	struct bench b;

	begin(&b, 0);
	header(&b, 0, OUT, 0);
	describe(&b.d, 0, HEADERS, 16, N, 1);
	describe(&b.d, 1, DATA, 512, 0, 0);
	offer(&b.d, 0);
	kick(&b);
	while (!(get(b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET))
		sched_yield();
	orc_virtio_look(b.v, &c);
	CHECK(c.error == ORC_QUEUE_BAD_REQUEST);
	drive(&b, F_DISK);
	CHECK(one(&b, IN, 0, DATA, 512, W) == OK);
	end(&b);
}

static void a_disk_that_is_read_only_is_read_and_not_written(void)
{
	struct bench b;

	begin(&b, ORC_STORE_READONLY);
	CHECK(one(&b, IN, 0, DATA, 512, W) == OK && one(&b, FLUSH, 0, 0, 0, 0) == OK);
	CHECK(one(&b, OUT, 0, DATA, 512, 0) == IOERR);
	CHECK(range(&b, DISCARD, 0, 8, 0) == UNSUPP && range(&b, ZEROES, 0, 8, 0) == UNSUPP);
	end(&b);
}

static void a_driver_that_can_not_flush_has_what_it_wrote_durable_at_once(void)
{
	for (int e = 0; e < 2; e++) {
		struct bench b;

		make(&b, engines[e]);
		CHECK(!orc_io_attach(b.io, b.v));
		drive(&b, F_VERSION_1);
		CHECK(one(&b, OUT, 3, DATA, 512, 0) == OK, "with RWF_DSYNC or fdatasync, which a test can't see");
		CHECK(one(&b, FLUSH, 0, 0, 0, 0) == UNSUPP && range(&b, DISCARD, 0, 8, 0) == UNSUPP);
		end(&b);
	}
}

static void a_host_without_room_is_told_by_a_counter(void)
{
	for (int e = 0; e < 2; e++) {
		int full = open("/dev/full", O_RDWR | O_CLOEXEC); /* has room for nothing, and zeroes to be read */
		struct orc_blk_counters c;
		struct bench b;

		make(&b, 0);
		orc_device_free(orc_virtio_device(b.v));
		CHECK(!orc_virtio_blk_new(b.g.memory, file_store(full, CAPACITY, engines[e]), "full", &b.v));
		orc_virtio_set_kick_fd(b.v, 0, b.kick);
		orc_virtio_set_vector_fd(b.v, 0, b.vector);
		CHECK(!orc_io_attach(b.io, b.v));
		drive(&b, F_DISK);
		CHECK(one(&b, OUT, 8, DATA, 4096, 0) == IOERR);
		orc_virtio_blk_look(b.v, &c);
		CHECK(c.errors == 1 && c.no_space == 1 && !c.writes);
		CHECK(one(&b, IN, 8, DATA, 4096, W) == OK, "and it goes on");
		end(&b);
	}
}

/* ---- how it may be laid out ------------------------------------------------------------------------------------------ */

static void a_request_may_be_cut_at_any_byte(void)
{
	for (int e = 0; e < 2; e++) {
		struct vring_desc *table;
		uint8_t pattern[1024], *data;
		uint64_t place[] = {DATA + 1, NEXT - 100, TOP + 3, DATA + 3001}; /* the second one in two regions */
		uint32_t size[] = {311, 400, 1, 312};
		struct bench b;

		begin(&b, engines[e]);
		for (int i = 0; i < 1024; i++)
			pattern[i] = (uint8_t)(i * 11 + 5);
		header(&b, 0, OUT, 7);
		data = pattern;
		for (int i = 0; i < 4; i++) {
			for (uint32_t k = 0; k < size[i]; k++)
				*(uint8_t *)at(&b.g, place[i] + k) = *data++;
		}
		/* The header in three pieces, and data next to its last one's. */
		table = at(&b.g, TABLE + 8);
		table[0] = (struct vring_desc){HEADERS, 3, N, 1};
		table[1] = (struct vring_desc){HEADERS + 3, 9, N, 2};
		table[2] = (struct vring_desc){HEADERS + 12, 4, N, 3};
		for (uint16_t i = 0; i < 4; i++)
			table[3 + i] = (struct vring_desc){place[i], size[i], N, 4 + i};
		table[7] = (struct vring_desc){STATUS, 1, W, 0};
		describe(&b.d, 0, TABLE + 8, 8 * 16, VRING_DESC_F_INDIRECT, 0);
		offer(&b.d, 0);
		kick(&b);
		CHECK(result(&b, 0) == OK);
		check_file(&b, 7 * 512, pattern, 1024);
		/* And back, with the status right behind the data. */
		header(&b, 0, IN, 7);
		for (uint16_t i = 0; i < 4; i++) {
			memset(at(&b.g, place[i]), 0, 1);
			table[3 + i].flags = N | W;
		}
		table[6] = (struct vring_desc){DATA + 3001, 313, W, 0};
		offer(&b.d, 0);
		kick(&b);
		CHECK(await_used(&b).len == 1025 && *(uint8_t *)at(&b.g, DATA + 3001 + 312) == OK);
		data = pattern;
		for (int i = 0; i < 4; i++) {
			for (uint32_t k = 0; k < size[i]; k++)
				CHECK(*(uint8_t *)at(&b.g, place[i] + k) == *data++);
		}
		end(&b);
	}
}

static void a_request_may_be_a_megabyte_long(void)
{
	for (int e = 0; e < 2; e++) {
		struct vring_desc *table;
		uint8_t *data;
		struct bench b;

		begin(&b, engines[e]);
		table = at(&b.g, TABLE);
		data = at(&b.g, DATA);
		for (int i = 0; i < 0x20000; i++)
			data[i] = (uint8_t)(i * 13 + i / 512);
		header(&b, 0, OUT, 16);
		table[0] = (struct vring_desc){HEADERS, 16, N, 1};
		for (uint16_t i = 0; i < 8; i++)
			table[1 + i] = (struct vring_desc){DATA, 0x20000, N, 2 + i};
		table[9] = (struct vring_desc){STATUS, 1, W, 0};
		describe(&b.d, 0, TABLE, 10 * 16, VRING_DESC_F_INDIRECT, 0);
		offer(&b.d, 0);
		kick(&b);
		CHECK(result(&b, 0) == OK);
		for (int i = 0; i < 8; i++)
			check_file(&b, 16 * 512 + i * 0x20000, data, 0x20000);
		memset(data, 0, 0x20000);
		header(&b, 0, IN, 16);
		for (uint16_t i = 0; i < 8; i++)
			table[1 + i].flags |= W;
		offer(&b.d, 0);
		kick(&b);
		CHECK(result(&b, 0) == OK);
		check_file(&b, 16 * 512, data, 0x20000);
		end(&b);
	}
}

/* ---- many at a time --------------------------------------------------------------------------------------------------- */

static void requests_in_flight_end_in_any_order_and_more_than_there_is_room_for_wait(void)
{
	enum { MANY = SIZE };

	for (int e = 0; e < 2; e++) {
		struct vring_desc *table;
		struct bench b;

		begin(&b, engines[e]);
		table = at(&b.g, TABLE);
		for (int turn = 0; turn < 20; turn++) {
			uint64_t used[2] = {0};

			for (uint16_t i = 0; i < MANY; i++) { /* each of one descriptor, so that the ring is full of them */
				struct vring_desc *t = table + 3 * i;

				header(&b, i, turn & 1 ? IN : OUT, (uint64_t)i * 2);
				memset(at(&b.g, DATA + 512 * i), turn & 1 ? 0 : turn + i + 1, 512);
				t[0] = (struct vring_desc){HEADERS + 16 * i, 16, N, 1};
				t[1] = (struct vring_desc){DATA + 512 * i, 512, turn & 1 ? N | W : N, 2};
				t[2] = (struct vring_desc){STATUS + i, 1, W, 0};
				describe(&b.d, i, TABLE + 48 * i, 48, VRING_DESC_F_INDIRECT, 0);
				offer(&b.d, i);
			}
			notify(b.kick);
			for (int i = 0; i < MANY; i++) {
				struct vring_used_elem u = await_used(&b);

				CHECK(u.id < MANY && *status_of(&b, u.id) == OK && !(used[u.id / 64] >> u.id % 64 & 1));
				used[u.id / 64] |= 1ull << u.id % 64;
			}
			for (int i = 0; i < MANY; i++) {
				uint8_t want = (uint8_t)((turn & ~1) + i + 1);

				CHECK(*(uint8_t *)at(&b.g, DATA + 512 * i) == want);
				check_file(&b, 1024 * i, at(&b.g, DATA + 512 * i), 512);
			}
		}
		end(&b);
	}
}

static void fill(struct bench *b, unsigned n) /* with writes that no one has awaited yet */
{
	for (unsigned i = 0; i < n; i++)
		ask(b, i, OUT, 8 * i, DATA + 4096 * i, 4096, 0);
}

static void a_reset_or_a_hold_waits_for_what_is_in_flight_and_loses_nothing(void)
{
	for (int e = 0; e < 2; e++) {
		struct bench b;

		begin(&b, engines[e]);
		for (int turn = 0; turn < 30; turn++) {
			uint16_t used;

			fill(&b, 32);
			orc_io_hold(b.io);
			CHECK(!orc_virtio_in_flight(b.v));
			used = b.d.used->idx;
			notify(b.kick);
			CHECK(b.d.used->idx == used, "nothing is served");
			orc_io_let_go(b.io);
			for (int i = 0; i < 32; i++)
				CHECK(*status_of(&b, await_used(&b).id / 3) == OK);
			fill(&b, 32);
			put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
			while (get(b.v, VIRTIO_PCI_COMMON_STATUS, 1))
				sched_yield();
			CHECK(!orc_virtio_in_flight(b.v));
			used = b.d.used->idx;
			notify(b.kick);
			CHECK(b.d.used->idx == used);
			drive(&b, F_DISK);
			CHECK(one(&b, IN, 0, DATA, 512, W) == OK);
		}
		end(&b);
	}
}

/* ---- limits ---------------------------------------------------------------------------------------------------------- */

/* A disk with a bucket of its own for one of the meters. */
static orc_bucket *begin_limited(struct bench *b, int meter, double rate, double burst)
{
	orc_bucket *bucket = orc_bucket_new();

	CHECK(bucket && !orc_bucket_set(bucket, rate, burst + 1, -1, orc_now())); /* virtio.h says why 1 more */
	make(b, 0);
	CHECK(!orc_virtio_blk_set_bucket(b->v, meter, 0, bucket));
	CHECK(!orc_io_attach(b->io, b->v));
	drive(b, F_DISK);
	return bucket;
}

static uint64_t waits(struct bench *b)
{
	struct orc_blk_counters c;

	orc_virtio_blk_look(b->v, &c);
	return c.waits;
}

static void await_waits(struct bench *b, uint64_t n)
{
	orc_ns until = orc_now() + PATIENCE;

	while (waits(b) < n) {
		CHECK(orc_now() < until, "nobody waits");
		sched_yield();
	}
}

static void requests_and_bytes_go_no_faster_than_their_limits(void)
{
	for (int meter = 0; meter < ORC_BLK_METERS; meter++) {
		bool bytes = meter == ORC_BLK_SECTORS;
		struct bench b;
		orc_ns since = orc_now();
		orc_bucket *bucket = begin_limited(&b, meter, bytes ? 8000 : 1000, bytes ? 8 : 1);

		for (int i = 0; i < 20; i++) /* of 8 sectors each */
			CHECK(one(&b, i & 1 ? IN : OUT, 0, DATA, 4096, i & 1 ? W : 0) == OK);
		CHECK(orc_now() - since >= 19 * SECOND / 1000, "%lld ns", (long long)(orc_now() - since));
		CHECK(waits(&b));
		end(&b);
		orc_bucket_free(bucket);
	}
}

static void what_costs_nothing_of_a_limit_does_not_wait_for_it(void)
{
	struct bench b;
	orc_bucket *bucket = begin_limited(&b, ORC_BLK_SECTORS, 0.001, 1);

	CHECK(one(&b, OUT, 0, DATA, 512, 0) == OK);
	CHECK(one(&b, FLUSH, 0, 0, 0, 0) == OK && range(&b, DISCARD, 0, 8, 0) == OK && one(&b, GET_ID, 0, DATA, 20, W) == OK);
	CHECK(one(&b, IN, SECTORS, DATA, 512, W) == IOERR && !waits(&b));
	memcpy(at(&b.g, DATA), &(struct virtio_blk_discard_write_zeroes){0, 1, 0}, 16);
	ask(&b, 1, ZEROES, 0, DATA, 16, 0);
	await_waits(&b, 1);
	end(&b); /* while it waits: the I/O thread stops all the same */
	orc_bucket_free(bucket);
}

static void await_ok(struct bench *b, unsigned n) /* in any order */
{
	while (n--)
		CHECK(*status_of(b, await_used(b).id / 3) == OK);
}

static void a_limit_that_is_raised_or_taken_off_is_in_force_at_once(void)
{
	struct bench b;
	orc_bucket *bucket = begin_limited(&b, ORC_BLK_OPERATIONS, 0.001, 1);

	for (int i = 0; i < 3; i++)
		ask(&b, i, OUT, 0, DATA, 512, 0);
	CHECK(result(&b, 0) == OK);
	await_waits(&b, 1);
	CHECK(*status_of(&b, 1) == PENDING);
	CHECK(!orc_bucket_set(bucket, 1e6, 2, -1, orc_now()));
	orc_virtio_blk_limit_changed(b.v);
	await_ok(&b, 2);
	CHECK(!orc_bucket_set(bucket, 0.001, 2, -1, orc_now()));
	ask(&b, 0, OUT, 0, DATA, 512, 0);
	ask(&b, 1, OUT, 0, DATA, 512, 0);
	await_waits(&b, 2);
	CHECK(!orc_bucket_set(bucket, 0, 0, -1, orc_now()));
	orc_virtio_blk_limit_changed(b.v);
	await_ok(&b, 2);
	end(&b);
	orc_bucket_free(bucket);
}

static void who_waits_for_a_limit_keeps_no_hold_and_no_reset_waiting(void)
{
	struct bench b;
	orc_bucket *bucket = begin_limited(&b, ORC_BLK_OPERATIONS, 0.001, 1);

	CHECK(one(&b, OUT, 0, DATA, 512, 0) == OK);
	ask(&b, 1, OUT, 0, DATA, 512, 0);
	await_waits(&b, 1);
	orc_io_hold(b.io);
	CHECK(!orc_virtio_in_flight(b.v) && *status_of(&b, 1) == PENDING);
	orc_io_let_go(b.io);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(!get(b.v, VIRTIO_PCI_COMMON_STATUS, 1), "done at once");
	CHECK(!orc_bucket_set(bucket, 0, 0, -1, orc_now()));
	drive(&b, F_DISK);
	CHECK(one(&b, OUT, 0, DATA, 512, 0) == OK);
	end(&b);
	orc_bucket_free(bucket);
}

static void a_request_that_grows_while_it_waits_pays_for_what_it_is(void)
{
	struct orc_limit l;
	struct bench b;
	orc_bucket *bucket = begin_limited(&b, ORC_BLK_SECTORS, 0.001, 8);

	CHECK(one(&b, OUT, 0, DATA, 4096, 0) == OK);
	ask(&b, 1, OUT, 0, DATA, 512, 0);
	await_waits(&b, 1);
	orc_bucket_limit(bucket, orc_now(), &l);
	CHECK(l.debt > 8.9 && l.debt < 9.1);
	for (int i = 0; i < 3; i++) { /* and once: it is not charged for looking again */
		b.d.table[4].len = 64 * 512;
		orc_virtio_blk_limit_changed(b.v);
		for (orc_ns until = orc_now() + PATIENCE; l.debt < 71.9; orc_bucket_limit(bucket, orc_now(), &l))
			CHECK(orc_now() < until, "%f", l.debt);
		orc_io_hold(b.io);
		orc_io_let_go(b.io);
		orc_bucket_limit(bucket, orc_now(), &l);
		CHECK(l.debt < 72.1, "%f", l.debt);
	}
	CHECK(*status_of(&b, 1) == PENDING);
	end(&b);
	orc_bucket_free(bucket);
}

static void disks_of_a_group_share_its_limit(void)
{
	orc_bucket *group = orc_bucket_new();
	orc_ns since = orc_now();
	struct bench b[2];

	CHECK(group && !orc_bucket_set(group, 1000, 2, -1, since));
	for (int i = 0; i < 2; i++) {
		make(&b[i], 0);
		CHECK(!orc_virtio_blk_set_bucket(b[i].v, ORC_BLK_OPERATIONS, 1, group) && !orc_io_attach(b[i].io, b[i].v));
		drive(&b[i], F_DISK);
	}
	for (int i = 0; i < 10; i++) {
		for (int k = 0; k < 2; k++)
			ask(&b[k], 0, OUT, 0, DATA, 512, 0);
		for (int k = 0; k < 2; k++)
			CHECK(result(&b[k], 0) == OK);
	}
	CHECK(orc_now() - since >= 19 * SECOND / 1000);
	for (int i = 0; i < 2; i++)
		end(&b[i]);
	orc_bucket_free(group);
}

static orc_bucket *begin_group(struct bench *b, int n, double rate, double burst)
{
	orc_bucket *group = orc_bucket_new();

	CHECK(group && !orc_bucket_set(group, rate, burst + 1, -1, orc_now()));
	for (int i = 0; i < n; i++) {
		make(&b[i], 0);
		CHECK(!orc_virtio_blk_set_bucket(b[i].v, ORC_BLK_SECTORS, ORC_BLK_GROUP, group) && !orc_io_attach(b[i].io, b[i].v));
		drive(&b[i], F_DISK);
	}
	return group;
}

static void end_group(struct bench *b, int n, orc_bucket *group)
{
	for (int i = 0; i < n; i++)
		end(&b[i]);
	orc_bucket_free(group);
}

static void long_requests_of_one_disk_keep_no_other_of_its_group_waiting(void)
{
	enum { LONG = 64 * 1024, GREEDY = 8, SMALL = 32 };
	struct bench b[2];
	orc_bucket *group = begin_group(b, 2, 1000, 8);
	struct orc_blk_counters c;
	orc_ns since;

	for (unsigned i = 0; i < GREEDY; i++) /* a second's worth, in requests of an eighth of a second */
		ask(&b[0], i, OUT, 0, DATA, LONG, 0);
	await_waits(&b[0], 1);
	since = orc_now();
	for (int i = 0; i < SMALL; i++)
		CHECK(one(&b[1], OUT, 0, DATA, 512, 0) == OK);
	since = orc_now() - since;
	CHECK(since < SECOND, "%lld ns; if each had waited for a long one: 4 s", (long long)since);
	orc_virtio_blk_look(b[1].v, &c);
	CHECK(c.waited[ORC_BLK_GROUP] && !c.waited[ORC_BLK_OWN]);
	CHECK(!orc_bucket_set(group, 0, 0, -1, orc_now()));
	orc_virtio_blk_limit_changed(b[0].v);
	await_ok(&b[0], GREEDY);
	end_group(b, 2, group);
}

static void disks_of_a_group_get_the_same_share_however_long_their_requests_are(void)
{
	const unsigned size[2] = {32 * 1024, 2048};
	struct bench b[2];
	orc_bucket *group = begin_group(b, 2, 4000, 8);
	struct orc_blk_counters c[2];

	for (int k = 0; k < 2; k++)
		for (unsigned i = 0; i < 16; i++)
			ask(&b[k], i, OUT, 0, DATA, size[k], 0);
	for (orc_ns until = orc_now() + SECOND / 2; orc_now() < until;)
		for (int k = 0; k < 2; k++) {
			struct vring_used_elem e;

			while (reap(&b[k].d, &e))
				ask(&b[k], e.id / 3, OUT, 0, DATA, size[k], 0);
			sched_yield();
		}
	for (int k = 0; k < 2; k++)
		orc_virtio_blk_look(b[k].v, &c[k]);
	for (int k = 0; k < 2; k++)
		CHECK(2 * c[k].written_bytes + 2 * size[0] > c[!k].written_bytes, "%llu and %llu",
		      (unsigned long long)c[0].written_bytes, (unsigned long long)c[1].written_bytes);
	CHECK(c[0].written_bytes + c[1].written_bytes > 64 * 1024);
	end_group(b, 2, group);
}

static void a_guest_that_resets_its_disk_again_and_again_uses_up_nothing_of_its_group(void)
{
	struct bench b[1];
	orc_bucket *group = begin_group(b, 1, 0.001, 8);
	struct orc_limit l;

	CHECK(one(b, OUT, 0, DATA, 4096, 0) == OK);
	for (unsigned i = 0; i < 20; i++) {
		ask(b, 1, OUT, 0, DATA, 4096, 0);
		await_waits(b, i + 1);
		put(b->v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
		drive(b, F_DISK);
	}
	orc_bucket_limit(group, orc_now(), &l);
	CHECK(l.debt > 15.9 && l.debt < 16.1, "%f: what was done, and what waits once", l.debt);
	end_group(b, 1, group);
}

static void of_a_bucket_with_a_burst_that_is_given_once_so_much_goes_at_once(void)
{
	struct bench b;
	orc_bucket *bucket = begin_limited(&b, ORC_BLK_OPERATIONS, 0.001, 2);

	orc_bucket_set_once(bucket, 5);
	for (int i = 0; i < 7; i++)
		CHECK(one(&b, OUT, 0, DATA, 512, 0) == OK);
	CHECK(!waits(&b));
	ask(&b, 1, OUT, 0, DATA, 512, 0);
	await_waits(&b, 1);
	end(&b);
	orc_bucket_free(bucket);
}

/* Pages of this process that are in RAM: the second number of /proc/self/statm (Documentation/filesystems/proc.rst). */
static long resident(void)
{
	FILE *statm = fopen("/proc/self/statm", "r");
	long all, found;

	CHECK(statm && fscanf(statm, "%ld %ld", &all, &found) == 2);
	fclose(statm);
	return found;
}

static void a_disk_without_requests_costs_no_memory_for_them(void)
{
	enum { DISKS = 64, PAGES_EACH = 32 }; /* with the shadow that a sanitizer has of them; for requests 130 would do */
	orc_virtio *disk[DISKS];
	struct guest g;
	long before;

	guest_begin(&g, NULL);
	for (int round = 0; round < 2; round++) { /* the second in memory that the first had */
		before = resident();
		for (int i = 0; i < DISKS; i++)
			CHECK(!orc_virtio_blk_new(g.memory, file_store(new_file(CAPACITY, 0), CAPACITY, 0), "disk", &disk[i]));
		CHECK(resident() - before < DISKS * PAGES_EACH, "%ld pages of %d disks", resident() - before, DISKS);
		for (int i = 0; i < DISKS; i++)
			orc_device_free(orc_virtio_device(disk[i]));
	}
	guest_end(&g);
}

static void whoever_looks_at_the_figures_waits_for_no_request(void)
{
	struct orc_blk_counters c;
	struct bench b;

	begin(&b, 0);
	CHECK(!one(&b, IN, 0, DATA, 512, W));
	orc_io_hold(b.io);
	pthread_mutex_lock(&b.v->lock); /* the I/O thread copies what the page cache has */
	orc_virtio_blk_look(b.v, &c);
	pthread_mutex_unlock(&b.v->lock);
	orc_io_let_go(b.io);
	CHECK(c.reads == 1 && c.read_bytes == 512);
	end(&b);
}

/* Those of a full ring are 16 MiB, of which a turn copies as much as it may; and then the device's lock is free. */
static void long_requests_are_started_some_in_each_turn(void)
{
	enum { EACH = 256 * 1024, REQUESTS = 32, IN_A_TURN = (2 << 20) / EACH };
	struct bench b;
	unsigned seen;

	make(&b, 0);
	drive(&b, F_DISK);
	for (unsigned i = 0; i < REQUESTS; i++)
		ask(&b, i, IN, 0, DATA, EACH, W);
	pthread_mutex_lock(&b.v->lock);
	orc_virtio_serve(b.v, 0);
	seen = b.d.used->idx + b.v->queue[0].in_flight;
	pthread_mutex_unlock(&b.v->lock);
	CHECK(seen >= IN_A_TURN && seen <= IN_A_TURN + 1, "%u", seen);
	CHECK(!orc_io_attach(b.io, b.v));
	for (unsigned i = 0; i < REQUESTS; i++)
		await_used(&b);
	end(&b);
}

/* A store whose thread waits until it may. */
struct slow {
	orc_store store;
	sem_t may;
};

static int wait_for_it(orc_store *s, struct orc_operation *o)
{
	(void)o;
	while (sem_wait(&((struct slow *)s)->may))
		;
	return 0;
}

static void free_slow(orc_store *s)
{
	orc_store_fini(s);
	sem_destroy(&((struct slow *)s)->may);
	free(s);
}

/* A hold waits for what is in flight, and so does a guest's rest under a cap. */
static void of_long_requests_few_are_in_flight(void)
{
	static const struct orc_store_ops slowly = {.execute = wait_for_it, .free = free_slow};
	enum { REQUESTS = 20, MOST = (16 << 20) / CAPACITY };
	const struct virtio_blk_discard_write_zeroes all = {.num_sectors = SECTORS};
	struct slow *slow = calloc(1, sizeof *slow);
	struct bench b = {.file = -1};

	CHECK(slow && !sem_init(&slow->may, 0, 0));
	guest_begin(&b.g, NULL);
	CHECK(!orc_store_init(&slow->store, &slowly, new_file(CAPACITY, 0), CAPACITY, 512, ORC_STORE_NO_URING));
	CHECK(!orc_io_start("io", &b.io) && !orc_virtio_blk_new(b.g.memory, &slow->store, "slow", &b.v));
	orc_virtio_set_kick_fd(b.v, 0, b.kick = new_eventfd());
	orc_virtio_set_vector_fd(b.v, 0, b.vector = new_eventfd());
	CHECK(!orc_io_attach(b.io, b.v));
	drive(&b, F_DISK);
	memcpy(at(&b.g, DATA), &all, sizeof all);
	for (unsigned i = 0; i < REQUESTS; i++)
		ask(&b, i, VIRTIO_BLK_T_WRITE_ZEROES, 0, DATA, sizeof all, 0);
	for (unsigned done = 0; done < REQUESTS; done++) {
		int n;

		do { /* what can be started is; and no more */
			n = orc_virtio_outstanding(b.v);
			CHECK(n <= MOST, "%d", n);
		} while (n < MOST && (unsigned)n < REQUESTS - done);
		CHECK(!sem_post(&slow->may));
		await_used(&b);
	}
	end(&b);
}

const struct test blk_tests[] = {
	TEST(whoever_looks_at_the_figures_waits_for_no_request),
	TEST(long_requests_are_started_some_in_each_turn),
	TEST(of_long_requests_few_are_in_flight),
	TEST(the_configuration_has_capacity_and_limits),
	TEST(each_kind_of_request_does_what_it_says),
	TEST(what_can_not_be_done_is_an_error_for_the_guest),
	TEST(a_request_without_room_for_its_status_ends_the_device_until_a_reset),
	TEST(a_disk_that_is_read_only_is_read_and_not_written),
	TEST(a_driver_that_can_not_flush_has_what_it_wrote_durable_at_once),
	TEST(a_host_without_room_is_told_by_a_counter),
	TEST(a_request_may_be_cut_at_any_byte),
	TEST(a_request_may_be_a_megabyte_long),
	TEST(requests_in_flight_end_in_any_order_and_more_than_there_is_room_for_wait),
	TEST(a_reset_or_a_hold_waits_for_what_is_in_flight_and_loses_nothing),
	TEST(requests_and_bytes_go_no_faster_than_their_limits),
	TEST(what_costs_nothing_of_a_limit_does_not_wait_for_it),
	TEST(a_limit_that_is_raised_or_taken_off_is_in_force_at_once),
	TEST(who_waits_for_a_limit_keeps_no_hold_and_no_reset_waiting),
	TEST(a_request_that_grows_while_it_waits_pays_for_what_it_is),
	TEST(disks_of_a_group_share_its_limit),
	TEST(long_requests_of_one_disk_keep_no_other_of_its_group_waiting),
	TEST(disks_of_a_group_get_the_same_share_however_long_their_requests_are),
	TEST(a_guest_that_resets_its_disk_again_and_again_uses_up_nothing_of_its_group),
	TEST(of_a_bucket_with_a_burst_that_is_given_once_so_much_goes_at_once),
	TEST(a_disk_without_requests_costs_no_memory_for_them),
	{0},
};
