/* What the specification demands of devices (virtio 1.2), of each kind of device that there is. Which rule is which:
 * tests/test_virtio_rules.py. */
#include <linux/virtio_blk.h>
#include <linux/virtio_console.h>
#include <sched.h>

#include "bench.h"
#include "files.h"

enum { RNG, CONSOLE, PORTS, BALLOON, DISK, READ_ONLY_DISK, KINDS };
enum { CAPACITY = 1 << 20, STATUS = VIRTIO_PCI_COMMON_STATUS };
enum { HEADER = DATA, ANSWER = DATA + 0x100, BUFFER = DATA + 0x1000, BYTES = 512 };

/* A device of that kind, with its I/O thread, and a queue whose requests it does. */
struct world {
	unsigned kind;
	struct guest g;
	struct bench b;
	orc_io *io;
	orc_console *console, *port;
	int queue;
	uint16_t flags; /* of the data's descriptor */
};

static void begin(struct world *w, unsigned kind)
{
	orc_virtio *v;
	int file;

	*w = (struct world){.kind = kind, .io = io_new(), .console = orc_console_new(), .port = orc_console_new(), .flags = W};
	guest_begin(&w->g, NULL);
	switch (kind) {
	case RNG:
		v = orc_virtio_rng_new(w->g.memory);
		break;
	case CONSOLE:
	case PORTS:
		v = orc_virtio_console_new(w->g.memory, w->console, 80, 25, kind == PORTS);
		if (kind == PORTS)
			orc_virtio_console_port(v, 1, "a", 1, w->port);
		w->queue = 1;
		w->flags = 0;
		break;
	case BALLOON: /* any page may be deflated */
		CHECK(!orc_virtio_balloon_new(w->g.memory, ORC_BALLOON_REPORTING, 0, &v));
		w->queue = 1;
		w->flags = 0;
		break;
	default:
		file = new_file(CAPACITY, 0);
		for (unsigned i = 0; i < 2; i++)
			CHECK(pwrite(file, "what is on the disk", 19, 512 * i) == 19);
		CHECK(!orc_virtio_blk_new(w->g.memory, file_store(file, CAPACITY, kind == DISK ? 0 : ORC_STORE_READONLY), "disk", &v));
	}
	wire(&w->b, &w->g, v, RINGS);
	CHECK(!orc_io_attach(w->io, v));
}

static void end(struct world *w)
{
	if (w->kind == CONSOLE || w->kind == PORTS)
		orc_virtio_console_stop(w->b.v);
	orc_io_stop(w->io);
	unwire(&w->b);
	orc_io_free(w->io);
	orc_console_free(w->console);
	orc_console_free(w->port);
	guest_end(&w->g);
}

static orc_u64 offered(orc_virtio *v)
{
	orc_u64 features = 0;

	for (unsigned i = 0; i < 2; i++) {
		put(v, VIRTIO_PCI_COMMON_DFSELECT, 4, i);
		features |= get(v, VIRTIO_PCI_COMMON_DF, 4) << 32 * i;
	}
	return features;
}

/* A request of that many bytes of data: descriptors from 0 on. */
static void describe_request(struct world *w, uint32_t size)
{
	struct driver *d = &w->b.d[w->queue];
	const struct virtio_blk_outhdr header = {.type = VIRTIO_BLK_T_IN};

	if (w->kind < DISK) {
		describe(d, 0, BUFFER, size, w->flags, 0);
	} else {
		memcpy(at(&w->g, HEADER), &header, sizeof header);
		describe(d, 0, HEADER, sizeof header, N, 1);
		describe(d, 1, BUFFER, size, w->flags | N, 2);
		describe(d, 2, ANSWER, 1, W, 0);
	}
}

static void offer_request(struct world *w, uint32_t size) /* nobody is notified */
{
	describe_request(w, size);
	offer(&w->b.d[w->queue], 0);
}

static void notify_it(struct world *w)
{
	notify(w->b.kick[w->queue]);
}

static struct vring_used_elem do_request(struct world *w, uint32_t size)
{
	offer_request(w, size);
	notify_it(w);
	return await_used(&w->b, w->queue);
}

