/* A guest's side of virtio, for tests: memory, and drivers of queues in it. */
#ifndef DRIVER_H
#define DRIVER_H

#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../virtio.h"
#include "check.h"

/* What the guest has. LOW goes on in NEXT, for the guest alone: on the host there is a gap. TOP ends with the last address. */
enum { PAGE = 4096, LOW = 0x10000, LOW_SIZE = 0x40000, NEXT = LOW + LOW_SIZE, NEXT_SIZE = 0x10000, ROM = 0x80000 };
#define TOP (UINT64_MAX - PAGE + 1)

struct guest {
	uint8_t *host; /* all regions, a page between them */
	size_t size;
	struct kvm_userspace_memory_region slot[4];
	orc_guest_memory *memory;
};

static inline void guest_begin(struct guest *g, orc_dirty *dirty)
{
	const struct { uint64_t start, size; uint32_t flags; } region[] = {
		{TOP, PAGE, 0}, {NEXT, NEXT_SIZE, 0}, {ROM, PAGE, KVM_MEM_READONLY}, {LOW, LOW_SIZE, 0}}; /* in any order */
	size_t at = 0;

	g->size = LOW_SIZE + NEXT_SIZE + 6 * PAGE;
	g->host = mmap(NULL, g->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(g->host != MAP_FAILED);
	for (unsigned i = 0; i < 4; i++) {
		g->slot[i] = (struct kvm_userspace_memory_region){
			.slot = i, .flags = region[i].flags, .guest_phys_addr = region[i].start,
			.memory_size = region[i].size, .userspace_addr = (uintptr_t)(g->host + at)};
		at += region[i].size + PAGE;
	}
	g->memory = orc_guest_memory_new(g->slot, 4, dirty);
	CHECK(g->memory && g->memory->n == 4);
}

static inline void guest_end(struct guest *g)
{
	orc_guest_memory_free(g->memory);
	munmap(g->host, g->size);
}

/* Where that is for us; a test that asks for what is not there is wrong. */
static inline void *at(const struct guest *g, uint64_t address)
{
	for (unsigned i = 0; i < 4; i++)
		if (address >= g->slot[i].guest_phys_addr && address - g->slot[i].guest_phys_addr < g->slot[i].memory_size)
			return (uint8_t *)(uintptr_t)g->slot[i].userspace_addr + (address - g->slot[i].guest_phys_addr);
	abort();
}

/* The driver of one queue. */
struct driver {
	uint64_t descriptors, driver, device;
	uint16_t size;
	bool event_idx;
	struct vring_desc *table;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t next, seen; /* the next entry to be made available; used ones that it has looked at */
};

/* Its rings in a row from there on. */
static inline struct driver driver_at(const struct guest *g, uint64_t address, uint16_t size)
{
	struct driver d = {.descriptors = address, .driver = address + 16 * size, .size = size};

	d.device = (d.driver + 6 + 2 * size + 3) & ~3ull;
	d.table = at(g, d.descriptors);
	d.avail = at(g, d.driver);
	d.used = at(g, d.device);
	return d;
}

static inline uint16_t *driver_used_event(const struct driver *d)
{
	return &d->avail->ring[d->size];
}

static inline uint16_t *driver_avail_event(const struct driver *d)
{
	return (uint16_t *)&d->used->ring[d->size];
}

/* Makes a chain available: 2.7.13. */
static inline void offer(struct driver *d, uint16_t head)
{
	__atomic_store_n(&d->avail->ring[d->next % d->size], head, __ATOMIC_RELAXED);
	__atomic_store_n(&d->avail->idx, ++d->next, __ATOMIC_SEQ_CST);
}

/* Whether it has to notify the device after that: 2.7.10.1. */
static inline bool must_notify(const struct driver *d)
{
	if (d->event_idx)
		return __atomic_load_n(driver_avail_event(d), __ATOMIC_SEQ_CST) == (uint16_t)(d->next - 1);
	return !(__atomic_load_n(&d->used->flags, __ATOMIC_SEQ_CST) & VRING_USED_F_NO_NOTIFY);
}

/* The next used one, if there is one. */
static inline bool reap(struct driver *d, struct vring_used_elem *out)
{
	if (__atomic_load_n(&d->used->idx, __ATOMIC_SEQ_CST) == d->seen)
		return false;
	out->id = __atomic_load_n(&d->used->ring[d->seen % d->size].id, __ATOMIC_RELAXED);
	out->len = __atomic_load_n(&d->used->ring[d->seen % d->size].len, __ATOMIC_RELAXED);
	d->seen++;
	return true;
}

/* For the next used one, before it looks whether it is there: 2.7.14. */
static inline void ask_for_interrupt(const struct driver *d)
{
	if (d->event_idx)
		__atomic_store_n(driver_used_event(d), d->seen, __ATOMIC_SEQ_CST);
	else
		__atomic_store_n(&d->avail->flags, 0, __ATOMIC_SEQ_CST);
}

static inline void describe(struct driver *d, uint16_t i, uint64_t address, uint32_t size, uint16_t flags, uint16_t next)
{
	d->table[i] = (struct vring_desc){address, size, flags, next};
}

/* ---- through BAR 0 ---------------------------------------------------------------------------------------------- */

static inline uint64_t get(orc_virtio *v, uint32_t offset, uint32_t size)
{
	uint64_t value = 0;

	CHECK(orc_device_answer(orc_virtio_device(v), offset, size, 1, false, &value));
	return value;
}

static inline bool put(orc_virtio *v, uint32_t offset, uint32_t size, uint64_t value) /* false: goes up to Python */
{
	return orc_device_answer(orc_virtio_device(v), offset, size, 1, true, &value);
}

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64, FAILED = 128 };
#define F_RINGS (1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX)
#define F_VERSION_1 (1ull << VIRTIO_F_VERSION_1)

