/* Which guest instructions lock the bus: a sample now and then, added up here, so that a profile costs no ring traffic.
 *
 * Which locks are sampled: each gap to the next is drawn evenly from 1 to 2N - 1, so N on average (sFlow does it so: RFC
 * 3176, 3.1; DCPI does: Anderson et al., "Continuous profiling: where have all the cycles gone?", SOSP 1997, 4.1.1). With a
 * fixed gap, a guest whose locks come in a pattern that divides N would show one of its instructions and none of the others.
 * A sample weighs as many locks as it was drawn from: those since the sample before, itself included. So the weights add up
 * to the number of locks, and each instruction's weight is an unbiased estimate of its part.
 *
 * What is kept: "space-saving" (Metwally, Agrawal, El Abbadi, "Efficient computation of frequent and top-k elements in data
 * streams", ICDT 2005). If the table is full, the lightest entry makes way, and whoever takes its place inherits its weight,
 * as `error`: by no more than that is it overestimated. Whatever has more than 1/ORC_SITES of all weight is in the table.
 *
 * Who owns it: the table hangs at one pointer. Runner and owner take it away by an exchange, and nobody waits for the other:
 * what the runner finds taken it makes anew, and what the owner finds taken comes the next time.
 *
 * Cost for a lock that is not sampled: an addition and two comparisons. */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "core.h"

struct orc_profile {
	uint32_t used;
	orc_u64 lost; /* weight of samples whose registers could not be read */
	orc_u64 replaced;
	struct orc_site site[ORC_SITES];
};

/* Up to `mean` on average, at least 1. */
static orc_u64 draw(orc_vcpu *v, uint32_t mean)
{
	orc_u64 x = v->sample_random ? v->sample_random : ((orc_u64)v->id << 32 | 1) ^ (orc_u64)orc_now();

	/* xorshift64: Marsaglia, "Xorshift RNGs", J. Stat. Software 8 (2003). */
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	v->sample_random = x;
	return 1 + (x >> 16) % (2ull * mean - 1);
}

void orc_vcpu_sample(orc_vcpu *v, uint32_t every)
{
	atomic_store_explicit(&v->sample_every, every, memory_order_relaxed);
}

void orc_vcpu_profile_memory(orc_vcpu *v, const struct kvm_userspace_memory_region *slot, size_t slots)
{
	v->slot = slot;
	v->slots = slots;
}

static bool same(const struct orc_site *a, const struct orc_site *b)
{
	return a->rip == b->rip && a->space == b->space && a->mode == b->mode && a->cpl == b->cpl && a->rode == b->rode &&
	       a->nested == b->nested;
}

/* Code around an address: what lies on pages that are there. */
static void read_code(orc_vcpu *v, struct orc_site *s)
{
	orc_u64 top = s->mode == 64 ? UINT64_MAX : UINT32_MAX;
	size_t before = s->rip < ORC_CODE_BEFORE ? (size_t)s->rip : ORC_CODE_BEFORE, after = ORC_CODE_AFTER;

	if (top - s->rip < after)
		after = (size_t)(top - s->rip);
	/* From behind, as what is before may be on a page that is not there. */
	before = v->witness->code(v, s->rip - before, s->code, before, true);
	s->before = (uint8_t)before;
	s->size = (uint8_t)(before + v->witness->code(v, s->rip, s->code + before, after, false));
}

static void add(orc_vcpu *v, struct orc_profile *p, struct orc_site *seen, orc_u64 weight)
{
	struct orc_site *s, *lightest = p->site;

	/* Few of them, and the heavy ones came first: looking through beats hashing. */
	for (s = p->site; s < p->site + p->used && !same(s, seen); s++)
		if (s->weight < lightest->weight)
			lightest = s;
	if (s == p->site + p->used) {
		if (v->witness)
			read_code(v, seen);
		if (p->used < ORC_SITES) {
			p->used++;
		} else {
			s = lightest;
			seen->error = s->weight;
			seen->weight = s->weight;
			p->replaced++;
		}
		*s = *seen;
	}
	s->samples++;
	s->weight += weight;
}

void orc_profile_take(orc_vcpu *v, const struct orc_record *record, uint32_t every)
{
	struct orc_site seen = {.rip = record->rip, .nested = (record->flags & KVM_RUN_X86_GUEST_MODE) != 0};
	orc_u64 weight = v->sample_passed;
	struct orc_profile *p, *taken = NULL;
	bool known;

	if (every != v->sample_drawn) { /* it was changed: what was drawn before does not hold */
		bool first = !v->sample_drawn;

		v->sample_drawn = every;
		if (!first) {
			v->sample_gap = v->sample_passed - 1 + draw(v, every);
			if (v->sample_passed < v->sample_gap)
				return;
		}
	}
	v->sample_passed = 0;
	v->sample_gap = draw(v, every);

	known = v->witness ? v->witness->registers(v, record, &seen) : record->has_rip;
	p = atomic_exchange_explicit(&v->profile, NULL, memory_order_acquire);
	if (!p && !(p = calloc(1, sizeof *p)))
		return; /* the locks are counted all the same */
	if (known)
		add(v, p, &seen, weight);
	else
		p->lost += weight;
	/* The owner puts nothing there, so that it is as we left it. */
	atomic_compare_exchange_strong_explicit(&v->profile, &taken, p, memory_order_release, memory_order_relaxed);
}

