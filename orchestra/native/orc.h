/* The core's one header: what must not wait for the interpreter lock.
 *
 * Who calls what, from which thread:
 *   owner    the fleet's thread (trio): frees everything, drains the rings, sets limits and caps, commands vCPUs
 *   maker    a worker thread that sets a VM up: makes vCPUs, and frees those that never ran, if that fails
 *   runner   the one thread that runs a vCPU: accounts exits, waits, writes the vCPU's ring
 *   capper   the fleet's, while there are caps: commands and kicks the vCPUs that have one
 *   reader   a worker thread that reads dirty logs, or takes written pages
 * Where nothing is said, a function is the owner's.
 *
 * Locks: capper->lock, orc_dirty's two, bus->lock (among owners), stock->lock (owners, makers), fleet->gate.lock, those of
 * devices: console->reader_lock, then uart->lock, then console->lock, its input_lock or interrupts->lock (and virtio.h). Of the others none is held while
 * another is taken, but dirty->lock before its sums_lock; under capper->lock vCPUs are commanded and kicked, which takes none.
 * A runner takes none but devices' (and dirty->lock, when its ring of written pages is full, and at its end), so that nobody
 * waits until one has its CPU back: what runners write is written for readers that do not wait.
 *
 * Lifetimes. What a thread may touch outlives that thread's last look at it:
 *   runner   ends first; it was joined, or (where there is none) its task has ended. It then waits for no turn, pushes
 *            nothing and takes no ticket. From then on its vCPU is only the owner's and the capper's.
 *   what bind_*, set_dirty and profile_memory were given (kvm_run, descriptor, emulator, memory slots)
 *            orc_vcpu_unbind first: it takes the cap off, and waits for the capper if it is at this vCPU. Then they may be
 *            unmapped, closed and freed, on any thread.
 *   orc_vcpu orc_vcpu_free, after that and after all who might wake it (an answer that comes late) know that it is gone;
 *            its memory stays while a list of the fleet has it.
 *   bucket   after all vCPUs that it was given to.
 *   fleet    after all vCPUs; its capper is joined here.
 *   orc_dirty's VM: orc_dirty_close, which waits for a reading, before its descriptor is closed; its slots after orc_dirty.
 */
#ifndef ORC_H
#define ORC_H

#include <linux/capability.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/types.h>

/* Numbers that older kernel headers lack, each with its source: include/uapi/linux/kvm.h and
 * arch/x86/include/uapi/asm/kvm.h of Linux 7.0. */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#ifndef KVM_EXIT_NOTIFY
#define KVM_EXIT_NOTIFY 37
#endif
#ifndef KVM_RUN_X86_BUS_LOCK
#define KVM_RUN_X86_BUS_LOCK (1 << 1)
#endif
#ifndef KVM_RUN_X86_GUEST_MODE
#define KVM_RUN_X86_GUEST_MODE (1 << 2)
#endif
#ifndef KVM_CAP_X86_NOTIFY_VMEXIT
#define KVM_CAP_X86_NOTIFY_VMEXIT 219
#endif
#ifndef KVM_CAP_XSAVE2
#define KVM_CAP_XSAVE2 208
#define KVM_GET_XSAVE2 _IOR(KVMIO, 0xcf, struct kvm_xsave)
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_STATS_UNIT_BOOLEAN
#define KVM_STATS_UNIT_BOOLEAN (0x4 << 4)
#endif
#ifndef KVM_GET_SREGS2
#define KVM_CAP_SREGS2 200
struct kvm_sregs2 {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	__u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs[4];
};
#define KVM_SREGS2_FLAGS_PDPTRS_VALID 1
#define KVM_GET_SREGS2 _IOR(KVMIO, 0xcc, struct kvm_sregs2)
#define KVM_SET_SREGS2 _IOW(KVMIO, 0xcd, struct kvm_sregs2)
#endif
#ifndef KVM_VCPU_TSC_CTRL
#define KVM_VCPU_TSC_CTRL 0
#define KVM_VCPU_TSC_OFFSET 0
#endif
#ifndef KVM_CLOCK_REALTIME
#define KVM_CLOCK_REALTIME (1 << 2)
#define KVM_CLOCK_HOST_TSC (1 << 3)
#endif

/* struct kvm_clock_data with the members that it has had since Linux 5.16; before, they were padding. */
struct orc_kvm_clock {
	uint64_t clock;
	uint32_t flags, pad0;
	uint64_t realtime, host_tsc;
	uint32_t pad[4];
};
_Static_assert(sizeof(struct orc_kvm_clock) == sizeof(struct kvm_clock_data), "of the same size before and since");

typedef uint64_t orc_u64;
typedef int64_t orc_ns; /* nanoseconds on the fleet's clock: CLOCK_MONOTONIC, or trio's for the scripted backend */

enum {
	ORC_REASONS = 64, /* exit reasons counted one by one; the last counter takes every number from it up */
	ORC_LEVELS = 5,   /* host, fleet (if the host's is shared with other fleets), tenant, VM, vCPU */
	ORC_METERS = 3,
	ORC_BUS_LOCKS = 0,
	ORC_EXITS = 1,   /* accesses: a string instruction's exit is as many as it has elements */
	ORC_ANSWERS = 2, /* accesses that Python answers */
	ORC_CACHE_LINE = 64,
};

#define ORC_NEVER INT64_MIN /* "no wait": earlier than any time */
#define ORC_EVENT_BUS_LOCK 63 /* bit of the event mask: any exit that reports a bus lock */

/* What orc_kvm_run returns for: the runner must look at something. */
enum orc_why {
	ORC_EXIT = 0,     /* an exit that Python decides about; orc_vcpu_record has it */
	ORC_IO = 1,       /* port I/O that Python is to answer: orc_vcpu_access */
	ORC_MMIO = 2,     /* likewise, of memory that nobody backs */
	ORC_COMMAND = 3,  /* commands are pending */
	ORC_ERROR = 4,    /* KVM_RUN failed: orc_vcpu_errno */
	ORC_ANSWERED = 5, /* of an access: it needs Python no more. No run returns with it */
	ORC_ASKED = 6,    /* commands are pending while a task is asked: orc_ask_question */
};

/* ---- bucket.c ------------------------------------------------------------------------------------------------- */

