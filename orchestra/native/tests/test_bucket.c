#include <math.h>
#include <string.h>

#include "check.h"

static orc_bucket *limited(double rate, double burst, orc_ns max_delay)
{
	orc_bucket *b = orc_bucket_new();

	CHECK(b);
	orc_bucket_set(b, rate, burst, max_delay, 0);
	return b;
}

static struct orc_ticket charge(orc_bucket *b, orc_ns now)
{
	struct orc_ticket ticket;

	orc_bucket_charge(b, now, &ticket);
	return ticket;
}

static orc_ns by_tokens(const orc_bucket *b, struct orc_ticket ticket)
{
	orc_ns tokens, delay;

	orc_bucket_turn(b, &ticket, &tokens, &delay);
	return tokens;
}

static orc_ns by_delay(const orc_bucket *b, struct orc_ticket ticket)
{
	orc_ns tokens, delay;

	orc_bucket_turn(b, &ticket, &tokens, &delay);
	return delay;
}

static bool near(orc_ns a, orc_ns b)
{
	return llabs(a - b) <= 2 + llabs(b) / 1000000000; /* turns are rounded up to a nanosecond */
}

static void one_source_never_exceeds_burst_plus_rate_times_t_in_any_window(void)
{
	enum { EVENTS = 1500 };
	static orc_ns at[EVENTS];
	const double rates[] = {0.7, 13, 1000, 333333, 2e7}, bursts[] = {1, 1.5, 2, 20, 333};
	uint64_t seed = 1;

	for (size_t r = 0; r < 5; r++) {
		for (size_t u = 0; u < 5; u++) {
			double rate = rates[r], burst = bursts[u];
			orc_bucket *b = limited(rate, burst, -1);
			orc_ns now = (orc_ns)(random_part(&seed) * 1e12);

			for (int i = 0; i < EVENTS; i++) {
				struct orc_ticket ticket = charge(b, now);
				orc_ns turn = by_tokens(b, ticket);
				double rest = random_part(&seed);

				at[i] = now;
				if (turn > now)
					now = turn;
				/* At once, soon, or after a rest that fills the bucket. */
				if (rest < 0.01)
					now += (orc_ns)(2e9 * burst / rate);
				else if (rest < 0.3)
					now += (orc_ns)(random_part(&seed) * 2e9 / rate);
			}
			for (int i = 0; i < EVENTS; i++)
				for (int j = i; j < EVENTS; j++)
					CHECK(j - i + 1 <= burst + rate * (double)(at[j] - at[i]) / 1e9 + 1e-3,
					      "rate %g burst %g: %d events in %lld ns", rate, burst, j - i + 1,
					      (long long)(at[j] - at[i]));
			orc_bucket_free(b);
		}
	}
}

static void a_busy_source_gets_all_of_the_rate(void)
{
	orc_bucket *b = limited(1000, 10, -1);
	orc_ns now = 0, turn;

	for (int i = 0; i < 10010; i++) {
		turn = by_tokens(b, charge(b, now));
		/* Woken 5 ms late each time: the burst makes up for it. */
		now = turn > now ? turn + 5000000 : now;
	}
	CHECK(now <= 10 * SECOND + 6000000, "%lld", (long long)now);
	orc_bucket_free(b);
}

static void turns_come_in_the_order_of_the_charges(void)
{
	orc_bucket *b = limited(100, 5, -1);
	orc_ns last = ORC_NEVER, turn;

	for (int i = 0; i < 1000; i++) {
		turn = by_tokens(b, charge(b, i * 1000));
		CHECK(turn > last || i < 4);
		CHECK(i < 4 ? turn <= i * 1000 : near(turn, (i - 3) * SECOND / 100), "%d: %lld", i, (long long)turn);
		last = turn;
	}
	orc_bucket_free(b);
}

