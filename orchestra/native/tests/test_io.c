/* The I/O thread, with the devices that it serves: from the driver's notification to the vector's eventfd. */
#include <errno.h>
#include <sched.h>
#include <unistd.h>

#include "bench.h"

/* ---- entropy ---------------------------------------------------------------------------------------------------- */

static void a_guest_gets_random_bytes_by_notifications_alone(void)
{
	const uint64_t features[] = {0, F_RINGS};

	for (int f = 0; f < 2; f++) {
		struct guest g;
		struct bench b;
		orc_io *io = io_new();
		uint8_t *bytes, before[64];
		struct orc_virtio_counters c;

		guest_begin(&g, NULL);
		wire(&b, &g, orc_virtio_rng_new(g.memory), RINGS);
		CHECK(orc_virtio_type(b.v) == 4 && orc_virtio_queues(b.v) == 1 && orc_virtio_vectors(b.v) == 2);
		CHECK(!orc_virtio_config_size(b.v) && !orc_io_attach(io, b.v));
		drive(&b, features[f]);
		bytes = at(&g, DATA);
		for (uint16_t i = 0; i < 300; i++) {
			struct vring_used_elem e;

			memcpy(before, bytes, 64);
			request(&b, 0, i % SIZE, DATA, 64, W);
			e = await_used(&b, 0);
			CHECK(e.id == i % SIZE && e.len == 64 && memcmp(before, bytes, 64));
		}
		request(&b, 0, 0, DATA, 0x8000, W);
		CHECK(await_used(&b, 0).len == 4096, "bounded");
		orc_virtio_look(b.v, &c);
		CHECK(c.requests == 301 && c.kicks && c.interrupts && !c.error);
		request(&b, 0, 0, DATA, 64, 0); /* nothing to be written */
		await(b.vector[1]);
		orc_virtio_look(b.v, &c);
		CHECK(c.status & NEEDS_RESET && c.error == ORC_QUEUE_BAD_REQUEST);
		orc_io_stop(io);
		unwire(&b);
		orc_io_free(io);
		guest_end(&g);
	}
}

static void a_write_to_the_notify_register_that_reaches_the_device_counts_too(void)
{
	struct guest g;
	struct bench b;
	orc_io *io = io_new();

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_rng_new(g.memory), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	drive(&b, 0);
	describe(&b.d[0], 0, DATA, 64, W, 0);
	offer(&b.d[0], 0);
	CHECK(put(b.v, ORC_BAR_NOTIFY, 2, 0));
	CHECK(await_used(&b, 0).len == 64);
	finish(&b, io);
}

/* ---- a device that is never done, and one that is done when the test says so ------------------------------------- */

struct slow {
	orc_virtio virtio;
	struct orc_chain held[SIZE];
	unsigned n;
	_Atomic unsigned taken, served;
	bool endless;
};

static enum orc_served slow_serve(orc_virtio *v, uint16_t queue)
{
	struct slow *s = (struct slow *)v;

	atomic_fetch_add(&s->served, 1);
	while (s->n < SIZE && orc_queue_take(&v->queue[queue], &s->held[s->n])) {
		s->n++;
		atomic_fetch_add(&s->taken, 1);
	}
	return s->endless ? ORC_MORE : s->n == SIZE ? ORC_WAITING : ORC_DRAINED;
}

static void slow_ready(orc_virtio *v, int fd)
{
	struct slow *s = (struct slow *)v;
	uint64_t n;

	CHECK(read(fd, &n, sizeof n) == sizeof n);
	while (s->n && n--) { /* as many as were said: the oldest */
		orc_queue_put(&v->queue[0], &s->held[0], 1);
		memmove(s->held, s->held + 1, --s->n * sizeof s->held[0]);
	}
}

static void slow_free(orc_virtio *v)
{
	orc_virtio_fini(v);
	free(v);
}

