/* Configuration space: what a guest reads, what its writes change, and what goes up to Python. */
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../pci.h"
#include "driver.h"

enum {
	SPACE = ORC_PCI_SPACE, SLOT = 3, FUNCTIONS = 8, AT = SLOT * FUNCTIONS * SPACE,
	COMMAND = 4, BAR = 0x10, SCRATCH = 0x3c, WINDOW = 0x40,
	VENDOR = 0x12345678,
};

struct space {
	uint8_t reset[SPACE], writable[SPACE], effect[SPACE];
};

static struct space space(void)
{
	struct space s = {0};

	memcpy(s.reset, &(uint32_t){VENDOR}, 4);
	s.writable[COMMAND] = 6;
	s.effect[COMMAND] = 2;
	memset(s.writable + BAR, 0xff, 8);
	memset(s.effect + BAR, 0xff, 8);
	s.reset[BAR] = 4;
	s.writable[BAR] = 0;
	s.writable[BAR + 1] = 0x80;
	s.writable[SCRATCH] = 0xff;
	s.reset[WINDOW + 3] = VIRTIO_PCI_CAP_PCI_CFG;
	s.writable[WINDOW + 4] = 0xff;
	memset(s.writable + WINDOW + 8, 0xff, 12);
	return s;
}

static orc_pci *pci(void)
{
	struct space s = space();
	orc_pci *p = orc_pci_new();

	CHECK(p && !orc_pci_add(p, SLOT, s.reset, s.writable, s.effect));
	CHECK(orc_pci_add(p, SLOT, s.reset, s.writable, s.effect) == -EINVAL);
	CHECK(orc_pci_add(p, ORC_PCI_SLOTS, s.reset, s.writable, s.effect) == -EINVAL);
	return p;
}

static uint64_t ask(orc_device *d, uint64_t offset, uint32_t size)
{
	uint64_t value = 0;

	CHECK(orc_device_answer(d, offset, size, 1, false, &value), "a read never goes up");
	return value;
}

static bool set(orc_device *d, uint64_t offset, uint32_t size, uint64_t value) /* whether it ended in the core */
{
	return orc_device_answer(d, offset, size, 1, true, &value);
}

static void what_is_not_there_reads_as_ones_and_takes_nothing(void)
{
	orc_pci *p = pci();
	orc_device *ecam = orc_pci_ecam(p);

	CHECK(ask(ecam, AT, 4) == VENDOR);
	CHECK(ask(ecam, AT + SPACE, 4) == UINT32_MAX, "another function of the device");
	CHECK(ask(ecam, 0, 2) == UINT16_MAX && ask(ecam, AT + FUNCTIONS * SPACE, 8) == UINT64_MAX);
	CHECK(ask(ecam, ORC_PCI_ECAM - 4, 8) == UINT64_MAX && ask(ecam, UINT64_MAX - 1, 8) == UINT64_MAX);
	CHECK(set(ecam, 0, 4, 0) && set(ecam, ORC_PCI_ECAM, 4, 0));
	CHECK(ask(ecam, AT + SPACE - 2, 4) == 0xffff0000, "over the end of a function's");
	CHECK(set(ecam, AT - 4, 8, 0) && ask(ecam, AT, 4) == VENDOR);
	orc_device_free(ecam);
}

static void a_write_changes_what_may_be_written_and_goes_up_when_it_has_an_effect(void)
{
	orc_pci *p = pci();
	orc_device *ecam = orc_pci_ecam(p);
	uint8_t bytes[SPACE];

	CHECK(set(ecam, AT, 8, UINT64_MAX & ~0xffull << 32) && ask(ecam, AT, 4) == VENDOR);
	CHECK(set(ecam, AT + SCRATCH, 1, 0x5a) && ask(ecam, AT + SCRATCH, 1) == 0x5a);
	CHECK(set(ecam, AT + COMMAND, 2, 4), "no effect");
	CHECK(!set(ecam, AT + COMMAND, 2, 0xffff) && ask(ecam, AT + COMMAND, 2) == 6);
	CHECK(set(ecam, AT + COMMAND, 2, 6), "nothing changed");
	CHECK(!set(ecam, AT + BAR, 4, UINT32_MAX) && ask(ecam, AT + BAR, 4) == 0xffff8004, "how a BAR is sized");
	CHECK(!set(ecam, AT + BAR + 1, 1, 0) && ask(ecam, AT + BAR, 4) == 0xffff0004);
	orc_pci_copy(p, SLOT, 0, SPACE, bytes);
	orc_pci_reset(p);
	CHECK(ask(ecam, AT + COMMAND, 2) == 0 && ask(ecam, AT + BAR, 4) == 4);
	CHECK(orc_pci_load(p, SLOT, bytes) && ask(ecam, AT + BAR, 4) == 0xffff0004);
	bytes[0] ^= 1;
	bytes[COMMAND] = 0;
	CHECK(!orc_pci_load(p, SLOT, bytes) && ask(ecam, AT + COMMAND, 2) == 6);
	orc_device_free(ecam);
}