size_t orc_vcpu_profile(orc_vcpu *v, struct orc_site *out, orc_u64 *lost, orc_u64 *replaced)
{
	struct orc_profile *p = atomic_exchange_explicit(&v->profile, NULL, memory_order_acquire);
	size_t used = 0;

	*lost = *replaced = 0;
	if (p) {
		used = p->used;
		memcpy(out, p->site, used * sizeof *out);
		*lost = p->lost;
		*replaced = p->replaced;
		free(p);
	}
	return used;
}

void orc_profile_free(orc_vcpu *v)
{
	free(atomic_exchange_explicit(&v->profile, NULL, memory_order_acquire));
}

void orc_profile_place(struct orc_site *s, orc_u64 rip, orc_u64 rflags, const struct kvm_sregs *r)
{
	enum { CR0_PE = 1, CR4_PAE = 1 << 5, EFER_LMA = 1 << 10, EFLAGS_VM = 1 << 17 };
	bool long_mode = r->efer & EFER_LMA;

	s->mode = long_mode && r->cs.l ? 64 : r->cs.db ? 32 : 16;
	s->cpl = !(r->cr0 & CR0_PE) ? 0 : rflags & EFLAGS_VM ? 3 : r->ss.dpl;
	s->rip = s->mode == 64 ? rip : (uint32_t)(r->cs.base + rip);
	/* What else is in CR3 says how to cache, and which PCID: Intel SDM vol. 3, 2.5 and 4.5.2; with PAE: 4.4.1. */
	s->space = !(r->cr0 >> 31 & 1) ? 0
				       : r->cr3 & (long_mode ? 0x000ffffffffff000 : r->cr4 & CR4_PAE ? 0xffffffe0 : 0xfffff000);
}

/* ---- KVM ------------------------------------------------------------------------------------------------------ */

/* Asked for when a sample is due and not synchronised by each KVM_RUN: which exits are locks is known only afterwards, and
 * a guest that does a million port accesses before its first lock would pay for each. */
static bool registers(orc_vcpu *v, const struct orc_record *record, struct orc_site *s)
{
	struct kvm_regs regs;
	struct kvm_sregs sregs;

	if (ioctl(v->fd, KVM_GET_REGS, &regs) || ioctl(v->fd, KVM_GET_SREGS, &sregs))
		return false;
	orc_profile_place(s, regs.rip, regs.rflags, &sregs);
	s->rode = record->reason != KVM_EXIT_X86_BUS_LOCK;
	return true;
}

static const uint8_t *host_address(const orc_vcpu *v, orc_u64 physical)
{
	for (size_t i = 0; i < v->slots; i++)
		if (physical - v->slot[i].guest_phys_addr < v->slot[i].memory_size)
			return (const uint8_t *)(uintptr_t)v->slot[i].userspace_addr + (physical - v->slot[i].guest_phys_addr);
	return NULL;
}

/* A 64-bit guest's tables (Intel SDM vol. 3, 4.5), each entry read once. What a guest writes there leads into its own memory, or
 * nowhere. */
static const uint8_t *walk(orc_vcpu *v, orc_u64 linear, const struct kvm_sregs *s)
{
	enum { PRESENT = 1 << 0, LARGE = 1 << 7, LA57 = 1 << 12 };
	const orc_u64 frame = 0x000ffffffffff000;
	orc_u64 table = s->cr3 & frame;

	for (int level = s->cr4 & LA57 ? 5 : 4; level; level--) {
		int shift = 3 + 9 * level;
		const uint8_t *at = host_address(v, table + (linear >> shift & 511) * 8);
		orc_u64 entry = at ? *(const volatile orc_u64 *)at : 0;

		if (!(entry & PRESENT))
			return NULL;
		table = entry & frame;
		if (level == 1 || (level <= 3 && entry & LARGE)) {
			orc_u64 within = (1ull << shift) - 1;

			return host_address(v, (table & ~within) | (linear & within));
		}
	}
	return NULL;
}

/* KVM does the walk: it knows every kind of paging, and a guest's guest. But it asks as the guest's kernel would, and where a
 * guest has SMAP on, its kernel may not look at a program's pages (kvm_mmu_gva_to_gpa_system, permission_fault in
 * arch/x86/kvm/mmu.h). */
static const uint8_t *translate(orc_vcpu *v, orc_u64 linear)
{
	enum { PG = 1u << 31, LMA = 1 << 10 };
	struct kvm_translation t = {.linear_address = linear};
	struct kvm_sregs s;

	if (ioctl(v->fd, KVM_TRANSLATE, &t))
		return NULL;
	if (t.valid)
		return host_address(v, t.physical_address);
	if (ioctl(v->fd, KVM_GET_SREGS, &s) || !(s.cr0 & PG) || !(s.efer & LMA))
		return NULL;
	return walk(v, linear, &s);
}

static size_t code(orc_vcpu *v, orc_u64 linear, uint8_t *out, size_t n, bool end)
{
	return orc_profile_copy(v, translate, linear, out, n, end);
}

size_t orc_profile_copy(orc_vcpu *v, const uint8_t *(*translate)(orc_vcpu *, orc_u64), orc_u64 linear, uint8_t *out, size_t n,
			bool end)
{
	enum { PAGE = 4096 };
	size_t first = PAGE - (size_t)(linear & (PAGE - 1)), done = 0;
	const uint8_t *from;

	if (first > n)
		first = n;
	if (first && (from = translate(v, linear))) {
		memcpy(out, from, first);
		done = first;
	} else if (first && !end) {
		return 0;
	}
	if (n > first) {
		if (!(from = translate(v, linear + first)))
			return end ? 0 : done;
		memcpy(out + done, from, n - first);
		done += n - first;
	}
	return done;
}

const struct orc_witness orc_kvm_witness = {registers, code};
