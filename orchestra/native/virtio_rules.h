/* What a driver may say: of its registers, and of a saved state. */
#ifndef ORC_VIRTIO_RULES_H
#define ORC_VIRTIO_RULES_H

#include "virtio.h"

enum {
	ORC_STEPS = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK,
	ORC_DRIVERS_STATUS = ORC_STEPS | VIRTIO_CONFIG_S_FAILED, /* bits that the driver sets */
	ORC_ISR_QUEUE = 1, ORC_ISR_CONFIG = 2,                   /* 4.1.4.5 */
};

static inline bool orc_virtio_features_fit(const orc_virtio *v, orc_u64 accepted)
{
	return !(accepted & ~v->offered) && accepted >> VIRTIO_F_VERSION_1 & 1;
}

/* Each step has all before it. */
static inline bool orc_virtio_in_order(uint8_t status)
{
	switch (status & ORC_STEPS) {
	case 0:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER:
	case VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK:
	case ORC_STEPS:
		return true;
	}
	return false;
}

/* 4.1.5.1.2.1: what can't be mapped reads as NO_VECTOR. */
static inline uint16_t orc_virtio_vector_or_none(const orc_virtio *v, uint16_t vector)
{
	return vector < v->vectors ? vector : VIRTIO_MSI_NO_VECTOR;
}

static inline bool orc_virtio_is_size(const orc_virtio *v, uint16_t size)
{
	return size && !(size & (size - 1)) && size <= v->ops->queue_size;
}

#endif
