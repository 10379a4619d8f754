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
static int64_t fill(void *of, const struct orc_chain *c)
{
	uint8_t bytes[BYTES];
	size_t wanted = c->writable_bytes < BYTES ? c->writable_bytes : BYTES;
	ssize_t n;

	(void)of;
	while ((n = getrandom(bytes, wanted, 0)) < 0 && errno == EINTR)
		;
	return n < 0 ? 0 : (int64_t)orc_chain_write(c, 0, bytes, (size_t)n);
}

static enum orc_served serve(orc_virtio *v, uint16_t queue)
{
	static const struct orc_chain_work work = {.writes = true, .work = fill}; /* 5.4.6.1 */

	return orc_virtio_each(&v->queue[queue], &work, v);
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
