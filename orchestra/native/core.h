/* What the C files share among themselves; the Python side does not see it. */
#ifndef ORC_CORE_H
#define ORC_CORE_H

#include "budget.h"
#include "orc.h"

enum { ORC_TENANT = 2, ORC_VM = 3 }; /* levels of buckets */

struct orc_ring {
	/* Producer and consumer index on cache lines of their own, so that neither invalidates the other's. */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t head; /* next to write: runner */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t tail; /* next to read: owner */
	_Alignas(ORC_CACHE_LINE) uint32_t mask;
	struct orc_record *records;
};

/* A stack that many push to and one takes whole. `queued` keeps a node from being on it twice. */
struct orc_link {
	_Atomic(struct orc_link *) next;
	_Atomic bool queued;
};
struct orc_stack {
	_Alignas(ORC_CACHE_LINE) _Atomic(struct orc_link *) top;
};

/* What those below a tenant's or a VM's bucket had of the interpreter, for gate.c. */
struct orc_share {
	_Atomic int64_t used;  /* ns, and at least what the others had when it came back */
	_Atomic int64_t below; /* a tenant's: `used` of the VM of it that was let in last */
};
struct orc_share *orc_bucket_share(orc_bucket *); /* of one that orc_bucket_new made: a process's own affair */

/* The way from the run loop into Python. An answer takes some microseconds, a part of a string some tens. */
enum { ORC_PATIENCE = 1000 * 1000 };
struct orc_gate {
	_Alignas(ORC_CACHE_LINE) _Atomic(orc_vcpu *) holder;
	_Atomic uint32_t waiting; /* how many */
	_Atomic orc_ns since;     /* when the holder came in */
	_Atomic int64_t now;      /* virtual time: `used` of the tenant that was let in last */
	orc_ns patience;          /* how long its holder may stay before it is passed */
	pthread_mutex_t lock;     /* of the list */
	orc_vcpu *first;          /* those that wait, the last that came first */
};

/* Wakes the owner, but only if it sleeps. Whoever rings has pushed something before, as the owner sets `asleep` before it looks
 * at the stacks. The owner may sleep in either of two of its tasks. */
struct orc_bell {
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t asleep; /* enum orc_sleeper */
	int eventfd[2]; /* by orc_sleeper, from ORC_MAIN on; -1: it has none */
};
/* What a fleet has for its vCPUs to live in: stock.c. */
struct orc_stock {
	pthread_mutex_t lock;
	struct orc_block *blocks;         /* all mappings */
	struct orc_place *vcpus;          /* where there is room for a vCPU */
	/* Stacks that nobody has: no thread had it so far; one had, and its pages are there still, or not any more. */
	struct orc_stack_memory *fresh, *warm, *cold;
	uint32_t warm_stacks;
	uint32_t stacks; /* all that there are */
	size_t stack_size;
};
void orc_stock_init(struct orc_stock *);
void orc_stock_free(struct orc_stock *); /* nothing of it is in use */
orc_vcpu *orc_stock_vcpu(struct orc_stock *); /* zeros; NULL: no memory */
void orc_stock_vcpu_back(struct orc_stock *, orc_vcpu *);
struct orc_stack_memory {
	struct orc_stack_memory *next;
	char *memory;
	size_t size;
};
int orc_stock_stack(struct orc_stock *, struct orc_stack_memory **out); /* 0 or a negative errno */
void orc_stock_stack_back(struct orc_stock *, struct orc_stack_memory *);
/* Takes the pages from all unused stacks but a few: 0.2 us for each VM of the process and stack, so not the owner's to do. */
void orc_stock_trim(struct orc_stock *);

