/* A virtio device by its registers: negotiation, status, queues, configuration, MSI-X, and its state. */
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "driver.h"

enum { RINGS = LOW, DATA = LOW + 0x8000, W = VRING_DESC_F_WRITE };

static void serve_kicked(orc_virtio *v) /* as the I/O thread does, here */
{
	uint64_t kicked = atomic_exchange(&v->kicked, 0);

	pthread_mutex_lock(&v->lock);
	for (uint16_t i = 0; i < v->queues; i++)
		if (kicked >> i & 1)
			orc_virtio_serve(v, i);
	pthread_mutex_unlock(&v->lock);
}

static int eventfds(orc_virtio *v, int *fd) /* its vectors'; how many */
{
	for (uint16_t i = 0; i < orc_virtio_vectors(v); i++) {
		fd[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		CHECK(fd[i] >= 0);
		orc_virtio_set_vector_fd(v, i, fd[i]);
	}
	return orc_virtio_vectors(v);
}

static uint64_t fired(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof n) == sizeof n ? n : 0;
}

static uint8_t status(orc_virtio *v)
{
	return (uint8_t)get(v, VIRTIO_PCI_COMMON_STATUS, 1);
}

/* ---- a kind of device that finishes what it is asked when the test says so -------------------------------------- */

enum { HELD = 64 };
struct lazy {
	orc_virtio virtio;
	struct { uint16_t queue; struct orc_chain chain; } held[HELD];
	unsigned n, started, reset;
};

static enum orc_served lazy_serve(orc_virtio *v, uint16_t queue)
{
	struct lazy *l = (struct lazy *)v;
	const struct orc_queue *q = &v->queue[queue];

	CHECK(q->event_idx || q->used->flags == VRING_USED_F_NO_NOTIFY, "nobody need notify us now");
	while (l->n < HELD && orc_queue_take(&v->queue[queue], &l->held[l->n].chain))
		l->held[l->n++].queue = queue;
	return ORC_DRAINED;
}

static void lazy_write(orc_virtio *v, uint32_t offset, const uint8_t *data, uint32_t size)
{
	memcpy(v->config + offset, data, size);
}

static void lazy_start(orc_virtio *v)
{
	((struct lazy *)v)->started++;
}

static void lazy_reset(orc_virtio *v)
{
	((struct lazy *)v)->reset++;
}

static void lazy_free(orc_virtio *v)
{
	orc_virtio_fini(v);
	free(v);
}

static const struct orc_virtio_ops lazy_ops = {
	.type = VIRTIO_ID_BLOCK, .queue_size = 16, .config_size = 12, .features = 1ull << 5 | 1ull << 41,
	.serve = lazy_serve, .config_write = lazy_write, .start = lazy_start, .reset = lazy_reset, .free = lazy_free,
};

static struct lazy *lazy_new(const struct guest *g)
{
	struct lazy *l = calloc(1, sizeof *l);

	CHECK(l);
	orc_virtio_init(&l->virtio, &lazy_ops, g->memory, 2, 0);
	for (unsigned i = 0; i < 12; i++)
		l->virtio.config[i] = (uint8_t)i;
	return l;
}

static void finish_all(struct lazy *l)
{
	pthread_mutex_lock(&l->virtio.lock);
	while (l->n) {
		l->n--;
		orc_queue_put(&l->virtio.queue[l->held[l->n].queue], &l->held[l->n].chain, 1);
	}
	orc_virtio_settle(&l->virtio);
	pthread_mutex_unlock(&l->virtio.lock);
}

struct bench {
	struct guest g;
	struct lazy *l;
	orc_virtio *v;
	struct driver d[2];
	int fd[3];
};

static void begin(struct bench *b)
{
	guest_begin(&b->g, NULL);
	b->l = lazy_new(&b->g);
	b->v = &b->l->virtio;
	CHECK(eventfds(b->v, b->fd) == 3);
	for (int i = 0; i < 2; i++)
		b->d[i] = driver_at(&b->g, RINGS + 0x2000 * (uint64_t)i, 8);
}

static void end(struct bench *b)
{
	orc_device_free(orc_virtio_device(b->v));
	for (int i = 0; i < 3; i++)
		close(b->fd[i]);
	guest_end(&b->g);
}

