#include <errno.h>
#include <signal.h>
#include <stddef.h>

#include "orc.h"

/* Its only effect is that KVM_RUN, or any other system call, returns with EINTR. */
static void empty(int number)
{
	(void)number;
}

int orc_signal_number(void)
{
	return SIGRTMIN + 5; /* away from SIGUSR1/2 and from the first real-time signals, which programs like to take */
}

int orc_signal_install(void)
{
	struct sigaction mine = {.sa_handler = empty}, old;

	if (sigaction(orc_signal_number(), NULL, &old))
		return -errno;
	if (old.sa_handler == empty)
		return 0;
	if (old.sa_handler != SIG_DFL)
		return -EBUSY;
	sigemptyset(&mine.sa_mask);
	/* SA_RESTART: ioctl(KVM_RUN) is not restarted by it; calls of a program that gets a stray signal are. */
	mine.sa_flags = SA_RESTART;
	return sigaction(orc_signal_number(), &mine, NULL) ? -errno : 0;
}
