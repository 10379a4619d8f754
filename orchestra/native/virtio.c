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

#include "virtio.h"

enum {
	ORDERED = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK,
	DRIVERS = ORDERED | VIRTIO_CONFIG_S_FAILED, /* bits that the driver sets */
	ISR_QUEUE = 1, ISR_CONFIG = 2,              /* 4.1.4.5 */
};

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
	/* Full (EAGAIN): it fires anyway. */
	while (write(v->vector_fd[vector], &one, sizeof one) < 0 && errno == EINTR)
		;
}

uint32_t orc_virtio_pending(const orc_virtio *v)
{
	struct pollfd fired[ORC_VIRTIO_VECTORS];
	uint32_t bits = 0;

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

static void all_again(orc_virtio *v)
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
	       !v->resetting && q->enabled && !q->error;
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
		interrupt(v, v->config_vector, ISR_CONFIG);
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
	atomic_store(&v->kicked, 0);
}

static void reset(orc_virtio *v)
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
			interrupt(v, v->queue_vector[i], ISR_QUEUE);
		if (q->error && !v->error && !v->resetting)
			needs_reset(v, i, q->error);
		if (v->queue_resetting >> i & 1 && !q->in_flight)
			forget_queue(v, i);
	}
	if (v->resetting && !orc_virtio_in_flight(v))
		forget(v);
}

/* ---- what the driver writes ------------------------------------------------------------------------------------- */

static bool features_fit(const orc_virtio *v, orc_u64 accepted)
{
	return !(accepted & ~v->offered) && accepted >> VIRTIO_F_VERSION_1 & 1;
}

/* Each step has all before it. */
static bool in_order(uint8_t status)
{
	switch (status & ORDERED) {
	case 0:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK:
	case ORDERED:
		return true;
	}
	return false;
}

