/* What Python sees of the core and of the kernel's structures. "..." and constants are filled in by the compiler. */

/* ---- orc.h ---- */

typedef struct orc_bucket orc_bucket;
typedef struct orc_fleet orc_fleet;
typedef struct orc_vcpu orc_vcpu;
typedef struct orc_bus orc_bus;
typedef struct orc_device orc_device;
enum { ORC_REASONS, ORC_LEVELS, ORC_METERS, ORC_BUS_LOCKS, ORC_EXITS, ORC_ANSWERS, ORC_EVENT_BUS_LOCK, ... };
enum { ORC_STOP, ORC_PAUSE, ORC_CALL, ORC_HOLD, ORC_CAP, ... };
enum orc_why { ORC_EXIT, ORC_IO, ORC_MMIO, ORC_COMMAND, ORC_ERROR, ORC_ANSWERED, ORC_ASKED, ... };
#define ORC_NEVER ...

orc_bucket *orc_bucket_new(void);
void orc_bucket_free(orc_bucket *);
int orc_bucket_set(orc_bucket *, double rate, double burst, int64_t max_delay, int64_t now);
bool orc_bucket_limited(const orc_bucket *);
void orc_bucket_set_once(orc_bucket *, double tokens);
struct orc_ticket { int64_t number; int64_t charged; int64_t waits; };
bool orc_bucket_charge(orc_bucket *, int64_t now, struct orc_ticket *out);
bool orc_bucket_charge_many(orc_bucket *, uint64_t n, int64_t now, struct orc_ticket *out);
void orc_bucket_leave(orc_bucket *, struct orc_ticket *);
void orc_bucket_turn(const orc_bucket *, const struct orc_ticket *, int64_t *by_tokens, int64_t *by_delay);
struct orc_limit { double rate, burst, debt, once; int64_t max_delay; ...; };
void orc_bucket_limit(const orc_bucket *, int64_t now, struct orc_limit *out);

typedef struct orc_budget orc_budget;
int orc_budget_create(void);
orc_budget *orc_budget_attach(int fd, const char **problem);
void orc_budget_detach(orc_budget *);
int orc_budget_fd(const orc_budget *);
orc_bucket *orc_budget_bucket(orc_budget *, int meter);
uint32_t orc_budget_changes(const orc_budget *);
void orc_budget_changed(orc_budget *);
void orc_fleet_share(orc_fleet *, orc_budget *);

struct orc_record {
	uint64_t time, rip, wait;
	uint64_t arg[5];
	uint32_t id;
	uint16_t reason, flags;
	uint8_t has_rip, data_size;
	uint8_t data[32];
	uint32_t vm, vcpu;
	...;
};
orc_fleet *orc_fleet_new(void);
void orc_fleet_free(orc_fleet *);
int orc_fleet_eventfd(const orc_fleet *);
bool orc_fleet_sleep(orc_fleet *);
size_t orc_fleet_drain(orc_fleet *, struct orc_record *out, size_t most);
size_t orc_vcpu_drain(orc_vcpu *, struct orc_record *out, size_t most);
#define ORC_EVERY_VM ...
#define ORC_NO_VM ...
typedef struct orc_channel orc_channel;
struct orc_channel { uint64_t received, missed; uint32_t waiting, vm; ...; };
orc_channel *orc_channel_new(orc_fleet *, uint64_t mask, uint32_t vm, uint32_t capacity, bool drop_oldest);
void orc_channel_end(orc_channel *);
void orc_channel_free(orc_channel *);
size_t orc_fleet_deliver(orc_fleet *, orc_vcpu *, struct orc_record *scratch, size_t most);
size_t orc_channel_take(orc_channel *, struct orc_record *out, size_t most);
void orc_channel_drop(orc_channel *);
enum orc_column {
	ORC_COLUMN_TIME, ORC_COLUMN_RIP, ORC_COLUMN_HAS_RIP, ORC_COLUMN_WAIT, ORC_COLUMN_VM, ORC_COLUMN_VCPU,
	ORC_COLUMN_KIND, ORC_COLUMN_BUS_LOCK, ORC_COLUMN_GUEST_MODE, ORC_COLUMN_SMM, ORC_COLUMN_ADDRESS, ORC_COLUMN_SIZE,
	ORC_COLUMN_WRITE, ORC_COLUMN_ARGUMENTS, ORC_COLUMN_DATA_SIZE, ORC_COLUMN_DATA, ...
};
void orc_records_column(const struct orc_record *, size_t n, enum orc_column, void *out);
size_t orc_records_vms(const struct orc_record *, size_t n, uint32_t *out);
void orc_vcpu_name(orc_vcpu *, uint32_t vm, uint32_t vcpu);
void orc_fleet_look(orc_fleet *);
size_t orc_fleet_active(orc_fleet *, uint32_t *out, size_t most);
void orc_fleet_limits_changed(orc_fleet *);
void orc_fleet_urgent(orc_fleet *, bool begins);

