/* The device's side of a split virtqueue: what it makes of chains, and of whatever a guest breaks. */
#include <errno.h>
#include <sched.h>

#include "../dirty.h"
#include "driver.h"

enum { RINGS = LOW, DATA = LOW + 0x8000, SIZE = 8, W = VRING_DESC_F_WRITE, N = VRING_DESC_F_NEXT, I = VRING_DESC_F_INDIRECT };

/* One queue with its driver. */
struct pair {
	struct guest g;
	struct driver d;
	struct orc_queue q;
	struct orc_chain c;
};

static void enable(struct pair *p, bool event_idx, bool indirect)
{
	p->q = (struct orc_queue){.size = p->d.size, .descriptors = p->d.descriptors, .driver = p->d.driver, .device = p->d.device};
	p->d.event_idx = event_idx;
	CHECK(!orc_queue_enable(&p->q, p->g.memory, ORC_QUEUE_MOST, event_idx, indirect, 0));
}

static void begin(struct pair *p, uint16_t size, bool event_idx, bool indirect)
{
	memset(p, 0, sizeof *p);
	guest_begin(&p->g, NULL);
	p->d = driver_at(&p->g, RINGS, size);
	enable(p, event_idx, indirect);
}

static void end(struct pair *p)
{
	guest_end(&p->g);
}

/* ---- memory ----------------------------------------------------------------------------------------------------- */

static void regions_that_overlap_are_refused_and_those_that_go_on_in_each_other_are_one(void)
{
	struct kvm_userspace_memory_region slot[] = {
		{.guest_phys_addr = 0x2000, .memory_size = 0x1000, .userspace_addr = 0x7002000},
		{.guest_phys_addr = 0x1000, .memory_size = 0x1000, .userspace_addr = 0x7001000},
		{.guest_phys_addr = 0x3000, .memory_size = 0x1000, .userspace_addr = 0x7003000, .flags = KVM_MEM_READONLY},
	};
	orc_guest_memory *m = orc_guest_memory_new(slot, 3, NULL);

	CHECK(m->n == 2 && m->region[0].start == 0x1000 && m->region[0].size == 0x2000 && !m->region[1].writable);
	CHECK(orc_guest_memory_piece(m, 0x1ff0, 0x20, true) == (void *)0x7001ff0);
	CHECK(!orc_guest_memory_piece(m, 0x2ff0, 0x20, false) && !orc_guest_memory_piece(m, 0x2ff0, UINT64_MAX, false));
	orc_guest_memory_free(m);
	slot[0].guest_phys_addr = 0x1fff;
	CHECK(!orc_guest_memory_new(slot, 3, NULL) && errno == EINVAL);
	slot[0].memory_size = 0;
	CHECK(!orc_guest_memory_new(slot, 3, NULL) && errno == EINVAL);
	CHECK(!orc_guest_memory_new(slot, 0, NULL) && errno == EINVAL);
}

static enum orc_queue_error map(const struct guest *g, uint64_t address, uint64_t size, bool write, struct iovec *iov, size_t room,
				size_t *n)
{
	*n = 0;
	return orc_guest_memory_map(g->memory, address, size, write, iov, room, n);
}

