/* Buckets that processes share. Others are children of the test; they end by _exit, a signal, or a failed CHECK, which is a
 * signal as well. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#ifndef F_SEAL_SHRINK
#define F_ADD_SEALS 1033
#define F_SEAL_SHRINK 2
#endif

/* Of the instructions at which a process is put to sleep, every so many: each is a run of its own, of all before it. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { STRIDE = 499 };
#else
enum { STRIDE = 61 };
#endif

static orc_budget *attached(int fd)
{
	const char *problem;
	orc_budget *b = orc_budget_attach(fd, &problem);

	CHECK(b, "%s", problem);
	return b;
}

static orc_budget *new_budget(void)
{
	int fd = orc_budget_create();
	orc_budget *b;

	CHECK(fd >= 0);
	b = attached(fd);
	close(fd);
	return b;
}

static orc_bucket *exits_of(orc_budget *b)
{
	return orc_budget_bucket(b, ORC_EXITS);
}

static pid_t child(void (*run)(orc_budget *, void *), orc_budget *shared, void *argument)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		run(shared, argument);
		_exit(0);
	}
	return pid;
}

static void reap(pid_t pid)
{
	int status;

	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status), "status %#x", status);
}

/* ---- the file ------------------------------------------------------------------------------------------------- */

static void refused(int fd, const char *why)
{
	const char *problem = NULL;

	CHECK(!orc_budget_attach(fd, &problem));
	CHECK(problem && strstr(problem, why), "%s", problem);
}

static int memfd(const void *data, size_t size, int seals)
{
	int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size);
	CHECK(!seals || !fcntl(fd, F_ADD_SEALS, seals));
	return fd;
}

static void a_file_that_is_no_budget_is_refused_and_says_why(void)
{
	int good = orc_budget_create(), plain = open("/tmp", O_TMPFILE | O_RDWR, 0600), fd, pipes[2];
	struct orc_budget_file image, changed;
	char path[64];

	CHECK(pread(good, &image, sizeof image, 0) == sizeof image);
	refused(-1, "memfd");
	CHECK(plain >= 0 && write(plain, &image, sizeof image) == sizeof image);
	refused(plain, "memfd");
	CHECK(!pipe(pipes));
	refused(pipes[0], "memfd");
	close(pipes[0]), close(pipes[1]), close(plain);

	refused(fd = memfd(&image, sizeof image, 0), "shrinking");
	close(fd);
	refused(fd = memfd(&image, sizeof image - 1, F_SEAL_SHRINK), "size");
	close(fd);
	refused(fd = memfd("", 0, F_SEAL_SHRINK), "size");
	close(fd);
	for (size_t i = 0; i < offsetof(struct orc_budget_file, meters) + sizeof image.meters; i++) { /* each byte of the head */
		memcpy(&changed, &image, sizeof image);
		((uint8_t *)&changed)[i] ^= 1;
		refused(fd = memfd(&changed, sizeof changed, F_SEAL_SHRINK), i < 8 ? "begin" : i < 12 ? "version" : "sizes");
		close(fd);
	}
	memcpy(&changed, &image, sizeof image);
	changed.bucket[1].slot[1][ORC_SINCE].value = orc_now() + 3600 * SECOND;
	refused(fd = memfd(&changed, sizeof changed, F_SEAL_SHRINK), "clock");
	close(fd);

	snprintf(path, sizeof path, "/proc/self/fd/%d", good);
	refused(fd = open(path, O_RDONLY), "mapped");
	close(fd);
	CHECK(ftruncate(good, 0) && errno == EPERM, "what is attached can't be cut short");
	CHECK(ftruncate(good, 1 << 20) && errno == EPERM);
	orc_budget_detach(attached(good));
	close(good);
}

