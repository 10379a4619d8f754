/* The interrupt lines of a VM's irqchip. They outlive the VM: who sets one then, or while it is being closed, does nothing,
 * and never reaches a descriptor that has become somebody else's. */
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

void orc_interrupts_close(orc_interrupts *i)
{
	pthread_mutex_lock(&i->lock);
	i->vm = -1;
	pthread_mutex_unlock(&i->lock);
}