orc_vcpu *orc_vcpu_new(orc_fleet *, uint32_t id, uint32_t ring_records);
void orc_vcpu_free(orc_vcpu *);
void orc_vcpu_unbind(orc_vcpu *);
void orc_vcpu_set_bucket(orc_vcpu *, int meter, int level, orc_bucket *);
void orc_vcpu_set_buckets(orc_vcpu *, orc_bucket *const buckets[]);
void orc_vcpu_hold(orc_vcpu *);
int orc_vcpu_subscribe(orc_vcpu *, uint64_t mask);
void orc_vcpu_weigh(orc_vcpu *, uint32_t accesses);
void orc_vcpu_answered(orc_vcpu *, uint32_t accesses, int64_t now);
int64_t orc_vcpu_account(orc_vcpu *, struct orc_record *, int64_t now);
int64_t orc_vcpu_turn(const orc_vcpu *);
void orc_vcpu_wait_begin(orc_vcpu *, int64_t now);
void orc_vcpu_wait_end(orc_vcpu *, int64_t now, bool served);
void orc_vcpu_command(orc_vcpu *, uint32_t set, uint32_t clear);
uint32_t orc_vcpu_commands(const orc_vcpu *);
void orc_vcpu_kick(orc_vcpu *);
uint32_t orc_vcpu_wakes(const orc_vcpu *);
void orc_vcpu_sleep(orc_vcpu *, uint32_t seen);
void orc_vcpu_wake(orc_vcpu *);
void orc_vcpu_attach(orc_vcpu *);
void orc_vcpu_detach(orc_vcpu *);
typedef struct orc_runner orc_runner;
int orc_runner_start(orc_vcpu *, const char *name, enum orc_why (*)(orc_vcpu *), void (*)(void *, int), void *context, orc_runner **out);
int orc_runner_tid(const orc_runner *);
void orc_runner_join(orc_runner *);

int64_t orc_slice(int thread);
unsigned orc_prefer(void);
void orc_prefer_no_more(unsigned);
#define ORC_PREFERRED ...
#define ORC_LOOP_NICE ...
#define CAP_SYS_NICE ...
extern "Python" void orc_proceed(void *, int);
void orc_enter(void *, int);

struct orc_counters {
	uint64_t exits[...];
	uint64_t bus_locks, capped, throttled, waits, released, missed, kicks, unclaimed, answers;
	uint64_t held[...];
	int64_t throttled_since;
};
void orc_vcpu_counters(const orc_vcpu *, struct orc_counters *out, int64_t now);
struct orc_sums { uint64_t bus_locks, throttled, answers; uint64_t held[...]; };
struct orc_more { uint32_t reason; uint64_t exits; };
int orc_vcpu_look(const orc_vcpu *, struct orc_sums *out, uint64_t *seen, struct orc_more *more, int64_t now);
int64_t orc_now(void);

enum { ORC_SITES, ORC_CODE_BEFORE, ORC_CODE_AFTER };
struct orc_site {
	uint64_t rip, space, samples, weight, error;
	uint8_t mode, cpl, rode, nested, before, size;
	uint8_t code[...];
	...;
};
void orc_vcpu_sample(orc_vcpu *, uint32_t every);
size_t orc_vcpu_profile(orc_vcpu *, struct orc_site *out, uint64_t *lost, uint64_t *replaced);
int orc_vcpu_cap(orc_vcpu *, double share);

int orc_signal_install(void);
int orc_signal_number(void);

enum { ORC_CHUNK, ... };
struct orc_access { uint64_t address, offset, claim, value; uint32_t size, count, write, task; uint8_t *data; };
bool orc_device_answer(orc_device *, uint64_t offset, uint32_t size, uint32_t count, bool write, void *data);
void orc_device_free(orc_device *);
struct orc_claim { uint64_t start, last, version; orc_device *device; bool task; };
orc_bus *orc_bus_new(void);
void orc_bus_free(orc_bus *);
int orc_bus_replace(orc_bus *, const struct orc_claim *, size_t n);
uint64_t orc_bus_find(orc_bus *, uint64_t address);
size_t orc_bus_tables(orc_bus *);
void orc_vcpu_set_buses(orc_vcpu *, orc_bus *ports, orc_bus *mmio);
enum orc_why orc_access_begin(orc_vcpu *, enum orc_why bus, uint64_t address, uint32_t size, uint32_t count, bool write, void *data);
struct orc_access *orc_vcpu_access(orc_vcpu *);
bool orc_access_next(orc_vcpu *);
enum orc_why orc_access_up(orc_vcpu *);
void orc_access_abandon(orc_vcpu *);