static void drive(struct bench *b, uint64_t features)
{
	CHECK(negotiate(b->v, features | F_VERSION_1));
	put(b->v, VIRTIO_PCI_COMMON_MSIX, 2, 2);
	for (uint16_t i = 0; i < 2; i++)
		set_up(b->v, i, &b->d[i], features, i);
	go(b->v);
	CHECK(status(b->v) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK));
	serve_kicked(b->v);
}

static void ask(struct bench *b, int queue, uint16_t head)
{
	describe(&b->d[queue], head, DATA + 16u * head, 16, W, 0);
	offer(&b->d[queue], head);
	if (must_notify(&b->d[queue]))
		put(b->v, ORC_BAR_NOTIFY + 4 * (uint32_t)queue, 2, (uint64_t)queue);
	serve_kicked(b->v);
}

/* ---- negotiation ------------------------------------------------------------------------------------------------ */

static void features_are_shown_by_halves_and_accepted_if_they_were_offered(void)
{
	const uint64_t own = 1ull << 5 | 1ull << 41;
	struct bench b;

	begin(&b);
	put(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4, 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_DF, 4) == (F_RINGS | 1ull << 5));
	put(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4, 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_DF, 4) == (1ull << 0 | 1ull << (VIRTIO_F_RING_RESET - 32) | 1ull << (41 - 32)));
	put(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4, 2);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_DF, 4) == 0);
	put(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4, UINT32_MAX);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_DF, 4) == 0 && get(b.v, VIRTIO_PCI_COMMON_DFSELECT, 4) == UINT32_MAX);
	CHECK(!negotiate(b.v, own) && status(b.v) == (ACKNOWLEDGE | DRIVER), "without VERSION_1");
	CHECK(!negotiate(b.v, F_VERSION_1 | 1ull << 6) && !negotiate(b.v, F_VERSION_1 | 1ull << 63), "not offered");
	CHECK(!negotiate(b.v, F_VERSION_1 | 1ull << VIRTIO_F_RING_PACKED));
	CHECK(negotiate(b.v, F_VERSION_1) && negotiate(b.v, F_VERSION_1 | own | F_RINGS));
	CHECK(b.v->accepted == (F_VERSION_1 | own | F_RINGS));
	put(b.v, VIRTIO_PCI_COMMON_GFSELECT, 4, 0);
	put(b.v, VIRTIO_PCI_COMMON_GF, 4, 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_GF, 4) == (F_RINGS | 1ull << 5), "too late");
	put(b.v, VIRTIO_PCI_COMMON_GFSELECT, 4, 7);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_GF, 4) == 0);
	end(&b);
}

static void status_goes_up_in_order_and_down_to_0_alone(void)
{
	const uint8_t step[] = {0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK,
				ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK};
	struct bench b;

	begin(&b);
	for (int from = 0; from < 5; from++) {
		for (unsigned to = 0; to < 256; to++) {
			uint8_t kept = (uint8_t)to & (0x0f | FAILED), expected = step[from];
			bool valid = false;

			CHECK(negotiate(b.v, F_VERSION_1));
			put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
			CHECK(status(b.v) == 0);
			for (unsigned i = 0; i < 2; i++) {
				put(b.v, VIRTIO_PCI_COMMON_GFSELECT, 4, i);
				put(b.v, VIRTIO_PCI_COMMON_GF, 4, F_VERSION_1 >> 32 * i & UINT32_MAX);
			}
			if (from)
				put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, step[from]);
			CHECK(status(b.v) == step[from]);
			for (int i = from; i < 5; i++)
				valid = valid || (kept & ~FAILED) == step[i];
			if (!to)
				expected = 0;
			else if (valid)
				expected = kept;
			put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, to);
			CHECK(status(b.v) == expected, "%d, then %u: %u", from, to, status(b.v));
		}
	}
	end(&b);
}

static void a_driver_that_failed_is_not_served_until_it_resets_the_device(void)
{
	struct bench b;

	begin(&b);
	drive(&b, 0);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, status(b.v) | FAILED);
	ask(&b, 0, 0);
	CHECK(!b.l->n && status(b.v) & FAILED && b.l->started == 1);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	CHECK(status(b.v) & FAILED, "no bit is cleared");
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(!status(b.v) && b.l->reset);
	end(&b);
}

/* ---- queues ----------------------------------------------------------------------------------------------------- */

