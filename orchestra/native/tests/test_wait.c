#include <sched.h>

#include "check.h"

enum { STOP = 1, HOST = 0 };

/* One vCPU in one fleet under one bucket, whose next event waits about 10 s. */
struct scene {
	orc_fleet *fleet;
	orc_vcpu *vcpu;
	orc_bucket *bucket;
	pthread_t thread;
	_Atomic bool waiting, served;
};

static struct scene scene_new(double rate, orc_ns max_delay)
{
	struct scene s = {.fleet = orc_fleet_new(), .bucket = orc_bucket_new()};

	s.vcpu = orc_vcpu_new(s.fleet, 0, 8);
	orc_bucket_set(s.bucket, rate, 1, max_delay, orc_now());
	orc_vcpu_set_bucket(s.vcpu, ORC_EXITS, HOST, s.bucket);
	return s;
}

static void scene_free(struct scene *s)
{
	CHECK(!orc_vcpu_waits(s->vcpu));
	orc_vcpu_free(s->vcpu);
	orc_bucket_free(s->bucket);
	orc_fleet_free(s->fleet);
}

static orc_ns event(orc_vcpu *v)
{
	struct orc_record record = {.reason = KVM_EXIT_HLT};

	return orc_vcpu_account(v, &record, orc_now());
}

static struct orc_counters counters(const orc_vcpu *v)
{
	struct orc_counters out;

	orc_vcpu_counters(v, &out, orc_now());
	return out;
}

static void *wait_here(void *argument)
{
	struct scene *s = argument;

	orc_vcpu_attach(s->vcpu);
	atomic_store(&s->served, orc_wait_turn(s->vcpu));
	orc_vcpu_detach(s->vcpu);
	return NULL;
}

static void start_waiting(struct scene *s)
{
	orc_ns deadline = orc_now() + PATIENCE;

	CHECK(event(s->vcpu) > orc_now() + 5 * SECOND);
	s->thread = start(wait_here, s);
	while (!counters(s->vcpu).throttled_since) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
}

static void a_command_ends_a_wait_at_once_and_the_ticket_stays(void)
{
	struct scene s = scene_new(0.1, -1);
	orc_ns turn, before;

	start_waiting(&s);
	turn = orc_vcpu_turn(s.vcpu);
	before = orc_now();
	orc_vcpu_command(s.vcpu, STOP, 0);
	join(s.thread);
	CHECK(orc_now() - before < 2 * SECOND);
	CHECK(!s.served);
	CHECK(orc_vcpu_turn(s.vcpu) == turn);
	CHECK(!counters(s.vcpu).throttled_since && !counters(s.vcpu).released);
	CHECK(!orc_wait_turn(s.vcpu), "the command is still there");

	orc_vcpu_command(s.vcpu, 0, STOP);
	CHECK(!orc_vcpu_commands(s.vcpu));
	orc_bucket_set(s.bucket, 1e6, 1, -1, orc_now());
	CHECK(orc_wait_turn(s.vcpu));
	CHECK(orc_vcpu_turn(s.vcpu) == ORC_NEVER);
	scene_free(&s);
}

static void a_changed_limit_takes_effect_in_the_middle_of_a_wait(void)
{
	const double rates[] = {1e6, 0};

	for (int i = 0; i < 2; i++) {
		struct scene s = scene_new(0.1, -1);
		orc_ns before;

		start_waiting(&s);
		before = orc_now();
		orc_bucket_set(s.bucket, rates[i], 1, -1, before);
		orc_fleet_limits_changed(s.fleet);
		join(s.thread);
		CHECK(orc_now() - before < 2 * SECOND);
		CHECK(s.served);
		CHECK(!counters(s.vcpu).released);
		scene_free(&s);
	}
}

static void a_kick_alone_makes_a_waiter_look_again_and_wait_on(void)
{
	struct scene s = scene_new(0.1, -1);

	start_waiting(&s);
	for (int i = 0; i < 100; i++)
		orc_vcpu_kick(s.vcpu);
	CHECK(counters(s.vcpu).throttled_since);
	CHECK(counters(s.vcpu).waits == 1);
	orc_vcpu_command(s.vcpu, STOP, 0);
	join(s.thread);
	CHECK(!s.served);
	scene_free(&s);
}

