/* PCI configuration space (PCI Local Bus 3.0, chapter 6) of bus 0, which has single-function devices and no bridge.
 *
 * What a function has there is bytes, and a mask of the bits that the guest may change. So reads and nearly all writes end here.
 * Lock: pci->lock; a BAR that is accessed through configuration space (orc_pci_window) takes its own within. */
#ifndef ORC_PCI_H
#define ORC_PCI_H

#include "orc.h"

enum {
	ORC_PCI_SLOTS = 32,
	ORC_PCI_SPACE = 4096,                            /* bytes of a function */
	ORC_PCI_ECAM = ORC_PCI_SLOTS * 8 * ORC_PCI_SPACE, /* of bus 0 */
	ORC_PCI_PORTS = 8,                               /* CONFIG_ADDRESS and CONFIG_DATA: 3.2.2.3.2 */
};
typedef struct orc_pci orc_pci;

orc_pci *orc_pci_new(void); /* NULL: no memory. The owner; orc_device_free of its orc_pci_ecam frees it */
/* Two views of the same: memory-mapped (PCI Express 3.0, 7.2.2), and by the ports 0xcf8 to 0xcff. An access that changes a bit
 * with an effect is stored and then goes up to Python, which looks at what is there now. Nothing else does. */
orc_device *orc_pci_ecam(orc_pci *);
orc_device *orc_pci_ports(orc_pci *); /* freeing it does nothing: it goes with the other */

/* A function, before a bus has any of these: what it has at reset, the bits that the guest may write, and of these those with an
 * effect; ORC_PCI_SPACE bytes each. 0, -EINVAL (no such slot, or it is taken) or -ENOMEM. */
int orc_pci_add(orc_pci *, uint32_t slot, const uint8_t *reset, const uint8_t *writable, const uint8_t *effect);
/* A virtio device, whose BAR 0 `bar` answers (orc_virtio_device), with the capability VIRTIO_PCI_CAP_PCI_CFG there (virtio 1.2, 4.1.4.9):
 * its data are accesses of the BAR. NULL: of nobody; then, and from then on, `bar` is not called. */
void orc_pci_window(orc_pci *, uint32_t slot, uint32_t capability, orc_device *bar);

/* Any thread. Of a function that there is. */
void orc_pci_copy(orc_pci *, uint32_t slot, uint32_t offset, uint32_t size, void *out); /* within ORC_PCI_SPACE */
/* As it was saved by orc_pci_copy. False: it differs where no guest can write, and all is as it was. */
bool orc_pci_load(orc_pci *, uint32_t slot, const uint8_t *bytes);
uint32_t orc_pci_selected(orc_pci *); /* CONFIG_ADDRESS */
void orc_pci_select(orc_pci *, uint32_t value);
void orc_pci_reset(orc_pci *); /* all functions, and CONFIG_ADDRESS */

#endif