static void a_queue_is_set_up_before_it_is_enabled_and_after_features(void)
{
	struct bench b;

	begin(&b);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_NUMQ, 2) == 2);
	put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 2);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2) == 2 && get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 0, "there is none");
	put(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1);
	put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 16 && get(b.v, VIRTIO_PCI_COMMON_Q_NOFF, 2) == 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == VIRTIO_MSI_NO_VECTOR);
	for (unsigned size = 0; size < 40; size++) {
		put(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2, 8);
		put(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2, size);
		CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) ==
		      (size == 1 || size == 2 || size == 4 || size == 16 ? size : 8), "%u", size);
	}
	put(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, 2);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == 2);
	put(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, 3);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == VIRTIO_MSI_NO_VECTOR, "which is how it says that it can't");
	put(b.v, VIRTIO_PCI_COMMON_Q_DESCLO, 4, 0x11223344);
	put(b.v, VIRTIO_PCI_COMMON_Q_DESCHI, 4, 0x55667788);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_DESCLO, 8) == 0x5566778811223344);
	put(b.v, VIRTIO_PCI_COMMON_Q_DESCLO, 2, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_DESCLO + 2, 4, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_DESCHI, 8, 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_DESCLO, 8) == 0x5566778811223344 && !get(b.v, VIRTIO_PCI_COMMON_Q_AVAILLO, 8));
	put(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1);
	CHECK(!get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2), "before FEATURES_OK");
	CHECK(negotiate(b.v, F_VERSION_1));
	set_up(b.v, 1, &b.d[1], 0, 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1 && get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 8);
	put(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2, 4);
	put(b.v, VIRTIO_PCI_COMMON_Q_USEDLO, 8, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2, 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 8 && get(b.v, VIRTIO_PCI_COMMON_Q_USEDLO, 8) == b.d[1].device);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1);
	CHECK(b.v->queue[1].table == b.d[1].table && b.v->queue[1].used == b.d[1].used);
	end(&b);
}

static void requests_are_served_after_driver_ok_and_those_before_it_are_found(void)
{
	struct bench b;

	begin(&b);
	CHECK(negotiate(b.v, F_VERSION_1));
	set_up(b.v, 0, &b.d[0], 0, 0);
	ask(&b, 0, 0);
	CHECK(!b.l->n && !b.l->started);
	go(b.v);
	serve_kicked(b.v);
	CHECK(b.l->n == 1 && b.l->started == 1);
	finish_all(b.l);
	CHECK(fired(b.fd[0]) == 1 && b.d[0].used->idx == 1 && !fired(b.fd[2]));
	CHECK(get(b.v, ORC_BAR_ISR, 1) == 1 && get(b.v, ORC_BAR_ISR, 4) == 0, "a read clears it");
	end(&b);
}

static void a_queue_that_broke_stops_its_device_until_the_driver_resets_it(void)
{
	struct orc_virtio_counters c;
	struct bench b;

	begin(&b);
	drive(&b, F_RINGS);
	ask(&b, 1, 0);
	CHECK(b.l->n == 1);
	offer(&b.d[0], 100);
	put(b.v, ORC_BAR_NOTIFY, 2, 0);
	serve_kicked(b.v);
	CHECK(status(b.v) & NEEDS_RESET && fired(b.fd[2]) == 1 && get(b.v, ORC_BAR_ISR, 1) == 2);
	orc_virtio_look(b.v, &c);
	CHECK(c.error == ORC_QUEUE_BAD_HEAD && c.error_queue == 0 && c.status & NEEDS_RESET);
	ask(&b, 1, 1);
	CHECK(b.l->n == 1, "nothing more is taken");
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, status(b.v) & ~NEEDS_RESET);
	CHECK(status(b.v) & NEEDS_RESET);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(status(b.v) & NEEDS_RESET, "a request is in flight");
	finish_all(b.l);
	CHECK(!status(b.v));
	orc_virtio_look(b.v, &c);
	CHECK(!c.error && c.requests == 0);
	for (int i = 0; i < 2; i++) {
		memset(b.d[i].avail, 0, 22);
		memset(b.d[i].used, 0, 72);
		b.d[i] = driver_at(&b.g, b.d[i].descriptors, 8);
	}
	drive(&b, F_RINGS);
	ask(&b, 0, 0);
	CHECK(b.l->n == 1);
	finish_all(b.l);
	orc_virtio_look(b.v, &c);
	CHECK(c.requests == 1 && fired(b.fd[0]) == 1);
	end(&b);
}