static void max_delay_ends_a_wait_and_counts_a_release(void)
{
	struct scene s = scene_new(0.1, 1000000);
	orc_ns before = orc_now();

	event(s.vcpu);
	CHECK(orc_wait_turn(s.vcpu));
	CHECK(orc_now() - before >= 1000000 && orc_now() - before < 2 * SECOND);
	CHECK(counters(s.vcpu).released == 1);
	CHECK(counters(s.vcpu).throttled >= 900000);
	scene_free(&s);
}

/* A vCPU under a bucket of its own at each place, none of them limited. */
static orc_vcpu *new_stack(orc_fleet *f, orc_bucket *b[ORC_METERS][ORC_LEVELS])
{
	orc_vcpu *v = orc_vcpu_new(f, 0, 8);

	for (int meter = 0; meter < ORC_METERS; meter++)
		for (int level = 0; level < ORC_LEVELS; level++) {
			b[meter][level] = orc_bucket_new();
			orc_vcpu_set_bucket(v, meter, level, b[meter][level]);
		}
	return v;
}

static void free_stack(orc_vcpu *v, orc_fleet *f, orc_bucket *b[ORC_METERS][ORC_LEVELS])
{
	orc_vcpu_free(v); /* it may wait, and so be counted in its buckets */
	for (int meter = 0; meter < ORC_METERS; meter++)
		for (int level = 0; level < ORC_LEVELS; level++)
			orc_bucket_free(b[meter][level]);
	orc_fleet_free(f);
}

static void of_stacked_buckets_the_slowest_counts(void)
{
	orc_bucket *b[ORC_METERS][ORC_LEVELS];
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = new_stack(f, b);
	struct orc_record locked = {.reason = KVM_EXIT_X86_BUS_LOCK, .flags = KVM_RUN_X86_BUS_LOCK},
			  plain = {.reason = KVM_EXIT_HLT};

	CHECK(orc_vcpu_account(v, &locked, 0) == ORC_NEVER);
	for (int level = 0; level < ORC_LEVELS; level++)
		orc_bucket_set(b[ORC_BUS_LOCKS][level], level == 2 ? 1 : 1000, 1, -1, 0);
	orc_bucket_set(b[ORC_EXITS][1], 10, 1, -1, 0);
	CHECK(orc_vcpu_account(v, &locked, 0) / 1000 == SECOND / 1000);
	CHECK(orc_vcpu_turn(v) / 1000 == SECOND / 1000);
	orc_bucket_set(b[ORC_BUS_LOCKS][2], 0, 1, -1, 0);
	CHECK(orc_vcpu_turn(v) / 1000 == SECOND / 10000, "then the exits' bucket is the slowest");
	CHECK(orc_vcpu_account(v, &plain, SECOND) / 1000 == SECOND * 11 / 10000);
	free_stack(v, f, b);
}

static unsigned of(int meter, int level)
{
	return (unsigned)(meter * ORC_LEVELS + level);
}

static void a_wait_counts_for_the_bucket_that_was_the_slowest(void)
{
	orc_bucket *b[ORC_METERS][ORC_LEVELS];
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = new_stack(f, b);
	struct orc_record locked = {.reason = KVM_EXIT_X86_BUS_LOCK, .flags = KVM_RUN_X86_BUS_LOCK};
	struct orc_counters out;
	struct orc_sums sums;
	struct orc_more more[ORC_REASONS];
	orc_u64 seen[ORC_REASONS] = {0}, sum = 0;

	orc_bucket_set(b[ORC_BUS_LOCKS][2], 1, 1, -1, 0);
	orc_bucket_set(b[ORC_EXITS][1], 10, 1, -1, 0);
	orc_vcpu_account(v, &locked, 0);
	orc_vcpu_account(v, &locked, 1);
	orc_vcpu_wait_begin(v, 100);
	orc_vcpu_counters(v, &out, 150);
	CHECK(out.held[of(ORC_BUS_LOCKS, 2)] == 50, "a wait in progress counts");
	orc_vcpu_wait_end(v, 200, false);
	orc_bucket_set(b[ORC_BUS_LOCKS][2], 0, 1, -1, 200);
	orc_vcpu_wait_begin(v, 300);
	orc_vcpu_wait_end(v, 330, true);
	orc_vcpu_counters(v, &out, 1000);
	orc_vcpu_look(v, &sums, seen, more, 1000);
	CHECK(out.held[of(ORC_BUS_LOCKS, 2)] == 100 && out.held[of(ORC_EXITS, 1)] == 30);
	for (unsigned i = 0; i < ORC_METERS * ORC_LEVELS; i++) {
		CHECK(sums.held[i] == out.held[i]);
		sum += out.held[i];
	}
	CHECK(sum == 130 && out.throttled == 130 && sums.throttled == 130);
	free_stack(v, f, b);
}

