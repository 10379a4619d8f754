/* Unicorn, loaded at run time: its interface, and where a saved context holds what that has no names for. */
#ifndef ORC_UNICORN_H
#define ORC_UNICORN_H

#include "orc.h"

/* As unicorn's headers have them; they come with its wheel, so we are not built against them. */
typedef void uc_engine;
typedef struct {
	uint64_t pc;
	uint16_t icount, size;
} uc_tb;
typedef struct {
	uint16_t selector;
	uint64_t base;
	uint32_t limit, flags;
} uc_x86_mmr;
typedef struct {
	uint32_t rid;
	uint64_t value;
} uc_x86_msr;
typedef uint64_t uc_mmio_read(uc_engine *, uint64_t offset, unsigned size, void *data);
typedef void uc_mmio_write(uc_engine *, uint64_t offset, unsigned size, uint64_t value, void *data);

#define ORC_UNICORN_FUNCTIONS(F)                                                                                        \
	F(unsigned, uc_version, (unsigned *, unsigned *))                                                               \
	F(const char *, uc_strerror, (int))                                                                             \
	F(int, uc_open, (int arch, int mode, uc_engine **))                                                             \
	F(int, uc_close, (uc_engine *))                                                                                 \
	F(int, uc_ctl, (uc_engine *, unsigned control, ...))                                                            \
	F(int, uc_reg_read, (uc_engine *, int, void *))                                                                 \
	F(int, uc_reg_write, (uc_engine *, int, const void *))                                                          \
	F(int, uc_mem_map_ptr, (uc_engine *, uint64_t, uint64_t size, uint32_t, void *))                                \
	F(int, uc_mem_unmap, (uc_engine *, uint64_t, uint64_t size))                                                    \
	F(int, uc_mem_protect, (uc_engine *, uint64_t, uint64_t size, uint32_t))                                        \
	F(int, uc_mmio_map, (uc_engine *, uint64_t, uint64_t size, uc_mmio_read *, void *, uc_mmio_write *, void *))    \
	F(int, uc_vmem_translate, (uc_engine *, uint64_t, uint32_t, uint64_t *))                                        \
	F(int, uc_hook_add, (uc_engine *, size_t *, int, void *, void *, uint64_t, uint64_t, ...))                      \
	F(int, uc_hook_del, (uc_engine *, size_t))                                                                      \
	F(int, uc_emu_start, (uc_engine *, uint64_t, uint64_t, uint64_t, size_t))                                       \
	F(int, uc_emu_stop, (uc_engine *))                                                                              \
	F(size_t, uc_context_size, (uc_engine *))                                                                       \
	F(int, uc_context_alloc, (uc_engine *, void **))                                                                \
	F(int, uc_context_save, (uc_engine *, void *))                                                                  \
	F(int, uc_context_restore, (uc_engine *, void *))                                                               \
	F(int, uc_context_free, (void *))

struct orc_unicorn {
	void *library;
	struct orc_unicorn_numbers n;
	size_t context_size;
	/* In a saved context: RAX.., what the flags are worked out from, hflags, the hidden parts of ES, CS, SS, DS, FS, GS, and
	 * the exception in flight (-1: none). */
	size_t at_registers, at_flags, at_hflags, at_segments, at_exception;
	void *fresh[3]; /* contexts of a CPU that has just entered 16, 32, 64-bit mode */
#define F(result, name, arguments) result(*name) arguments;
	ORC_UNICORN_FUNCTIONS(F)
#undef F
};

/* QEMU's SegmentCache, as a saved context holds it (target/i386/cpu.h); unicorn.c checks that it does. */
struct orc_segment_cache {
	uint32_t selector, pad;
	uint64_t base;
	uint32_t limit, flags;
};
enum { ORC_FLAGS_SIZE = 3 * sizeof(uint64_t) }; /* its cc_dst, cc_src and cc_src2 */
/* Bits of its hflags, which say how code is translated. */
enum { HFLAG_CPL = 3, HFLAG_CODE_32 = 1 << 4, HFLAG_CODE_64 = 1 << 15 };

/* The numbers of the sixteen general registers, in the hardware's order. */
static inline const int *orc_unicorn_general(const struct orc_unicorn *u)
{
	return &u->n.UC_X86_REG_RAX;
}
/* The first argument of uc_ctl: what its macros make in unicorn's header. */
unsigned orc_unicorn_control(const struct orc_unicorn *, int type, int arguments);
/* An engine, with a buffer for translations of the size that suits us. An error of unicorn's. */
int orc_unicorn_open(const struct orc_unicorn *, int mode, uc_engine **);

#endif