enum orc_asked { ORC_ASK_NONE, ORC_ASK_OPEN, ORC_ASK_ANSWERED, ORC_ASK_AGAIN, ORC_ASK_NOBODY, ... };
struct orc_question {
	uint64_t claim, address;
	int64_t since;
	uint32_t vcpu, number, bus, size, write;
	uint8_t data[8];
};
void orc_ask(orc_vcpu *, int64_t now);
void orc_ask_question(const orc_vcpu *, struct orc_question *out);
bool orc_ask_open(const orc_vcpu *);
void orc_ask_settled(orc_vcpu *);
size_t orc_fleet_asked(orc_fleet *, struct orc_question *out, size_t most);
enum orc_sleeper { ORC_AWAKE, ORC_MAIN, ORC_DEPUTY, ... };
int orc_fleet_asked_eventfd(const orc_fleet *, enum orc_sleeper);
bool orc_fleet_asked_sleep(orc_fleet *);
bool orc_fleet_asked_stand_in(orc_fleet *);
void orc_fleet_asked_give_back(orc_fleet *, bool more);
void orc_fleet_asked_ring(orc_fleet *);
bool orc_vcpu_settle(orc_vcpu *, uint32_t number, enum orc_asked, const void *answer, size_t size);

enum { ORC_CONSOLE_KEPT, ... };
typedef struct orc_console orc_console;
orc_console *orc_console_new(void);
void orc_console_free(orc_console *);
bool orc_console_put(orc_console *, const uint8_t *, size_t);
bool orc_console_load(orc_console *, uint64_t total, const uint8_t *, size_t, const uint8_t *typed, size_t waiting);
uint64_t orc_console_total(orc_console *);
size_t orc_console_copy(orc_console *, uint64_t *position, uint8_t *out, size_t room);
bool orc_console_want(orc_console *, uint64_t position);
#define ORC_CONSOLE_TYPED ...
#define ORC_CONSOLE_WAITING ...
ssize_t orc_console_type(orc_console *, const uint8_t *, size_t);
bool orc_console_listened(orc_console *);
size_t orc_console_typed(orc_console *);
size_t orc_console_copy_typed(orc_console *, uint8_t *out, size_t room);
size_t orc_console_read(orc_console *, orc_vcpu *by, uint8_t *out, size_t size);
size_t orc_port_say(orc_console *, orc_vcpu *by, const uint8_t *, size_t);
void orc_port_set_open(orc_console *, orc_vcpu *by, bool open);
uint32_t orc_port_opening(orc_console *);
size_t orc_port_take(orc_console *, uint8_t *out, size_t room);
bool orc_port_want(orc_console *, uint32_t opening, bool output);
size_t orc_fleet_talking(orc_fleet *, uint32_t *out, size_t most);
orc_device *orc_debug_console_new(orc_console *, uint8_t detected);
orc_device *orc_exit_port_new(void);
typedef struct orc_interrupts orc_interrupts;
orc_interrupts *orc_interrupts_new(int vm);
void orc_interrupts_free(orc_interrupts *);
int orc_interrupts_set(orc_interrupts *, uint32_t gsi, bool level);
struct orc_route { uint64_t address; uint32_t data, gsi; };
int orc_interrupts_route(orc_interrupts *, bool lines, const struct orc_route *, size_t n);
void orc_interrupts_close(orc_interrupts *);
typedef struct orc_uart orc_uart;
typedef void (*orc_uart_output)(void *to, orc_vcpu *by, const uint8_t *, size_t);
typedef void (*orc_uart_interrupt)(void *line, bool level);
orc_uart *orc_uart_new(orc_uart_output, void *to, orc_uart_interrupt, void *line);
orc_uart *orc_serial_new(orc_console *, orc_interrupts *, uint32_t gsi);
void orc_serial_listen(orc_uart *);
void orc_serial_hold(orc_uart *, bool on);
void orc_serial_stop(orc_uart *);
orc_device *orc_uart_device(orc_uart *);
size_t orc_uart_receive(orc_uart *, const uint8_t *, size_t);
enum { ORC_UART_FIFO, ... };
struct orc_uart_state {
	uint8_t received[...], waiting;
	uint8_t ier, lcr, mcr, scratch, fcr, line_errors, modem_changes;
	uint16_t divisor;
	bool thre_pending, level;
};
void orc_uart_save(orc_uart *, struct orc_uart_state *);
bool orc_uart_load(orc_uart *, const struct orc_uart_state *);
void orc_uart_reset(orc_uart *);

void orc_vcpu_bind_kvm(orc_vcpu *, int fd, struct kvm_run *, bool sync_regs);
enum orc_why orc_kvm_run(orc_vcpu *);
struct orc_record *orc_vcpu_record(orc_vcpu *);
int orc_vcpu_errno(const orc_vcpu *);

long orc_ioctl(int fd, unsigned long request, void *argument);
long orc_ioctl_value(int fd, unsigned long request, unsigned long argument);

struct orc_probe_sample { double lock_ns, memory_ns; };
typedef struct orc_probe orc_probe;
orc_probe *orc_probe_start(int64_t period, unsigned each);
size_t orc_probe_take(orc_probe *, struct orc_probe_sample *out, size_t most);
void orc_probe_stop(orc_probe *);

struct orc_name { const char *name; long number; };
extern const struct orc_name orc_capabilities[], orc_exit_reasons[];

