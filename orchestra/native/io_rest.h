/* When a VM's I/O thread rests, so that its guest gets no more of the host by it than by its vCPUs:
 *
 *   held            by the capper: its share of a CPU is used up
 *   turn            a notification was charged to the VM's budgets of exits, and its turn has not come
 *   pause           the guest notifies again and again for nothing
 *
 * All is the I/O thread's own, but what says otherwise. */
#ifndef ORC_IO_REST_H
#define ORC_IO_REST_H

#include "orc.h"

struct orc_rest {
	_Atomic bool held; /* any thread */
	orc_bucket *bucket[ORC_LEVELS]; /* from 0 on; set before the thread works */
	struct orc_ticket ticket[ORC_LEVELS];
	bool charged[ORC_LEVELS], waits; /* it has a ticket; any */
	orc_ns pause; /* the end of a pause; 0: none */
	unsigned notified, for_nothing; /* notifications: in this round of work; in a row without a request */
	orc_u64 taken; /* requests, in this round */
};

void orc_rest_account(struct orc_rest *); /* after a round of work */
orc_ns orc_rest_until(struct orc_rest *); /* when to look again; ORC_NEVER: it may work */
void orc_rest_sleep(int wake, orc_ns until); /* or until that eventfd is written */
void orc_rest_leave(struct orc_rest *); /* it waits for no turn any more */

#endif
