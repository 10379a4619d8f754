#include <sched.h>
#include <string.h>

#include "check.h"

/* ---- tables --------------------------------------------------------------------------------------------------- */

static struct orc_claim claim_of(orc_u64 start, orc_u64 last, orc_u64 version, orc_device *device)
{
	return (struct orc_claim){.start = start, .last = last, .version = version, .device = device};
}

static void claims_are_found_at_their_addresses_and_nowhere_else(void)
{
	const struct orc_claim claims[] = {claim_of(0, 0, 1, NULL), claim_of(4, 7, 2, NULL), claim_of(8, 8, 3, NULL),
					   claim_of(UINT64_MAX - 1, UINT64_MAX, 4, NULL)};
	const orc_u64 expected[] = {1, 0, 0, 0, 2, 2, 2, 2, 3, 0, 0};
	orc_bus *b = orc_bus_new();

	CHECK(!orc_bus_find(b, 0) && !orc_bus_find(b, UINT64_MAX));
	CHECK(!orc_bus_replace(b, claims, 4));
	for (orc_u64 address = 0; address < sizeof expected / sizeof *expected; address++)
		CHECK(orc_bus_find(b, address) == expected[address], "%llu", (unsigned long long)address);
	CHECK(!orc_bus_find(b, UINT64_MAX - 2));
	CHECK(orc_bus_find(b, UINT64_MAX - 1) == 4 && orc_bus_find(b, UINT64_MAX) == 4);
	orc_bus_free(b);
}

static void claims_that_overlap_or_are_out_of_order_change_nothing(void)
{
	const struct orc_claim good = claim_of(4, 7, 9, NULL);
	const struct orc_claim bad[][2] = {
		{claim_of(0, 4, 1, NULL), claim_of(4, 5, 2, NULL)},
		{claim_of(8, 9, 1, NULL), claim_of(0, 1, 2, NULL)},
		{claim_of(0, 1, 1, NULL), claim_of(5, 4, 2, NULL)},
		{claim_of(0, 1, 0, NULL), claim_of(4, 5, 2, NULL)},
	};
	orc_bus *b = orc_bus_new();

	CHECK(!orc_bus_replace(b, &good, 1));
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK(orc_bus_replace(b, bad[i], 2) < 0, "%zu", i);
	CHECK(orc_bus_find(b, 4) == 9 && !orc_bus_find(b, 0));
	orc_bus_free(b);
}

/* ---- accesses ------------------------------------------------------------------------------------------------- */

/* A device that answers a read with 0x5a, and counts. A write it leaves to Python, if it is told to. */
struct counter {
	orc_device device;
	_Atomic int within, calls, elements;
	_Atomic bool gone, leaves_writes;
};

static bool answer_counter(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	struct counter *c = (struct counter *)d;

	(void)by;
	CHECK(!atomic_load(&c->gone), "a device that was taken off the bus is called");
	if (a->write && atomic_load(&c->leaves_writes))
		return false;
	atomic_fetch_add(&c->within, 1);
	atomic_fetch_add(&c->calls, 1);
	atomic_fetch_add(&c->elements, (int)a->count);
	if (!a->write)
		memset(a->data, 0x5a, (size_t)a->size * a->count);
	atomic_fetch_sub(&c->within, 1);
	return true;
}

struct rig {
	orc_fleet *fleet;
	orc_vcpu *v;
	orc_bus *ports, *mmio;
};

static void rig_new(struct rig *r)
{
	r->fleet = orc_fleet_new();
	r->v = orc_vcpu_new(r->fleet, 1, 64);
	r->ports = orc_bus_new();
	r->mmio = orc_bus_new();
	orc_vcpu_set_buses(r->v, r->ports, r->mmio);
}

static void rig_free(struct rig *r)
{
	orc_vcpu_free(r->v);
	orc_bus_free(r->ports);
	orc_bus_free(r->mmio);
	orc_fleet_free(r->fleet);
}

static orc_u64 unclaimed(const orc_vcpu *v)
{
	struct orc_counters out;

	orc_vcpu_counters(v, &out, 1);
	return out.unclaimed;
}

