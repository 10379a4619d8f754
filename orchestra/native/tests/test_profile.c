#include <pthread.h>
#include <string.h>

#include "check.h"
#include "../core.h"

/* A backend that is wherever the record says, in 64-bit mode, and whose code is the low byte of each address. */
static bool registers(orc_vcpu *v, const struct orc_record *record, struct orc_site *s)
{
	(void)v;
	if (!record->rip)
		return false;
	s->rip = record->rip;
	s->mode = 64;
	s->space = record->arg[0];
	return true;
}

static size_t code(orc_vcpu *v, orc_u64 linear, uint8_t *out, size_t n, bool end)
{
	(void)v, (void)end;
	for (size_t i = 0; i < n; i++)
		out[i] = (uint8_t)(linear + i);
	return n;
}

static const struct orc_witness witness = {registers, code};

static orc_vcpu *sampled(orc_fleet *f, uint32_t every)
{
	orc_vcpu *v = orc_vcpu_new(f, 1, 16);

	CHECK(v);
	v->witness = &witness;
	orc_vcpu_sample(v, every);
	return v;
}

static void lock_at(orc_vcpu *v, orc_u64 rip, orc_u64 space)
{
	struct orc_record record = {.reason = KVM_EXIT_X86_BUS_LOCK, .flags = KVM_RUN_X86_BUS_LOCK, .rip = rip,
				    .has_rip = 1, .arg = {space}};

	orc_vcpu_account(v, &record, 0);
}

struct drained {
	struct orc_site site[ORC_SITES];
	size_t used;
	orc_u64 lost, replaced, weight, samples;
};

static struct drained drain(orc_vcpu *v)
{
	struct drained d = {0};

	d.used = orc_vcpu_profile(v, d.site, &d.lost, &d.replaced);
	for (size_t i = 0; i < d.used; i++) {
		d.weight += d.site[i].weight;
		d.samples += d.site[i].samples;
	}
	return d;
}

static void the_first_lock_is_sampled_and_what_is_taken_is_gone(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1000000);
	struct drained d;

	CHECK(!drain(v).used);
	lock_at(v, 0x1000, 7);
	d = drain(v);
	CHECK(d.used == 1 && d.site[0].rip == 0x1000 && d.site[0].space == 7 && d.site[0].mode == 64);
	CHECK(d.site[0].samples == 1 && d.site[0].weight == 1 && d.site[0].error == 0);
	CHECK(d.site[0].before == ORC_CODE_BEFORE && d.site[0].size == ORC_CODE_BEFORE + ORC_CODE_AFTER);
	CHECK(d.site[0].code[ORC_CODE_BEFORE] == 0x00 && d.site[0].code[ORC_CODE_BEFORE - 1] == 0xff);
	CHECK(!drain(v).used);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void the_same_address_in_a_nested_guest_is_another_place(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1);
	struct orc_record nested = {.reason = KVM_EXIT_X86_BUS_LOCK, .flags = KVM_RUN_X86_BUS_LOCK | KVM_RUN_X86_GUEST_MODE,
				    .rip = 0x1000, .has_rip = 1, .arg = {7}};
	struct drained d;

	lock_at(v, 0x1000, 7);
	for (int i = 0; i < 3; i++)
		orc_vcpu_account(v, &nested, 0);
	d = drain(v);
	CHECK(d.used == 2 && !d.site[0].nested && d.site[0].weight == 1 && d.site[1].nested && d.site[1].weight == 3);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void weights_add_up_to_the_locks_that_were_counted(void)
{
	enum { LOCKS = 200000 };
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 50);
	struct drained d;

	for (int i = 0; i < LOCKS; i++)
		lock_at(v, 0x1000 + (orc_u64)(i % 4 == 3), 0);
	d = drain(v);
	CHECK(atomic_load(&v->bus_locks) == LOCKS);
	CHECK(d.used == 2 && d.weight + v->sample_passed == LOCKS);
	CHECK(d.samples > LOCKS / 50 * 0.95 && d.samples < LOCKS / 50 * 1.05);
	/* The pattern of 4 divides 50; a fixed gap of 50 would see two of its four places, of 100 one. Seven sigma. */
	for (int i = 0; i < 2; i++) {
		double share = (double)d.site[i].weight / (double)d.weight;

		CHECK(share > (d.site[i].rip == 0x1000 ? 0.70 : 0.20) && share < (d.site[i].rip == 0x1000 ? 0.80 : 0.30));
	}
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void a_changed_interval_holds_at_once_and_zero_is_none(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1000000000);

	lock_at(v, 1, 0);
	lock_at(v, 2, 0); /* the gap to the next is long */
	CHECK(drain(v).samples == 1);
	orc_vcpu_sample(v, 1);
	lock_at(v, 3, 0);
	lock_at(v, 3, 0);
	CHECK(drain(v).samples == 2);
	orc_vcpu_sample(v, 0);
	for (int i = 0; i < 1000; i++)
		lock_at(v, 4, 0);
	CHECK(!drain(v).used);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void heavy_ones_stay_when_the_table_is_full_and_the_error_is_bounded(void)
{
	enum { ROUNDS = 4000, HEAVY = 5 };
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1);
	struct drained d;
	int found = 0;

	for (int i = 0; i < ROUNDS; i++) {
		for (orc_u64 heavy = 1; heavy <= HEAVY; heavy++)
			lock_at(v, heavy, 0);
		lock_at(v, 0x10000 + (orc_u64)i, 0); /* each once */
	}
	d = drain(v);
	CHECK(d.used == ORC_SITES && d.weight == ROUNDS * (HEAVY + 1) && d.replaced == ROUNDS + HEAVY - ORC_SITES);
	for (size_t i = 0; i < d.used; i++) {
		CHECK(d.site[i].error <= d.weight / ORC_SITES);
		if (d.site[i].rip <= HEAVY) {
			found++;
			CHECK(d.site[i].weight == ROUNDS && d.site[i].error == 0);
		} else {
			CHECK(d.site[i].weight - d.site[i].error == 1); /* what is certain of it */
		}
	}
	CHECK(found == HEAVY);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void spaces_and_modes_are_told_apart_and_what_has_no_registers_is_counted_as_lost(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1);
	struct drained d;

	lock_at(v, 0x1000, 1);
	lock_at(v, 0x1000, 2);
	lock_at(v, 0, 0);
	d = drain(v);
	CHECK(d.used == 2 && d.lost == 1 && d.weight == 2);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static void code_near_the_ends_of_the_address_space_is_not_looked_for_beyond_them(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1);
	struct drained d;

	lock_at(v, 3, 0);
	lock_at(v, UINT64_MAX - 4, 0);
	d = drain(v);
	CHECK(d.used == 2);
	CHECK(d.site[0].before == 3 && d.site[0].size == 3 + ORC_CODE_AFTER);
	CHECK(d.site[1].before == ORC_CODE_BEFORE && d.site[1].size == ORC_CODE_BEFORE + 4);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