static void memory_is_mapped_in_pieces_up_to_its_last_byte_and_not_beyond(void)
{
	struct guest g;
	struct iovec iov[2];
	size_t n;

	guest_begin(&g, NULL);
	CHECK(!map(&g, NEXT - 4, 12, true, iov, 2, &n) && n == 2);
	CHECK(iov[0].iov_base == at(&g, NEXT - 4) && iov[0].iov_len == 4);
	CHECK(iov[1].iov_base == at(&g, NEXT) && iov[1].iov_len == 8);
	CHECK(map(&g, NEXT - 4, 12, true, iov, 1, &n) == ORC_QUEUE_TOO_MANY);
	CHECK(!map(&g, LOW, LOW_SIZE + NEXT_SIZE, true, iov, 2, &n));
	CHECK(map(&g, LOW, LOW_SIZE + NEXT_SIZE + 1, true, iov, 2, &n) == ORC_QUEUE_OUTSIDE);
	CHECK(map(&g, LOW - 1, 1, false, iov, 2, &n) == ORC_QUEUE_OUTSIDE);
	CHECK(!map(&g, ROM, PAGE, false, iov, 2, &n) && map(&g, ROM, 1, true, iov, 2, &n) == ORC_QUEUE_READ_ONLY);
	CHECK(!map(&g, TOP, PAGE, true, iov, 2, &n) && n == 1);
	CHECK(!map(&g, UINT64_MAX, 1, true, iov, 2, &n) && n == 1 && iov[0].iov_len == 1);
	CHECK(map(&g, UINT64_MAX, 2, true, iov, 2, &n) == ORC_QUEUE_OVERFLOW);
	CHECK(map(&g, 1, UINT64_MAX, true, iov, 2, &n) == ORC_QUEUE_OUTSIDE);
	CHECK(map(&g, 2, UINT64_MAX, true, iov, 2, &n) == ORC_QUEUE_OVERFLOW);
	CHECK(map(&g, LOW, 0, true, iov, 2, &n) == ORC_QUEUE_EMPTY);
	guest_end(&g);
}

/* ---- rings ------------------------------------------------------------------------------------------------------ */

static enum orc_queue_error enabled_with(const struct guest *g, uint16_t size, uint64_t descriptors, uint64_t driver, uint64_t device)
{
	struct orc_queue q = {.size = size, .descriptors = descriptors, .driver = driver, .device = device};
	enum orc_queue_error e = orc_queue_enable(&q, g->memory, ORC_QUEUE_MOST, true, true, 0);
	struct orc_chain c;

	CHECK(q.error == e && (!e || !orc_queue_take(&q, &c)), "a broken queue has nothing");
	return e;
}

static void a_queue_with_bad_rings_is_refused_by_name_and_one_up_to_the_end_of_memory_is_not(void)
{
	const uint64_t a = RINGS, b = RINGS + 0x2000, c = RINGS + 0x3000;
	struct guest g;

	guest_begin(&g, NULL);
	CHECK(!enabled_with(&g, 8, a, b, c) && !enabled_with(&g, 1, a, b, c) && !enabled_with(&g, 256, a, b, c));
	for (unsigned size = 0; size <= UINT16_MAX; size++)
		if (!size || size & (size - 1) || size > ORC_QUEUE_MOST)
			CHECK(enabled_with(&g, (uint16_t)size, a, b, c) == ORC_QUEUE_BAD_SIZE, "%u", size);
	CHECK(enabled_with(&g, 8, a + 8, b, c) == ORC_QUEUE_MISALIGNED);
	CHECK(enabled_with(&g, 8, a, b + 1, c) == ORC_QUEUE_MISALIGNED && !enabled_with(&g, 8, a, b + 2, c));
	CHECK(enabled_with(&g, 8, a, b, c + 2) == ORC_QUEUE_MISALIGNED && !enabled_with(&g, 8, a, b, c + 4));
	CHECK(!enabled_with(&g, 8, NEXT - 128, b, c) && enabled_with(&g, 8, NEXT - 112, b, c) == ORC_QUEUE_RING_OUTSIDE);
	CHECK(!enabled_with(&g, 8, a, NEXT - 22, c) && enabled_with(&g, 8, a, NEXT - 20, c) == ORC_QUEUE_RING_OUTSIDE);
	CHECK(!enabled_with(&g, 8, a, b, NEXT - 72) && enabled_with(&g, 8, a, b, NEXT - 68) == ORC_QUEUE_RING_OUTSIDE);
	CHECK(enabled_with(&g, 8, 0, b, c) == ORC_QUEUE_RING_OUTSIDE);
	CHECK(enabled_with(&g, 8, a, UINT64_MAX - 1, c) == ORC_QUEUE_RING_OUTSIDE, "the address overflows");
	CHECK(enabled_with(&g, 8, a, b, UINT64_MAX - 3) == ORC_QUEUE_RING_OUTSIDE);
	CHECK(!enabled_with(&g, 8, TOP, TOP + 0x800, UINT64_MAX - 71), "up to the last address");
	CHECK(!enabled_with(&g, 8, ROM, ROM + 0x800, c), "these the device reads");
	CHECK(enabled_with(&g, 8, a, b, ROM) == ORC_QUEUE_RING_READ_ONLY);
	guest_end(&g);
}