static void what_nobody_claims_reads_as_ones_and_is_counted_once_for_each_access(void)
{
	uint8_t data[4096] = {0};
	struct rig r;

	rig_new(&r);
	CHECK(orc_access_begin(r.v, ORC_IO, 0x80, 4, 1024, false, data) == ORC_ANSWERED);
	CHECK(data[0] == 0xff && data[4095] == 0xff && unclaimed(r.v) == 1);
	CHECK(orc_access_begin(r.v, ORC_MMIO, 0xd0000000, 8, 1, true, data) == ORC_ANSWERED && unclaimed(r.v) == 2);
	rig_free(&r);
}

static void a_vcpu_on_no_bus_finds_nobody(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 1, 64);
	uint8_t data = 0;

	CHECK(orc_access_begin(v, ORC_IO, 0x80, 1, 1, false, &data) == ORC_ANSWERED && data == 0xff);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void a_string_for_a_device_of_ours_is_one_call(void)
{
	struct counter c = {.device = {answer_counter, NULL}};
	const struct orc_claim claim = claim_of(0x500, 0x503, 1, &c.device);
	uint8_t data[1024] = {0};
	struct rig r;

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	CHECK(orc_access_begin(r.v, ORC_IO, 0x500, 1, 1024, false, data) == ORC_ANSWERED);
	CHECK(c.calls == 1 && c.elements == 1024 && data[1023] == 0x5a && !unclaimed(r.v));
	/* and one that hangs over its end is a call for each element */
	CHECK(orc_access_begin(r.v, ORC_IO, 0x503, 2, 3, false, data) == ORC_ANSWERED);
	CHECK(c.calls == 4 && !memcmp(data, "\x5a\xff\x5a\xff\x5a\xff\x5a", 7) && unclaimed(r.v) == 1);
	CHECK(orc_access_begin(r.v, ORC_MMIO, 0x500, 2, 1, false, data) == ORC_ANSWERED && data[0] == 0xff);
	rig_free(&r);
}

static void a_string_for_python_goes_up_in_chunks_and_a_stop_comes_between_them(void)
{
	const struct orc_claim claim = claim_of(0x500, 0x500, 7, NULL);
	uint8_t data[200];
	struct rig r;
	struct orc_access *a;

	rig_new(&r);
	a = orc_vcpu_access(r.v);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	CHECK(orc_access_begin(r.v, ORC_IO, 0x500, 1, 200, false, data) == ORC_IO);
	CHECK(a->count == ORC_CHUNK && a->claim == 7 && a->data == data && a->offset == 0);
	memset(a->data, 1, a->count);
	orc_vcpu_command(r.v, ORC_PAUSE | ORC_CALL | ORC_CAP, 0);
	CHECK(orc_access_resume(r.v) == ORC_IO, "these come when all of it is answered");
	CHECK(a->data == data + ORC_CHUNK && a->count == ORC_CHUNK);
	memset(a->data, 2, a->count);
	orc_vcpu_command(r.v, ORC_STOP, 0);
	CHECK(orc_access_resume(r.v) == ORC_ANSWERED, "nobody is asked any more");
	CHECK(!r.v->io.open);
	CHECK(data[ORC_CHUNK - 1] == 1 && data[ORC_CHUNK] == 2 && data[2 * ORC_CHUNK - 1] == 2);
	CHECK(data[2 * ORC_CHUNK] == 0xff && data[199] == 0xff);
	rig_free(&r);
}

static void a_string_for_python_waits_for_its_turn_between_chunks_unless_it_is_commanded(void)
{
	const struct orc_claim claim = claim_of(0x500, 0x500, 7, NULL);
	struct orc_record record = {.reason = KVM_EXIT_IO};
	orc_bucket *b = orc_bucket_new();
	uint8_t data[200];
	struct rig r;
	orc_ns before = orc_now();

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	orc_bucket_set(b, 100, 1, -1, before);
	orc_vcpu_set_bucket(r.v, ORC_EXITS, 0, b);
	orc_vcpu_account(r.v, &record, before); /* its turn is in 10 ms */
	CHECK(orc_access_begin(r.v, ORC_IO, 0x500, 1, 200, false, data) == ORC_IO);
	orc_vcpu_command(r.v, ORC_PAUSE, 0);
	CHECK(orc_access_resume(r.v) == ORC_IO && r.v->waiting);
	orc_vcpu_command(r.v, 0, ORC_PAUSE);
	CHECK(orc_access_resume(r.v) == ORC_IO && !r.v->waiting && orc_now() - before >= 10000000);
	rig_free(&r);
	orc_bucket_free(b);
}