static void a_new_rate_moves_turns_by_what_is_left_to_make(void)
{
	orc_bucket *b = limited(10, 1, -1);
	struct orc_ticket tickets[3];

	for (int i = 0; i < 3; i++)
		tickets[i] = charge(b, 0);
	CHECK(near(by_tokens(b, tickets[0]), SECOND / 10));
	orc_bucket_set(b, 100, 1, -1, SECOND / 20); /* half of the first token is made: the other half takes 5 ms */
	CHECK(near(by_tokens(b, tickets[0]), SECOND / 20 + 5000000));
	CHECK(near(by_tokens(b, tickets[1]), SECOND / 20 + 15000000));
	CHECK(near(by_tokens(b, tickets[2]), SECOND / 20 + 25000000));
	orc_bucket_set(b, 1, 1, -1, SECOND / 20);
	CHECK(near(by_tokens(b, tickets[0]), SECOND / 20 + SECOND / 2));
	orc_bucket_set(b, 1, 3, -1, SECOND / 20); /* a larger burst is earned and not given */
	CHECK(near(by_tokens(b, tickets[0]), SECOND / 20 + SECOND / 2));
	CHECK(near(by_tokens(b, tickets[2]), SECOND / 20 + 5 * SECOND / 2));
	orc_bucket_free(b);
}

static void a_used_burst_is_no_debt_when_the_limit_is_lowered(void)
{
	orc_bucket *b = limited(100000, 5000, -1);
	struct orc_ticket last;

	for (int i = 0; i < 5000; i++)
		last = charge(b, 0);
	CHECK(near(by_tokens(b, last), 10000)); /* the last of the burst: 1/100000 s */
	orc_bucket_set(b, 10, 1, -1, 0);
	CHECK(near(by_tokens(b, last), SECOND / 10));
	CHECK(near(by_tokens(b, charge(b, 0)), 2 * SECOND / 10));
	orc_bucket_free(b);
}

static void changing_the_burst_to_and_fro_makes_no_tokens(void)
{
	orc_bucket *b = limited(1, 100, -1);
	struct orc_ticket ticket;

	for (int i = 0; i < 50; i++)
		ticket = charge(b, 0);
	for (int i = 0; i < 10; i++) {
		orc_bucket_set(b, 1, 60, -1, 0);
		orc_bucket_set(b, 1, 100, -1, 0);
	}
	for (int i = 0; i < 49; i++)
		ticket = charge(b, 0);
	CHECK(by_tokens(b, ticket) <= 0); /* 99 of the 100 go at once, as if nothing had been changed */
	ticket = charge(b, 0);
	CHECK(near(by_tokens(b, ticket), SECOND));
	orc_bucket_free(b);
}

static void random_changes_of_the_limit_keep_the_order(void)
{
	uint64_t seed = 7;

	for (int round = 0; round < 200; round++) {
		orc_bucket *b = limited(50, 3, -1);
		struct orc_ticket tickets[40];
		orc_ns now = 0;

		for (int i = 0; i < 40; i++) {
			now += (orc_ns)(random_part(&seed) * 1e8);
			if (random_part(&seed) < 0.3)
				orc_bucket_set(b, exp(random_part(&seed) * 20 - 5), 1 + random_part(&seed) * 50, -1,
					       now);
			tickets[i] = charge(b, now);
			for (int j = 1; j <= i; j++)
				CHECK(by_tokens(b, tickets[j - 1]) <= by_tokens(b, tickets[j]) ||
				      by_tokens(b, tickets[j]) <= now);
		}
		orc_bucket_free(b);
	}
}

static void without_a_limit_nobody_waits_and_the_bucket_goes_on_at_the_old_rate(void)
{
	orc_bucket *b = orc_bucket_new();
	struct orc_ticket old;

	CHECK(!orc_bucket_limited(b));
	orc_bucket_set(b, 0, 1, -1, 0); /* none after none is none */
	CHECK(!orc_bucket_limited(b));
	orc_bucket_set(b, 1, 1, -1, 0);
	CHECK(orc_bucket_limited(b));
	for (int i = 0; i < 100; i++)
		old = charge(b, 0);
	CHECK(near(by_tokens(b, old), 100 * SECOND));
	orc_bucket_set(b, 0, 1, -1, SECOND);
	CHECK(!orc_bucket_limited(b));
	CHECK(by_tokens(b, old) == ORC_NEVER);
	orc_bucket_set(b, 2, 1, -1, 11 * SECOND); /* 11 of 100 are made: the other 89 come at the new rate */
	CHECK(near(by_tokens(b, old), 11 * SECOND + 89 * SECOND / 2));
	orc_bucket_free(b);
}

