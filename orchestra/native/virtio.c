/* One virtio device (virtio 1.2): negotiation, status, queues and configuration, as the registers of 4.1.4.3 show them.
 *
 *   status   0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK: served       (2.1, 3.1.1)
 *            any -> DEVICE_NEEDS_RESET (the driver broke a rule), FAILED (it says so): not served
 *            any -> 0, once nothing is in flight */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "virtio_rules.h"

#define QUEUE_FEATURES                                                                                                 \
	(1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX |          \
	 1ull << VIRTIO_F_RING_RESET)

/* ---- interrupts ------------------------------------------------------------------------------------------------- */

/* Of the ISR too, whether MSI-X is enabled or not: that is the PCI function's affair, and who uses MSI-X does not look at it. */
static void interrupt(orc_virtio *v, uint16_t vector, uint8_t isr)
{
	const uint64_t one = 1;

	v->isr |= isr;
	if (vector >= v->vectors || v->vector_fd[vector] < 0)
		return;
	v->interrupts++;
	if (!v->ops->serve) { /* another process has that eventfd as well: virtio_lent.c */
		v->owed_vectors |= 1u << vector;
		return;
	}
	/* Full (EAGAIN): it fires anyway. */
	while (write(v->vector_fd[vector], &one, sizeof one) < 0 && errno == EINTR)
		;
}

uint32_t orc_virtio_pending(const orc_virtio *v)
{
	struct pollfd fired[ORC_VIRTIO_VECTORS];
	uint32_t bits = v->owed_vectors;

	for (unsigned i = 0; i < v->vectors; i++)
		fired[i] = (struct pollfd){.fd = v->vector_fd[i], .events = POLLIN}; /* -1 is left out */
	if (poll(fired, v->vectors, 0) > 0)
		for (unsigned i = 0; i < v->vectors; i++)
			bits |= (uint32_t)!!(fired[i].revents & POLLIN) << i;
	return bits;
}

/* ---- serving ---------------------------------------------------------------------------------------------------- */

void orc_virtio_again(orc_virtio *v, uint16_t queue)
{
	orc_io *io = atomic_load(&v->io);

	atomic_fetch_or(&v->kicked, 1ull << queue);
	if (io)
		orc_io_wake(io);
}

void orc_virtio_all_again(orc_virtio *v)
{
	for (uint16_t i = 0; i < v->queues; i++)
		orc_virtio_again(v, i);
}

uint32_t orc_virtio_in_flight(const orc_virtio *v)
{
	uint32_t n = 0;

	for (unsigned i = 0; i < v->queues; i++)
		n += v->queue[i].in_flight;
	return n;
}

bool orc_virtio_live(const orc_virtio *v, uint16_t queue)
{
	const struct orc_queue *q = &v->queue[queue];

	return v->status & VIRTIO_CONFIG_S_DRIVER_OK && !(v->status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)) &&
	       !v->resetting && v->master && orc_queue_is_open(q);
}

/* Whether the turn goes on. */
static bool do_chain(struct orc_queue *q, const struct orc_chain_work *w, void *of, const struct orc_chain *c)
{
	int64_t written = (w->writes ? c->readable : c->writable) ? ORC_REFUSED : w->work(of, c);

	if (written == ORC_LATER)
		orc_queue_give_back(q, c);
	else if (written == ORC_REFUSED)
		orc_queue_refuse(q, c);
	else
		orc_queue_put(q, c, (uint32_t)written);
	return written != ORC_LATER;
}

enum orc_served orc_virtio_each(struct orc_queue *q, const struct orc_chain_work *w, void *of)
{
	struct orc_chain c;
	orc_u64 bytes = 0;

	for (unsigned left = q->size; left && bytes < ORC_TURN_BYTES; left--, bytes += c.readable_bytes) {
		if (w->ready && !w->ready(of))
			return ORC_WAITING;
		if (!orc_queue_take(q, &c))
			return ORC_DRAINED;
		if (!do_chain(q, w, of, &c))
			return ORC_WAITING;
	}
	return ORC_MORE;
}

void orc_virtio_serve(orc_virtio *v, uint16_t queue)
{
	struct orc_queue *q = &v->queue[queue];
	const orc_u64 bit = 1ull << queue;

	v->waiting &= ~bit;
	if (!orc_virtio_live(v, queue)) /* whoever makes it live has it looked at then */
		return;
	orc_queue_silence(q);
	switch (v->ops->serve(v, queue)) {
	case ORC_DRAINED:
		if (orc_queue_listen(q))
			atomic_fetch_or(&v->kicked, bit);
		break;
	case ORC_MORE:
		atomic_fetch_or(&v->kicked, bit);
		break;
	case ORC_WAITING:
		v->waiting |= bit;
		break;
	}
	orc_virtio_settle(v);
}

