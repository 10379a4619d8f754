/* A console (virtio 1.2, 5.3), and ports beside it: what the guest transmits goes to the VM's console or to a port of its, and what
 * is written there comes in when the guest has buffers for it.
 *
 *     console   what the guest writes is kept as far as there is room, and a guest is never kept waiting
 *     a port    what the guest writes waits in its queue until there is room: nothing is lost, and nothing is in flight meanwhile */
#include <stdlib.h>
#include <string.h>

#include "virtio_console.h"

enum { QUEUES = 2, CONTROL_QUEUES = 2 }; /* of each port; and with ports */
enum { QUEUE = 64 };                     /* as other VMMs have it: a page of text in each buffer is a lot of text */

static bool has_ports(const struct orc_console_device *c) /* negotiated: 5.3.5 */
{
	return orc_virtio_has(&c->virtio, VIRTIO_CONSOLE_F_MULTIPORT);
}

/* ---- input ------------------------------------------------------------------------------------------------------ */

/* For a guest that has it open: Linux drops what comes before. */
static bool has_input(void *port)
{
	const struct orc_console_port *p = port;

	return atomic_load(&p->listening) && (p->open || !has_ports(p->device)) && orc_console_typed(p->stream);
}

/* Puts what waits into a chain. */
static int64_t give(void *port, const struct orc_chain *chain)
{
	struct orc_console_port *p = port;
	uint8_t input[ORC_CONSOLE_TYPED];
	size_t n = chain->writable_bytes < sizeof input ? chain->writable_bytes : sizeof input;

	n = orc_console_read(p->stream, orc_io_voice(&p->device->virtio), input, n);
	return (int64_t)orc_chain_write(chain, 0, input, n);
}

/* ---- output ----------------------------------------------------------------------------------------------------- */

static size_t say(struct orc_console_port *p, const uint8_t *data, size_t size)
{
	orc_vcpu *voice = orc_io_voice(&p->device->virtio);

	if (p->number)
		return orc_port_say(p->stream, voice, data, size);
	orc_console_say(p->stream, voice, data, size); /* of a long one the console copies no more than it keeps */
	return size;
}

/* What is left of it is sent when the chain is taken again: it may be shorter by then. */
static int64_t transmit(void *port, const struct orc_chain *chain)
{
	struct orc_console_port *p = port;
	struct iovec left[ORC_CHAIN_MOST];
	size_t pieces = orc_iov_slice(chain->iov, chain->readable, p->sent, chain->readable_bytes, left);

	for (size_t i = 0; i < pieces; i++) {
		size_t n = say(p, left[i].iov_base, left[i].iov_len);

		p->sent += (uint32_t)n;
		if (n < left[i].iov_len)
			return ORC_LATER; /* once the reader has made room */
	}
	p->sent = 0;
	return 0;
}

void orc_console_port_closed(struct orc_console_port *p)
{
	p->closing = false;
	if (p->number)
		orc_port_set_open(p->stream, orc_io_voice(&p->device->virtio), false);
}

/* ---- what happens at a console ---------------------------------------------------------------------------------- */

static void typed(void *port)
{
	struct orc_console_port *p = port;

	orc_virtio_again(&p->device->virtio, orc_console_receive_queue(p));
}

static void room(void *port)
{
	struct orc_console_port *p = port;

	orc_virtio_again(&p->device->virtio, orc_console_transmit_queue(p));
}

static void take_input(struct orc_console_port *p)
{
	atomic_store(&p->listening, true);
	orc_console_attach(p->stream, (struct orc_console_reader){typed, p, room});
	typed(p); /* what was typed before */
}

void orc_virtio_console_listen(orc_virtio *v)
{
	take_input(&((struct orc_console_device *)v)->port[0]);
}

void orc_virtio_console_stop(orc_virtio *v)
{
	struct orc_console_device *c = (struct orc_console_device *)v;

	for (unsigned i = 0; i < c->n; i++) {
		struct orc_console_port *p = &c->port[i];

		if (!atomic_exchange(&p->listening, false))
			continue;
		orc_console_detach(p->stream, p);
		if (p->number)
			orc_port_set_open(p->stream, NULL, false);
	}
}

