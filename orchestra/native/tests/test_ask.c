#include <poll.h>
#include <string.h>

#include "check.h"

enum { RUNNERS = 4, ROUNDS = 2000 };

/* A vCPU whose port is claimed by a task. */
struct asker {
	orc_fleet *f;
	orc_bus *ports, *mmio;
	orc_vcpu *v;
	uint8_t data[16];
	pthread_t thread;
	int wrong;
	uint32_t rounds;
};

static void open_asker(struct asker *a, orc_fleet *f, uint32_t id)
{
	const struct orc_claim claim = {.start = 0x500, .last = 0x507, .version = 7, .task = true};

	*a = (struct asker){.f = f, .ports = orc_bus_new(), .mmio = orc_bus_new(), .v = orc_vcpu_new(f, id, 8)};
	CHECK(orc_bus_replace(a->ports, &claim, 1) == 0);
	orc_vcpu_set_buses(a->v, a->ports, a->mmio);
}

static void close_asker(struct asker *a)
{
	orc_vcpu_free(a->v);
	orc_bus_free(a->ports);
	orc_bus_free(a->mmio);
}

static bool readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 0) == 1;
}

static void a_question_says_what_is_accessed_and_the_answer_comes_to_its_place(void)
{
	orc_fleet *f = orc_fleet_new();
	struct orc_question q[2];
	struct asker a;

	open_asker(&a, f, 3);
	CHECK(orc_fleet_asked_sleep(f) && !readable(orc_fleet_asked_eventfd(f, ORC_MAIN)));
	CHECK(orc_access_begin(a.v, ORC_IO, 0x502, 2, 3, false, a.data) == ORC_IO);
	CHECK(a.v->access.task && a.v->access.count == 1, "one element at a time");
	orc_ask(a.v, 99);
	CHECK(readable(orc_fleet_asked_eventfd(f, ORC_MAIN)) && orc_ask_open(a.v));
	CHECK(orc_fleet_asked(f, q, 2) == 1 && orc_fleet_asked_sleep(f) && !readable(orc_fleet_asked_eventfd(f, ORC_MAIN)));
	CHECK(q->vcpu == 3 && q->bus == ORC_IO && q->claim == 7 && q->address == 0x502 && q->size == 2 && !q->write &&
	      q->since == 99);
	CHECK(orc_vcpu_settle(a.v, q->number, ORC_ASK_ANSWERED, "ab", 2) && orc_ask_wait(a.v));
	CHECK(a.v->access.count == 1 && !memcmp(a.data, "ab", 2));
	CHECK(!orc_vcpu_settle(a.v, q->number, ORC_ASK_ANSWERED, "xy", 2), "it is settled");

	CHECK(orc_access_next(a.v)); /* the second element: nobody */
	orc_ask(a.v, 99);
	CHECK(orc_fleet_asked(f, q, 2) == 1 && orc_vcpu_settle(a.v, q->number, ORC_ASK_NOBODY, NULL, 0) && orc_ask_wait(a.v));
	CHECK(a.v->access.count == 1 && a.data[2] == 0xff && a.data[3] == 0xff);

	CHECK(orc_access_next(a.v)); /* the third: looked up again */
	orc_ask(a.v, 99);
	CHECK(orc_fleet_asked(f, q, 2) == 1 && orc_vcpu_settle(a.v, q->number, ORC_ASK_AGAIN, NULL, 0) && orc_ask_wait(a.v));
	CHECK(!a.v->access.count && orc_access_next(a.v) && a.v->access.address == 0x502);
	close_asker(&a);
	orc_fleet_free(f);
}

static void a_question_that_was_withdrawn_is_nobodys(void)
{
	orc_fleet *f = orc_fleet_new();
	struct orc_question q[2], old;
	struct asker a;

	open_asker(&a, f, 3);
	a.data[0] = 'w';
	CHECK(orc_access_begin(a.v, ORC_IO, 0x500, 1, 1, true, a.data) == ORC_IO);
	orc_ask(a.v, 1);
	orc_ask_question(a.v, &old);
	CHECK(old.write && old.data[0] == 'w');
	orc_vcpu_command(a.v, ORC_STOP, 0);
	CHECK(!orc_ask_wait(a.v), "there is a command");
	orc_ask_settled(a.v);
	CHECK(!a.v->access.count && !orc_fleet_asked(f, q, 2));
	CHECK(!orc_vcpu_settle(a.v, old.number, ORC_ASK_ANSWERED, NULL, 0));
	orc_ask(a.v, 1);
	CHECK(!orc_vcpu_settle(a.v, old.number, ORC_ASK_ANSWERED, NULL, 0), "another question");
	CHECK(orc_fleet_asked(f, q, 2) == 1 && q->number != old.number);
	orc_ask(a.v, 1); /* in a list when it is freed */
	close_asker(&a);
	CHECK(!orc_fleet_asked(f, q, 2));
	orc_fleet_free(f);
}