static uint8_t pages[3][4096];

static const uint8_t *second_and_third(orc_vcpu *v, orc_u64 linear)
{
	(void)v;
	return linear < 4096 || linear >= sizeof pages ? NULL : &pages[0][0] + linear;
}

static void code_over_the_end_of_a_page_is_taken_as_far_as_pages_are_there(void)
{
	uint8_t out[32];

	pages[1][0] = 1, pages[1][4095] = 2, pages[2][0] = 3, pages[2][4095] = 4;
	CHECK(orc_profile_copy(NULL, second_and_third, 8192 - 16, out, 32, false) == 32 && out[15] == 2 && out[16] == 3);
	CHECK(orc_profile_copy(NULL, second_and_third, 12288 - 16, out, 32, false) == 16 && out[15] == 4);
	CHECK(orc_profile_copy(NULL, second_and_third, 12288 - 16, out, 32, true) == 0); /* its end is not there */
	CHECK(orc_profile_copy(NULL, second_and_third, 4096 - 16, out, 32, true) == 16 && out[0] == 1);
	CHECK(orc_profile_copy(NULL, second_and_third, 4096 - 16, out, 32, false) == 0);
	CHECK(orc_profile_copy(NULL, second_and_third, 0, out, 0, true) == 0);
}

static void the_address_space_is_what_the_page_tables_are_without_the_rest_of_cr3(void)
{
	struct orc_site s;
	struct kvm_sregs r = {.cr3 = 0x8000000012345fffull, .cr0 = 0x80000001, .cs = {.l = 1}, .efer = 1 << 10};

	orc_profile_place(&s, 0xffffffff81000000ull, 2, &r);
	CHECK(s.mode == 64 && s.space == 0x12345000 && s.rip == 0xffffffff81000000ull && s.cpl == 0);
	r.cs = (struct kvm_segment){.db = 1, .base = 0x100};
	r.ss.dpl = 3;
	orc_profile_place(&s, 0xffffff80, 2, &r);
	CHECK(s.mode == 32 && s.rip == 0x80 && s.cpl == 3); /* compatibility mode; addresses wrap */
	r.efer = 0;
	r.cr4 = 1 << 5;
	r.cr3 = 0x12345678;
	orc_profile_place(&s, 0, 2, &r);
	CHECK(s.space == 0x12345660);
	r.cr4 = 0;
	orc_profile_place(&s, 0, 2, &r);
	CHECK(s.space == 0x12345000);
	r.ss.dpl = 0;
	orc_profile_place(&s, 0, 1 << 17, &r);
	CHECK(s.cpl == 3); /* virtual-8086 */
	r.cr0 = 0;
	r.cs = (struct kvm_segment){.base = 0xf0000};
	orc_profile_place(&s, 0xfff0, 2, &r);
	CHECK(s.mode == 16 && s.rip == 0xffff0 && s.space == 0 && s.cpl == 0);
}

enum { STORM = 300000 };

static void *storm(void *argument)
{
	for (int i = 0; i < STORM; i++)
		lock_at(argument, 0x1000 + (orc_u64)(i & 7), 0);
	return NULL;
}

static void nothing_is_lost_or_doubled_when_it_is_taken_while_the_vcpu_runs(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = sampled(f, 1);
	orc_u64 weight = 0;
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, storm, v));
	for (int i = 0; i < 2000; i++)
		weight += drain(v).weight;
	pthread_join(thread, NULL);
	weight += drain(v).weight;
	CHECK(weight == STORM);
	lock_at(v, 1, 0); /* and what nobody takes is freed with the vCPU */
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

const struct test profile_tests[] = {
	TEST(the_first_lock_is_sampled_and_what_is_taken_is_gone),
	TEST(the_same_address_in_a_nested_guest_is_another_place),
	TEST(weights_add_up_to_the_locks_that_were_counted),
	TEST(a_changed_interval_holds_at_once_and_zero_is_none),
	TEST(heavy_ones_stay_when_the_table_is_full_and_the_error_is_bounded),
	TEST(spaces_and_modes_are_told_apart_and_what_has_no_registers_is_counted_as_lost),
	TEST(code_near_the_ends_of_the_address_space_is_not_looked_for_beyond_them),
	TEST(code_over_the_end_of_a_page_is_taken_as_far_as_pages_are_there),
	TEST(the_address_space_is_what_the_page_tables_are_without_the_rest_of_cr3),
	TEST(nothing_is_lost_or_doubled_when_it_is_taken_while_the_vcpu_runs),
	{NULL, NULL},
};