static const struct orc_virtio_ops slow_ops = {
	.type = VIRTIO_ID_BLOCK, .queues = 1, .queue_size = SIZE, .serve = slow_serve, .free = slow_free,
};

static struct slow *slow_new(const struct guest *g)
{
	struct slow *s = calloc(1, sizeof *s);

	CHECK(s);
	orc_virtio_init(&s->virtio, &slow_ops, g->memory, 0, 0);
	orc_virtio_watch(&s->virtio, new_eventfd(), slow_ready);
	return s;
}

static struct slow *with_slow(struct bench *b, struct guest *g, orc_io *io, uint64_t features)
{
	struct slow *s;

	guest_begin(g, NULL);
	s = slow_new(g);
	wire(b, g, &s->virtio, RINGS);
	CHECK(!orc_io_attach(io, b->v));
	drive(b, features);
	return s;
}

static void await_count(_Atomic unsigned *counter, unsigned n)
{
	orc_ns deadline = orc_now() + PATIENCE;

	while (atomic_load(counter) < n) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
}

static void a_busy_device_keeps_no_other_from_its_turn_and_nobody_from_holding(void)
{
	struct guest g;
	struct bench busy, b;
	struct slow *s;
	orc_io *io = io_new();

	guest_begin(&g, NULL);
	s = slow_new(&g);
	s->endless = true;
	wire(&busy, &g, &s->virtio, RINGS);
	wire(&b, &g, orc_virtio_rng_new(g.memory), RINGS + 0x3000);
	CHECK(!orc_io_attach(io, busy.v) && !orc_io_attach(io, b.v));
	drive(&busy, 0);
	await_count(&s->served, 1);
	drive(&b, 0);
	for (uint16_t i = 0; i < 100; i++) {
		request(&b, 0, i % SIZE, DATA, 64, W);
		await_used(&b, 0);
	}
	for (int i = 0; i < 50; i++) {
		unsigned served;

		orc_io_hold(io);
		served = s->served;
		sched_yield();
		CHECK(s->served == served);
		orc_io_let_go(io);
		await_count(&s->served, served + 1);
	}
	orc_io_stop(io);
	unwire(&busy);
	unwire(&b);
	orc_io_free(io);
	guest_end(&g);
}

struct holder {
	orc_io *io;
	_Atomic unsigned held;
};

static void *hold(void *argument)
{
	struct holder *h = argument;

	orc_io_hold(h->io);
	atomic_store(&h->held, 1);
	return NULL;
}

static void holding_waits_for_what_is_in_flight_and_keeps_notifications(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	struct holder h = {.io = io_new()};
	pthread_t thread;

	s = with_slow(&b, &g, h.io, F_RINGS);
	for (uint16_t i = 0; i < 3; i++)
		request(&b, 0, i, DATA, 16, W);
	await_count(&s->taken, 3);
	thread = start(hold, &h);
	notify(s->virtio.watched);
	await_used(&b, 0);
	CHECK(!h.held && s->virtio.queue[0].in_flight, "two are left");
	notify(s->virtio.watched);
	await_used(&b, 0);
	CHECK(!h.held);
	notify(s->virtio.watched);
	join(thread);
	CHECK(h.held && b.d[0].used->idx == 3);
	for (uint16_t i = 3; i < 5; i++)
		request(&b, 0, i, DATA, 16, W);
	notify(b.kick[0]);
	orc_io_hold(h.io); /* a second one */
	orc_io_let_go(h.io);
	CHECK(s->taken == 3);
	orc_io_let_go(h.io);
	await_count(&s->taken, 5);
	for (int i = 0; i < 2; i++)
		notify(s->virtio.watched);
	orc_io_stop(h.io);
	CHECK(b.d[0].used->idx == 5, "stopping waits as well");
	finish(&b, h.io);
}

/* Until the voice is told. */
static void await_talk(orc_fleet *f)
{
	orc_ns deadline = orc_now() + PATIENCE;
	uint32_t id;

	while (!orc_fleet_talking(f, &id, 1)) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
}

