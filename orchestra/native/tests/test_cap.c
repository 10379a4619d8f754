#include <sys/mman.h>
#include <time.h>

#include "check.h"

/* Clocks are read through here, so that a test can hold the capper right after it has looked at a thread's. */
static _Atomic bool looks_are_held;
static _Atomic int looking; /* it has looked, and waits */
_Thread_local int clock_reads;
int __real_clock_gettime(clockid_t clock, struct timespec *t);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t);

int __wrap_clock_gettime(clockid_t clock, struct timespec *t)
{
	int rc = __real_clock_gettime(clock, t);

	clock_reads++;
	if (clock < 0 && !rc && atomic_load(&looks_are_held)) { /* another thread's CPU clock */
		atomic_store(&looking, 1);
		while (atomic_load(&looks_are_held))
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	return rc;
}

/* Guests that only compute, as far as a cap can tell: runners that use their CPU between two looks for commands. */
enum { RUNNERS = 3 };

struct runner {
	orc_vcpu *vcpu;
	pthread_t thread;
	_Atomic orc_u64 rounds;
};

static orc_ns cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (orc_ns)t.tv_sec * SECOND + t.tv_nsec;
}

static void *compute(void *argument)
{
	struct runner *r = argument;

	orc_vcpu_attach(r->vcpu);
	while (!orc_commanded(r->vcpu)) {
		for (orc_ns until = cpu_time() + 200000; cpu_time() < until;)
			;
		atomic_fetch_add(&r->rounds, 1);
	}
	orc_vcpu_detach(r->vcpu);
	return NULL;
}

static void runner_start(struct runner *r, orc_fleet *fleet, uint32_t id)
{
	r->vcpu = orc_vcpu_new(fleet, id, 8);
	atomic_store(&r->rounds, 0);
	r->thread = start(compute, r);
}

static void runner_end(struct runner *r)
{
	orc_vcpu_command(r->vcpu, ORC_STOP, 0);
	pthread_join(r->thread, NULL);
	orc_vcpu_free(r->vcpu);
}

static orc_u64 capped(const struct runner *r)
{
	struct orc_counters out;

	orc_vcpu_counters(r->vcpu, &out, orc_now());
	return out.capped;
}

static orc_ns used(const struct runner *r)
{
	struct timespec t;
	clockid_t clock;

	CHECK(!pthread_getcpuclockid(r->thread, &clock));
	clock_gettime(clock, &t);
	return (orc_ns)t.tv_sec * SECOND + t.tv_nsec;
}

static void nap(orc_ns t)
{
	nanosleep(&(struct timespec){.tv_sec = t / SECOND, .tv_nsec = t % SECOND}, NULL);
}

static void a_capped_runner_uses_no_more_than_its_part(void)
{
	orc_fleet *fleet = orc_fleet_new();
	struct runner r;
	orc_ns before, begun;
	double share;

	runner_start(&r, fleet, 0);
	CHECK(!orc_vcpu_cap(r.vcpu, 0.2));
	nap(SECOND / 5);
	before = used(&r), begun = orc_now();
	nap(SECOND); /* the measuring time itself */
	share = (double)(used(&r) - before) / (double)(orc_now() - begun);
	CHECK(share < 0.23, "%g", share); /* less where others want the CPU as well */
	/* On a machine that is busy with others it may not have had its part yet. */
	for (orc_ns until = orc_now() + PATIENCE; !capped(&r);)
		CHECK(orc_now() < until);
	runner_end(&r);
	orc_fleet_free(fleet);
}

