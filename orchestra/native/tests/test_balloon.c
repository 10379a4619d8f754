/* A balloon by its queues: which pages go back to the host, which don't, and what the guest tells of its memory. */
#include <fcntl.h>
#include <linux/virtio_balloon.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "driver.h"

enum {
	SIZE = 16, W = VRING_DESC_F_WRITE, N = VRING_DESC_F_NEXT,
	INFLATE = 0, DEFLATE = 1, STATISTICS = 2, REPORTS = 4, MOST_QUEUES = 5,
	RINGS = LOW, BUFFERS = LOW + 0x8000, DATA = LOW + 0x20000, /* RINGS: 0x1000 for each queue */
	TARGET_AT = 0, ACTUAL_AT = 4, POISON_AT = 12,
};
#define F_STATISTICS (1ull << VIRTIO_BALLOON_F_STATS_VQ)
#define F_OOM (1ull << VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
#define F_MUST_TELL (1ull << VIRTIO_BALLOON_F_MUST_TELL_HOST)
#define F_POISON (1ull << 4)
#define F_REPORTING (1ull << 5)
#define F_USUAL (F_STATISTICS | F_REPORTING | F_VERSION_1)

struct bench {
	struct guest g;
	orc_virtio *v;
	struct driver d[MOST_QUEUES];
	int vector;
};

static void serve(struct bench *b) /* as the I/O thread does, a turn of each queue */
{
	uint64_t kicked = atomic_exchange(&b->v->kicked, 0);

	pthread_mutex_lock(&b->v->lock);
	for (uint16_t i = 0; i < b->v->queues; i++)
		if (kicked >> i & 1)
			orc_virtio_serve(b->v, i);
	CHECK(!orc_virtio_in_flight(b->v), "a pause would wait for it");
	pthread_mutex_unlock(&b->v->lock);
}

static void serve_all(struct bench *b)
{
	for (int turn = 0; atomic_load(&b->v->kicked); turn++) {
		CHECK(turn < 1000);
		serve(b);
	}
}

static void drive(struct bench *b, uint64_t features)
{
	CHECK(negotiate(b->v, features));
	for (uint16_t i = 0; i < b->v->queues; i++) {
		memset(at(&b->g, RINGS + 0x1000u * i), 0, 0x1000);
		b->d[i] = driver_at(&b->g, RINGS + 0x1000u * i, SIZE);
		set_up(b->v, i, &b->d[i], features, 0);
	}
	go(b->v);
	serve_all(b);
}

static void make(struct bench *b, unsigned flags, orc_ns interval)
{
	CHECK(!orc_virtio_balloon_new(b->g.memory, flags, interval, &b->v));
	orc_virtio_set_vector_fd(b->v, 0, b->vector = new_eventfd());
}

static void begin(struct bench *b, unsigned flags, uint64_t features)
{
	guest_begin(&b->g, NULL);
	make(b, flags, 0);
	drive(b, features);
}

static void end(struct bench *b)
{
	orc_device_free(orc_virtio_device(b->v));
	close(b->vector);
	guest_end(&b->g);
}

static struct orc_balloon_counters look(struct bench *b)
{
	struct orc_balloon_counters c;

	orc_virtio_balloon_look(b->v, &c);
	return c;
}

static enum orc_queue_error error(struct bench *b)
{
	struct orc_virtio_counters c;

	orc_virtio_look(b->v, &c);
	return (enum orc_queue_error)c.error;
}

static void send(struct bench *b, uint16_t queue, uint64_t address, uint32_t size, uint16_t flags)
{
	describe(&b->d[queue], 0, address, size, flags, 0);
	offer(&b->d[queue], 0);
	orc_virtio_again(b->v, queue);
}

static bool was_used(struct bench *b, uint16_t queue)
{
	struct vring_used_elem e;

	return reap(&b->d[queue], &e);
}

static void send_list(struct bench *b, uint16_t queue, const uint32_t *page, size_t n)
{
	memcpy(at(&b->g, BUFFERS), page, n * sizeof *page);
	send(b, queue, BUFFERS, (uint32_t)(n * sizeof *page), 0);
}

