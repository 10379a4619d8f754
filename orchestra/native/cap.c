/* CPU caps: each capped vCPU, and a VM's I/O thread, may use a part of one CPU. A thread of the fleet's, which runs while there are caps, looks at
 * the CPU time that a vCPU's thread has used, holds the vCPU outside the guest once its part of the period is spent, and
 * lets it go when the next begins. What was used too much is taken off the next period, so that the long run is exact.
 *
 * By CPU time and not by the clock, as cgroup v2's cpu.max counts (Documentation/admin-guide/cgroup-v2.rst): a guest that
 * waited for a CPU did not use it.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "core.h"
#include "virtio.h"

enum {
	PERIOD = 50 * 1000 * 1000, /* ns: short enough that a guest's timers hardly notice, long enough to cost nothing */
	LEAST_LOOK = 500 * 1000,
	MOST_DEBT = 4, /* periods */
};

struct orc_cap {
	struct orc_cap *next;
	orc_vcpu *v; /* or, NULL, */
	orc_io *io;  /* a VM's I/O thread, with the threads that work for it */
	double share;
	orc_ns used;  /* CPU time when the period began */
	orc_ns quota; /* of this period; negative: in debt */
	bool held;
};

struct orc_capper {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct orc_cap *caps;
	orc_ns period; /* when this one began */
	bool closing;
};

static orc_ns cpu_time(const struct orc_cap *c)
{
	struct timespec t;
	int tid = c->v ? atomic_load_explicit(&c->v->tid, memory_order_relaxed) : orc_io_tid(c->io);

	/* The id of another thread's CPU clock, as pthread_getcpuclockid makes it (linux/posix-timers.h: per-thread 4,
	 * CPUCLOCK_SCHED 2). The thread may have ended: then it uses nothing any more. */
	if (!tid || clock_gettime((clockid_t)(~(unsigned)tid << 3 | 6), &t))
		return -1;
	return (orc_ns)t.tv_sec * 1000000000 + t.tv_nsec + (c->v ? 0 : (orc_ns)orc_io_others(c->io));
}

static void hold(struct orc_cap *c, bool on)
{
	c->held = on;
	if (c->v)
		orc_vcpu_command(c->v, on ? ORC_CAP : 0, on ? 0 : ORC_CAP);
	else
		orc_io_rest(c->io, on);
}

static void begin_period(struct orc_cap *c)
{
	orc_ns now = cpu_time(c), spent = now < 0 ? 0 : now - c->used, quota = (orc_ns)(c->share * PERIOD);

	c->quota = quota + (c->quota < spent ? c->quota - spent : 0); /* what is left over is lost: no saving up */
	if (c->quota < -MOST_DEBT * (orc_ns)PERIOD)
		c->quota = -MOST_DEBT * (orc_ns)PERIOD;
	c->used = now < 0 ? c->used : now;
	if (c->held && c->quota > 0)
		hold(c, false);
}

/* Holds who has used up its part. When to look again, at the latest at `end`. */
static orc_ns look(struct orc_capper *capper, orc_ns now, orc_ns end)
{
	orc_ns next = end;

	for (struct orc_cap *c = capper->caps; c; c = c->next) {
		orc_ns used, left;

		if (c->held)
			continue;
		used = cpu_time(c);
		left = used < 0 ? PERIOD : c->quota - (used - c->used);
		if (left <= 0) {
			hold(c, true);
		} else if (now + left < next) {
			next = now + (left < LEAST_LOOK ? LEAST_LOOK : left);
		}
	}
	return next;
}

