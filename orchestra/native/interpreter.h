/* How a thread of the core's goes into Python. Part of cffi's module alone, as nothing else here knows of Python.h. */

static void orc_proceed(void *, int); /* Python's: native/core.py */

static void orc_enter(void *context, int why)
{
	/* By hand, though cffi would do it: the thread's state in the interpreter is freed here, when it leaves. cffi keeps it
	 * until the next such thread comes. */
	PyGILState_STATE state = PyGILState_Ensure();

	orc_proceed(context, why);
	PyGILState_Release(state);
}