void orc_virtio_console_resize(orc_virtio *v, uint16_t columns, uint16_t rows)
{
	const uint16_t size[] = {columns, rows};

	orc_virtio_config_set(v, offsetof(struct virtio_console_config, cols), size, sizeof size);
}

static void configured(orc_virtio *v)
{
	orc_console_tell_size((struct orc_console_device *)v);
}

/* ---- the device ------------------------------------------------------------------------------------------------- */

/* Of a data queue. */
static struct orc_console_port *port_of(struct orc_console_device *c, uint16_t queue)
{
	return &c->port[queue < QUEUES ? 0 : queue / 2 - 1];
}

static bool is_control(uint16_t queue)
{
	return queue == ORC_CONSOLE_CONTROL_RECEIVE || queue == ORC_CONSOLE_CONTROL_TRANSMIT;
}

static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	static const struct orc_chain_work input = {.writes = true, .ready = has_input, .work = give}; /* 5.3.6.1 */
	static const struct orc_chain_work output = {.work = transmit};
	struct orc_console_device *c = (struct orc_console_device *)v;
	struct orc_queue *q = &v->queue[queue];
	struct orc_console_port *p;
	enum orc_served served;

	if (queue >= QUEUES && !has_ports(c)) /* 5.3.2: there is none of that number */
		return ORC_WAITING;
	if (is_control(queue))
		return orc_virtio_each(q, queue % 2 ? &orc_console_from_driver : &orc_console_to_driver, c);
	p = port_of(c, queue);
	served = orc_virtio_each(q, queue % 2 ? &output : &input, p);
	if (queue % 2 && served == ORC_DRAINED && p->closing)
		orc_console_port_closed(p);
	return served;
}

/* 5.3.5.1: a character, also before there is a driver. */
static void write_config(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	(void)size;
	if (offset == offsetof(struct virtio_console_config, emerg_wr))
		say(&((struct orc_console_device *)v)->port[0], data, 1);
}

static void reset(orc_virtio *v)
{
	struct orc_console_device *c = (struct orc_console_device *)v;

	for (unsigned i = 0; i < c->n; i++) {
		struct orc_console_port *p = &c->port[i];

		p->added = p->ready = p->open = false;
		p->pending = 0;
		p->sent = 0;
		orc_console_port_closed(p);
	}
}

static void reset_queue(orc_virtio *v, uint16_t queue)
{
	if (queue % 2 && !is_control(queue))
		port_of((struct orc_console_device *)v, queue)->sent = 0;
}

static void free_console(orc_virtio *v)
{
	struct orc_console_device *c = (struct orc_console_device *)v;

	orc_virtio_console_stop(v);
	for (unsigned i = 0; i < c->n; i++)
		orc_console_free(c->port[i].stream);
	orc_virtio_fini(v);
	free(v);
}

/* ---- its state -------------------------------------------------------------------------------------------------- */

/* Of a port. What waits in its stream is the stream's. */
struct saved {
	uint8_t flags, pending;
	uint16_t unused;
	uint32_t sent;
};
enum { ADDED = 1, READY = 2, IS_OPEN = 4, CLOSING = 8, FLAGS = 15 };
_Static_assert(sizeof(struct saved[1 + ORC_CONSOLE_PORTS]) <= ORC_VIRTIO_KIND, "state of the ports");

static void save(const orc_virtio *v, struct orc_virtio_state *s)
{
	const struct orc_console_device *c = (const struct orc_console_device *)v;
	struct saved saved[1 + ORC_CONSOLE_PORTS] = {0};

	for (unsigned i = 0; i < c->n; i++) {
		const struct orc_console_port *p = &c->port[i];

		saved[i] = (struct saved){.pending = p->pending, .sent = p->sent};
		saved[i].flags = (uint8_t)(p->added * ADDED | p->ready * READY | p->open * IS_OPEN | p->closing * CLOSING);
	}
	memcpy(s->kind, saved, sizeof saved);
}

