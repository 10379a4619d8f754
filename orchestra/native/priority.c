/* How the scheduler treats the thread of an event loop beside guests that keep every CPU busy (EEVDF).
 *
 *   nice    its weight. A loop that wants more than its share of a CPU waits until the others had theirs, 10 to 20 ms beside eight
 *           guests on two CPUs. With ORC_LOOP_NICE it weighs twice as much as a guest's thread (kernel/sched/core.c,
 *           sched_prio_to_weight). With more, what a hostile guest has the loop do takes too much from other guests. Needs CAP_SYS_NICE or RLIMIT_NICE (setrlimit(2)).
 *   slice   how long it runs at a time. Of the threads that share a CPU, one with a short slice has sooner deadlines, so it
 *           preempts the others when it wakes. It gets no more CPU time by that. sched_setattr(2) takes it for SCHED_OTHER as
 *           sched_runtime since Linux 6.12, with no privilege (kernel/sched/syscalls.c, __setparam_fair). Before, it ignores the
 *           field, and sched_getattr(2) reads 0.
 *
 * What the thread starts is to have neither: with the nice value the kernel is asked for that (SCHED_FLAG_RESET_ON_FORK). A slice
 * alone is inherited: without a privilege nobody could take that flag back, so threads that run guests or long work end it.
 */
#include <linux/sched.h>
#define sched_param kernel_sched_param /* headers before 6.7 or so define glibc's name once more */
#include <linux/sched/types.h>
#undef sched_param
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "orc.h"

enum {
	SHORT = 100 * 1000, /* ns: the least that the kernel takes */
	OTHER = SCHED_NORMAL, /* as the kernel calls SCHED_OTHER */
};

static bool get(int thread, struct sched_attr *out)
{
	memset(out, 0, sizeof *out);
	return !syscall(SYS_sched_getattr, thread, out, sizeof *out, 0) && out->sched_policy == OTHER;
}

/* Of the calling thread. The flags that are read say which fields are there, not what was asked, but for the one. */
static bool set(const struct sched_attr *as, int nice, orc_u64 slice, bool reset_on_fork)
{
	struct sched_attr to = *as;

	to.sched_nice = nice;
	to.sched_runtime = slice;
	to.sched_flags = reset_on_fork ? SCHED_FLAG_RESET_ON_FORK : 0;
	return !syscall(SYS_sched_setattr, 0, &to, 0);
}

static bool resets(const struct sched_attr *a)
{
	return a->sched_flags & SCHED_FLAG_RESET_ON_FORK;
}

orc_ns orc_slice(int thread)
{
	struct sched_attr a;

	return get(thread, &a) ? (orc_ns)a.sched_runtime : 0;
}

/* The kernel does not tell whether a slice was asked for. If it was, it is not ours to change. */
static bool shorten(void)
{
	struct sched_attr before, now;

	if (!get(0, &before) || !before.sched_runtime || !set(&before, before.sched_nice, 0, resets(&before)))
		return false;
	if (!get(0, &now) || now.sched_runtime != before.sched_runtime) {
		set(&before, before.sched_nice, before.sched_runtime, resets(&before));
		return false;
	}
	return set(&before, before.sched_nice, SHORT, resets(&before));
}

/* Another nice value than 0 is somebody's choice. */
static bool raise_nice(void)
{
	struct sched_attr a;

	return get(0, &a) && !a.sched_nice && !resets(&a) && set(&a, ORC_LOOP_NICE, a.sched_runtime, true);
}

unsigned orc_prefer(void)
{
	unsigned slice = shorten() ? ORC_PREFERRED_SLICE : 0, nice = raise_nice() ? ORC_PREFERRED_NICE : 0;

	return slice | nice;
}

void orc_prefer_no_more(unsigned which)
{
	struct sched_attr a;
	bool nice, slice;

	if (!get(0, &a))
		return;
	nice = which & ORC_PREFERRED_NICE && a.sched_nice == ORC_LOOP_NICE;
	slice = which & ORC_PREFERRED_SLICE && a.sched_runtime == SHORT;
	if (slice)
		a.sched_runtime = 0;
	/* To clear the flag takes CAP_SYS_NICE, which RLIMIT_NICE may have stood for. It does nothing to a thread of nice 0. */
	if (nice && (set(&a, 0, a.sched_runtime, false) || set(&a, 0, a.sched_runtime, true)))
		return;
	if (slice)
		set(&a, a.sched_nice, 0, resets(&a));
}