void orc_virtio_called(orc_virtio *v)
{
	v->ready(v, v->watched);
	atomic_fetch_or(&v->kicked, v->waiting);
	orc_virtio_settle(v);
}

/* 2.1.2: nothing is served until the driver resets it, which it is told. */
static void needs_reset(orc_virtio *v, uint16_t queue, enum orc_queue_error error)
{
	v->error = error;
	v->error_queue = queue;
	v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
	if (v->status & VIRTIO_CONFIG_S_DRIVER_OK)
		interrupt(v, v->config_vector, ORC_ISR_CONFIG);
}

/* ---- reset ------------------------------------------------------------------------------------------------------ */

static void forget_queue(orc_virtio *v, uint16_t i)
{
	orc_queue_disable(&v->queue[i], v->ops->queue_size);
	v->queue_vector[i] = VIRTIO_MSI_NO_VECTOR;
	v->queue_resetting &= ~(1ull << i);
}

/* 2.4.1, once nothing is in flight. The configuration and its generation are the device's, not the driver's. */
static void forget(orc_virtio *v)
{
	v->accepted = 0;
	v->device_feature_select = v->driver_feature_select = 0;
	v->status = v->isr = 0;
	v->resetting = false;
	v->queue_select = 0;
	v->config_vector = VIRTIO_MSI_NO_VECTOR;
	for (uint16_t i = 0; i < v->queues; i++)
		forget_queue(v, i);
	v->waiting = 0;
	v->error = ORC_QUEUE_FINE;
	v->error_queue = 0;
	atomic_fetch_and(&v->kicked, ORC_KICKED_CONFIG);
}

void orc_virtio_reset(orc_virtio *v)
{
	v->resetting = true;
	for (unsigned i = 0; i < v->queues; i++)
		v->queue[i].enabled = false;
	if (v->ops->reset)
		v->ops->reset(v);
	orc_virtio_settle(v);
}

void orc_virtio_settle(orc_virtio *v)
{
	for (uint16_t i = 0; i < v->queues; i++) {
		struct orc_queue *q = &v->queue[i];

		if (orc_queue_wants_interrupt(q))
			interrupt(v, v->queue_vector[i], ORC_ISR_QUEUE);
		if (q->error && !v->error && !v->resetting)
			needs_reset(v, i, q->error);
		if (v->queue_resetting >> i & 1 && !q->in_flight)
			forget_queue(v, i);
	}
	if (v->resetting && !v->lent && !orc_virtio_in_flight(v))
		forget(v);
}

/* ---- the bus ---------------------------------------------------------------------------------------------------- */

void orc_virtio_set_master(orc_virtio *v, bool on)
{
	pthread_mutex_lock(&v->lock);
	if (v->master != on) {
		v->master = on;
		for (unsigned i = 0; !on && i < v->queues; i++)
			if (v->queue[i].in_flight)
				orc_queue_cut_off(&v->queue[i]);
		orc_virtio_settle(v);
		if (on)
			orc_virtio_all_again(v); /* what was made available meanwhile */
	}
	pthread_mutex_unlock(&v->lock);
}

/* ---- its configuration ------------------------------------------------------------------------------------------- */

void orc_virtio_configure(orc_virtio *v)
{
	uint8_t data[ORC_VIRTIO_WISH];
	uint32_t offset, size;

	pthread_mutex_lock(&v->wish_lock);
	offset = v->wish.offset;
	size = v->wish.size;
	memcpy(data, v->wish.data, sizeof data);
	v->wish.size = 0;
	pthread_mutex_unlock(&v->wish_lock);
	if (!size)
		return;
	if (memcmp(v->config + offset, data, size)) {
		memcpy(v->config + offset, data, size);
		v->config_changed = true;
		if (v->status & VIRTIO_CONFIG_S_DRIVER_OK && !v->resetting)
			interrupt(v, v->config_vector, ORC_ISR_CONFIG);
	}
	if (v->ops->configured)
		v->ops->configured(v);
}

