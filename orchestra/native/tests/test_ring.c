#include <poll.h>
#include <sched.h>

#include "check.h"

enum { PORT_IO = KVM_EXIT_IO };

/* A vCPU with a ring, as it has one once somebody listens. */
static orc_vcpu *listened_to(orc_fleet *f, uint32_t id, uint32_t records)
{
	orc_vcpu *v = orc_vcpu_new(f, id, records);

	CHECK(orc_vcpu_subscribe(v, 1ull << 63) == 0);
	return v;
}

static void put(orc_vcpu *v, uint64_t number)
{
	struct orc_record record = {.id = v->id, .arg = {number}};

	orc_ring_put(v, &record);
}

static size_t look(orc_fleet *f, uint32_t *out, size_t most)
{
	orc_fleet_look(f);
	return orc_fleet_active(f, out, most);
}

static orc_u64 missed(const orc_vcpu *v)
{
	struct orc_counters counters;

	orc_vcpu_counters(v, &counters, 0);
	return counters.missed;
}

static void records_come_out_in_order_over_many_turns_of_the_ring(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 9, 8);
	struct orc_record out[16];
	uint64_t in = 0, read = 0;

	v->ring.head = v->ring.tail = UINT32_MAX - 20; /* the indices themselves wrap as well */
	for (int round = 0; round < 50; round++) {
		int n = 1 + round % 8;

		for (int i = 0; i < n; i++)
			put(v, in++);
		CHECK(orc_fleet_drain(f, out, 16) == (size_t)n);
		for (int i = 0; i < n; i++)
			CHECK(out[i].arg[0] == read++ && out[i].id == 9);
	}
	CHECK(!missed(v));
	CHECK(!orc_fleet_drain(f, out, 16));
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void a_full_ring_counts_what_it_misses_and_keeps_what_it_has(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 0, 8);
	struct orc_record out[16];

	for (int i = 0; i < 13; i++)
		put(v, (uint64_t)i);
	CHECK(missed(v) == 5);
	CHECK(orc_fleet_drain(f, out, 16) == 8);
	for (int i = 0; i < 8; i++)
		CHECK(out[i].arg[0] == (uint64_t)i);
	put(v, 77);
	CHECK(orc_fleet_drain(f, out, 16) == 1 && out[0].arg[0] == 77);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void draining_a_few_at_a_time_gets_all_and_starves_nobody(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[3];
	struct orc_record out[2];
	int seen[3] = {0}, n = 0, first_round = 0;

	for (uint32_t i = 0; i < 3; i++) {
		v[i] = listened_to(f, i, 16);
		for (int k = 0; k < 10; k++)
			put(v[i], (uint64_t)k);
	}
	for (size_t got; (got = orc_fleet_drain(f, out, 2)); n++) {
		CHECK(!orc_fleet_sleep(f) || n == 14);
		for (size_t i = 0; i < got; i++)
			CHECK(out[i].arg[0] == (uint64_t)seen[out[i].id]++);
		if (n < 3)
			first_round |= 1 << out[0].id;
	}
	CHECK(first_round == 7, "a vCPU with many records kept the others waiting");
	for (int i = 0; i < 3; i++) {
		CHECK(seen[i] == 10);
		orc_vcpu_free(v[i]);
	}
	orc_fleet_free(f);
}

