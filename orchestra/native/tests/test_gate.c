#include <sched.h>

#include "check.h"

enum { MOST = 8 };

/* vCPUs 0 and 1 are of VM 0 and tenant 0, vCPU 2 of VM 1 and tenant 0, vCPU 3 of VM 2 and tenant 1. */
static const int vm_of[] = {0, 0, 1, 2}, tenant_of[] = {0, 0, 0, 1};

struct scene {
	orc_fleet *fleet;
	orc_bucket *tenant[2], *vm[3];
	orc_vcpu *vcpu[4];
	/* Who came in, in order. */
	_Atomic int came;
	_Atomic int order[MOST];
};

static struct scene scene_new(void)
{
	struct scene s = {.fleet = orc_fleet_new()};

	s.fleet->gate.patience = PATIENCE; /* nobody is passed, however slow this machine is */
	for (int i = 0; i < 2; i++)
		s.tenant[i] = orc_bucket_new();
	for (int i = 0; i < 3; i++)
		s.vm[i] = orc_bucket_new();
	for (int i = 0; i < 4; i++) {
		s.vcpu[i] = orc_vcpu_new(s.fleet, (uint32_t)i, 8);
		orc_vcpu_set_bucket(s.vcpu[i], ORC_ANSWERS, ORC_TENANT, s.tenant[tenant_of[i]]);
		orc_vcpu_set_bucket(s.vcpu[i], ORC_ANSWERS, ORC_VM, s.vm[vm_of[i]]);
	}
	return s;
}

static void scene_free(struct scene *s)
{
	CHECK(!s->fleet->gate.holder && !s->fleet->gate.waiting && !s->fleet->gate.first);
	for (int i = 0; i < 4; i++)
		orc_vcpu_free(s->vcpu[i]);
	for (int i = 0; i < 2; i++)
		orc_bucket_free(s->tenant[i]);
	for (int i = 0; i < 3; i++)
		orc_bucket_free(s->vm[i]);
	orc_fleet_free(s->fleet);
}

struct visit {
	struct scene *s;
	int vcpu;
};

static void *visit(void *argument)
{
	struct visit *visit = argument;
	orc_vcpu *v = visit->s->vcpu[visit->vcpu];

	orc_gate_enter(v);
	visit->s->order[atomic_fetch_add(&visit->s->came, 1)] = visit->vcpu;
	orc_gate_leave(v);
	return NULL;
}

static pthread_t queue_up(struct visit *v)
{
	unsigned waiting = atomic_load(&v->s->fleet->gate.waiting);
	orc_ns deadline = orc_now() + PATIENCE;
	pthread_t thread = start(visit, v);

	while (atomic_load(&v->s->fleet->gate.waiting) == waiting) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
	return thread;
}

static void who_had_the_least_is_next_by_tenant_and_then_by_vm(void)
{
	struct scene s = scene_new();
	struct visit visits[] = {{&s, 1}, {&s, 2}, {&s, 3}};
	pthread_t threads[3];

	/* VM 0 of tenant 0 had much, VM 1 little; tenant 1 less than tenant 0. */
	orc_bucket_share(s.tenant[0])->used = 500;
	orc_bucket_share(s.vm[0])->used = 400;
	orc_bucket_share(s.vm[1])->used = 100;
	orc_bucket_share(s.tenant[1])->used = 300;
	orc_bucket_share(s.vm[2])->used = 300;
	orc_gate_enter(s.vcpu[0]);
	s.fleet->gate.now = 0; /* or those who come now would catch up with it */
	orc_bucket_share(s.tenant[0])->below = 0;
	for (int i = 0; i < 3; i++)
		threads[i] = queue_up(&visits[i]);
	s.vcpu[0]->gate_entered = orc_now();
	orc_gate_leave(s.vcpu[0]);
	for (int i = 0; i < 3; i++)
		join(threads[i]);
	CHECK(s.order[0] == 3 && s.order[1] == 2 && s.order[2] == 1, "%d %d %d", s.order[0], s.order[1], s.order[2]);
	scene_free(&s);
}

static void of_two_the_same_the_first_is_next(void)
{
	struct scene s = scene_new();
	struct visit visits[] = {{&s, 1}, {&s, 0}};
	pthread_t threads[2];

	orc_gate_enter(s.vcpu[3]);
	for (int i = 0; i < 2; i++)
		threads[i] = queue_up(&visits[i]);
	orc_gate_leave(s.vcpu[3]);
	for (int i = 0; i < 2; i++)
		join(threads[i]);
	CHECK(s.order[0] == 1 && s.order[1] == 0);
	scene_free(&s);
}