static void bad_rings_are_told_by_needs_reset_when_they_are_enabled(void)
{
	struct bench b;

	begin(&b);
	CHECK(negotiate(b.v, F_VERSION_1));
	b.d[0].device = ROM;
	set_up(b.v, 0, &b.d[0], 0, 0);
	CHECK(status(b.v) & NEEDS_RESET && b.v->error == ORC_QUEUE_RING_READ_ONLY);
	go(b.v);
	serve_kicked(b.v);
	CHECK(status(b.v) & NEEDS_RESET && !fired(b.fd[2]));
	end(&b);
}

static void a_reset_is_done_when_nothing_is_in_flight_and_writes_no_guest_memory(void)
{
	struct bench b;

	begin(&b);
	drive(&b, 0);
	ask(&b, 0, 3);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0);
	CHECK(status(b.v) & DRIVER_OK && b.l->reset == 2);
	put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE);
	put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 1);
	put(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, 0);
	ask(&b, 0, 4);
	CHECK(b.l->n == 1);
	finish_all(b.l);
	CHECK(!status(b.v) && !b.d[0].used->idx && !fired(b.fd[0]));
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == VIRTIO_MSI_NO_VECTOR && get(b.v, VIRTIO_PCI_COMMON_MSIX, 2) == VIRTIO_MSI_NO_VECTOR);
	CHECK(!get(b.v, VIRTIO_PCI_COMMON_Q_DESCLO, 8) && get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 16);
	end(&b);
}

static void one_queue_is_reset_and_enabled_again_while_the_other_goes_on(void)
{
	struct bench b;

	begin(&b);
	drive(&b, 1ull << VIRTIO_F_RING_RESET);
	ask(&b, 0, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_RESET, 2, 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_RESET, 2) == 1 && get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1);
	put(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2, 4);
	ask(&b, 0, 1);
	ask(&b, 1, 0);
	CHECK(b.l->n == 2);
	finish_all(b.l);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_RESET, 2) == 0 && get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 0);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2) == 16 && get(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == VIRTIO_MSI_NO_VECTOR);
	CHECK(!b.d[0].used->idx && b.d[1].used->idx == 1 && !fired(b.fd[0]) && fired(b.fd[1]) == 1);
	b.d[0] = driver_at(&b.g, RINGS + 0x4000, 4);
	set_up(b.v, 0, &b.d[0], 0, 0);
	ask(&b, 0, 1);
	CHECK(b.l->n == 1 && get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1);
	finish_all(b.l);
	CHECK(b.d[0].used->idx == 1 && fired(b.fd[0]) == 1);
	drive(&b, 0);
	put(b.v, VIRTIO_PCI_COMMON_Q_RESET, 2, 1);
	CHECK(get(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1, "if it was negotiated");
	end(&b);
}

/* ---- configuration ---------------------------------------------------------------------------------------------- */

