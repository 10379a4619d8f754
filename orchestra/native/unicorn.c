/* Unicorn, loaded at run time, and the state of CPUs that have just entered each mode. Traps in it, and their cures:
 *
 * - An engine opened in 16-bit mode can't be resumed once its guest has left real mode. All are opened in 64-bit mode, and
 *   take over the saved state of a CPU that is in the mode wanted.
 * - Registers' hidden parts (a segment's base, whether code is 16, 32 or 64-bit) have no names in unicorn's interface, but
 *   a saved context holds them. Where, is found out by writing known values and looking for them.
 */
#include <dlfcn.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unicorn.h"

enum {
	/* Just too small for a huge page, which unicorn asks for and the kernel would clear at each launch. A guest with more
	 * code has it translated once more now and then; unicorn's default is 1 GiB. */
	TRANSLATIONS = (2 << 20) - 4096,
	SCRATCH = 1 << 16,
	ENTER = 0x1000,
	FCW_RESET = 0x37f, /* as KVM leaves the FPU after reset, so that SSE and x87 exceptions are masked */
	MXCSR_RESET = 0x1f80,
};
#define MARK 0x5e1f0badcafe0000ull

unsigned orc_unicorn_control(const struct orc_unicorn *u, int type, int arguments)
{
	/* uc_ctl's macro of that name: direction, number of arguments, type (unicorn.h, UC_CTL) */
	return (unsigned)type | (unsigned)arguments << 26 | (unsigned)u->n.UC_CTL_IO_WRITE << 30;
}

int orc_unicorn_open(const struct orc_unicorn *u, int mode, uc_engine **uc)
{
	int rc = u->uc_open(u->n.UC_ARCH_X86, mode, uc);

	if (!rc)
		u->uc_ctl(*uc, orc_unicorn_control(u, u->n.UC_CTL_TCG_BUFFER_SIZE, 1), TRANSLATIONS);
	return rc;
}

static bool find(const void *context, size_t size, uint64_t value, size_t *at)
{
	for (size_t i = 0; i + sizeof value <= size; i += 4)
		if (!memcmp((const char *)context + i, &value, sizeof value)) {
			*at = i;
			return true;
		}
	return false;
}

/* Where a saved context has the general registers and the segments. */
static bool find_state(struct orc_unicorn *u, uc_engine *uc, void *context)
{
	const int *number = orc_unicorn_general(u);
	size_t at, fs, gs, debug;
	uint64_t value;

	for (unsigned i = 0; i < 16; i++) {
		value = MARK + i;
		if (u->uc_reg_write(uc, number[i], &value))
			return false;
	}
	value = MARK + 16;
	u->uc_reg_write(uc, u->n.UC_X86_REG_FS_BASE, &value);
	value = MARK + 17;
	u->uc_reg_write(uc, u->n.UC_X86_REG_GS_BASE, &value);
	value = MARK + 18;
	u->uc_reg_write(uc, u->n.UC_X86_REG_DR0, &value);
	if (u->uc_context_save(uc, context))
		return false;
	for (unsigned i = 0; i < 16; i++)
		if (!find(context, u->context_size, MARK + i, &at) || (i && at != u->at_registers + 8 * i))
			return false;
		else if (!i)
			u->at_registers = at;
	if (!find(context, u->context_size, MARK + 16, &fs) || !find(context, u->context_size, MARK + 17, &gs) ||
	    gs - fs != sizeof(struct orc_segment_cache) || !find(context, u->context_size, MARK + 18, &debug))
		return false;
	u->at_segments = fs - offsetof(struct orc_segment_cache, base) - 4 * sizeof(struct orc_segment_cache);
	/* As target/i386/cpu.h has it, CPUX86State: registers, eip, eflags, cc_dst, cc_src, cc_src2, cc_op, df, hflags, hflags2,
	 * segments. enter_modes() sees whether hflags are. */
	u->at_flags = u->at_registers + 18 * sizeof(uint64_t);
	u->at_hflags = u->at_flags + ORC_FLAGS_SIZE + 2 * sizeof(uint32_t);
	/* And after dr[8] and cpu_breakpoint[4] old_exception. */
	u->at_exception = debug + 12 * sizeof(uint64_t);
	return u->at_segments == u->at_hflags + 2 * sizeof(uint32_t) && u->at_exception + sizeof(int32_t) <= u->context_size &&
	       *(const int32_t *)((const char *)context + u->at_exception) == -1;
}

