/* The threads that run vCPUs. They are made here and not by Python, as most guests never need the interpreter: their threads
 * have no state in it, and starting one is a clone and no conversation about the interpreter lock. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core.h"

enum { NAME = 16 }; /* pthread_setname_np(3): bytes */

struct orc_runner {
	orc_vcpu *v;
	orc_runner_run *run;
	orc_runner_proceed *proceed;
	void *context;
	pthread_t thread;
	struct orc_stack_memory *stack;
	int tid;
	char name[NAME];
};

/* The thread's number is in the number of its clock (include/linux/posix-timers_types.h), which its parent knows at once:
 * asking the thread itself would mean to wait until it has had a CPU. */
static int number_of(pthread_t thread)
{
	clockid_t clock;

	return pthread_getcpuclockid(thread, &clock) ? -1 : ~(clock >> 3);
}

static void *begin(void *argument)
{
	orc_runner *r = argument;

	orc_prefer_no_more(ORC_PREFERRED);
	orc_vcpu_attach(r->v);
	r->proceed(r->context, (int)r->run(r->v));
	return NULL;
}

int orc_runner_start(orc_vcpu *v, const char *name, orc_runner_run *run, orc_runner_proceed *proceed, void *context,
		     orc_runner **out)
{
	struct orc_stock *stock = &v->fleet->stock;
	orc_runner *r = calloc(1, sizeof *r);
	pthread_attr_t attr;
	int rc;

	if (!r)
		return -ENOMEM;
	*r = (orc_runner){.v = v, .run = run, .proceed = proceed, .context = context};
	strncpy(r->name, name, NAME - 1);
	if ((rc = orc_stock_stack(stock, &r->stack)))
		goto no_stack;
	if ((rc = -pthread_attr_init(&attr)))
		goto no_thread;
	rc = -pthread_attr_setstack(&attr, r->stack->memory, r->stack->size);
	if (!rc)
		rc = -pthread_create(&r->thread, &attr, begin, r);
	pthread_attr_destroy(&attr);
	if (!rc) {
		r->tid = number_of(r->thread); /* the vCPU is held: its thread has not ended */
		/* Here, and not by the thread itself: whoever has launched a VM finds its threads by their names. */
		pthread_setname_np(r->thread, r->name);
		*out = r;
		return 0;
	}
no_thread:
	orc_stock_stack_back(stock, r->stack);
no_stack:
	free(r);
	return rc;
}

int orc_runner_tid(const orc_runner *r)
{
	return r->tid;
}

void orc_runner_join(orc_runner *r)
{
	pthread_join(r->thread, NULL);
	orc_stock_stack_back(&r->v->fleet->stock, r->stack);
	free(r);
}