static void the_consumer_may_sleep_only_if_nothing_is_there(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 0, 8);
	struct pollfd fd = {.fd = orc_fleet_eventfd(f), .events = POLLIN};
	struct orc_record out[8];

	CHECK(orc_fleet_sleep(f));
	CHECK(poll(&fd, 1, 0) == 0);
	put(v, 1);
	CHECK(poll(&fd, 1, 0) == 1);
	put(v, 2); /* no write for this one: the consumer is on its way */
	CHECK(!orc_fleet_sleep(f));
	CHECK(poll(&fd, 1, 0) == 0);
	CHECK(orc_fleet_drain(f, out, 8) == 2);
	CHECK(orc_fleet_sleep(f));
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void a_vcpu_freed_while_it_is_queued_takes_nothing_with_it(void)
{
	for (int dying = 0; dying < 4; dying++) {
		for (int before = 0; before < 3; before++) { /* so many records are drained before it dies */
			orc_fleet *f = orc_fleet_new();
			orc_vcpu *v[4];
			struct orc_record out[16], told = {.reason = PORT_IO};
			uint32_t ids[8];
			int drained = 0, active = 0;

			for (uint32_t i = 0; i < 4; i++) {
				v[i] = listened_to(f, i, 8);
				orc_vcpu_subscribe(v[i], 1ull << PORT_IO);
				orc_vcpu_account(v[i], &told, 1);
				orc_vcpu_account(v[i], &told, 2);
			}
			for (int i = 0; i < before; i++) {
				CHECK(orc_fleet_drain(f, out, 1) == 1);
				drained += out[0].id != (uint32_t)dying;
				CHECK(look(f, ids, 1) == 1);
				active += ids[0] != (uint32_t)dying;
			}
			orc_vcpu_free(v[dying]);
			for (size_t got; (got = orc_fleet_drain(f, out, 16));)
				for (size_t i = 0; i < got; i++, drained++)
					CHECK(out[i].id != (uint32_t)dying);
			for (size_t got; (got = look(f, ids, 8));)
				for (size_t i = 0; i < got; i++, active++)
					CHECK(ids[i] != (uint32_t)dying);
			CHECK(drained == 6 && active == 3, "%d %d", drained, active);
			for (int i = 0; i < 4; i++)
				if (i != dying)
					orc_vcpu_free(v[i]);
			orc_fleet_free(f);
		}
	}
}

static void one_vcpus_records_come_out_alone_and_in_order(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[3], *silent = orc_vcpu_new(f, 9, 8);
	struct orc_record out[16];

	CHECK(!orc_vcpu_drain(silent, out, 16), "nobody ever listened to it");
	for (uint32_t i = 0; i < 3; i++) {
		v[i] = listened_to(f, i, 8);
		for (int k = 0; k < 8; k++)
			put(v[i], (uint64_t)k);
	}
	CHECK(orc_fleet_drain(f, out, 3) == 3); /* of one of them, some are out already */
	for (uint32_t i = 0; i < 3; i++) {
		uint64_t next = out[0].id == i ? 3 : 0;
		struct orc_record mine[16];
		size_t n;

		while ((n = orc_vcpu_drain(v[i], mine, 2)))
			for (size_t k = 0; k < n; k++)
				CHECK(mine[k].id == i && mine[k].arg[0] == next++);
		CHECK(next == 8);
		orc_vcpu_free(v[i]);
	}
	CHECK(!orc_fleet_drain(f, out, 16));
	CHECK(orc_fleet_sleep(f));
	orc_vcpu_free(silent);
	orc_fleet_free(f);
}

static void freeing_one_does_not_touch_the_others_lists(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[100];
	struct orc_record told = {.reason = PORT_IO}, out[128];
	uint32_t ids[128];
	struct orc_link *ready, *active;

	for (uint32_t i = 0; i < 100; i++) {
		v[i] = listened_to(f, i, 8);
		orc_vcpu_subscribe(v[i], 1ull << PORT_IO);
		orc_vcpu_account(v[i], &told, 1);
	}
	ready = atomic_load(&f->ready.top), active = atomic_load(&f->active.top);
	for (int i = 0; i < 50; i++)
		orc_vcpu_free(v[i]);
	CHECK(atomic_load(&f->ready.top) == ready && atomic_load(&f->active.top) == active);
	CHECK(!f->draining && !f->activating);
	CHECK(orc_fleet_drain(f, out, 128) == 50 && look(f, ids, 128) == 50);
	CHECK(!f->dead, "their memory went with their last links");
	for (int i = 50; i < 100; i++)
		orc_vcpu_free(v[i]);
	orc_fleet_free(f);
}

static void the_dead_do_not_gather_where_nobody_looks(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[300], *passing;
	struct orc_record told = {.reason = PORT_IO}, out[512];
	uint32_t ids[512];

	for (uint32_t i = 0; i < 300; i++) {
		v[i] = listened_to(f, i, 8);
		orc_vcpu_subscribe(v[i], 1ull << PORT_IO);
		orc_vcpu_account(v[i], &told, 1);
	}
	for (uint32_t i = 300; i < 10000; i++) {
		passing = listened_to(f, i, 8);
		orc_vcpu_subscribe(passing, 1ull << PORT_IO);
		orc_vcpu_account(passing, &told, 1);
		orc_vcpu_free(passing);
		CHECK(f->dead <= 301);
	}
	CHECK(orc_fleet_drain(f, out, 512) == 300 && look(f, ids, 512) == 300);
	for (int i = 0; i < 300; i++)
		orc_vcpu_free(v[i]);
	orc_fleet_free(f);
}

