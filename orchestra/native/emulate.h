/* What the files of the emulated backend share. Each part has a struct of its own, which nobody else changes:
 *
 *   emulate.c           the run loop: into the guest, and why it came back
 *   emulate_engine.c    an engine and its registers
 *   emulate_memory.c    what is where in guest memory, and where code was
 *   emulate_sites.c     which instructions are hooked
 *   emulate_meet.c      a hooked instruction, before it is executed
 *   emulate_locks.c     bus locks: found, and counted once
 *   emulate_ports.c     IN, OUT, INS, OUTS, which we execute
 *   emulate_attempt.c   one attempt to execute an instruction that accesses memory that nobody backs
 *   emulate_replay.c    such instructions: what they read asked for, attempted again, what they write delivered
 *   emulate_exits.c     what the guest did, as records
 *
 * All of it is the runner's alone, except `attention` and the bits in orc_memory.executed. */
#ifndef ORC_EMULATE_H
#define ORC_EMULATE_H

#include "core.h"
#include "decode.h"
#include "unicorn.h"

enum {
	PAGE = 4096,
	EFLAGS_TF = 1 << 8,
	EFLAGS_DF = 1 << 10,
	EFLAGS_OF = 1 << 11,
	EFLAGS_IOPL_SHIFT = 12,
	EFLAGS_VM = 1 << 17,
	EXCEPTION_DB = 1,
	EXCEPTION_BP = 3,
	EXCEPTION_UD = 6,
	EXCEPTION_GP = 13,
	EXCEPTION_PF = 14,
	EFER_SCE = 1,
	EFER_LMA = 1 << 10,
	SEGMENT_ES = 0,
	SEGMENT_CS = 1,
	SEGMENT_FS = 4,
};
#define MSR_EFER 0xc0000080u
#define CR0_PG (1u << 31)
#define NOWHERE UINT64_MAX /* an address that none is */

/* ---- what the parts keep -------------------------------------------------------------------------------------- */

struct orc_memory {
	uint64_t start, size;
	uint8_t *host;
	bool readonly;
	_Atomic uint8_t *executed; /* a bit for each page that code was fetched from: writes to those go a slow path */
};

struct orc_sites {
	uint64_t *address; /* an open hash table of addresses + 1; 0: free */
	size_t *hook;
	uint32_t count, room;
	uint64_t stale, stale_end; /* translated before what is in there was hooked */
};

/* The instruction that was met last. */
struct orc_meeting {
	uint64_t rip; /* NOWHERE: none since the guest was entered. The state looked at is from then */
	struct orc_insn insn;
	bool ours;       /* a port access or HLT: the guest stopped before it, and does not execute it */
	bool breakpoint; /* the guest stopped before it, to tell */
	/* Addresses where the guest goes on with what was met already; NOWHERE: none. */
	uint64_t counted; /* a lock before which it had to wait */
	uint64_t reported; /* a breakpoint */
};

struct orc_debug {
	uint32_t control; /* KVM_GUESTDBG_* */
	uint64_t breakpoint[4];
	unsigned breakpoints;
};

struct orc_lock {
	uint64_t armed, armed_rip; /* trap-like: a lock is done once execution gets to that address; NOWHERE: none */
	/* LOCK NEG, whose flags unicorn gets wrong: its operand; size 0: none. */
	uint64_t negated;
	uint8_t negated_size;
};

/* An access to memory that nobody backs, or a write to memory that may only be read. */
struct orc_touch {
	uint64_t address, value;
	uint8_t size;
	bool write, rom;
};
enum { ORC_TOUCHES = 8, ORC_WINDOWS = 4, ORC_IO_BYTES = 1024 };

/* A page of it. */
struct orc_window {
	struct orc_emulator *e;
	uint64_t page;
	struct orc_memory *rom; /* NULL: nobody backs the page */
	uint8_t *before;        /* what the page held; allocated when first needed */
};

