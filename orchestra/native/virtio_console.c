/* A console (virtio 1.2, 5.3) of one port: what the guest transmits goes to the VM's console, and what is typed there comes in
 * when the guest has buffers for it. */
#include <linux/virtio_console.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "virtio.h"

enum { RECEIVE, TRANSMIT, QUEUES }; /* 5.3.2 */
enum { QUEUE = 64 };                /* as other VMMs have it: a page of text in each buffer is a lot of text */

struct console {
	orc_virtio virtio;
	orc_console *console;
	_Atomic bool listening; /* it is the one that takes the console's input */
};

static void say(struct console *c, const uint8_t *data, size_t size)
{
	orc_console_say(c->console, orc_io_voice(&c->virtio), data, size);
}

/* ---- input ------------------------------------------------------------------------------------------------------ */

/* Puts what waits into a chain. */
static uint32_t give(struct console *c, const struct orc_chain *chain)
{
	uint8_t input[ORC_CONSOLE_TYPED];
	size_t n = chain->writable_bytes < sizeof input ? chain->writable_bytes : sizeof input;

	n = orc_console_read(c->console, orc_io_voice(&c->virtio), input, n);
	return (uint32_t)orc_chain_write(chain, 0, input, n);
}

static bool has_input(const struct console *c)
{
	return atomic_load(&c->listening) && orc_console_typed(c->console);
}

static void typed(void *device)
{
	orc_virtio_again(device, RECEIVE);
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
	orc_virtio_console_listen(v, false);
	orc_virtio_fini(v);
	free(v);
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
	c->console = output;
	orc_virtio_init(&c->virtio, &console, memory, 0, 0);
	memcpy(c->virtio.config, &config, sizeof config);
	return &c->virtio;
}

void orc_virtio_console_listen(orc_virtio *v, bool on)
{
	struct console *c = (struct console *)v;

	atomic_store(&c->listening, on);
	if (on) {
		orc_console_attach(c->console, (struct orc_console_reader){typed, v});
		typed(v); /* what was typed before */
	} else {
		orc_console_detach(c->console, v);
	}
}

void orc_virtio_console_resize(orc_virtio *v, uint16_t columns, uint16_t rows)
{
	const uint16_t size[] = {columns, rows};

	orc_virtio_config_set(v, offsetof(struct virtio_console_config, cols), size, sizeof size);
}
