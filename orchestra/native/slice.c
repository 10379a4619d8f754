/* How long the scheduler lets a thread run at a time (EEVDF's slice). Of the threads that share a CPU, one with a short slice
 * waits for less: its deadlines are sooner, so it preempts the others when it wakes. It gets as much CPU time as before.
 *
 * sched_setattr(2) takes a slice for SCHED_OTHER as sched_runtime since Linux 6.12, with no privilege (kernel/sched/syscalls.c,
 * __setparam_fair). Before, it ignores the field, and sched_getattr(2) reads 0.
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

/* False: the thread is gone, or its policy has no slices, or this kernel has none. */
static bool get(int thread, struct sched_attr *out)
{
	memset(out, 0, sizeof *out);
	return !syscall(SYS_sched_getattr, thread, out, sizeof *out, 0) && out->sched_policy == OTHER && out->sched_runtime;
}

/* Of the calling thread, and nothing else of it: its nice value and flags are as they were read. 0: the default. */
static bool set(const struct sched_attr *as, orc_u64 slice)
{
	struct sched_attr to = *as;

	to.sched_runtime = slice;
	to.sched_flags &= SCHED_FLAG_RESET_ON_FORK; /* of the others the kernel says whether they are there, not what was asked */
	return !syscall(SYS_sched_setattr, 0, &to, 0);
}

orc_ns orc_slice(int thread)
{
	struct sched_attr a;

	return get(thread, &a) ? (orc_ns)a.sched_runtime : 0;
}

bool orc_slice_shorten(void)
{
	struct sched_attr before, now;

	if (!get(0, &before) || !set(&before, 0))
		return false;
	/* The kernel does not tell whether a slice was asked for. If it was, it is not ours to change. */
	if (!get(0, &now) || now.sched_runtime != before.sched_runtime) {
		set(&before, before.sched_runtime);
		return false;
	}
	return set(&before, SHORT);
}

void orc_slice_restore(void)
{
	struct sched_attr a;

	if (get(0, &a) && a.sched_runtime == SHORT)
		set(&a, 0);
}