static void *run(void *argument)
{
	struct orc_capper *capper = argument;

	orc_prefer_no_more(ORC_PREFERRED);
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	pthread_mutex_lock(&capper->lock);
	capper->period = orc_now();
	while (!capper->closing) {
		orc_ns now = orc_now(), next;
		struct timespec until;

		if (!capper->caps) {
			pthread_cond_wait(&capper->more, &capper->lock);
			capper->period = orc_now();
			continue;
		}
		if (now >= capper->period + PERIOD) {
			/* Late by whole periods: they are gone, for everybody alike. */
			capper->period += (now - capper->period) / PERIOD * PERIOD;
			for (struct orc_cap *c = capper->caps; c; c = c->next)
				begin_period(c);
		}
		next = look(capper, now, capper->period + PERIOD);
		until = (struct timespec){.tv_sec = next / 1000000000, .tv_nsec = next % 1000000000};
		pthread_cond_timedwait(&capper->more, &capper->lock, &until);
	}
	pthread_mutex_unlock(&capper->lock);
	return NULL;
}

static struct orc_capper *start(void)
{
	struct orc_capper *capper = calloc(1, sizeof *capper);
	pthread_condattr_t monotonic;

	if (!capper)
		return NULL;
	pthread_mutex_init(&capper->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&capper->more, &monotonic);
	pthread_condattr_destroy(&monotonic);
	if (pthread_create(&capper->thread, NULL, run, capper)) {
		free(capper);
		return NULL;
	}
	return capper;
}

static void lift(struct orc_capper *capper, struct orc_cap *c)
{
	struct orc_cap **at = &capper->caps;

	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	if (c->held)
		hold(c, false);
	free(c);
}

static struct orc_cap *add(struct orc_capper *capper, orc_vcpu *v, orc_io *io, double share)
{
	struct orc_cap *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	c->v = v;
	c->io = io;
	c->used = cpu_time(c);
	c->used = c->used < 0 ? 0 : c->used;
	c->quota = (orc_ns)(share * PERIOD);
	c->next = capper->caps;
	capper->caps = c;
	return c;
}

/* *at: the cap that a thread has. */
static int put(orc_fleet *f, struct orc_cap **at, orc_vcpu *v, orc_io *io, double share)
{
	int rc = 0;

	/* By what is the vCPU's own: one whose set-up fails is freed by whoever made it, while the owner may start the capper. */
	if (share >= 1 && !*at)
		return 0;
	if (!f->capper && !(f->capper = start()))
		return -EAGAIN;
	pthread_mutex_lock(&f->capper->lock);
	if (share >= 1) {
		lift(f->capper, *at);
		*at = NULL;
	} else if (*at || (*at = add(f->capper, v, io, share))) {
		(*at)->share = share;
	} else {
		rc = -ENOMEM;
	}
	pthread_cond_signal(&f->capper->more);
	pthread_mutex_unlock(&f->capper->lock);
	return rc;
}

int orc_vcpu_cap(orc_vcpu *v, double share)
{
	return put(v->fleet, &v->cap, v, NULL, share);
}

int orc_io_cap(orc_fleet *f, orc_io *io, double share)
{
	return put(f, orc_io_cap_of(io), NULL, io, share);
}

void orc_capper_stop(struct orc_capper *capper)
{
	if (!capper)
		return;
	pthread_mutex_lock(&capper->lock);
	capper->closing = true;
	pthread_cond_signal(&capper->more);
	pthread_mutex_unlock(&capper->lock);
	pthread_join(capper->thread, NULL);
	while (capper->caps) {
		struct orc_cap *c = capper->caps;

		capper->caps = c->next;
		free(c);
	}
	pthread_cond_destroy(&capper->more);
	pthread_mutex_destroy(&capper->lock);
	free(capper);
}

/* Runner: outside the guest until the next period, or until there is something else to do. */
static void wait_cap(orc_vcpu *v)
{
	orc_ns begun = orc_now();

	for (;;) {
		uint32_t seen = orc_vcpu_wakes(v);

		if (orc_vcpu_commands(v) != ORC_CAP)
			break;
		orc_vcpu_sleep(v, seen);
	}
	orc_count(&v->capped, (orc_u64)(orc_now() - begun));
}

bool orc_commanded(orc_vcpu *v)
{
	if (orc_vcpu_commands(v) == ORC_CAP)
		wait_cap(v);
	return orc_vcpu_commands(v) & ~(uint32_t)ORC_CAP;
}