static void a_limit_taken_off_and_set_again_makes_no_tokens(void)
{
	orc_bucket *b = limited(1, 100, -1);
	struct orc_ticket ticket;

	for (int i = 0; i < 50; i++)
		charge(b, 0);
	for (int i = 0; i < 1000; i++) {
		orc_bucket_set(b, 0, 1, -1, 0);
		orc_bucket_set(b, 1, 100, -1, 0);
	}
	for (int i = 0; i < 49; i++)
		ticket = charge(b, 0);
	CHECK(!ticket.waits);
	CHECK(near(by_tokens(b, charge(b, 0)), SECOND), "50 were used, 50 were left");
	for (int i = 0; i < 100; i++) { /* 10 s in all, most of it without a limit */
		orc_bucket_set(b, 0, 1, -1, i * SECOND / 10);
		orc_bucket_set(b, 1, 100, -1, i * SECOND / 10 + 99 * SECOND / 1000);
	}
	for (int i = 0; i < 9; i++)
		ticket = charge(b, 10 * SECOND);
	CHECK(!ticket.waits);
	CHECK(charge(b, 10 * SECOND).waits);
	/* And no more than the burst, however long it was off. */
	orc_bucket_set(b, 0, 1, -1, 10 * SECOND);
	orc_bucket_set(b, 1, 100, -1, 10000 * SECOND);
	for (int i = 0; i < 99; i++)
		ticket = charge(b, 10000 * SECOND);
	CHECK(!ticket.waits);
	CHECK(charge(b, 10000 * SECOND).waits);
	orc_bucket_free(b);
}

static void who_waits_stays_before_newcomers_if_it_does_not_look_while_there_is_no_limit(void)
{
	orc_bucket *b = limited(1, 1, -1);
	struct orc_ticket waits[50], newcomer;

	for (int i = 0; i < 50; i++)
		waits[i] = charge(b, 0);
	orc_bucket_set(b, 0, 1, -1, SECOND);
	orc_bucket_set(b, 1, 1, -1, SECOND);
	newcomer = charge(b, SECOND);
	CHECK(by_tokens(b, waits[0]) <= SECOND);
	for (int i = 1; i < 50; i++)
		CHECK(near(by_tokens(b, waits[i]), (i + 1) * SECOND));
	CHECK(near(by_tokens(b, newcomer), 51 * SECOND), "%lld", (long long)by_tokens(b, newcomer));
	orc_bucket_free(b);
}

static void who_went_free_leaves_no_debt_to_the_others(void)
{
	orc_bucket *b = limited(1, 1, -1);
	struct orc_ticket waits[8];

	for (int round = 0; round < 1000; round++) {
		for (int i = 0; i < 8; i++)
			waits[i] = charge(b, 0);
		CHECK(near(by_tokens(b, waits[7]), 8 * SECOND), "round %d: %lld", round,
		      (long long)by_tokens(b, waits[7]));
		orc_bucket_set(b, 0, 1, -1, 0);
		for (int i = 0; i < 8; i++)
			orc_bucket_leave(b, &waits[i]);
		orc_bucket_set(b, 1, 1, -1, 0);
	}
	for (int i = 0; i < 8; i++)
		waits[i] = charge(b, 0);
	orc_bucket_set(b, 0, 1, -1, 0);
	for (int i = 0; i < 7; i++) /* one does not look, and waits on */
		orc_bucket_leave(b, &waits[i]);
	orc_bucket_set(b, 1, 1, -1, 0);
	CHECK(near(by_tokens(b, waits[7]), SECOND));
	CHECK(near(by_tokens(b, charge(b, 0)), 2 * SECOND));
	orc_bucket_free(b);
}

