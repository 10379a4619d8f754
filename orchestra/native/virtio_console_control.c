/* Control messages of a console device (virtio 1.2, 5.3.6.2). What the driver is to be told is bits of each port, not a list: so a
 * driver that never listens, or that says the same again and again, has us keep no more.
 *
 *     driver: DEVICE_READY        -> each port: ADD
 *     driver: PORT_READY          -> the console: CONSOLE_PORT, RESIZE; a port: NAME, OPEN
 *     driver: PORT_OPEN           -> a program has the port open, or none has
 *
 * Whatever else a driver says has no meaning, and is ignored: a message that is too short, of no port, or out of order. */
#include <stddef.h>
#include <string.h>

#include "virtio_console.h"

/* In the order in which they are sent: a port is there before it is the console, and the console before it has a size. */
enum message { ADD, CONSOLE_PORT, RESIZE, NAME, OPEN, MESSAGES };

static const uint16_t event_of[MESSAGES] = {
	[ADD] = VIRTIO_CONSOLE_PORT_ADD, [CONSOLE_PORT] = VIRTIO_CONSOLE_CONSOLE_PORT, [RESIZE] = VIRTIO_CONSOLE_RESIZE,
	[NAME] = VIRTIO_CONSOLE_PORT_NAME, [OPEN] = VIRTIO_CONSOLE_PORT_OPEN,
};

bool orc_console_can_be_pending(uint8_t pending)
{
	return pending < 1u << MESSAGES;
}

/* ---- to the driver ---------------------------------------------------------------------------------------------- */

static void tell(struct orc_console_port *p, unsigned messages)
{
	p->pending |= (uint8_t)messages;
	orc_virtio_again(&p->device->virtio, ORC_CONSOLE_CONTROL_RECEIVE);
}

static struct orc_console_port *with_message(struct orc_console_device *c)
{
	for (unsigned i = 0; i < c->n; i++)
		if (c->port[i].pending)
			return &c->port[i];
	return NULL;
}

static bool has_message(void *device)
{
	return with_message(device);
}

/* What comes behind the message. Where the driver has no room for all of it, the rest is left out. */
static uint32_t write_more(const struct orc_console_port *p, enum message message, const struct orc_chain *chain)
{
	enum { BEHIND = sizeof(struct virtio_console_control) };

	if (message == NAME)
		return (uint32_t)orc_chain_write(chain, BEHIND, p->name, p->name_size);
	if (message == RESIZE) /* columns and rows, as in the configuration: Linux before 6.15 takes them for rows and columns */
		return (uint32_t)orc_chain_write(chain, BEHIND, p->device->virtio.config, 4);
	return 0;
}

static int64_t write_message(void *device, const struct orc_chain *chain)
{
	struct orc_console_port *p = with_message(device);
	enum message message = (enum message)__builtin_ctz(p->pending);
	/* Linux makes a port a console only if the value is not 0 (drivers/char/virtio_console.c, handle_control_message). */
	const struct virtio_console_control control = {.id = p->number, .event = event_of[message],
						       .value = message == OPEN || message == CONSOLE_PORT};

	if (chain->writable_bytes < sizeof control)
		return ORC_REFUSED;
	p->pending &= p->pending - 1;
	return (int64_t)orc_chain_write(chain, 0, &control, sizeof control) + write_more(p, message, chain);
}

const struct orc_chain_work orc_console_to_driver = {.writes = true, .ready = has_message, .work = write_message};

void orc_console_tell_size(struct orc_console_device *c)
{
	if (c->port[0].ready)
		tell(&c->port[0], 1 << RESIZE);
}

/* ---- from the driver -------------------------------------------------------------------------------------------- */

static void device_is_ready(struct orc_console_device *c)
{
	for (unsigned i = 0; i < c->n; i++) {
		struct orc_console_port *p = &c->port[i];

		if (p->added) /* 5.3.6.2.1: a port that exists is not added */
			continue;
		p->added = true;
		tell(p, 1 << ADD);
	}
}

static void port_is_ready(struct orc_console_port *p)
{
	if (p->ready || !p->added)
		return;
	p->ready = true;
	tell(p, p->number ? 1 << NAME | 1 << OPEN : 1 << CONSOLE_PORT | 1 << RESIZE | 1 << OPEN);
}

static void open_or_close(struct orc_console_port *p, bool open)
{
	orc_virtio *v = &p->device->virtio;

	if (!p->ready)
		return;
	p->closing = !open && (p->open || p->closing);
	p->open = open;
	if (p->closing && !orc_virtio_live(v, orc_console_transmit_queue(p)))
		orc_console_port_closed(p);
	if (open && p->number)
		orc_port_set_open(p->stream, orc_io_voice(v), true);
	/* There may be input for it; and what was written before it was closed is output first. */
	orc_virtio_again(v, open ? orc_console_receive_queue(p) : orc_console_transmit_queue(p));
}

static int64_t obey(void *device, const struct orc_chain *chain)
{
	struct orc_console_device *c = device;
	struct virtio_console_control m;

	if (orc_chain_read(chain, 0, &m, sizeof m) != sizeof m)
		return 0;
	if (m.event == VIRTIO_CONSOLE_DEVICE_READY && m.value == 1)
		device_is_ready(c);
	else if (m.id >= c->n)
		return 0;
	else if (m.event == VIRTIO_CONSOLE_PORT_READY && m.value == 1)
		port_is_ready(&c->port[m.id]);
	else if (m.event == VIRTIO_CONSOLE_PORT_OPEN && m.value <= 1)
		open_or_close(&c->port[m.id], m.value);
	return 0;
}

const struct orc_chain_work orc_console_from_driver = {.work = obey};