static void who_was_away_has_saved_nothing_up(void)
{
	struct scene s = scene_new();

	orc_bucket_share(s.tenant[0])->used = 5 * SECOND;
	orc_bucket_share(s.vm[0])->used = 5 * SECOND;
	orc_gate_enter(s.vcpu[0]);
	orc_gate_leave(s.vcpu[0]);
	orc_gate_enter(s.vcpu[3]);
	CHECK(orc_bucket_share(s.tenant[1])->used == 5 * SECOND, "as tenant 0 had when it was let in last");
	orc_gate_leave(s.vcpu[3]);
	orc_gate_enter(s.vcpu[2]);
	CHECK(orc_bucket_share(s.vm[1])->used == 5 * SECOND);
	orc_gate_leave(s.vcpu[2]);
	scene_free(&s);
}

static void who_stays_too_long_is_passed_and_leaves_nothing_behind(void)
{
	struct scene s = scene_new();
	struct visit other = {&s, 3};
	pthread_t thread;

	s.fleet->gate.patience = ORC_PATIENCE;
	orc_gate_enter(s.vcpu[0]); /* and does not leave: a device that blocks */
	thread = start(visit, &other);
	join(thread);
	CHECK(s.came == 1);
	orc_gate_leave(s.vcpu[0]);
	scene_free(&s);
}

static void of_a_long_stay_the_cpu_time_counts_and_not_how_long_it_blocked(void)
{
	struct scene s = scene_new();
	orc_vcpu *v = s.vcpu[0];
	const _Atomic int64_t *used = &orc_bucket_share(s.tenant[0])->used;

	s.fleet->gate.patience = SECOND;
	for (int i = 1; i <= 2; i++) { /* before anybody looks at its CPU time, and when that is done */
		orc_gate_enter(v);
		v->gate_entered -= 1000 * SECOND;
		orc_gate_leave(v);
		CHECK(*used == i * SECOND, "the gate's patience");
	}
	orc_gate_enter(v);
	v->gate_entered -= 1000 * SECOND;
	v->gate_cpu -= 10 * SECOND;
	orc_gate_leave(v);
	CHECK(*used >= 12 * SECOND && *used < 13 * SECOND, "%lld", (long long)*used);
	orc_gate_enter(v);
	v->gate_entered = orc_now();
	v->gate_cpu -= 1000 * SECOND; /* whatever that says, it is no more than the time that it was in */
	orc_gate_leave(v);
	CHECK(*used < 14 * SECOND, "%lld", (long long)*used);
	scene_free(&s);
}

static void who_is_commanded_does_not_wait(void)
{
	struct scene s = scene_new();
	struct visit other = {&s, 3};
	pthread_t thread;

	orc_gate_enter(s.vcpu[0]);
	thread = queue_up(&other);
	orc_vcpu_command(s.vcpu[3], ORC_STOP, 0);
	join(thread);
	CHECK(s.came == 1 && s.fleet->gate.holder == s.vcpu[0]);
	orc_gate_leave(s.vcpu[0]);
	scene_free(&s);
}

static void a_sleep_gives_the_gate_up(void)
{
	struct scene s = scene_new();
	uint32_t seen = orc_vcpu_wakes(s.vcpu[0]);

	orc_gate_enter(s.vcpu[0]);
	orc_vcpu_wake(s.vcpu[0]);
	orc_vcpu_sleep(s.vcpu[0], seen);
	CHECK(s.fleet->gate.holder == s.vcpu[0], "and takes it again");
	orc_gate_leave(s.vcpu[0]);
	scene_free(&s);
}

static void *crowd(void *argument)
{
	struct visit *visit = argument;
	orc_vcpu *v = visit->s->vcpu[visit->vcpu];

	for (int i = 0; i < 2000; i++) {
		orc_gate_enter(v);
		if (v->gated && i % 64 == 0)
			sched_yield();
		orc_gate_leave(v);
		if (i % 7 == 0)
			orc_vcpu_wake(v);
	}
	return NULL;
}

static void a_crowd_gets_through(void)
{
	struct scene s = scene_new();
	struct visit visits[] = {{&s, 0}, {&s, 1}, {&s, 2}, {&s, 3}};
	pthread_t threads[4];

	s.fleet->gate.patience = 1000; /* all the time somebody is passed */
	for (int i = 0; i < 4; i++)
		threads[i] = start(crowd, &visits[i]);
	for (int i = 0; i < 4; i++)
		join(threads[i]);
	scene_free(&s);
}

const struct test gate_tests[] = {
	TEST(who_had_the_least_is_next_by_tenant_and_then_by_vm),
	TEST(of_two_the_same_the_first_is_next),
	TEST(who_was_away_has_saved_nothing_up),
	TEST(who_stays_too_long_is_passed_and_leaves_nothing_behind),
	TEST(of_a_long_stay_the_cpu_time_counts_and_not_how_long_it_blocked),
	TEST(who_is_commanded_does_not_wait),
	TEST(a_sleep_gives_the_gate_up),
	TEST(a_crowd_gets_through),
	{0},
};