static void an_answer_completes_the_access_also_when_a_command_came_meanwhile(void)
{
	const struct orc_claim claim = claim_of(0x500, 0x500, 7, NULL);
	uint8_t data[2];
	struct rig r;

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	CHECK(orc_access_begin(r.v, ORC_IO, 0x500, 2, 1, false, data) == ORC_IO);
	data[0] = 1;
	orc_vcpu_command(r.v, ORC_PAUSE, 0);
	CHECK(orc_access_resume(r.v) == ORC_ANSWERED && data[0] == 1 && data[1] == 0xff);
	rig_free(&r);
}

static void what_a_device_of_ours_does_not_answer_goes_up(void)
{
	struct counter c = {.device = {answer_counter, NULL}, .leaves_writes = true};
	const struct orc_claim claim = claim_of(0xf4, 0xf7, 3, &c.device);
	uint8_t data[4] = {0};
	struct rig r;

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	CHECK(orc_access_begin(r.v, ORC_IO, 0xf4, 4, 1, false, data) == ORC_ANSWERED && c.calls == 1);
	CHECK(orc_access_begin(r.v, ORC_IO, 0xf5, 1, 1, true, data) == ORC_IO);
	CHECK(orc_vcpu_access(r.v)->offset == 1 && orc_vcpu_access(r.v)->claim == 3 && c.calls == 1);
	CHECK(!orc_access_next(r.v));
	rig_free(&r);
}

/* ---- many threads --------------------------------------------------------------------------------------------- */

enum { READERS = 3, CHANGES = 3000 };

struct storm {
	orc_vcpu *v;
	_Atomic bool *end;
};

static void *keep_reading(void *argument)
{
	struct storm *s = argument;
	uint8_t data[16];

	while (!atomic_load(s->end)) {
		memset(data, 0, sizeof data);
		/* 0x100 to 0x107 is claimed, or 0x104 to 0x10b. */
		CHECK(orc_access_begin(s->v, ORC_IO, 0x104, 4, 4, false, data) == ORC_ANSWERED);
		for (int i = 1; i < 16; i++)
			CHECK(data[i] == data[0]);
		CHECK(data[0] == 0x5a, "it is claimed at each moment: a move is one change");
	}
	return NULL;
}

static void a_claim_that_moves_answers_at_each_moment_and_a_device_that_goes_is_called_no_more(void)
{
	struct counter old = {.device = {answer_counter, NULL}}, *now = &old;
	struct orc_claim claim = claim_of(0x100, 0x107, 1, &old.device);
	struct counter *devices = calloc(CHANGES, sizeof *devices);
	_Atomic bool end = false;
	pthread_t threads[READERS];
	struct storm storms[READERS];
	struct rig r;

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	for (int i = 0; i < READERS; i++) {
		orc_vcpu *v = orc_vcpu_new(r.fleet, (uint32_t)(10 + i), 64);

		orc_vcpu_set_buses(v, r.ports, r.mmio);
		storms[i] = (struct storm){v, &end};
		threads[i] = start(keep_reading, &storms[i]);
	}
	for (int i = 0; i < CHANGES; i++) {
		devices[i].device = (orc_device){answer_counter, NULL};
		claim = claim_of(i & 1 ? 0x100 : 0x104, i & 1 ? 0x107 : 0x10b, (orc_u64)i + 2, &devices[i].device);
		CHECK(!orc_bus_replace(r.ports, &claim, 1));
		/* The one before is ours again: nobody is in it, or comes. */
		CHECK(!atomic_load(&now->within));
		atomic_store(&now->gone, true);
		now = &devices[i];
		CHECK(orc_bus_tables(r.ports) <= READERS + 2, "%zu", orc_bus_tables(r.ports));
		if (!(i % 64))
			sched_yield();
	}
	atomic_store(&end, true);
	for (int i = 0; i < READERS; i++) {
		join(threads[i]);
		orc_vcpu_free(storms[i].v);
	}
	CHECK(orc_bus_tables(r.ports) == 1);
	rig_free(&r);
	free(devices);
}

/* A device that stays until the claims have changed without it, or for so many turns of the CPU. */
struct slow {
	orc_device device;
	_Atomic bool entered, left, *changed;
};