/* A GCRA (ITU-T I.371) in token time. `tokens(t)` is how many tokens the bucket has made by time t; it grows with the
 * rate and is continuous over a change of rate. An event takes the ticket  max(last ticket, tokens(now)) + 1  and its
 * turn is when  tokens(t) >= ticket - (burst - 1).  Tickets are served in order and outlive a change of limit: whoever
 * waits asks again when its turn is.
 *
 * A limit that is taken off and set again: meanwhile nobody is charged or waits, and the bucket goes on at the old rate up
 * to the old burst. So what may go under limits, in any window, is one burst and what the rates in force made, the old one
 * where there was none, however often that happens. What is owed for those who went free is forgiven, in favour of those
 * who still wait, each of whom may go that much earlier; nobody who comes later goes before them. Only a bucket's first
 * limit starts with all of its burst.
 *
 * All of these take no lock, and processes may share a bucket (budget.h says what that takes).
 *
 * Events are charged when they are seen, and what waits is the vCPU that caused them, so with one vCPU the events
 * themselves keep to burst + rate * t; with several, each may have one event more in flight at the very start. */
typedef struct orc_bucket orc_bucket;
typedef struct orc_fleet orc_fleet;
typedef struct orc_vcpu orc_vcpu;

orc_bucket *orc_bucket_new(void);
void orc_bucket_free(orc_bucket *);
/* Sets the limit; rate <= 0: none. max_delay < 0: unbounded. 0; -EBUSY: others change it all the time, and it is as they
 * left it. Any thread. */
int orc_bucket_set(orc_bucket *, double rate, double burst, orc_ns max_delay, orc_ns now);
bool orc_bucket_limited(const orc_bucket *);
/* Tokens beside the limit's, that are used before those and never made again. What a bucket was given before counts: it gets what
 * is more than that, and keeps no more than these, so that setting it to and fro makes none. One thread at a time. */
void orc_bucket_set_once(orc_bucket *, double tokens);

struct orc_ticket {
	int64_t number;  /* in 1/65536 tokens */
	orc_ns charged;  /* when */
	int64_t waits;   /* what the bucket owes for it, if its turn had not come; 0 once it is left */
};
/* True if its turn has not come: it has to wait, and orc_bucket_leave is owed, before the limit it left by is forgotten. */
bool orc_bucket_charge(orc_bucket *, orc_ns now, struct orc_ticket *out);
/* The same for `n` events at once, which have one ticket: that of the last of them. */
bool orc_bucket_charge_many(orc_bucket *, orc_u64 n, orc_ns now, struct orc_ticket *out);
/* Whoever held the ticket has gone, or will never go. Nothing for one that did not have to wait. */
void orc_bucket_leave(orc_bucket *, struct orc_ticket *);
/* When the ticket's turn is: by the tokens, and at the latest by max_delay. ORC_NEVER if the bucket has no limit. */
void orc_bucket_turn(const orc_bucket *, const struct orc_ticket *, orc_ns *by_tokens, orc_ns *by_delay);
/* What it is limited to; rate 0: no limit, and the rest is the last one's. */
struct orc_limit {
	double rate, burst, debt; /* a second; tokens; tokens that were given beyond those made by `now`, the burst included */
	double once; /* what is left of orc_bucket_set_once */
	orc_ns max_delay;
};
void orc_bucket_limit(const orc_bucket *, orc_ns now, struct orc_limit *out);

/* ---- budget.c ------------------------------------------------------------------------------------------------- */

/* A host's buckets, one for each meter, in a file that processes share (budget.h). */
typedef struct orc_budget orc_budget;
int orc_budget_create(void); /* a descriptor, close-on-exec; or a negative errno */
/* Maps the file; `fd` is duplicated. NULL, with why in *problem: errno is 0 if the file is at fault (it is none of these, or of
 * another version, or may still shrink), else what the host lacks. */
orc_budget *orc_budget_attach(int fd, const char **problem);
void orc_budget_detach(orc_budget *); /* no fleet has it */
int orc_budget_fd(const orc_budget *);
orc_bucket *orc_budget_bucket(orc_budget *, int meter);
uint32_t orc_budget_changes(const orc_budget *); /* how many changes of limits were published; wraps */
/* A limit of it changed: wakes whoever waits, in all processes. */
void orc_budget_changed(orc_budget *);
/* Before the fleet has a vCPU: their waits end when a limit of the budget changes. It outlives the fleet. */
void orc_fleet_share(orc_fleet *, orc_budget *);

/* ---- ring.c --------------------------------------------------------------------------------------------------- */

/* One exit, as all backends tell it. Two cache lines. */
struct orc_record {
	orc_u64 time;
	orc_u64 rip;
	orc_u64 wait;
	orc_u64 arg[5];
	uint32_t id;     /* of the vCPU, given by the owner */
	uint16_t reason; /* KVM_EXIT_*; numbers past 65535 do not exist */
	uint16_t flags;  /* KVM_RUN_X86_* */
	uint8_t has_rip;
	uint8_t data_size;
	uint8_t data[32];
	uint8_t pad[2];
	uint32_t vm, vcpu; /* whose it is, as orc_vcpu_name has it */
	uint8_t padding[12];
};
_Static_assert(sizeof(struct orc_record) == 2 * ORC_CACHE_LINE, "a record is two cache lines");

orc_fleet *orc_fleet_new(void); /* NULL with errno: no eventfd left */
void orc_fleet_free(orc_fleet *);
int orc_fleet_eventfd(const orc_fleet *);
/* Before the consumer waits for the eventfd: true if it may, false if records came meanwhile. */
bool orc_fleet_sleep(orc_fleet *);
/* Takes up to `most` records of those that were there when it was called; costs O(vCPUs that have some). */
size_t orc_fleet_drain(orc_fleet *, struct orc_record *out, size_t most);
/* The same of one vCPU, whoever else has some. */
size_t orc_vcpu_drain(orc_vcpu *, struct orc_record *out, size_t most);
/* ---- channel.c: what a subscriber has yet to receive. The owner's, all of it. */