static void a_changed_configuration_shows_another_generation_and_interrupts(void)
{
	struct bench b;
	uint64_t before;

	begin(&b);
	CHECK(get(b.v, ORC_BAR_DEVICE, 8) == 0x0706050403020100 && get(b.v, ORC_BAR_DEVICE + 8, 8) == 0x0b0a0908);
	CHECK(!get(b.v, ORC_BAR_DEVICE + 12, 4) && !get(b.v, ORC_BAR_DEVICE + 0xffc, 8) && get(b.v, ORC_BAR_DEVICE + 3, 2) == 0x0403);
	orc_virtio_config_set(b.v, 0, "\xff", 1);
	CHECK(!fired(b.fd[2]), "nobody is there");
	drive(&b, 0);
	before = get(b.v, VIRTIO_PCI_COMMON_CFGGENERATION, 1);
	CHECK(get(b.v, ORC_BAR_DEVICE, 1) == 0xff && get(b.v, VIRTIO_PCI_COMMON_CFGGENERATION, 1) != before);
	before = get(b.v, VIRTIO_PCI_COMMON_CFGGENERATION, 1);
	CHECK(get(b.v, ORC_BAR_DEVICE, 1) == 0xff && get(b.v, VIRTIO_PCI_COMMON_CFGGENERATION, 1) == before);
	for (int i = 0; i < 256; i++) { /* which would come round if each change counted */
		const uint8_t value = (uint8_t)i;

		orc_virtio_config_set(b.v, 0, &value, 1);
	}
	CHECK(get(b.v, ORC_BAR_DEVICE, 1) == 0xff && get(b.v, VIRTIO_PCI_COMMON_CFGGENERATION, 1) != before);
	CHECK(fired(b.fd[2]) == 256 && get(b.v, ORC_BAR_ISR, 1) == 2);
	orc_virtio_config_set(b.v, 0, "\xff", 1);
	CHECK(!fired(b.fd[2]), "no change");
	put(b.v, ORC_BAR_DEVICE + 4, 4, 0xdeadbeef);
	put(b.v, ORC_BAR_DEVICE + 9, 4, 0); /* over its end */
	put(b.v, ORC_BAR_DEVICE + 12, 4, 0);
	CHECK(get(b.v, ORC_BAR_DEVICE + 4, 8) == 0x0b0a0908deadbeef);
	end(&b);
}

/* ---- MSI-X ------------------------------------------------------------------------------------------------------ */

static void an_access_goes_up_only_if_it_concerns_what_fires(void)
{
	struct orc_vector vector;
	struct bench b;
	const uint32_t entry = ORC_BAR_TABLE + 16;

	begin(&b);
	CHECK(get(b.v, entry + 12, 4) == 1, "masked from the begin");
	CHECK(put(b.v, entry, 4, 0xfee01003) && put(b.v, entry + 4, 4, 1) && put(b.v, entry + 8, 4, 0x4021));
	CHECK(put(b.v, entry + 12, 4, 1), "no change");
	CHECK(!put(b.v, entry + 12, 4, 0));
	orc_virtio_vector(b.v, 1, &vector);
	CHECK(vector.address == 0x1fee01000 && vector.data == 0x4021 && !vector.masked);
	CHECK(put(b.v, entry + 12, 4, 0xfffffffe) && put(b.v, entry, 8, 0x1fee01000), "no change");
	CHECK(!put(b.v, entry, 4, 0xfee02000) && !put(b.v, entry + 4, 4, 0) && !put(b.v, entry + 8, 4, 1));
	CHECK(get(b.v, entry, 8) == 0xfee02000 && get(b.v, entry + 8, 8) == 1);
	CHECK(!put(b.v, entry + 8, 8, 1ull << 32 | 7), "data and mask at once");
	orc_virtio_vector(b.v, 1, &vector);
	CHECK(vector.masked && vector.data == 7);
	CHECK(put(b.v, entry + 12, 1, 0) && put(b.v, entry + 10, 4, 0) && put(b.v, entry + 4, 8, 0) && put(b.v, entry + 12, 2, 0));
	CHECK(put(b.v, ORC_BAR_TABLE + 3 * 16 + 12, 4, 0) && !get(b.v, ORC_BAR_TABLE + 3 * 16, 8), "there are 3");
	orc_virtio_vector(b.v, 1, &vector);
	CHECK(vector.masked && vector.data == 7 && vector.address == 0xfee02000);
	CHECK(get(b.v, entry + 6, 4) == 7u << 16, "reads may be of any place");
	CHECK(put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0) && put(b.v, ORC_BAR_NOTIFY, 4, 0));
	orc_virtio_vector(b.v, 1, &vector);
	CHECK(vector.data == 7, "the table is not the driver's to reset");
	end(&b);
}

static void a_vector_that_fired_and_nobody_took_is_pending(void)
{
	struct bench b;

	begin(&b);
	drive(&b, 0);
	CHECK(!get(b.v, ORC_BAR_PBA, 8));
	ask(&b, 1, 0);
	finish_all(b.l);
	CHECK(get(b.v, ORC_BAR_PBA, 8) == 2 && get(b.v, ORC_BAR_PBA, 4) == 2 && get(b.v, ORC_BAR_PBA + 4, 4) == 0);
	CHECK(get(b.v, ORC_BAR_PBA + 4, 8) == 0 && get(b.v, ORC_BAR_PBA + 8, 8) == 0);
	orc_virtio_config_set(b.v, 0, "\xff", 1);
	CHECK(get(b.v, ORC_BAR_PBA, 8) == 6 && fired(b.fd[1]) == 1 && get(b.v, ORC_BAR_PBA, 1) == 4);
	put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 1);
	put(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, VIRTIO_MSI_NO_VECTOR);
	ask(&b, 1, 1);
	finish_all(b.l);
	CHECK(!fired(b.fd[1]) && get(b.v, ORC_BAR_ISR, 1) == 3);
	end(&b);
}