struct orc_attempt {
	bool running;           /* an instruction is being attempted: other hooks let it pass */
	bool missing;           /* it read what is not known yet */
	const char *problem;    /* it does what can't be undone, or too much; NULL: nothing of that */
	struct orc_touch touch; /* what gave it, or an instruction outside of an attempt, up; size 0: nothing */
	uint64_t touch_rip;
	struct orc_touch writes[ORC_TOUCHES]; /* what it wrote */
	unsigned written;
	unsigned used;          /* how many of the answers it read */
	struct orc_touch outer; /* what it accesses, as it does: not in unicorn's pieces */
	struct orc_touch *part; /* of answers or writes: what the pieces that come belong to */
	struct orc_window window[ORC_WINDOWS];
	unsigned windows, opened;
	size_t access_hook;
};

struct orc_replay {
	struct orc_touch answers[ORC_TOUCHES]; /* to what the instruction reads, in that order, as far as known */
	unsigned answered, delivered;          /* and how many of its writes were told */
	bool once;                             /* what it reads twice has one answer */
};

enum { ATTENTION_STALE = 1, ATTENTION_WRITTEN = 2 };

struct orc_emulator {
	const struct orc_unicorn *u;
	uc_engine *uc;
	orc_vcpu *v;
	bool trap_like, bus_locks;
	void *context;  /* the CPU's state when it was looked at last */
	void *rollback; /* and one to go back to */
	struct orc_memory *memory;
	size_t memories;
	_Atomic uint32_t attention; /* read at each block; set by others as well */

	/* The loop's, and what tells it why the guest stopped. */
	const char *failed; /* what unicorn could not do */
	int exception;      /* -1: none */
	uint64_t fetch;     /* page that may not be executed yet */
	bool alone;         /* the instruction at RIP was met already: it is executed by itself, and hooks let it pass */
	bool careful;       /* a fault may belong to an instruction further on: execute one at a time */
	bool stepping, stepped;
	/* What completes the access that was told, when the guest is entered again; NULL: nothing is to be. */
	enum orc_why (*pending)(struct orc_emulator *);
	uint8_t data[ORC_IO_BYTES]; /* of that access: a write's bytes, or where a read's answer comes */
	uint32_t io_count;          /* how many elements it has */

	struct orc_sites sites;
	struct orc_meeting met;
	struct orc_debug debug;
	struct orc_lock lock;
	struct orc_attempt attempt;
	struct orc_replay replay;
};

/* ---- emulate_engine.c: an engine and its registers ------------------------------------------------------------ */

/* Saves the CPU's state where the orc_state_* find it: as it is now, also in a hook. */
void orc_emulator_look(struct orc_emulator *);
/* Changes what has no name in unicorn's interface: bytes at that place of a saved context. Takes `rollback` for it. */
void orc_emulator_patch(struct orc_emulator *, size_t at, const void *bytes, size_t size);
uint64_t orc_register(const struct orc_emulator *, int number);
void orc_set_register(const struct orc_emulator *, int number, uint64_t value);
uint64_t orc_msr(const struct orc_emulator *, uint32_t number);

static inline uint64_t orc_rip(const struct orc_emulator *e)
{
	return orc_register(e, e->u->n.UC_X86_REG_RIP);
}
static inline uint64_t orc_flags(const struct orc_emulator *e)
{
	return orc_register(e, e->u->n.UC_X86_REG_EFLAGS);
}
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
static inline uint64_t orc_state_base(const struct orc_emulator *e, int segment)
{
	/* In 64-bit code only FS and GS have one: Intel SDM vol. 1, 3.4.2.1. */
	return orc_state_bits(e) == 64 && segment < SEGMENT_FS ? 0 : orc_state_segments(e)[segment].base;
}
static inline uint64_t orc_masked(uint64_t value, int bits)
{
	return bits == 64 ? value : value & ((1ull << bits) - 1);
}

/* ---- emulate_memory.c ----------------------------------------------------------------------------------------- */

