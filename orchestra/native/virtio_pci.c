/* BAR 0 of a virtio device: its registers, its notifications, and its MSI-X table and pending bits (PCI Local Bus 3.0, 6.8.2). */
#include <string.h>

#include "virtio.h"

enum { ENTRY = 16, ADDRESS = 0, ADDRESS_HIGH = 4, DATA = 8, CONTROL = 12 }; /* of the table: 6.8.2.6 to 6.8.2.9 */

/* ---- the MSI-X table -------------------------------------------------------------------------------------------- */

static uint8_t table_byte(const orc_virtio *v, uint32_t offset)
{
	const struct orc_vector *vector;
	uint8_t entry[ENTRY] = {0};

	if (offset >= v->vectors * (uint32_t)ENTRY)
		return 0;
	vector = &v->vector[offset / ENTRY];
	memcpy(entry + ADDRESS, &vector->address, 8);
	memcpy(entry + DATA, &vector->data, 4);
	entry[CONTROL] = vector->masked;
	return entry[offset % ENTRY];
}

static void write_word(struct orc_vector *vector, uint32_t at, uint32_t value)
{
	switch (at) {
	case ADDRESS:
		vector->address = (vector->address & ~(orc_u64)UINT32_MAX) | (value & ~3u);
		break;
	case ADDRESS_HIGH:
		vector->address = (uint32_t)vector->address | (orc_u64)value << 32;
		break;
	case DATA:
		vector->data = value;
		break;
	case CONTROL:
		vector->masked = value & 1;
		break;
	}
}

/* Whether that changes what an irqfd is bound to. Accesses are of aligned doublewords and quadwords (6.8.2); others write nothing. */
static bool write_table(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	struct orc_vector *vector, before;
	uint32_t words[2];

	if ((size != 4 && size != 8) || offset & (size - 1) || offset >= v->vectors * (uint32_t)ENTRY)
		return false;
	vector = &v->vector[offset / ENTRY];
	before = *vector;
	memcpy(words, data, size);
	for (uint32_t i = 0; i < size / 4; i++)
		write_word(vector, offset % ENTRY + 4 * i, words[i]);
	return vector->masked != before.masked ||
	       (!vector->masked && (vector->address != before.address || vector->data != before.data));
}

static void read_pending(const orc_virtio *v, uint32_t offset, uint8_t *data, uint32_t size)
{
	orc_u64 bits;

	if (offset >= sizeof bits)
		return;
	bits = orc_virtio_pending(v);
	memcpy(data, (const uint8_t *)&bits + offset, size < sizeof bits - offset ? size : sizeof bits - offset);
}

/* ---- accesses --------------------------------------------------------------------------------------------------- */

static void read_part(orc_virtio *v, uint32_t part, uint32_t offset, uint8_t *data, uint32_t size)
{
	switch (part) {
	case ORC_BAR_COMMON:
		orc_virtio_common_read(v, offset, data, size);
		break;
	case ORC_BAR_ISR: /* 4.1.4.5.1: a read clears it */
		if (!offset) {
			data[0] = v->isr;
			v->isr = 0;
		}
		break;
	case ORC_BAR_DEVICE:
		orc_virtio_config_read(v, offset, data, size);
		break;
	case ORC_BAR_TABLE:
		for (uint32_t i = 0; i < size; i++)
			data[i] = table_byte(v, offset + i);
		break;
	case ORC_BAR_PBA:
		read_pending(v, offset, data, size);
		break;
	}
}

/* Of a device whose queues another process serves: whether it concerns that process. */
static bool concerns_back_end(const orc_virtio *v, uint32_t offset)
{
	return !v->ops->serve && (offset == VIRTIO_PCI_COMMON_STATUS || offset == VIRTIO_PCI_COMMON_Q_ENABLE ||
				  offset == VIRTIO_PCI_COMMON_Q_MSIX);
}

/* Whether Python is to look at the vectors, or at whom the queues belong to. */
static bool write_part(orc_virtio *v, uint32_t part, uint32_t offset, const uint8_t *data, uint32_t size)
{
	switch (part) {
	case ORC_BAR_COMMON:
		orc_virtio_common_write(v, offset, data, size);
		return concerns_back_end(v, offset);
	case ORC_BAR_DEVICE:
		orc_virtio_config_write(v, offset, data, size);
		break;
	case ORC_BAR_NOTIFY: /* KVM has an ioeventfd there: this is for whoever has none. The place says which queue, not the value */
		if (offset % ORC_NOTIFY_MULTIPLIER || offset / ORC_NOTIFY_MULTIPLIER >= v->queues)
			break;
		if (v->ops->serve) {
			orc_virtio_again(v, (uint16_t)(offset / ORC_NOTIFY_MULTIPLIER));
			break;
		}
		v->owed_kicks |= 1ull << offset / ORC_NOTIFY_MULTIPLIER;
		return true;
	case ORC_BAR_TABLE:
		return write_table(v, offset, data, size);
	}
	return false;
}

bool orc_virtio_pci_answer(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	orc_virtio *v = (orc_virtio *)d;
	bool up = false;

	(void)by;
	if (!a->write)
		memset(a->data, 0, (size_t)a->size * a->count);
	if (a->offset >= ORC_BAR_SIZE || a->size > 8)
		return true;
	pthread_mutex_lock(&v->lock);
	for (uint32_t i = 0; i < a->count; i++) {
		uint32_t part = (uint32_t)a->offset & ~(ORC_BAR_PART - 1u), offset = (uint32_t)a->offset & (ORC_BAR_PART - 1u);
		uint8_t *data = a->data + (size_t)i * a->size;

		if (a->write)
			up |= write_part(v, part, offset, data, a->size);
		else
			read_part(v, part, offset, data, a->size);
	}
	pthread_mutex_unlock(&v->lock);
	return !up;
}
