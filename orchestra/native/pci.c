/* PCI configuration space: see pci.h. */
#include <errno.h>
#include <linux/pci_regs.h>
#include <linux/virtio_pci.h>
#include <stdlib.h>
#include <string.h>

#include "pci.h"
#include "virtio.h"

struct function {
	uint8_t bytes[ORC_PCI_SPACE], reset[ORC_PCI_SPACE], writable[ORC_PCI_SPACE], effect[ORC_PCI_SPACE];
	uint32_t window; /* where its VIRTIO_PCI_CAP_PCI_CFG is; 0: it has none */
	uint32_t msix;   /* likewise its MSI-X capability */
	orc_device *bar;
};

struct ports {
	orc_device device;
	orc_pci *pci;
};

struct orc_pci {
	orc_device ecam;
	struct ports ports;
	pthread_mutex_t lock; /* what follows, but which functions there are */
	uint32_t selected;    /* CONFIG_ADDRESS */
	struct function *function[ORC_PCI_SLOTS];
};

enum { FUNCTIONS = 8, ENABLED = 1u << 31, ADDRESS = 0, DATA = 4, DWORD = 4 };

/* ---- VIRTIO_PCI_CAP_PCI_CFG -------------------------------------------------------------------------------------- */

enum { WINDOW_DATA = offsetof(struct virtio_pci_cfg_cap, pci_cfg_data) };

static bool touches_window(const struct function *f, uint32_t offset, uint32_t size)
{
	return f->window && f->bar && offset < f->window + WINDOW_DATA + DWORD && offset + size > f->window + WINDOW_DATA;
}

/* The access that the capability asks for. Whether Python is to look at what it changed. */
static bool through_window(struct function *f, orc_vcpu *by, bool write)
{
	struct virtio_pci_cap cap;
	struct orc_access a = {.count = 1, .write = write, .data = f->bytes + f->window + WINDOW_DATA};

	memcpy(&cap, f->bytes + f->window, sizeof cap);
	if (cap.bar || (cap.length != 1 && cap.length != 2 && cap.length != 4) || cap.offset % cap.length)
		return false;
	a.offset = cap.offset;
	a.size = cap.length;
	return !f->bar->answer(f->bar, by, &a);
}

/* ---- status: 6.2.3 ---------------------------------------------------------------------------------------------- */

static uint32_t find_msix(const struct function *f)
{
	uint8_t at = f->reset[PCI_STATUS] & PCI_STATUS_CAP_LIST ? f->reset[PCI_CAPABILITY_LIST] : 0;

	for (unsigned left = 64; at && left; left--, at = f->reset[at + 1])
		if (f->reset[at] == PCI_CAP_ID_MSIX)
			return at;
	return 0;
}

/* As of an interrupt line, which no function has: virtio demands it all the same (virtio 1.2, 4.1.4.5.1). */
static uint8_t interrupt_status(const struct function *f)
{
	bool msix_on = f->msix && f->bytes[f->msix + PCI_MSIX_FLAGS + 1] & PCI_MSIX_FLAGS_ENABLE >> 8;

	return f->bar && !msix_on && orc_virtio_isr((orc_virtio *)f->bar) ? PCI_STATUS_INTERRUPT : 0;
}

/* ---- one function ------------------------------------------------------------------------------------------------ */

static void read_function(struct function *f, orc_vcpu *by, uint32_t offset, uint8_t *data, uint32_t size)
{
	if (touches_window(f, offset, size))
		through_window(f, by, false);
	memcpy(data, f->bytes + offset, size);
	if (offset <= PCI_STATUS && PCI_STATUS < offset + size)
		data[PCI_STATUS - offset] |= interrupt_status(f);
}

/* Whether it has an effect. */
static bool write_function(struct function *f, orc_vcpu *by, uint32_t offset, const uint8_t *data, uint32_t size)
{
	bool effect = false;

	for (uint32_t i = 0; i < size; i++) {
		uint8_t *byte = &f->bytes[offset + i], writable = f->writable[offset + i];
		uint8_t now = (uint8_t)((*byte & ~writable) | (data[i] & writable));

		effect |= (now ^ *byte) & f->effect[offset + i];
		*byte = now;
	}
	if (touches_window(f, offset, size))
		effect |= through_window(f, by, true);
	return effect;
}

/* ---- bus 0: by the offset in the memory-mapped window ------------------------------------------------------------- */

/* The function there; NULL: there is none. */
static struct function *at(const orc_pci *p, orc_u64 offset)
{
	orc_u64 number = offset / ORC_PCI_SPACE;

	return offset < ORC_PCI_ECAM && !(number % FUNCTIONS) ? p->function[number / FUNCTIONS] : NULL;
}

static bool access_bytes(orc_pci *p, orc_vcpu *by, orc_u64 offset, bool write, uint8_t *data, uint32_t size)
{
	bool effect = false;

	while (size) { /* twice, if it crosses the end of a function's */
		uint32_t within = (uint32_t)offset % ORC_PCI_SPACE;
		uint32_t piece = ORC_PCI_SPACE - within < size ? ORC_PCI_SPACE - within : size;
		struct function *f = at(p, offset);

		if (f && write)
			effect |= write_function(f, by, within, data, piece);
		else if (f)
			read_function(f, by, within, data, piece);
		else if (!write) /* the host bridge answers for those that are not there: 6.1 */
			memset(data, 0xff, piece);
		offset += piece;
		data += piece;
		size -= piece;
	}
	return effect;
}

static bool answer_ecam(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	orc_pci *p = (orc_pci *)d;
	bool effect = false;

	pthread_mutex_lock(&p->lock);
	for (uint32_t i = 0; i < a->count; i++)
		effect |= access_bytes(p, by, a->offset, a->write, a->data + (size_t)i * a->size, a->size);
	pthread_mutex_unlock(&p->lock);
	return !effect;
}