static void a_cap_that_is_taken_away_holds_nobody(void)
{
	orc_fleet *fleet = orc_fleet_new();
	struct runner r;
	orc_u64 held, rounds;

	runner_start(&r, fleet, 0);
	CHECK(!orc_vcpu_cap(r.vcpu, 0.01));
	for (orc_ns until = orc_now() + PATIENCE; !(orc_vcpu_commands(r.vcpu) & ORC_CAP);)
		CHECK(orc_now() < until);
	CHECK(!orc_vcpu_cap(r.vcpu, 1));
	CHECK(!(orc_vcpu_commands(r.vcpu) & ORC_CAP));
	rounds = atomic_load(&r.rounds);
	for (orc_ns until = orc_now() + PATIENCE; atomic_load(&r.rounds) < rounds + 100;)
		CHECK(orc_now() < until);
	held = capped(&r);
	nap(SECOND / 10);
	CHECK(capped(&r) == held);
	runner_end(&r);
	orc_fleet_free(fleet);
}

static void a_stop_ends_what_a_cap_holds(void)
{
	orc_fleet *fleet = orc_fleet_new();
	struct runner r;
	orc_ns begun;

	runner_start(&r, fleet, 0);
	CHECK(!orc_vcpu_cap(r.vcpu, 0.01));
	for (orc_ns until = orc_now() + PATIENCE; !(orc_vcpu_commands(r.vcpu) & ORC_CAP);)
		CHECK(orc_now() < until);
	begun = orc_now();
	runner_end(&r); /* its cap is freed with it */
	CHECK(orc_now() - begun < PATIENCE);
	orc_fleet_free(fleet);
}

static void caps_come_and_go_while_runners_do(void)
{
	orc_fleet *fleet = orc_fleet_new();
	orc_u64 seed = 7;

	for (int round = 0; round < 8; round++) {
		struct runner r[RUNNERS];

		for (uint32_t i = 0; i < RUNNERS; i++)
			runner_start(&r[i], fleet, i);
		for (int i = 0; i < 60; i++) {
			CHECK(!orc_vcpu_cap(r[random_number(&seed) % RUNNERS].vcpu, (double)(1 + random_number(&seed) % 100) / 100));
			nap(500000);
		}
		for (uint32_t i = 0; i < RUNNERS; i++)
			runner_end(&r[i]);
	}
	orc_fleet_free(fleet);
}

static _Atomic bool gone;

static void *give_back(void *argument)
{
	orc_vcpu *v = argument;
	struct kvm_run *run = v->run;

	orc_vcpu_unbind(v);
	munmap(run, sizeof *run);
	atomic_store(&gone, true);
	return NULL;
}

static void what_a_vcpu_was_bound_to_may_go_only_once_the_capper_has_done_with_it(void)
{
	orc_fleet *fleet = orc_fleet_new();
	pthread_t giving;
	struct runner r;

	runner_start(&r, fleet, 0);
	orc_vcpu_bind_kvm(r.vcpu, -1, mmap(NULL, sizeof(struct kvm_run), PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), false);
	CHECK(!orc_vcpu_cap(r.vcpu, 1e-9)); /* whatever it has used is too much: it is kicked at the next look */
	atomic_store(&looking, 0);
	atomic_store(&looks_are_held, true);
	for (orc_ns until = orc_now() + PATIENCE; !atomic_load(&looking);)
		CHECK(orc_now() < until);
	orc_vcpu_command(r.vcpu, ORC_STOP, 0);
	join(r.thread);
	giving = start(give_back, r.vcpu);
	nap(SECOND / 50); /* time enough to do it wrong */
	CHECK(!atomic_load(&gone), "its kvm_run was unmapped while the capper was about to kick it");
	atomic_store(&looks_are_held, false);
	join(giving);
	CHECK(!r.vcpu->run && !r.vcpu->cap);
	CHECK(!orc_vcpu_cap(r.vcpu, 1)); /* nothing is left to lift */
	orc_vcpu_kick(r.vcpu);
	orc_vcpu_free(r.vcpu);
	orc_fleet_free(fleet);
}

const struct test cap_tests[] = {
	TEST(a_capped_runner_uses_no_more_than_its_part),
	TEST(a_cap_that_is_taken_away_holds_nobody),
	TEST(a_stop_ends_what_a_cap_holds),
	TEST(caps_come_and_go_while_runners_do),
	TEST(what_a_vcpu_was_bound_to_may_go_only_once_the_capper_has_done_with_it),
	{NULL, NULL},
};