/* Whatever the I/O thread was notified of by now it has seen to. */
static void settle(struct world *w)
{
	orc_io_hold(w->io);
	for (uint16_t i = 0; i < w->b.queues; i++) {
		pthread_mutex_lock(&w->b.v->lock);
		orc_virtio_serve(w->b.v, i);
		pthread_mutex_unlock(&w->b.v->lock);
	}
	orc_io_let_go(w->io);
	orc_io_hold(w->io); /* and what began by that has ended */
	orc_io_let_go(w->io);
}

static bool interrupted(const struct world *w)
{
	for (uint16_t i = 0; i <= w->b.queues; i++)
		if (is_readable(w->b.vector[i]))
			return true;
	return false;
}

static uint16_t used(const struct world *w)
{
	return w->b.d[w->queue].used->idx;
}

/* ---- 2.1, 2.2, 2.4, 2.5 ------------------------------------------------------------------------------------------ */

static void no_device_takes_a_buffer_or_interrupts_before_driver_ok(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		CHECK(negotiate(w.b.v, F_VERSION_1));
		put(w.b.v, VIRTIO_PCI_COMMON_MSIX, 2, w.b.queues);
		for (uint16_t i = 0; i < w.b.queues; i++)
			set_up(w.b.v, i, &w.b.d[i], 0, i);
		offer_request(&w, BYTES);
		notify_it(&w);
		settle(&w);
		CHECK(!used(&w) && !interrupted(&w));
		go(w.b.v);
		CHECK(await_used(&w.b, w.queue).id == 0);
		end(&w);
	}
}

static void a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered(void)
{
	const struct { unsigned feature, needs; } disk[] = {{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH}};
	enum { LIFETIME = 15, SECURE_ERASE = 16, PACKED = 34, IN_ORDER = 35, SR_IOV = 37, NOTIFICATION_DATA = 38 };
	const unsigned absent[] = {VIRTIO_F_ACCESS_PLATFORM, PACKED, IN_ORDER, SR_IOV, NOTIFICATION_DATA};

	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;
		orc_u64 f;

		begin(&w, kind);
		f = offered(w.b.v);
		CHECK(f >> VIRTIO_F_VERSION_1 & 1);
		for (unsigned i = 0; i < sizeof absent / sizeof *absent; i++)
			CHECK(!(f >> absent[i] & 1), "feature %u", absent[i]);
		if (kind >= DISK) {
			for (unsigned i = 0; i < sizeof disk / sizeof *disk; i++)
				CHECK(!(f >> disk[i].feature & 1) || f >> disk[i].needs & 1);
			CHECK(f >> VIRTIO_BLK_F_FLUSH & 1 && !(f >> LIFETIME & 1) && !(f >> SECURE_ERASE & 1));
			CHECK(!(f >> VIRTIO_BLK_F_RO & 1) == (kind == DISK));
		}
		end(&w);
	}
}

static void any_subset_of_the_features_is_accepted_and_again_after_a_reset(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;
		orc_u64 all, subset = 0;

		begin(&w, kind);
		all = offered(w.b.v) & ~F_VERSION_1;
		do {
			CHECK(negotiate(w.b.v, subset | F_VERSION_1) && negotiate(w.b.v, subset | F_VERSION_1));
			subset = (subset - all) & all; /* the next one */
		} while (subset);
		CHECK(!negotiate(w.b.v, all) && !negotiate(w.b.v, 1ull << 50 | F_VERSION_1));
		end(&w);
	}
}

static void after_a_reset_no_device_touches_its_queues_or_interrupts(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		drive(&w.b, 0);
		do_request(&w, BYTES);
		put(w.b.v, STATUS, 1, 0);
		for (orc_ns deadline = orc_now() + PATIENCE; get(w.b.v, STATUS, 1); sched_yield())
			CHECK(orc_now() < deadline);
		while (interrupted(&w))
			for (uint16_t i = 0; i <= w.b.queues; i++)
				if (is_readable(w.b.vector[i]))
					await(w.b.vector[i]);
		offer_request(&w, BYTES);
		notify_it(&w);
		if (kind == CONSOLE || kind == PORTS) {
			orc_virtio_console_resize(w.b.v, 100, 40);
			orc_virtio_console_listen(w.b.v);
			orc_console_type(w.console, (const uint8_t *)"x", 1);
		}
		settle(&w);
		CHECK(used(&w) == 1 && !interrupted(&w));
		end(&w);
	}
}