/* ---- chains ----------------------------------------------------------------------------------------------------- */

static void a_chain_is_what_is_to_be_read_and_then_what_is_to_be_written(void)
{
	struct pair p;
	uint8_t bytes[16];
	struct iovec part[ORC_CHAIN_MOST];
	struct vring_used_elem e;

	begin(&p, SIZE, false, false);
	describe(&p.d, 3, DATA, 4, N, 5);
	describe(&p.d, 5, NEXT - 2, 6, N, 1);
	describe(&p.d, 1, DATA + 0x100, 8, N | W, 0);
	describe(&p.d, 0, DATA + 0x200, 1, W, 7);
	memcpy(at(&p.g, DATA), "abcd", 4);
	memcpy(at(&p.g, NEXT - 2), "ef", 2);
	memcpy(at(&p.g, NEXT), "ghij", 4);
	CHECK(!orc_queue_take(&p.q, &p.c));
	offer(&p.d, 3);
	CHECK(orc_queue_take(&p.q, &p.c));
	CHECK(p.c.head == 3 && p.c.readable == 3 && p.c.writable == 2 && p.c.readable_bytes == 10 && p.c.writable_bytes == 9);
	CHECK(orc_chain_read(&p.c, 0, bytes, 16) == 10 && !memcmp(bytes, "abcdefghij", 10));
	CHECK(orc_chain_read(&p.c, 3, bytes, 4) == 4 && !memcmp(bytes, "defg", 4));
	CHECK(orc_chain_read(&p.c, 10, bytes, 4) == 0);
	CHECK(orc_chain_write(&p.c, 7, "XYZ", 3) == 2);
	CHECK(*(uint8_t *)at(&p.g, DATA + 0x107) == 'X' && *(uint8_t *)at(&p.g, DATA + 0x200) == 'Y');
	CHECK(orc_iov_slice(p.c.iov, p.c.readable, 3, 4, part) == 3 && part[0].iov_len == 1 && part[2].iov_base == at(&p.g, NEXT));
	CHECK(!orc_queue_take(&p.q, &p.c) && p.q.in_flight == 1 && !reap(&p.d, &e));
	orc_queue_put(&p.q, &p.c, 9);
	CHECK(reap(&p.d, &e) && e.id == 3 && e.len == 9 && !reap(&p.d, &e) && !p.q.in_flight && p.q.requests == 1);
	end(&p);
}

static void chains_are_put_in_any_order(void)
{
	struct pair p;
	struct orc_chain other;
	struct vring_used_elem e;

	begin(&p, SIZE, false, false);
	for (uint16_t i = 0; i < 2; i++) {
		describe(&p.d, i, DATA, 4, W, 0);
		offer(&p.d, i);
	}
	CHECK(orc_queue_take(&p.q, &p.c) && orc_queue_take(&p.q, &other));
	orc_queue_put_head(&p.q, other.head, 1);
	orc_queue_put(&p.q, &p.c, 2);
	CHECK(reap(&p.d, &e) && e.id == 1 && e.len == 1 && reap(&p.d, &e) && e.id == 0 && e.len == 2);
	end(&p);
}