/* ---- state ------------------------------------------------------------------------------------------------------ */

static void a_device_goes_on_in_another_one_from_its_state(void)
{
	struct orc_virtio_state s, again;
	struct bench b;
	struct lazy *other;
	int fd[3];

	begin(&b);
	drive(&b, F_RINGS | 1ull << 41);
	put(b.v, ORC_BAR_TABLE + 8, 4, 0x31);
	for (uint16_t i = 0; i < 5; i++) {
		ask(&b, 0, i);
		finish_all(b.l);
	}
	offer(&b.d[0], 6); /* which nobody has seen yet */
	describe(&b.d[0], 6, DATA, 16, W, 0);
	orc_virtio_save(b.v, &s);
	CHECK(s.pending == 1 && s.queue[0].next == 5 && s.accepted == (F_RINGS | F_VERSION_1 | 1ull << 41));

	other = lazy_new(&b.g);
	CHECK(eventfds(&other->virtio, fd) == 3);
	CHECK(orc_virtio_load(&other->virtio, &s) && other->started == 1);
	orc_virtio_save(&other->virtio, &again);
	CHECK(!memcmp(&s, &again, sizeof s));
	CHECK(fired(fd[0]) == 1 && !fired(fd[1]), "what was pending");
	serve_kicked(&other->virtio);
	CHECK(other->n == 1 && other->held[0].chain.head == 6);
	*driver_used_event(&b.d[0]) = 5;
	finish_all(other);
	CHECK(fired(fd[0]) == 1 && b.d[0].used->idx == 6 && get(&other->virtio, ORC_BAR_TABLE + 8, 4) == 0x31);
	orc_virtio_power_on(&other->virtio);
	CHECK(!status(&other->virtio) && get(&other->virtio, ORC_BAR_TABLE + 8, 4) == 0);
	orc_device_free(orc_virtio_device(&other->virtio));
	for (int i = 0; i < 3; i++)
		close(fd[i]);
	end(&b);
}

static void a_broken_device_is_still_broken_in_its_state(void)
{
	struct orc_virtio_state s;
	struct bench b;
	struct lazy *other;

	begin(&b);
	drive(&b, 0);
	offer(&b.d[0], 100);
	put(b.v, ORC_BAR_NOTIFY, 2, 0);
	serve_kicked(b.v);
	orc_virtio_save(b.v, &s);
	CHECK(s.error == ORC_QUEUE_BAD_HEAD && s.queue[0].error == ORC_QUEUE_BAD_HEAD);
	other = lazy_new(&b.g);
	CHECK(orc_virtio_load(&other->virtio, &s) && status(&other->virtio) & NEEDS_RESET);
	serve_kicked(&other->virtio);
	CHECK(!other->n);
	orc_device_free(orc_virtio_device(&other->virtio));
	end(&b);
}