static void a_look_ends_however_much_is_pushed_meanwhile(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[4];
	struct orc_record told = {.reason = PORT_IO};
	uint32_t id;
	int n = 0;

	for (uint32_t i = 0; i < 4; i++) {
		v[i] = listened_to(f, i, 8);
		orc_vcpu_account(v[i], &told, 1);
	}
	for (orc_fleet_look(f); orc_fleet_active(f, &id, 1); n++) {
		CHECK(n < 4, "those who push decide when it ends");
		orc_vcpu_account(v[id], &told, 1);
	}
	CHECK(n == 4);
	n = 0;
	for (orc_fleet_look(f); orc_fleet_active(f, &id, 1); n++)
		;
	CHECK(n == 4, "what came meanwhile is told the next time");
	for (int i = 0; i < 4; i++)
		orc_vcpu_free(v[i]);
	orc_fleet_free(f);
}

static void a_record_is_told_by_reason_or_for_its_bus_lock(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 0, 8);
	struct orc_record io = {.reason = PORT_IO}, hlt = {.reason = KVM_EXIT_HLT}, future = {.reason = 4711},
			  locked = {.reason = KVM_EXIT_MMIO, .flags = KVM_RUN_X86_BUS_LOCK},
			  unflagged = {.reason = KVM_EXIT_X86_BUS_LOCK}, out[8];
	struct orc_counters counters;

	orc_vcpu_subscribe(v, 1ull << PORT_IO | 1ull << ORC_EVENT_BUS_LOCK);
	orc_vcpu_account(v, &hlt, 1);
	orc_vcpu_account(v, &io, 2);
	orc_vcpu_account(v, &locked, 3);
	orc_vcpu_account(v, &unflagged, 4);
	orc_vcpu_account(v, &future, 5);
	CHECK(orc_fleet_drain(f, out, 8) == 2);
	CHECK(out[0].time == 2 && out[1].time == 3);
	orc_vcpu_counters(v, &counters, 5);
	CHECK(counters.bus_locks == 1, "counted by the flag and by nothing else");
	CHECK(counters.exits[KVM_EXIT_X86_BUS_LOCK] == 1 && counters.exits[KVM_EXIT_MMIO] == 1);
	CHECK(counters.exits[ORC_REASONS - 1] == 1, "a reason from the future has a counter");
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

/* ---- threads -------------------------------------------------------------------------------------------------- */

enum { RECORDS = 500000, END = RECORDS };

static void *producer(void *argument)
{
	orc_vcpu *v = argument;
	uint64_t seed = v->id + 1;

	for (uint64_t i = 0; i < RECORDS; i++) {
		put(v, i);
		if (random_number(&seed) % 512 == 0)
			sched_yield(); /* the consumer catches up and falls asleep */
	}
	for (orc_u64 before = missed(v); put(v, END), missed(v) != before; sched_yield()) /* this one must arrive */
		atomic_store(&v->missed, before);
	return NULL;
}

static void two_producers_and_a_sleeping_consumer_lose_no_wake_up_and_no_count(void)
{
	static struct orc_record out[256];
	orc_fleet *f = orc_fleet_new();
	struct pollfd fd = {.fd = orc_fleet_eventfd(f), .events = POLLIN};
	orc_vcpu *v[2];
	pthread_t threads[2];
	uint64_t next[2] = {0}, read[2] = {0}, sleeps = 0;
	int ended = 0;

	for (uint32_t i = 0; i < 2; i++)
		v[i] = listened_to(f, i, 1024);
	for (int i = 0; i < 2; i++)
		threads[i] = start(producer, v[i]);
	while (ended < 2) {
		size_t n = orc_fleet_drain(f, out, 256);

		for (size_t i = 0; i < n; i++) {
			uint32_t id = out[i].id;

			CHECK(out[i].arg[0] >= next[id]);
			next[id] = out[i].arg[0] + 1;
			if (out[i].arg[0] == END)
				ended++;
			else
				read[id]++;
		}
		if (!n && orc_fleet_sleep(f)) {
			CHECK(poll(&fd, 1, PATIENCE / 1000000) == 1, "a wake-up was lost");
			sleeps++;
		}
	}
	for (int i = 0; i < 2; i++) {
		join(threads[i]);
		CHECK(read[i] + missed(v[i]) == RECORDS, "%llu read, %llu missed", (unsigned long long)read[i],
		      (unsigned long long)missed(v[i]));
		orc_vcpu_free(v[i]);
	}
	CHECK(sleeps > 0);
	orc_fleet_free(f);
}

