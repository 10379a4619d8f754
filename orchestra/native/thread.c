/* Threads of ours that run no guest. */
#include <signal.h>
#include <string.h>

#include "core.h"

int orc_thread_start(pthread_t *thread, const char *name, size_t stack, void *(*run)(void *), void *argument)
{
	enum { NAME = 16 }; /* pthread_setname_np(3): bytes */
	char cut[NAME] = {0};
	pthread_attr_t attributes;
	sigset_t all, before;
	int rc = -pthread_attr_init(&attributes);

	if (rc)
		return rc;
	if (stack)
		rc = -pthread_attr_setstacksize(&attributes, stack);
	if (!rc) {
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		rc = -pthread_create(thread, &attributes, run, argument);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attributes);
	if (!rc) {
		strncpy(cut, name, NAME - 1);
		pthread_setname_np(*thread, cut);
	}
	return rc;
}