static void whatever_the_file_holds_nothing_hangs_and_no_number_is_out_of_range(void)
{
	orc_budget *b = new_budget();
	orc_bucket *bucket = exits_of(b);
	uint64_t seed = 11;

	for (int round = 0; round < 500; round++) {
		struct orc_ticket ticket;
		struct orc_limit limit;
		orc_ns tokens, delay;

		for (size_t i = 0; i < sizeof *bucket / 8; i++)
			if (random_number(&seed) % 4)
				((uint64_t *)bucket)[i] = random_number(&seed) % 3 ? random_number(&seed) : 0x7ffull << 52;
		orc_bucket_charge_many(bucket, 4096, orc_now(), &ticket);
		orc_bucket_turn(bucket, &ticket, &tokens, &delay);
		orc_bucket_leave(bucket, &ticket);
		orc_bucket_limit(bucket, orc_now(), &limit);
		orc_bucket_set(bucket, round % 2 ? 10 : 0, 1, -1, orc_now());
	}
	orc_budget_detach(b);
}

/* ---- several processes ---------------------------------------------------------------------------------------- */

enum { PROCESSES = 4, CHARGES = 20000 };

static void charge_many_times(orc_budget *b, void *argument)
{
	struct orc_ticket ticket, before = {.number = 0};

	(void)argument;
	for (int i = 0; i < CHARGES; i++, before = ticket) {
		orc_bucket_charge(exits_of(b), 0, &ticket);
		CHECK(ticket.number > before.number && ticket.number % 65536 == 0);
	}
}

static void processes_take_each_ticket_once_while_another_changes_the_limit(void)
{
	orc_budget *b = new_budget();
	struct orc_ticket next;
	pid_t pids[PROCESSES];
	uint64_t seed = 3;

	orc_bucket_set(exits_of(b), 1000, 10, -1, 0);
	for (int i = 0; i < PROCESSES; i++)
		pids[i] = child(charge_many_times, b, NULL);
	for (int i = 0; i < 5000; i++) /* time stands still, so that tickets are 1, 2, 3, ... whatever the rate */
		CHECK(!orc_bucket_set(exits_of(b), 1 + random_part(&seed) * 1e6, 10, -1, 0));
	for (int i = 0; i < PROCESSES; i++)
		reap(pids[i]);
	orc_bucket_charge(exits_of(b), 0, &next);
	CHECK(next.number == (PROCESSES * CHARGES + 1) * 65536ll);
	orc_budget_detach(b);
}

enum { SETTERS = 3, SETS = 3000 };

static void set_many_times(orc_budget *b, void *argument)
{
	double rate = 10 + *(int *)argument;

	for (int i = 0; i < SETS; i++)
		CHECK(!orc_bucket_set(exits_of(b), rate, rate * 2, (orc_ns)rate * 3, 0));
}

static void changes_by_several_processes_are_one_after_the_other(void)
{
	orc_budget *b = new_budget();
	pid_t pids[SETTERS];
	int status, left = SETTERS;

	orc_bucket_set(exits_of(b), 10, 20, 30, 0);
	for (int i = 0; i < SETTERS; i++)
		pids[i] = child(set_many_times, b, &i);
	while (left) {
		struct orc_limit l;

		orc_bucket_limit(exits_of(b), 0, &l);
		CHECK(l.burst > 19.9 && l.burst - 2 * l.rate < 1e-3 && l.burst - 2 * l.rate > -1e-3, "%g %g", l.rate, l.burst);
		CHECK(l.max_delay == (orc_ns)(3 * l.rate + 0.5));
		for (int i = 0; i < SETTERS; i++)
			if (pids[i] && waitpid(pids[i], &status, WNOHANG) == pids[i]) {
				CHECK(!status, "%#x", status);
				pids[i] = 0;
				left--;
			}
	}
	orc_budget_detach(b);
}

/* A vCPU of another process: waits for its turn. */
static void wait_for_a_turn(orc_budget *b, void *argument)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v;
	struct orc_record record = {.reason = KVM_EXIT_HLT};

	(void)argument;
	orc_fleet_share(f, b);
	v = orc_vcpu_new(f, 0, 8);
	orc_vcpu_set_bucket(v, ORC_EXITS, 0, exits_of(b));
	orc_vcpu_account(v, &record, orc_now());
	CHECK(orc_wait_turn(v));
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static bool someone_waits(orc_budget *b)
{
	struct orc_limit l;

	orc_bucket_limit(exits_of(b), 0, &l);
	return l.debt >= 1;
}

