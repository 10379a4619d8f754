#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

struct seen {
	int why, tid;
	char name[16];
	char *stack;
	sem_t come, go;
};

static enum orc_why run(orc_vcpu *v)
{
	(void)v;
	return ORC_COMMAND;
}

static void proceed(void *context, int why)
{
	struct seen *seen = context;
	char here;

	seen->why = why;
	seen->tid = (int)syscall(SYS_gettid);
	seen->stack = &here;
	CHECK(!pthread_getname_np(pthread_self(), seen->name, sizeof seen->name));
	sem_post(&seen->come);
	while (sem_wait(&seen->go))
		;
}

static orc_runner *begin(orc_vcpu *v, struct seen *seen)
{
	orc_runner *r;

	sem_init(&seen->come, 0, 0);
	sem_init(&seen->go, 0, 0);
	orc_vcpu_hold(v);
	CHECK(!orc_runner_start(v, "web-1/0", run, proceed, seen, &r));
	return r;
}

static void a_held_vcpu_runs_when_it_is_let_go_and_hands_over(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 1, 8);
	struct seen seen = {.why = -1};
	orc_runner *r = begin(v, &seen);
	int tid = orc_runner_tid(r);

	CHECK(tid > 0 && tid != getpid());
	CHECK(seen.why == -1);
	orc_vcpu_command(v, 0, ORC_HOLD);
	sem_wait(&seen.come);
	CHECK(seen.why == ORC_COMMAND);
	CHECK(seen.tid == tid, "%d, %d", seen.tid, tid);
	CHECK(!strcmp(seen.name, "web-1/0"));
	sem_post(&seen.go);
	orc_runner_join(r);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void stacks_are_used_again_and_never_by_two(void)
{
	enum { ROUNDS = 3, THREADS = 40 }; /* more than are in one mapping */
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v[THREADS];
	orc_runner *r[THREADS];
	static struct seen seen[THREADS];
	char *low = (char *)UINTPTR_MAX, *high = NULL;

	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i < THREADS; i++) {
			v[i] = orc_vcpu_new(f, (uint32_t)i, 8);
			CHECK((uintptr_t)v[i] % ORC_CACHE_LINE == 0);
			r[i] = begin(v[i], &seen[i]);
			orc_vcpu_command(v[i], 0, ORC_HOLD);
		}
		for (int i = 0; i < THREADS; i++) {
			sem_wait(&seen[i].come);
			for (int j = 0; j < i; j++)
				CHECK(seen[i].stack > seen[j].stack + 65536 || seen[i].stack < seen[j].stack - 65536);
			if (!round) {
				low = seen[i].stack < low ? seen[i].stack : low;
				high = seen[i].stack > high ? seen[i].stack : high;
			} else {
				CHECK(seen[i].stack >= low && seen[i].stack <= high, "a stack that none had before");
			}
		}
		for (int i = 0; i < THREADS; i++) {
			sem_post(&seen[i].go);
			orc_runner_join(r[i]);
			orc_vcpu_free(v[i]);
		}
	}
	orc_fleet_free(f);
}

static void the_page_below_a_stack_is_nobodys(void)
{
	orc_fleet *f = orc_fleet_new();
	struct orc_stack_memory *stack;
	pid_t child;
	int status;

	CHECK(!orc_stock_stack(&f->stock, &stack));
	stack->memory[0] = 1;
	stack->memory[stack->size - 1] = 1;
	if (!(child = fork())) {
		signal(SIGSEGV, SIG_DFL);
		*(volatile char *)(stack->memory - 1) = 1;
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "status %#x", status);
	orc_stock_stack_back(&f->stock, stack);
	orc_fleet_free(f);
}

/* Flags of the mapping that has that address, as /proc/PID/smaps has them (Documentation/filesystems/proc.rst). */
static bool mapping_has(const char *address, const char *flag)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	unsigned long low, high;
	bool here = false, has = false;
	char line[512];

	CHECK(smaps);
	while (fgets(line, sizeof line, smaps)) {
		if (sscanf(line, "%lx-%lx ", &low, &high) == 2)
			here = (unsigned long)address >= low && (unsigned long)address < high;
		else if (here && !strncmp(line, "VmFlags:", 8))
			has = strstr(line, flag);
	}
	fclose(smaps);
	return has;
}

static void a_stack_is_never_a_huge_page(void)
{
	orc_fleet *f = orc_fleet_new();
	struct orc_stack_memory *stack;

	CHECK(!orc_stock_stack(&f->stock, &stack));
	if (access("/sys/kernel/mm/transparent_hugepage", F_OK))
		skipped = "this kernel has no huge pages of its own accord";
	else
		CHECK(mapping_has(stack->memory + stack->size - 1, " nh"));
	orc_stock_stack_back(&f->stock, stack);
	orc_fleet_free(f);
}

static bool has_pages(const struct orc_stack_memory *stack)
{
	unsigned char there = 0;

	CHECK(!mincore(stack->memory + stack->size - 4096, 4096, &there));
	return there & 1;
}

static void so_many_stacks_keep_their_pages_and_are_used_first(void)
{
	enum { KEPT = 64, STACKS = KEPT + 40 };
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 1, 8);
	struct orc_stack_memory *stack[STACKS];
	int kept = 0;

	for (int i = 0; i < STACKS; i++)
		CHECK(!orc_stock_stack(&f->stock, &stack[i]));
	for (int round = 0; round < 3; round++) { /* of those that end some begin again, and their memory grows no more */
		int again = round ? KEPT / 2 : STACKS;

		for (int i = 0; i < again; i++) {
			stack[i]->memory[stack[i]->size - 1] = 1;
			CHECK(has_pages(stack[i]));
		}
		for (int i = 0; i < again; i++)
			orc_stock_stack_back(&f->stock, stack[i]);
		for (int i = 0; i < again; i++)
			CHECK(has_pages(stack[i]), "whoever joins a thread does not wait for the kernel");
		orc_vcpu_unbind(v);
		for (int i = 0; i < KEPT / 2; i++) {
			CHECK(!orc_stock_stack(&f->stock, &stack[i]));
			CHECK(has_pages(stack[i]), "one without pages, where there are some that have them");
		}
	}
	for (int i = KEPT / 2; i < STACKS; i++)
		CHECK(!orc_stock_stack(&f->stock, &stack[i]));
	for (int i = 0; i < STACKS; i++)
		kept += has_pages(stack[i]);
	CHECK(kept == KEPT, "%d", kept);
	for (int i = 0; i < STACKS; i++)
		orc_stock_stack_back(&f->stock, stack[i]);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

const struct test runner_tests[] = {
	TEST(a_held_vcpu_runs_when_it_is_let_go_and_hands_over),
	TEST(stacks_are_used_again_and_never_by_two),
	TEST(the_page_below_a_stack_is_nobodys),
	TEST(a_stack_is_never_a_huge_page),
	TEST(so_many_stacks_keep_their_pages_and_are_used_first),
	{NULL, NULL},
};
