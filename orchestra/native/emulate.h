/* What unicorn.c (the library, engines) and emulate.c (the run loop) share. */
#ifndef ORC_EMULATE_H
#define ORC_EMULATE_H

#include "core.h"
#include "decode.h"

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
	void *fresh[3];                   /* contexts of a CPU that has just entered 16, 32, 64-bit mode */
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

struct orc_memory {
	uint64_t start, size;
	uint8_t *host;
	bool readonly;
	_Atomic uint8_t *executed; /* a bit for each page that code was fetched from: writes to those go a slow path */
};

/* An access to memory that nobody backs, or a write to memory that may only be read. */
struct orc_touch {
	uint64_t address, value;
	uint8_t size;
	bool write, rom;
};
enum { ORC_TOUCHES = 8, ORC_WINDOWS = 4, ORC_IO_BYTES = 1024 };

struct orc_window {
	struct orc_emulator *e;
	uint64_t page;
	struct orc_memory *rom; /* NULL: nobody backs the page */
	uint8_t *before;        /* what the page held; allocated when first needed */
};

struct orc_emulator {
	const struct orc_unicorn *u;
	uc_engine *uc;
	orc_vcpu *v;
	orc_ports *ports;
	bool trap_like, bus_locks;
	void *context, *rollback;
	struct orc_memory *memory;
	size_t memories;
	const char *failed; /* what unicorn could not do */

	/* Read at each block; set by others. */
	_Atomic uint32_t attention;

	/* Which instructions are hooked. */
	uint64_t *sites; /* an open hash table of addresses, 0: free */
	size_t *hooks;
	uint32_t site_count, site_room;
	uint64_t stale, stale_end; /* translated before its sites were hooked */

	/* What the hooks leave for the loop. */
	struct orc_insn insn; /* a port access or HLT that stopped before it was executed */
	uint64_t insn_rip;
	int exception;          /* -1: none */
	struct orc_touch touch; /* size 0: none */
	uint64_t touch_rip;
	uint64_t fetch; /* page that may not be executed yet */
	bool fetch_failed;

	uint64_t pass;  /* fault-like: the lock there is counted already; -1: none */
	uint64_t pass_debug; /* the breakpoint there is told already */
	uint64_t armed; /* trap-like: a lock is done once execution gets there; -1: none */
	uint64_t armed_rip;

	bool alone;    /* the instruction at RIP was met already: it is executed by itself, and hooks let it pass */
	bool careful;  /* a fault may belong to an instruction further on: execute one at a time */
	bool stepping, stepped;

	uint64_t met;  /* RIP of the instruction that on_instruction() saw last; `context` is from then */
	bool met_lock; /* it locks */

	/* LOCK NEG, whose flags unicorn gets wrong: its operand; size 0: none. */
	uint64_t negated;
	uint8_t negated_size;

	bool once; /* what an instruction reads twice has one answer */
	bool replaying, missing, too_many, torn;
	struct orc_touch answers[ORC_TOUCHES], writes[ORC_TOUCHES];
	unsigned answered, used, written, delivered;
	struct orc_touch outer; /* what the instruction being replayed accesses, as it does: not in unicorn's pieces */
	struct orc_touch *part; /* of `answers` or `writes`: what the pieces that come belong to */
	struct orc_window window[ORC_WINDOWS];
	unsigned windows, opened;
	size_t access_hook;

	enum { PENDING_NOTHING, PENDING_IO, PENDING_READ, PENDING_WRITE, PENDING_DONE } pending;
	uint32_t debug; /* KVM_GUESTDBG_* */
	uint64_t breakpoint[4];
	uint32_t io_count;
	uint8_t data[ORC_IO_BYTES];
};
enum { ATTENTION_STALE = 1, ATTENTION_WRITTEN = 2 };

/* unicorn.c */
void orc_emulator_look(struct orc_emulator *); /* saves the CPU's state where the two below find it */
static inline uint64_t *orc_state_registers(const struct orc_emulator *e)
{
	return (uint64_t *)((char *)e->context + e->u->at_registers);
}
static inline struct orc_segment_cache *orc_state_segments(const struct orc_emulator *e)
{
	return (struct orc_segment_cache *)((char *)e->context + e->u->at_segments);
}
static inline uint32_t orc_state_hflags(const struct orc_emulator *e)
{
	return *(const uint32_t *)((const char *)e->context + e->u->at_hflags);
}
static inline int orc_state_bits(const struct orc_emulator *e)
{
	uint32_t hflags = orc_state_hflags(e);

	return hflags & HFLAG_CODE_64 ? 64 : hflags & HFLAG_CODE_32 ? 32 : 16;
}
uint64_t orc_register(const struct orc_emulator *, int number);
void orc_set_register(const struct orc_emulator *, int number, uint64_t value);

/* emulate.c */
/* Has unicorn execute code of that page. False: it is no memory, or unicorn has none left. */
bool orc_emulator_let_execute(struct orc_emulator *, uint64_t address);
unsigned orc_unicorn_control(const struct orc_unicorn *, int type, int arguments);
int orc_emulator_hook(struct orc_emulator *); /* an error of unicorn's */

#endif