static void a_limit_that_changes_in_a_wait_ends_what_counts_for_its_bucket(void)
{
	struct scene s = scene_new(0.1, -1);
	orc_bucket *other = orc_bucket_new();
	orc_ns deadline = orc_now() + PATIENCE;
	struct orc_counters out;

	orc_bucket_set(other, 0.2, 1, -1, orc_now());
	orc_vcpu_set_bucket(s.vcpu, ORC_EXITS, 2, other);
	start_waiting(&s);
	orc_bucket_set(s.bucket, 0, 1, -1, orc_now());
	orc_fleet_limits_changed(s.fleet);
	do {
		CHECK(orc_now() < deadline);
		out = counters(s.vcpu);
	} while (!out.held[of(ORC_EXITS, 2)]);
	/* The first bucket has what came before, if the runner had looked by then. */
	CHECK(out.held[of(ORC_EXITS, HOST)] + out.held[of(ORC_EXITS, 2)] == out.throttled && out.waits == 1);
	orc_vcpu_command(s.vcpu, STOP, 0);
	join(s.thread);
	CHECK(counters(s.vcpu).held[of(ORC_EXITS, HOST)] == out.held[of(ORC_EXITS, HOST)]);
	scene_free(&s);
	orc_bucket_free(other);
}

static void an_exit_counts_for_its_accesses_and_for_those_that_python_answers(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 0, 8);
	orc_bucket *exits = orc_bucket_new(), *answers = orc_bucket_new();
	struct orc_record io = {.reason = KVM_EXIT_IO};

	orc_vcpu_set_bucket(v, ORC_EXITS, ORC_VM, exits);
	orc_vcpu_set_bucket(v, ORC_ANSWERS, ORC_VM, answers);
	orc_bucket_set(exits, 1000, 1, -1, 0);
	orc_vcpu_weigh(v, 500);
	CHECK(orc_vcpu_account(v, &io, 0) / 1000 == SECOND / 2 / 1000, "a string of 500 is no single exit");
	CHECK(counters(v).answers == 0 && counters(v).exits[KVM_EXIT_IO] == 1);

	orc_bucket_set(exits, 0, 1, -1, 0);
	orc_bucket_set(answers, 1000, 1, -1, 0);
	CHECK(orc_vcpu_account(v, &io, 0) == ORC_NEVER && orc_vcpu_turn(v) == ORC_NEVER, "nobody asked Python");
	orc_vcpu_answered(v, 300, 0);
	CHECK(orc_vcpu_turn(v) / 1000 == SECOND * 3 / 10 / 1000);
	orc_vcpu_answered(v, 200, 0);
	CHECK(orc_vcpu_turn(v) / 1000 == SECOND / 2 / 1000, "the same exit, in two parts");
	CHECK(counters(v).answers == 500 && counters(v).exits[KVM_EXIT_IO] == 2);
	CHECK(orc_vcpu_account(v, &io, 0) == ORC_NEVER && orc_vcpu_turn(v) == ORC_NEVER, "the next exit is another one");
	orc_vcpu_free(v);
	orc_bucket_free(exits);
	orc_bucket_free(answers);
	orc_fleet_free(f);
}

static void each_wait_that_is_served_is_one_also_of_the_same_exit(void)
{
	struct scene s = scene_new(10, SECOND);
	struct orc_record io = {.reason = KVM_EXIT_IO};
	struct orc_counters out;

	orc_vcpu_set_bucket(s.vcpu, ORC_ANSWERS, HOST, s.bucket);
	orc_vcpu_account(s.vcpu, &io, 0);
	for (int chunk = 1; chunk <= 3; chunk++) { /* the exit's own wait, and then one for each chunk that Python answered */
		CHECK(orc_vcpu_turn(s.vcpu) != ORC_NEVER);
		orc_vcpu_wait_begin(s.vcpu, chunk);
		orc_vcpu_wait_end(s.vcpu, chunk, false); /* interrupted: the same wait */
		orc_vcpu_wait_begin(s.vcpu, chunk);
		orc_vcpu_wait_end(s.vcpu, chunk, true);
		out = counters(s.vcpu);
		CHECK(out.waits == (orc_u64)chunk, "%llu", (unsigned long long)out.waits);
		CHECK(out.released <= out.waits, "no more waits can have been cut short than there were");
		orc_vcpu_answered(s.vcpu, 1000, chunk);
	}
	scene_free(&s);
}