static void a_changed_limit_ends_waits_in_all_processes(void)
{
	/* Woken; woken, where the kernel can't wait for two words; and with nobody left who would wake them. */
	for (int how = 0; how < 3; how++) {
		orc_budget *b = new_budget();
		pid_t pids[2];
		orc_ns before;

		b->alone = how == 1;
		orc_bucket_set(exits_of(b), 0.01, 1, -1, orc_now());
		for (int i = 0; i < 2; i++)
			pids[i] = child(wait_for_a_turn, b, NULL);
		while (!someone_waits(b))
			sched_yield();
		before = orc_now();
		CHECK(!orc_bucket_set(exits_of(b), how == 1 ? 0 : 1e6, 1, -1, before));
		if (how < 2)
			orc_budget_changed(b);
		for (int i = 0; i < 2; i++)
			reap(pids[i]);
		CHECK(orc_now() - before < PATIENCE);
		orc_budget_detach(b);
	}
}

static void a_command_ends_the_wait_for_a_shared_turn(void)
{
	orc_budget *b = new_budget();
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v;
	struct orc_record record = {.reason = KVM_EXIT_HLT};

	orc_fleet_share(f, b);
	v = orc_vcpu_new(f, 0, 8);
	orc_vcpu_set_bucket(v, ORC_EXITS, 0, exits_of(b));
	orc_bucket_set(exits_of(b), 0.01, 1, -1, orc_now());
	orc_vcpu_account(v, &record, orc_now());
	orc_vcpu_command(v, ORC_PAUSE, 0);
	CHECK(!orc_wait_turn(v), "the ticket stays");
	orc_vcpu_free(v);
	orc_fleet_free(f);
	orc_budget_detach(b);
}

/* ---- death ---------------------------------------------------------------------------------------------------- */

/* A child that is traced and has stopped just before what it is to do. 0: this machine lets no process be traced. */
static pid_t traced(void (*run)(orc_budget *, void *), orc_budget *b, void *argument)
{
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL))
			_exit(77);
		raise(SIGSTOP);
		run(b, argument);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
		skipped = "this machine lets no process be traced";
		return 0;
	}
	return pid;
}

/* Executes one instruction of it. False: that was its last. */
static bool step(pid_t pid)
{
	int status;

	CHECK(!ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL));
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) ? !WEXITSTATUS(status) : WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "%#x", status);
	return !WIFEXITED(status);
}

/* What a death leaves behind is the file, as it is then. So each file that there was between two instructions is looked at, in
 * a copy. Returns how many of them `check` found true of, and of how many false. */
static void each_death(void (*run)(orc_budget *, void *), orc_budget *b, void *argument, bool (*check)(orc_budget *), int found[2])
{
	struct orc_budget_file before = {.magic = 0};
	pid_t pid = traced(run, b, argument);
	bool alive = pid;

	while (alive) {
		if (memcmp(&before, b->file, sizeof before)) {
			orc_budget *copy = new_budget();

			memcpy(&before, b->file, sizeof before);
			memcpy(copy->file, &before, sizeof before);
			found[check(copy)]++;
			orc_budget_detach(copy);
		}
		alive = step(pid);
	}
}

static struct orc_limit limit_now(orc_budget *b)
{
	struct orc_limit l;

	orc_bucket_limit(exits_of(b), SECOND, &l);
	return l;
}

static orc_ns next_turn(orc_budget *b, orc_ns now)
{
	struct orc_ticket ticket;
	orc_ns tokens, delay;

	orc_bucket_charge(exits_of(b), now, &ticket);
	orc_bucket_turn(exits_of(b), &ticket, &tokens, &delay);
	return tokens;
}

static void set_a_limit(orc_budget *b, void *argument)
{
	(void)argument;
	CHECK(!orc_bucket_set(exits_of(b), 500, 8, 70, SECOND));
	orc_budget_changed(b);
}

static void charge_once(orc_budget *b, void *argument)
{
	struct orc_ticket ticket;

	(void)argument;
	orc_bucket_charge_many(exits_of(b), 3, 0, &ticket);
}