static void an_indirect_table_ends_a_chain_and_may_lie_anywhere_and_be_longer_than_the_ring(void)
{
	struct pair p;
	struct vring_desc *table;

	begin(&p, SIZE, false, true);
	describe(&p.d, 0, DATA, 4, N, 1);
	describe(&p.d, 1, DATA + 0x101, 20 * 16, I | W, 0); /* the flag is to be ignored: 2.7.5.3.2 */
	for (uint16_t i = 0; i < 20; i++) {
		struct vring_desc d = {DATA + 0x1000u + i, 1, i < 19 ? N : 0, (uint16_t)(i + 1)};

		if (i >= 10)
			d.flags |= W;
		memcpy((uint8_t *)at(&p.g, DATA + 0x101) + 16 * i, &d, 16); /* not aligned */
	}
	offer(&p.d, 0);
	CHECK(orc_queue_take(&p.q, &p.c), "%s", orc_queue_error_name(p.q.error));
	CHECK(p.c.readable == 11 && p.c.writable == 10 && p.c.readable_bytes == 14);
	orc_queue_put(&p.q, &p.c, 0);

	/* As many pieces as there are, and one more. */
	table = at(&p.g, LOW + 0x10000);
	for (uint16_t i = 0; i <= ORC_CHAIN_MOST; i++)
		table[i] = (struct vring_desc){DATA, 1, i < ORC_CHAIN_MOST - 1 ? N : 0, (uint16_t)(i + 1)};
	describe(&p.d, 2, LOW + 0x10000, (ORC_CHAIN_MOST + 1) * 16, I, 0);
	offer(&p.d, 2);
	CHECK(orc_queue_take(&p.q, &p.c) && p.c.readable == ORC_CHAIN_MOST);
	orc_queue_put(&p.q, &p.c, 0);
	table[ORC_CHAIN_MOST - 1].flags = N;
	offer(&p.d, 2);
	CHECK(!orc_queue_take(&p.q, &p.c) && p.q.error == ORC_QUEUE_TOO_MANY);
	end(&p);
}

/* ---- what a guest breaks ---------------------------------------------------------------------------------------- */

static void bad_head(struct pair *p) { offer(&p->d, SIZE); }
static void largest_head(struct pair *p) { offer(&p->d, UINT16_MAX); }
static void bad_next(struct pair *p) { describe(&p->d, 0, DATA, 4, N, SIZE); offer(&p->d, 0); }
static void loop_of_one(struct pair *p) { describe(&p->d, 0, DATA, 4, N, 0); offer(&p->d, 0); }
static void loop_of_all(struct pair *p)
{
	for (uint16_t i = 0; i < SIZE; i++)
		describe(&p->d, i, DATA, 4, N, (i + 1) % SIZE);
	offer(&p->d, 5);
}
static void readable_behind_writable(struct pair *p)
{
	describe(&p->d, 0, DATA, 4, N | W, 1);
	describe(&p->d, 1, DATA, 4, 0, 0);
	offer(&p->d, 0);
}
static void no_bytes(struct pair *p) { describe(&p->d, 0, DATA, 0, W, 0); offer(&p->d, 0); }
static void beyond_the_last_address(struct pair *p) { describe(&p->d, 0, UINT64_MAX - 1, 3, W, 0); offer(&p->d, 0); }
static void more_than_4_gib(struct pair *p)
{
	/* Nothing that large is here: it is the sum that counts, so the table says the same memory often enough. */
	p->g.memory->region[0].size = 1ull << 31;
	describe(&p->d, 0, LOW, 1u << 31, N, 1);
	describe(&p->d, 1, LOW, 1u << 31, 0, 0);
	offer(&p->d, 0);
}
static void outside(struct pair *p) { describe(&p->d, 0, LOW - 1, 2, 0, 0); offer(&p->d, 0); }
static void over_the_end(struct pair *p) { describe(&p->d, 0, NEXT + NEXT_SIZE - 1, 2, 0, 0); offer(&p->d, 0); }
static void read_only(struct pair *p) { describe(&p->d, 0, ROM, 4, W, 0); offer(&p->d, 0); }
static void table_not_negotiated(struct pair *p) { enable(p, false, false); describe(&p->d, 0, DATA, 16, I, 0); offer(&p->d, 0); }
static void table_in_a_table(struct pair *p)
{
	*(struct vring_desc *)at(&p->g, DATA) = (struct vring_desc){DATA, 16, I, 0};
	describe(&p->d, 0, DATA, 16, I, 0);
	offer(&p->d, 0);
}
static void table_and_next(struct pair *p) { describe(&p->d, 0, DATA, 16, I | N, 1); offer(&p->d, 0); }
static void empty_table(struct pair *p) { describe(&p->d, 0, DATA, 0, I, 0); offer(&p->d, 0); }
static void broken_table(struct pair *p) { describe(&p->d, 0, DATA, 24, I, 0); offer(&p->d, 0); }
static void table_outside(struct pair *p) { describe(&p->d, 0, 0, 16, I, 0); offer(&p->d, 0); }
static void table_beyond(struct pair *p) { describe(&p->d, 0, NEXT + NEXT_SIZE - 16, 32, I, 0); offer(&p->d, 0); }
static void table_of_4_gib(struct pair *p) { describe(&p->d, 0, DATA, UINT32_MAX - 15, I, 0); offer(&p->d, 0); }
static void next_beyond_its_table(struct pair *p)
{
	*(struct vring_desc *)at(&p->g, DATA) = (struct vring_desc){DATA, 1, N, 1};
	describe(&p->d, 0, DATA, 16, I, 0);
	offer(&p->d, 0);
}
static void loop_in_a_table(struct pair *p)
{
	struct vring_desc *table = at(&p->g, DATA);

	table[0] = (struct vring_desc){DATA, 1, N, 1};
	table[1] = (struct vring_desc){DATA, 1, N, 0};
	describe(&p->d, 0, DATA, 32, I, 0);
	offer(&p->d, 0);
}
static void a_jump(struct pair *p)
{
	describe(&p->d, 0, DATA, 4, 0, 0);
	p->d.next += SIZE;
	offer(&p->d, 0);
}
static void a_step_back(struct pair *p)
{
	p->d.next -= 2;
	offer(&p->d, 0);
}

