#include <poll.h>

#include "io_rest.h"

enum {
	/* Notifications in a row for which there was no request. A driver makes one or two, when it is as fast as the device. */
	FOR_NOTHING = 16,
	PAUSE = 1000 * 1000, /* ns, after each further one: a guest that does nothing else costs 2 % of a CPU, and not all of it */
	LOOK_AGAIN = 50 * 1000 * 1000, /* ns: nobody wakes it when a limit on exits changes */
};

static void charge(struct orc_rest *r)
{
	orc_ns now = orc_now();

	for (int l = 0; l < ORC_LEVELS && r->bucket[l]; l++) {
		if (r->charged[l] || !orc_bucket_limited(r->bucket[l])) /* of one that waits for its turn no second one is needed */
			continue;
		r->charged[l] = orc_bucket_charge_many(r->bucket[l], r->notified, now, &r->ticket[l]);
		r->waits |= r->charged[l];
	}
}

void orc_rest_leave(struct orc_rest *r)
{
	for (int l = 0; l < ORC_LEVELS; l++) {
		if (r->charged[l])
			orc_bucket_leave(r->bucket[l], &r->ticket[l]);
		r->charged[l] = false;
	}
	r->waits = false;
}

static orc_ns turn_of(const struct orc_rest *r)
{
	orc_ns latest = ORC_NEVER;

	for (int l = 0; l < ORC_LEVELS; l++) {
		orc_ns by_tokens, by_delay;

		if (!r->charged[l])
			continue;
		orc_bucket_turn(r->bucket[l], &r->ticket[l], &by_tokens, &by_delay);
		if (by_delay < by_tokens)
			by_tokens = by_delay;
		if (by_tokens > latest)
			latest = by_tokens;
	}
	return latest;
}

void orc_rest_account(struct orc_rest *r)
{
	if (r->taken)
		r->for_nothing = 0;
	else if (r->notified && (r->for_nothing += r->notified) > FOR_NOTHING) {
		r->for_nothing = FOR_NOTHING + 1; /* it does not wrap */
		r->pause = orc_now() + PAUSE;
	}
	if (r->notified)
		charge(r);
	r->taken = r->notified = 0;
}

orc_ns orc_rest_until(struct orc_rest *r)
{
	bool held = atomic_load(&r->held);
	orc_ns now, until = ORC_NEVER, turn;

	if (!r->pause && !r->waits && !held)
		return ORC_NEVER;
	now = orc_now();
	if (held)
		until = now + LOOK_AGAIN;
	turn = turn_of(r);
	if (turn <= now)
		orc_rest_leave(r);
	else if (turn > until)
		until = turn < now + LOOK_AGAIN ? turn : now + LOOK_AGAIN;
	if (r->pause <= now)
		r->pause = 0;
	else if (r->pause > until)
		until = r->pause;
	return until;
}

void orc_rest_sleep(int wake, orc_ns until)
{
	struct pollfd fd = {.fd = wake, .events = POLLIN};
	orc_ns left = until - orc_now();

	if (left > 0)
		ppoll(&fd, 1, &(struct timespec){left / 1000000000, left % 1000000000}, NULL);
}
