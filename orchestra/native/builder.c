/* Threads of a fleet that make its VMs. The fleet's thread hands over a plan and waits for an eventfd, so that no Python runs
 * and nobody waits for the interpreter lock while the kernel works.
 *
 * KVM_CREATE_VM is half of what a small VM takes. So a thread that has nothing to do after a VM makes the next one's
 * descriptor ahead, while Python does its part of a launch. That spare VM is empty, and goes after a second without a launch. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

enum {
	THREADS = 2, /* more would wait for each other: the kernel makes VMs under locks of the process and of the host */
	KEPT = 1,    /* seconds */
};

struct orc_builder {
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct orc_plan *first, **last; /* that wait */
	pthread_t thread[THREADS];
	unsigned threads, idle, waiting;
	int kvm;     /* for which a spare VM may be made; -1: none is wanted */
	int spare;   /* an empty VM; -1: there is none */
	bool making; /* a thread makes the spare VM */
	bool closing;
};

orc_builder *orc_builder_new(void)
{
	orc_builder *b = calloc(1, sizeof *b);
	pthread_condattr_t attributes;

	if (!b)
		return NULL;
	pthread_mutex_init(&b->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&b->more, &attributes);
	pthread_condattr_destroy(&attributes);
	b->last = &b->first;
	b->kvm = b->spare = -1;
	return b;
}

/* With the lock. A single plan waits for the spare VM that is being made: to make another would take longer. */
static struct orc_plan *take(orc_builder *b)
{
	struct orc_plan *plan = b->first;

	if (!plan || (b->making && b->waiting == 1))
		return NULL;
	b->first = plan->next;
	if (!b->first)
		b->last = &b->first;
	b->waiting--;
	return plan;
}

/* With the lock, which it gives up meanwhile. The plan is its owner's again once `done` is written. */
static void make(orc_builder *b, struct orc_plan *plan)
{
	int spare = b->spare, done = plan->done, kvm = plan->kvm;

	b->spare = -1;
	pthread_mutex_unlock(&b->lock);
	plan->result = orc_kvm_build_in(plan, spare);
	if (plan->result)
		kvm = -1; /* what the host lacks is not kept for later */
	eventfd_write(done, 1);
	pthread_mutex_lock(&b->lock);
	b->kvm = kvm;
}

/* With the lock, which it gives up meanwhile. */
static void make_spare(orc_builder *b)
{
	int kvm = b->kvm, vm;

	b->making = true;
	pthread_mutex_unlock(&b->lock);
	vm = (int)orc_ioctl_value(kvm, KVM_CREATE_VM, 0);
	pthread_mutex_lock(&b->lock);
	b->making = false;
	b->spare = vm < 0 ? -1 : vm;
	if (vm < 0)
		b->kvm = -1; /* the next plan finds out why, and says so */
	pthread_cond_broadcast(&b->more);
}

/* With the lock, which it gives up meanwhile. */
static void drop_spare(orc_builder *b)
{
	int vm = b->spare;

	b->spare = b->kvm = -1;
	if (vm >= 0) {
		pthread_mutex_unlock(&b->lock);
		close(vm);
		pthread_mutex_lock(&b->lock);
	}
}

static void rest(orc_builder *b)
{
	struct timespec until;

	b->idle++;
	if (b->spare < 0) {
		pthread_cond_wait(&b->more, &b->lock);
		b->idle--;
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += KEPT;
	if (pthread_cond_timedwait(&b->more, &b->lock, &until) == ETIMEDOUT && !b->first)
		drop_spare(b);
	b->idle--;
}

static void *work(void *argument)
{
	orc_builder *b = argument;
	struct orc_plan *plan;

	orc_prefer_no_more(ORC_PREFERRED); /* the thread of the event loop may have it */
	pthread_mutex_lock(&b->lock);
	for (;;) {
		if ((plan = take(b)))
			make(b, plan);
		else if (b->closing && !b->first)
			break;
		else if (!b->closing && b->kvm >= 0 && b->spare < 0 && !b->making)
			make_spare(b);
		else
			rest(b);
	}
	pthread_mutex_unlock(&b->lock);
	return NULL;
}

int orc_builder_begin(orc_builder *b, struct orc_plan *plan, int done)
{
	int rc = 0;

	plan->done = done;
	plan->next = NULL;
	pthread_mutex_lock(&b->lock);
	if (b->idle <= b->waiting && b->threads < THREADS && !b->making) {
		rc = -pthread_create(&b->thread[b->threads], NULL, work, b);
		if (!rc)
			pthread_setname_np(b->thread[b->threads++], "builder");
	}
	if (b->threads) { /* those that there are will come to it */
		rc = 0;
		*b->last = plan;
		b->last = &plan->next;
		b->waiting++;
		pthread_cond_signal(&b->more);
	}
	pthread_mutex_unlock(&b->lock);
	return rc;
}

void orc_builder_free(orc_builder *b)
{
	pthread_mutex_lock(&b->lock);
	b->closing = true;
	pthread_cond_broadcast(&b->more);
	pthread_mutex_unlock(&b->lock);
	for (unsigned i = 0; i < b->threads; i++)
		pthread_join(b->thread[i], NULL);
	if (b->spare >= 0)
		close(b->spare);
	pthread_cond_destroy(&b->more);
	pthread_mutex_destroy(&b->lock);
	free(b);
}