/* Gives the engine that memory. An error of unicorn's, or -1. */
int orc_memory_map(struct orc_emulator *, const struct kvm_userspace_memory_region *, size_t n);
void orc_memory_free(struct orc_emulator *);
/* What backs a physical address. NULL: nobody does. */
static inline struct orc_memory *orc_memory_at(const struct orc_emulator *e, uint64_t physical)
{
	for (size_t i = 0; i < e->memories; i++)
		if (physical - e->memory[i].start < e->memory[i].size)
			return &e->memory[i];
	return NULL;
}
/* Where a linear address is, for a read or a write. False: nowhere, and a page fault is left pending in unicorn: in a hook
 * only for what the instruction accesses anyway. So do the three below. */
bool orc_memory_translate(const struct orc_emulator *, uint64_t linear, bool write, uint64_t *physical);
/* Copies from a linear address as much as is there, up to `most` bytes. How much that was. */
size_t orc_memory_fetch(const struct orc_emulator *, uint64_t linear, void *bytes, size_t most);
/* All of it, or nothing and false: where a page is not there, or not memory, or may not be written. */
bool orc_memory_read(const struct orc_emulator *, uint64_t linear, void *bytes, size_t size);
bool orc_memory_write(struct orc_emulator *, uint64_t linear, const void *bytes, size_t size);
/* Whether code was fetched from that page, so that what is written there may be translated already. */
bool orc_memory_was_executed(const struct orc_memory *, uint64_t physical);
/* Has unicorn execute code of that page. False: it is no memory, or unicorn has none left. */
bool orc_memory_let_execute(struct orc_emulator *, uint64_t physical);
/* A page that may only be read is writable for one instruction, and then holds what it held `before`: a page's room. */
int orc_memory_unprotect(struct orc_emulator *, struct orc_memory *, uint64_t page, void *before);
void orc_memory_protect(struct orc_emulator *, struct orc_memory *, uint64_t page, const void *before);

/* ---- emulate_sites.c ------------------------------------------------------------------------------------------ */

/* Unicorn's hook: looks through a block that was just translated for what is to be hooked. */
void orc_on_translated(uc_engine *, uc_tb *block, uc_tb *before, void *e);
/* What `attention` asks for: translations that are out of date are thrown away. Not in a hook. */
void orc_sites_attend(struct orc_emulator *);
/* All translations are thrown away; with orc_sites_forget the hooks too, as each block is looked through again. */
void orc_sites_retranslate(struct orc_emulator *);
void orc_sites_forget(struct orc_emulator *);
void orc_sites_free(struct orc_emulator *);

/* ---- emulate_meet.c ------------------------------------------------------------------------------------------- */

/* Unicorn's hook at each site: decides before the instruction is executed. It may stop the guest there, with the reason in
 * `met`, `exception`, `failed` or `alone`. */
void orc_on_instruction(uc_engine *, uint64_t address, uint32_t size, void *e);
/* The guest is about to be entered: nothing was met yet, but an instruction that is executed alone. */
void orc_meet_begin(struct orc_emulator *);
/* The instruction met was executed by us: RIP goes behind it. */
void orc_meet_done(struct orc_emulator *);
/* The breakpoint there was told: the guest passes it the next time. */
void orc_meet_reported(struct orc_emulator *);

/* ---- emulate_locks.c ------------------------------------------------------------------------------------------ */

enum orc_lock_met {
	ORC_LOCK_GOES_ON,
	ORC_LOCK_WAITS, /* counted before it is done, and now the guest's turn, or a command, has to come first */
	ORC_LOCK_ALONE, /* unicorn can't execute it among others */
};
/* In orc_on_instruction, at every site: counts the armed lock if it is done there. True: and stopped, as ORC_LOCK_WAITS. */
bool orc_lock_arrive(struct orc_emulator *, uint64_t address);
/* In orc_on_instruction, behind that: what was met locks. If it takes the bus it is counted, unless it was, or armed. */
enum orc_lock_met orc_lock_meet(struct orc_emulator *, uint64_t address, bool counted);
/* Between instructions: counts the armed lock if execution came behind it. */
void orc_lock_settle(struct orc_emulator *);
/* Disarms, for the caller to count the lock: as an exit of its own, or on another, or not at all. RIP behind it; NOWHERE:
 * none is armed. */