/* Runs the program that enters the modes, and keeps the state of each. */
static const char *enter_modes(struct orc_unicorn *u, uc_engine *uc, uint8_t *scratch)
{
	static const uint32_t expected[] = {0, HFLAG_CODE_32, HFLAG_CODE_32 | HFLAG_CODE_64};
	const int all = u->n.UC_PROT_READ | u->n.UC_PROT_WRITE | u->n.UC_PROT_EXEC;
	uint64_t rip = ENTER;
	uint32_t hflags;

	if (u->uc_context_restore(uc, u->fresh[0]) || u->uc_mem_map_ptr(uc, 0, SCRATCH, (uint32_t)all, scratch))
		return "a fresh CPU can't be set up";
	for (int mode = 0; mode < 3; mode++) {
		if (mode) {
			if (u->uc_emu_start(uc, rip, 0, 0, 0) || u->uc_context_alloc(uc, &u->fresh[mode]) ||
			    u->uc_context_save(uc, u->fresh[mode]))
				return "it does not get into protected and long mode";
			u->uc_reg_read(uc, u->n.UC_X86_REG_RIP, &rip);
		}
		hflags = *(const uint32_t *)((const char *)u->fresh[mode] + u->at_hflags);
		if ((hflags & (HFLAG_CODE_32 | HFLAG_CODE_64 | HFLAG_CPL)) != expected[mode])
			return "its CPU state is not laid out as in the versions that orchestra knows";
	}
	return NULL;
}

static const char *prepare(struct orc_unicorn *u, const uint8_t *enter, size_t enter_size)
{
	uc_engine *real = NULL, *uc = NULL;
	uint8_t *scratch = enter_size < SCRATCH - ENTER ? aligned_alloc(4096, SCRATCH) : NULL;
	void *context = NULL;
	const char *problem = "no memory for its engines";
	uint32_t word;

	if (!scratch || orc_unicorn_open(u, u->n.UC_MODE_16, &real) ||
	    orc_unicorn_open(u, u->n.UC_MODE_64, &uc))
		goto out;
	memset(scratch, 0, SCRATCH);
	memcpy(scratch + ENTER, enter, enter_size);
	u->uc_ctl(uc, orc_unicorn_control(u, u->n.UC_CTL_UC_USE_EXITS, 1), 1);
	u->context_size = u->uc_context_size(uc);
	if (u->uc_context_alloc(real, &u->fresh[0]) || u->uc_context_alloc(uc, &context))
		goto out;
	word = FCW_RESET;
	u->uc_reg_write(real, u->n.UC_X86_REG_FPCW, &word);
	word = MXCSR_RESET;
	u->uc_reg_write(real, u->n.UC_X86_REG_MXCSR, &word);
	if (u->uc_context_save(real, u->fresh[0]))
		goto out;
	problem = find_state(u, uc, context) ? enter_modes(u, uc, scratch) : "its CPU state was not found where it saves it";
out:
	if (context)
		u->uc_context_free(context);
	if (real)
		u->uc_close(real);
	if (uc)
		u->uc_close(uc);
	free(scratch);
	return problem;
}

orc_unicorn *orc_unicorn_load(const char *path, const struct orc_unicorn_numbers *numbers, const uint8_t *enter,
			      size_t enter_size, char *problem, size_t room)
{
	struct orc_unicorn *u = calloc(1, sizeof *u);
	const char *failed = NULL;

	if (!u) {
		snprintf(problem, room, "no memory");
		return NULL;
	}
	u->n = *numbers;
	u->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!u->library) {
		snprintf(problem, room, "%s", dlerror());
		goto failed;
	}
#define F(result, name, arguments)                                                   \
	if (!failed && !(*(void **)&u->name = dlsym(u->library, #name)))             \
		failed = #name;
	ORC_UNICORN_FUNCTIONS(F)
#undef F
	if (failed) {
		snprintf(problem, room, "it has no %s", failed);
		goto failed;
	}
	failed = prepare(u, enter, enter_size);
	if (failed) {
		snprintf(problem, room, "%s", failed);
		goto failed;
	}
	return u;
failed:
	orc_unicorn_free(u);
	return NULL;
}

void orc_unicorn_free(orc_unicorn *u)
{
	if (!u)
		return;
	for (int i = 0; i < 3; i++)
		if (u->fresh[i])
			u->uc_context_free(u->fresh[i]);
	if (u->library)
		dlclose(u->library);
	free(u);
#ifdef __GLIBC__
	/* An engine's half a MiB of hash tables is in the heap from the second one on, among what lives longer: without this
	 * the process would keep a GiB after 1000 of them. */
	malloc_trim(0);
#endif
}