/* ---- linux/kvm.h: system and VM ---- (__u64 is unsigned long long there, which is not uint64_t to a compiler) */

#define KVM_API_VERSION ...
#define KVM_GET_API_VERSION ...
#define KVM_CREATE_VM ...
#define KVM_CHECK_EXTENSION ...
#define KVM_GET_VCPU_MMAP_SIZE ...
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_GET_MSR_INDEX_LIST ...
#define KVM_CAP_USER_MEMORY ...
#define KVM_CAP_IMMEDIATE_EXIT ...
#define KVM_CAP_SYNC_REGS ...
#define KVM_CAP_MAX_VCPUS ...
#define KVM_CAP_GET_MSR_FEATURES ...
#define KVM_CAP_NR_VCPUS ...
#define KVM_CAP_NR_MEMSLOTS ...
#define KVM_CAP_X86_BUS_LOCK_EXIT ...
#define KVM_CAP_BINARY_STATS_FD ...
#define KVM_CAP_READONLY_MEM ...
#define KVM_CAP_XSAVE2 ...
#define KVM_CAP_IRQFD ...
#define KVM_CAP_IOEVENTFD ...
#define KVM_CAP_IOEVENTFD_ANY_LENGTH ...
#define KVM_CAP_IRQ_ROUTING ...
#define KVM_CAP_SPLIT_IRQCHIP ...
#define KVM_BUS_LOCK_DETECTION_OFF ...
#define KVM_BUS_LOCK_DETECTION_EXIT ...
#define KVM_RUN_X86_SMM ...
#define KVM_RUN_X86_BUS_LOCK ...
#define KVM_RUN_X86_GUEST_MODE ...
#define KVM_SYNC_X86_REGS ...

#define KVM_SET_TSS_ADDR ...
#define KVM_SET_IDENTITY_MAP_ADDR ...
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_MEM_LOG_DIRTY_PAGES ...
#define KVM_MEM_READONLY ...
struct kvm_userspace_memory_region {
	uint32_t slot, flags;
	unsigned long long guest_phys_addr, memory_size, userspace_addr;
	...;
};
#define KVM_GET_DIRTY_LOG ...
struct kvm_dirty_log { uint32_t slot; union { void *dirty_bitmap; unsigned long long padding2; }; ...; };
#define KVM_CREATE_VCPU ...
#define KVM_ENABLE_CAP ...
struct kvm_enable_cap { uint32_t cap, flags; unsigned long long args[4]; ...; };
#define KVM_CREATE_IRQCHIP ...
#define KVM_CREATE_PIT2 ...
#define KVM_PIT_SPEAKER_DUMMY ...
struct kvm_pit_config { uint32_t flags; ...; };
#define KVM_CAP_PIT_STATE2 ...
#define KVM_GET_PIT2 ...
#define KVM_SET_PIT2 ...
struct kvm_pit_state2 { ...; };
#define KVM_GET_IRQCHIP ...
#define KVM_SET_IRQCHIP ...
#define KVM_IRQCHIP_PIC_MASTER ...
#define KVM_IRQCHIP_PIC_SLAVE ...
#define KVM_IRQCHIP_IOAPIC ...
struct kvm_irqchip { uint32_t chip_id; ...; };
#define KVM_CAP_ADJUST_CLOCK ...
#define KVM_GET_CLOCK ...
#define KVM_SET_CLOCK ...
#define KVM_CLOCK_REALTIME ...
#define KVM_CLOCK_HOST_TSC ...
struct orc_kvm_clock { uint64_t clock; uint32_t flags; uint64_t realtime, host_tsc; ...; };
#define KVM_IRQ_LINE ...
struct kvm_irq_level { union { uint32_t irq; int32_t status; }; uint32_t level; ...; };
#define KVM_IRQFD ...
#define KVM_IRQFD_FLAG_DEASSIGN ...
#define KVM_IRQFD_FLAG_RESAMPLE ...
struct kvm_irqfd { uint32_t fd, gsi, flags, resamplefd; ...; };
#define KVM_IOEVENTFD ...
#define KVM_IOEVENTFD_FLAG_DATAMATCH ...
#define KVM_IOEVENTFD_FLAG_PIO ...
#define KVM_IOEVENTFD_FLAG_DEASSIGN ...
struct kvm_ioeventfd { unsigned long long datamatch, addr; uint32_t len; int32_t fd; uint32_t flags; ...; };
#define KVM_GET_STATS_FD ...
struct kvm_stats_header { uint32_t flags, name_size, num_desc, id_offset, desc_offset, data_offset; ...; };
struct kvm_stats_desc { uint32_t flags; int16_t exponent; uint16_t size; uint32_t offset, bucket_size; ...; };
#define KVM_STATS_TYPE_MASK ...
#define KVM_STATS_TYPE_CUMULATIVE ...
#define KVM_STATS_TYPE_INSTANT ...
#define KVM_STATS_TYPE_PEAK ...
#define KVM_STATS_TYPE_LINEAR_HIST ...
#define KVM_STATS_TYPE_LOG_HIST ...
#define KVM_STATS_UNIT_MASK ...
#define KVM_STATS_UNIT_NONE ...
#define KVM_STATS_UNIT_BYTES ...
#define KVM_STATS_UNIT_SECONDS ...
#define KVM_STATS_UNIT_CYCLES ...
#define KVM_STATS_UNIT_BOOLEAN ...
#define KVM_STATS_BASE_MASK ...
#define KVM_STATS_BASE_POW10 ...
#define KVM_STATS_BASE_POW2 ...
#define KVM_KVMCLOCK_CTRL ...

