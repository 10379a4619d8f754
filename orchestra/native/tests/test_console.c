/* The console and its ports, with a driver that does as it should, and with one that does not. */
#include <errno.h>
#include <linux/virtio_console.h>
#include <sched.h>

#include "bench.h"

enum { RECEIVE, TRANSMIT, CONTROL_RECEIVE, CONTROL_TRANSMIT, FIRST_RECEIVE, FIRST_TRANSMIT, SECOND_RECEIVE, SECOND_TRANSMIT };
#define F_MULTIPORT (1ull << VIRTIO_CONSOLE_F_MULTIPORT | 1ull << VIRTIO_CONSOLE_F_SIZE)

/* ---- console ---------------------------------------------------------------------------------------------------- */

static void what_a_guest_transmits_is_on_the_console(void)
{
	struct guest g;
	struct bench b;
	orc_console *console = orc_console_new();
	orc_io *io = io_new();
	uint8_t text[64];
	orc_u64 position = 0;

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	CHECK(put(b.v, ORC_BAR_DEVICE + 8, 4, 'e') && put(b.v, ORC_BAR_DEVICE, 2, 1), "before there is a driver");
	CHECK(get(b.v, ORC_BAR_DEVICE, 4) == (25 << 16 | 80));
	drive(&b, F_RINGS);
	memcpy(at(&g, DATA), "hello", 5);
	memcpy(at(&g, DATA + 0x100), " world", 6);
	describe(&b.d[TRANSMIT], 1, DATA + 0x100, 6, 0, 0);
	describe(&b.d[TRANSMIT], 0, DATA, 5, N, 1);
	offer(&b.d[TRANSMIT], 0);
	notify(b.kick[TRANSMIT]);
	CHECK(await_used(&b, TRANSMIT).len == 0);
	CHECK(orc_console_copy(console, &position, text, sizeof text) == 12 && !memcmp(text, "ehello world", 12));
	request(&b, TRANSMIT, 0, DATA, LOW_SIZE - 0x8000, 0); /* more than it keeps */
	await_used(&b, TRANSMIT);
	CHECK(orc_console_total(console) == 12 + LOW_SIZE - 0x8000);
	request(&b, TRANSMIT, 0, DATA, 5, W);
	await(b.vector[2]);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET);
	orc_io_stop(io);
	unwire(&b);
	orc_io_free(io);
	orc_console_free(console);
	guest_end(&g);
}

static void input_waits_until_the_guest_has_buffers_for_it(void)
{
	struct guest g;
	struct bench b;
	orc_console *console = orc_console_new();
	orc_io *io = io_new();
	static uint8_t in[3 * ORC_CONSOLE_TYPED], out[sizeof in];
	size_t given, got = 0;

	guest_begin(&g, NULL);
	for (size_t i = 0; i < sizeof in; i++)
		in[i] = (uint8_t)(i * 7 >> 3);
	wire(&b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	CHECK(!orc_io_attach(io, b.v));
	given = orc_console_type(console, in, sizeof in); /* before anybody listens */
	orc_virtio_console_listen(b.v);
	drive(&b, 0);
	for (uint16_t i = 0; got < sizeof in; i++) {
		struct vring_used_elem e;

		request(&b, RECEIVE, i % SIZE, DATA, 100 + i, W);
		e = await_used(&b, RECEIVE);
		CHECK(e.len && e.len <= 100u + i && got + e.len <= sizeof in);
		memcpy(out + got, at(&g, DATA), e.len);
		got += e.len;
		given += orc_console_type(console, in + given, sizeof in - given);
	}
	CHECK(!memcmp(in, out, sizeof in) && !orc_console_typed(console));
	request(&b, RECEIVE, 0, DATA, 100, W);
	CHECK(orc_console_type(console, in, 1) == 1 && await_used(&b, RECEIVE).len == 1, "buffers wait for input");
	request(&b, RECEIVE, 0, DATA, 100, 0);
	CHECK(orc_console_type(console, in, 1) == 1);
	await(b.vector[2]);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET);
	orc_virtio_console_stop(b.v);
	CHECK(!orc_console_listened(console));
	orc_io_stop(io);
	unwire(&b);
	orc_io_free(io);
	orc_console_free(console);
	guest_end(&g);
}

