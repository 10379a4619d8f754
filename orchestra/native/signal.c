#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* Its only effect is that KVM_RUN, or any other system call, returns with EINTR. */
static void empty(int number)
{
	(void)number;
}

int orc_signal_number(void)
{
	/* A standard signal and not a real-time one: those are queued, a process's user may have RLIMIT_SIGPENDING of them
	 * in all its processes together, and with that used up tgkill fails with EAGAIN (sigqueue(3); kernel/signal.c,
	 * __send_signal_locked). A standard signal is only a bit, which needs no memory. SIGURG, since one that goes astray
	 * does nothing to a program that does not handle it, and since hardly any does; Go interrupts its threads with it for
	 * the same reasons (golang.org/design/24543-non-cooperative-preemption). */
	return SIGURG;
}

int orc_signal_send(int thread)
{
	return syscall(SYS_tgkill, getpid(), thread, orc_signal_number()) ? -errno : 0;
}

int orc_signal_install(void)
{
	struct sigaction mine = {.sa_handler = empty}, old;

	if (sigaction(orc_signal_number(), NULL, &old))
		return -errno;
	if (old.sa_handler != empty) {
		/* SIG_IGN does what SIG_DFL does to this signal; a process can inherit it. */
		if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN)
			return -EBUSY;
		sigemptyset(&mine.sa_mask);
		/* SA_RESTART: ioctl(KVM_RUN) is not restarted by it; calls of a program that gets a stray signal are. */
		mine.sa_flags = SA_RESTART;
		if (sigaction(orc_signal_number(), &mine, NULL))
			return -errno;
	}
	/* Whether it can be sent at all (a seccomp filter may forbid it) is known before a guest runs that only a kick stops. */
	return orc_signal_send((int)syscall(SYS_gettid));
}
