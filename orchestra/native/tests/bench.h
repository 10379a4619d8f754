/* A device with its driver, and all that it is wired to. */
#ifndef BENCH_H
#define BENCH_H

#include <unistd.h>

#include "driver.h"

enum { RINGS = LOW, DATA = LOW + 0x8000, W = VRING_DESC_F_WRITE, N = VRING_DESC_F_NEXT, SIZE = 8, BENCH_QUEUES = 8 };

struct bench {
	struct guest *g;
	orc_virtio *v;
	struct driver d[BENCH_QUEUES];
	int kick[BENCH_QUEUES], vector[BENCH_QUEUES + 1];
	uint16_t queues;
};

static inline void wire(struct bench *b, struct guest *g, orc_virtio *v, uint64_t rings)
{
	*b = (struct bench){.g = g, .v = v, .queues = orc_virtio_queues(v)};
	CHECK(v && b->queues <= BENCH_QUEUES);
	for (uint16_t i = 0; i < b->queues; i++) {
		b->d[i] = driver_at(g, rings + 0x1000u * i, SIZE);
		orc_virtio_set_kick_fd(v, i, b->kick[i] = new_eventfd());
	}
	for (uint16_t i = 0; i <= b->queues; i++)
		orc_virtio_set_vector_fd(v, i, b->vector[i] = new_eventfd());
}

static inline void drive(struct bench *b, uint64_t features)
{
	CHECK(negotiate(b->v, features | F_VERSION_1));
	put(b->v, VIRTIO_PCI_COMMON_MSIX, 2, b->queues);
	for (uint16_t i = 0; i < b->queues; i++)
		set_up(b->v, i, &b->d[i], features, i);
	go(b->v);
}

static inline void unwire(struct bench *b) /* its I/O thread has stopped */
{
	orc_device_free(orc_virtio_device(b->v));
	for (uint16_t i = 0; i < b->queues; i++)
		close(b->kick[i]);
	for (uint16_t i = 0; i <= b->queues; i++)
		close(b->vector[i]);
}

static inline void request(struct bench *b, int queue, uint16_t head, uint64_t address, uint32_t size, uint16_t flags)
{
	describe(&b->d[queue], head, address, size, flags, 0);
	offer(&b->d[queue], head);
	if (must_notify(&b->d[queue]))
		notify(b->kick[queue]);
}

static inline struct vring_used_elem await_used(struct bench *b, int queue)
{
	struct vring_used_elem e;

	for (;;) {
		ask_for_interrupt(&b->d[queue]);
		if (reap(&b->d[queue], &e))
			return e;
		await(b->vector[queue]);
	}
}

static inline orc_io *io_new(void)
{
	orc_io *io;

	CHECK(!orc_io_start("orchestra-io-of-a-long-name", &io));
	return io;
}

#endif
