/* What profile.c asks of an emulated guest: the same as of KVM. */
#include "emulate.h"

static bool registers(orc_vcpu *v, const struct orc_record *record, struct orc_site *s)
{
	struct orc_emulator *e = v->emulator;
	struct kvm_sregs sregs = {0};

	orc_emulator_special_registers(e, &sregs);
	/* The RIP that is told, behind the instruction or on it: unicorn's own may not be there yet. */
	orc_profile_place(s, record->rip, orc_flags(e), &sregs);
	s->cpl = orc_state_hflags(e) & HFLAG_CPL;
	return true;
}

static const uint8_t *translate(orc_vcpu *v, orc_u64 linear)
{
	struct orc_emulator *e = v->emulator;
	const struct orc_memory *m;
	uint64_t physical;

	if (!orc_memory_translate(e, linear, false, &physical) || !(m = orc_memory_at(e, physical)))
		return NULL;
	return m->host + (physical - m->start);
}

static size_t code(orc_vcpu *v, orc_u64 linear, uint8_t *out, size_t n, bool end)
{
	return orc_profile_copy(v, translate, linear, out, n, end);
}

const struct orc_witness orc_emulator_witness = {registers, code};
