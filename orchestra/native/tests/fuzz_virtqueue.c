/* Whatever a guest does to virtio devices: any memory, any accesses of registers, an entropy device, a console with and
 * without ports, a disk and a balloon.
 *
 * The input is a program of small steps, so that a mutation of it changes one of them. Guest memory has no neighbours: what is
 * touched outside of it, or written where it is read-only, faults. With clang this is a target of libFuzzer; with gcc
 * (SELF_DRIVEN) it drives itself by what the compiler tells of the paths that were taken (-fsanitize-coverage=trace-pc):
 *
 *     fuzz SECONDS       from nothing; the second half of the time with a thread that changes memory meanwhile
 *     fuzz FILE...       these inputs: the one that was being run is in build/fuzz-input */
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_console.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"
#include "files.h"

const char *skipped;

enum { BASE = 0x10000, ROOM = 0x4000, HIGH = BASE + ROOM, READ_ONLY = 0x20000, RINGS = BASE, BETWEEN = 0x100, MOST = 8 };
enum { PORTS = 2, QUEUES = 2 * (1 + PORTS) + 2, CONTROL_RECEIVE = 2, CONTROL_TRANSMIT };

static uint8_t *host; /* ROOM, ROOM, a page: each between pages that are not there */
static orc_guest_memory *memory;
static uint64_t requests, broken[ORC_QUEUE_ERRORS]; /* that were served; runs in which a guest broke that rule */
static uint64_t given_back; /* bytes, by balloons */

