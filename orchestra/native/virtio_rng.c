/* An entropy device (virtio 1.2, 5.4): one queue of buffers, which are filled with the host's random bytes. */
#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "virtio.h"

enum {
	QUEUE = 64,
	/* Of one request: some microseconds, whatever was asked for. The driver looks how many it got (5.4.6.1). */
	BYTES = 4096,
};

/* At least one byte (5.4.6.2): once the host's pool is seeded, which orc_virtio_rng_new has seen, there always are some. */
static uint32_t fill(const struct orc_chain *c)
{
	uint8_t bytes[BYTES];
	size_t wanted = c->writable_bytes < BYTES ? c->writable_bytes : BYTES;
	ssize_t n;

	while ((n = getrandom(bytes, wanted, 0)) < 0 && errno == EINTR)
		;
	return n < 0 ? 0 : (uint32_t)orc_chain_write(c, 0, bytes, (size_t)n);
}

static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	struct orc_queue *q = &v->queue[queue];
	struct orc_chain c;

	for (unsigned left = q->size; left; left--) {
		if (!orc_queue_take(q, &c))
			return ORC_DRAINED;
		if (c.readable) /* 5.4.6.1 */
			orc_queue_refuse(q, &c);
		else
			orc_queue_put(q, &c, fill(&c));
	}
	return ORC_MORE;
}

static void free_rng(orc_virtio *v)
{
	orc_virtio_fini(v);
	free(v);
}

static const struct orc_virtio_ops rng = {
	.type = VIRTIO_ID_RNG, .queues = 1, .queue_size = QUEUE, .serve = serve, .free = free_rng,
};

orc_virtio *orc_virtio_rng_new(const orc_guest_memory *memory)
{
	orc_virtio *v = calloc(1, sizeof *v);
	uint8_t byte;

	while (getrandom(&byte, 1, 0) < 0 && errno == EINTR) /* waits, if the host itself is just booting */
		;
	if (v)
		orc_virtio_init(v, &rng, memory, 0, 0);
	return v;
}
