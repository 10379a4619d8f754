/* The registers of a virtio device (virtio 1.2): the common configuration (4.1.4.3) and the device's own (2.5). */
#include <string.h>

#include "virtio_rules.h"

/* ---- what the driver writes ------------------------------------------------------------------------------------- */

/* What no driver may do (2.1.1: clear a bit, or leave a step out) changes nothing. */
static void write_status(orc_virtio *v, uint8_t value)
{
	uint8_t fresh;

	if (!value) {
		orc_virtio_reset(v);
		return;
	}
	value = (uint8_t)(value & ORC_DRIVERS_STATUS) | (v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
	if (v->resetting || v->status & ~value || !orc_virtio_in_order(value))
		return;
	fresh = value & ~v->status;
	if (fresh & VIRTIO_CONFIG_S_FEATURES_OK && !orc_virtio_features_fit(v, v->accepted)) { /* 2.2.2; the driver looks whether it is set */
		value &= ~(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
		fresh &= value;
	}
	v->status = value;
	if (!(fresh & VIRTIO_CONFIG_S_DRIVER_OK))
		return;
	if (v->ops->start)
		v->ops->start(v);
	orc_virtio_all_again(v); /* a notification that came earlier was lost: some drivers fill queues first */
}

static void write_feature(orc_virtio *v, uint32_t value)
{
	if (v->status & VIRTIO_CONFIG_S_FEATURES_OK || v->driver_feature_select > 1)
		return;
	v->accepted &= v->driver_feature_select ? UINT32_MAX : (orc_u64)UINT32_MAX << 32;
	v->accepted |= (orc_u64)value << 32 * v->driver_feature_select;
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
	if (v->ops->queue_reset)
		v->ops->queue_reset(v, i);
	orc_virtio_settle(v);
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
		if (!fixed && orc_virtio_is_size(v, value))
			q->size = value;
		break;
	case VIRTIO_PCI_COMMON_Q_MSIX:
		v->queue_vector[i] = orc_virtio_vector_or_none(v, value);
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
			v->config_vector = orc_virtio_vector_or_none(v, (uint16_t)value);
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
