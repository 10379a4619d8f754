#include <string.h>

#include "check.h"

enum { EVERY_KIND = -1 };

static orc_vcpu *listened_to(orc_fleet *f, uint32_t vm, uint32_t number)
{
	orc_vcpu *v = orc_vcpu_new(f, 10 * vm + number, 64);

	orc_vcpu_name(v, vm, number);
	CHECK(orc_vcpu_subscribe(v, (orc_u64)EVERY_KIND) == 0);
	return v;
}

static void exits(orc_vcpu *v, uint16_t reason, orc_ns now)
{
	struct orc_record record = {.reason = reason};

	orc_vcpu_account(v, &record, now);
}

static void a_channel_keeps_the_newest_or_the_oldest_over_many_turns_of_its_buffer(void)
{
	for (int drop_oldest = 0; drop_oldest < 2; drop_oldest++) {
		orc_fleet *f = orc_fleet_new();
		orc_vcpu *v = listened_to(f, 1, 0);
		orc_channel *c = orc_channel_new(f, (orc_u64)EVERY_KIND, ORC_EVERY_VM, 5, drop_oldest);
		struct orc_record scratch[64], out[8];
		orc_ns now = 0;

		for (int round = 0; round < 40; round++) {
			int n = 1 + round % 9;

			for (int i = 0; i < n; i++)
				exits(v, KVM_EXIT_HLT, ++now);
			CHECK(orc_fleet_deliver(f, NULL, scratch, 64) == (size_t)n);
			CHECK(c->waiting == (n < 5 ? (uint32_t)n : 5));
			CHECK(orc_channel_take(c, out, 1) == 1);
			CHECK(out->time == (orc_u64)(now - (n < 5 ? n : drop_oldest ? 5 : n) + 1) && out->vm == 1);
			CHECK(orc_channel_take(c, out, 8) == (n < 5 ? (size_t)n : 5) - 1 && !c->waiting && !c->first);
		}
		CHECK(c->received == (orc_u64)now && c->missed == 4 * (1 + 2 + 3 + 4) && !orc_channel_take(c, out, 8));
		orc_channel_end(c);
		orc_channel_free(c);
		orc_vcpu_free(v);
		orc_fleet_free(f);
	}
}

static void a_channel_that_ends_is_taken_out_from_between_the_others(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = listened_to(f, 1, 0);
	struct orc_record scratch[64], out[8];
	orc_channel *c[3];

	for (int i = 0; i < 3; i++)
		c[i] = orc_channel_new(f, (orc_u64)EVERY_KIND, i == 2 ? 1 : ORC_EVERY_VM, 8, true);
	exits(v, KVM_EXIT_HLT, 1);
	orc_fleet_deliver(f, v, scratch, 64);
	orc_channel_end(c[1]);
	orc_channel_end(c[1]);
	c[2]->vm = 2; /* another VM's from now on */
	exits(v, KVM_EXIT_HLT, 2);
	orc_fleet_deliver(f, v, scratch, 64);
	CHECK(c[0]->waiting == 2 && c[1]->waiting == 1 && c[2]->waiting == 1);
	orc_channel_drop(c[0]);
	CHECK(!c[0]->waiting && c[0]->missed == 2);
	for (int i = 0; i < 3; i++)
		orc_channel_end(c[i]);
	orc_vcpu_free(v);
	orc_fleet_free(f);
	CHECK(orc_channel_take(c[1], out, 8) == 1 && out->time == 1, "it outlives its fleet");
	for (int i = 0; i < 3; i++)
		orc_channel_free(c[i]);
}

static void columns_say_no_byte_of_an_earlier_exit(void)
{
	struct orc_record r[2] = {
		{.reason = KVM_EXIT_IO, .arg = {0x80, 1, 1, 1}, .data = "stale", .data_size = 2, .vm = 4, .rip = 9},
		{.reason = KVM_EXIT_MMIO, .arg = {0xd0, 4, 1}, .data = "x", .data_size = 255, .vm = 4, .vcpu = 2},
	};
	uint8_t data[2][32], writes[2], sizes[2];
	orc_u64 rip[2];
	uint32_t vms[2];

	orc_records_column(r, 2, ORC_COLUMN_DATA, data);
	CHECK(!memcmp(data[0], "st\0\0\0", 5) && data[1][0] == 'x');
	orc_records_column(r, 2, ORC_COLUMN_DATA_SIZE, sizes);
	CHECK(sizes[0] == 2 && sizes[1] == 32, "whatever a record says");
	orc_records_column(r, 2, ORC_COLUMN_WRITE, writes);
	CHECK(writes[0] == 1 && writes[1] == 1);
	orc_records_column(r, 2, ORC_COLUMN_RIP, rip);
	CHECK(!rip[0] && !rip[1], "it was not sampled");
	CHECK(orc_records_vms(r, 2, vms) == 1 && vms[0] == 4 && !orc_records_vms(r, 0, vms));
}

const struct test channel_tests[] = {
	TEST(a_channel_keeps_the_newest_or_the_oldest_over_many_turns_of_its_buffer),
	TEST(a_channel_that_ends_is_taken_out_from_between_the_others),
	TEST(columns_say_no_byte_of_an_earlier_exit),
	{NULL, NULL},
};