#define ORC_EVERY_VM UINT32_MAX
#define ORC_NO_VM (UINT32_MAX - 1)
typedef struct orc_channel orc_channel;
struct orc_channel {
	orc_u64 received, missed; /* came to it; of these, dropped as it was full */
	uint32_t waiting;         /* in it now */
	uint32_t vm;              /* whose exits: ORC_EVERY_VM, ORC_NO_VM or a number of orc_vcpu_name; may be changed */
	orc_u64 mask;             /* of which kinds: as orc_vcpu_subscribe */
	uint32_t capacity, first;
	bool drop_oldest; /* when it is full; else the newest */
	struct orc_record *records;
	orc_fleet *fleet;
	orc_channel *next;
};
/* Of a fleet, or of none: then nothing comes to it. */
orc_channel *orc_channel_new(orc_fleet *, orc_u64 mask, uint32_t vm, uint32_t capacity, bool drop_oldest); /* NULL with errno */
void orc_channel_end(orc_channel *);  /* nothing comes to it any more; what is in it can be taken. May be called again */
void orc_channel_free(orc_channel *); /* after orc_channel_end; the fleet may be gone */
/* Takes up to `most` records out of the rings (of one vCPU, if it is not NULL) to all channels that want them: how many were
 * taken. `scratch` has room for as many. */
size_t orc_fleet_deliver(orc_fleet *, orc_vcpu *, struct orc_record *scratch, size_t most);
size_t orc_channel_take(orc_channel *, struct orc_record *out, size_t most); /* the oldest */
void orc_channel_drop(orc_channel *); /* what waits counts as missed */

/* One field of many records as an array. Where the kind has no such field: the argument in its place, 0 for the others. */
enum orc_column {
	ORC_COLUMN_TIME, ORC_COLUMN_RIP, ORC_COLUMN_HAS_RIP, ORC_COLUMN_WAIT, ORC_COLUMN_VM, ORC_COLUMN_VCPU,
	ORC_COLUMN_KIND, ORC_COLUMN_BUS_LOCK, ORC_COLUMN_GUEST_MODE, ORC_COLUMN_SMM, ORC_COLUMN_ADDRESS, ORC_COLUMN_SIZE,
	ORC_COLUMN_WRITE, ORC_COLUMN_ARGUMENTS, ORC_COLUMN_DATA_SIZE, ORC_COLUMN_DATA,
};
void orc_records_column(const struct orc_record *, size_t n, enum orc_column, void *out);
size_t orc_records_vms(const struct orc_record *, size_t n, uint32_t *out /* room for n */); /* each once */

/* ---- ring.c: who did something */

/* Begins a look at who did something, once the last one's are taken: vCPUs that accounted an exit since. */
void orc_fleet_look(orc_fleet *);
/* Takes up to `most` of their ids; 0: there are no more. */
size_t orc_fleet_active(orc_fleet *, uint32_t *out, size_t most);
/* A limit changed: whoever waits for a turn asks again. Costs O(vCPUs that wait, or have since the last time). */
void orc_fleet_limits_changed(orc_fleet *);
/* Somebody waits for a vCPU to come out; or does not any more. An emulated guest sees a command at its next block, once it
 * has a core: with more busy guests than cores that takes the scheduler 4 ms for each guest before it. So those that
 * execute give their cores up meanwhile, for 200 ms at most. Nothing for NULL: the fleet is gone. */
void orc_fleet_urgent(orc_fleet *, bool begins);

/* ---- vcpu.c --------------------------------------------------------------------------------------------------- */

orc_vcpu *orc_vcpu_new(orc_fleet *, uint32_t id, uint32_t ring_records /* a power of two */);
/* The runner has ended. Nobody touches any more what it was bound to, or looks at its memory through it: that may go. On any
 * thread, if the owner leaves the vCPU alone meanwhile. May be called again. */
void orc_vcpu_unbind(orc_vcpu *);
/* Owner; the runner has ended. Its memory goes once no list of the fleet has it, so that it costs the same whatever the
 * others do. Unbinds it. */
void orc_vcpu_free(orc_vcpu *);
/* Before the runner starts: one of its buckets, or all, by meter and then by level. */
void orc_vcpu_set_bucket(orc_vcpu *, int meter, int level, orc_bucket *);
void orc_vcpu_set_buckets(orc_vcpu *, orc_bucket *const buckets[ORC_METERS * ORC_LEVELS]);
void orc_vcpu_name(orc_vcpu *, uint32_t vm, uint32_t vcpu); /* before the runner starts: what its records say whose they are */
/* Which reasons go to the ring, a bit each. 0, or a negative errno: no memory for the ring. */
int orc_vcpu_subscribe(orc_vcpu *, orc_u64 mask);
void orc_vcpu_hold(orc_vcpu *);          /* sets ORC_HOLD, before there is a runner to kick */

/* Runner, before orc_vcpu_account: the exit stands for so many accesses, the elements of a string instruction. Without this
 * an exit is one. */
void orc_vcpu_weigh(orc_vcpu *, uint32_t accesses);
/* Runner: counts one exit, charges the buckets, writes a record if it has subscribers. Returns when the vCPU may go on
 * (ORC_NEVER: at once). Counts a bus lock by the flag and by nothing else. */
orc_ns orc_vcpu_account(orc_vcpu *, struct orc_record *, orc_ns now);
/* Runner, after orc_vcpu_account: Python has answered so many accesses of this exit. Counts and charges them; they are paid
 * for before the guest goes on, or Python is asked for more of them. Several times for one exit: each adds to it. */
void orc_vcpu_answered(orc_vcpu *, uint32_t accesses, orc_ns now);
/* Runner: when the exit accounted last may go on, by the limits in force now. */
orc_ns orc_vcpu_turn(const orc_vcpu *);
/* Runner, for backends that wait by themselves: the wait begins; it ends (served: the turn came, by tokens or delay). */
void orc_vcpu_wait_begin(orc_vcpu *, orc_ns now);
void orc_vcpu_wait_end(orc_vcpu *, orc_ns now, bool served);

/* Commands: bits that the owner sets and clears, and the runner sees. */
enum { ORC_STOP = 1, ORC_PAUSE = 2, ORC_CALL = 4, ORC_HOLD = 8, ORC_CAP = 16 };
void orc_vcpu_command(orc_vcpu *, uint32_t set, uint32_t clear);
uint32_t orc_vcpu_commands(const orc_vcpu *);
/* Ends KVM_RUN and every wait: immediate_exit, then the signal, then the futex. Any thread. */
void orc_vcpu_kick(orc_vcpu *);
/* The runner sleeps until orc_vcpu_wake or a kick, if none came since it read `seen`. */
uint32_t orc_vcpu_wakes(const orc_vcpu *);
void orc_vcpu_sleep(orc_vcpu *, uint32_t seen);
void orc_vcpu_wake(orc_vcpu *);
/* The runner's thread takes the vCPU up, and waits until ORC_HOLD is cleared or ORC_STOP set; and puts it down. */
void orc_vcpu_attach(orc_vcpu *);
void orc_vcpu_detach(orc_vcpu *);