static void a_slow_limit_that_is_changed_often_makes_all_of_its_tokens(void)
{
	const double rates[] = {1e-6, 1e-3, 0.7, 13};

	for (int i = 0; i < 4; i++) {
		orc_bucket *b = limited(rates[i], 1, -1);
		struct orc_ticket ticket = charge(b, 0), again;
		double due = 1e9 / rates[i];
		orc_ns now = 0;

		for (int change = 1; change <= 100000; change++) {
			now = (orc_ns)(due * 2 / 100000 * change);
			orc_bucket_set(b, change % 3 ? rates[i] : 0, 1, change % 2 ? -1 : SECOND, now);
		}
		orc_bucket_set(b, rates[i], 1, -1, now);
		again = charge(b, now);
		CHECK(by_tokens(b, ticket) <= now);
		CHECK(fabs((double)by_tokens(b, again) - (double)now - due) < due / 1e4 + 3, "%g: %g", rates[i],
		      (double)(by_tokens(b, again) - now) / due);
		orc_bucket_free(b);
	}
}

static void max_delay_bounds_each_wait(void)
{
	orc_bucket *b = limited(1, 1, SECOND / 2);

	for (int i = 0; i < 100; i++)
		CHECK(by_delay(b, charge(b, i)) == i + SECOND / 2);
	orc_bucket_set(b, 1, 1, SECOND / 4, 0);
	CHECK(by_delay(b, charge(b, 5)) == 5 + SECOND / 4);
	orc_bucket_set(b, 1, 1, -1, 0);
	CHECK(by_delay(b, charge(b, 5)) == INT64_MAX);
	orc_bucket_free(b);
}

static void max_delay_leaves_no_debt_larger_than_itself(void)
{
	const double bursts[] = {1, 20};

	for (int i = 0; i < 2; i++) {
		orc_bucket *b = limited(10, bursts[i], SECOND);

		for (int event = 0; event < 100000; event++)
			charge(b, 0);
		CHECK(by_tokens(b, charge(b, 0)) <= SECOND + SECOND / 10 + 2);
		/* 1.2 seconds later nearly all of it is paid back: what comes then waits for its own token only. */
		CHECK(by_tokens(b, charge(b, SECOND * 12 / 10)) <= SECOND * 13 / 10 + 2);
		orc_bucket_free(b);
	}
}

static void a_max_delay_shorter_than_a_token_still_charges(void)
{
	orc_bucket *b = limited(1, 1, 1000);

	for (int i = 0; i < 1000; i++)
		charge(b, 0);
	CHECK(by_tokens(b, charge(b, 0)) > SECOND - 2);
	CHECK(by_tokens(b, charge(b, 0)) <= 3 * SECOND);
	orc_bucket_free(b);
}

static void the_slowest_and_the_fastest_rate_are_exact(void)
{
	for (double rate = 1e-9; rate < 2e9; rate *= 10) {
		orc_bucket *b = limited(rate, 1, -1);
		orc_ns now = 123456789;

		for (int i = 1; i <= 100; i++) {
			double turn = (double)by_tokens(b, charge(b, now)), due = (double)now + i * 1e9 / rate;

			/* Past 70 years a turn is only "far". */
			CHECK(due > 1.9e18 ? turn > 1.8e18 : fabs(turn - due) <= 1e-4 * 1e9 / rate + 3, "%g: %g %g", rate,
			      turn, due);
		}
		orc_bucket_free(b);
	}
}

static void years_at_a_high_rate_wrap_without_harm(void)
{
	const double rates[] = {1e9, 9.9e8, 1e7};

	for (int i = 0; i < 3; i++) {
		orc_bucket *b = limited(rates[i], 2, -1);

		/* Who sets the highest rate means "hardly any limit": it must still be so after 39 hours and after years. */
		for (orc_ns now = 0; now < 3 * 365 * 86400 * SECOND; now += 4321 * SECOND) {
			for (int event = 0; event < 3; event++) {
				orc_ns turn = by_tokens(b, charge(b, now));

				CHECK(turn <= now + 2000, "%g: %lld at %lld", rates[i], (long long)turn, (long long)now);
			}
			if (now / SECOND % 7 == 0)
				orc_bucket_set(b, rates[i], 2, -1, now);
		}
		orc_bucket_free(b);
	}
}

static void time_that_was_read_before_the_limit_was_set_does_not_run_backwards(void)
{
	orc_bucket *b = limited(10, 1, -1);
	struct orc_ticket first = charge(b, 5 * SECOND), second;

	orc_bucket_set(b, 10, 1, -1, 6 * SECOND);
	second = charge(b, 6 * SECOND - 500);
	CHECK(second.number > first.number);
	CHECK(near(by_tokens(b, second), 6 * SECOND + SECOND / 10));
	orc_bucket_free(b);
}