/* ---- making way ----------------------------------------------------------------------------------------------- */

static void *make_way_here(void *argument)
{
	struct scene *s = argument;

	atomic_store(&s->waiting, true);
	orc_make_way(s->vcpu);
	atomic_store(&s->served, true);
	return NULL;
}

/* A vCPU that makes way for another, with 10 s ahead. */
static void start_making_way(struct scene *s)
{
	orc_fleet_urgent(s->fleet, true);
	atomic_store(&s->fleet->urgent_until, orc_now() + PATIENCE);
	s->thread = start(make_way_here, s);
	while (!atomic_load(&s->waiting))
		sched_yield();
	CHECK(!atomic_load(&s->served));
}

static void a_vcpu_makes_way_until_what_was_urgent_is_done(void)
{
	struct scene s = scene_new(1, -1);
	orc_ns before;

	orc_make_way(s.vcpu); /* nothing is urgent */
	start_making_way(&s);
	before = orc_now();
	orc_fleet_urgent(s.fleet, true);
	orc_fleet_urgent(s.fleet, false);
	CHECK(!atomic_load(&s.served), "two waited for something, and one of them still does");
	orc_fleet_urgent(s.fleet, false);
	join(s.thread);
	CHECK(orc_now() - before < 2 * SECOND);
	scene_free(&s);
}

static void a_vcpu_that_is_commanded_does_not_make_way(void)
{
	struct scene s = scene_new(1, -1);
	orc_ns before;

	start_making_way(&s);
	before = orc_now();
	orc_vcpu_command(s.vcpu, STOP, 0);
	join(s.thread);
	CHECK(orc_now() - before < 2 * SECOND);
	scene_free(&s);
}

static void nobody_makes_way_for_ever(void)
{
	struct scene s = scene_new(1, -1);
	orc_ns before = orc_now();

	orc_fleet_urgent(s.fleet, true);
	orc_make_way(s.vcpu);
	CHECK(orc_now() - before > 20 * 1000 * 1000 && orc_now() - before < 2 * SECOND);
	orc_fleet_urgent(s.fleet, false);
	orc_fleet_urgent(NULL, true); /* the fleet is gone */
	scene_free(&s);
}

/* ---- threads -------------------------------------------------------------------------------------------------- */

enum { ROUNDS = 3000 };

static void *wait_again_and_again(void *argument)
{
	struct scene *s = argument;

	for (int i = 0; i < ROUNDS; i++) {
		event(s->vcpu);
		CHECK(orc_wait_turn(s->vcpu));
		atomic_store(&s->served, true);
		while (atomic_load(&s->served))
			sched_yield();
	}
	return NULL;
}

static void no_limit_change_is_missed_however_it_races_with_the_start_of_a_wait(void)
{
	struct scene s = scene_new(0.01, -1);
	uint64_t seed = 5;

	s.thread = start(wait_again_and_again, &s);
	for (int i = 0; i < ROUNDS; i++) {
		orc_ns deadline = orc_now() + PATIENCE;

		for (uint64_t spin = random_number(&seed) % 2000; spin--;)
			atomic_signal_fence(memory_order_seq_cst);
		orc_bucket_set(s.bucket, 0, 1, -1, orc_now());
		orc_fleet_limits_changed(s.fleet);
		while (!atomic_load(&s.served)) {
			CHECK(orc_now() < deadline, "a change of the limit was missed");
			sched_yield();
		}
		orc_bucket_set(s.bucket, 0.01, 1, -1, orc_now());
		atomic_store(&s.served, false);
	}
	join(s.thread);
	scene_free(&s);
}

static void *sleep_until_stopped(void *argument)
{
	struct scene *s = argument;

	for (;;) {
		uint32_t seen = orc_vcpu_wakes(s->vcpu);

		if (orc_vcpu_commands(s->vcpu))
			return NULL;
		atomic_store(&s->waiting, true);
		orc_vcpu_sleep(s->vcpu, seen);
	}
}

static void a_wake_up_between_looking_and_sleeping_is_not_lost(void)
{
	struct scene s = scene_new(1, -1);

	for (int i = 0; i < 500; i++) {
		atomic_store(&s.waiting, false);
		s.thread = start(sleep_until_stopped, &s);
		if (i & 1)
			while (!atomic_load(&s.waiting))
				sched_yield();
		orc_vcpu_command(s.vcpu, STOP, 0);
		join(s.thread);
		orc_vcpu_command(s.vcpu, 0, STOP);
	}
	scene_free(&s);
}