/* How many are in flight, once the I/O thread is not at the device. */
static int outstanding(struct bench *b)
{
	int n;

	while ((n = orc_virtio_outstanding(b->v)) < 0)
		sched_yield();
	return n;
}

static void whoever_does_not_wait_for_a_hold_is_told_when_nothing_is_in_flight(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	orc_fleet *fleet = orc_fleet_new();
	orc_vcpu *voice = orc_vcpu_new(fleet, 1, 8);
	orc_io *io = io_new();
	uint32_t id;

	orc_io_set_voice(io, voice);
	s = with_slow(&b, &g, io, 0);
	for (int i = 0; i < 200; i++) { /* again and again: what was found in one hold does not count in the next */
		request(&b, 0, (uint16_t)(i % SIZE), DATA, 16, W);
		await_count(&s->taken, (unsigned)i + 1);
		orc_io_hold_soon(io);
		CHECK(!orc_io_is_still(io) && outstanding(&b) == 1);
		if (i % 2) { /* it is let go before it comes to rest */
			orc_io_let_go(io);
			orc_io_hold_soon(io);
		}
		CHECK(!orc_fleet_talking(fleet, &id, 1) && !orc_io_is_still(io));
		notify(s->virtio.watched);
		await_talk(fleet);
		CHECK(orc_io_is_still(io) && !outstanding(&b) && await_used(&b, 0).id == (uint32_t)(i % SIZE));
		orc_io_let_go(io);
	}
	orc_io_hold_soon(io);
	CHECK(!outstanding(&b) && orc_io_is_still(io), "at once, with nothing in flight");
	orc_io_let_go(io);
	pthread_mutex_lock(&b.v->lock);
	CHECK(orc_virtio_outstanding(b.v) == -1, "it waits for no lock");
	pthread_mutex_unlock(&b.v->lock);
	finish(&b, io);
	orc_vcpu_free(voice);
	orc_fleet_free(fleet);
}

static void *stop(void *argument)
{
	struct holder *h = argument;

	orc_io_stop(h->io);
	atomic_store(&h->held, 1);
	return NULL;
}

static void stopping_waits_for_what_is_in_flight(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	struct holder h = {.io = io_new()};
	pthread_t thread;

	s = with_slow(&b, &g, h.io, 0);
	for (uint16_t i = 0; i < SIZE; i++)
		request(&b, 0, i, DATA, 16, W);
	await_count(&s->taken, SIZE);
	thread = start(stop, &h);
	for (unsigned i = 0; i < SIZE; i++) {
		CHECK(!h.held);
		notify(s->virtio.watched);
		CHECK(await_used(&b, 0).id == i);
	}
	join(thread);
	CHECK(h.held);
	finish(&b, h.io);
}

static void a_device_that_waits_is_served_again_after_its_callback(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	orc_io *io = io_new();
	unsigned done = 0;

	s = with_slow(&b, &g, io, 0);
	for (uint16_t i = 0; i < SIZE; i++)
		request(&b, 0, i, DATA, 16, W);
	await_count(&s->taken, SIZE); /* it is full, and waits */
	for (uint16_t i = 0; i < 20; i++) {
		notify(s->virtio.watched);
		CHECK(await_used(&b, 0).id == i % SIZE);
		done++;
		request(&b, 0, i % SIZE, DATA, 16, W);
		await_count(&s->taken, SIZE + done);
	}
	for (int i = 0; i < SIZE; i++)
		notify(s->virtio.watched);
	finish(&b, io);
}

static void a_reset_waits_for_requests_that_end_on_the_io_thread(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	orc_io *io = io_new();
	orc_ns deadline = orc_now() + PATIENCE;

	s = with_slow(&b, &g, io, 0);
	request(&b, 0, 0, DATA, 16, W);
	await_count(&s->taken, 1);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_STATUS, 1));
	notify(s->virtio.watched);
	while (get(b.v, VIRTIO_PCI_COMMON_STATUS, 1)) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
	CHECK(!b.d[0].used->idx && !is_readable(b.vector[0]));
	finish(&b, io);
}

