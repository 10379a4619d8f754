/* A program that works for a VM, and ends with the thread that began it, also if that is killed. Python's subprocess can't do that
 * without running Python in the child, which is not safe where there are threads.
 *
 * vfork: a fork would copy the page tables of all guests. Until the child is another program it has our memory; so it
 * calls the kernel and nothing else, and no signal handler of ours runs in it. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "orc.h"

#if __has_include(<linux/close_range.h>)
#include <linux/close_range.h>
#endif

/* Numbers that older headers lack: asm-generic/unistd.h and linux/close_range.h of Linux 5.11. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1u << 2)
#endif

struct program {
	const char *path;
	char *const *argv;
	const int *keep;
	size_t n;
	int output, null, signal;
	pid_t parent;
	sigset_t mask;
};

static void reset_signals(const sigset_t *mask)
{
	/* Those that are ignored stay so over execve: Python ignores SIGPIPE. KILL and STOP are refused. */
	for (int number = 1; number <= SIGRTMAX; number++)
		signal(number, SIG_DFL);
	sigprocmask(SIG_SETMASK, mask, NULL);
}

/* In the child. Comes back if it could not become that program, with why. */
static int become(const struct program *p)
{
	if (prctl(PR_SET_PDEATHSIG, p->signal))
		return errno;
	if (getppid() != p->parent) /* which was killed before that */
		return ESRCH;
	setsid(); /* Ctrl-C at our terminal is for us, who tell it to end when its VM has */
	if (dup2(p->null, 0) < 0 || dup2(p->output, 1) < 0 || dup2(p->output, 2) < 0)
		return errno;
	syscall(SYS_close_range, 3, ~0u, CLOSE_RANGE_CLOEXEC); /* older kernels can't: ours are CLOEXEC anyway */
	for (size_t i = 0; i < p->n; i++)
		if (fcntl(p->keep[i], F_SETFD, 0))
			return errno;
	reset_signals(&p->mask);
	execv(p->path, p->argv);
	return errno;
}

/* Nothing but this is between vfork and the child's end: what a child changes of its caller's variables is not defined. Why it
 * failed goes through a pipe, which execve closes. */
static pid_t begin(const struct program *p, int report)
{
	pid_t pid = vfork();
	int failed;

	if (!pid) {
		failed = become(p);
		if (write(report, &failed, sizeof failed) < 0)
			_exit(126);
		_exit(127);
	}
	return pid;
}

static void close_both(const int *fd)
{
	close(fd[0]);
	close(fd[1]);
}

static pid_t begin_quietly(struct program *p, int report)
{
	sigset_t all;
	pid_t pid;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &p->mask);
	pid = begin(p, report);
	if (pid < 0)
		pid = -errno;
	pthread_sigmask(SIG_SETMASK, &p->mask, NULL);
	return pid;
}

int orc_spawn(const char *path, char *const *argv, const int *keep, size_t n, int output, int signal, int *pidfd)
{
	struct program p = {.path = path, .argv = argv, .keep = keep, .n = n, .output = output, .signal = signal, .parent = getpid()};
	int report[2], failed = 0;
	pid_t pid;

	p.null = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (p.null < 0)
		return -errno;
	if (pipe2(report, O_CLOEXEC)) {
		failed = errno;
		close(p.null);
		return -failed;
	}
	pid = begin_quietly(&p, report[1]);
	close(p.null);
	if (pid < 0) {
		close_both(report);
		return pid;
	}
	close(report[1]);
	while (read(report[0], &failed, sizeof failed) < 0 && errno == EINTR)
		;
	close(report[0]);
	if (!failed) {
		*pidfd = (int)syscall(SYS_pidfd_open, pid, 0); /* CLOEXEC by itself */
		if (*pidfd >= 0)
			return pid;
		failed = errno;
		kill(pid, SIGKILL);
	}
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return -failed;
}