static bool answer_slowly(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	struct slow *s = (struct slow *)d;

	(void)by, (void)a;
	atomic_store(&s->entered, true);
	for (int turns = 0; turns < 2000 && !atomic_load(s->changed); turns++)
		sched_yield();
	atomic_store(&s->left, true);
	return true;
}

static void *access_once(void *v)
{
	uint8_t data = 0;

	CHECK(orc_access_begin(v, ORC_IO, 0x100, 1, 1, false, &data) == ORC_ANSWERED);
	return NULL;
}

static void a_device_that_goes_is_waited_for_also_if_other_claims_have_changed_meanwhile(void)
{
	_Atomic bool changed = false;
	struct slow slow = {.device = {answer_slowly, NULL}, .changed = &changed};
	struct counter other = {.device = {answer_counter, NULL}};
	const struct orc_claim claims[] = {claim_of(0x100, 0x100, 1, &slow.device), claim_of(0x200, 0x200, 2, &other.device)};
	pthread_t thread;
	struct rig r;

	rig_new(&r);
	CHECK(!orc_bus_replace(r.ports, claims, 1));
	thread = start(access_once, r.v);
	while (!atomic_load(&slow.entered))
		sched_yield();
	CHECK(!orc_bus_replace(r.ports, claims, 2)); /* waits for nobody: all devices stay */
	CHECK(!atomic_load(&slow.left));
	CHECK(!orc_bus_replace(r.ports, claims + 1, 1));
	atomic_store(&changed, true);
	CHECK(atomic_load(&slow.left), "it may be freed now, and a vCPU is in it");
	join(thread);
	rig_free(&r);
}

/* ---- consoles and interrupt lines ----------------------------------------------------------------------------- */

static void a_console_keeps_the_end_of_any_output_and_counts_all_of_it(void)
{
	static uint8_t written[5 * ORC_CONSOLE_KEPT], kept[ORC_CONSOLE_KEPT];
	uint64_t seed = 42;

	for (int round = 0; round < 50; round++) {
		orc_console *c = orc_console_new();
		orc_u64 position = 0;
		size_t total = 0;

		while (total < 3 * ORC_CONSOLE_KEPT) {
			size_t n = random_number(&seed) % (round % 2 ? 300 : 2 * ORC_CONSOLE_KEPT), from = total;

			for (size_t i = 0; i < n; i++)
				written[total++] = (uint8_t)(random_number(&seed) >> 56);
			CHECK(!orc_console_put(c, written + from, n));
		}
		CHECK(orc_console_total(c) == total);
		CHECK(orc_console_copy(c, &position, kept, sizeof kept) == ORC_CONSOLE_KEPT && position == total);
		CHECK(!memcmp(kept, written + total - ORC_CONSOLE_KEPT, ORC_CONSOLE_KEPT));
		position = total - 10;
		CHECK(orc_console_copy(c, &position, kept, 4) == 4 && position == total - 6);
		CHECK(!memcmp(kept, written + total - 10, 4));
		orc_console_free(c);
	}
}

static uint8_t byte_at(orc_u64 position)
{
	return (uint8_t)(position * 0x9e3779b97f4a7c15u >> 56);
}

static _Atomic bool written_all;

static void *write_long_and_short(void *of)
{
	static uint8_t bytes[2 * ORC_CONSOLE_KEPT];
	uint64_t seed = 3;
	orc_u64 total = 0;

	for (int i = 0; i < 3000; i++) {
		size_t n = random_number(&seed) % (i % 50 ? 700 : sizeof bytes);

		for (size_t j = 0; j < n; j++)
			bytes[j] = byte_at(total + j);
		orc_console_put(of, bytes, n);
		total += n;
	}
	atomic_store(&written_all, true);
	return NULL;
}

static void what_is_read_beside_a_writer_is_what_was_written_there(void)
{
	static uint8_t out[ORC_CONSOLE_KEPT];
	orc_console *c = orc_console_new();
	orc_u64 follows = 0;
	bool over = false;
	pthread_t writer;

	atomic_store(&written_all, false);
	writer = start(write_long_and_short, c);
	while (!over) {
		orc_u64 start = 0, *position[] = {&follows, &start};

		over = atomic_load(&written_all);
		for (int i = 0; i < 2; i++) {
			orc_u64 from = *position[i];
			size_t n = orc_console_copy(c, position[i], out, sizeof out);

			CHECK(*position[i] >= from && *position[i] >= n && *position[i] <= orc_console_total(c));
			for (size_t j = 0; j < n; j++)
				CHECK(out[j] == byte_at(*position[i] - n + j));
		}
	}
	CHECK(follows == orc_console_total(c));
	join(writer);
	orc_console_free(c);
}