static void a_console_takes_no_input_that_is_for_another_device(void)
{
	struct guest g;
	struct bench b;
	orc_console *console = orc_console_new();
	uint8_t byte = 'x';

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	drive(&b, 0);
	CHECK(orc_console_type(console, &byte, 1) == 1);
	request(&b, RECEIVE, 0, DATA, 100, W);
	pthread_mutex_lock(&b.v->lock);
	orc_virtio_serve(b.v, RECEIVE);
	pthread_mutex_unlock(&b.v->lock);
	CHECK(orc_console_typed(console) == 1);
	unwire(&b);
	orc_console_free(console);
	guest_end(&g);
}

static void a_console_that_is_resized_tells_its_driver(void)
{
	struct guest g;
	struct bench b;
	orc_console *console = orc_console_new();

	guest_begin(&g, NULL);
	wire(&b, &g, orc_virtio_console_new(g.memory, console, 80, 25, 0), RINGS);
	drive(&b, 1);
	orc_virtio_console_resize(b.v, 132, 50);
	CHECK(is_readable(b.vector[2]) && get(b.v, ORC_BAR_DEVICE, 2) == 132 && get(b.v, ORC_BAR_DEVICE + 2, 2) == 50);
	unwire(&b);
	orc_console_free(console);
	guest_end(&g);
}

/* ---- ports ------------------------------------------------------------------------------------------------------ */

struct ports {
	struct guest g;
	struct bench b;
	orc_io *io;
	orc_console *console, *port[2];
};

/* What the driver is told, and where it tells. */
enum { TOLD = DATA, TELLS = DATA + 0x1000, HERE = DATA + 0x2000, ROOM = 128 };

static void begin(struct ports *p, uint64_t features)
{
	const char *const name[] = {"org.example.agent", "\xc3\xa9tat"};

	*p = (struct ports){.io = io_new(), .console = orc_console_new(), .port = {orc_console_new(), orc_console_new()}};
	guest_begin(&p->g, NULL);
	wire(&p->b, &p->g, orc_virtio_console_new(p->g.memory, p->console, 80, 25, 2), RINGS);
	for (unsigned i = 0; i < 2; i++)
		orc_virtio_console_port(p->b.v, i + 1, name[i], strlen(name[i]), p->port[i]);
	CHECK(!orc_io_attach(p->io, p->b.v));
	drive(&p->b, features);
	for (uint16_t i = 0; i < SIZE; i++) /* buffers for what it is told */
		request(&p->b, CONTROL_RECEIVE, i, TOLD + i * ROOM, ROOM, W);
}

static void end(struct ports *p)
{
	orc_virtio_console_stop(p->b.v);
	orc_io_stop(p->io);
	unwire(&p->b);
	orc_io_free(p->io);
	orc_console_free(p->console);
	for (unsigned i = 0; i < 2; i++)
		orc_console_free(p->port[i]);
	guest_end(&p->g);
}

static void tell(struct ports *p, uint32_t id, uint16_t event, uint16_t value)
{
	const struct virtio_console_control m = {id, event, value};

	memcpy(at(&p->g, TELLS), &m, sizeof m);
	request(&p->b, CONTROL_TRANSMIT, 0, TELLS, sizeof m, 0);
	CHECK(await_used(&p->b, CONTROL_TRANSMIT).len == 0);
}

/* The next message is that one; the buffer is made available again. */
static void is_told(struct ports *p, uint32_t id, uint16_t event, uint16_t value, const void *more, uint32_t size)
{
	struct vring_used_elem e = await_used(&p->b, CONTROL_RECEIVE);
	struct virtio_console_control m;
	uint8_t *message = at(&p->g, TOLD + e.id * ROOM);

	memcpy(&m, message, sizeof m);
	CHECK(m.id == id && m.event == event && m.value == value, "%u %u %u", m.id, m.event, m.value);
	CHECK(e.len == sizeof m + size && !memcmp(message + sizeof m, more, size));
	request(&p->b, CONTROL_RECEIVE, (uint16_t)e.id, TOLD + e.id * ROOM, ROOM, W);
}