static void *ask_again_and_again(void *p)
{
	struct asker *a = p;

	for (uint32_t n = 0; n < ROUNDS; n++) {
		uint32_t commands;

		if (orc_access_begin(a->v, ORC_IO, 0x500, 4, 1, false, a->data) != ORC_IO)
			a->wrong++;
		orc_ask(a->v, 1);
		while (!orc_ask_wait(a->v)) /* a command in the middle of an answer: it goes on to wait */
			if ((commands = orc_vcpu_commands(a->v)))
				orc_vcpu_command(a->v, 0, commands);
		if (a->v->access.count != 1 || memcmp(a->data, &n, sizeof n))
			a->wrong++;
		if (orc_access_next(a->v))
			a->wrong++;
	}
	return NULL;
}

static void the_deputy_is_rung_in_the_main_tasks_place_and_gives_it_back(void)
{
	orc_fleet *f = orc_fleet_new();
	struct asker a;
	struct orc_question q[2];
	int main_task = orc_fleet_asked_eventfd(f, ORC_MAIN), deputy = orc_fleet_asked_eventfd(f, ORC_DEPUTY);

	open_asker(&a, f, 0);
	CHECK(orc_fleet_asked_sleep(f) && orc_fleet_asked_stand_in(f));
	orc_fleet_asked_ring(f);
	CHECK(readable(deputy) && !readable(main_task));
	orc_fleet_asked_give_back(f, false);
	CHECK(!readable(main_task));
	orc_fleet_asked_ring(f);
	CHECK(readable(main_task));
	/* What the main task was rung for is the deputy's, if that comes before the main task has woken. */
	CHECK(orc_fleet_asked_stand_in(f) && !readable(main_task) && !readable(deputy));
	orc_fleet_asked_give_back(f, true);
	CHECK(readable(main_task) && orc_fleet_asked_sleep(f));
	CHECK(orc_access_begin(a.v, ORC_IO, 0x502, 1, 1, false, a.data) == ORC_IO);
	orc_ask(a.v, 99);
	CHECK(readable(main_task) && !orc_fleet_asked_stand_in(f) && !readable(main_task));
	orc_fleet_asked_give_back(f, false);
	CHECK(readable(main_task) && orc_fleet_asked(f, q, 2) == 1);
	orc_ask_settled(a.v);
	close_asker(&a);
	orc_fleet_free(f);
}

static void many_ask_at_once_and_each_gets_its_answer(void)
{
	orc_fleet *f = orc_fleet_new();
	struct asker a[RUNNERS];
	int left = RUNNERS * ROUNDS;

	for (uint32_t i = 0; i < RUNNERS; i++)
		open_asker(&a[i], f, i);
	for (int i = 0; i < RUNNERS; i++)
		a[i].thread = start(ask_again_and_again, &a[i]);
	while (left) {
		struct orc_question q[RUNNERS];
		struct pollfd bell = {.events = POLLIN};

		for (size_t n = orc_fleet_asked(f, q, RUNNERS); n--; left--) {
			uint32_t *rounds = &a[q[n].vcpu].rounds;

			if (left % 7 == 0)
				orc_vcpu_command(a[q[n].vcpu].v, ORC_PAUSE, 0);
			CHECK(orc_vcpu_settle(a[q[n].vcpu].v, q[n].number, ORC_ASK_ANSWERED, rounds, 4));
			++*rounds;
		}
		if (!left || !orc_fleet_asked_sleep(f))
			continue;
		if (left % 3) {
			bell.fd = orc_fleet_asked_eventfd(f, ORC_MAIN);
			CHECK(poll(&bell, 1, PATIENCE / 1000000) == 1, "a question that nobody rang for");
			continue;
		}
		if (orc_fleet_asked_stand_in(f)) {
			bell.fd = orc_fleet_asked_eventfd(f, ORC_DEPUTY);
			CHECK(poll(&bell, 1, PATIENCE / 1000000) == 1, "a question that nobody rang the deputy for");
		}
		orc_fleet_asked_give_back(f, false);
		bell.fd = orc_fleet_asked_eventfd(f, ORC_MAIN);
		CHECK(poll(&bell, 1, PATIENCE / 1000000) == 1, "a question that the deputy left, and nobody rang for");
	}
	for (int i = 0; i < RUNNERS; i++) {
		join(a[i].thread);
		CHECK(!a[i].wrong);
		close_asker(&a[i]);
	}
	orc_fleet_free(f);
}

const struct test ask_tests[] = {
	TEST(a_question_says_what_is_accessed_and_the_answer_comes_to_its_place),
	TEST(a_question_that_was_withdrawn_is_nobodys),
	TEST(the_deputy_is_rung_in_the_main_tasks_place_and_gives_it_back),
	TEST(many_ask_at_once_and_each_gets_its_answer),
	{NULL, NULL},
};