/* A thread that takes the vCPU up, which is held (orc_vcpu_hold), runs it until that needs Python for the first time, and hands over to `proceed`: what is
 * left is done there, orc_vcpu_detach included. 0 or a negative errno. Any thread. */
typedef struct orc_runner orc_runner;
typedef enum orc_why orc_runner_run(orc_vcpu *);
typedef void orc_runner_proceed(void *context, int why);
int orc_runner_start(orc_vcpu *, const char *name, orc_runner_run *, orc_runner_proceed *, void *context, orc_runner **out);
int orc_runner_tid(const orc_runner *); /* the kernel's number of the thread */
void orc_runner_join(orc_runner *); /* waits until the thread is gone, and frees all of it; before the vCPU is */

/* ---- priority.c: an event loop's thread beside guests -------------------------------------------------------- */

orc_ns orc_slice(int thread); /* of any thread, 0: the calling one. 0: this kernel has none, or not for the thread's policy */
/* The calling thread is to run before guests: with a short slice and with a nice value, each where it has the default and is allowed.
 * Returns which of them it has now because of this call. */
enum { ORC_LOOP_NICE = -3 };
enum orc_preferred { ORC_PREFERRED_SLICE = 1, ORC_PREFERRED_NICE = 2, ORC_PREFERRED = 3 };
unsigned orc_prefer(void);
/* The defaults again, of those that it has. A thread may inherit its parent's: each that is for long work begins with this. */
void orc_prefer_no_more(unsigned);

struct orc_counters {
	orc_u64 exits[ORC_REASONS];
	orc_u64 bus_locks;
	orc_u64 capped;    /* ns that a CPU cap held it */
	orc_u64 throttled; /* ns, a wait in progress included up to `now` */
	orc_u64 held[ORC_METERS * ORC_LEVELS]; /* of these, by the bucket whose turn was the last: by meter, then by level */
	orc_u64 waits;
	orc_u64 released;
	orc_u64 missed;
	orc_u64 kicks;      /* times a kick or signal interrupted KVM_RUN */
	orc_u64 unclaimed;  /* accesses that found nobody, or of which a part did */
	orc_u64 answers;    /* accesses that Python answered, by element */
	orc_ns throttled_since; /* since when it waits for the same bucket; 0: not waiting now */
};
void orc_vcpu_counters(const orc_vcpu *, struct orc_counters *out, orc_ns now);
/* What a policy tick needs, without the copy of every counter: sums, and of which exit reasons there were more than in
 * `seen`, which is brought up to date. Returns how many reasons; `more` has room for all. */
struct orc_sums {
	orc_u64 bus_locks, throttled, answers, held[ORC_METERS * ORC_LEVELS];
};
struct orc_more {
	uint32_t reason;
	orc_u64 exits;
};
int orc_vcpu_look(const orc_vcpu *, struct orc_sums *out, orc_u64 seen[ORC_REASONS], struct orc_more *more, orc_ns now);

orc_ns orc_now(void); /* CLOCK_MONOTONIC */

/* ---- profile.c, profile_unicorn.c ----------------------------------------------------------------------------- */

enum { ORC_SITES = 64, ORC_CODE_BEFORE = 32, ORC_CODE_AFTER = 16 };

/* Where a sampled bus lock was reported, and how many were there. More code before than the 15 bytes of the longest
 * instruction: a disassembler that starts in the middle of one is in step after a few. */
struct orc_site {
	orc_u64 rip;     /* linear: with the base of CS */
	orc_u64 space;   /* the address of the top page table, 0 without paging */
	orc_u64 samples; /* sampled */
	orc_u64 weight;  /* locks that these stand for */
	orc_u64 error;   /* of these, how many may have been another's */
	uint8_t mode, cpl; /* 16, 32 or 64; 0: this backend knows no more than RIP */
	uint8_t rode;    /* the lock rode on another exit: RIP may be on it or behind it */
	uint8_t nested;  /* of a guest's guest, whose registers these are */
	uint8_t before, size; /* bytes of code, and how many of them are before RIP */
	uint8_t code[ORC_CODE_BEFORE + ORC_CODE_AFTER];
};
/* Samples every `every`th bus lock on average, the first one always; 0: none. Owner, at any time. */
void orc_vcpu_sample(orc_vcpu *, uint32_t every);
/* Takes what was sampled since the last call: how many sites, at most ORC_SITES; the locks that can't be placed; and how
 * many sites made way for others. Owner, at any time: what the runner is at in this moment comes the next time. */
size_t orc_vcpu_profile(orc_vcpu *, struct orc_site *out, orc_u64 *lost, orc_u64 *replaced);
/* Memory to read code from: stays the caller's, as long as the vCPU. KVM only; before the runner starts. */
void orc_vcpu_profile_memory(orc_vcpu *, const struct kvm_userspace_memory_region *, size_t slots);

/* ---- cap.c ---------------------------------------------------------------------------------------------------- */

/* Owner: the vCPU's thread may use this part of a CPU; 1 or more: all of it. 0 or a negative errno (no thread, no memory). */
int orc_vcpu_cap(orc_vcpu *, double share);

/* ---- signal.c ------------------------------------------------------------------------------------------------- */

/* Installs the one signal handler (an empty function), and sends the caller one. 0; -EBUSY if the program uses that signal
 * otherwise; another negative errno: it can't be sent. */
int orc_signal_install(void);
int orc_signal_number(void);

/* ---- spawn.c ---------------------------------------------------------------------------------------------------- */

/* Begins a program, in a session of its own, which gets `signal` when the calling thread ends, in whatever way. Its output and
 * errors go to `output`, its input is empty, and it has these `n` descriptors of ours, under their numbers, and no others. Its
 * number, and a descriptor of it (pidfd_open(2), CLOEXEC), which the caller closes once it has waited for its end; or a
 * negative errno. */
int orc_spawn(const char *path, char *const *argv, const int *keep, size_t n, int output, int signal, int *pidfd);

