/* A console (virtio 1.2, 5.3) of one port: what the guest transmits goes to the VM's console, and what is given to the device
 * waits in a ring until the guest has buffers for it. */
#include <errno.h>
#include <linux/virtio_console.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core.h"
#include "virtio.h"

enum { RECEIVE, TRANSMIT, QUEUES }; /* 5.3.2 */
enum { QUEUE = 64 };                /* as other VMMs have it: a page of text in each buffer is a lot of text */

struct console {
	orc_virtio virtio;
	orc_console *console;
	int room; /* an eventfd: written when there is room again */
	pthread_mutex_t lock; /* what follows; the last one of all but the console's */
	uint8_t input[ORC_VIRTIO_CONSOLE_INPUT]; /* a ring */
	size_t first, waiting;
	bool wanted; /* somebody waits for room */
};

/* ---- input ------------------------------------------------------------------------------------------------------ */

/* Puts what waits into a chain. */
static uint32_t give(struct console *c, const struct orc_chain *chain)
{
	const uint64_t one = 1;
	size_t given = 0;

	pthread_mutex_lock(&c->lock);
	while (c->waiting && given < chain->writable_bytes) { /* twice, if it goes on at the ring's begin */
		size_t row = sizeof c->input - c->first < c->waiting ? sizeof c->input - c->first : c->waiting;
		size_t n = orc_chain_write(chain, given, c->input + c->first, row);

		c->first = (c->first + n) % sizeof c->input;
		c->waiting -= n;
		given += n;
	}
	if (given && c->wanted) {
		c->wanted = false;
		while (write(c->room, &one, sizeof one) < 0 && errno == EINTR)
			;
	}
	pthread_mutex_unlock(&c->lock);
	return (uint32_t)given;
}

static bool has_input(struct console *c)
{
	bool some;

	pthread_mutex_lock(&c->lock);
	some = c->waiting;
	pthread_mutex_unlock(&c->lock);
	return some;
}

static enum orc_served serve_receive(struct console *c, struct orc_queue *q)
{
	struct orc_chain chain;

	for (unsigned left = q->size; left; left--) {
		if (!has_input(c))
			return ORC_WAITING;
		if (!orc_queue_take(q, &chain))
			return ORC_DRAINED;
		if (chain.readable) /* 5.3.6.1 */
			orc_queue_refuse(q, &chain);
		else
			orc_queue_put(q, &chain, give(c, &chain));
	}
	return ORC_MORE;
}

/* ---- output ----------------------------------------------------------------------------------------------------- */

static void say(struct console *c, const uint8_t *data, size_t size)
{
	orc_console_say(c->console, orc_io_voice(&c->virtio), data, size);
}

static void transmit(struct console *c, const struct orc_chain *chain)
{
	for (unsigned i = 0; i < chain->readable; i++) /* of a long one the console copies no more than it keeps */
		say(c, chain->iov[i].iov_base, chain->iov[i].iov_len);
}

static enum orc_served serve_transmit(struct console *c, struct orc_queue *q)
{
	struct orc_chain chain;
	orc_u64 bytes = 0;

	for (unsigned left = q->size; left && bytes < ORC_CONSOLE_KEPT; left--, bytes += chain.readable_bytes) {
		if (!orc_queue_take(q, &chain))
			return ORC_DRAINED;
		if (chain.writable) { /* 5.3.6.1 */
			orc_queue_refuse(q, &chain);
		} else {
			transmit(c, &chain);
			orc_queue_put(q, &chain, 0);
		}
	}
	return ORC_MORE;
}

/* ---- the device ------------------------------------------------------------------------------------------------- */

static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	struct console *c = (struct console *)v;

	return queue == RECEIVE ? serve_receive(c, &v->queue[queue]) : serve_transmit(c, &v->queue[queue]);
}

/* 5.3.5.1: a character, also before there is a driver. */
static void write_config(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	(void)size;
	if (offset == offsetof(struct virtio_console_config, emerg_wr))
		say((struct console *)v, data, 1);
}

static void free_console(orc_virtio *v)
{
	struct console *c = (struct console *)v;

	orc_virtio_fini(v);
	close(c->room);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

static const struct orc_virtio_ops console = {
	.type = VIRTIO_ID_CONSOLE, .queues = QUEUES, .queue_size = QUEUE, .config_size = sizeof(struct virtio_console_config),
	.features = 1ull << VIRTIO_CONSOLE_F_SIZE | 1ull << VIRTIO_CONSOLE_F_EMERG_WRITE,
	.serve = serve, .config_write = write_config, .free = free_console,
};

orc_virtio *orc_virtio_console_new(const orc_guest_memory *memory, orc_console *output, uint16_t columns, uint16_t rows)
{
	const struct virtio_console_config config = {.cols = columns, .rows = rows};
	struct console *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	c->room = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (c->room < 0) {
		free(c);
		return NULL;
	}
	c->console = output;
	pthread_mutex_init(&c->lock, NULL);
	orc_virtio_init(&c->virtio, &console, memory, 0, 0);
	memcpy(c->virtio.config, &config, sizeof config);
	return &c->virtio;
}

size_t orc_virtio_console_input(orc_virtio *v, const uint8_t *data, size_t size)
{
	struct console *c = (struct console *)v;
	size_t taken = 0;

	pthread_mutex_lock(&c->lock);
	for (; taken < size && c->waiting < sizeof c->input; taken++)
		c->input[(c->first + c->waiting++) % sizeof c->input] = data[taken];
	c->wanted = taken < size;
	pthread_mutex_unlock(&c->lock);
	if (taken)
		orc_virtio_again(v, RECEIVE);
	return taken;
}

size_t orc_virtio_console_waiting(orc_virtio *v, uint8_t out[ORC_VIRTIO_CONSOLE_INPUT])
{
	struct console *c = (struct console *)v;
	size_t n;

	pthread_mutex_lock(&c->lock);
	n = c->waiting;
	for (size_t i = 0; i < n; i++)
		out[i] = c->input[(c->first + i) % sizeof c->input];
	pthread_mutex_unlock(&c->lock);
	return n;
}

int orc_virtio_console_room(const orc_virtio *v)
{
	return ((const struct console *)v)->room;
}

void orc_virtio_console_resize(orc_virtio *v, uint16_t columns, uint16_t rows)
{
	const uint16_t size[] = {columns, rows};

	orc_virtio_config_set(v, offsetof(struct virtio_console_config, cols), size, sizeof size);
}