struct orc_fleet {
	struct orc_stack ready;  /* vCPUs with records */
	struct orc_stack active; /* vCPUs that accounted an exit since the last look */
	struct orc_stack talking; /* vCPUs that wrote to a console which somebody follows */
	struct orc_stack throttled; /* vCPUs that wait for a turn, or have since the limits changed */
	struct orc_stack asking;    /* vCPUs that asked a task */
	struct orc_bell reported; /* rung when there are records or output of a console */
	struct orc_bell asked; /* rung when there are questions */
	struct orc_link *draining, *activating, *hearing, *answering; /* owner: taken from the stacks, not yet looked at */
	uint32_t dead; /* owner: vCPUs that were freed and are still on a list */
	_Atomic uint32_t vcpus; /* that were not freed; any thread makes them */
	/* Somebody waits for a vCPU to come out: emulated guests make way, until then at most. */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t urgent;
	_Atomic uint32_t making_way; /* how many do */
	_Atomic orc_ns urgent_until;
	struct orc_gate gate;
	orc_channel *channels; /* owner */
	struct orc_capper *capper; /* owner; NULL until the first cap */
	orc_budget *budget;        /* the host's, if it is shared; NULL: it is not */
	struct orc_stock stock;
};

/* One who looks up on a bus without a lock. */
struct orc_reader {
	orc_bus *bus;
	struct orc_reader *next;                   /* bus->lock */
	_Atomic(const struct orc_table *) reading; /* the runner's: not to be freed meanwhile */
};

/* The access that the guest waits for, as it made it; v->access is the piece of it that Python is to answer. Runner. */
struct orc_pending {
	enum orc_why why; /* which bus: ORC_IO or ORC_MMIO */
	bool open;        /* it is not answered yet */
	bool write, nobody; /* a part of it found nobody */
	orc_u64 address;
	uint32_t size, count;
	uint32_t done, byte; /* elements that are answered, and bytes of the next one */
	orc_u64 value;       /* v->access.value, as it was handed out */
	uint8_t *data;
};

/* What a vCPU asks a task: ask.c. */
struct orc_ask {
	_Atomic orc_u64 word; /* number of the question, and enum orc_asked */
	struct orc_question question; /* the runner's; the owner's while it is open */
	uint8_t answer[8];            /* the owner's while it is open */
};

/* How long it has waited for turns, and since when it does now. */
struct orc_wait {
	_Atomic orc_u64 held[ORC_METERS * ORC_LEVELS]; /* ns, by the bucket whose turn was the last */
	_Atomic orc_ns since;     /* since when it waits for the same bucket; 0: it does not */
	_Atomic unsigned slowest; /* that bucket */
};

struct orc_vcpu {
	orc_fleet *fleet;
	uint32_t id, vm, number; /* the latter two as records have them */
	struct orc_link ready, active, talking, throttled, asking;
	struct orc_ring ring;
	bool dead; /* owner */
	struct orc_cap *cap; /* owner; NULL: it has none */

	/* Set by the owner, read by the runner. */
	_Alignas(ORC_CACHE_LINE) _Atomic uint32_t wakes; /* futex */
	_Atomic uint32_t commands;
	_Atomic orc_u64 event_mask;
	_Atomic int tid;
	_Atomic bool in_guest;

	/* The runner's. */
	_Alignas(ORC_CACHE_LINE) orc_bucket *bucket[ORC_METERS][ORC_LEVELS];
	struct orc_ticket ticket[ORC_METERS][ORC_LEVELS];
	bool charged[ORC_METERS];
	orc_ns accounted;  /* when it accounted an exit last, in this run of the engine; 0: not yet */
	uint32_t accesses; /* of the exit that is accounted next: orc_vcpu_weigh */
	bool wait_counted;
	bool waiting; /* a ticket is out whose turn had not come */
	bool unfinished; /* the last exit is completed by the next KVM_RUN (I/O, MMIO, MSR, hypercall) */
	bool gated;          /* it holds the gate, unless it was passed */
	orc_ns gate_entered;
	orc_ns gate_cpu;       /* its thread's CPU time then, if it is watched */
	uint32_t gate_watched; /* for so many entries more */
	orc_vcpu *gate_next; /* fleet->gate.lock, and what follows */
	bool gate_given;
	int fd, error;
	bool sync_regs;
	struct kvm_run *run;
	orc_dirty *dirty; /* NULL: it has no ring of written pages */
	uint32_t dirty_ring;
	orc_emulator *emulator;
	struct orc_reader on_ports, on_mmio;
	struct orc_pending io;
	struct orc_access access;
	struct orc_ask ask;
	struct orc_record record;