/* ---- access.c ------------------------------------------------------------------------------------------------- */

/* What Python is to answer: `count` accesses of `size` bytes (1, 2, 4 or 8) at `address`, one after the other, whose bytes
 * lie in a row at `data`. Whoever answers fewer says so in `count`: the others are looked up once more. */
struct orc_access {
	orc_u64 address, offset; /* the latter from the claim's start */
	orc_u64 claim;           /* its version */
	orc_u64 value;           /* of one element: what is at `data`. Of a read it may be set instead of that */
	uint32_t size, count, write;
	uint32_t task; /* a task is to answer, and there is one element: orc_ask */
	uint8_t *data;
};
/* Elements of a string instruction that Python answers before it gives up the interpreter lock and sees commands: a device
 * that takes a microsecond for each holds it for no longer than a fleet's thread can wait for it. */
enum { ORC_CHUNK = 64 };

/* A device in C. `answer`: all of these accesses, or false and nothing of them: Python is to. Any thread; `by` is the vCPU,
 * or NULL. Its own lock, if it needs one, is locked last: nothing of this header is called within but what is said to be. */
typedef struct orc_device orc_device;
struct orc_device {
	bool (*answer)(orc_device *, orc_vcpu *by, const struct orc_access *);
	void (*free)(orc_device *);
};
bool orc_device_answer(orc_device *, orc_u64 offset, uint32_t size, uint32_t count, bool write, void *data);
void orc_device_free(orc_device *); /* no bus has it */

/* ---- bus.c ---------------------------------------------------------------------------------------------------- */

/* Who answers at these addresses. A claim that moves gets another version. */
struct orc_claim {
	orc_u64 start, last; /* first and last address */
	orc_u64 version;     /* not 0, and no two claims have the same */
	orc_device *device;  /* NULL: Python answers */
	bool task;           /* Python's answer comes from a task, which the vCPU waits for without the interpreter */
};
typedef struct orc_bus orc_bus;
orc_bus *orc_bus_new(void);
void orc_bus_free(orc_bus *); /* no vCPU is on it */
/* These are the claims from now on, in the order of their addresses. Runners see the old ones or the new ones. When it
 * returns, no device that is not among them is called any more. 0, -EINVAL (overlap, order) or -ENOMEM: nothing changed.
 * Owner; not from a device. */
int orc_bus_replace(orc_bus *, const struct orc_claim *, size_t n);
orc_u64 orc_bus_find(orc_bus *, orc_u64 address); /* the version of the claim there; 0: nobody's */
size_t orc_bus_tables(orc_bus *); /* how many it keeps: one, and those that a runner reads at this moment */
/* Before the runner starts. The buses outlive the vCPU; on none, nobody answers. */
void orc_vcpu_set_buses(orc_vcpu *, orc_bus *ports, orc_bus *mmio);

/* ---- access.c, with buses --------------------------------------------------------------------------------------- */

/* Runner. An access is taken to pieces: a claim has all of it if it has all of its addresses and its size is a device's;
 * else each has the naturally aligned pieces on its addresses, as hardware would transfer them, and where nobody is it
 * reads as ones. What needs no Python is answered at once.
 *
 * The guest made one, on the bus ORC_IO or ORC_MMIO. ORC_ANSWERED, or that: Python is to answer orc_vcpu_access. */
enum orc_why orc_access_begin(orc_vcpu *, enum orc_why bus, orc_u64 address, uint32_t size, uint32_t count, bool write,
			      void *data);
struct orc_access *orc_vcpu_access(orc_vcpu *);
/* Python answered `count` of these, or nothing (0): whether there is more for it to answer. */
bool orc_access_next(orc_vcpu *);
/* The one place where an access goes up to Python: orc_vcpu_access, `count` elements. */
enum orc_why orc_access_up(orc_vcpu *);
void orc_access_abandon(orc_vcpu *); /* nobody answers what is left of it: ones */

/* ---- ask.c ---------------------------------------------------------------------------------------------------- */

/* What becomes of a question. */
enum orc_asked {
	ORC_ASK_NONE = 0,
	ORC_ASK_OPEN = 1,
	ORC_ASK_ANSWERED = 2,
	ORC_ASK_AGAIN = 3,  /* who claimed the address is gone: the core looks who is there now */
	ORC_ASK_NOBODY = 4, /* who claimed it is there and answers no more: ones */
};
struct orc_question {
	orc_u64 claim, address; /* the former its version */
	orc_ns since;
	uint32_t vcpu, number, bus, size, write; /* id of the vCPU; the question's number; ORC_IO or ORC_MMIO */
	uint8_t data[8];                         /* what is written */
};
/* Runner: has a task asked for v->access, and rings for the owner. Engines that block do this within their run. */
void orc_ask(orc_vcpu *, orc_ns now);
void orc_ask_question(const orc_vcpu *, struct orc_question *out); /* the last one */
bool orc_ask_open(const orc_vcpu *);
/* Runner: takes what came of it, or withdraws it if it is open: v->access and its `count` say what was answered. */
void orc_ask_settled(orc_vcpu *);
/* Owner: takes up to `most` questions that are open. */
size_t orc_fleet_asked(orc_fleet *, struct orc_question *out, size_t most);
/* Which of the owner's tasks is woken by a question. Each has an eventfd of its own, so that the one that always waits stays
 * registered with the event loop while another takes its place: giving the place back is a store. */
enum orc_sleeper { ORC_AWAKE, ORC_MAIN, ORC_DEPUTY };
int orc_fleet_asked_eventfd(const orc_fleet *, enum orc_sleeper);
bool orc_fleet_asked_sleep(orc_fleet *); /* the main task; as orc_fleet_sleep */
/* The deputy is woken from now on, and not the main task, which waits, nor by what it was rung for just now: that is the
 * deputy's. False: there are questions, so the deputy is not to sleep. */
bool orc_fleet_asked_stand_in(orc_fleet *);
/* From now on the main task is woken, which waits already; at once, if there is a question or `more` to do. */
void orc_fleet_asked_give_back(orc_fleet *, bool more);
void orc_fleet_asked_ring(orc_fleet *); /* there is something else to do: wakes the task that sleeps, if one does */
/* Owner: settles a question, if it is open still, and wakes the runner. */
bool orc_vcpu_settle(orc_vcpu *, uint32_t number, enum orc_asked, const void *answer, size_t size);