/* ---- threads -------------------------------------------------------------------------------------------------- */

enum { CHARGERS = 8, CHARGES = 20000 };
static orc_bucket *shared;
static struct orc_ticket taken[CHARGERS][CHARGES];
static _Atomic int charging;

static void *charger(void *argument)
{
	struct orc_ticket *mine = argument;

	for (int i = 0; i < CHARGES; i++)
		orc_bucket_charge(shared, 0, &mine[i]);
	atomic_fetch_sub(&charging, 1);
	return NULL;
}

static int by_number(const void *a, const void *b)
{
	int64_t x = ((const struct orc_ticket *)a)->number, y = ((const struct orc_ticket *)b)->number;

	return (x > y) - (x < y);
}

static void eight_threads_take_each_ticket_once_while_the_limit_changes(void)
{
	pthread_t threads[CHARGERS];
	struct orc_ticket *all = taken[0];
	uint64_t seed = 3;

	shared = limited(1000, 10, -1);
	charging = CHARGERS;
	for (int i = 0; i < CHARGERS; i++)
		threads[i] = start(charger, taken[i]);
	while (atomic_load(&charging)) /* time stands still, so that tickets are 1, 2, 3, ... whatever the rate */
		orc_bucket_set(shared, 1 + random_part(&seed) * 1e6, 10, -1, 0);
	for (int i = 0; i < CHARGERS; i++) {
		join(threads[i]);
		for (int j = 1; j < CHARGES; j++)
			CHECK(taken[i][j].number > taken[i][j - 1].number);
	}
	qsort(all, CHARGERS * CHARGES, sizeof *all, by_number);
	for (int i = 0; i < CHARGERS * CHARGES; i++)
		CHECK(all[i].number == (i + 1) * 65536ll, "ticket %d is %lld", i, (long long)all[i].number);
	orc_bucket_free(shared);
}

static _Atomic bool changing;

static void *changer(void *argument)
{
	(void)argument;
	for (int i = 0; i < 50000; i++)
		orc_bucket_set(shared, i & 1 ? 10 : 1000, 1, i & 1 ? SECOND : 2 * SECOND, 0);
	atomic_store(&changing, false);
	return NULL;
}

static void a_reader_sees_one_limit_or_the_other_and_never_a_mixture(void)
{
	struct orc_ticket ticket = {.number = 201 * 65536, .charged = 0};
	pthread_t thread;

	shared = limited(10, 1, SECOND);
	changing = true;
	thread = start(changer, NULL);
	while (atomic_load(&changing)) {
		orc_ns tokens, delay;

		orc_bucket_turn(shared, &ticket, &tokens, &delay);
		CHECK((near(tokens, 201 * SECOND / 10) && delay == SECOND) ||
		      (near(tokens, 201 * SECOND / 1000) && delay == 2 * SECOND), "%lld %lld", (long long)tokens,
		      (long long)delay);
	}
	join(thread);
	orc_bucket_free(shared);
}

static void many_at_once_are_charged_as_so_many_one_by_one(void)
{
	orc_bucket *one = orc_bucket_new(), *many = orc_bucket_new();
	struct orc_ticket last, all;
	bool waits = false;

	orc_bucket_set(one, 1000, 10, -1, 0);
	orc_bucket_set(many, 1000, 10, -1, 0);
	for (orc_ns now = 0; now < 3 * SECOND; now += SECOND / 7) {
		for (int i = 0; i < 300; i++)
			waits = orc_bucket_charge(one, now, &last);
		CHECK(orc_bucket_charge_many(many, 300, now, &all) == waits);
		CHECK(all.number == last.number && all.charged == last.charged);
	}
	orc_bucket_free(one);
	orc_bucket_free(many);
}

static double once(const orc_bucket *b)
{
	struct orc_limit l;

	orc_bucket_limit(b, 0, &l);
	return l.once;
}