void orc_vcpu_profile_memory(orc_vcpu *, const struct kvm_userspace_memory_region *, size_t slots);

/* ---- dirty.c (here, as it needs the kernel's structures) ---- */

typedef struct orc_dirty orc_dirty;
struct orc_dirty_sums { uint64_t pages; int64_t read; bool on; ...; };
orc_dirty *orc_dirty_new(int vm, struct kvm_userspace_memory_region *, size_t slots);
void orc_dirty_free(orc_dirty *);
void orc_dirty_close(orc_dirty *);
int orc_dirty_log(orc_dirty *, bool on);
int orc_dirty_read(orc_dirty *const logs[], size_t n);
void orc_dirty_sums(orc_dirty *, struct orc_dirty_sums *out);
uint64_t orc_dirty_ones(const uint64_t *bitmap, size_t words);
typedef struct orc_dirty_reader orc_dirty_reader;
int orc_dirty_rings(orc_dirty *, uint32_t entries, const int *vcpu, uint32_t vcpus);
int orc_dirty_open(orc_dirty *, orc_dirty_reader **out);
size_t orc_dirty_words(const orc_dirty *);
int orc_dirty_take(orc_dirty_reader *, uint64_t *bitmap);
int orc_dirty_shut(orc_dirty_reader *);
void orc_dirty_mark(orc_dirty *, uint64_t address, uint64_t size);
void orc_vcpu_set_dirty(orc_vcpu *, orc_dirty *, uint32_t ring);
struct kvm_dirty_gfn { ...; };
#define KVM_CAP_DIRTY_LOG_RING ...
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL ...

/* ---- linux/kvm.h: vCPU ---- */

#define KVM_RUN ...
struct kvm_run { uint8_t immediate_exit; uint32_t exit_reason; uint16_t flags; ...; };
#define KVM_GET_REGS ...
#define KVM_SET_REGS ...
struct kvm_regs {
	unsigned long long rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
	...;
};
#define KVM_GET_SREGS ...
#define KVM_SET_SREGS ...
struct kvm_segment {
	unsigned long long base;
	uint32_t limit;
	uint16_t selector;
	uint8_t type, present, dpl, db, s, l, g, avl, unusable;
	...;
};
struct kvm_dtable { unsigned long long base; uint16_t limit; ...; };
struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	unsigned long long cr0, cr2, cr3, cr4, cr8, efer, apic_base;
	unsigned long long interrupt_bitmap[...];
	...;
};
#define KVM_SET_CPUID2 ...
#define KVM_GET_CPUID2 ...
#define KVM_CPUID_FLAG_SIGNIFCANT_INDEX ...
struct kvm_cpuid_entry2 { uint32_t function, index, flags, eax, ebx, ecx, edx; ...; };
struct kvm_cpuid2 { uint32_t nent; struct kvm_cpuid_entry2 entries[]; ...; };
#define KVM_GET_MSRS ...
#define KVM_SET_MSRS ...
struct kvm_msr_entry { uint32_t index; unsigned long long data; ...; };
struct kvm_msrs { uint32_t nmsrs; struct kvm_msr_entry entries[]; ...; };
struct kvm_msr_list { uint32_t nmsrs; uint32_t indices[]; ...; };
#define KVM_GET_FPU ...
#define KVM_SET_FPU ...
struct kvm_fpu { uint8_t fpr[8][16]; uint16_t fcw, fsw; uint8_t ftwx; uint16_t last_opcode; unsigned long long last_ip, last_dp; uint8_t xmm[16][16]; uint32_t mxcsr; ...; };
#define KVM_GET_XSAVE ...
#define KVM_GET_XSAVE2 ...
#define KVM_SET_XSAVE ...
#define KVM_CAP_XCRS ...
#define KVM_GET_XCRS ...
#define KVM_SET_XCRS ...
struct kvm_xcr { uint32_t xcr; unsigned long long value; ...; };
struct kvm_xcrs { uint32_t nr_xcrs, flags; struct kvm_xcr xcrs[...]; ...; };
#define KVM_GET_MP_STATE ...
#define KVM_SET_MP_STATE ...
#define KVM_MP_STATE_RUNNABLE ...
#define KVM_MP_STATE_UNINITIALIZED ...
#define KVM_MP_STATE_INIT_RECEIVED ...
#define KVM_MP_STATE_HALTED ...
#define KVM_MP_STATE_SIPI_RECEIVED ...
struct kvm_mp_state { uint32_t mp_state; ...; };
#define KVM_GET_VCPU_EVENTS ...
#define KVM_SET_VCPU_EVENTS ...
struct kvm_vcpu_events { ...; };
#define KVM_GET_DEBUGREGS ...
#define KVM_SET_DEBUGREGS ...
struct kvm_debugregs { unsigned long long db[4], dr6, dr7, flags; ...; };
#define KVM_CAP_IRQCHIP ...
#define KVM_GET_LAPIC ...
#define KVM_SET_LAPIC ...
struct kvm_lapic_state { ...; };
#define KVM_CAP_SREGS2 ...
#define KVM_GET_SREGS2 ...
#define KVM_SET_SREGS2 ...
#define KVM_SREGS2_FLAGS_PDPTRS_VALID ...
struct kvm_sregs2 {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	unsigned long long cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags;
	unsigned long long pdptrs[...];
	...;
};
#define KVM_CAP_GET_TSC_KHZ ...
#define KVM_CAP_TSC_CONTROL ...
#define KVM_GET_TSC_KHZ ...
#define KVM_SET_TSC_KHZ ...
#define KVM_CAP_VCPU_ATTRIBUTES ...
#define KVM_HAS_DEVICE_ATTR ...
#define KVM_GET_DEVICE_ATTR ...
#define KVM_SET_DEVICE_ATTR ...
#define KVM_VCPU_TSC_CTRL ...
#define KVM_VCPU_TSC_OFFSET ...
struct kvm_device_attr { uint32_t flags, group; unsigned long long attr, addr; ...; };
#define KVM_CAP_NESTED_STATE ...
#define KVM_GET_NESTED_STATE ...
#define KVM_SET_NESTED_STATE ...
struct kvm_nested_state { uint16_t flags, format; uint32_t size; ...; };
#define KVM_SET_GUEST_DEBUG ...
#define KVM_GUESTDBG_ENABLE ...
#define KVM_GUESTDBG_SINGLESTEP ...
#define KVM_GUESTDBG_USE_SW_BP ...
#define KVM_GUESTDBG_USE_HW_BP ...
struct kvm_guest_debug_arch { unsigned long long debugreg[8]; ...; };
struct kvm_guest_debug { uint32_t control; struct kvm_guest_debug_arch arch; ...; };