static void output_is_announced_once_for_each_time_that_somebody_waits(void)
{
	orc_console *c = orc_console_new();
	struct rig r;
	orc_device *port;
	struct orc_claim claim;
	uint32_t ids[4];
	uint8_t text[4] = "text";

	rig_new(&r);
	port = orc_debug_console_new(c, 0xe9);
	claim = claim_of(0xe9, 0xe9, 1, port);
	CHECK(!orc_bus_replace(r.ports, &claim, 1));
	CHECK(orc_fleet_sleep(r.fleet));
	CHECK(orc_access_begin(r.v, ORC_IO, 0xe9, 1, 4, true, text) == ORC_ANSWERED);
	CHECK(!orc_fleet_talking(r.fleet, ids, 4), "nobody waits");
	CHECK(!orc_console_want(c, 0), "there is some");
	CHECK(orc_console_want(c, 4));
	for (int i = 0; i < 3; i++)
		CHECK(orc_access_begin(r.v, ORC_IO, 0xe9, 1, 4, true, text) == ORC_ANSWERED);
	CHECK(!orc_fleet_sleep(r.fleet), "there is something to look at first");
	CHECK(orc_fleet_talking(r.fleet, ids, 4) == 1 && ids[0] == 1);
	CHECK(!orc_fleet_talking(r.fleet, ids, 4));
	CHECK(orc_fleet_sleep(r.fleet));
	/* A vCPU that goes while it has something to say takes it with it. */
	CHECK(orc_console_want(c, 16));
	CHECK(orc_access_begin(r.v, ORC_IO, 0xe9, 1, 1, true, text) == ORC_ANSWERED);
	orc_vcpu_free(r.v);
	CHECK(!orc_fleet_talking(r.fleet, ids, 4));
	orc_bus_free(r.ports);
	orc_bus_free(r.mmio);
	orc_fleet_free(r.fleet);
	orc_device_free(port);
	orc_console_free(c);
}

static void *set_lines(void *argument)
{
	for (int i = 0; i < 1000; i++)
		orc_interrupts_set(argument, 4, i & 1);
	return NULL;
}

static void interrupt_lines_may_be_set_while_they_are_closed(void)
{
	orc_interrupts *lines = orc_interrupts_new(1 << 20); /* no such descriptor */
	pthread_t thread;

	CHECK(orc_interrupts_set(lines, 4, true) < 0);
	thread = start(set_lines, lines);
	orc_interrupts_close(lines);
	CHECK(!orc_interrupts_set(lines, 4, true), "from now on nothing is done");
	join(thread);
	orc_interrupts_free(lines);
}

const struct test bus_tests[] = {
	TEST(claims_are_found_at_their_addresses_and_nowhere_else),
	TEST(claims_that_overlap_or_are_out_of_order_change_nothing),
	TEST(what_nobody_claims_reads_as_ones_and_is_counted_once_for_each_access),
	TEST(a_vcpu_on_no_bus_finds_nobody),
	TEST(a_string_for_a_device_of_ours_is_one_call),
	TEST(a_string_for_python_goes_up_in_chunks_and_a_stop_comes_between_them),
	TEST(a_string_for_python_waits_for_its_turn_between_chunks_unless_it_is_commanded),
	TEST(an_answer_completes_the_access_also_when_a_command_came_meanwhile),
	TEST(what_a_device_of_ours_does_not_answer_goes_up),
	TEST(a_claim_that_moves_answers_at_each_moment_and_a_device_that_goes_is_called_no_more),
	TEST(a_device_that_goes_is_waited_for_also_if_other_claims_have_changed_meanwhile),
	TEST(a_console_keeps_the_end_of_any_output_and_counts_all_of_it),
	TEST(what_is_read_beside_a_writer_is_what_was_written_there),
	TEST(output_is_announced_once_for_each_time_that_somebody_waits),
	TEST(interrupt_lines_may_be_set_while_they_are_closed),
	{0},
};