/* ---- console.c, ports.c, interrupts.c, uart.c: devices --------------------------------------------------------- */

/* A VM's output: the last of it, and how much there was. Any thread. */
enum { ORC_CONSOLE_KEPT = 64 * 1024 };
typedef struct orc_console orc_console;
orc_console *orc_console_new(void); /* NULL: no memory */
orc_console *orc_console_hold(orc_console *); /* a device: it outlives its owner's orc_console_free until the device calls that, too */
void orc_console_free(orc_console *);
bool orc_console_put(orc_console *, const uint8_t *, size_t); /* whether the task that waits for output is to be notified */
/* A new console as one that has had `total` bytes, of which these are the last that it kept, and where these wait for the guest.
 * False: it can't have, or there is no memory. */
bool orc_console_load(orc_console *, orc_u64 total, const uint8_t *kept, size_t size, const uint8_t *typed, size_t waiting);
orc_u64 orc_console_total(orc_console *);
/* Output from *position on, or the oldest that is kept, as much as there is room for; *position goes on with it. */
size_t orc_console_copy(orc_console *, orc_u64 *position, uint8_t *out, size_t room);
/* Wait for output beyond `position`: the next `put` will say so, once. False: there is some. */
bool orc_console_want(orc_console *, orc_u64 position);

/* Input for the guest, which one device takes. Any thread. */
enum { ORC_CONSOLE_TYPED = 4096, ORC_CONSOLE_WAITING = ORC_CONSOLE_TYPED + 16 /* with what a device gave back: ORC_UART_FIFO */ };
struct orc_console_reader {
	void (*typed)(void *device); /* there is input; it has orc_console_read called, with the device locked, and does not wait for that */
	void *device;
	void (*room)(void *device); /* of a port: there is room for output again. NULL of others */
};
void orc_console_attach(orc_console *, struct orc_console_reader);
void orc_console_detach(orc_console *, void *device); /* unless another has taken its place; it is called no more */
/* How much was taken; the next room is announced, once. -ENOMEM: there is no memory for input, and none will come by waiting. */
ssize_t orc_console_type(orc_console *, const uint8_t *, size_t);
bool orc_console_listened(orc_console *); /* there is such a device */
size_t orc_console_typed(orc_console *); /* how much waits */
size_t orc_console_copy_typed(orc_console *, uint8_t *out, size_t room); /* and what: the oldest of it */
/* The device, with its lock held: back in front of all that waits, at most ORC_UART_FIFO bytes of what orc_console_read gave. Without
 * memory they are lost. */
void orc_console_unread(orc_console *, const uint8_t *, size_t);
/* The device, with its lock held: takes input. by: whose thread this is; a writer that waits for room is told through it. */
size_t orc_console_read(orc_console *, orc_vcpu *by, uint8_t *out, size_t size);

/* As a port it is a stream of bytes between a program in the guest, which opens and closes it, and one reader here: output waits
 * until it is taken, ORC_CONSOLE_KEPT bytes at most; the device waits with what comes then. Any thread. */
/* The device: how much there was room for; the next room is announced, once. As orc_console_say. */
size_t orc_port_say(orc_console *, orc_vcpu *by, const uint8_t *, size_t);
/* The device: the guest has it open from now on, or not; then input that waits is forgotten. The reader who waits is told. */
void orc_port_set_open(orc_console *, orc_vcpu *by, bool open);
uint32_t orc_port_opening(orc_console *); /* which time it is that the guest has it open, from 1 on; 0: it has not */
size_t orc_port_take(orc_console *, uint8_t *out, size_t room); /* the oldest output; it makes room */
/* Wait until orc_port_opening says something else, or with `output` until there is some: somebody will be told, once. False: that is
 * so already. */
bool orc_port_want(orc_console *, uint32_t opening, bool output);

/* Owner: takes up to `most` ids of vCPUs on whose console there is output that somebody waits for, or room for input. */
size_t orc_fleet_talking(orc_fleet *, uint32_t *out, size_t most);

orc_device *orc_debug_console_new(orc_console *, uint8_t detected /* what a read gives */);
orc_device *orc_exit_port_new(void); /* reads as 0; a write is Python's */

/* The lines of a VM's irqchip, which outlive the VM. Any thread. */
typedef struct orc_interrupts orc_interrupts;
orc_interrupts *orc_interrupts_new(int vm);
void orc_interrupts_free(orc_interrupts *);
int orc_interrupts_set(orc_interrupts *, uint32_t gsi, bool level); /* 0, also when closed, or a negative errno */
/* Where message-signalled interrupts go, by their GSI. These and no others from now on, in one step; with `lines` those of
 * the I/O APIC and the PICs as well, as they are by default. 0, also when closed, or a negative errno: all is as it was. */
struct orc_route {
	orc_u64 address;
	uint32_t data, gsi;
};
int orc_interrupts_route(orc_interrupts *, bool lines, const struct orc_route *, size_t n);
void orc_interrupts_close(orc_interrupts *); /* before the VM's descriptor is: waits for whoever sets one */

/* A 16550A. `output` takes what it transmits, `interrupt` the level of its line; both are called with its lock held, on the
 * thread that accesses it. */
typedef struct orc_uart orc_uart;
typedef void (*orc_uart_output)(void *to, orc_vcpu *by, const uint8_t *, size_t);
typedef size_t (*orc_uart_input)(void *to, orc_vcpu *by, uint8_t *, size_t); /* what there is, up to that much */
typedef void (*orc_uart_unread)(void *to, const uint8_t *, size_t); /* the last of what came by it, back */
typedef void (*orc_uart_interrupt)(void *line, bool level);
orc_uart *orc_uart_new(orc_uart_output, void *to, orc_uart_interrupt, void *line);
orc_uart *orc_serial_new(orc_console *, orc_interrupts *, uint32_t gsi); /* on these; interrupts NULL: not wired */
void orc_serial_listen(orc_uart *); /* one of orc_serial_new: it takes the console's input from now on */
/* Its VM is paused: input waits at the console, and neither registers nor the line change by it. Any thread; waits for no lock. */
void orc_serial_hold(orc_uart *, bool on);
/* Owner, once no vCPU has it: it takes no more input. */
void orc_serial_stop(orc_uart *);
orc_device *orc_uart_device(orc_uart *);
/* Bytes from the other side: how many fitted. Any thread. */
size_t orc_uart_receive(orc_uart *, const uint8_t *, size_t);
/* All that it keeps, but who it is wired to. `received`: the oldest byte first. */
enum { ORC_UART_FIFO = 16 };
struct orc_uart_state {
	uint8_t received[ORC_UART_FIFO], waiting;
	uint8_t ier, lcr, mcr, scratch, fcr, line_errors, modem_changes;
	uint16_t divisor;
	bool thre_pending, level;
};
void orc_uart_save(orc_uart *, struct orc_uart_state *);
/* As one that was saved. The line is set to its level, whatever it was. False: no UART can be in that state, and this one is
 * as it was. Any thread. */