/* ---- sys/mman.h ---- */

void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset);
int munmap(void *address, size_t length);
int madvise(void *address, size_t length, int advice);

/* ---- build.c (here, as it needs the kernel's structures) ---- */

struct orc_entry {
	struct kvm_regs registers;
	const struct kvm_sregs *special;
	struct kvm_msrs *msrs;
	uint16_t bits;
	bool waits;
};
enum orc_irqchip { ORC_NO_IRQCHIP, ORC_FULL_IRQCHIP, ORC_SPLIT_IRQCHIP, ... };
struct orc_plan {
	int kvm;
	bool bus_locks;
	enum orc_irqchip irqchip;
	bool pit;
	uint32_t dirty_ring;
	uint64_t identity_map, tss, run_size;
	uint32_t slots, vcpus;
	struct kvm_userspace_memory_region *slot;
	struct orc_entry *entry;
	struct kvm_cpuid2 *cpuid;
	int vm;
	int *vcpu;
	struct kvm_run **run;
	uint32_t vcpus_made;
	const char *step;
	uint32_t msr;
	int result;
	...;
};
int orc_kvm_build(struct orc_plan *);
void orc_cpuid_set_apic_id(struct kvm_cpuid2 *, uint32_t id);

/* ---- builder.c ---- */

typedef struct orc_builder orc_builder;
orc_builder *orc_builder_new(void);
int orc_builder_begin(orc_builder *, struct orc_plan *, int done);
void orc_builder_free(orc_builder *);

/* ---- unicorn.c, emulate*.c ---- */

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
orc_unicorn *orc_unicorn_load(const char *path, const struct orc_unicorn_numbers *, const uint8_t *enter, size_t enter_size, char *problem, size_t room);
void orc_unicorn_free(orc_unicorn *);
orc_emulator *orc_emulator_new(const orc_unicorn *, const struct kvm_userspace_memory_region *, size_t regions, const struct orc_entry *, const char **failed);
void orc_emulator_free(orc_emulator *);
void orc_vcpu_bind_emulator(orc_vcpu *, orc_emulator *, bool trap_like, bool bus_locks);
enum orc_why orc_emulator_run(orc_vcpu *);
const char *orc_emulator_failed(const orc_emulator *);
void orc_emulator_registers(orc_emulator *, struct kvm_regs *);
void orc_emulator_special_registers(orc_emulator *, struct kvm_sregs *);
void orc_emulator_debug(orc_emulator *, const struct kvm_guest_debug *);
void orc_emulator_written(orc_emulator *, uint64_t address, uint64_t size);

/* ---- virtqueue.h, virtio.h ---- */