static void fill(struct bench *b)
{
	memset(at(&b->g, DATA), 0xaa, LOW_SIZE - (DATA - LOW));
	memset(at(&b->g, NEXT), 0xaa, NEXT_SIZE);
}

static bool is_there(struct bench *b, uint64_t page)
{
	const uint8_t *byte = at(&b->g, page << 12);

	CHECK(byte[0] == byte[PAGE - 1] && (byte[0] == 0xaa || byte[0] == 0), "a page as a whole");
	return byte[0];
}

/* ---- inflate and deflate ------------------------------------------------------------------------------------------- */

enum { FIRST = DATA >> 12, LAST = (NEXT + NEXT_SIZE - PAGE) >> 12, BORDER = NEXT >> 12 };

static void pages_in_the_balloon_are_the_hosts_and_come_back_as_zeros(void)
{
	const uint32_t page[] = {FIRST + 9, FIRST + 2, FIRST + 3, FIRST + 2, BORDER, BORDER - 1, LAST};
	struct bench b;

	begin(&b, 0, F_VERSION_1);
	fill(&b);
	send_list(&b, INFLATE, page, 7);
	serve_all(&b);
	CHECK(was_used(&b, INFLATE) && !error(&b));
	for (uint64_t i = FIRST; i <= LAST; i++)
		CHECK(is_there(&b, i) == (i != FIRST + 9 && i != FIRST + 2 && i != FIRST + 3 && i != BORDER && i != BORDER - 1 && i != LAST));
	CHECK(look(&b).inflated == 7 && look(&b).given_back == 6 * PAGE && !look(&b).failed);
	memset(at(&b.g, (FIRST + 2) << 12), 0xaa, PAGE); /* it may be used at any time */
	send_list(&b, DEFLATE, page, 7);
	serve_all(&b);
	CHECK(was_used(&b, DEFLATE) && is_there(&b, FIRST + 2) && look(&b).deflated == 7 && look(&b).inflated == 7);
	end(&b);
}