/* 3.1.1, up to FEATURES_OK. */
static inline bool negotiate(orc_virtio *v, uint64_t features)
{
	put(v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	put(v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE);
	put(v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE | DRIVER);
	for (unsigned i = 0; i < 2; i++) {
		put(v, VIRTIO_PCI_COMMON_GFSELECT, 4, i);
		put(v, VIRTIO_PCI_COMMON_GF, 4, features >> 32 * i & UINT32_MAX);
	}
	put(v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	return get(v, VIRTIO_PCI_COMMON_STATUS, 1) & FEATURES_OK;
}

static inline void set_up(orc_virtio *v, uint16_t queue, struct driver *d, uint64_t features, uint16_t vector)
{
	d->event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1;
	put(v, VIRTIO_PCI_COMMON_Q_SELECT, 2, queue);
	put(v, VIRTIO_PCI_COMMON_Q_SIZE, 2, d->size);
	put(v, VIRTIO_PCI_COMMON_Q_MSIX, 2, vector);
	put(v, VIRTIO_PCI_COMMON_Q_DESCLO, 4, d->descriptors & UINT32_MAX);
	put(v, VIRTIO_PCI_COMMON_Q_DESCHI, 4, d->descriptors >> 32);
	put(v, VIRTIO_PCI_COMMON_Q_AVAILLO, 8, d->driver);
	put(v, VIRTIO_PCI_COMMON_Q_USEDLO, 8, d->device);
	put(v, VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1);
}

static inline void go(orc_virtio *v)
{
	put(v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/* ---- eventfds ----------------------------------------------------------------------------------------------------- */

static inline int new_eventfd(void)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK(fd >= 0);
	return fd;
}

static inline void notify(int fd)
{
	const uint64_t one = 1;

	CHECK(write(fd, &one, sizeof one) == sizeof one);
}

static inline bool is_readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 0) == 1;
}

static inline void await(int fd) /* and take it */
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	uint64_t n;

	CHECK(poll(&p, 1, (int)(PATIENCE / 1000000)) == 1, "it does not come");
	CHECK(read(fd, &n, sizeof n) == sizeof n);
}

#endif