typedef struct orc_guest_memory orc_guest_memory;
orc_guest_memory *orc_guest_memory_new(const struct kvm_userspace_memory_region *, size_t slots, orc_dirty *);
void orc_guest_memory_free(orc_guest_memory *);
int orc_populate(void *host, size_t size);
void orc_touch(void *host, size_t size);
enum orc_queue_error { ORC_QUEUE_FINE, ORC_QUEUE_ERRORS, ... };
const char *orc_queue_error_name(enum orc_queue_error);

typedef struct orc_virtio orc_virtio;
typedef struct orc_io orc_io;
typedef struct orc_store orc_store;
enum { ORC_QUEUE_MOST, ORC_VIRTIO_QUEUES, ORC_VIRTIO_VECTORS, ORC_VIRTIO_CONFIG, ... };
enum {
	ORC_BAR_COMMON, ORC_BAR_ISR, ORC_BAR_DEVICE, ORC_BAR_NOTIFY, ORC_BAR_TABLE, ORC_BAR_PBA, ORC_BAR_SIZE, ORC_BAR_PART,
	ORC_BAR_COMMON_SIZE, ORC_NOTIFY_MULTIPLIER, ...
};
#define VIRTIO_CONFIG_S_DRIVER_OK ...
#define VIRTIO_CONFIG_S_NEEDS_RESET ...
#define VIRTIO_MSI_NO_VECTOR ...
orc_device *orc_virtio_device(orc_virtio *);
uint16_t orc_virtio_type(const orc_virtio *);
void orc_virtio_stop(orc_virtio *);
uint16_t orc_virtio_queues(const orc_virtio *);
uint16_t orc_virtio_vectors(const orc_virtio *);
uint32_t orc_virtio_config_size(const orc_virtio *);
void orc_virtio_set_kick_fd(orc_virtio *, uint16_t queue, int fd);
void orc_virtio_set_vector_fd(orc_virtio *, uint16_t vector, int fd);
void orc_virtio_set_master(orc_virtio *, bool on);
struct orc_vector { uint64_t address; uint32_t data; bool masked; ...; };
void orc_virtio_vector(orc_virtio *, uint16_t vector, struct orc_vector *out);
int orc_virtio_outstanding(orc_virtio *);
struct orc_virtio_counters { uint64_t requests, interrupts, kicks; uint8_t status; uint16_t error, error_queue; ...; };
void orc_virtio_look(orc_virtio *, struct orc_virtio_counters *out);
struct orc_queue_state {
	uint64_t descriptors, driver, device;
	uint16_t size, vector, next, error;
	bool enabled;
	...;
};
struct orc_virtio_state {
	uint64_t accepted;
	uint32_t device_feature_select, driver_feature_select;
	uint8_t status, isr, generation;
	bool config_changed;
	uint16_t queue_select, config_vector, error, error_queue;
	uint16_t queues, vectors;
	struct orc_queue_state queue[16];
	struct orc_vector vector[17];
	uint32_t pending;
	uint8_t config[128];
	uint8_t kind[64];
	...;
};
void orc_virtio_save(orc_virtio *, struct orc_virtio_state *);
bool orc_virtio_load(orc_virtio *, const struct orc_virtio_state *);
void orc_virtio_power_on(orc_virtio *);

int orc_io_start(const char *name, orc_io **out);
void orc_io_set_voice(orc_io *, orc_vcpu *);
void orc_io_set_bucket(orc_io *, int level, orc_bucket *);
int orc_io_cap(orc_fleet *, orc_io *, double share);
int orc_io_tid(const orc_io *);
int orc_io_attach(orc_io *, orc_virtio *);
void orc_io_detach(orc_io *, orc_virtio *);
void orc_io_hold(orc_io *);
void orc_io_hold_soon(orc_io *);
void orc_io_wait(orc_io *);
bool orc_io_is_still(const orc_io *);
void orc_io_let_go(orc_io *);
void orc_io_stop(orc_io *);
void orc_io_free(orc_io *);

orc_virtio *orc_virtio_rng_new(const orc_guest_memory *);
enum { ORC_CONSOLE_PORTS, ORC_CONSOLE_NAME, ... };
orc_virtio *orc_virtio_console_new(const orc_guest_memory *, orc_console *, uint16_t columns, uint16_t rows, unsigned ports);
void orc_virtio_console_port(orc_virtio *, unsigned port, const char *name, size_t size, orc_console *);
void orc_virtio_console_listen(orc_virtio *);
void orc_virtio_console_stop(orc_virtio *);
void orc_virtio_console_resize(orc_virtio *, uint16_t columns, uint16_t rows);

