/* Plays vCPUs whose guests exit at a set rate: a thread that does what orc_kvm_run does after each KVM_RUN. Only
 * KVM_RUN itself is left out, which on some hosts takes too long for the rate. The core's functions are handed in. */
#include <pthread.h>
#include <sys/prctl.h>
#include <time.h>

#include "orc.h"

typedef orc_ns account_function(orc_vcpu *, struct orc_record *, orc_ns);
typedef orc_ns now_function(void);

struct production {
	account_function *account;
	now_function *now;
	orc_vcpu **vcpus;
	int64_t vcpu_count;
	double rate;    /* records a second, of all vCPUs together */
	int64_t total;  /* records to make */
	uint16_t reason, flags;
	int64_t latest; /* out: ns that it was behind its timetable at worst */
	int64_t took;   /* out: ns */
};

void produce(struct production *p)
{
	struct orc_record record = {.reason = p->reason, .flags = p->flags, .rip = 0x1000, .has_rip = 1};
	orc_ns start = p->now(), now = start, due;

	if (p->reason == KVM_EXIT_IO) {
		record.arg[0] = 0x80;
		record.arg[1] = record.arg[2] = record.arg[3] = 1;
		record.data_size = 1;
	}
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	p->latest = 0;
	for (int64_t made = 0; made < p->total; made++) {
		due = start + (orc_ns)((double)made / p->rate * 1e9);
		while (now < due) {
			/* Sleeps rather than spins, so that it does not cost the consumer a core: up to 50 us early. */
			struct timespec t = {.tv_sec = (due + 50000) / 1000000000, .tv_nsec = (due + 50000) % 1000000000};

			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
			now = p->now();
		}
		now = p->now();
		if (now - due > p->latest)
			p->latest = now - due;
		p->account(p->vcpus[made % p->vcpu_count], &record, now);
	}
	p->took = p->now() - start;
}