static _Atomic bool producing;

static void *accounting(void *argument)
{
	struct orc_record record = {.reason = PORT_IO};

	for (int i = 0; i < 300000; i++)
		orc_vcpu_account(argument, &record, i);
	atomic_store(&producing, false);
	return NULL;
}

static void whoever_asks_which_vcpus_were_active_sees_all_their_exits(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 5, 8);
	pthread_t thread;
	struct orc_sums sums;
	struct orc_more more[ORC_REASONS];
	orc_u64 seen[ORC_REASONS] = {0}, exits = 0;
	uint32_t id;
	bool again = true;

	atomic_store(&producing, true);
	thread = start(accounting, v);
	while (again) {
		again = atomic_load(&producing); /* one more look after the end */
		while (look(f, &id, 1)) {
			int n = orc_vcpu_look(v, &sums, seen, more, 0);

			CHECK(id == 5 && n <= 1);
			CHECK(!n || more[0].reason == PORT_IO);
			exits += n ? more[0].exits : 0;
		}
	}
	CHECK(exits == 300000, "%llu", (unsigned long long)exits);
	join(thread);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static _Atomic bool stopping;

static void *telling(void *argument)
{
	struct orc_record record = {.reason = PORT_IO};

	for (int i = 0; !atomic_load(&stopping); i++)
		orc_vcpu_account(argument, &record, i);
	return NULL;
}

static void vcpus_come_and_go_while_others_tell(void)
{
	static struct orc_record out[64];
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *steady = listened_to(f, 0, 64), *passing;
	struct orc_record record = {.reason = PORT_IO};
	struct orc_counters counters;
	pthread_t thread;
	uint64_t read = 0;
	uint32_t ids[4];

	atomic_store(&stopping, false);
	orc_vcpu_subscribe(steady, 1ull << PORT_IO);
	thread = start(telling, steady);
	for (uint32_t i = 1; i <= 20000; i++) {
		passing = listened_to(f, i, 8);
		orc_vcpu_subscribe(passing, 1ull << PORT_IO);
		orc_vcpu_account(passing, &record, 0);
		if (i % 3 == 0)
			for (size_t n = orc_fleet_drain(f, out, 1 + i % 64); n--;)
				read += out[n].id == 0;
		if (i % 5 == 0)
			look(f, ids, 1 + i % 4);
		orc_vcpu_free(passing);
	}
	atomic_store(&stopping, true);
	join(thread);
	for (size_t n; (n = orc_fleet_drain(f, out, 64));)
		for (; n--; read++)
			CHECK(out[n].id == 0);
	orc_vcpu_counters(steady, &counters, 0);
	CHECK(read + counters.missed == counters.exits[PORT_IO]);
	orc_vcpu_free(steady);
	orc_fleet_free(f);
}

const struct test ring_tests[] = {
	TEST(records_come_out_in_order_over_many_turns_of_the_ring),
	TEST(a_full_ring_counts_what_it_misses_and_keeps_what_it_has),
	TEST(draining_a_few_at_a_time_gets_all_and_starves_nobody),
	TEST(the_consumer_may_sleep_only_if_nothing_is_there),
	TEST(a_vcpu_freed_while_it_is_queued_takes_nothing_with_it),
	TEST(one_vcpus_records_come_out_alone_and_in_order),
	TEST(freeing_one_does_not_touch_the_others_lists),
	TEST(the_dead_do_not_gather_where_nobody_looks),
	TEST(a_look_ends_however_much_is_pushed_meanwhile),
	TEST(a_record_is_told_by_reason_or_for_its_bus_lock),
	TEST(two_producers_and_a_sleeping_consumer_lose_no_wake_up_and_no_count),
	TEST(whoever_asks_which_vcpus_were_active_sees_all_their_exits),
	TEST(vcpus_come_and_go_while_others_tell),
	{NULL, NULL},
};