uint64_t orc_lock_take(struct orc_emulator *);
void orc_lock_count(struct orc_emulator *, uint64_t rip);
/* LOCK NEG, if that was met, is done: its flags, from its result. */
void orc_lock_mend(struct orc_emulator *);

/* ---- emulate_ports.c ------------------------------------------------------------------------------------------ */

/* In orc_on_instruction: whether code of this privilege may touch those ports. False also if that can't be known: failed. */
bool orc_port_is_permitted(struct orc_emulator *, const struct orc_insn *);
/* Executes the port access that the guest stopped before, up to where it needs an answer. */
enum orc_why orc_port_io(struct orc_emulator *);

/* ---- emulate_attempt.c ---------------------------------------------------------------------------------------- */

/* Unicorn's hook: memory that nobody backs, or that may not be written. The instruction is given up, and `touch` says why.
 * Of a write outside of an attempt, `rollback` is the state then. */
bool orc_on_touch(uc_engine *, int type, uint64_t address, int size, int64_t value, void *e);
/* Executes the instruction at RIP by itself, with the answers there are; `rollback` is the state before. What came of it is
 * in `attempt`, `stepped` and `exception`. An error of unicorn's. */
int orc_attempt(struct orc_emulator *);
/* Attempts have a window where that touch was, until the end. False: no room for one more. */
bool orc_attempt_open(struct orc_emulator *, const struct orc_touch *);
void orc_attempt_end(struct orc_emulator *);
/* What the attempt wrote to that byte, of a window's page. False: nothing. */
bool orc_attempt_wrote(const struct orc_emulator *, uint64_t physical, uint8_t *value);
void orc_attempt_free(struct orc_emulator *);

/* ---- emulate_replay.c ----------------------------------------------------------------------------------------- */

/* The guest stopped at a touch: asks for what the instruction reads, one by one, and delivers what it writes. */
enum orc_why orc_replay_touched(struct orc_emulator *);

/* ---- emulate_exits.c ------------------------------------------------------------------------------------------ */

/* The vCPU's record, to fill in the details; and what accounts it, at RIP if it took the bus. */
struct orc_record *orc_exit_blank(struct orc_emulator *);
void orc_exit_account(struct orc_emulator *, unsigned reason);
void orc_exit_account_lock(struct orc_emulator *, unsigned reason, uint64_t rip);
/* Answers an access that was accounted, to or from `data`. ORC_COMMAND: all of it, and the guest need not stop. */
enum orc_why orc_exit_answer(struct orc_emulator *, enum orc_why bus, uint64_t address, uint32_t size, uint32_t count,
			     bool write);
/* Each accounts an exit, and gives back that it is one. */
enum orc_why orc_exit_halted(struct orc_emulator *);
enum orc_why orc_exit_stepped(struct orc_emulator *);
enum orc_why orc_exit_not_code(struct orc_emulator *);           /* an instruction can't be fetched */
enum orc_why orc_exit_exception(struct orc_emulator *, int vector); /* or the debugger's, or a shutdown */

/* ---- emulate.c ------------------------------------------------------------------------------------------------ */

/* Adds the hooks that are always there. An error of unicorn's. */
int orc_emulator_hook(struct orc_emulator *);
/* Executes one instruction; `stepped` says whether it was done. An error of unicorn's. */
int orc_emulator_step(struct orc_emulator *);
/* This guest can't go on, and why. */
enum orc_why orc_emulator_fail(struct orc_emulator *, const char *why);

/* In a hook: the guest stops before the instruction. */
static inline void orc_emulator_stop(struct orc_emulator *e)
{
	e->u->uc_emu_stop(e->uc);
}
static inline void orc_emulator_raise(struct orc_emulator *e, int vector)
{
	e->exception = vector;
	orc_emulator_stop(e);
}
/* Whether the guest is to stop at its next exit: for a command, or for its turn. */
static inline bool orc_emulator_must_stop(const struct orc_emulator *e)
{
	return atomic_load_explicit(&e->v->commands, memory_order_relaxed) || e->v->waiting;
}

#endif