static void what_is_given_once_goes_first_and_is_never_made_again(void)
{
	orc_bucket *b = limited(1, 10, -1);
	struct orc_ticket ticket;

	orc_bucket_set_once(b, 5);
	CHECK(!orc_bucket_charge_many(b, 4, 0, &ticket) && once(b) == 1);
	CHECK(!orc_bucket_charge_many(b, 10, 0, &ticket) && !once(b)); /* 1 and 9: with one more, the last token is used */
	CHECK(orc_bucket_charge(b, 0, &ticket) && near(by_tokens(b, ticket), SECOND));
	orc_bucket_leave(b, &ticket);
	CHECK(!orc_bucket_charge_many(b, 9, 1000 * SECOND, &ticket)); /* full again, and no more than that */
	CHECK(orc_bucket_charge(b, 1000 * SECOND, &ticket) && near(by_tokens(b, ticket), 1001 * SECOND));
	orc_bucket_free(b);
}

static void what_is_given_once_grows_by_what_is_more_than_was_ever_given(void)
{
	orc_bucket *b = limited(1, 1, -1);
	struct orc_ticket ticket;

	orc_bucket_set_once(b, 5);
	orc_bucket_charge_many(b, 3, 0, &ticket);
	for (int i = 0; i < 3; i++) {
		orc_bucket_set_once(b, 5);
		CHECK(once(b) == 2);
	}
	orc_bucket_set_once(b, 8);
	CHECK(once(b) == 5);
	orc_bucket_set_once(b, 1);
	CHECK(once(b) == 1);
	orc_bucket_set_once(b, 8);
	CHECK(once(b) == 1);
	orc_bucket_free(b);
}

static void *use_up(void *argument)
{
	struct orc_ticket ticket;
	orc_u64 went = 0;

	while (!orc_bucket_charge(argument, 0, &ticket))
		went++;
	orc_bucket_leave(argument, &ticket);
	return (void *)(uintptr_t)went;
}

static void threads_use_what_is_given_once_exactly_once(void)
{
	enum { THREADS = 8, ONCE = 100000 };
	orc_bucket *b = limited(1e-3, 1, -1);
	pthread_t thread[THREADS];
	uintptr_t went = 0;

	orc_bucket_set_once(b, ONCE);
	for (int i = 0; i < THREADS; i++)
		thread[i] = start(use_up, b);
	for (int i = 0; i < THREADS; i++) {
		void *its;

		CHECK(!pthread_join(thread[i], &its));
		went += (uintptr_t)its;
	}
	CHECK(went == ONCE);
	orc_bucket_free(b);
}

const struct test bucket_tests[] = {
	TEST(many_at_once_are_charged_as_so_many_one_by_one),
	TEST(one_source_never_exceeds_burst_plus_rate_times_t_in_any_window),
	TEST(a_busy_source_gets_all_of_the_rate),
	TEST(turns_come_in_the_order_of_the_charges),
	TEST(a_new_rate_moves_turns_by_what_is_left_to_make),
	TEST(a_used_burst_is_no_debt_when_the_limit_is_lowered),
	TEST(changing_the_burst_to_and_fro_makes_no_tokens),
	TEST(random_changes_of_the_limit_keep_the_order),
	TEST(without_a_limit_nobody_waits_and_the_bucket_goes_on_at_the_old_rate),
	TEST(a_limit_taken_off_and_set_again_makes_no_tokens),
	TEST(who_waits_stays_before_newcomers_if_it_does_not_look_while_there_is_no_limit),
	TEST(who_went_free_leaves_no_debt_to_the_others),
	TEST(a_slow_limit_that_is_changed_often_makes_all_of_its_tokens),
	TEST(max_delay_bounds_each_wait),
	TEST(max_delay_leaves_no_debt_larger_than_itself),
	TEST(a_max_delay_shorter_than_a_token_still_charges),
	TEST(the_slowest_and_the_fastest_rate_are_exact),
	TEST(years_at_a_high_rate_wrap_without_harm),
	TEST(time_that_was_read_before_the_limit_was_set_does_not_run_backwards),
	TEST(eight_threads_take_each_ticket_once_while_the_limit_changes),
	TEST(a_reader_sees_one_limit_or_the_other_and_never_a_mixture),
	TEST(what_is_given_once_goes_first_and_is_never_made_again),
	TEST(what_is_given_once_grows_by_what_is_more_than_was_ever_given),
	TEST(threads_use_what_is_given_once_exactly_once),
	{NULL, NULL},
};
