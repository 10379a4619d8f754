/* A device whose queues another process serves (a vhost-user back-end): its registers, interrupt vectors and state are here, and
 * its data never are. The I/O thread has nothing to do with it.
 *
 *   the driver sets DRIVER_OK     -> goes up to Python -> orc_virtio_lend: the back-end gets the queues
 *   the driver resets, or a pause -> Python has the back-end stop -> orc_virtio_back: where each queue is; the reset is over
 *
 * The back-end has duplicates of kick_fd and vector_fd. It may clear their O_NONBLOCK and fill them, at any moment: so whoever
 * writes to one may wait for ever, and nothing here does. What is to be written is owed, and Python writes it: a vector that is
 * bound, which the kernel empties at each write; and a kick on the back-end's own thread, which others can do without. */
#include <stdlib.h>
#include <string.h>

#include "virtio.h"

struct lent {
	orc_virtio virtio;
	struct orc_virtio_ops ops;
};

static void free_lent(orc_virtio *v)
{
	orc_virtio_fini(v);
	free(v);
}

orc_virtio *orc_virtio_lent_new(const orc_guest_memory *memory, uint16_t type, uint16_t queues, uint16_t queue_size,
				orc_u64 features, const uint8_t *config, uint32_t config_size)
{
	struct lent *l;

	if (!queues || queues > ORC_VIRTIO_QUEUES || !queue_size || queue_size > ORC_QUEUE_MOST || queue_size & (queue_size - 1) ||
	    config_size > ORC_VIRTIO_CONFIG)
		return NULL;
	l = calloc(1, sizeof *l);
	if (!l)
		return NULL;
	l->ops = (struct orc_virtio_ops){.type = type, .queues = queues, .queue_size = queue_size, .config_size = config_size,
					 .features = features, .free = free_lent};
	orc_virtio_init(&l->virtio, &l->ops, memory, 0, 0);
	l->virtio.offered &= features; /* of a queue's, only what the back-end can */
	memcpy(l->virtio.config, config, config_size);
	return &l->virtio;
}

static orc_u64 live(const orc_virtio *v)
{
	orc_u64 queues = 0;

	for (uint16_t i = 0; i < v->queues; i++)
		queues |= (orc_u64)orc_virtio_live(v, i) << i;
	return queues;
}

orc_u64 orc_virtio_live_queues(orc_virtio *v)
{
	orc_u64 queues;

	pthread_mutex_lock(&v->lock);
	queues = live(v);
	pthread_mutex_unlock(&v->lock);
	return queues;
}

orc_u64 orc_virtio_lend(orc_virtio *v, struct orc_virtio_state *out)
{
	orc_u64 queues = 0;

	pthread_mutex_lock(&v->lock);
	if (!v->lent) {
		queues = v->lent = live(v);
		orc_virtio_look_at_state(v, out);
	}
	pthread_mutex_unlock(&v->lock);
	return queues;
}

void orc_virtio_back(orc_virtio *v, const uint16_t *next)
{
	pthread_mutex_lock(&v->lock);
	for (unsigned i = 0; i < v->queues; i++)
		if (v->lent >> i & 1)
			v->queue[i].next_avail = v->queue[i].next_used = next[i];
	v->lent = 0;
	orc_virtio_settle(v);
	pthread_mutex_unlock(&v->lock);
}

void orc_virtio_wake(orc_virtio *v, uint16_t queue)
{
	pthread_mutex_lock(&v->lock);
	if (queue < v->queues) {
		v->owed_kicks |= 1ull << queue;
		if (v->queue_vector[queue] < v->vectors)
			v->owed_vectors |= 1u << v->queue_vector[queue];
	}
	pthread_mutex_unlock(&v->lock);
}

uint32_t orc_virtio_owed(orc_virtio *v, uint64_t *kicks)
{
	uint32_t vectors;

	pthread_mutex_lock(&v->lock);
	vectors = v->owed_vectors;
	v->owed_vectors = 0;
	if (kicks) {
		*kicks = v->owed_kicks;
		v->owed_kicks = 0;
	}
	pthread_mutex_unlock(&v->lock);
	return vectors;
}

void orc_virtio_owe(orc_virtio *v, uint32_t vectors)
{
	pthread_mutex_lock(&v->lock);
	v->owed_vectors |= vectors;
	pthread_mutex_unlock(&v->lock);
}