/* ---- configuration mechanism 1: 3.2.2.3.2 ------------------------------------------------------------------------- */

/* CONFIG_ADDRESS is accessed as a doubleword only: others there are of other devices, which we don't have. */
static void access_address(orc_pci *p, bool write, uint8_t *data, uint32_t offset, uint32_t size)
{
	enum { WRITABLE = 0x80fffffc };

	if (offset != ADDRESS || size != DWORD) {
		if (!write)
			memset(data, 0xff, size);
	} else if (write) {
		memcpy(&p->selected, data, DWORD);
		p->selected &= WRITABLE;
	} else {
		memcpy(data, &p->selected, DWORD);
	}
}

static bool access_data(orc_pci *p, orc_vcpu *by, bool write, uint8_t *data, uint32_t offset, uint32_t size)
{
	enum { BUS = 0xff0000, FUNCTION_SHIFT = 8, REGISTER = 0xfc };
	uint32_t function = (p->selected & 0xffff) >> FUNCTION_SHIFT;

	if (!(p->selected & ENABLED) || p->selected & BUS || offset - DATA + size > DWORD) {
		if (!write)
			memset(data, 0xff, size);
		return false;
	}
	return access_bytes(p, by, (orc_u64)function * ORC_PCI_SPACE + (p->selected & REGISTER) + offset - DATA, write, data, size);
}

static bool answer_ports(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	orc_pci *p = ((struct ports *)d)->pci;
	bool effect = false;

	pthread_mutex_lock(&p->lock);
	for (uint32_t i = 0; i < a->count; i++) {
		uint8_t *data = a->data + (size_t)i * a->size;

		if (a->offset < DATA)
			access_address(p, a->write, data, (uint32_t)a->offset, a->size);
		else
			effect |= access_data(p, by, a->write, data, (uint32_t)a->offset, a->size);
	}
	pthread_mutex_unlock(&p->lock);
	return !effect;
}

/* ---- the owner's side --------------------------------------------------------------------------------------------- */

static void free_nothing(orc_device *d)
{
	(void)d;
}

static void free_pci(orc_device *d)
{
	orc_pci *p = (orc_pci *)d;

	for (unsigned i = 0; i < ORC_PCI_SLOTS; i++)
		free(p->function[i]);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

orc_pci *orc_pci_new(void)
{
	orc_pci *p = calloc(1, sizeof *p);

	if (!p)
		return NULL;
	p->ecam = (orc_device){answer_ecam, free_pci};
	p->ports = (struct ports){{answer_ports, free_nothing}, p};
	pthread_mutex_init(&p->lock, NULL);
	return p;
}

orc_device *orc_pci_ecam(orc_pci *p)
{
	return &p->ecam;
}

orc_device *orc_pci_ports(orc_pci *p)
{
	return &p->ports.device;
}

int orc_pci_add(orc_pci *p, uint32_t slot, const uint8_t *reset, const uint8_t *writable, const uint8_t *effect)
{
	struct function *f;

	if (slot >= ORC_PCI_SLOTS || p->function[slot])
		return -EINVAL;
	f = calloc(1, sizeof *f);
	if (!f)
		return -ENOMEM;
	memcpy(f->bytes, reset, ORC_PCI_SPACE);
	memcpy(f->reset, reset, ORC_PCI_SPACE);
	memcpy(f->writable, writable, ORC_PCI_SPACE);
	memcpy(f->effect, effect, ORC_PCI_SPACE);
	p->function[slot] = f;
	return 0;
}

void orc_pci_window(orc_pci *p, uint32_t slot, uint32_t capability, orc_device *bar)
{
	pthread_mutex_lock(&p->lock);
	p->function[slot]->window = capability;
	p->function[slot]->bar = bar;
	p->function[slot]->msix = find_msix(p->function[slot]);
	pthread_mutex_unlock(&p->lock);
}

void orc_pci_copy(orc_pci *p, uint32_t slot, uint32_t offset, uint32_t size, void *out)
{
	pthread_mutex_lock(&p->lock);
	memcpy(out, p->function[slot]->bytes + offset, size);
	pthread_mutex_unlock(&p->lock);
}

bool orc_pci_load(orc_pci *p, uint32_t slot, const uint8_t *bytes)
{
	struct function *f = p->function[slot];

	for (unsigned i = 0; i < ORC_PCI_SPACE; i++)
		if ((bytes[i] ^ f->reset[i]) & ~f->writable[i])
			return false;
	pthread_mutex_lock(&p->lock);
	memcpy(f->bytes, bytes, ORC_PCI_SPACE);
	pthread_mutex_unlock(&p->lock);
	return true;
}

uint32_t orc_pci_selected(orc_pci *p)
{
	uint32_t value;

	pthread_mutex_lock(&p->lock);
	value = p->selected;
	pthread_mutex_unlock(&p->lock);
	return value;
}

void orc_pci_select(orc_pci *p, uint32_t value)
{
	const uint32_t bytes = value;

	pthread_mutex_lock(&p->lock);
	access_address(p, true, (uint8_t *)&bytes, ADDRESS, DWORD);
	pthread_mutex_unlock(&p->lock);
}

void orc_pci_reset(orc_pci *p)
{
	pthread_mutex_lock(&p->lock);
	p->selected = 0;
	for (unsigned i = 0; i < ORC_PCI_SLOTS; i++)
		if (p->function[i])
			memcpy(p->function[i]->bytes, p->function[i]->reset, ORC_PCI_SPACE);
	pthread_mutex_unlock(&p->lock);
}