bool orc_uart_load(orc_uart *, const struct orc_uart_state *);
void orc_uart_reset(orc_uart *); /* as it was made */

/* ---- kvm.c ---------------------------------------------------------------------------------------------------- */

void orc_vcpu_bind_kvm(orc_vcpu *, int fd, struct kvm_run *, bool sync_regs);
/* Runner: enters the guest again and again until something needs Python. Waits for its turn first. */
enum orc_why orc_kvm_run(orc_vcpu *);
struct orc_record *orc_vcpu_record(orc_vcpu *);
int orc_vcpu_errno(const orc_vcpu *);

/* ioctl with the error as a negative number; what may return EINTR is tried again. */
long orc_ioctl(int fd, unsigned long request, void *argument);
long orc_ioctl_value(int fd, unsigned long request, unsigned long argument);

/* ---- dirty.c -------------------------------------------------------------------------------------------------- */

/* The dirty log of a VM and its one owner: a reading takes what it tells out of the kernel's log, and gives it to all
 * readers. Any thread, all of them; those that ask the kernel wait for each other. */
typedef struct orc_dirty orc_dirty;
struct orc_dirty_sums {
	orc_u64 pages; /* that readings found, so far: a page counts once in each */
	orc_ns read;   /* when the last reading began; 0: there was none */
	bool on;       /* pages of some of the memory are counted */
};
/* Of a VM with these slots, which stay the caller's and as long as this; only their flags are changed. Those that are logged
 * already are counted. NULL: no memory. */
orc_dirty *orc_dirty_new(int vm, struct kvm_userspace_memory_region *slot, size_t slots);
/* Before any vCPU runs, of a VM whose KVM_CAP_DIRTY_LOG_RING was enabled with so many entries, a power of two. 0 or a
 * negative errno, when only orc_dirty_free is left. */
int orc_dirty_rings(orc_dirty *, uint32_t entries, const int *vcpu, uint32_t vcpus);
void orc_dirty_free(orc_dirty *); /* nobody uses it any more; readers that are still open go with it */
/* Before the VM's descriptor is closed: waits for a reading in progress, and from then on there is nothing to read. */
void orc_dirty_close(orc_dirty *);

/* Counts what is written into every slot that the guest may write, or into none; also while it runs. What was in the log is
 * read first. 0 or a negative errno: all is as it was. */
int orc_dirty_log(orc_dirty *, bool on);
/* Counts what was written into the slots of these that are counted. 0, or the negative errno of one that can't be read. */
int orc_dirty_read(orc_dirty *const logs[], size_t n);
void orc_dirty_sums(orc_dirty *, struct orc_dirty_sums *out); /* waits for nobody */
orc_u64 orc_dirty_ones(const uint64_t *bitmap, size_t words);

/* One who is told which pages are written from now on, in all that the guest may write, whoever else reads. It has them
 * logged as long as it is open. 0 or a negative errno (-EBADF: the VM is closed). */
typedef struct orc_dirty_reader orc_dirty_reader;
int orc_dirty_open(orc_dirty *, orc_dirty_reader **out);
/* Words that a bitmap of all slots has: each slot's in a row, as many as its pages need. */
size_t orc_dirty_words(const orc_dirty *);
/* What was written since it was opened or took last. 0, or a negative errno: some of it comes with the next. */
int orc_dirty_take(orc_dirty_reader *, uint64_t *bitmap);
int orc_dirty_shut(orc_dirty_reader *); /* frees it. 0, or a negative errno: pages are logged for nobody */

/* The host wrote guest memory, which no log of the kernel's sees: readers are told, and nothing is counted. After the write. */
void orc_dirty_mark(orc_dirty *, orc_u64 address, orc_u64 size);
/* That ring is full: makes room in all. 0 or a negative errno. */
int orc_dirty_drain(orc_dirty *, uint32_t ring);
/* Before the runner starts: whose log it drains when its ring, of that number, is full. It must outlive the binding. */
void orc_vcpu_set_dirty(orc_vcpu *, orc_dirty *, uint32_t ring);

/* ---- build.c -------------------------------------------------------------------------------------------------- */

/* Where a vCPU starts. What it points to stays the caller's. */
struct orc_entry {
	struct kvm_regs registers;
	const struct kvm_sregs *special; /* but apic_base and interrupt_bitmap, which are the kernel's */
	struct kvm_msrs *msrs;           /* NULL: none */
	uint16_t bits;                   /* of its code: 16, 32 or 64 */
	bool waits;                      /* for INIT and SIPI: registers do not count. Not the first; needs an irqchip */
};
enum orc_irqchip {
	ORC_NO_IRQCHIP,
	ORC_FULL_IRQCHIP,  /* PICs, I/O APIC, local APICs */
	ORC_SPLIT_IRQCHIP, /* local APICs alone: MSIs and no lines */
};
struct orc_plan {
	/* in */
	int kvm;
	bool bus_locks;
	enum orc_irqchip irqchip;
	bool pit;            /* an i8254 as well; the full irqchip only */
	uint32_t dirty_ring; /* entries of each vCPU's ring of written pages; 0: the kernel keeps bitmaps */
	orc_u64 identity_map, tss, run_size;
	uint32_t slots, vcpus;
	struct kvm_userspace_memory_region *slot;
	struct orc_entry *entry;
	struct kvm_cpuid2 *cpuid; /* changed: the APIC id, and the TSC's rate where a leaf has it */
	/* out, as far as it got: the caller owns what is there, also after an error */
	int vm;
	int *vcpu;
	struct kvm_run **run;
	uint32_t vcpus_made;
	const char *step; /* the call that failed */
	uint32_t msr;     /* that was refused, if this was "KVM_SET_MSRS of MSR" */
	/* the builder's */
	int result; /* out: as of orc_kvm_build */
	int done;
	struct orc_plan *next;
};
/* Makes a VM with its vCPUs. 0 or a negative errno. */
int orc_kvm_build(struct orc_plan *);
/* The same in that empty VM, which is the plan's from here on; -1: makes one. */
int orc_kvm_build_in(struct orc_plan *, int vm);
void orc_cpuid_set_apic_id(struct kvm_cpuid2 *, uint32_t id);