static void whatever_a_guest_breaks_has_a_name_and_ends_the_queue(void)
{
	const struct {
		enum orc_queue_error error;
		void (*make)(struct pair *);
	} breach[] = {
		{ORC_QUEUE_BAD_HEAD, bad_head}, {ORC_QUEUE_BAD_HEAD, largest_head}, {ORC_QUEUE_BAD_NEXT, bad_next},
		{ORC_QUEUE_LOOP, loop_of_one}, {ORC_QUEUE_LOOP, loop_of_all}, {ORC_QUEUE_ORDER, readable_behind_writable},
		{ORC_QUEUE_EMPTY, no_bytes}, {ORC_QUEUE_OVERFLOW, beyond_the_last_address}, {ORC_QUEUE_OVERFLOW, more_than_4_gib},
		{ORC_QUEUE_OUTSIDE, outside}, {ORC_QUEUE_OUTSIDE, over_the_end}, {ORC_QUEUE_READ_ONLY, read_only},
		{ORC_QUEUE_NO_INDIRECT, table_not_negotiated}, {ORC_QUEUE_NESTED, table_in_a_table},
		{ORC_QUEUE_INDIRECT_NEXT, table_and_next}, {ORC_QUEUE_BAD_TABLE, empty_table}, {ORC_QUEUE_BAD_TABLE, broken_table},
		{ORC_QUEUE_BAD_TABLE, table_outside}, {ORC_QUEUE_BAD_TABLE, table_beyond}, {ORC_QUEUE_BAD_TABLE, table_of_4_gib},
		{ORC_QUEUE_BAD_NEXT, next_beyond_its_table}, {ORC_QUEUE_LOOP, loop_in_a_table}, {ORC_QUEUE_JUMP, a_jump},
		{ORC_QUEUE_JUMP, a_step_back},
	};

	for (unsigned i = 0; i < sizeof breach / sizeof *breach; i++) {
		struct pair p;
		struct vring_used_elem e;

		begin(&p, SIZE, false, true);
		breach[i].make(&p);
		CHECK(!orc_queue_take(&p.q, &p.c));
		CHECK(p.q.error == breach[i].error, "%u: %s instead of %s", i, orc_queue_error_name(p.q.error),
		      orc_queue_error_name(breach[i].error));
		CHECK(strlen(orc_queue_error_name(p.q.error)) > 5 && !p.q.in_flight);
		describe(&p.d, 0, DATA, 4, 0, 0); /* all is well again, but it is too late */
		offer(&p.d, 0);
		CHECK(!orc_queue_take(&p.q, &p.c) && !orc_queue_listen(&p.q) && !orc_queue_wants_interrupt(&p.q));
		CHECK(p.q.error == breach[i].error && !reap(&p.d, &e));
		end(&p);
	}
	CHECK(!strcmp(orc_queue_error_name(ORC_QUEUE_ERRORS), "an unknown error"));
}