	/* Sampling of bus locks. */
	_Atomic uint32_t sample_every;    /* set by the owner */
	uint32_t sample_drawn;            /* what it was when the gap was drawn */
	orc_u64 sample_passed, sample_gap; /* locks since the last sample; of these the last is to be sampled */
	orc_u64 sample_random;
	_Atomic(struct orc_profile *) profile; /* NULL: nothing yet, or the other side has it */
	const struct orc_witness *witness;     /* NULL: RIP of the record is all there is */
	const struct kvm_userspace_memory_region *slot;
	size_t slots;

	/* Counters: one writer (the runner), so plain load and store, atomic only against torn reads. */
	_Alignas(ORC_CACHE_LINE) _Atomic orc_u64 exits[ORC_REASONS];
	_Atomic orc_u64 bus_locks, capped, waits, released, missed, kicks, unclaimed, answered;
	struct orc_wait wait[2];
	_Atomic uint32_t wait_version; /* the last bit says which of the two is in force */
};

/* What runs at each exit that the loop handles by itself. The linker puts it together: each page that is touched between two
 * entries of the guest costs an entry of the TLB, which entering the guest may have emptied. */
#define ORC_HOT __attribute__((hot))

/* Of a `now`: the clock was not read yet, as it may not be needed. */
#define ORC_UNREAD INT64_MIN

#define ORC_CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

/* It is on one of the fleet's lists: the owner's question about one whose runner has ended. */
static inline bool orc_is_listed(orc_vcpu *v)
{
	return atomic_load_explicit(&v->ready.queued, memory_order_acquire) ||
	       atomic_load_explicit(&v->active.queued, memory_order_acquire) ||
	       atomic_load_explicit(&v->talking.queued, memory_order_acquire) ||
	       atomic_load_explicit(&v->throttled.queued, memory_order_acquire) ||
	       atomic_load_explicit(&v->asking.queued, memory_order_acquire);
}