static void a_device_that_is_no_bus_master_takes_nothing_and_goes_on_when_it_is_one(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	orc_io *io = io_new();

	s = with_slow(&b, &g, io, 0);
	orc_virtio_set_master(b.v, false);
	request(&b, 0, 0, DATA, 16, W);
	notify(b.kick[0]);
	orc_io_hold(io); /* it has looked at the notification */
	orc_io_let_go(io);
	CHECK(!s->taken);
	CHECK(!mprotect(g.host, g.size, PROT_NONE), "not a word of memory is read");
	notify(b.kick[0]);
	orc_io_hold(io);
	orc_io_let_go(io);
	CHECK(!mprotect(g.host, g.size, PROT_READ | PROT_WRITE));
	orc_virtio_set_master(b.v, true);
	await_count(&s->taken, 1);
	notify(s->virtio.watched);
	CHECK(!await_used(&b, 0).id && !(get(b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET));
	finish(&b, io);
}

static void a_device_that_loses_the_bus_with_requests_in_flight_writes_nothing_and_needs_a_reset(void)
{
	struct guest g;
	struct bench b;
	struct slow *s;
	struct orc_virtio_counters c;
	orc_io *io = io_new();
	orc_ns deadline = orc_now() + PATIENCE;

	s = with_slow(&b, &g, io, 0);
	request(&b, 0, 0, DATA, 16, W);
	await_count(&s->taken, 1);
	CHECK(!mprotect(g.host, g.size, PROT_NONE));
	orc_virtio_set_master(b.v, false);
	notify(s->virtio.watched);
	while (orc_virtio_outstanding(b.v)) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
	CHECK(!mprotect(g.host, g.size, PROT_READ | PROT_WRITE));
	orc_virtio_set_master(b.v, true);
	orc_virtio_look(b.v, &c);
	CHECK(c.status & NEEDS_RESET && c.error == ORC_QUEUE_CUT_OFF && !b.d[0].used->idx);
	CHECK(is_readable(b.vector[1]), "the driver is told");
	request(&b, 0, 1, DATA, 16, W);
	orc_io_hold(io);
	orc_io_let_go(io);
	CHECK(s->taken == 1);
	b.d[0] = driver_at(&g, RINGS, SIZE);
	memset(at(&g, RINGS), 0, 0x1000);
	drive(&b, 0);
	request(&b, 0, 2, DATA, 16, W);
	await_count(&s->taken, 2);
	notify(s->virtio.watched);
	CHECK(await_used(&b, 0).id == 2, "after a reset all is well");
	finish(&b, io);
}

static void after_stop_no_guest_memory_is_touched_whoever_notifies(void)
{
	struct guest g;
	struct bench b;
	orc_io *io = io_new();

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_rng_new(g.memory), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	drive(&b, 0);
	request(&b, 0, 0, DATA, 64, W);
	await_used(&b, 0);
	orc_io_stop(io);
	orc_io_stop(io); /* again */
	request(&b, 0, 1, DATA, 64, W);
	notify(b.kick[0]);
	CHECK(!mprotect(g.host, g.size, PROT_NONE));
	CHECK(put(b.v, ORC_BAR_NOTIFY, 2, 0));
	CHECK(put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0) && !get(b.v, VIRTIO_PCI_COMMON_STATUS, 1));
	orc_io_hold(io);
	orc_io_let_go(io);
	unwire(&b);
	orc_io_free(io);
	guest_end(&g);
}