static void a_page_that_is_not_the_guests_ends_the_device_by_name(void)
{
	const uint32_t outside[] = {0, (LOW >> 12) - 1, (NEXT + NEXT_SIZE) >> 12, ROM >> 12, UINT32_MAX, 0xa0000};
	struct bench b;

	for (unsigned i = 0; i < 6; i++) {
		const uint32_t page[] = {outside[i], FIRST, outside[i]};
		uint8_t *rom;

		begin(&b, 0, F_VERSION_1);
		fill(&b);
		rom = at(&b.g, ROM);
		memset(rom, 7, PAGE);
		send_list(&b, INFLATE, page, 3);
		serve_all(&b);
		CHECK(error(&b) == ORC_QUEUE_BAD_REQUEST && get(b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET);
		CHECK(!was_used(&b, INFLATE) && rom[0] == 7 && rom[PAGE - 1] == 7);
		drive(&b, F_VERSION_1);
		send_list(&b, INFLATE, page + 1, 1);
		serve_all(&b);
		CHECK(was_used(&b, INFLATE) && !is_there(&b, FIRST));
		end(&b);
	}
}

static void a_list_that_is_none_ends_the_device_by_name(void)
{
	const struct { uint32_t size; uint16_t flags; } bad[] = {{3, 0}, {6, 0}, {4, W}, {4 * 4097, 0}, {LOW_SIZE, 0}};
	struct bench b;

	for (unsigned i = 0; i < 10; i++) {
		begin(&b, 0, F_VERSION_1);
		fill(&b);
		send(&b, i & 1, i / 2 == 4 ? LOW : DATA, bad[i / 2].size, bad[i / 2].flags);
		serve_all(&b);
		CHECK(error(&b) == ORC_QUEUE_BAD_REQUEST && !look(&b).inflated && !look(&b).deflated && is_there(&b, FIRST));
		end(&b);
	}
}

static void a_long_list_is_seen_to_in_turns(void)
{
	uint32_t page[4096];
	struct bench b;

	for (unsigned i = 0; i < 4096; i++)
		page[i] = FIRST + i % 16 * 2;
	begin(&b, 0, F_VERSION_1);
	fill(&b);
	send_list(&b, INFLATE, page, 4096);
	for (unsigned turn = 1; turn <= 16; turn++) {
		CHECK(!was_used(&b, INFLATE));
		serve(&b);
		CHECK(look(&b).inflated == 256 * turn);
		if (turn == 5) { /* it is shorter by now, and another one: nothing but pages that were listed are touched */
			memset(at(&b.g, (FIRST + 1) << 12), 0xaa, PAGE);
			CHECK(is_there(&b, FIRST + 1) && !is_there(&b, FIRST));
		}
	}
	CHECK(was_used(&b, INFLATE));
	send_list(&b, INFLATE, page, 512);
	serve(&b);
	describe(&b.d[INFLATE], 0, BUFFERS, 4, 0, 0); /* less than what was done */
	serve_all(&b);
	CHECK(was_used(&b, INFLATE) && !error(&b) && look(&b).inflated == 4096 + 256);
	send_list(&b, INFLATE, page, 512);
	serve(&b);
	drive(&b, F_VERSION_1); /* reset in the middle of it */
	send_list(&b, INFLATE, page, 300);
	serve_all(&b);
	CHECK(was_used(&b, INFLATE) && look(&b).inflated == 4096 + 256 + 256 + 300, "from its begin");
	end(&b);
}

static void pages_of_a_memfd_are_removed_from_it(void)
{
	uint32_t page[32];
	struct bench b = {0};
	struct stat s;
	int file = memfd_create("memory", MFD_CLOEXEC);
	blkcnt_t before;
	void *mapped;

	guest_begin(&b.g, NULL);
	CHECK(file >= 0 && !ftruncate(file, LOW_SIZE));
	mapped = mmap(at(&b.g, LOW), LOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
	CHECK(mapped != MAP_FAILED);
	make(&b, ORC_BALLOON_SHARED, 0);
	drive(&b, F_VERSION_1);
	fill(&b);
	memset(at(&b.g, LOW), 0, BUFFERS - LOW + PAGE); /* what is written below is there already */
	drive(&b, F_VERSION_1);
	CHECK(!fstat(file, &s));
	before = s.st_blocks;
	for (unsigned i = 0; i < 32; i++)
		page[i] = i < 16 ? FIRST + i : BORDER + i % 16; /* NEXT is anonymous */
	send_list(&b, INFLATE, page, 32);
	serve_all(&b);
	CHECK(was_used(&b, INFLATE) && !fstat(file, &s) && s.st_blocks == before - 16 * (PAGE / 512));
	CHECK(!is_there(&b, FIRST + 15) && is_there(&b, FIRST + 16) && !is_there(&b, BORDER + 15));
	CHECK(look(&b).given_back == 32 * PAGE && !look(&b).failed);
	end(&b);
	close(file);
}

static void what_the_kernel_does_not_take_is_counted_and_stays(void)
{
	const uint32_t page[] = {FIRST, FIRST + 2};
	struct bench b;

	begin(&b, 0, F_VERSION_1);
	fill(&b);
	if (syscall(SYS_mlock, at(&b.g, DATA), PAGE)) { /* a sanitizer leaves mlock out */
		skipped = "no page can be locked here";
	} else {
		send_list(&b, INFLATE, page, 2);
		serve_all(&b);
		CHECK(was_used(&b, INFLATE) && is_there(&b, FIRST) && !is_there(&b, FIRST + 2));
		CHECK(look(&b).failed == PAGE && look(&b).given_back == PAGE);
	}
	end(&b);
}

/* ---- free page reporting ------------------------------------------------------------------------------------------- */

static void whole_pages_of_a_report_are_given_back_and_parts_of_pages_stay(void)
{
	struct bench b;

	begin(&b, ORC_BALLOON_REPORTING, F_USUAL);
	fill(&b);
	describe(&b.d[REPORTS], 0, DATA + 100, 3 * PAGE, W | N, 1);
	describe(&b.d[REPORTS], 1, NEXT - PAGE, 2 * PAGE, W | N, 2); /* over the border */
	describe(&b.d[REPORTS], 2, DATA + 8 * PAGE + 8, PAGE, W, 0); /* no whole one */
	offer(&b.d[REPORTS], 0);
	orc_virtio_again(b.v, REPORTS);
	serve_all(&b);
	CHECK(was_used(&b, REPORTS) && !error(&b) && look(&b).reported == 6 * PAGE && look(&b).given_back == 4 * PAGE);
	for (uint64_t i = FIRST; i <= LAST; i++)
		CHECK(is_there(&b, i) == (i != FIRST + 1 && i != FIRST + 2 && i != BORDER - 1 && i != BORDER));
	send(&b, REPORTS, DATA, PAGE, 0);
	serve_all(&b);
	CHECK(error(&b) == ORC_QUEUE_BAD_REQUEST, "a report is written to");
	end(&b);
}

static void a_report_of_much_is_seen_to_in_turns(void)
{
	enum { MUCH = 8 << 20 };
	const struct kvm_userspace_memory_region low = {.guest_phys_addr = LOW, .memory_size = LOW_SIZE + MUCH};
	struct bench b = {0};

	b.g.size = low.memory_size;
	b.g.host = mmap(NULL, b.g.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(b.g.host != MAP_FAILED);
	b.g.slot[0] = low;
	b.g.slot[0].userspace_addr = (uintptr_t)b.g.host;
	b.g.memory = orc_guest_memory_new(b.g.slot, 1, NULL);
	make(&b, ORC_BALLOON_REPORTING, 0);
	drive(&b, F_USUAL);
	memset(at(&b.g, NEXT), 0xaa, MUCH);
	send(&b, REPORTS, NEXT, MUCH, W);
	serve(&b);
	CHECK(look(&b).reported == MUCH / 2 && !was_used(&b, REPORTS));
	CHECK(!is_there(&b, (NEXT + MUCH / 2 - PAGE) >> 12) && is_there(&b, (NEXT + MUCH / 2) >> 12));
	serve_all(&b);
	CHECK(look(&b).reported == MUCH && was_used(&b, REPORTS) && !is_there(&b, (NEXT + MUCH - PAGE) >> 12));
	end(&b);
}

static void a_guest_that_poisons_free_pages_finds_its_poison(void)
{
	const uint64_t features = F_USUAL | F_POISON;
	uint32_t poison = 0xaaaaaaaa;
	struct bench b;

	begin(&b, ORC_BALLOON_REPORTING, features);
	fill(&b);
	put(b.v, ORC_BAR_DEVICE + POISON_AT, 4, poison);
	send(&b, REPORTS, DATA, PAGE, W);
	serve_all(&b);
	CHECK(was_used(&b, REPORTS) && is_there(&b, FIRST) && look(&b).reported == PAGE && !look(&b).given_back);
	drive(&b, features);
	CHECK(get(b.v, ORC_BAR_DEVICE + POISON_AT, 4) == 0, "of another driver");
	send(&b, REPORTS, DATA, PAGE, W);
	serve_all(&b);
	CHECK(was_used(&b, REPORTS) && !is_there(&b, FIRST), "cleared, as such a guest has it");
	drive(&b, F_USUAL);
	fill(&b);
	put(b.v, ORC_BAR_DEVICE + POISON_AT, 4, poison);
	send(&b, REPORTS, DATA, PAGE, W);
	serve_all(&b);
	CHECK(!is_there(&b, FIRST), "it was not negotiated");
	end(&b);
}

/* By the specification it is queue 4; drivers of Linux up to 6.10 leave out the queues that were not negotiated. */
static void reports_are_found_at_each_number_that_drivers_have_for_their_queue(void)
{
	const struct { uint64_t features; uint16_t queue; bool fine; } way[] = {
		{F_USUAL, 3, true}, {F_USUAL, 4, true}, {F_REPORTING | F_VERSION_1, 2, true}, {F_REPORTING | F_VERSION_1, 4, true},
		{F_STATISTICS | F_VERSION_1, 3, false}, {F_VERSION_1, 2, false}, {F_VERSION_1, 4, false}};
	struct bench b;

	for (unsigned i = 0; i < sizeof way / sizeof *way; i++) {
		begin(&b, ORC_BALLOON_REPORTING, way[i].features);
		fill(&b);
		send(&b, way[i].queue, DATA, PAGE, W);
		serve_all(&b);
		CHECK(error(&b) == (way[i].fine ? ORC_QUEUE_FINE : ORC_QUEUE_BAD_REQUEST));
		CHECK(was_used(&b, way[i].queue) == way[i].fine && is_there(&b, FIRST) == !way[i].fine);
		end(&b);
	}
}

/* ---- statistics ---------------------------------------------------------------------------------------------------- */

static void tell(struct bench *b, uint64_t free_bytes, unsigned n)
{
	struct virtio_balloon_stat *s = at(&b->g, BUFFERS + 0x1000);

	for (unsigned i = 0; i < n; i++)
		s[i] = (struct virtio_balloon_stat){.tag = (uint16_t)(i + 4), .val = free_bytes + i};
	send(b, STATISTICS, BUFFERS + 0x1000, n * sizeof *s, 0);
	serve_all(b);
}

static void statistics_are_read_at_the_start_and_whenever_the_time_has_come(void)
{
	struct bench b;

	guest_begin(&b.g, NULL);
	make(&b, 0, SECOND / 1000);
	CHECK(!is_readable(b.v->watched), "without a driver there is nobody to ask");
	drive(&b, F_STATISTICS | F_VERSION_1);
	tell(&b, 1000, 3);
	CHECK(look(&b).updates == 1 && look(&b).updated && look(&b).known == 0x70 && look(&b).statistic[4] == 1000);
	for (unsigned i = 2; i < 5; i++) {
		CHECK(!was_used(&b, STATISTICS));
		CHECK(poll(&(struct pollfd){.fd = b.v->watched, .events = POLLIN}, 1, (int)(PATIENCE / 1000000)) == 1);
		pthread_mutex_lock(&b.v->lock);
		orc_virtio_called(b.v);
		pthread_mutex_unlock(&b.v->lock);
		serve_all(&b);
		CHECK(was_used(&b, STATISTICS), "which asks for newer ones");
		tell(&b, 1000 * i, 9); /* those that this version does not know are left out */
		CHECK(look(&b).updates == i && look(&b).statistic[4] == 1000 * i && look(&b).known == 0x3f0);
	}
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	while (is_readable(b.v->watched)) /* one that had come before */
		CHECK(read(b.v->watched, &(uint64_t){0}, 8) == 8);
	CHECK(!look(&b).driver && look(&b).updates == 4);
	end(&b);
}

static void statistics_of_any_length_are_read_up_to_a_bound(void)
{
	struct bench b;

	begin(&b, 0, F_STATISTICS | F_VERSION_1);
	send(&b, STATISTICS, LOW, LOW_SIZE, 0); /* whatever is there */
	serve_all(&b);
	CHECK(!error(&b) && look(&b).updates == 1);
	drive(&b, F_STATISTICS | F_VERSION_1);
	send(&b, STATISTICS, DATA, 9, 0);
	serve_all(&b);
	CHECK(!error(&b) && look(&b).updates == 2, "of none");
	drive(&b, F_STATISTICS | F_VERSION_1);
	send(&b, STATISTICS, DATA, 10, W);
	serve_all(&b);
	CHECK(error(&b) == ORC_QUEUE_BAD_REQUEST && look(&b).updates == 2);
	end(&b);
}

/* ---- configuration, features, state ----------------------------------------------------------------------------------- */

static void features_are_those_that_were_asked_for(void)
{
	const struct { unsigned flags; uint64_t offered; uint16_t queues; } way[] = {
		{0, F_STATISTICS, 3},
		{ORC_BALLOON_DEFLATE_ON_OOM, F_STATISTICS | F_OOM, 3},
		{ORC_BALLOON_MUST_TELL_HOST, F_STATISTICS | F_MUST_TELL, 3},
		{ORC_BALLOON_REPORTING, F_STATISTICS | F_REPORTING | F_POISON, 5},
		{ORC_BALLOON_REPORTING | ORC_BALLOON_FILE, F_STATISTICS | F_REPORTING, 5},
	};
	struct bench b;

	guest_begin(&b.g, NULL);
	for (unsigned i = 0; i < sizeof way / sizeof *way; i++) {
		make(&b, way[i].flags, 0);
		CHECK(orc_virtio_type(b.v) == VIRTIO_ID_BALLOON && orc_virtio_queues(b.v) == way[i].queues);
		put(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4, 0);
		CHECK(get(b.v, VIRTIO_PCI_COMMON_DF, 4) == ((F_RINGS | way[i].offered) & UINT32_MAX));
		orc_device_free(orc_virtio_device(b.v));
		close(b.vector);
	}
	guest_end(&b.g);
}

static void the_target_is_told_and_what_the_guest_does_without_is_its_own_account(void)
{
	struct bench b;

	begin(&b, 0, F_VERSION_1);
	put(b.v, VIRTIO_PCI_COMMON_MSIX, 2, 0);
	CHECK(look(&b).driver && !look(&b).actual && !is_readable(b.vector));
	orc_virtio_balloon_set_target(b.v, 1234);
	CHECK(is_readable(b.vector) && get(b.v, ORC_BAR_DEVICE + TARGET_AT, 4) == 1234);
	put(b.v, ORC_BAR_DEVICE + ACTUAL_AT, 4, 1000);
	CHECK(look(&b).actual == 1000 && get(b.v, ORC_BAR_DEVICE + ACTUAL_AT, 4) == 1000);
	put(b.v, ORC_BAR_DEVICE + TARGET_AT, 4, 7); /* not the driver's */
	put(b.v, ORC_BAR_DEVICE + ACTUAL_AT, 2, 7);
	put(b.v, ORC_BAR_DEVICE + ACTUAL_AT + 2, 4, 7);
	put(b.v, ORC_BAR_DEVICE + 8, 4, 7);
	CHECK(look(&b).actual == 1000 && get(b.v, ORC_BAR_DEVICE + TARGET_AT, 8) == (1000ull << 32 | 1234));
	CHECK(get(b.v, ORC_BAR_DEVICE + 8, 8) == 0);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(!look(&b).driver && !look(&b).actual && get(b.v, ORC_BAR_DEVICE + TARGET_AT, 8) == 1234);
	end(&b);
}

static void a_balloon_goes_on_in_another_one_from_its_state(void)
{
	uint32_t page[300];
	struct orc_virtio_state s;
	struct bench b, c;

	for (unsigned i = 0; i < 300; i++)
		page[i] = FIRST + 31 - i % 32;
	begin(&b, ORC_BALLOON_REPORTING, F_USUAL);
	orc_virtio_balloon_set_target(b.v, 77);
	put(b.v, ORC_BAR_DEVICE + ACTUAL_AT, 4, 55);
	fill(&b);
	send_list(&b, INFLATE, page, 300);
	serve(&b); /* the rest is left to the other one */
	orc_virtio_save(b.v, &s);
	c = b;
	make(&c, ORC_BALLOON_REPORTING, 0);
	CHECK(orc_virtio_load(c.v, &s));
	CHECK(look(&c).actual == 55 && look(&c).driver && get(c.v, ORC_BAR_DEVICE + TARGET_AT, 4) == 77);
	serve_all(&c);
	CHECK(was_used(&c, INFLATE) && !is_there(&c, FIRST) && !is_there(&c, FIRST + 31));
	orc_device_free(orc_virtio_device(c.v));
	close(c.vector);
	end(&b);
}

/* ---- a hostile guest ------------------------------------------------------------------------------------------------- */

static bool is_guests(const struct bench *b, const uint8_t *byte)
{
	for (unsigned i = 0; i < 4; i++) {
		const uint8_t *start = (const uint8_t *)(uintptr_t)b->g.slot[i].userspace_addr;

		if (byte >= start && byte < start + b->g.slot[i].memory_size && !(b->g.slot[i].flags & KVM_MEM_READONLY))
			return true;
	}
	return false;
}

/* Lists and reports of anything: what lies between and beside the guest's memory stays as it is. */
static void nothing_but_the_guests_own_memory_is_ever_touched(void)
{
	uint64_t seed = 1;
	uint32_t page[64];
	struct bench b;

	begin(&b, ORC_BALLOON_REPORTING, F_USUAL);
	for (size_t i = 0; i < b.g.size; i += PAGE)
		if (!is_guests(&b, b.g.host + i))
			memset(b.g.host + i, 0x55, PAGE);
	for (unsigned run = 0; run < 3000; run++) {
		uint64_t r = random_number(&seed);
		uint16_t queue = (uint16_t)(r % MOST_QUEUES);
		unsigned n = 1 + (unsigned)(r >> 8) % 64;

		for (unsigned i = 0; i < n; i++) {
			uint64_t k = random_number(&seed);

			page[i] = k & 1 ? (uint32_t)(k >> 32) : k & 2 ? (uint32_t)((TOP >> 12) + (k >> 8) % 3) : (uint32_t)((LOW >> 12) + (k >> 8) % 0x90);
			if (!(k >> 40 & 7)) /* mostly not */
				page[i] = FIRST + (uint32_t)(k >> 48) % 32;
		}
		if (queue < STATISTICS && r >> 16 & 1)
			for (unsigned i = 0; i < n; i++)
				page[i] = FIRST + page[i] % 32;
		if (queue < STATISTICS)
			send_list(&b, queue, page, n);
		else
			send(&b, queue, r >> 20 & 1 ? random_number(&seed) : LOW + (r >> 24) % (LOW_SIZE + NEXT_SIZE), (uint32_t)(r >> 44) % 20000,
			     r >> 21 & 7 && queue > STATISTICS ? W : 0);
		serve_all(&b);
		if (error(&b) || !(r >> 60 & 3))
			drive(&b, F_USUAL);
	}
	for (size_t i = 0; i < b.g.size; i++)
		CHECK(is_guests(&b, b.g.host + i) || b.g.host[i] == 0x55);
	CHECK(look(&b).given_back && look(&b).inflated && look(&b).reported && look(&b).updates);
	end(&b);
}

const struct test balloon_tests[] = {
	TEST(pages_in_the_balloon_are_the_hosts_and_come_back_as_zeros),
	TEST(a_page_that_is_not_the_guests_ends_the_device_by_name),
	TEST(a_list_that_is_none_ends_the_device_by_name),
	TEST(a_long_list_is_seen_to_in_turns),
	TEST(pages_of_a_memfd_are_removed_from_it),
	TEST(what_the_kernel_does_not_take_is_counted_and_stays),
	TEST(whole_pages_of_a_report_are_given_back_and_parts_of_pages_stay),
	TEST(a_report_of_much_is_seen_to_in_turns),
	TEST(a_guest_that_poisons_free_pages_finds_its_poison),
	TEST(reports_are_found_at_each_number_that_drivers_have_for_their_queue),
	TEST(statistics_are_read_at_the_start_and_whenever_the_time_has_come),
	TEST(statistics_of_any_length_are_read_up_to_a_bound),
	TEST(features_are_those_that_were_asked_for),
	TEST(the_target_is_told_and_what_the_guest_does_without_is_its_own_account),
	TEST(a_balloon_goes_on_in_another_one_from_its_state),
	TEST(nothing_but_the_guests_own_memory_is_ever_touched),
	{0},
};