static _Atomic bool counting;

static void *count_and_wait(void *argument)
{
	orc_vcpu *v = argument;
	struct orc_record record = {.reason = KVM_EXIT_MMIO, .flags = KVM_RUN_X86_BUS_LOCK};

	/* One wait follows the other: sum and wait in progress add up to the time since the first began, at 10. */
	for (orc_ns now = 10; now < 2000010; now += 10) {
		orc_vcpu_wait_begin(v, now);
		orc_vcpu_account(v, &record, now);
		orc_vcpu_wait_end(v, now + 10, true);
	}
	atomic_store(&counting, false);
	return NULL;
}

static void counters_only_grow_and_no_wait_counts_twice(void)
{
	const orc_ns now = 1ll << 40;
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 0, 8);
	struct orc_counters before = {0}, out;
	struct orc_sums sums;
	struct orc_more more[ORC_REASONS];
	orc_u64 seen[ORC_REASONS] = {0};
	pthread_t thread;

	atomic_store(&counting, true);
	thread = start(count_and_wait, v);
	while (atomic_load(&counting)) {
		orc_vcpu_look(v, &sums, seen, more, now);
		CHECK(sums.throttled <= (orc_u64)now - 10, "%llu", (unsigned long long)sums.throttled);
		orc_vcpu_counters(v, &out, now);
		CHECK(out.throttled <= (orc_u64)now - 10);
		CHECK(out.bus_locks >= before.bus_locks && out.waits >= before.waits);
		CHECK(out.exits[KVM_EXIT_MMIO] >= before.exits[KVM_EXIT_MMIO]);
		before = out;
	}
	join(thread);
	orc_vcpu_counters(v, &out, now);
	CHECK(out.bus_locks == 200000 && out.exits[KVM_EXIT_MMIO] == 200000 && out.waits == 200000);
	CHECK(out.throttled == 2000000 && out.held[0] == 2000000 && !out.throttled_since);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void who_waited_and_is_gone_is_not_woken_and_takes_nobody_along(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[4];
	uint32_t before[4];

	for (uint32_t i = 0; i < 4; i++) {
		v[i] = orc_vcpu_new(f, i, 8);
		orc_vcpu_wait_begin(v[i], 1);
	}
	orc_vcpu_wait_end(v[1], 2, false); /* it only waited */
	orc_vcpu_wait_end(v[2], 2, false); /* it is gone */
	orc_vcpu_free(v[2]);
	for (int round = 0; round < 2; round++) {
		for (int i = 0; i < 4; i++)
			before[i] = i == 2 ? 0 : orc_vcpu_wakes(v[i]);
		orc_fleet_limits_changed(f);
		for (int i = 0; i < 4; i++)
			CHECK(i == 2 || orc_vcpu_wakes(v[i]) == before[i] + (i != 1));
		CHECK(!f->dead);
	}
	for (int i = 0; i < 4; i++)
		if (i != 2)
			orc_vcpu_free(v[i]); /* two in the middle of their waits, as no runner of ours would leave them */
	orc_fleet_free(f);
}

const struct test wait_tests[] = {
	TEST(a_command_ends_a_wait_at_once_and_the_ticket_stays),
	TEST(a_changed_limit_takes_effect_in_the_middle_of_a_wait),
	TEST(a_kick_alone_makes_a_waiter_look_again_and_wait_on),
	TEST(max_delay_ends_a_wait_and_counts_a_release),
	TEST(a_vcpu_makes_way_until_what_was_urgent_is_done),
	TEST(a_vcpu_that_is_commanded_does_not_make_way),
	TEST(nobody_makes_way_for_ever),
	TEST(of_stacked_buckets_the_slowest_counts),
	TEST(a_wait_counts_for_the_bucket_that_was_the_slowest),
	TEST(a_limit_that_changes_in_a_wait_ends_what_counts_for_its_bucket),
	TEST(an_exit_counts_for_its_accesses_and_for_those_that_python_answers),
	TEST(each_wait_that_is_served_is_one_also_of_the_same_exit),
	TEST(no_limit_change_is_missed_however_it_races_with_the_start_of_a_wait),
	TEST(a_wake_up_between_looking_and_sleeping_is_not_lost),
	TEST(counters_only_grow_and_no_wait_counts_twice),
	TEST(who_waited_and_is_gone_is_not_woken_and_takes_nobody_along),
	{NULL, NULL},
};
