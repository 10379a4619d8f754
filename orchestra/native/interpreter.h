/* How a thread of the core's goes into Python. Part of cffi's module alone, as nothing else here knows of Python.h. */

#include <unistd.h>

static void orc_proceed(void *, int); /* Python's: native/core.py */

/* A program may leave without closing its fleets. Its guests run on until the process has ended, and one may need the
 * interpreter when that is gone: a thread that has no state in it can't have one then, and PyGILState_Ensure crashes. */
static void wait_if_it_is_gone(void)
{
	while (!Py_IsInitialized())
		pause();
}

static void orc_enter(void *context, int why)
{
	/* By hand, though cffi would do it: the thread's state in the interpreter is freed here, when it leaves. cffi keeps it
	 * until the next such thread comes. */
	PyGILState_STATE state;

	wait_if_it_is_gone();
	state = PyGILState_Ensure();
	orc_proceed(context, why);
	PyGILState_Release(state);
}