static void a_chain_in_flight_is_not_taken_again_and_no_more_are_than_the_ring_has(void)
{
	struct pair p;
	struct orc_chain c[SIZE];

	begin(&p, SIZE, false, false);
	for (uint16_t i = 0; i < SIZE; i++) {
		describe(&p.d, i, DATA, 4, W, 0);
		offer(&p.d, i);
		CHECK(orc_queue_take(&p.q, &c[i]));
	}
	orc_queue_put(&p.q, &c[2], 0);
	offer(&p.d, 2); /* which may be used again, as it was used */
	CHECK(orc_queue_take(&p.q, &c[2]));
	orc_queue_put(&p.q, &c[2], 0);
	offer(&p.d, 3);
	CHECK(!orc_queue_take(&p.q, &p.c) && p.q.error == ORC_QUEUE_HEAD_IN_USE && p.q.in_flight == SIZE - 1);
	for (unsigned i = 0; i < SIZE; i++)
		if (i != 2)
			orc_queue_put(&p.q, &c[i], 4);
	CHECK(!p.q.in_flight && p.d.used->idx == 2, "those in flight end, and the guest is not told");
	end(&p);

	begin(&p, SIZE, false, false);
	for (uint16_t i = 0; i < SIZE; i++) {
		describe(&p.d, i, DATA, 4, W, 0);
		offer(&p.d, i);
		CHECK(orc_queue_take(&p.q, &c[i]));
	}
	offer(&p.d, 0);
	CHECK(!orc_queue_take(&p.q, &p.c) && p.q.error == ORC_QUEUE_JUMP);
	end(&p);
}

static void a_request_that_the_device_refuses_ends_the_queue_with_nothing_in_flight(void)
{
	struct pair p;

	begin(&p, SIZE, false, false);
	describe(&p.d, 0, DATA, 4, 0, 0);
	offer(&p.d, 0);
	CHECK(orc_queue_take(&p.q, &p.c));
	orc_queue_refuse(&p.q, &p.c);
	CHECK(p.q.error == ORC_QUEUE_BAD_REQUEST && !p.q.in_flight && !p.d.used->idx);
	end(&p);
}

/* ---- indices and notifications ---------------------------------------------------------------------------------- */

/* One request after the other, more than the indices count to. */
static void serve_many(bool event_idx, uint16_t size)
{
	struct pair p;
	struct vring_used_elem e;

	begin(&p, size, event_idx, false);
	for (uint16_t i = 0; i < size; i++)
		describe(&p.d, i, DATA + i, 1, W, 0);
	for (uint32_t i = 0; i < 2 * 65536 + 5; i++) {
		uint16_t head = i % size;
		bool wanted = i % 3 == 0;

		if (event_idx)
			*driver_used_event(&p.d) = (uint16_t)(wanted ? i : i + 1);
		else
			p.d.avail->flags = wanted ? 0 : VRING_AVAIL_F_NO_INTERRUPT;
		CHECK(!orc_queue_listen(&p.q));
		offer(&p.d, head);
		CHECK(must_notify(&p.d));
		orc_queue_silence(&p.q);
		CHECK(orc_queue_take(&p.q, &p.c) && p.c.head == head && !orc_queue_take(&p.q, &p.c), "%u", i);
		CHECK(!orc_queue_wants_interrupt(&p.q));
		orc_queue_put(&p.q, &p.c, 1);
		CHECK(orc_queue_wants_interrupt(&p.q) == wanted && !orc_queue_wants_interrupt(&p.q), "%u", i);
		CHECK(reap(&p.d, &e) && e.id == head);
	}
	end(&p);
}