void orc_virtio_config_set(orc_virtio *v, uint32_t offset, const void *data, uint32_t size)
{
	orc_io *io;

	pthread_mutex_lock(&v->wish_lock);
	v->wish.offset = offset;
	v->wish.size = size;
	memcpy(v->wish.data, data, size);
	pthread_mutex_unlock(&v->wish_lock);
	if (pthread_mutex_trylock(&v->lock)) {
		io = atomic_load(&v->io);
		if (io) { /* which may be at the device for milliseconds, again and again */
			atomic_fetch_or(&v->kicked, ORC_KICKED_CONFIG);
			orc_io_wake(io);
			return;
		}
		pthread_mutex_lock(&v->lock);
	}
	orc_virtio_configure(v);
	pthread_mutex_unlock(&v->lock);
}

/* ---- its life --------------------------------------------------------------------------------------------------- */

static void free_device(orc_device *d)
{
	orc_virtio *v = (orc_virtio *)d;

	v->ops->free(v);
}

void orc_virtio_init(orc_virtio *v, const struct orc_virtio_ops *ops, const orc_guest_memory *memory, uint16_t queues,
		     orc_u64 features)
{
	v->bar = (orc_device){orc_virtio_pci_answer, free_device};
	v->ops = ops;
	v->memory = memory;
	v->queues = ops->queues ? ops->queues : queues;
	v->vectors = v->queues + 1;
	v->offered = ops->features | features | QUEUE_FEATURES;
	if (!ops->serve) /* they are lent and come back all together */
		v->offered &= ~(1ull << VIRTIO_F_RING_RESET);
	v->watched = -1;
	v->master = true;
	pthread_mutex_init(&v->lock, NULL);
	pthread_mutex_init(&v->wish_lock, NULL);
	for (unsigned i = 0; i < ORC_VIRTIO_QUEUES; i++)
		v->kick_fd[i] = -1;
	for (unsigned i = 0; i < ORC_VIRTIO_VECTORS; i++) {
		v->vector_fd[i] = -1;
		v->vector[i].masked = true;
	}
	forget(v);
}

void orc_virtio_stop(orc_virtio *v)
{
	pthread_mutex_lock(&v->lock);
	if (v->watched >= 0)
		close(v->watched);
	v->watched = -1;
	pthread_mutex_unlock(&v->lock);
}

void orc_virtio_fini(orc_virtio *v)
{
	orc_virtio_stop(v);
	pthread_mutex_destroy(&v->wish_lock);
	pthread_mutex_destroy(&v->lock);
}

void orc_virtio_watch(orc_virtio *v, int fd, orc_virtio_ready *ready)
{
	v->watched = fd;
	v->ready = ready;
}

orc_device *orc_virtio_device(orc_virtio *v)
{
	return &v->bar;
}

uint8_t orc_virtio_isr(orc_virtio *v)
{
	uint8_t isr;

	pthread_mutex_lock(&v->lock);
	isr = v->isr;
	pthread_mutex_unlock(&v->lock);
	return isr;
}

uint16_t orc_virtio_type(const orc_virtio *v)
{
	return v->ops->type;
}

uint16_t orc_virtio_queues(const orc_virtio *v)
{
	return v->queues;
}

uint16_t orc_virtio_vectors(const orc_virtio *v)
{
	return v->vectors;
}

uint32_t orc_virtio_config_size(const orc_virtio *v)
{
	return v->ops->config_size;
}

void orc_virtio_set_kick_fd(orc_virtio *v, uint16_t queue, int fd)
{
	v->kick_fd[queue] = fd;
}

void orc_virtio_set_vector_fd(orc_virtio *v, uint16_t vector, int fd)
{
	pthread_mutex_lock(&v->lock);
	v->vector_fd[vector] = fd;
	pthread_mutex_unlock(&v->lock);
}

void orc_virtio_vector(orc_virtio *v, uint16_t vector, struct orc_vector *out)
{
	pthread_mutex_lock(&v->lock);
	*out = v->vector[vector];
	pthread_mutex_unlock(&v->lock);
}

int orc_virtio_outstanding(orc_virtio *v)
{
	int n;

	if (pthread_mutex_trylock(&v->lock))
		return -1;
	n = (int)orc_virtio_in_flight(v);
	pthread_mutex_unlock(&v->lock);
	return n;
}

void orc_virtio_look(orc_virtio *v, struct orc_virtio_counters *out)
{
	pthread_mutex_lock(&v->lock);
	*out = (struct orc_virtio_counters){.interrupts = v->interrupts, .kicks = v->kicks, .status = v->status,
					    .error = (uint16_t)v->error, .error_queue = v->error_queue};
	for (unsigned i = 0; i < v->queues; i++)
		out->requests += v->queue[i].requests;
	pthread_mutex_unlock(&v->lock);
}