static void leave_what_it_has(orc_budget *b, void *argument)
{
	orc_bucket_leave(exits_of(b), argument);
}

static bool is_new_limit(orc_budget *b)
{
	struct orc_limit l = limit_now(b);
	bool is_new = l.rate > 400;

	CHECK(is_new ? l.rate > 499 && l.burst == 8 && l.max_delay == 70 :
		       l.rate > 99 && l.rate < 101 && l.burst == 4 && l.max_delay == 50);
	CHECK(!orc_bucket_set(exits_of(b), 10, 2, -1, 2 * SECOND), "whoever comes next is not held up");
	CHECK(limit_now(b).rate < 11 && limit_now(b).burst == 2);
	return is_new;
}

static void a_setter_killed_at_any_instruction_leaves_the_old_limit_or_the_new_one(void)
{
	orc_budget *b = new_budget();
	int found[2] = {0, 0};

	orc_bucket_set(exits_of(b), 100, 4, 50, 0);
	each_death(set_a_limit, b, NULL, is_new_limit, found);
	CHECK(skipped || (found[0] == 10 && found[1] == 2), "%d %d: before it, claimed, 8 words; published, told", found[0],
	      found[1]);
	orc_budget_detach(b);
}

static bool is_charged(orc_budget *b)
{
	orc_ns turn = next_turn(b, 0) / (SECOND / 1000);

	CHECK(turn == 1000 || turn == 4000, "%lld", (long long)turn);
	CHECK(next_turn(b, 0) / (SECOND / 1000) == turn + 1000, "and from then on the rate is exact");
	return turn == 4000;
}

static void a_charger_killed_at_any_instruction_costs_the_others_its_ticket_at_most(void)
{
	orc_budget *b = new_budget();
	int found[2] = {0, 0};

	orc_bucket_set(exits_of(b), 1, 1, -1, 0);
	each_death(charge_once, b, NULL, is_charged, found);
	CHECK(skipped || (found[0] == 1 && found[1] == 1));
	orc_budget_detach(b);
}

static bool is_forgiven(orc_budget *b)
{
	orc_ns turn;

	orc_bucket_set(exits_of(b), 1, 1, -1, 0);
	turn = next_turn(b, 0) / (SECOND / 1000);
	CHECK(turn == 1000 || turn == 2000, "%lld", (long long)turn);
	return turn == 1000;
}

static void one_killed_on_its_way_to_freedom_owes_its_own_ticket_at_most(void)
{
	orc_budget *b = new_budget();
	int found[2] = {0, 0};
	struct orc_ticket tickets[4];

	orc_bucket_set(exits_of(b), 1, 1, -1, 0);
	for (int i = 0; i < 4; i++)
		orc_bucket_charge(exits_of(b), 0, &tickets[i]);
	orc_bucket_set(exits_of(b), 0, 1, -1, 0);
	for (int i = 1; i < 4; i++)
		orc_bucket_leave(exits_of(b), &tickets[i]);
	each_death(leave_what_it_has, b, &tickets[0], is_forgiven, found);
	CHECK(skipped || (found[0] == 1 && found[1] == 1));
	orc_budget_detach(b);
}

static void a_setter_that_slept_at_any_instruction_changes_nothing_that_came_after_it(void)
{
	bool alive = true;

	for (int n = 0; alive; n += STRIDE) {
		orc_budget *b = new_budget();
		struct orc_limit l;
		pid_t pid;

		orc_bucket_set(exits_of(b), 100, 4, 50, 0);
		pid = traced(set_a_limit, b, NULL);
		alive = pid;
		for (int i = 0; i < n && alive; i++)
			alive = step(pid);
		if (alive) {
			/* It may sleep in the middle of the slot that each of these writes. */
			for (int i = 1; i <= 3; i++) {
				CHECK(!orc_bucket_set(exits_of(b), i, i, i, SECOND));
				l = limit_now(b);
				CHECK(l.burst == i && l.max_delay == i && l.rate > i * 0.999 && l.rate < i * 1.001);
			}
			CHECK(!ptrace(PTRACE_DETACH, pid, NULL, NULL));
			reap(pid);
			/* It had not published, and then begins again: its limit is the last. Or it had. */
			l = limit_now(b);
			CHECK(l.rate > 400 ? l.burst == 8 && l.max_delay == 70 : l.burst == 3 && l.max_delay == 3);
			CHECK(l.debt <= 8, "no debt of another limit's, %g", l.debt);
		}
		orc_budget_detach(b);
	}
}