static void devices_come_and_go_while_others_are_served(void)
{
	struct guest g;
	struct bench b, guests;
	orc_io *io = io_new();
	orc_virtio *many[32];

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_rng_new(g.memory), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	drive(&b, 0);
	for (uint16_t i = 0; i < 50; i++) {
		wire(&guests, &g, orc_virtio_rng_new(g.memory), RINGS + 0x3000);
		guests.d[0].avail->idx = guests.d[0].used->idx = 0;
		request(&b, 0, i % SIZE, DATA, 64, W);
		notify(guests.kick[0]); /* as it comes */
		CHECK(!orc_io_attach(io, guests.v));
		drive(&guests, 0);
		request(&guests, 0, 0, DATA + 0x100, 64, W);
		if (i % 2) /* or as it goes */
			await_used(&guests, 0);
		orc_io_detach(io, guests.v);
		CHECK(!orc_io_attach(io, guests.v), "nothing of it was left");
		orc_io_detach(io, guests.v);
		notify(guests.kick[0]);
		unwire(&guests);
		await_used(&b, 0);
	}
	for (int i = 0; i < 32; i++) {
		many[i] = orc_virtio_rng_new(g.memory);
		CHECK(orc_io_attach(io, many[i]) == (i < 31 ? 0 : -ENOSPC));
	}
	orc_io_stop(io);
	for (int i = 0; i < 32; i++)
		orc_device_free(orc_virtio_device(many[i]));
	unwire(&b);
	orc_io_free(io);
	guest_end(&g);
}

enum { RECEIVE, TRANSMIT };

/* ---- all at once ------------------------------------------------------------------------------------------------ */

struct crowd {
	struct bench b;
	orc_io *io;
	orc_console *console;
	_Atomic bool over;
};

static void *play_owner(void *argument)
{
	struct crowd *c = argument;
	struct orc_virtio_state state;
	struct orc_virtio_counters counters;

	while (!c->over) {
		orc_io_hold(c->io);
		orc_virtio_save(c->b.v, &state);
		CHECK(!state.error, "%s", orc_queue_error_name(state.error));
		orc_io_let_go(c->io);
		orc_virtio_look(c->b.v, &counters);
		sched_yield();
	}
	return NULL;
}

static void *play_user(void *argument)
{
	struct crowd *c = argument;

	for (uint16_t i = 0; !c->over; i++) {
		orc_console_type(c->console, (const uint8_t *)"some text", 9);
		orc_virtio_console_resize(c->b.v, i & 127, 25);
		sched_yield();
	}
	return NULL;
}