static void the_configuration_is_read_before_there_is_a_driver(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		if (kind == CONSOLE || kind == PORTS)
			CHECK(get(w.b.v, ORC_BAR_DEVICE, 2) == 80 && get(w.b.v, ORC_BAR_DEVICE + 2, 2) == 25);
		if (kind == PORTS)
			CHECK(get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_console_config, max_nr_ports), 4) == 2);
		if (kind >= DISK) {
			CHECK(get(w.b.v, ORC_BAR_DEVICE, 4) == CAPACITY / 512 && !get(w.b.v, ORC_BAR_DEVICE + 4, 4), "halves: 4.1.3.2");
			CHECK(get(w.b.v, ORC_BAR_DEVICE, 8) == CAPACITY / 512);
			CHECK(get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, blk_size), 4) == 512);
		}
		if (kind == DISK) {
			CHECK(get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, max_discard_sectors), 4));
			CHECK(get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, write_zeroes_may_unmap), 1) == 1);
		}
		if (kind >= DISK) { /* 5.2.5.2: padding */
			CHECK(!get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, unused), 1));
			for (unsigned i = 0; i < 3; i++)
				CHECK(!get(w.b.v, ORC_BAR_DEVICE + offsetof(struct virtio_blk_config, unused1) + i, 1));
		}
		end(&w);
	}
}

/* ---- 2.6: queues ------------------------------------------------------------------------------------------------ */

static void a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;
		struct driver d;

		begin(&w, kind);
		drive(&w.b, 1ull << VIRTIO_F_RING_RESET);
		for (unsigned i = 0; i < 3; i++) {
			CHECK(do_request(&w, BYTES).id == 0);
			put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, (uint64_t)w.queue);
			put(w.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2, 1);
			CHECK(!get(w.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2) && !get(w.b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2));
			offer_request(&w, BYTES);
			notify_it(&w);
			settle(&w);
			CHECK(used(&w) == 1, "nothing is taken from a queue that was reset");
			d = driver_at(&w.g, LOW + 0x20000 + 0x1000 * i, (uint16_t)(4 << i));
			set_up(w.b.v, (uint16_t)w.queue, &d, 0, (uint16_t)w.queue);
			w.b.d[w.queue] = d;
			CHECK(get(w.b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1 && !get(w.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2));
		}
		CHECK(do_request(&w, BYTES).id == 0 && used(&w) == 1);
		put(w.b.v, STATUS, 1, 0);
		for (uint16_t i = 0; i < w.b.queues; i++) { /* 4.1.4.3.1 */
			put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, i);
			CHECK(!get(w.b.v, VIRTIO_PCI_COMMON_Q_RESET, 2) && !get(w.b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2));
		}
		end(&w);
	}
}

static void a_queue_shows_a_power_of_two_and_one_that_is_not_there_0(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		CHECK(get(w.b.v, VIRTIO_PCI_COMMON_NUMQ, 2) == w.b.queues);
		for (uint32_t i = 0; i < 0x10000; i += i < 32 ? 1 : 997) {
			uint64_t size;

			put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, i);
			size = get(w.b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2);
			CHECK(i < w.b.queues ? size && !(size & (size - 1)) : !size);
		}
		for (uint64_t address = 1; address; address <<= 1) { /* 4.1.3.2: each half by itself */
			put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 0);
			for (uint32_t at = VIRTIO_PCI_COMMON_Q_DESCLO; at <= VIRTIO_PCI_COMMON_Q_USEDLO; at += 8) {
				put(w.b.v, at + 4, 4, address >> 32);
				put(w.b.v, at, 4, address & UINT32_MAX);
				CHECK(get(w.b.v, at, 8) == address && get(w.b.v, at, 4) == (address & UINT32_MAX) && get(w.b.v, at + 4, 4) == address >> 32);
			}
		}
		end(&w);
	}
}