static void indices_wrap_and_notifications_with_them(void)
{
	serve_many(false, 1);
	serve_many(true, 1);
	serve_many(false, 8);
	serve_many(true, 256);
}

static void an_interrupt_is_wanted_if_the_event_is_among_what_was_put(void)
{
	struct pair p;
	uint64_t seed = 3;

	begin(&p, 256, true, false);
	for (int round = 0; round < 20000; round++) {
		uint16_t before = (uint16_t)random_number(&seed), n = random_number(&seed) % 256, event;
		bool among = false;

		event = (uint16_t)(before + random_number(&seed) % 520 - 260);
		for (uint16_t i = 0; i < n; i++)
			among = among || (uint16_t)(before + i) == event;
		p.q.signalled = before;
		p.q.next_used = before + n;
		*driver_used_event(&p.d) = event;
		CHECK(orc_queue_wants_interrupt(&p.q) == among, "%u, %u more, %u", before, n, event);
	}
	end(&p);
}

static void what_comes_before_the_driver_sees_that_we_listen_is_seen(void)
{
	for (int event_idx = 0; event_idx < 2; event_idx++) {
		struct pair p;

		begin(&p, SIZE, event_idx, false);
		describe(&p.d, 0, DATA, 1, W, 0);
		orc_queue_silence(&p.q);
		if (event_idx)
			*driver_avail_event(&p.d) = 100; /* as it was left some time ago */
		CHECK(!orc_queue_take(&p.q, &p.c));
		offer(&p.d, 0);
		CHECK(!must_notify(&p.d));
		CHECK(orc_queue_listen(&p.q));
		CHECK(orc_queue_take(&p.q, &p.c));
		orc_queue_put(&p.q, &p.c, 1);
		CHECK(!orc_queue_listen(&p.q));
		offer(&p.d, 0);
		CHECK(must_notify(&p.d));
		end(&p);
	}
}

static struct pair race;
static _Atomic bool driver_sleeps, device_sleeps; /* and are to be woken */
enum { REQUESTS = 20000 };

/* Each wakes the other as virtio says, and no more. A lost notification hangs both, which PATIENCE ends. */
static void sleep_until_woken(_Atomic bool *asleep)
{
	orc_ns deadline = orc_now() + PATIENCE;

	while (atomic_load(asleep)) {
		CHECK(orc_now() < deadline, "a notification was lost");
		sched_yield();
	}
}

static void *play_device(void *unused)
{
	struct pair *p = &race;

	for (int served = 0; served < REQUESTS;) {
		orc_queue_silence(&p->q);
		while (orc_queue_take(&p->q, &p->c)) {
			CHECK(orc_chain_write(&p->c, 0, "x", 1) == 1);
			orc_queue_put(&p->q, &p->c, 1);
			served++;
		}
		CHECK(!p->q.error);
		if (orc_queue_wants_interrupt(&p->q))
			atomic_store(&driver_sleeps, false);
		atomic_store(&device_sleeps, true);
		if (orc_queue_listen(&p->q) || served == REQUESTS)
			atomic_store(&device_sleeps, false);
		sleep_until_woken(&device_sleeps);
	}
	return unused;
}

