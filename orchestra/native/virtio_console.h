/* A console device and its ports, between virtio_console.c (data) and virtio_console_control.c (control messages). All with the
 * device's lock held. */
#ifndef ORC_VIRTIO_CONSOLE_H
#define ORC_VIRTIO_CONSOLE_H

#include <linux/virtio_console.h>

#include "core.h"
#include "virtio.h"

/* 5.3.2: port 0 has the first two queues, and port n those from 2 * n + 2 on. */
enum { ORC_CONSOLE_CONTROL_RECEIVE = 2, ORC_CONSOLE_CONTROL_TRANSMIT = 3 };

struct orc_console_device;

/* A port of the device: 0 is the console. */
struct orc_console_port {
	struct orc_console_device *device;
	uint8_t number, name_size;
	char name[ORC_CONSOLE_NAME];
	orc_console *stream;    /* the VM's console, or a port */
	_Atomic bool listening; /* the device takes input of it */
	/* Since the last reset. Added: the driver was told of it, or is to be. Ready: the driver has accepted it. Open: a program of
	 * the guest's has it. Closing: that was so, and there may be output still. */
	bool added, ready, open, closing;
	uint8_t pending; /* messages that the driver is to be sent, a bit each (virtio_console_control.c) */
	uint32_t sent;   /* bytes of the chain at the head of its transmit queue that are output already */
};

struct orc_console_device {
	orc_virtio virtio;
	unsigned n; /* ports, the console among them */
	struct orc_console_port port[1 + ORC_CONSOLE_PORTS];
};

static inline uint16_t orc_console_receive_queue(const struct orc_console_port *p)
{
	return (uint16_t)(p->number ? 2 * p->number + 2 : 0);
}

static inline uint16_t orc_console_transmit_queue(const struct orc_console_port *p)
{
	return orc_console_receive_queue(p) + 1;
}

/* Nobody in the guest has it any more, and all that was written there is output. */
void orc_console_port_closed(struct orc_console_port *);

enum orc_served orc_console_serve_control_receive(struct orc_console_device *, struct orc_queue *);
enum orc_served orc_console_serve_control_transmit(struct orc_console_device *, struct orc_queue *);
/* The driver that has VIRTIO_CONSOLE_F_MULTIPORT is told of the console's new size. */
void orc_console_tell_size(struct orc_console_device *);
/* Whether such messages can wait for the driver. */
bool orc_console_can_be_pending(uint8_t pending);

#endif