/* ---- 2.7: the split queue --------------------------------------------------------------------------------------- */

static void no_device_writes_what_it_is_to_read_or_a_descriptor_or_the_available_ring(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct vring_desc table[SIZE];
		uint8_t header[16], data[BYTES];
		uint16_t avail[3 + SIZE];
		struct world w;

		begin(&w, kind);
		drive(&w.b, F_RINGS);
		memset(at(&w.g, BUFFER), 'a', BYTES);
		describe_request(&w, BYTES);
		memcpy(table, w.b.d[w.queue].table, sizeof table);
		memcpy(header, at(&w.g, HEADER), sizeof header);
		memcpy(data, at(&w.g, BUFFER), BYTES);
		offer(&w.b.d[w.queue], 0);
		memcpy(avail, w.b.d[w.queue].avail, sizeof avail);
		notify_it(&w);
		settle(&w);
		CHECK(used(&w) == 1);
		CHECK(!memcmp(table, w.b.d[w.queue].table, sizeof table) && !memcmp(avail, w.b.d[w.queue].avail, sizeof avail));
		CHECK(!memcmp(header, at(&w.g, HEADER), sizeof header));
		CHECK(w.flags || !memcmp(data, at(&w.g, BUFFER), BYTES));
		end(&w);
	}
}

/* Of memory that had zeroes and then ones: what is neither afterwards was written, and of random bytes hardly any is missed. */
static void no_device_says_that_it_wrote_more_than_it_did(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;
		bool untouched[BYTES];
		uint32_t length = UINT32_MAX;

		begin(&w, kind);
		drive(&w.b, 0);
		memset(untouched, true, sizeof untouched);
		for (unsigned round = 0; round < 8; round++) {
			const uint8_t before = round % 2 ? 0xff : 0;
			const uint8_t *now = at(&w.g, BUFFER);
			uint32_t said;

			memset(at(&w.g, BUFFER), before, BYTES);
			said = do_request(&w, BYTES).len;
			length = said < length ? said : length;
			for (unsigned i = 0; i < BYTES; i++)
				untouched[i] = untouched[i] && now[i] == before;
		}
		CHECK(length <= BYTES + (kind >= DISK));
		for (uint32_t i = 0; i < length && i < BYTES; i++)
			CHECK(!untouched[i], "byte %u of %u", i, length);
		CHECK(w.flags ? length : !length);
		end(&w);
	}
}

static void chains_with_an_indirect_table_at_their_end_are_done_whatever_its_descriptor_says_of_writing(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		for (unsigned write = 0; write < 2; write++) {
			struct world w;
			struct driver *d;
			struct vring_desc *table;

			begin(&w, kind);
			drive(&w.b, F_RINGS);
			d = &w.b.d[w.queue];
			describe_request(&w, BYTES);
			table = at(&w.g, LOW + 0x20000);
			if (kind < DISK) { /* all of it, in two pieces */
				table[0] = (struct vring_desc){BUFFER, 1, w.flags | N, 1};
				table[1] = (struct vring_desc){BUFFER + 1, BYTES - 1, w.flags, 0};
				describe(d, 0, LOW + 0x20000, 32, VRING_DESC_F_INDIRECT | (write ? W : 0), 0);
			} else { /* data and status, behind the header */
				table[0] = (struct vring_desc){BUFFER, BYTES, W | N, 1};
				table[1] = (struct vring_desc){ANSWER, 1, W, 0};
				describe(d, 1, LOW + 0x20000, 32, VRING_DESC_F_INDIRECT | (write ? W : 0), 0);
			}
			offer(d, 0);
			notify_it(&w);
			CHECK(await_used(&w.b, w.queue).len == (w.flags ? BYTES + (kind >= DISK) : 0u));
			CHECK(!(get(w.b.v, STATUS, 1) & NEEDS_RESET));
			end(&w);
		}
	}
}

