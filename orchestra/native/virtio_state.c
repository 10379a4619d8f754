/* A virtio device as data: saved, checked, and gone on from. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "virtio_rules.h"

void orc_virtio_look_at_state(orc_virtio *v, struct orc_virtio_state *s)
{
	*s = (struct orc_virtio_state){
		.accepted = v->accepted, .device_feature_select = v->device_feature_select,
		.driver_feature_select = v->driver_feature_select, .status = v->status, .isr = v->isr,
		.generation = v->generation, .config_changed = v->config_changed, .queue_select = v->queue_select,
		.config_vector = v->config_vector, .error = (uint16_t)v->error, .error_queue = v->error_queue,
		.queues = v->queues, .vectors = v->vectors, .pending = orc_virtio_pending(v)};
	for (unsigned i = 0; i < v->queues; i++) {
		const struct orc_queue *q = &v->queue[i];

		s->queue[i] = (struct orc_queue_state){.descriptors = q->descriptors, .driver = q->driver, .device = q->device,
						       .size = q->size, .vector = v->queue_vector[i], .next = q->next_avail,
						       .error = (uint16_t)q->error, .enabled = q->enabled};
	}
	memcpy(s->vector, v->vector, sizeof s->vector);
	memcpy(s->config, v->config, sizeof s->config);
	if (v->ops->save)
		v->ops->save(v, s);
}

void orc_virtio_save(orc_virtio *v, struct orc_virtio_state *s)
{
	pthread_mutex_lock(&v->lock);
	orc_virtio_look_at_state(v, s);
	pthread_mutex_unlock(&v->lock);
}

static bool is_vector(const orc_virtio *v, uint16_t vector)
{
	return vector == orc_virtio_vector_or_none(v, vector);
}

/* A queue as it was saved, or no queue can be in that state. */
static bool make_queue(const orc_virtio *v, const struct orc_virtio_state *s, uint16_t i, struct orc_queue *q)
{
	const struct orc_queue_state *from = &s->queue[i];
	enum orc_queue_error e;

	*q = (struct orc_queue){.size = from->size, .descriptors = from->descriptors, .driver = from->driver, .device = from->device};
	if (!orc_virtio_is_size(v, from->size) || !is_vector(v, from->vector) || from->error >= ORC_QUEUE_ERRORS)
		return false;
	if (!from->enabled)
		return !from->next && !from->error;
	if (!(s->status & VIRTIO_CONFIG_S_FEATURES_OK))
		return false;
	e = orc_queue_enable(q, v->memory, v->ops->queue_size, s->accepted >> VIRTIO_RING_F_EVENT_IDX & 1,
			     s->accepted >> VIRTIO_RING_F_INDIRECT_DESC & 1, from->next);
	if (e && !from->error)
		return false;
	q->error = (enum orc_queue_error)from->error;
	return true;
}

static bool is_state(const orc_virtio *v, const struct orc_virtio_state *s)
{
	if (s->queues != v->queues || s->vectors != v->vectors || !is_vector(v, s->config_vector) ||
	    s->pending >> v->vectors || s->isr & ~(ORC_ISR_QUEUE | ORC_ISR_CONFIG) || s->error >= ORC_QUEUE_ERRORS ||
	    s->error_queue >= v->queues)
		return false;
	if (s->status & ~(ORC_DRIVERS_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET) || !orc_virtio_in_order(s->status) ||
	    !s->error != !(s->status & VIRTIO_CONFIG_S_NEEDS_RESET) ||
	    (s->status & VIRTIO_CONFIG_S_FEATURES_OK && !orc_virtio_features_fit(v, s->accepted)))
		return false;
	for (unsigned i = 0; i < v->vectors; i++)
		if (s->vector[i].address & 3)
			return false;
	return true;
}

static void fire_saved(orc_virtio *v, uint32_t vectors)
{
	const uint64_t one = 1;

	for (unsigned i = 0; i < v->vectors; i++)
		if (vectors >> i & 1 && v->vector_fd[i] >= 0)
			while (write(v->vector_fd[i], &one, sizeof one) < 0 && errno == EINTR)
				;
}

static void take_over(orc_virtio *v, const struct orc_virtio_state *s, const struct orc_queue *queue)
{
	orc_virtio_reset(v);
	v->accepted = s->accepted;
	v->device_feature_select = s->device_feature_select;
	v->driver_feature_select = s->driver_feature_select;
	v->status = s->status;
	v->isr = s->isr;
	v->generation = s->generation;
	v->config_changed = s->config_changed;
	v->queue_select = s->queue_select;
	v->config_vector = s->config_vector;
	v->error = (enum orc_queue_error)s->error;
	v->error_queue = s->error_queue;
	for (unsigned i = 0; i < v->queues; i++) {
		orc_u64 requests = v->queue[i].requests;

		v->queue[i] = queue[i];
		v->queue[i].requests = requests;
		v->queue_vector[i] = s->queue[i].vector;
	}
	memcpy(v->vector, s->vector, sizeof v->vector);
	memcpy(v->config, s->config, sizeof v->config);
	if (v->ops->load)
		v->ops->load(v, s);
	fire_saved(v, s->pending);
	if (v->status & VIRTIO_CONFIG_S_DRIVER_OK && v->ops->start)
		v->ops->start(v);
	orc_virtio_all_again(v); /* a notification that nobody had seen is not part of it */
}

bool orc_virtio_load(orc_virtio *v, const struct orc_virtio_state *s)
{
	struct orc_queue queue[ORC_VIRTIO_QUEUES];
	bool fits;

	pthread_mutex_lock(&v->lock);
	fits = is_state(v, s) && !v->lent && !orc_virtio_in_flight(v) && (!v->ops->fits || v->ops->fits(v, s));
	for (uint16_t i = 0; fits && i < v->queues; i++)
		fits = make_queue(v, s, i, &queue[i]);
	if (fits)
		take_over(v, s, queue);
	pthread_mutex_unlock(&v->lock);
	return fits;
}

void orc_virtio_power_on(orc_virtio *v)
{
	uint64_t count;

	pthread_mutex_lock(&v->lock);
	orc_virtio_reset(v);
	v->generation = 0;
	v->config_changed = false;
	v->owed_kicks = v->owed_vectors = 0;
	for (unsigned i = 0; i < v->vectors; i++) {
		v->vector[i] = (struct orc_vector){.masked = true};
		if (v->vector_fd[i] >= 0)
			while (read(v->vector_fd[i], &count, sizeof count) < 0 && errno == EINTR)
				;
	}
	pthread_mutex_unlock(&v->lock);
}