static void the_ports_show_the_same(void)
{
	orc_pci *p = pci();
	orc_device *ecam = orc_pci_ecam(p), *ports = orc_pci_ports(p);

	CHECK(ask(ports, 0, 4) == 0 && ask(ports, 4, 4) == UINT32_MAX, "not enabled");
	CHECK(set(ports, 0, 4, 0x80000000 | SLOT << 11 | 3) && ask(ports, 0, 4) == (0x80000000 | SLOT << 11));
	CHECK(ask(ports, 4, 4) == VENDOR && ask(ports, 6, 2) == VENDOR >> 16 && ask(ports, 5, 1) == (VENDOR >> 8 & 0xff));
	CHECK(ask(ports, 7, 2) == UINT16_MAX && ask(ports, 4, 8) == UINT64_MAX, "beyond the register");
	CHECK(set(ports, 0, 1, 0) && set(ports, 1, 1, 6) && ask(ports, 1, 1) == 0xff, "0xcf9 is another register");
	CHECK(ask(ports, 4, 4) == VENDOR);
	CHECK(set(ports, 0, 4, 0x80000000 | SLOT << 11 | BAR) && !set(ports, 4, 4, UINT32_MAX));
	CHECK(ask(ecam, AT + BAR, 4) == 0xffff8004);
	CHECK(set(ports, 0, 4, 0x80010000 | SLOT << 11) && ask(ports, 4, 4) == UINT32_MAX, "bus 1");
	CHECK(set(ports, 0, 4, 0x80000000 | SLOT << 11 | 0x100) && ask(ports, 4, 4) == UINT32_MAX, "function 1");
	orc_pci_select(p, UINT32_MAX);
	CHECK(orc_pci_selected(p) == 0x80fffffc);
	orc_pci_reset(p);
	CHECK(!orc_pci_selected(p));
	orc_device_free(ecam);
}

static void window(orc_device *ecam, uint8_t bar, uint32_t offset, uint32_t size)
{
	CHECK(set(ecam, AT + WINDOW + 4, 1, bar) && set(ecam, AT + WINDOW + 8, 4, offset) && set(ecam, AT + WINDOW + 12, 4, size));
}

static void a_virtio_device_is_reached_through_its_configuration_space(void)
{
	enum { STATUS = VIRTIO_PCI_COMMON_STATUS, DATA = AT + WINDOW + 16 };
	struct guest g;
	orc_pci *p = pci();
	orc_device *ecam = orc_pci_ecam(p);
	orc_virtio *v;

	guest_begin(&g, NULL);
	v = orc_virtio_rng_new(g.memory);
	CHECK(set(ecam, DATA, 1, 1) && ask(ecam, DATA, 1) == 1, "no window: bytes as others");
	orc_pci_window(p, SLOT, WINDOW, orc_virtio_device(v));
	window(ecam, 0, STATUS, 1);
	CHECK(ask(ecam, DATA, 4) == 0, "what the device has there");
	CHECK(set(ecam, DATA, 1, 3) && get(v, STATUS, 1) == 3 && ask(ecam, DATA, 1) == 3);
	for (uint32_t size = 0; size < 9; size++)
		if (size != 1 && size != 2 && size != 4) {
			window(ecam, 0, STATUS, size);
			CHECK(set(ecam, DATA, 4, 0) && get(v, STATUS, 1) == 3);
		}
	window(ecam, 1, STATUS, 1);
	CHECK(set(ecam, DATA, 4, 0) && get(v, STATUS, 1) == 3, "another BAR");
	window(ecam, 0, UINT32_MAX, 1);
	CHECK(set(ecam, DATA, 4, 0) && !ask(ecam, DATA, 1), "behind the BAR");
	window(ecam, 0, ORC_BAR_TABLE + 12, 4);
	CHECK(ask(ecam, DATA, 4) == 1);
	CHECK(!set(ecam, DATA, 4, 0), "a vector is unmasked: that is Python's");
	orc_pci_window(p, SLOT, WINDOW, NULL);
	CHECK(set(ecam, DATA, 4, 1));
	orc_device_free(orc_virtio_device(v));
	orc_device_free(ecam);
	guest_end(&g);
}

/* A model of bytes and masks beside it: any accesses, at any place, of any size. */
static void any_accesses_change_what_may_be_written_and_nothing_else(void)
{
	static struct space s;
	static uint8_t model[SPACE];
	orc_pci *p = orc_pci_new();
	orc_device *ecam = orc_pci_ecam(p);
	uint64_t seed = 7;

	for (unsigned i = 0; i < SPACE; i++) {
		s.reset[i] = (uint8_t)random_number(&seed);
		s.writable[i] = (uint8_t)random_number(&seed);
		s.effect[i] = (uint8_t)(random_number(&seed) & s.writable[i] & random_number(&seed));
	}
	memcpy(model, s.reset, SPACE);
	CHECK(!orc_pci_add(p, SLOT, s.reset, s.writable, s.effect));
	for (unsigned i = 0; i < 200000; i++) {
		uint64_t r = random_number(&seed), value = random_number(&seed), want = 0, effect = 0;
		uint32_t size = 1u << (r & 3);
		uint64_t offset = AT - 16 + (r >> 8) % (SPACE + 32);

		for (uint32_t b = 0; b < size; b++) {
			uint64_t at_byte = offset + b - AT;
			uint8_t *byte = at_byte < SPACE ? &model[at_byte] : NULL, now;

			if (!(r & 16)) {
				want |= (uint64_t)(byte ? *byte : 0xff) << 8 * b;
			} else if (byte) {
				now = (uint8_t)((*byte & ~s.writable[at_byte]) | (value >> 8 * b & s.writable[at_byte]));
				effect |= (now ^ *byte) & s.effect[at_byte];
				*byte = now;
			}
		}
		if (r & 16)
			CHECK(set(ecam, offset, size, value) == !effect);
		else
			CHECK(ask(ecam, offset, size) == want);
	}
	orc_device_free(ecam);
}

const struct test pci_tests[] = {
	TEST(what_is_not_there_reads_as_ones_and_takes_nothing),
	TEST(a_write_changes_what_may_be_written_and_goes_up_when_it_has_an_effect),
	TEST(the_ports_show_the_same),
	TEST(a_virtio_device_is_reached_through_its_configuration_space),
	TEST(any_accesses_change_what_may_be_written_and_nothing_else),
	{0},
};