static void a_state_that_no_device_can_be_in_changes_nothing(void)
{
	struct orc_virtio_state good, s, after;
	struct bench b;

	begin(&b);
	drive(&b, F_RINGS);
	orc_virtio_save(b.v, &good);
#define REFUSED(change)                                                                                                \
	do {                                                                                                           \
		s = good;                                                                                              \
		change;                                                                                                \
		CHECK(!orc_virtio_load(b.v, &s), #change);                                                             \
		orc_virtio_save(b.v, &after);                                                                          \
		CHECK(!memcmp(&good, &after, sizeof good));                                                            \
	} while (0)
	REFUSED(s.queues = 1);
	REFUSED(s.vectors = 4);
	REFUSED(s.status = DRIVER_OK);
	REFUSED(s.status |= 16);
	REFUSED(s.status |= NEEDS_RESET);
	REFUSED(s.error = ORC_QUEUE_JUMP);
	REFUSED((s.status |= NEEDS_RESET, s.error = ORC_QUEUE_ERRORS));
	REFUSED((s.status |= NEEDS_RESET, s.error = 1, s.error_queue = 2));
	REFUSED(s.accepted &= ~F_VERSION_1);
	REFUSED(s.accepted |= 1ull << 6);
	REFUSED(s.status = ACKNOWLEDGE);
	REFUSED(s.isr = 4);
	REFUSED(s.config_vector = 3);
	REFUSED(s.pending = 8);
	REFUSED(s.vector[1].address = 2);
	REFUSED(s.queue[0].vector = 3);
	REFUSED(s.queue[0].size = 3);
	REFUSED(s.queue[0].size = 32);
	REFUSED(s.queue[0].descriptors = 8);
	REFUSED(s.queue[0].device = ROM);
	REFUSED(s.queue[0].error = ORC_QUEUE_ERRORS);
	REFUSED((s.queue[1].enabled = false, s.queue[1].next = 1));
	ask(&b, 0, 0);
	s = good;
	CHECK(!orc_virtio_load(b.v, &s), "something is in flight");
	finish_all(b.l);
	CHECK(orc_virtio_load(b.v, &good));
	end(&b);
}

/* ---- whatever a guest does -------------------------------------------------------------------------------------- */

static bool steps_in_order(uint8_t s)
{
	s &= ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
	return s == 0 || s == 1 || s == 3 || s == 11 || s == 15;
}

static void any_accesses_leave_a_state_that_can_be_saved_and_loaded(void)
{
	struct bench b;
	uint64_t seed = 11;

	begin(&b);
	for (int i = 0; i < 100000; i++) {
		uint64_t n = random_number(&seed), value = random_number(&seed);
		uint32_t offset = n >> 8 & 3 ? (uint32_t)(n >> 16 & 63) : (uint32_t)(n >> 16 & 0x7fff), size = 1u << (n & 3);

		if (n >> 32 & 1) /* numbers that mean something */
			value = value & 1 ? value >> 8 & 15 : RINGS + (value >> 8 & 0x3ffff);
		if (n >> 33 & 7)
			put(b.v, offset, size, value);
		else
			get(b.v, offset, size);
		CHECK(steps_in_order(b.v->status));
		if (!(n >> 36 & 15) && negotiate(b.v, F_VERSION_1 | (value & F_RINGS)))
			set_up(b.v, 0, &b.d[0], 0, 0);
		if (!(n >> 40 & 15))
			serve_kicked(b.v);
		if (!(n >> 44 & 7))
			finish_all(b.l);
		if (!(n >> 48 & 15) && !orc_virtio_in_flight(b.v)) {
			struct orc_virtio_state s, again;

			orc_virtio_save(b.v, &s);
			CHECK(orc_virtio_load(b.v, &s));
			orc_virtio_save(b.v, &again);
			CHECK(!memcmp(&s, &again, sizeof s));
		}
	}
	finish_all(b.l);
	end(&b);
}

const struct test virtio_tests[] = {
	TEST(features_are_shown_by_halves_and_accepted_if_they_were_offered),
	TEST(status_goes_up_in_order_and_down_to_0_alone),
	TEST(a_driver_that_failed_is_not_served_until_it_resets_the_device),
	TEST(a_queue_is_set_up_before_it_is_enabled_and_after_features),
	TEST(requests_are_served_after_driver_ok_and_those_before_it_are_found),
	TEST(a_queue_that_broke_stops_its_device_until_the_driver_resets_it),
	TEST(bad_rings_are_told_by_needs_reset_when_they_are_enabled),
	TEST(a_reset_is_done_when_nothing_is_in_flight_and_writes_no_guest_memory),
	TEST(one_queue_is_reset_and_enabled_again_while_the_other_goes_on),
	TEST(a_changed_configuration_shows_another_generation_and_interrupts),
	TEST(an_access_goes_up_only_if_it_concerns_what_fires),
	TEST(a_vector_that_fired_and_nobody_took_is_pending),
	TEST(a_device_goes_on_in_another_one_from_its_state),
	TEST(a_broken_device_is_still_broken_in_its_state),
	TEST(a_state_that_no_device_can_be_in_changes_nothing),
	TEST(any_accesses_leave_a_state_that_can_be_saved_and_loaded),
	{0},
};