/* The control queue is served, and there was nothing to tell. */
static void is_told_nothing(struct ports *p)
{
	struct vring_used_elem e;

	tell(p, 99, VIRTIO_CONSOLE_PORT_OPEN, 1); /* of no port: once it is used, all before it was seen to */
	orc_io_hold(p->io);
	pthread_mutex_lock(&p->b.v->lock);
	orc_virtio_serve(p->b.v, CONTROL_RECEIVE);
	pthread_mutex_unlock(&p->b.v->lock);
	orc_io_let_go(p->io);
	CHECK(!reap(&p->b.d[CONTROL_RECEIVE], &e));
}

static void come_up(struct ports *p)
{
	const uint16_t size[] = {80, 25};

	tell(p, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
	for (uint32_t i = 0; i < 3; i++)
		is_told(p, i, VIRTIO_CONSOLE_PORT_ADD, 0, "", 0);
	for (uint32_t i = 0; i < 3; i++)
		tell(p, i, VIRTIO_CONSOLE_PORT_READY, 1);
	is_told(p, 0, VIRTIO_CONSOLE_CONSOLE_PORT, 1, "", 0);
	is_told(p, 0, VIRTIO_CONSOLE_RESIZE, 0, size, 4);
	is_told(p, 0, VIRTIO_CONSOLE_PORT_OPEN, 1, "", 0);
	is_told(p, 1, VIRTIO_CONSOLE_PORT_NAME, 0, "org.example.agent", 17);
	is_told(p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1, "", 0);
	is_told(p, 2, VIRTIO_CONSOLE_PORT_NAME, 0, "\xc3\xa9tat", 5);
	is_told(p, 2, VIRTIO_CONSOLE_PORT_OPEN, 1, "", 0);
}

static void a_driver_that_comes_up_is_told_of_each_port_once(void)
{
	struct ports p;

	begin(&p, F_MULTIPORT);
	CHECK(orc_virtio_queues(p.b.v) == 8 && get(p.b.v, ORC_BAR_DEVICE + 4, 4) == 3);
	is_told_nothing(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_READY, 1); /* before there is one */
	tell(&p, 0, VIRTIO_CONSOLE_DEVICE_READY, 0);
	is_told_nothing(&p);
	come_up(&p);
	for (int i = 0; i < 100; i++) {
		tell(&p, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
		for (uint32_t k = 0; k < 3; k++)
			tell(&p, k, VIRTIO_CONSOLE_PORT_READY, 1);
	}
	is_told_nothing(&p);
	end(&p);
}

static void what_is_written_to_a_port_is_read_there_and_nowhere_else(void)
{
	struct ports p;
	uint8_t text[64];
	orc_u64 position = 0;
	struct vring_used_elem e;

	begin(&p, F_MULTIPORT | F_RINGS);
	come_up(&p);
	CHECK(!orc_port_opening(p.port[0]) && orc_port_want(p.port[0], 0, true));
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	CHECK(orc_port_opening(p.port[0]) && !orc_port_opening(p.port[1]) && !orc_port_want(p.port[0], 0, true));
	memcpy(at(&p.g, HERE), "to one to two on the console", 28);
	request(&p.b, FIRST_TRANSMIT, 0, HERE, 6, 0);
	CHECK(await_used(&p.b, FIRST_TRANSMIT).len == 0);
	request(&p.b, SECOND_TRANSMIT, 0, HERE + 7, 6, 0);
	await_used(&p.b, SECOND_TRANSMIT);
	request(&p.b, TRANSMIT, 0, HERE + 14, 14, 0);
	await_used(&p.b, TRANSMIT);
	CHECK(!orc_port_want(p.port[0], 1, true));
	CHECK(orc_port_take(p.port[0], text, 3) == 3 && orc_port_take(p.port[0], text + 3, 61) == 3 && !memcmp(text, "to one", 6));
	CHECK(orc_port_take(p.port[1], text, 64) == 6 && !memcmp(text, "to two", 6));
	CHECK(orc_console_copy(p.console, &position, text, 64) == 14 && !memcmp(text, "on the console", 14));
	CHECK(!orc_port_take(p.port[0], text, 64) && orc_port_want(p.port[0], 1, true));

	request(&p.b, FIRST_RECEIVE, 0, HERE, 64, W);
	request(&p.b, SECOND_RECEIVE, 0, HERE + 64, 64, W);
	CHECK(orc_console_type(p.port[1], (const uint8_t *)"early", 5) == 5);
	CHECK(orc_console_type(p.port[0], (const uint8_t *)"in", 2) == 2);
	CHECK(await_used(&p.b, FIRST_RECEIVE).len == 2 && !memcmp(at(&p.g, HERE), "in", 2));
	is_told_nothing(&p);
	CHECK(!reap(&p.b.d[SECOND_RECEIVE], &e), "no program has it open");
	tell(&p, 2, VIRTIO_CONSOLE_PORT_OPEN, 1);
	CHECK(await_used(&p.b, SECOND_RECEIVE).len == 5);
	end(&p);
}

static void output_of_a_port_waits_for_its_reader_and_nothing_of_it_is_lost(void)
{
	enum { LONG = LOW_SIZE - 0x10000, FROM = LOW + 0x10000, PIECE = 1000 };
	struct ports p;
	static uint8_t got[3 * LONG];
	size_t n = 0;
	struct vring_used_elem e;

	begin(&p, F_MULTIPORT | F_RINGS);
	come_up(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	for (unsigned i = 0; i < LONG; i++)
		*(uint8_t *)at(&p.g, FROM + i) = (uint8_t)(i * 7 >> 4);
	describe(&p.b.d[FIRST_TRANSMIT], 0, FROM, PIECE, N, 1); /* more than there is ever room for, in two parts */
	describe(&p.b.d[FIRST_TRANSMIT], 1, FROM + PIECE, LONG - PIECE, 0, 0);
	describe(&p.b.d[FIRST_TRANSMIT], 2, FROM, PIECE, 0, 0);
	offer(&p.b.d[FIRST_TRANSMIT], 0);
	offer(&p.b.d[FIRST_TRANSMIT], 2);
	notify(p.b.kick[FIRST_TRANSMIT]);
	while (!orc_port_take(p.port[0], got, 1))
		sched_yield();
	n = 1;
	orc_io_hold(p.io); /* does not wait for the reader: nothing is in flight */
	CHECK(!reap(&p.b.d[FIRST_TRANSMIT], &e));
	orc_io_let_go(p.io);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 0);
	CHECK(orc_port_opening(p.port[0]), "until all that was written before is read");
	for (uint64_t seed = 3; n < LONG + PIECE;)
		n += orc_port_take(p.port[0], got + n, 1 + random_number(&seed) % 30000);
	CHECK(n == LONG + PIECE && !memcmp(got, at(&p.g, FROM), LONG) && !memcmp(got + LONG, at(&p.g, FROM), PIECE));
	CHECK(await_used(&p.b, FIRST_TRANSMIT).id == 0 && await_used(&p.b, FIRST_TRANSMIT).id == 2);
	for (orc_ns deadline = orc_now() + PATIENCE; orc_port_opening(p.port[0]); sched_yield())
		CHECK(orc_now() < deadline);
	end(&p);
}

static void a_port_that_is_closed_forgets_what_waited_for_the_program_that_had_it(void)
{
	static uint8_t in[ORC_CONSOLE_TYPED + 1];
	struct ports p;

	begin(&p, F_MULTIPORT);
	come_up(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	CHECK(orc_console_type(p.port[0], in, sizeof in) == ORC_CONSOLE_TYPED);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 0);
	for (orc_ns deadline = orc_now() + PATIENCE; orc_port_opening(p.port[0]); sched_yield())
		CHECK(orc_now() < deadline);
	CHECK(!orc_console_typed(p.port[0]));
	for (int i = 0; i < 2; i++)
		tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	CHECK(orc_port_opening(p.port[0]) == 2 && !orc_port_want(p.port[0], 1, false));
	put(p.b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(!orc_port_opening(p.port[0]), "a reset closes it");
	end(&p);
}

static void a_queue_that_is_reset_in_the_middle_of_a_chain_begins_the_next_one_at_its_first_byte(void)
{
	enum { LONG = ORC_CONSOLE_KEPT + 100, FROM = LOW + 0x10000 };
	static uint8_t got[LONG];
	struct ports p;
	struct driver d;

	begin(&p, F_MULTIPORT | 1ull << VIRTIO_F_RING_RESET);
	come_up(&p);
	request(&p.b, FIRST_TRANSMIT, 0, FROM, LONG, 0);
	for (orc_ns deadline = orc_now() + PATIENCE; orc_port_take(p.port[0], got, 1) == 0; sched_yield())
		CHECK(orc_now() < deadline);
	put(p.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, FIRST_TRANSMIT);
	put(p.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2, 1);
	CHECK(!get(p.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2));
	while (orc_port_take(p.port[0], got, LONG))
		;
	d = driver_at(&p.g, p.b.d[FIRST_TRANSMIT].descriptors, SIZE);
	memset(d.avail, 0, 6 + 2 * SIZE);
	memset(d.used, 0, 6 + 8 * SIZE);
	set_up(p.b.v, FIRST_TRANSMIT, &d, 0, FIRST_TRANSMIT);
	p.b.d[FIRST_TRANSMIT] = d;
	memcpy(at(&p.g, FROM), "all", 3);
	request(&p.b, FIRST_TRANSMIT, 0, FROM, 3, 0);
	await_used(&p.b, FIRST_TRANSMIT);
	CHECK(orc_port_take(p.port[0], got, LONG) == 3 && !memcmp(got, "all", 3));
	end(&p);
}

static void a_driver_without_the_feature_has_a_console_and_no_port(void)
{
	struct ports p;
	uint8_t byte = 'x';

	begin(&p, 0); /* with buffers in queues that are none */
	CHECK(orc_console_type(p.port[0], &byte, 1) == 1);
	orc_virtio_console_listen(p.b.v);
	CHECK(orc_console_type(p.console, &byte, 1) == 1);
	request(&p.b, RECEIVE, 0, HERE, 8, W);
	CHECK(await_used(&p.b, RECEIVE).len == 1);
	for (int i = CONTROL_RECEIVE; i < 8; i++) {
		struct vring_used_elem e;

		if (i != CONTROL_RECEIVE)
			request(&p.b, i, 0, HERE, 8, i % 2 ? 0 : W);
		orc_io_hold(p.io);
		pthread_mutex_lock(&p.b.v->lock);
		orc_virtio_serve(p.b.v, (uint16_t)i);
		pthread_mutex_unlock(&p.b.v->lock);
		orc_io_let_go(p.io);
		CHECK(!reap(&p.b.d[i], &e));
	}
	end(&p);
}

static void a_new_size_is_in_the_configuration_and_in_a_message(void)
{
	const uint16_t size[] = {132, 50};
	struct ports p;

	begin(&p, F_MULTIPORT);
	orc_virtio_console_resize(p.b.v, 100, 40); /* nobody listens yet */
	is_told_nothing(&p);
	orc_virtio_console_resize(p.b.v, 80, 25);
	come_up(&p);
	for (uint16_t i = 1; i < 100; i++) /* as many messages as the driver takes meanwhile, and the last of them is right */
		orc_virtio_console_resize(p.b.v, i, i);
	orc_virtio_console_resize(p.b.v, 132, 50);
	for (bool last = false; !last;) {
		struct vring_used_elem e = await_used(&p.b, CONTROL_RECEIVE);

		CHECK(e.len == 12);
		last = !memcmp(at(&p.g, TOLD + e.id * ROOM + 8), size, 4);
		request(&p.b, CONTROL_RECEIVE, (uint16_t)e.id, TOLD + e.id * ROOM, ROOM, W);
	}
	is_told_nothing(&p);
	CHECK(get(p.b.v, ORC_BAR_DEVICE, 4) == (50 << 16 | 132));
	end(&p);
}

/* ---- what drivers should not do --------------------------------------------------------------------------------- */

static void control_messages_that_have_no_meaning_change_nothing(void)
{
	struct ports p;
	uint64_t seed = 11;

	begin(&p, F_MULTIPORT | F_RINGS);
	come_up(&p);
	for (int i = 0; i < 2000; i++) {
		uint64_t r = random_number(&seed);
		uint16_t event = r >> 32 & 1 ? (uint16_t)(r >> 40) : (uint16_t)(r >> 40 & 15);
		uint32_t id = (uint32_t)r;

		if (id < 3 && event == VIRTIO_CONSOLE_PORT_OPEN)
			continue;
		tell(&p, id, event, (uint16_t)(r >> 8));
	}
	for (uint32_t size = 1; size < 8; size++) { /* too short, and then too long */
		request(&p.b, CONTROL_TRANSMIT, 0, TELLS, size, 0);
		await_used(&p.b, CONTROL_TRANSMIT);
	}
	tell(&p, 3, VIRTIO_CONSOLE_PORT_OPEN, 1);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 2);
	request(&p.b, CONTROL_TRANSMIT, 0, LOW + 0x10000, LOW_SIZE - 0x10000, 0);
	await_used(&p.b, CONTROL_TRANSMIT);
	CHECK(!orc_port_opening(p.port[0]) && !orc_port_opening(p.port[1]));
	is_told_nothing(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	CHECK(orc_port_opening(p.port[0]), "it works as before");
	end(&p);
}

static void a_message_may_be_in_pieces_and_its_buffer_too_short_for_a_name(void)
{
	const struct virtio_console_control ready = {0, VIRTIO_CONSOLE_DEVICE_READY, 1};
	struct ports p;
	struct driver *d;

	begin(&p, F_MULTIPORT);
	d = &p.b.d[CONTROL_TRANSMIT];
	memcpy(at(&p.g, TELLS), &ready, 8);
	for (uint16_t i = 0; i < 8; i++)
		describe(d, i, TELLS + i, 1, i < 7 ? N : 0, i + 1);
	offer(d, 0);
	notify(p.b.kick[CONTROL_TRANSMIT]);
	await_used(&p.b, CONTROL_TRANSMIT);
	for (uint32_t i = 0; i < 3; i++)
		is_told(&p, i, VIRTIO_CONSOLE_PORT_ADD, 0, "", 0);
	orc_io_hold(p.io);
	for (uint16_t i = 0; i < SIZE; i++) /* those that were made available already */
		describe(&p.b.d[CONTROL_RECEIVE], i, TOLD + i * ROOM, 8 + i % 2 * 4, W, 0);
	orc_io_let_go(p.io);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_READY, 1);
	CHECK(await_used(&p.b, CONTROL_RECEIVE).len <= 12);
	CHECK(await_used(&p.b, CONTROL_RECEIVE).len == 8);
	CHECK(!(get(p.b.v, VIRTIO_PCI_COMMON_STATUS, 1) & NEEDS_RESET));
	end(&p);
}

static void buffers_of_the_wrong_kind_end_the_device_until_a_reset(void)
{
	const struct { int queue; uint32_t size; uint16_t flags; } wrong[] = {
		{CONTROL_RECEIVE, 64, 0}, {CONTROL_RECEIVE, 7, W}, {CONTROL_TRANSMIT, 8, W}, {FIRST_RECEIVE, 8, 0}, {FIRST_TRANSMIT, 8, W}};

	for (unsigned i = 0; i < sizeof wrong / sizeof *wrong; i++) {
		struct ports p;
		struct orc_virtio_counters c;

		begin(&p, F_MULTIPORT);
		tell(&p, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
		for (uint32_t k = 0; k < 3; k++)
			is_told(&p, k, VIRTIO_CONSOLE_PORT_ADD, 0, "", 0);
		tell(&p, 1, VIRTIO_CONSOLE_PORT_READY, 1);
		for (uint16_t k = 0; k < 2; k++)
			await_used(&p.b, CONTROL_RECEIVE);
		tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
		CHECK(orc_console_type(p.port[0], (const uint8_t *)"x", 1) == 1);
		if (wrong[i].queue == CONTROL_RECEIVE)
			for (uint16_t k = 0; k < SIZE; k++) /* also those that wait already */
				describe(&p.b.d[CONTROL_RECEIVE], k, HERE, wrong[i].size, wrong[i].flags, 0);
		else
			request(&p.b, wrong[i].queue, 0, HERE, wrong[i].size, wrong[i].flags);
		if (wrong[i].queue == CONTROL_RECEIVE) {
			struct virtio_console_control m = {2, VIRTIO_CONSOLE_PORT_READY, 1};

			memcpy(at(&p.g, TELLS), &m, 8);
			request(&p.b, CONTROL_TRANSMIT, 0, TELLS, 8, 0);
		}
		await(p.b.vector[8]);
		orc_virtio_look(p.b.v, &c);
		CHECK(c.status & NEEDS_RESET && c.error == ORC_QUEUE_BAD_REQUEST && c.error_queue == wrong[i].queue);
		put(p.b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
		CHECK(!get(p.b.v, VIRTIO_PCI_COMMON_STATUS, 1) && !orc_port_opening(p.port[0]));
		end(&p);
	}
}

static void a_driver_that_never_listens_is_told_later_and_nothing_piles_up(void)
{
	struct ports p;

	begin(&p, F_MULTIPORT);

	for (int i = 0; i < 1000; i++) {
		tell(&p, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
		tell(&p, (uint32_t)i % 3, VIRTIO_CONSOLE_PORT_READY, 1);
		orc_virtio_console_resize(p.b.v, (uint16_t)(1 + i), 25);
	}
	orc_io_hold(p.io);
	for (unsigned i = 0; i < SIZE; i++)
		CHECK(reap(&p.b.d[CONTROL_RECEIVE], &(struct vring_used_elem){0}), "of %d buffers", SIZE);
	CHECK(!reap(&p.b.d[CONTROL_RECEIVE], &(struct vring_used_elem){0}));
	orc_io_let_go(p.io);
	end(&p);
}

/* ---- state ------------------------------------------------------------------------------------------------------ */

static void ports_go_on_in_another_device_from_their_state(void)
{
	struct ports p, q;
	struct orc_virtio_state s, wrong;
	uint8_t *const kind = wrong.kind;

	begin(&p, F_MULTIPORT);
	come_up(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	orc_io_hold(p.io);
	orc_virtio_save(p.b.v, &s);
	begin(&q, F_MULTIPORT);
	orc_io_hold(q.io);
	for (unsigned i = 0; i < 3; i++) { /* of each port: flags, and what is pending */
		for (unsigned value = 1; value < 256; value++) {
			bool fine = value == 1 || value == 3 || value == 7 || value == 11;

			wrong = s;
			kind[8 * i] = (uint8_t)value;
			CHECK(orc_virtio_load(q.b.v, &wrong) == fine, "flags %u", value);
			wrong = s;
			kind[8 * i + 1] = (uint8_t)value;
			CHECK(orc_virtio_load(q.b.v, &wrong) == (value < 32));
		}
	}
	wrong = s;
	kind[8 * 3] = 1; /* a port that there is not */
	CHECK(!orc_virtio_load(q.b.v, &wrong));
	wrong = s;
	wrong.accepted &= ~(1ull << VIRTIO_CONSOLE_F_MULTIPORT);
	CHECK(!orc_virtio_load(q.b.v, &wrong));
	CHECK(orc_virtio_load(q.b.v, &s) && orc_port_opening(q.port[0]) && !orc_port_opening(q.port[1]));
	orc_virtio_save(q.b.v, &wrong);
	CHECK(!memcmp(s.kind, wrong.kind, sizeof s.kind));
	orc_io_let_go(p.io);
	orc_io_let_go(q.io);
	end(&p);
	end(&q);
}

/* ---- all at once ------------------------------------------------------------------------------------------------ */

struct stream {
	orc_console *port;
	_Atomic bool over;
	uint64_t in, out; /* bytes */
};

static void *play_reader(void *argument)
{
	struct stream *s = argument;
	static uint8_t bytes[4096];
	uint64_t n;

	do {
		bool last = s->over;

		n = orc_port_take(s->port, bytes, sizeof bytes);
		for (uint64_t i = 0; i < n; i++)
			CHECK(bytes[i] == (uint8_t)(s->out + i));
		s->out += n;
		orc_port_want(s->port, orc_port_opening(s->port), true);
		if (last && !n)
			break;
		sched_yield();
	} while (true);
	return NULL;
}

static void *play_writer(void *argument)
{
	struct stream *s = argument;
	uint8_t bytes[100];

	while (!s->over) {
		for (unsigned i = 0; i < sizeof bytes; i++)
			bytes[i] = (uint8_t)(s->in + i);
		s->in += orc_console_type(s->port, bytes, sizeof bytes);
		sched_yield();
	}
	return NULL;
}

static void reader_writer_and_guest_are_at_a_port_at_the_same_time(void)
{
	enum { TIMES = 300, LENGTH = 3000 };
	struct ports p;
	struct stream s;
	pthread_t reader, writer;
	uint64_t sent = 0, received = 0;

	begin(&p, F_MULTIPORT | F_RINGS);
	come_up(&p);
	tell(&p, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	s = (struct stream){.port = p.port[0]};
	reader = start(play_reader, &s);
	writer = start(play_writer, &s);
	for (unsigned i = 0; i < TIMES; i++) {
		uint8_t *bytes = at(&p.g, HERE);
		struct vring_used_elem e;

		for (unsigned k = 0; k < LENGTH; k++)
			bytes[k] = (uint8_t)(sent + k);
		request(&p.b, FIRST_TRANSMIT, (uint16_t)(i % SIZE), HERE, LENGTH, 0);
		await_used(&p.b, FIRST_TRANSMIT);
		sent += LENGTH;
		request(&p.b, FIRST_RECEIVE, (uint16_t)(i % SIZE), HERE + LENGTH, 64, W);
		e = await_used(&p.b, FIRST_RECEIVE);
		for (unsigned k = 0; k < e.len; k++)
			CHECK(bytes[LENGTH + k] == (uint8_t)(received + k));
		received += e.len;
		orc_virtio_console_resize(p.b.v, (uint16_t)(i + 1), 25);
	}
	atomic_store(&s.over, true);
	join(reader);
	join(writer);
	CHECK(s.out == sent && received && received <= s.in);
	end(&p);
}

const struct test console_tests[] = {
	TEST(what_a_guest_transmits_is_on_the_console),
	TEST(input_waits_until_the_guest_has_buffers_for_it),
	TEST(a_console_takes_no_input_that_is_for_another_device),
	TEST(a_console_that_is_resized_tells_its_driver),
	TEST(a_driver_that_comes_up_is_told_of_each_port_once),
	TEST(what_is_written_to_a_port_is_read_there_and_nowhere_else),
	TEST(output_of_a_port_waits_for_its_reader_and_nothing_of_it_is_lost),
	TEST(a_port_that_is_closed_forgets_what_waited_for_the_program_that_had_it),
	TEST(a_queue_that_is_reset_in_the_middle_of_a_chain_begins_the_next_one_at_its_first_byte),
	TEST(a_driver_without_the_feature_has_a_console_and_no_port),
	TEST(a_new_size_is_in_the_configuration_and_in_a_message),
	TEST(control_messages_that_have_no_meaning_change_nothing),
	TEST(a_message_may_be_in_pieces_and_its_buffer_too_short_for_a_name),
	TEST(buffers_of_the_wrong_kind_end_the_device_until_a_reset),
	TEST(a_driver_that_never_listens_is_told_later_and_nothing_piles_up),
	TEST(ports_go_on_in_another_device_from_their_state),
	TEST(reader_writer_and_guest_are_at_a_port_at_the_same_time),
	{0},
};
