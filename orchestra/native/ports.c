/* Two small port devices: a debug console and an exit port (QEMU's isa-debugcon and isa-debug-exit). */
#include <stdlib.h>
#include <string.h>

#include "core.h"

static void free_it(orc_device *d)
{
	free(d);
}

/* ---- the debug console ---------------------------------------------------------------------------------------- */

struct debug_console {
	orc_device device;
	orc_console *console;
	uint8_t detected; /* what a read gives */
};

static bool answer_debug_console(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	struct debug_console *c = (struct debug_console *)d;

	if (a->write) {
		orc_console_say(c->console, by, a->data, (size_t)a->size * a->count);
		return true;
	}
	memset(a->data, 0, (size_t)a->size * a->count);
	for (uint32_t i = 0; i < a->count; i++)
		a->data[(size_t)i * a->size] = c->detected;
	return true;
}

static void free_debug_console(orc_device *d)
{
	orc_console_free(((struct debug_console *)d)->console);
	free(d);
}

orc_device *orc_debug_console_new(orc_console *console, uint8_t detected)
{
	struct debug_console *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	*c = (struct debug_console){{answer_debug_console, free_debug_console}, orc_console_hold(console), detected};
	return &c->device;
}

/* ---- the exit port -------------------------------------------------------------------------------------------- */

/* A write ends the VM, which is Python's business. */
static bool answer_exit_port(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	(void)d, (void)by;
	if (!a->write)
		memset(a->data, 0, (size_t)a->size * a->count);
	return !a->write;
}

orc_device *orc_exit_port_new(void)
{
	orc_device *d = calloc(1, sizeof *d);

	if (d)
		*d = (orc_device){answer_exit_port, free_it};
	return d;
}