static void play_driver(struct pair *p)
{
	struct vring_used_elem e;
	int offered = 0, done = 0;

	while (done < REQUESTS) {
		while (offered < REQUESTS && offered - done < p->d.size) {
			offer(&p->d, (uint16_t)(offered++ % p->d.size)); /* used in order, so that one is free */
			if (must_notify(&p->d))
				atomic_store(&device_sleeps, false);
		}
		while (reap(&p->d, &e)) {
			CHECK(e.id == (unsigned)done % p->d.size);
			done++;
		}
		if (offered < REQUESTS && offered - done < p->d.size)
			continue; /* it has more to offer */
		if (done == REQUESTS)
			break;
		/* Asks for an interrupt, and looks once more: 2.7.14. */
		atomic_store(&driver_sleeps, true);
		ask_for_interrupt(&p->d);
		if (__atomic_load_n(&p->d.used->idx, __ATOMIC_SEQ_CST) == p->d.seen)
			sleep_until_woken(&driver_sleeps);
		if (!p->d.event_idx)
			__atomic_store_n(&p->d.avail->flags, VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_SEQ_CST);
	}
}

static void a_driver_and_a_device_on_two_threads_lose_no_notification(void)
{
	for (int event_idx = 0; event_idx < 2; event_idx++) {
		pthread_t thread;

		begin(&race, 4, event_idx, false);
		for (uint16_t i = 0; i < 4; i++)
			describe(&race.d, i, DATA + i, 1, W, 0);
		atomic_store(&driver_sleeps, false);
		atomic_store(&device_sleeps, false);
		thread = start(play_device, NULL);
		play_driver(&race);
		atomic_store(&device_sleeps, false);
		join(thread);
		end(&race);
	}
}

/* ---- the dirty log ---------------------------------------------------------------------------------------------- */

static void what_a_device_writes_is_in_the_dirty_log(void)
{
	struct kvm_userspace_memory_region slot = {.guest_phys_addr = LOW, .memory_size = LOW_SIZE};
	uint64_t bitmap[1] = {0};
	size_t first = 0;
	struct orc_dirty_reader reader = {.bitmap = bitmap};
	orc_dirty log = {.slot = &slot, .slots = 1, .first = &first, .readers = &reader, .read = true};
	struct pair p;

	pthread_mutex_init(&log.lock, NULL);
	begin(&p, SIZE, true, false);
	p.g.memory->dirty = &log;
	describe(&p.d, 0, DATA + 0x1fff, 2, W, 0);
	offer(&p.d, 0);
	CHECK(orc_queue_take(&p.q, &p.c) && !bitmap[0], "reading marks nothing");
	orc_queue_put(&p.q, &p.c, 2);
	/* Two pages of the buffer, and that of the used ring. */
	CHECK(bitmap[0] == (1ull << ((DATA - LOW) / PAGE + 1) | 1ull << ((DATA - LOW) / PAGE + 2) | 1), "%llx",
	      (unsigned long long)bitmap[0]);
	bitmap[0] = 0;
	orc_queue_listen(&p.q);
	CHECK(bitmap[0] == 1);
	pthread_mutex_destroy(&log.lock);
	end(&p);
}

const struct test virtqueue_tests[] = {
	TEST(regions_that_overlap_are_refused_and_those_that_go_on_in_each_other_are_one),
	TEST(memory_is_mapped_in_pieces_up_to_its_last_byte_and_not_beyond),
	TEST(a_queue_with_bad_rings_is_refused_by_name_and_one_up_to_the_end_of_memory_is_not),
	TEST(a_chain_is_what_is_to_be_read_and_then_what_is_to_be_written),
	TEST(chains_are_put_in_any_order),
	TEST(an_indirect_table_ends_a_chain_and_may_lie_anywhere_and_be_longer_than_the_ring),
	TEST(whatever_a_guest_breaks_has_a_name_and_ends_the_queue),
	TEST(a_chain_in_flight_is_not_taken_again_and_no_more_are_than_the_ring_has),
	TEST(a_request_that_the_device_refuses_ends_the_queue_with_nothing_in_flight),
	TEST(indices_wrap_and_notifications_with_them),
	TEST(an_interrupt_is_wanted_if_the_event_is_among_what_was_put),
	TEST(what_comes_before_the_driver_sees_that_we_listen_is_seen),
	TEST(a_driver_and_a_device_on_two_threads_lose_no_notification),
	TEST(what_a_device_writes_is_in_the_dirty_log),
	{0},
};