static void interrupts_follow_the_flags_without_event_indices_and_the_index_with_them(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		for (unsigned round = 0; round < 16; round++) { /* every flag, with an index that says the same or the opposite */
			bool event_idx = round & 1, flag = round & 2, wanted_by_index = round & 4, later = round & 8;
			struct world w;
			struct driver *d;

			begin(&w, kind);
			drive(&w.b, event_idx ? F_RINGS : 0);
			d = &w.b.d[w.queue];
			d->avail->flags = flag ? VRING_AVAIL_F_NO_INTERRUPT : 0;
			*driver_used_event(d) = later ? !wanted_by_index : wanted_by_index ? 0 : 7;
			offer_request(&w, BYTES);
			notify_it(&w);
			settle(&w);
			if (later) { /* a second one: index 1 */
				while (is_readable(w.b.vector[w.queue]))
					await(w.b.vector[w.queue]);
				offer_request(&w, BYTES);
				notify_it(&w);
				settle(&w);
				CHECK(is_readable(w.b.vector[w.queue]) == (event_idx ? *driver_used_event(d) == 1 : !flag));
			} else {
				CHECK(is_readable(w.b.vector[w.queue]) == (event_idx ? wanted_by_index : !flag));
			}
			end(&w);
		}
	}
}

static void the_flags_of_the_used_ring_are_0_or_1_and_0_with_event_indices(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		for (unsigned event_idx = 0; event_idx < 2; event_idx++) {
			struct world w;

			begin(&w, kind);
			w.b.d[w.queue].used->flags = 0xffff; /* nobody has set it to anything */
			drive(&w.b, event_idx ? F_RINGS : 0);
			do_request(&w, BYTES);
			settle(&w);
			CHECK(!w.b.d[w.queue].used->flags, "and 0 while it waits for notifications");
			end(&w);
		}
	}
}

static void a_notification_without_a_reason_does_nothing(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		for (uint16_t i = 0; i < w.b.queues; i++)
			notify(w.b.kick[i]);
		drive(&w.b, F_RINGS);
		for (uint16_t i = 0; i < w.b.queues; i++) {
			notify(w.b.kick[i]);
			put(w.b.v, ORC_BAR_NOTIFY + 4u * i, 2, i);
		}
		put(w.b.v, ORC_BAR_NOTIFY + 4u * w.b.queues, 2, w.b.queues);
		settle(&w);
		CHECK(!used(&w) && !interrupted(&w) && !(get(w.b.v, STATUS, 1) & NEEDS_RESET));
		CHECK(do_request(&w, BYTES).id == 0);
		end(&w);
	}
}

/* ---- 4.1: PCI --------------------------------------------------------------------------------------------------- */

static void any_event_goes_to_any_vector_or_to_none(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;
		uint16_t vectors;

		begin(&w, kind);
		vectors = orc_virtio_vectors(w.b.v);
		CHECK(vectors >= 2);
		for (uint32_t vector = 0; vector <= vectors + 1u; vector++) { /* the last but one: none; the last: no such */
			uint32_t value = vector == vectors ? VIRTIO_MSI_NO_VECTOR : vector > vectors ? 0x7ff : vector;
			uint64_t back = vector < vectors ? vector : VIRTIO_MSI_NO_VECTOR;

			put(w.b.v, STATUS, 1, 0);
			for (uint16_t i = 0; i < w.b.queues; i++) {
				put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, i);
				CHECK(get(w.b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == VIRTIO_MSI_NO_VECTOR);
			}
			CHECK(get(w.b.v, VIRTIO_PCI_COMMON_MSIX, 2) == VIRTIO_MSI_NO_VECTOR, "after a reset");
			w.b.d[w.queue] = driver_at(&w.g, RINGS + 0x1000u * (uint16_t)w.queue, SIZE);
			memset(at(&w.g, RINGS), 0, 0x8000);
			drive(&w.b, 0);
			put(w.b.v, VIRTIO_PCI_COMMON_MSIX, 2, value);
			put(w.b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, (uint64_t)w.queue);
			put(w.b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, value);
			CHECK(get(w.b.v, VIRTIO_PCI_COMMON_MSIX, 2) == back && get(w.b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2) == back);
			offer_request(&w, BYTES);
			notify_it(&w);
			settle(&w);
			CHECK(used(&w) == 1);
			for (uint16_t i = 0; i < vectors; i++) {
				CHECK(is_readable(w.b.vector[i]) == (i == back), "%u of %u", i, vector);
				if (i == back)
					await(w.b.vector[i]);
			}
			if (!orc_virtio_config_size(w.b.v))
				continue;
			orc_virtio_config_set(w.b.v, 0, &(uint8_t){(uint8_t)(vector + 1)}, 1);
			while (get(w.b.v, ORC_BAR_DEVICE, 1) != (uint8_t)(vector + 1)) /* soon, if the I/O thread is at it */
				sched_yield();
			for (uint16_t i = 0; i < vectors; i++) {
				CHECK(is_readable(w.b.vector[i]) == (i == back));
				if (i == back)
					await(w.b.vector[i]);
			}
		}
		end(&w);
	}
}

