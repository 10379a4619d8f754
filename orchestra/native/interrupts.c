/* The interrupt lines of a VM's irqchip, and where its messages go. They outlive the VM: who sets one then, or while it is
 * being closed, does nothing, and never reaches a descriptor that has become somebody else's. */
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "core.h"

struct orc_interrupts {
	pthread_mutex_t lock; /* held over the ioctl, so that closing waits for it; nothing is locked within */
	int vm;               /* -1: closed */
};

orc_interrupts *orc_interrupts_new(int vm)
{
	orc_interrupts *i = calloc(1, sizeof *i);

	if (!i)
		return NULL;
	pthread_mutex_init(&i->lock, NULL);
	i->vm = vm;
	return i;
}

void orc_interrupts_free(orc_interrupts *i)
{
	if (!i)
		return;
	pthread_mutex_destroy(&i->lock);
	free(i);
}

int orc_interrupts_set(orc_interrupts *i, uint32_t gsi, bool level)
{
	struct kvm_irq_level line = {.irq = gsi, .level = level};
	int rc = 0;

	pthread_mutex_lock(&i->lock);
	if (i->vm >= 0 && ioctl(i->vm, KVM_IRQ_LINE, &line) < 0)
		rc = -errno;
	pthread_mutex_unlock(&i->lock);
	return rc;
}

/* KVM has one table for all GSIs, which is replaced as a whole. What it has by default: lines 0 to 15 go to the PICs and the
 * I/O APIC, the others to the latter alone (default_routing in arch/x86/kvm/irq_comm.c). */
enum { LINES = KVM_IOAPIC_NUM_PINS + 16 }; /* entries */

static size_t add_lines(struct kvm_irq_routing_entry *entry)
{
	size_t n = 0;

	for (uint32_t gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; gsi++) {
		entry[n++] = (struct kvm_irq_routing_entry){.gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP,
							    .u.irqchip = {KVM_IRQCHIP_IOAPIC, gsi}};
		if (gsi < 16)
			entry[n++] = (struct kvm_irq_routing_entry){
				.gsi = gsi, .type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = {gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, gsi % 8}};
	}
	return n;
}

int orc_interrupts_route(orc_interrupts *i, bool lines, const struct orc_route *routes, size_t n)
{
	struct kvm_irq_routing *table = calloc(1, sizeof *table + (LINES + n) * sizeof table->entries[0]);
	int rc = 0;

	if (!table)
		return -ENOMEM;
	if (lines)
		table->nr = (uint32_t)add_lines(table->entries);
	for (size_t k = 0; k < n; k++) {
		struct kvm_irq_routing_entry *e = &table->entries[table->nr++];

		e->gsi = routes[k].gsi;
		e->type = KVM_IRQ_ROUTING_MSI;
		e->u.msi.address_lo = (uint32_t)routes[k].address;
		e->u.msi.address_hi = (uint32_t)(routes[k].address >> 32);
		e->u.msi.data = routes[k].data;
	}
	pthread_mutex_lock(&i->lock);
	if (i->vm >= 0 && ioctl(i->vm, KVM_SET_GSI_ROUTING, table) < 0)
		rc = -errno;
	pthread_mutex_unlock(&i->lock);
	free(table);
	return rc;
}

void orc_interrupts_close(orc_interrupts *i)
{
	pthread_mutex_lock(&i->lock);
	i->vm = -1;
	pthread_mutex_unlock(&i->lock);
}