static void set_a_limit_if_it_can(orc_budget *b, void *nothing)
{
	int rc = orc_bucket_set(exits_of(b), 500, 3, -1, orc_now());

	(void)nothing;
	CHECK(!rc || rc == -EBUSY);
}

/* Somebody changes all that is read, between any two instructions. */
static void one_who_writes_to_the_file_all_the_time_keeps_nobody_in_a_loop(void)
{
	enum { MOST = 3 * 1000 * 1000 }; /* instructions, under the slowest of the sanitizers */
	void (*const run[])(orc_budget *, void *) = {set_a_limit_if_it_can, charge_once};

	for (int i = 0; i < 2; i++) {
		orc_budget *b = new_budget();
		orc_bucket *bucket = exits_of(b);
		pid_t pid;

		CHECK(!orc_bucket_set(bucket, 1000, 1, -1, 0));
		pid = traced(run[i], b, NULL);
		for (int steps = 0; pid && step(pid); steps++) {
			CHECK(steps < MOST);
			bucket->last++;
			for (int slot = 0; slot < 2; slot++)
				for (int word = 0; word < ORC_LIMIT_WORDS; word++)
					bucket->slot[slot][word].value ^= 1;
		}
		orc_budget_detach(b);
	}
}

static void processes_that_are_killed_while_they_wait_leave_no_count_behind(void)
{
	orc_budget *b = new_budget();
	orc_ns now = 0;

	orc_bucket_set(exits_of(b), 1000, 1, -1, now);
	for (int i = 0; i < 30; i++) {
		int status;
		pid_t pid = child(wait_for_a_turn, b, NULL);

		kill(pid, SIGKILL); /* wherever it is */
		CHECK(waitpid(pid, &status, 0) == pid);
	}
	/* Taking the limit off and setting it again, which forgives who went free, comes to the same each time. */
	now = orc_now() + SECOND;
	for (int round = 0; round < 100; round++) {
		struct orc_ticket waits[8];

		for (int i = 0; i < 8; i++)
			orc_bucket_charge(exits_of(b), now, &waits[i]);
		orc_bucket_set(exits_of(b), 0, 1, -1, now);
		for (int i = 0; i < 8; i++)
			orc_bucket_leave(exits_of(b), &waits[i]);
		orc_bucket_set(exits_of(b), 1000, 1, -1, now);
	}
	CHECK(next_turn(b, now) <= now + SECOND / 1000 + 2, "%lld", (long long)(next_turn(b, now) - now));
	orc_budget_detach(b);
}

const struct test budget_tests[] = {
	TEST(a_file_that_is_no_budget_is_refused_and_says_why),
	TEST(whatever_the_file_holds_nothing_hangs_and_no_number_is_out_of_range),
	TEST(processes_take_each_ticket_once_while_another_changes_the_limit),
	TEST(changes_by_several_processes_are_one_after_the_other),
	TEST(a_changed_limit_ends_waits_in_all_processes),
	TEST(a_command_ends_the_wait_for_a_shared_turn),
	TEST(a_setter_killed_at_any_instruction_leaves_the_old_limit_or_the_new_one),
	TEST(a_setter_that_slept_at_any_instruction_changes_nothing_that_came_after_it),
	TEST(a_charger_killed_at_any_instruction_costs_the_others_its_ticket_at_most),
	TEST(one_killed_on_its_way_to_freedom_owes_its_own_ticket_at_most),
	TEST(one_who_writes_to_the_file_all_the_time_keeps_nobody_in_a_loop),
	TEST(processes_that_are_killed_while_they_wait_leave_no_count_behind),
	{NULL, NULL},
};