static void the_isr_says_what_happened_until_it_is_read(void)
{
	for (unsigned kind = 0; kind < KINDS; kind++) {
		struct world w;

		begin(&w, kind);
		drive(&w.b, 0);
		CHECK(!get(w.b.v, ORC_BAR_ISR, 1));
		do_request(&w, BYTES);
		settle(&w);
		CHECK(orc_virtio_isr(w.b.v) == 1 && get(w.b.v, ORC_BAR_ISR, 1) == 1 && !get(w.b.v, ORC_BAR_ISR, 1));
		if (orc_virtio_config_size(w.b.v)) {
			orc_virtio_config_set(w.b.v, 0, "\1", 1);
		} else { /* it has none that could change: that it needs a reset is told likewise */
			describe(&w.b.d[0], 1, BUFFER, 0, W, 0);
			offer(&w.b.d[0], 1);
			notify_it(&w);
		}
		await(w.b.vector[w.b.queues]);
		CHECK(orc_virtio_isr(w.b.v) == 2 && get(w.b.v, ORC_BAR_ISR, 4) == 2 && !get(w.b.v, ORC_BAR_ISR, 1));
		end(&w);
	}
}

/* ---- 5.4: entropy ----------------------------------------------------------------------------------------------- */

static void an_entropy_device_gives_a_byte_at_least_whatever_the_buffer(void)
{
	struct world w;

	begin(&w, RNG);
	drive(&w.b, 0);
	for (uint32_t size = 1; size < 0x8000; size = size * 2 + 1) {
		uint32_t n = do_request(&w, size).len;

		CHECK(n && n <= size);
	}
	end(&w);
}

const struct test rules_tests[] = {
	TEST(no_device_takes_a_buffer_or_interrupts_before_driver_ok),
	TEST(a_feature_comes_with_those_that_it_needs_and_what_no_device_has_is_not_offered),
	TEST(any_subset_of_the_features_is_accepted_and_again_after_a_reset),
	TEST(after_a_reset_no_device_touches_its_queues_or_interrupts),
	TEST(the_configuration_is_read_before_there_is_a_driver),
	TEST(a_queue_that_is_enabled_again_may_be_of_another_size_at_another_place),
	TEST(a_queue_shows_a_power_of_two_and_one_that_is_not_there_0),
	TEST(no_device_writes_what_it_is_to_read_or_a_descriptor_or_the_available_ring),
	TEST(no_device_says_that_it_wrote_more_than_it_did),
	TEST(chains_with_an_indirect_table_at_their_end_are_done_whatever_its_descriptor_says_of_writing),
	TEST(interrupts_follow_the_flags_without_event_indices_and_the_index_with_them),
	TEST(the_flags_of_the_used_ring_are_0_or_1_and_0_with_event_indices),
	TEST(a_notification_without_a_reason_does_nothing),
	TEST(any_event_goes_to_any_vector_or_to_none),
	TEST(the_isr_says_what_happened_until_it_is_read),
	TEST(an_entropy_device_gives_a_byte_at_least_whatever_the_buffer),
	{0},
};