static inline void orc_count(_Atomic orc_u64 *counter, orc_u64 n)
{
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/* Whether exits of that reason and flags are among those of a mask. */
static inline bool orc_mask_has(orc_u64 mask, unsigned reason, unsigned flags)
{
	if (flags & KVM_RUN_X86_BUS_LOCK && mask & (1ull << ORC_EVENT_BUS_LOCK))
		return true;
	return mask & (1ull << (reason < ORC_REASONS - 1 ? reason : ORC_REASONS - 2));
}

/* Whether an exit of that reason and flags has subscribers. */
static inline bool orc_is_subscribed(const orc_vcpu *v, unsigned reason, unsigned flags)
{
	orc_u64 mask = atomic_load_explicit(&((orc_vcpu *)v)->event_mask, memory_order_acquire);

	return mask && orc_mask_has(mask, reason, flags);
}

/* How a backend's vCPU is asked where it is, on the runner's thread at an exit. */
struct orc_witness {
	bool (*registers)(orc_vcpu *, const struct orc_record *, struct orc_site *);
	/* Code at a linear address, as much as is there: from its begin, or (end) up to its end, moved to the front. */
	size_t (*code)(orc_vcpu *, orc_u64 linear, uint8_t *out, size_t n, bool end);
};
extern const struct orc_witness orc_kvm_witness, orc_emulator_witness;

void orc_profile_take(orc_vcpu *, const struct orc_record *, uint32_t every);
void orc_profile_free(orc_vcpu *);
void orc_profile_place(struct orc_site *, orc_u64 rip, orc_u64 rflags, const struct kvm_sregs *);
size_t orc_profile_copy(orc_vcpu *, const uint8_t *(*translate)(orc_vcpu *, orc_u64 linear), orc_u64 linear, uint8_t *out,
			size_t n, bool end);

/* Runner, for each bus lock: sampled, if its turn has come. */
static inline void orc_profile_lock(orc_vcpu *v, const struct orc_record *record)
{
	uint32_t every = atomic_load_explicit(&v->sample_every, memory_order_relaxed);

	if (every && (++v->sample_passed >= v->sample_gap || every != v->sample_drawn))
		orc_profile_take(v, record, every);
}

/* Owner: the vCPU looks up no more. */
void orc_leave_buses(orc_vcpu *);
/* Runner: the table of its bus, which is not freed, nor are its devices, until it is let go. */
const struct orc_table *orc_table_hold(struct orc_reader *);
void orc_table_let_go(struct orc_reader *);
/* Who claims an address. NULL: nobody. *last: where that ends, the last address of it. */
const struct orc_claim *orc_table_find(const struct orc_table *, orc_u64 address, orc_u64 *last);
/* Before the guest is entered: goes on with the access at hand, once its turn has come. As orc_access_begin. */
enum orc_why orc_access_resume(orc_vcpu *);
/* Runner, in a device: somebody waits for what was just written to the console of its VM. */
void orc_talk(orc_vcpu *);
/* Output of a device: kept, and announced if somebody waits for it. */
void orc_console_say(orc_console *, orc_vcpu *by, const uint8_t *data, size_t size);
int orc_signal_send(int thread); /* one of this process; 0 or a negative errno */
/* As orc_vcpu_account; `now` may be ORC_UNREAD. `subscribed`: the answer of orc_is_subscribed about this exit, asked once and
 * before the exit was described: a subscription that comes in between would otherwise get a record that describes another
 * exit. */
orc_ns orc_account(orc_vcpu *, struct orc_record *, orc_ns now, bool subscribed);
/* Runner: a run of an engine, from Python and back to it. `guest` enters the guest until something is to be decided. What a task
 * answers is asked and waited for here. */
enum orc_why orc_run(orc_vcpu *, enum orc_why (*guest)(orc_vcpu *));
/* Runner: waits for the answer. False: there is a command, and the question stays open. */
bool orc_ask_wait(orc_vcpu *);
/* Owner: the question that it has open, if it has. */
bool orc_ask_take(orc_vcpu *, struct orc_question *out);
void orc_bell_ring(struct orc_bell *);
/* Runner: before it goes to Python to have an access answered, in its turn; and when it is back in C. */
void orc_gate_enter(orc_vcpu *);
orc_ns orc_gate_leave(orc_vcpu *); /* when; nothing, and 0, if it did not enter */
void orc_futex_wait(_Atomic uint32_t *word, uint32_t seen);
/* Until the word is not `seen` any more, or an absolute time; or sooner: the caller looks. */
void orc_futex_wait_until(_Atomic uint32_t *word, uint32_t seen, orc_ns until);

/* `data` into a record, as much of it as there is room. */
void orc_take_data(struct orc_record *, const void *data, size_t size);
void orc_ring_put(orc_vcpu *, const struct orc_record *);
void orc_push(struct orc_stack *, struct orc_link *);
/* Owner: frees its memory, now or when it comes off the fleet's lists. All else of it is given back. */
void orc_retire(orc_vcpu *);
/* It waits for its turn. Of one that begins or ends to just now, either. */
bool orc_vcpu_waits(orc_vcpu *);
/* Runner: waits until its turn. False: a command or a kick ended the wait, and the tickets stay valid. */
bool orc_wait_turn(orc_vcpu *);
/* Runner, between two entries: waits for a cap; whether there is a command of another kind. */
bool orc_commanded(orc_vcpu *);
void orc_capper_stop(struct orc_capper *); /* no vCPU is left */
/* Runner, in an emulated guest: sleeps while orc_fleet_urgent is on and it has no command itself. */
void orc_make_way(orc_vcpu *);

#endif