/* What no driver may do (2.1.1: clear a bit, or leave a step out) changes nothing. */
static void write_status(orc_virtio *v, uint8_t value)
{
	uint8_t fresh;

	if (!value) {
		reset(v);
		return;
	}
	value = (uint8_t)(value & DRIVERS) | (v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
	if (v->resetting || v->status & ~value || !in_order(value))
		return;
	fresh = value & ~v->status;
	if (fresh & VIRTIO_CONFIG_S_FEATURES_OK && !features_fit(v, v->accepted)) { /* 2.2.2; the driver looks whether it is set */
		value &= ~(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
		fresh &= value;
	}
	v->status = value;
	if (!(fresh & VIRTIO_CONFIG_S_DRIVER_OK))
		return;
	if (v->ops->start)
		v->ops->start(v);
	all_again(v); /* a notification that came earlier was lost: some drivers fill queues first */
}

static void write_feature(orc_virtio *v, uint32_t value)
{
	if (v->status & VIRTIO_CONFIG_S_FEATURES_OK || v->driver_feature_select > 1)
		return;
	v->accepted &= v->driver_feature_select ? UINT32_MAX : (orc_u64)UINT32_MAX << 32;
	v->accepted |= (orc_u64)value << 32 * v->driver_feature_select;
}

/* 4.1.5.1.2.1: what can't be mapped reads as NO_VECTOR. */
static uint16_t vector_or_none(const orc_virtio *v, uint16_t vector)
{
	return vector < v->vectors ? vector : VIRTIO_MSI_NO_VECTOR;
}

static enum orc_queue_error enable(const orc_virtio *v, struct orc_queue *q, uint16_t next)
{
	return orc_queue_enable(q, v->memory, v->ops->queue_size, orc_virtio_has(v, VIRTIO_RING_F_EVENT_IDX),
				orc_virtio_has(v, VIRTIO_RING_F_INDIRECT_DESC), next);
}

static void write_enable(orc_virtio *v, uint16_t i, uint16_t value)
{
	if (value != 1 || v->queue[i].enabled || !(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
		return;
	enable(v, &v->queue[i], 0);
	orc_virtio_settle(v);
	orc_virtio_again(v, i); /* it may be live already: 2.6.1.2 */
}

static void write_queue_reset(orc_virtio *v, uint16_t i, uint16_t value)
{
	if (value != 1 || !v->queue[i].enabled || !orc_virtio_has(v, VIRTIO_F_RING_RESET))
		return;
	v->queue[i].enabled = false;
	v->queue_resetting |= 1ull << i;
	orc_virtio_settle(v);
}

static bool is_size(const orc_virtio *v, uint16_t size)
{
	return size && !(size & (size - 1)) && size <= v->ops->queue_size;
}

/* Of the two halves of an address, or both. */
static void write_address(orc_u64 *address, uint32_t offset, const uint8_t *data, uint32_t size)
{
	if ((size == 4 && !(offset & 3)) || (size == 8 && !offset))
		memcpy((uint8_t *)address + offset, data, size);
}

/* ---- 4.1.4.3: the common configuration -------------------------------------------------------------------------- */

static void write_of_queue(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	uint16_t i = v->queue_select, value = (uint16_t)(data[0] | (size > 1 ? data[1] << 8 : 0));
	struct orc_queue *q;
	bool fixed;

	if (i >= v->queues || v->resetting || v->queue_resetting >> i & 1)
		return;
	q = &v->queue[i];
	fixed = q->enabled; /* 4.1.4.3.2: all is set up before it is enabled */
	if (offset >= VIRTIO_PCI_COMMON_Q_DESCLO && offset < VIRTIO_PCI_COMMON_Q_NDATA) {
		orc_u64 *const address[] = {&q->descriptors, &q->driver, &q->device};

		if (!fixed)
			write_address(address[(offset - VIRTIO_PCI_COMMON_Q_DESCLO) / 8], offset % 8, data, size);
		return;
	}
	if (size != 2)
		return;
	switch (offset) {
	case VIRTIO_PCI_COMMON_Q_SIZE:
		if (!fixed && is_size(v, value))
			q->size = value;
		break;
	case VIRTIO_PCI_COMMON_Q_MSIX:
		v->queue_vector[i] = vector_or_none(v, value);
		break;
	case VIRTIO_PCI_COMMON_Q_ENABLE:
		write_enable(v, i, value);
		break;
	case VIRTIO_PCI_COMMON_Q_RESET:
		write_queue_reset(v, i, value);
		break;
	}
}

/* 4.1.3.1: an access is as wide as its field, or as a half of 64 bits. Others write nothing. */
void orc_virtio_common_write(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	uint32_t value = 0;

	memcpy(&value, data, size < 4 ? size : 4);
	switch (offset) {
	case VIRTIO_PCI_COMMON_DFSELECT:
		if (size == 4)
			v->device_feature_select = value;
		break;
	case VIRTIO_PCI_COMMON_GFSELECT:
		if (size == 4)
			v->driver_feature_select = value;
		break;
	case VIRTIO_PCI_COMMON_GF:
		if (size == 4)
			write_feature(v, value);
		break;
	case VIRTIO_PCI_COMMON_MSIX:
		if (size == 2 && !v->resetting)
			v->config_vector = vector_or_none(v, (uint16_t)value);
		break;
	case VIRTIO_PCI_COMMON_STATUS:
		if (size == 1)
			write_status(v, (uint8_t)value);
		break;
	case VIRTIO_PCI_COMMON_Q_SELECT:
		if (size == 2)
			v->queue_select = (uint16_t)value;
		break;
	default:
		write_of_queue(v, offset, data, size);
	}
}

/* Its 32 bits at that number; 0 beyond 64 bits: 4.1.4.3.1. */
static uint32_t features(orc_u64 all, uint32_t select)
{
	return select > 1 ? 0 : (uint32_t)(all >> 32 * select);
}

static void show_queue(const orc_virtio *v, uint8_t *image)
{
	uint16_t i = v->queue_select, enabled, resetting;
	const struct orc_queue *q;

	if (i >= v->queues) /* its size reads as 0: there is none */
		return;
	q = &v->queue[i];
	resetting = v->queue_resetting >> i & 1;
	enabled = q->enabled || resetting; /* both until it is done: 4.1.4.3.1 */
	memcpy(image + VIRTIO_PCI_COMMON_Q_SIZE, &q->size, 2);
	memcpy(image + VIRTIO_PCI_COMMON_Q_MSIX, &v->queue_vector[i], 2);
	memcpy(image + VIRTIO_PCI_COMMON_Q_ENABLE, &enabled, 2);
	memcpy(image + VIRTIO_PCI_COMMON_Q_NOFF, &i, 2);
	memcpy(image + VIRTIO_PCI_COMMON_Q_DESCLO, &q->descriptors, 8);
	memcpy(image + VIRTIO_PCI_COMMON_Q_AVAILLO, &q->driver, 8);
	memcpy(image + VIRTIO_PCI_COMMON_Q_USEDLO, &q->device, 8);
	memcpy(image + VIRTIO_PCI_COMMON_Q_RESET, &resetting, 2);
}

/* No read of it has an effect, so all of it is made, and what was asked for is taken from there. */
void orc_virtio_common_read(orc_virtio *v, uint32_t offset, uint8_t *data, uint32_t size)
{
	uint8_t image[ORC_BAR_COMMON_SIZE] = {0};
	uint32_t offered = features(v->offered, v->device_feature_select);
	uint32_t accepted = features(v->accepted, v->driver_feature_select);

	memcpy(image + VIRTIO_PCI_COMMON_DFSELECT, &v->device_feature_select, 4);
	memcpy(image + VIRTIO_PCI_COMMON_DF, &offered, 4);
	memcpy(image + VIRTIO_PCI_COMMON_GFSELECT, &v->driver_feature_select, 4);
	memcpy(image + VIRTIO_PCI_COMMON_GF, &accepted, 4);
	memcpy(image + VIRTIO_PCI_COMMON_MSIX, &v->config_vector, 2);
	memcpy(image + VIRTIO_PCI_COMMON_NUMQ, &v->queues, 2);
	image[VIRTIO_PCI_COMMON_STATUS] = v->status;
	image[VIRTIO_PCI_COMMON_CFGGENERATION] = v->generation;
	memcpy(image + VIRTIO_PCI_COMMON_Q_SELECT, &v->queue_select, 2);
	show_queue(v, image);
	for (uint32_t i = 0; i < size; i++)
		data[i] = offset < sizeof image - i ? image[offset + i] : 0;
}

/* ---- 2.5: the device's own configuration ------------------------------------------------------------------------ */

void orc_virtio_config_read(orc_virtio *v, uint32_t offset, uint8_t *data, uint32_t size)
{
	for (uint32_t i = 0; i < size; i++)
		data[i] = offset + i < v->ops->config_size ? v->config[offset + i] : 0;
	/* 4.1.4.3.1: the driver asks for the generation before and behind what it reads. */
	if (offset < v->ops->config_size && v->config_changed) {
		v->config_changed = false;
		v->generation++;
	}
}

void orc_virtio_config_write(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	if (v->ops->config_write && offset < v->ops->config_size && size <= v->ops->config_size - offset)
		v->ops->config_write(v, offset, data, size);
}

void orc_virtio_config_set(orc_virtio *v, uint32_t offset, const void *data, uint32_t size)
{
	pthread_mutex_lock(&v->lock);
	if (memcmp(v->config + offset, data, size)) {
		memcpy(v->config + offset, data, size);
		v->config_changed = true;
		if (v->status & VIRTIO_CONFIG_S_DRIVER_OK && !v->resetting)
			interrupt(v, v->config_vector, ISR_CONFIG);
	}
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
	v->watched = -1;
	pthread_mutex_init(&v->lock, NULL);
	for (unsigned i = 0; i < ORC_VIRTIO_QUEUES; i++)
		v->kick_fd[i] = -1;
	for (unsigned i = 0; i < ORC_VIRTIO_VECTORS; i++) {
		v->vector_fd[i] = -1;
		v->vector[i].masked = true;
	}
	forget(v);
}

void orc_virtio_fini(orc_virtio *v)
{
	if (v->watched >= 0)
		close(v->watched);
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

void orc_virtio_look(orc_virtio *v, struct orc_virtio_counters *out)
{
	pthread_mutex_lock(&v->lock);
	*out = (struct orc_virtio_counters){.interrupts = v->interrupts, .kicks = v->kicks, .status = v->status,
					    .error = (uint16_t)v->error, .error_queue = v->error_queue};
	for (unsigned i = 0; i < v->queues; i++)
		out->requests += v->queue[i].requests;
	pthread_mutex_unlock(&v->lock);
}

/* ---- state ------------------------------------------------------------------------------------------------------ */

void orc_virtio_save(orc_virtio *v, struct orc_virtio_state *s)
{
	pthread_mutex_lock(&v->lock);
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
	pthread_mutex_unlock(&v->lock);
}

static bool is_vector(const orc_virtio *v, uint16_t vector)
{
	return vector == vector_or_none(v, vector);
}

/* A queue as it was saved, or no queue can be in that state. */
static bool make_queue(const orc_virtio *v, const struct orc_virtio_state *s, uint16_t i, struct orc_queue *q)
{
	const struct orc_queue_state *from = &s->queue[i];
	enum orc_queue_error e;

	*q = (struct orc_queue){.size = from->size, .descriptors = from->descriptors, .driver = from->driver, .device = from->device};
	if (!is_size(v, from->size) || !is_vector(v, from->vector) || from->error >= ORC_QUEUE_ERRORS)
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
	    s->pending >> v->vectors || s->isr & ~(ISR_QUEUE | ISR_CONFIG) || s->error >= ORC_QUEUE_ERRORS ||
	    s->error_queue >= v->queues)
		return false;
	if (s->status & ~(DRIVERS | VIRTIO_CONFIG_S_NEEDS_RESET) || !in_order(s->status) ||
	    !s->error != !(s->status & VIRTIO_CONFIG_S_NEEDS_RESET) ||
	    (s->status & VIRTIO_CONFIG_S_FEATURES_OK && !features_fit(v, s->accepted)))
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
	reset(v);
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
	fire_saved(v, s->pending);
	if (v->status & VIRTIO_CONFIG_S_DRIVER_OK && v->ops->start)
		v->ops->start(v);
	all_again(v); /* a notification that nobody had seen is not part of it */
}

bool orc_virtio_load(orc_virtio *v, const struct orc_virtio_state *s)
{
	struct orc_queue queue[ORC_VIRTIO_QUEUES];
	bool fits;

	pthread_mutex_lock(&v->lock);
	fits = is_state(v, s) && !orc_virtio_in_flight(v);
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
	reset(v);
	v->generation = 0;
	v->config_changed = false;
	for (unsigned i = 0; i < v->vectors; i++) {
		v->vector[i] = (struct orc_vector){.masked = true};
		if (v->vector_fd[i] >= 0)
			while (read(v->vector_fd[i], &count, sizeof count) < 0 && errno == EINTR)
				;
	}
	pthread_mutex_unlock(&v->lock);
}