static void map_memory(void)
{
	const struct { uint64_t start; size_t size; uint32_t flags; } part[] = {
		{BASE, ROOM, 0}, {HIGH, ROOM, 0}, {READ_ONLY, PAGE, KVM_MEM_READONLY}};
	struct kvm_userspace_memory_region slot[3];
	uint8_t *next = mmap(NULL, 2 * ROOM + 5 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(next != MAP_FAILED);
	host = next + PAGE;
	for (int i = 0; i < 3; i++) {
		next += PAGE;
		CHECK(!mprotect(next, part[i].size, i == 2 ? PROT_READ : PROT_READ | PROT_WRITE));
		slot[i] = (struct kvm_userspace_memory_region){.flags = part[i].flags, .guest_phys_addr = part[i].start,
							       .memory_size = part[i].size, .userspace_addr = (uintptr_t)next};
		next += part[i].size;
	}
	memory = orc_guest_memory_new(slot, 3, NULL);
	CHECK(memory);
}

/* ---- the input -------------------------------------------------------------------------------------------------- */

struct input {
	const uint8_t *data;
	size_t left;
};

static uint8_t byte(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->data++;
}

static uint16_t word(struct input *in)
{
	uint16_t low = byte(in);

	return (uint16_t)(low | byte(in) << 8);
}

/* Numbers as guests have them, and others. */
static uint64_t number(struct input *in)
{
	const uint64_t interesting[] = {0, 1, UINT16_MAX, UINT32_MAX, UINT64_MAX, 1ull << 31, 1ull << 63, READ_ONLY};
	uint8_t kind = byte(in);

	switch (kind & 3) {
	case 0:
		return interesting[kind >> 2 & 7];
	case 1:
		return byte(in);
	case 2:
		return BASE + word(in);
	default:
		return (uint64_t)word(in) << 48 | (uint64_t)word(in) << 32 | (uint64_t)word(in) << 16 | word(in);
	}
}

/* ---- a machine -------------------------------------------------------------------------------------------------- */

struct machine {
	orc_virtio *v;
	orc_console *console, *port[PORTS]; /* NULL: it has none */
	uint64_t multiport;                 /* its feature */
	uint64_t features;                  /* that the driver asked for last */
	struct driver d[QUEUES];
};

static bool answer(orc_virtio *v, uint64_t offset, uint32_t size, bool write, void *data)
{
	return orc_device_answer(orc_virtio_device(v), offset, size, 1, write, data);
}

/* What the device writes of a request of that queue. */
static bool is_written(const struct machine *m, const struct driver *d)
{
	return m->v->ops->type == VIRTIO_ID_BALLOON ? d >= &m->d[3] : !((d - m->d) & 1);
}

static void tick(orc_virtio *v)
{
	pthread_mutex_lock(&v->lock);
	orc_virtio_called(v);
	pthread_mutex_unlock(&v->lock);
}

static void wait_for_disk(orc_virtio *v)
{
	for (;;) {
		struct pollfd p = {.fd = v->watched, .events = POLLIN};
		uint32_t left;

		pthread_mutex_lock(&v->lock);
		left = orc_virtio_in_flight(v);
		pthread_mutex_unlock(&v->lock);
		if (!left)
			return;
		CHECK(poll(&p, 1, 10000) || errno == EINTR, "a request that does not end");
		pthread_mutex_lock(&v->lock);
		orc_virtio_called(v);
		pthread_mutex_unlock(&v->lock);
	}
}

/* A back-end gets the queues, and gives them back wherever it likes. */
static void lend_all(orc_virtio *v, bool back)
{
	struct orc_virtio_state state;
	uint16_t next[ORC_VIRTIO_QUEUES];

	if (orc_virtio_lend(v, &state))
		for (uint16_t i = 0; i < v->queues; i++)
			orc_virtio_wake(v, i);
	if (!back)
		return;
	for (unsigned i = 0; i < ORC_VIRTIO_QUEUES; i++)
		next[i] = (uint16_t)(0xfff0u + 7 * i);
	orc_virtio_back(v, next);
	CHECK(!v->resetting && !v->lent);
}

static void serve_all(orc_virtio *v, bool wait)
{
	if (!v->ops->serve) {
		lend_all(v, wait);
		return;
	}
	for (int turn = 0; turn < 4; turn++) {
		uint64_t kicked = atomic_exchange(&v->kicked, 0);

		pthread_mutex_lock(&v->lock);
		for (uint16_t i = 0; i < v->queues; i++)
			if (kicked >> i & 1)
				orc_virtio_serve(v, i);
		CHECK(!orc_virtio_in_flight(v) || v->watched >= 0);
		pthread_mutex_unlock(&v->lock);
		if (wait)
			wait_for_disk(v);
	}
}

/* A disk's header, data and status. */
static void disk_request(struct vring_desc *table, struct input *in)
{
	uint8_t how = byte(in);
	struct virtio_blk_outhdr header = {.type = how & 15, .sector = how & 16 ? number(in) : byte(in)};
	const struct virtio_blk_discard_write_zeroes range = {.sector = byte(in), .num_sectors = byte(in), .flags = how >> 5 & 1};
	uint32_t size = how & 64 ? 512u * (1 + byte(in) % 8) : header.type == VIRTIO_BLK_T_IN ? byte(in) : sizeof range;

	memcpy(host + 0x3000, &header, sizeof header);
	memcpy(host + 0x3010, &range, sizeof range);
	table[0] = (struct vring_desc){BASE + 0x3000, 16, VRING_DESC_F_NEXT, 1};
	table[1] = (struct vring_desc){how & 64 ? HIGH - 700 : BASE + 0x3010, size,
				       VRING_DESC_F_NEXT | (header.type == VIRTIO_BLK_T_OUT || !(how & 64) ? 0 : VRING_DESC_F_WRITE), 2};
	table[2] = (struct vring_desc){HIGH - 1, 1, VRING_DESC_F_WRITE, 0};
}

/* A list of pages, in guest memory or beside it, or what is no list. */
static struct vring_desc page_list(struct input *in)
{
	uint32_t page[64];
	unsigned n = 1 + byte(in) % 64;

	for (unsigned i = 0; i < n; i++)
		page[i] = (uint32_t)(byte(in) & 15 ? (BASE >> 12) + byte(in) % 9u : number(in));
	memcpy(host + 0x3000, page, n * sizeof *page);
	return (struct vring_desc){.addr = BASE + 0x3000, .len = n * (uint32_t)sizeof *page};
}

/* A request that is well made, but for one number of it, perhaps. */
static void request(struct machine *m, struct driver *d, struct input *in)
{
	uint8_t how = byte(in), head = byte(in) % MOST;
	bool disk = m->v->ops->type == VIRTIO_ID_BLOCK;
	uint16_t n = disk ? 3 : how & 1 ? word(in) % 300 : 1, flags = is_written(m, d) ? VRING_DESC_F_WRITE : 0;
	struct vring_desc *table = (struct vring_desc *)(host + 0x800);

	if (!n)
		n = 1;
	if (disk)
		disk_request(table, in);
	for (uint16_t i = 0; i < n && !disk; i++)
		table[i] = (struct vring_desc){HIGH - 64 + i, 1 + byte(in), flags | (i < n - 1 ? VRING_DESC_F_NEXT : 0), i + 1};
	if (how & 2) {
		struct vring_desc *spoiled = &table[byte(in) % n];

		switch (byte(in) & 3) {
		case 0:
			spoiled->addr = number(in);
			break;
		case 1:
			spoiled->len = (uint32_t)number(in);
			break;
		case 2:
			spoiled->flags ^= byte(in) & 7;
			break;
		case 3:
			spoiled->next = (uint16_t)number(in);
			break;
		}
	}
	if (m->v->ops->type == VIRTIO_ID_BALLOON && d <= &m->d[1] && how & 4)
		table[0] = page_list(in);
	if (how & 1 || disk)
		describe(d, head, BASE + 0x800, n * 16, VRING_DESC_F_INDIRECT, 0);
	else
		d->table[head] = table[0];
	offer(d, head);
	orc_virtio_again(m->v, (uint16_t)(d - m->d));
}

static void console_step(struct machine *m, uint8_t what, struct input *in)
{
	const struct virtio_console_control control = {.id = byte(in) & 3, .event = byte(in) & 7, .value = byte(in) & 1};
	orc_console *stream = what & 16 && m->port[0] ? m->port[what >> 7] : m->console;
	struct driver *d = &m->d[CONTROL_TRANSMIT];
	static uint8_t taken[ORC_CONSOLE_KEPT + 1];

	switch (what >> 5 & 3) {
	case 0:
		orc_console_type(stream, host, word(in) & 1023);
		break;
	case 1: /* a message that is well made */
		if (!m->port[0] || !d->avail)
			break;
		memcpy(host + 0x3000, &control, sizeof control);
		describe(d, control.id, BASE + 0x3000, sizeof control, 0, 0);
		offer(d, (uint16_t)control.id);
		orc_virtio_again(m->v, CONTROL_TRANSMIT);
		break;
	case 2:
		if (stream != m->console)
			CHECK(orc_port_take(stream, taken, 1 + word(in)) <= ORC_CONSOLE_KEPT);
		break;
	case 3:
		orc_virtio_console_resize(m->v, byte(in), byte(in));
		break;
	}
}

/* `spoiled`: one of its addresses is another number. */
static void begin_queue(struct machine *m, uint16_t i, uint8_t spoiled, struct input *in)
{
	struct driver *d = &m->d[i];

	*d = (struct driver){.descriptors = RINGS + BETWEEN * i, .size = MOST};
	d->driver = d->descriptors + 16 * MOST;
	d->device = d->driver + 32;
	d->table = (struct vring_desc *)(host + BETWEEN * i);
	d->avail = (struct vring_avail *)((uint8_t *)d->table + 16 * MOST);
	d->used = (struct vring_used *)((uint8_t *)d->avail + 32);
	d->avail->idx = 0;
	if (spoiled / 4 == i)
		*(&d->descriptors + spoiled % 3) = number(in);
	set_up(m->v, i, d, m->features, i);
}

/* As it should, but for one number, perhaps. */
static void start_driver(struct machine *m, uint64_t features, struct input *in)
{
	uint8_t spoiled = in ? byte(in) : UINT8_MAX;

	m->features = features;
	if (!negotiate(m->v, features | F_VERSION_1))
		return;
	put(m->v, VIRTIO_PCI_COMMON_MSIX, 2, m->v->queues);
	for (uint16_t i = 0; i < m->v->queues; i++)
		begin_queue(m, i, spoiled, in);
	go(m->v);
}

static void reset_queue(struct machine *m, uint16_t i)
{
	put(m->v, VIRTIO_PCI_COMMON_Q_SELECT, 2, i);
	put(m->v, VIRTIO_PCI_COMMON_Q_RESET, 2, 1);
	wait_for_disk(m->v);
	if (m->d[i].table)
		begin_queue(m, i, UINT8_MAX, NULL);
}

/* As a driver does that finds ports, which programs have open then. */
static void open_ports(struct machine *m)
{
	enum { MESSAGES = 1 + 1 + PORTS + PORTS };
	const struct virtio_console_control said[MESSAGES] = {
		{0, VIRTIO_CONSOLE_DEVICE_READY, 1}, {0, VIRTIO_CONSOLE_PORT_READY, 1}, {1, VIRTIO_CONSOLE_PORT_READY, 1},
		{2, VIRTIO_CONSOLE_PORT_READY, 1}, {1, VIRTIO_CONSOLE_PORT_OPEN, 1}, {2, VIRTIO_CONSOLE_PORT_OPEN, 1}};

	memcpy(host + 0x3000, said, sizeof said);
	for (uint16_t i = 0; i < MOST; i++) {
		describe(&m->d[CONTROL_RECEIVE], i, BASE + 0x3800 + 64 * i, 64, VRING_DESC_F_WRITE, 0);
		offer(&m->d[CONTROL_RECEIVE], i);
		if (i >= MESSAGES)
			continue;
		describe(&m->d[CONTROL_TRANSMIT], i, BASE + 0x3000 + 8 * i, 8, 0, 0);
		offer(&m->d[CONTROL_TRANSMIT], i);
	}
	orc_virtio_again(m->v, CONTROL_RECEIVE);
	orc_virtio_again(m->v, CONTROL_TRANSMIT);
	serve_all(m->v, true);
}

/* More than a port has room for, in a few of these. */
static void flood(struct machine *m, struct driver *d, uint16_t head)
{
	if (!d->avail)
		return;
	describe(d, head, BASE, 2 * ROOM, 0, 0);
	offer(d, head);
	orc_virtio_again(m->v, (uint16_t)(d - m->d));
}

static void tame(bool *value) /* a byte that is neither is no bool of C's, which Python can't make */
{
	uint8_t one;

	memcpy(&one, value, 1);
	one = one == 1;
	memcpy(value, &one, 1);
}

static void change_state(struct machine *m, struct input *in)
{
	struct orc_virtio_state s, again;

	wait_for_disk(m->v);
	if (!m->v->ops->serve)
		lend_all(m->v, true); /* as whoever saves it has it */
	orc_virtio_save(m->v, &s);
	if (byte(in) & 1) { /* any byte of it: it is taken over as a whole or not at all */
		((uint8_t *)&s)[word(in) % sizeof s] = byte(in);
		tame(&s.config_changed);
		for (unsigned i = 0; i < ORC_VIRTIO_QUEUES; i++)
			tame(&s.queue[i].enabled);
		for (unsigned i = 0; i < ORC_VIRTIO_VECTORS; i++)
			tame(&s.vector[i].masked);
		orc_virtio_load(m->v, &s);
		return;
	}
	CHECK(orc_virtio_load(m->v, &s));
	orc_virtio_save(m->v, &again);
	CHECK(s.status == again.status && s.accepted == again.accepted && s.queue[0].next == again.queue[0].next);
}

static void power_on(struct machine *m)
{
	wait_for_disk(m->v);
	if (!m->v->ops->serve)
		lend_all(m->v, true);
	orc_virtio_power_on(m->v);
	CHECK(!m->v->status);
}

static void step(struct machine *m, struct input *in)
{
	uint8_t what = byte(in), status;
	uint16_t queue = m->v->queues > 2 ? byte(in) % m->v->queues : what >> 4 & 1 && m->v->queues > 1, i;
	struct driver *d = &m->d[queue];
	uint64_t value = 0, offset;

	switch (what & 15) {
	case 0:
	case 1:
		offset = byte(in);
		value = number(in);
		answer(m->v, offset, 1u << (what >> 5 & 3), true, &value);
		break;
	case 2:
		offset = what & 16 ? number(in) : word(in) & (ORC_BAR_SIZE - 1);
		value = number(in);
		answer(m->v, offset, 1u << (what >> 5 & 3), true, &value);
		break;
	case 3:
		offset = what & 16 ? number(in) : word(in) & (ORC_BAR_SIZE - 1);
		answer(m->v, offset, 1u << (what >> 5 & 3), false, &value);
		break;
	case 4:
		value = number(in);
		offset = word(in) % (ROOM - 8);
		memcpy(host + offset, &value, 8);
		break;
	case 5:
	case 6: /* a descriptor, of the ring or of a table somewhere */
		i = byte(in);
		offset = what & 32 ? (uint64_t)(word(in) & (ROOM - 1)) : (uint64_t)((uint8_t *)d->table - host) + i % MOST * 16u;
		if (!d->table || offset > ROOM - 16)
			break;
		value = number(in);
		memcpy(host + offset, &value, 8);
		value = (number(in) & UINT32_MAX) | (uint64_t)(byte(in) & 7) << 32 | (uint64_t)(byte(in) % (MOST + 1)) << 48;
		memcpy(host + offset + 8, &value, 8);
		break;
	case 7:
		if (d->avail)
			request(m, d, in);
		break;
	case 9:
		if (m->port[0]) {
			flood(m, d, byte(in) % MOST);
			break;
		}
		/* fallthrough */
	case 8:
		if (!d->avail)
			break;
		offer(d, what & 32 ? word(in) : byte(in) % MOST);
		orc_virtio_again(m->v, queue);
		break;
	case 10:
	case 11:
		serve_all(m->v, !(what & 32)); /* what is in flight may stay so while the guest does other things */
		break;
	case 12:
		if (m->v->ops->type == VIRTIO_ID_CONSOLE)
			console_step(m, what, in);
		if (m->v->ops->type == VIRTIO_ID_BALLOON)
			tick(m->v);
		break;
	case 13:
		change_state(m, in);
		break;
	case 14:
		start_driver(m, (what & 32 ? F_RINGS | 1ull << VIRTIO_F_RING_RESET : number(in)) | m->multiport, in);
		break;
	case 15:
		if (what & 32)
			reset_queue(m, queue);
		else if (what & 64)
			power_on(m);
		else if (what & 128)
			orc_virtio_set_master(m->v, byte(in) & 3);
		else if (what & 16 && m->v->ops->type == VIRTIO_ID_BALLOON)
			orc_virtio_balloon_set_target(m->v, word(in));
		orc_virtio_again(m->v, queue);
		break;
	}
	status = m->v->status & 15;
	CHECK(status == 0 || status == 1 || status == 3 || status == 11 || status == 15);
}

static orc_virtio *new_balloon(unsigned flags)
{
	orc_virtio *v;

	CHECK(!orc_virtio_balloon_new(memory, flags, 1, &v)); /* the timer is always ready */
	return v;
}

static orc_virtio *new_disk(unsigned flags)
{
	enum { DISK = 64 * 1024 };
	static int file = -1;
	orc_virtio *v;

	if (file < 0) {
		file = memfd_create("disk", MFD_CLOEXEC);
		CHECK(file >= 0 && !ftruncate(file, DISK));
	}
	CHECK(!orc_virtio_blk_new(memory, file_store(dup(file), DISK, flags), "disk", &v));
	return v;
}

static int vector_fd(void) /* one for all */
{
	static int fd = -1;

	if (fd < 0)
		fd = new_eventfd();
	return fd;
}

static orc_virtio *new_console(struct machine *m, bool ports)
{
	orc_virtio *v = orc_virtio_console_new(memory, m->console, 80, 25, ports ? PORTS : 0);

	CHECK(v);
	for (unsigned i = 0; ports && i < PORTS; i++) {
		m->port[i] = orc_console_new();
		CHECK(m->port[i]);
		orc_virtio_console_port(v, i + 1, "a name", 6 * i, m->port[i]);
		m->multiport = 1ull << VIRTIO_CONSOLE_F_MULTIPORT;
	}
	orc_virtio_console_listen(v);
	return v;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	struct machine m = {0};
	struct orc_virtio_counters counters;
	orc_console *console = orc_console_new();
	uint8_t how = byte(&in);

	if (!memory)
		map_memory();
	memset(host, 0, ROOM);
	m.console = console;
	m.v = (how & 24) == 16 ? new_balloon(how & 1 ? ORC_BALLOON_REPORTING : 0)
	      : how & 8 ? new_disk(how & 16 ? ORC_STORE_NO_URING : 0)
	      : how & 64 ? orc_virtio_lent_new(memory, VIRTIO_ID_SCSI, 2, 64, F_VERSION_1 | F_RINGS, data, size < 16 ? (uint32_t)size : 16)
	      : how & 1 ? new_console(&m, how & 32) : orc_virtio_rng_new(memory);
	CHECK(m.v && console);
	for (uint16_t i = 0; i < m.v->vectors; i++)
		orc_virtio_set_vector_fd(m.v, i, vector_fd());
	if (how & 2)
		start_driver(&m, (how & 4 ? F_RINGS : 0) | 1ull << VIRTIO_F_RING_RESET | m.multiport, NULL);
	if (how & 2 && how & 64 && m.port[0])
		open_ports(&m);
	while (in.left)
		step(&m, &in);
	serve_all(m.v, true);
	orc_virtio_look(m.v, &counters);
	requests += counters.requests;
	broken[counters.error]++;
	if (m.v->ops->type == VIRTIO_ID_BALLOON) {
		struct orc_balloon_counters c;

		orc_virtio_balloon_look(m.v, &c);
		given_back += c.given_back;
		CHECK(!c.failed, "pages are aligned, and the guest's");
	}
	orc_device_free(orc_virtio_device(m.v));
	orc_console_free(console);
	for (unsigned i = 0; i < PORTS; i++)
		orc_console_free(m.port[i]);
	return 0;
}

#ifdef SELF_DRIVEN
/* ---- what drives it --------------------------------------------------------------------------------------------- */

enum { LONGEST = 1024, CORPUS = 8192, EDGES = 1 << 16 };
static struct { uint16_t size; uint8_t data[LONGEST]; } *corpus;
static unsigned kept;
static uint8_t taken[EDGES], known[EDGES]; /* paths: in this run, and in any */
static uintptr_t before;
static _Atomic bool scribbling, over;

void __sanitizer_cov_trace_pc(void);

void __sanitizer_cov_trace_pc(void) /* called at each branch of the core */
{
	uintptr_t here = (uintptr_t)__builtin_return_address(0);

	taken[(here ^ before >> 1) % EDGES] = 1;
	before = here;
}

static bool went_somewhere_new(void)
{
	bool new = false;

	for (unsigned i = 0; i < EDGES; i += 8) {
		uint64_t eight;

		memcpy(&eight, taken + i, 8);
		if (!eight)
			continue;
		for (unsigned k = i; k < i + 8; k++) {
			new = new || (taken[k] && !known[k]);
			known[k] |= taken[k];
		}
		memset(taken + i, 0, 8);
	}
	return new;
}

static size_t mutate(uint8_t *data, size_t size, uint64_t *seed)
{
	for (unsigned n = 1 + random_number(seed) % 8; n; n--) {
		uint64_t r = random_number(seed);
		size_t i = size ? (r >> 8) % size : 0, length = 1 + (r >> 40) % 16;

		switch (r & 7) {
		case 0:
		case 1:
			if (size)
				data[i] = (uint8_t)(r >> 56);
			break;
		case 2:
			if (size)
				data[i] ^= (uint8_t)(1u << (r >> 56 & 7));
			break;
		case 3: /* some bytes more */
			if (size + length > LONGEST)
				break;
			memmove(data + i + length, data + i, size - i);
			for (size_t k = 0; k < length; k++)
				data[i + k] = (uint8_t)random_number(seed);
			size += length;
			break;
		case 4: /* some fewer */
			if (i + length <= size) {
				memmove(data + i, data + i + length, size - i - length);
				size -= length;
			}
			break;
		case 5: /* a part twice */
			if (i + length <= size && size + length <= LONGEST) {
				memmove(data + i + length, data + i, size - i);
				size += length;
			}
			break;
		default: /* the end of another one */
			if (kept) {
				unsigned other = (unsigned)((r >> 24) % kept);
				size_t from = corpus[other].size ? (r >> 50) % corpus[other].size : 0, count = corpus[other].size - from;

				if (i + count > LONGEST)
					count = LONGEST - i;
				memcpy(data + i, corpus[other].data + from, count);
				size = i + count > size ? i + count : size;
			}
		}
	}
	return size;
}

static void *scribble(void *unused) /* a guest that changes what the device looks at */
{
	uint64_t seed = 99;

	while (!over) {
		uint64_t r = random_number(&seed);

		if (!scribbling || !memory) {
			usleep(1000);
			continue;
		}
		for (int i = 0; i < 64; i++, r = random_number(&seed)) /* mostly the rings */
			((volatile uint8_t *)host)[r & 3 ? r >> 8 & 0x7ff : r >> 8 & (ROOM - 1)] = (uint8_t)(r >> 40 & 15);
	}
	return unused;
}

static int replay(const char *path)
{
	static uint8_t data[1 << 20];
	int fd = open(path, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, data, sizeof data);
	uint32_t size;

	if (n < (ssize_t)sizeof size)
		return 1;
	memcpy(&size, data, sizeof size); /* as it is in build/fuzz-input */
	LLVMFuzzerTestOneInput(data + sizeof size, size);
	return 0;
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 60;
	orc_ns begin = orc_now(), end = begin + (orc_ns)(seconds * SECOND);
	uint64_t seed = (uint64_t)begin | 1, runs = 0;
	int fd = open("build/fuzz-input", O_RDWR | O_CREAT | O_TRUNC, 0600);
	struct { uint32_t size; uint8_t data[LONGEST]; } *current; /* there also after a crash */
	pthread_t thread;

	if (argc > 1 && !seconds) {
		for (int i = 1; i < argc; i++)
			if (replay(argv[i]))
				return 1;
		return 0;
	}
	CHECK(fd >= 0 && !ftruncate(fd, sizeof *current));
	current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	corpus = calloc(CORPUS, sizeof *corpus);
	CHECK(current != MAP_FAILED && corpus);
	thread = start(scribble, NULL);
	for (; orc_now() < end; runs++) {
		unsigned which = kept ? (unsigned)(random_number(&seed) % kept) : 0;
		size_t size = kept ? corpus[which].size : 0;

		scribbling = runs && orc_now() > begin + (end - begin) / 2;
		memcpy(current->data, corpus[which].data, size);
		current->size = (uint32_t)mutate(current->data, size, &seed);
		before = 0;
		LLVMFuzzerTestOneInput(current->data, current->size);
		if (went_somewhere_new() && kept < CORPUS) {
			corpus[kept].size = (uint16_t)current->size;
			memcpy(corpus[kept++].data, current->data, current->size);
		}
	}
	over = true;
	join(thread);
	unsigned edges = 0;
	for (unsigned i = 0; i < EDGES; i++)
		edges += known[i];
	printf("%llu runs in %.0f s, seed %llu; %u inputs that went somewhere new, %u edges\n", (unsigned long long)runs, seconds,
	       (unsigned long long)((uint64_t)begin | 1), kept, edges);
	printf("%llu requests, %llu KiB given back; rules that were broken:\n", (unsigned long long)requests,
	       (unsigned long long)given_back >> 10);
	for (unsigned i = 1; i < ORC_QUEUE_ERRORS; i++)
		printf("%10llu %s\n", (unsigned long long)broken[i], orc_queue_error_name(i));
	free(corpus);
	orc_guest_memory_free(memory);
	return 0;
}
#endif