enum {
	ORC_BALLOON_SHARED, ORC_BALLOON_FILE, ORC_BALLOON_REPORTING, ORC_BALLOON_DEFLATE_ON_OOM, ORC_BALLOON_MUST_TELL_HOST,
	ORC_BALLOON_STATISTICS, ...
};
int orc_virtio_balloon_new(const orc_guest_memory *, unsigned flags, int64_t interval, orc_virtio **out);
void orc_virtio_balloon_set_target(orc_virtio *, uint32_t pages);
struct orc_balloon_counters {
	bool driver;
	uint32_t actual;
	uint64_t inflated, deflated, reported, given_back, failed, updates;
	int64_t updated;
	uint32_t known;
	uint64_t statistic[10];
	...;
};
void orc_virtio_balloon_look(orc_virtio *, struct orc_balloon_counters *out);

orc_virtio *orc_virtio_lent_new(const orc_guest_memory *, uint16_t type, uint16_t queues, uint16_t queue_size, uint64_t features,
				const uint8_t *config, uint32_t config_size);
uint64_t orc_virtio_live_queues(orc_virtio *);
uint64_t orc_virtio_lend(orc_virtio *, struct orc_virtio_state *out);
void orc_virtio_back(orc_virtio *, const uint16_t *next);
void orc_virtio_wake(orc_virtio *, uint16_t queue);
uint32_t orc_virtio_owed(orc_virtio *, uint64_t *kicks);
void orc_virtio_owe(orc_virtio *, uint32_t vectors);

/* ---- spawn.c, uring.h ---- */

typedef struct orc_uring orc_uring;
int orc_uring_new(unsigned entries, orc_uring **out);
void orc_uring_free(orc_uring *);

int orc_spawn(const char *path, char *const *argv, const int *keep, size_t n, int output, int signal, int *pidfd);

/* ---- pci.h ---- */

enum { ORC_PCI_SLOTS, ORC_PCI_SPACE, ORC_PCI_ECAM, ORC_PCI_PORTS, ... };
typedef struct orc_pci orc_pci;
orc_pci *orc_pci_new(void);
orc_device *orc_pci_ecam(orc_pci *);
orc_device *orc_pci_ports(orc_pci *);
int orc_pci_add(orc_pci *, uint32_t slot, const uint8_t *reset, const uint8_t *writable, const uint8_t *effect);
void orc_pci_window(orc_pci *, uint32_t slot, uint32_t capability, orc_device *bar);
bool orc_pci_took_window(orc_pci *, uint32_t slot);
void orc_pci_copy(orc_pci *, uint32_t slot, uint32_t offset, uint32_t size, void *out);
bool orc_pci_load(orc_pci *, uint32_t slot, const uint8_t *bytes);
uint32_t orc_pci_selected(orc_pci *);
void orc_pci_select(orc_pci *, uint32_t value);
void orc_pci_reset(orc_pci *);

enum { ORC_BLK_OPERATIONS, ORC_BLK_SECTORS, ORC_BLK_METERS, ORC_BLK_OWN, ORC_BLK_VM, ORC_BLK_GROUP, ORC_BLK_TENANT, ORC_BLK_LEVELS, ... };
int orc_virtio_blk_new(const orc_guest_memory *, orc_store *, const char *id, orc_virtio **out);
int orc_virtio_blk_set_bucket(orc_virtio *, int meter, int level, orc_bucket *);
void orc_virtio_blk_limit_changed(orc_virtio *);
int orc_virtio_blk_thread(orc_virtio *);
void orc_virtio_blk_close(orc_virtio *);
struct orc_blk_counters {
	uint64_t reads, writes, flushes, discards, zeroes, read_bytes, written_bytes, errors, no_space, waits;
	uint64_t waited[...];
	...;
};
void orc_virtio_blk_look(orc_virtio *, struct orc_blk_counters *out);

/* ---- store.h ---- */

enum { ORC_STORE_READONLY, ORC_STORE_DIRECT, ORC_STORE_NO_URING, ... };
int orc_file_new(int fd, uint64_t size, uint32_t block, unsigned flags, orc_store **out);
int orc_file_block(int fd);
int orc_overlay_create(int fd, uint64_t size);
int orc_overlay_new(int fd, int base, uint64_t base_size, unsigned flags, orc_store **out);
void orc_store_free(orc_store *);

/* ---- decode.c: for its tests ---- */

#define ORC_INSN_OTHER ...
#define ORC_INSN_LOCK ...
#define ORC_INSN_IN ...
#define ORC_INSN_OUT ...
#define ORC_INSN_INS ...
#define ORC_INSN_OUTS ...
#define ORC_INSN_HLT ...
#define ORC_INSN_INT ...
#define ORC_INSN_SYSCALL ...
#define ORC_INSN_FLAGS ...
#define ORC_INSN_WIDE ...
#define ORC_INSN_ILLEGAL ...
#define ORC_NO_REGISTER ...
struct orc_insn {
	uint8_t kind, length, size, address_bits;
	bool rep;
	uint8_t segment, base, index, scale;
	bool relative;
	uint8_t bit_offset;
	int64_t displacement;
	int16_t port;
	...;
};
bool orc_is_prefix(uint8_t byte, int bits);
bool orc_may_matter(const uint8_t *code, size_t n);
bool orc_decode(const uint8_t *code, size_t n, int bits, struct orc_insn *out);