/* Nothing of a port without control messages; and each of a port's states has those before it. */
static bool fits(const orc_virtio *v, const struct orc_virtio_state *s)
{
	const bool ports = s->status & VIRTIO_CONFIG_S_DRIVER_OK && s->accepted >> VIRTIO_CONSOLE_F_MULTIPORT & 1;
	const struct orc_console_device *c = (const struct orc_console_device *)v;
	struct saved saved[1 + ORC_CONSOLE_PORTS];

	memcpy(saved, s->kind, sizeof saved);
	for (unsigned i = 0; i < 1 + ORC_CONSOLE_PORTS; i++) {
		uint8_t f = saved[i].flags;

		if ((!ports || i >= c->n) && (f || saved[i].pending || saved[i].sent))
			return false;
		if (f & ~FLAGS || !orc_console_can_be_pending(saved[i].pending) || (!(f & ADDED) && saved[i].pending) ||
		    (f & READY && !(f & ADDED)) || (f & (IS_OPEN | CLOSING) && !(f & READY)) ||
		    (f & (IS_OPEN | CLOSING)) == (IS_OPEN | CLOSING))
			return false;
	}
	return true;
}

static void load(orc_virtio *v, const struct orc_virtio_state *s)
{
	struct orc_console_device *c = (struct orc_console_device *)v;
	struct saved saved[1 + ORC_CONSOLE_PORTS];

	memcpy(saved, s->kind, sizeof saved);
	for (unsigned i = 0; i < c->n; i++) {
		struct orc_console_port *p = &c->port[i];

		p->added = saved[i].flags & ADDED;
		p->ready = saved[i].flags & READY;
		p->open = saved[i].flags & IS_OPEN;
		p->closing = saved[i].flags & CLOSING;
		p->pending = saved[i].pending;
		p->sent = saved[i].sent;
		if (p->number && (p->open || p->closing))
			orc_port_set_open(p->stream, orc_io_voice(v), true);
	}
}

/* ---- made ------------------------------------------------------------------------------------------------------- */

static const struct orc_virtio_ops ops = {
	.type = VIRTIO_ID_CONSOLE, .queue_size = QUEUE, .config_size = sizeof(struct virtio_console_config),
	.features = 1ull << VIRTIO_CONSOLE_F_SIZE | 1ull << VIRTIO_CONSOLE_F_EMERG_WRITE,
	.serve = serve, .config_write = write_config, .configured = configured, .reset = reset, .queue_reset = reset_queue,
	.save = save, .fits = fits, .load = load, .free = free_console,
};

orc_virtio *orc_virtio_console_new(const orc_guest_memory *memory, orc_console *console, uint16_t columns, uint16_t rows,
				   unsigned ports)
{
	struct virtio_console_config config = {.cols = columns, .rows = rows};
	struct orc_console_device *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	c->n = 1 + ports;
	c->port[0].stream = orc_console_hold(console);
	for (unsigned i = 0; i < c->n; i++) {
		c->port[i].device = c;
		c->port[i].number = (uint8_t)i;
	}
	if (ports)
		config.max_nr_ports = c->n; /* valid with the feature alone: 5.3.4 */
	orc_virtio_init(&c->virtio, &ops, memory, (uint16_t)(QUEUES * c->n + (ports ? CONTROL_QUEUES : 0)),
			ports ? 1ull << VIRTIO_CONSOLE_F_MULTIPORT : 0);
	memcpy(c->virtio.config, &config, sizeof config);
	return &c->virtio;
}

void orc_virtio_console_port(orc_virtio *v, unsigned port, const char *name, size_t size, orc_console *stream)
{
	struct orc_console_port *p = &((struct orc_console_device *)v)->port[port];

	p->stream = orc_console_hold(stream);
	p->name_size = (uint8_t)(size < sizeof p->name ? size : sizeof p->name);
	memcpy(p->name, name, p->name_size);
	take_input(p);
}