/* ---- builder.c: a fleet's threads that make VMs. Owner. -------------------------------------------------------- */

typedef struct orc_builder orc_builder;
orc_builder *orc_builder_new(void); /* without a thread so far. NULL: no memory */
/* Has a plan made. The plan is the builder's, until the eventfd `done` is written. -EAGAIN: the host has no thread left. */
int orc_builder_begin(orc_builder *, struct orc_plan *, int done);
void orc_builder_free(orc_builder *); /* makes what waits, and ends its threads */

/* ---- unicorn.c, emulate*.c ------------------------------------------------------------------------------------ */

/* Unicorn's own numbers, by its own names: whoever loads the library reads them from the package it came with. */
struct orc_unicorn_numbers {
	int UC_ARCH_X86, UC_MODE_16, UC_MODE_64, UC_PROT_READ, UC_PROT_WRITE, UC_PROT_EXEC;
	int UC_MEM_WRITE, UC_MEM_WRITE_PROT, UC_MEM_READ_UNMAPPED;
	int UC_HOOK_BLOCK, UC_HOOK_CODE, UC_HOOK_INTR, UC_HOOK_EDGE_GENERATED;
	int UC_HOOK_MEM_READ_UNMAPPED, UC_HOOK_MEM_WRITE_UNMAPPED, UC_HOOK_MEM_FETCH_UNMAPPED, UC_HOOK_MEM_WRITE_PROT,
		UC_HOOK_MEM_FETCH_PROT, UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE;
	int UC_ERR_OK, UC_ERR_READ_UNMAPPED, UC_ERR_WRITE_UNMAPPED, UC_ERR_FETCH_UNMAPPED, UC_ERR_WRITE_PROT,
		UC_ERR_FETCH_PROT, UC_ERR_INSN_INVALID;
	int UC_CTL_IO_WRITE, UC_CTL_UC_USE_EXITS, UC_CTL_TB_REMOVE_CACHE, UC_CTL_TB_FLUSH, UC_CTL_TCG_BUFFER_SIZE;
	int UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP, UC_X86_REG_RBP,
		UC_X86_REG_RSI, UC_X86_REG_RDI, UC_X86_REG_R8, UC_X86_REG_R9, UC_X86_REG_R10, UC_X86_REG_R11,
		UC_X86_REG_R12, UC_X86_REG_R13, UC_X86_REG_R14, UC_X86_REG_R15, UC_X86_REG_RIP, UC_X86_REG_EFLAGS;
	int UC_X86_REG_CR0, UC_X86_REG_CR2, UC_X86_REG_CR3, UC_X86_REG_CR4, UC_X86_REG_CR8, UC_X86_REG_DR0, UC_X86_REG_DR6,
		UC_X86_REG_DR7, UC_X86_REG_FS_BASE, UC_X86_REG_GS_BASE, UC_X86_REG_GDTR, UC_X86_REG_IDTR, UC_X86_REG_LDTR,
		UC_X86_REG_TR, UC_X86_REG_MSR, UC_X86_REG_FPCW, UC_X86_REG_MXCSR;
};
typedef struct orc_unicorn orc_unicorn;
typedef struct orc_emulator orc_emulator;

/* Loads libunicorn. `enter`: a 16-bit program for address 0x1000 that goes to 32-bit mode, halts, goes to 64-bit mode and
 * halts. NULL, with what is wrong in `problem`. */
orc_unicorn *orc_unicorn_load(const char *path, const struct orc_unicorn_numbers *, const uint8_t *enter,
			      size_t enter_size, char *problem, size_t room);
void orc_unicorn_free(orc_unicorn *); /* no emulator is left */

/* A CPU with that memory, which stays the caller's. NULL, with what unicorn could not do in *failed. Any thread. */
orc_emulator *orc_emulator_new(const orc_unicorn *, const struct kvm_userspace_memory_region *, size_t regions,
			       const struct orc_entry *, const char **failed);
void orc_emulator_free(orc_emulator *);
/* Where a bus lock is reported: behind the instruction (trap_like) or before it; or not at all. */
void orc_vcpu_bind_emulator(orc_vcpu *, orc_emulator *, bool trap_like, bool bus_locks);
/* Runner: as orc_kvm_run. */
enum orc_why orc_emulator_run(orc_vcpu *);
const char *orc_emulator_failed(const orc_emulator *); /* after ORC_ERROR */
/* While it does not run. */
void orc_emulator_registers(orc_emulator *, struct kvm_regs *);
void orc_emulator_special_registers(orc_emulator *, struct kvm_sregs *);
void orc_emulator_debug(orc_emulator *, const struct kvm_guest_debug *);
/* The host wrote guest memory: translated code may be out of date. Any thread, after the write. */
void orc_emulator_written(orc_emulator *, uint64_t address, uint64_t size);

/* ---- probe.c -------------------------------------------------------------------------------------------------- */

/* Medians of many say how the host is; one says little. Nanoseconds of one operation. */
struct orc_probe_sample {
	double lock_ns;   /* locked, in a cache line of its own */
	double memory_ns; /* a read that misses the caches */
};
typedef struct orc_probe orc_probe;
/* A thread that takes `each` samples every `period`: what costs most is to wake up. NULL with errno. */
orc_probe *orc_probe_start(orc_ns period, unsigned each);
/* Fetches up to `most`, oldest first. One thread at a time. Those that nobody fetches are left out after a while. */
size_t orc_probe_take(orc_probe *, struct orc_probe_sample *out, size_t most);
void orc_probe_stop(orc_probe *); /* waits for the thread; nothing for NULL */

/* ---- names.c -------------------------------------------------------------------------------------------------- */

struct orc_name {
	const char *name;
	long number;
};
extern const struct orc_name orc_capabilities[], orc_exit_reasons[]; /* ended by a NULL name */

#endif