/* Its rings as they were at first, once the device has let them go. */
static void start_again(struct bench *b)
{
	orc_ns deadline = orc_now() + PATIENCE;

	put(b->v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	while (get(b->v, VIRTIO_PCI_COMMON_STATUS, 1)) {
		CHECK(orc_now() < deadline);
		sched_yield();
	}
	for (int i = 0; i < 2; i++) {
		memset(b->d[i].avail, 0, 6 + 2 * SIZE);
		memset(b->d[i].used, 0, 6 + 8 * SIZE);
		b->d[i] = driver_at(b->g, b->d[i].descriptors, SIZE);
	}
	drive(b, F_RINGS);
}

static void a_guest_its_owner_and_its_user_are_at_a_device_at_the_same_time(void)
{
	struct guest g;
	struct crowd c = {.io = io_new()};
	orc_console *console = orc_console_new();
	pthread_t owner, user;
	uint64_t seed = 5;

	guest_begin(&g, NULL);
	wire(&c.b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	CHECK(!orc_io_attach(c.io, c.b.v));
	start_again(&c.b);
	c.console = console;
	orc_virtio_console_listen(c.b.v);
	owner = start(play_owner, &c);
	user = start(play_user, &c);
	for (unsigned i = 0, heads[2] = {0, 0}; i < 3000; i++) {
		uint64_t r = random_number(&seed);

		get(c.b.v, (uint32_t)(r >> 8 & 0x7fff), 4);
		put(c.b.v, ORC_BAR_TABLE + (r >> 24 & 0x2f), 4, r >> 32);
		if (r % 64 == 0) {
			start_again(&c.b);
			heads[RECEIVE] = heads[TRANSMIT] = 0;
		}
		request(&c.b, TRANSMIT, (uint16_t)(heads[TRANSMIT]++ % SIZE), DATA, 16, 0);
		await_used(&c.b, TRANSMIT);
		if (r % 4 == 0) {
			request(&c.b, RECEIVE, (uint16_t)(heads[RECEIVE]++ % SIZE), DATA + 0x100, 64, W);
			CHECK(await_used(&c.b, RECEIVE).len);
		}
	}
	atomic_store(&c.over, true);
	join(owner);
	join(user);
	CHECK(orc_console_total(console) == 3000 * 16);
	orc_io_stop(c.io);
	unwire(&c.b);
	orc_io_free(c.io);
	orc_console_free(console);
	guest_end(&g);
}

/* A device may be served again and again, a few milliseconds each time, and whoever waits for its lock may not get it for long. */
static void whoever_changes_the_configuration_waits_for_no_device(void)
{
	enum { LAST = 120 };
	orc_io *io = io_new();
	orc_console *console = orc_console_new();
	struct guest g;
	struct bench b;
	orc_ns deadline = orc_now() + PATIENCE;

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	orc_virtio_console_resize(b.v, 90, 25);
	CHECK(get(b.v, ORC_BAR_DEVICE, 2) == 90, "at once, as nobody is at it");
	pthread_mutex_lock(&b.v->lock); /* somebody is */
	orc_virtio_console_resize(b.v, 100, 25);
	orc_virtio_console_resize(b.v, LAST, 25);
	orc_io_hold_soon(io);
	pthread_mutex_unlock(&b.v->lock);
	orc_io_wait(io);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(get(b.v, ORC_BAR_DEVICE, 2) != 100, "the last one counts");
	orc_io_let_go(io);
	while (get(b.v, ORC_BAR_DEVICE, 2) != LAST) {
		CHECK(orc_now() < deadline, "a reset does not forget it");
		sched_yield();
	}
	orc_io_stop(io);
	unwire(&b);
	orc_io_free(io);
	orc_console_free(console);
	guest_end(&g);
}

/* ---- what it costs ----------------------------------------------------------------------------------------------- */

static orc_ns cpu_of(const orc_io *io)
{
	struct timespec t;
	int tid;

	while (!(tid = orc_io_tid(io)))
		sched_yield();
	CHECK(!clock_gettime((clockid_t)(~(unsigned)tid << 3 | 6), &t)); /* as in cap.c */
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void begin_rng(struct guest *g, struct bench *b, orc_io *io)
{
	guest_begin(g, NULL);
	wire(b, g, orc_virtio_rng_new(g->memory), RINGS);
	CHECK(!orc_io_attach(io, b->v));
	drive(b, 0);
}

static void end_rng(struct guest *g, struct bench *b, orc_io *io)
{
	orc_io_stop(io);
	unwire(b);
	orc_io_free(io);
	guest_end(g);
}

static void notifications_for_nothing_cost_little_and_keep_no_request_waiting(void)
{
	orc_io *io = io_new();
	struct guest g;
	struct bench b;
	struct orc_virtio_counters c;
	orc_ns begun, used;

	begin_rng(&g, &b, io);
	used = cpu_of(io);
	for (begun = orc_now(); orc_now() < begun + SECOND / 2;)
		notify(b.kick[0]);
	used = cpu_of(io) - used;
	orc_virtio_look(b.v, &c);
	CHECK(c.kicks < 700, "%llu", (unsigned long long)c.kicks); /* one each millisecond, and those before */
	CHECK(used < SECOND / 10, "%lld ns of half a second", (long long)used);
	for (uint16_t i = 0; i < 100; i++) {
		notify(b.kick[0]);
		request(&b, 0, i % SIZE, DATA, 64, W);
		CHECK(await_used(&b, 0).id == i % SIZE);
	}
	end_rng(&g, &b, io);
}

static void notifications_are_charged_to_the_buckets_and_wait_for_them(void)
{
	enum { RATE = 200, ROUNDS = 40 };
	orc_bucket *bucket = orc_bucket_new();
	orc_io *io = io_new();
	struct guest g;
	struct bench b;
	orc_ns since = orc_now();

	CHECK(bucket && !orc_bucket_set(bucket, RATE, 1, -1, since));
	orc_io_set_bucket(io, 0, bucket);
	begin_rng(&g, &b, io);
	for (uint16_t i = 0; i < ROUNDS; i++) {
		request(&b, 0, i % SIZE, DATA, 64, W);
		CHECK(await_used(&b, 0).id == i % SIZE);
	}
	since = orc_now() - since;
	CHECK(since >= (ROUNDS - 3) * (SECOND / RATE), "%lld ns", (long long)since);
	CHECK(!orc_bucket_set(bucket, 0.001, 1, -1, orc_now()));
	request(&b, 0, 0, DATA, 64, W); /* it waits, or the next one does */
	request(&b, 0, 1, DATA, 64, W);
	orc_io_hold(io); /* which keeps no hold waiting */
	orc_io_let_go(io);
	CHECK(!orc_bucket_set(bucket, 0, 0, -1, orc_now()));
	CHECK(await_used(&b, 0).id == 0 && await_used(&b, 0).id == 1);
	end_rng(&g, &b, io);
	orc_bucket_free(bucket);
}

static void a_capped_io_thread_uses_no_more_than_its_part(void)
{
	orc_fleet *fleet = orc_fleet_new();
	orc_io *io = io_new();
	struct guest g;
	struct bench b;
	orc_ns begun, used;

	begin_rng(&g, &b, io);
	CHECK(!orc_io_cap(fleet, io, 0.05));
	used = cpu_of(io);
	begun = orc_now();
	for (uint16_t i = 0; orc_now() < begun + SECOND; i++) {
		request(&b, 0, i % SIZE, DATA, 4096, W);
		CHECK(await_used(&b, 0).id == i % SIZE);
	}
	used = cpu_of(io) - used;
	CHECK(used < SECOND / 10, "%lld ns of a second", (long long)used);
	orc_io_hold(io);
	orc_io_let_go(io);
	CHECK(!orc_io_cap(fleet, io, 1e-9));
	request(&b, 0, 0, DATA, 4096, W);
	orc_io_stop(io); /* held or not */
	CHECK(!orc_io_cap(fleet, io, 1));
	end_rng(&g, &b, io);
	orc_fleet_free(fleet);
}

const struct test io_tests[] = {
	TEST(a_guest_gets_random_bytes_by_notifications_alone),
	TEST(a_write_to_the_notify_register_that_reaches_the_device_counts_too),
	TEST(a_busy_device_keeps_no_other_from_its_turn_and_nobody_from_holding),
	TEST(holding_waits_for_what_is_in_flight_and_keeps_notifications),
	TEST(whoever_does_not_wait_for_a_hold_is_told_when_nothing_is_in_flight),
	TEST(stopping_waits_for_what_is_in_flight),
	TEST(a_device_that_waits_is_served_again_after_its_callback),
	TEST(a_reset_waits_for_requests_that_end_on_the_io_thread),
	TEST(a_device_that_is_no_bus_master_takes_nothing_and_goes_on_when_it_is_one),
	TEST(a_device_that_loses_the_bus_with_requests_in_flight_writes_nothing_and_needs_a_reset),
	TEST(after_stop_no_guest_memory_is_touched_whoever_notifies),
	TEST(devices_come_and_go_while_others_are_served),
	TEST(a_guest_its_owner_and_its_user_are_at_a_device_at_the_same_time),
	TEST(whoever_changes_the_configuration_waits_for_no_device),
	TEST(notifications_for_nothing_cost_little_and_keep_no_request_waiting),
	TEST(notifications_are_charged_to_the_buckets_and_wait_for_them),
	TEST(a_capped_io_thread_uses_no_more_than_its_part),
	{0},
};
