#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

enum { SIZE = 0x10000, LOAD = 0x1000, PORT = 0x500, NOBODY = 0x80, STOP = 1 };

/* 16-bit guests, position: LOAD. */
#define GUEST(name, code)                                                                                              \
	extern const uint8_t name[], name##_end[];                                                                     \
	__asm__(".pushsection .rodata\n.code16\n" #name ":\n" code "\n" #name "_end:\n.code64\n.popsection\n")

GUEST(spin, "1: jmp 1b");
GUEST(ports, "mov $0x80, %dx; mov $1, %al; out %al, %dx; out %ax, %dx;" /* nobody there */
	     "in %dx, %eax; mov %eax, 0x3000;"
	     "mov $0x500, %dx; mov $0x41, %al; out %al, %dx;"
	     "in %dx, %ax; mov %ax, 0x3004; hlt");
GUEST(strings, "cld; mov $0x500, %dx; mov $0x2000, %si; mov $5, %cx; rep outsb;"
	       "mov $0x3000, %di; mov $5, %cx; rep insb;"
	       "mov $0x80, %dx; mov $4, %cx; rep insw;"
	       "mov $0x2000, %si; mov $5, %cx; rep outsb; hlt");
GUEST(writes, "incw 0x3000; incw 0x3ffe; incw 0x5000; incw 0xf000; hlt");
GUEST(keeps_writing, "1: incw 0x3000; incw 0x5000; incw 0xf000; jmp 1b");
enum { WRITES = 3 }; /* pages of both */

struct guest {
	int kvm, vm, fd;
	uint8_t *memory;
	struct kvm_run *run;
	size_t run_size;
	orc_fleet *fleet;
	orc_vcpu *vcpu;
	orc_bus *ports, *mmio;
};

static bool guest_new(struct guest *g, const uint8_t *code, const uint8_t *end)
{
	struct kvm_userspace_memory_region region = {.memory_size = SIZE};
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = LOAD, .rflags = 2};

	g->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (g->kvm < 0) {
		skipped = errno == ENOENT ? "no /dev/kvm here" : "/dev/kvm does not open (permissions?)";
		return false;
	}
	CHECK(!orc_signal_install());
	g->vm = (int)orc_ioctl_value(g->kvm, KVM_CREATE_VM, 0);
	CHECK(g->vm >= 0, "%d", g->vm);
	g->memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	region.userspace_addr = (uintptr_t)g->memory;
	CHECK(!orc_ioctl_value(g->vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	CHECK(!orc_ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &region));
	g->fd = (int)orc_ioctl_value(g->vm, KVM_CREATE_VCPU, 0);
	CHECK(g->fd >= 0, "%d", g->fd);
	g->run_size = (size_t)orc_ioctl_value(g->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	g->run = mmap(NULL, g->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
	CHECK(g->run != MAP_FAILED);
	CHECK(!orc_ioctl(g->fd, KVM_GET_SREGS, &sregs));
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK(!orc_ioctl(g->fd, KVM_SET_SREGS, &sregs));
	CHECK(!orc_ioctl(g->fd, KVM_SET_REGS, &regs));
	memcpy(g->memory + LOAD, code, (size_t)(end - code));
	g->fleet = orc_fleet_new();
	g->vcpu = orc_vcpu_new(g->fleet, 0, 64);
	g->ports = orc_bus_new();
	g->mmio = orc_bus_new();
	orc_vcpu_set_buses(g->vcpu, g->ports, g->mmio);
	orc_vcpu_bind_kvm(g->vcpu, g->fd, g->run, false);
	return true;
}

static void guest_free(struct guest *g)
{
	orc_vcpu_free(g->vcpu);
	orc_bus_free(g->ports);
	orc_bus_free(g->mmio);
	orc_fleet_free(g->fleet);
	munmap(g->run, g->run_size);
	close(g->fd);
	close(g->vm);
	munmap(g->memory, SIZE);
	close(g->kvm);
}

/* Python answers there, and nowhere else. */
static void claim(orc_bus *bus, orc_u64 start, orc_u64 count)
{
	const struct orc_claim claim = {.start = start, .last = start + count - 1, .version = 1};

	CHECK(!orc_bus_replace(bus, &claim, 1));
}

/* ---- a kernel that a test plays ------------------------------------------------------------------------------- */

static int (*played)(unsigned long request, void *argument);
int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, void *argument);

int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
	return played ? played(request, argument) : __real_ioctl(fd, request, argument);
}

static struct orc_counters counters(const orc_vcpu *v)
{
	struct orc_counters out;

	orc_vcpu_counters(v, &out, orc_now());
	return out;
}

static void accesses_to_claimed_ports_come_out_and_others_stay_in_the_loop(void)
{
	struct guest g;
	struct orc_access *access;
	uint32_t value;

	if (!guest_new(&g, ports, ports_end))
		return;
	orc_vcpu_attach(g.vcpu);
	claim(g.ports, PORT, 2);
	access = orc_vcpu_access(g.vcpu);

	CHECK(orc_kvm_run(g.vcpu) == ORC_IO);
	CHECK(access->address == PORT && access->write && access->size == 1 && access->count == 1);
	CHECK(access->data[0] == 0x41);
	CHECK(counters(g.vcpu).unclaimed == 3);

	CHECK(orc_kvm_run(g.vcpu) == ORC_IO);
	CHECK(access->address == PORT && !access->write && access->size == 2);
	memcpy(access->data, "\x34\x12", 2);

	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(orc_vcpu_record(g.vcpu)->reason == KVM_EXIT_HLT);
	memcpy(&value, g.memory + 0x3000, 4);
	CHECK(value == 0xffffffff, "nobody drives the bus: %#x", value);
	CHECK(g.memory[0x3004] == 0x34 && g.memory[0x3005] == 0x12);
	CHECK(counters(g.vcpu).exits[KVM_EXIT_IO] == 5 && counters(g.vcpu).exits[KVM_EXIT_HLT] == 1);
	orc_vcpu_detach(g.vcpu);
	guest_free(&g);
}

static void string_instructions_on_ports_move_every_byte(void)
{
	struct guest g;
	struct orc_access *access;
	char written[16] = "";
	size_t out = 0, in = 0;
	enum orc_why why;

	if (!guest_new(&g, strings, strings_end))
		return;
	memcpy(g.memory + 0x2000, "hello", 5);
	memset(g.memory + 0x3000, 0, 16);
	orc_vcpu_attach(g.vcpu);
	claim(g.ports, PORT - 1, 3);
	claim(g.ports, PORT, 2);
	access = orc_vcpu_access(g.vcpu);
	/* A host may split a string instruction into several exits. */
	while ((why = orc_kvm_run(g.vcpu)) == ORC_IO) {
		CHECK(access->address == PORT && access->size == 1);
		for (uint32_t i = 0; i < access->count; i++) {
			CHECK(out + in < 10);
			if (access->write)
				written[out++] = (char)access->data[i];
			else
				access->data[i] = (uint8_t)"WORLD"[in++];
		}
	}
	CHECK(why == ORC_EXIT && orc_vcpu_record(g.vcpu)->reason == KVM_EXIT_HLT, "%d %d", why,
	      orc_vcpu_record(g.vcpu)->reason);
	CHECK(!strcmp(written, "hello"), "%s", written);
	CHECK(!memcmp(g.memory + 0x3000, "WORLD\xff\xff\xff\xff\xff\xff\xff\xff\0", 14));
	CHECK(counters(g.vcpu).unclaimed >= 2);
	orc_vcpu_detach(g.vcpu);
	guest_free(&g);
}

static void a_command_during_an_answer_comes_after_the_access_is_finished(void)
{
	struct guest g;
	struct kvm_regs regs;

	if (!guest_new(&g, ports, ports_end))
		return;
	orc_vcpu_attach(g.vcpu);
	claim(g.ports, PORT, 2);
	CHECK(orc_kvm_run(g.vcpu) == ORC_IO);
	CHECK(orc_kvm_run(g.vcpu) == ORC_IO);
	memcpy(orc_vcpu_access(g.vcpu)->data, "\x34\x12", 2);
	orc_vcpu_command(g.vcpu, STOP, 0);
	CHECK(orc_kvm_run(g.vcpu) == ORC_COMMAND);
	CHECK(!orc_ioctl(g.fd, KVM_GET_REGS, &regs));
	CHECK((regs.rax & 0xffff) == 0x1234, "registers are what the guest would see: %#llx", regs.rax);
	CHECK(orc_kvm_run(g.vcpu) == ORC_COMMAND, "it stays until somebody clears it");
	orc_vcpu_command(g.vcpu, 0, STOP);
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(g.memory[0x3004] == 0x34);
	orc_vcpu_detach(g.vcpu);
	guest_free(&g);
}

static void exits_are_held_to_their_limit_in_the_loop(void)
{
	struct guest g;
	orc_bucket *b = orc_bucket_new();
	orc_ns before;

	if (!guest_new(&g, ports, ports_end)) {
		orc_bucket_free(b);
		return;
	}
	orc_vcpu_attach(g.vcpu);
	orc_vcpu_set_bucket(g.vcpu, ORC_EXITS, 0, b);
	before = orc_now();
	orc_bucket_set(b, 1000, 1, -1, before);
	while (orc_kvm_run(g.vcpu) != ORC_EXIT) /* 3 unclaimed accesses stay in the loop; hlt is the fourth */
		;
	CHECK(orc_now() - before >= 3000000);
	CHECK(counters(g.vcpu).waits >= 3);
	orc_vcpu_detach(g.vcpu);
	guest_free(&g);
	orc_bucket_free(b);
}

/* ---- kicks ---------------------------------------------------------------------------------------------------- */

enum { KICKERS = 2, KICKS = 1000, END_BIT = 1u << 31 };

struct kicker {
	struct guest *guest;
	uint32_t bit;
	_Atomic int answered;
};
static struct kicker kickers[KICKERS];

static void *run_guest(void *argument)
{
	struct guest *g = argument;
	uint32_t commands;

	orc_vcpu_attach(g->vcpu);
	do {
		CHECK(orc_kvm_run(g->vcpu) == ORC_COMMAND);
		commands = orc_vcpu_commands(g->vcpu);
		CHECK(commands, "a kick without a command came out");
		atomic_fetch_and(&g->vcpu->commands, ~commands);
		for (int i = 0; i < KICKERS; i++)
			if (commands & kickers[i].bit)
				atomic_fetch_add(&kickers[i].answered, 1);
	} while (!(commands & END_BIT));
	orc_vcpu_detach(g->vcpu);
	return NULL;
}

static void *kick(void *argument)
{
	struct kicker *k = argument;
	uint64_t seed = k->bit;

	for (int i = 1; i <= KICKS; i++) {
		orc_ns deadline = orc_now() + PATIENCE;

		for (uint64_t spin = random_number(&seed) % 20000; spin--;)
			atomic_signal_fence(memory_order_seq_cst);
		orc_vcpu_command(k->guest->vcpu, k->bit, 0);
		while (atomic_load(&k->answered) < i) {
			CHECK(orc_now() < deadline, "kick %d was lost", i);
			sched_yield();
		}
	}
	return NULL;
}

static void two_threads_kick_a_spinning_guest_2000_times_and_none_is_lost(void)
{
	struct guest g;
	pthread_t runner, threads[KICKERS];

	if (!guest_new(&g, spin, spin_end))
		return;
	for (int i = 0; i < KICKERS; i++) {
		kickers[i].guest = &g;
		kickers[i].bit = 1u << i;
		kickers[i].answered = 0;
	}
	runner = start(run_guest, &g);
	for (int i = 0; i < KICKERS; i++)
		threads[i] = start(kick, &kickers[i]);
	for (int i = 0; i < KICKERS; i++) {
		join(threads[i]);
		CHECK(kickers[i].answered == KICKS);
	}
	orc_vcpu_command(g.vcpu, END_BIT, 0);
	join(runner);
	CHECK(counters(g.vcpu).kicks > 0);
	guest_free(&g);
}

static void a_kick_just_before_the_guest_is_entered_holds_until_then(void)
{
	struct guest g;

	if (!guest_new(&g, ports, ports_end))
		return;
	orc_vcpu_attach(g.vcpu);
	orc_vcpu_kick(g.vcpu); /* nobody is in the guest: no signal, and the flag alone has to do */
	CHECK(g.run->immediate_exit);
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(!g.run->immediate_exit, "the runner clears it");
	CHECK(counters(g.vcpu).kicks == 1);
	orc_vcpu_detach(g.vcpu);
	guest_free(&g);
}

/* ---- dirty logs ------------------------------------------------------------------------------------------------- */

static struct kvm_userspace_memory_region whole(const struct guest *g)
{
	return (struct kvm_userspace_memory_region){.memory_size = SIZE, .userspace_addr = (uintptr_t)g->memory};
}

static struct orc_dirty_sums dirty_sums(orc_dirty *d)
{
	struct orc_dirty_sums out;

	orc_dirty_sums(d, &out);
	return out;
}

static void ones_are_counted_in_every_word(void)
{
	uint64_t words[100], seed = 7;
	orc_u64 ones = 0;

	for (int i = 0; i < 100; i++) {
		words[i] = i % 3 ? 0 : random_number(&seed) & random_number(&seed);
		for (int bit = 0; bit < 64; bit++)
			ones += words[i] >> bit & 1;
	}
	CHECK(orc_dirty_ones(words, 100) == ones);
	CHECK(orc_dirty_ones(words, 0) == 0);
	memset(words, 0xff, sizeof(words));
	CHECK(orc_dirty_ones(words, 100) == 6400);
}

static void a_reading_counts_each_page_once_and_starts_the_log_over(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slot;
	orc_dirty *d;

	if (!guest_new(&g, writes, writes_end))
		return;
	slot = whole(&g);
	d = orc_dirty_new(g.vm, &slot, 1);
	CHECK(!orc_dirty_read(&d, 1));
	CHECK(!dirty_sums(d).on && !dirty_sums(d).read, "what is not logged is not read");
	CHECK(!orc_dirty_log(d, true));
	CHECK(dirty_sums(d).on && slot.flags == KVM_MEM_LOG_DIRTY_PAGES);
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(!orc_dirty_read(&d, 1));
	CHECK(dirty_sums(d).pages == WRITES && dirty_sums(d).read, "%llu", (unsigned long long)dirty_sums(d).pages);
	CHECK(!orc_dirty_read(&d, 1));
	CHECK(dirty_sums(d).pages == WRITES);
	CHECK(!orc_dirty_log(d, false));
	CHECK(!dirty_sums(d).on && !slot.flags);
	orc_dirty_free(d);
	guest_free(&g);
}

static void what_was_written_before_logging_ends_counts(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slot;
	orc_dirty *d;

	if (!guest_new(&g, writes, writes_end))
		return;
	slot = whole(&g);
	d = orc_dirty_new(g.vm, &slot, 1);
	CHECK(!orc_dirty_log(d, true));
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(!orc_dirty_log(d, false));
	CHECK(dirty_sums(d).pages == WRITES);
	CHECK(!orc_dirty_log(d, true));
	CHECK(!orc_dirty_read(&d, 1));
	CHECK(dirty_sums(d).pages == WRITES, "a log that begins anew is empty");
	orc_dirty_free(d);
	guest_free(&g);
}

static void logging_is_all_or_nothing_and_leaves_out_what_the_guest_may_not_write(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slots[3];
	orc_dirty *d;

	if (!guest_new(&g, writes, writes_end))
		return;
	slots[0] = whole(&g);
	slots[1] = (struct kvm_userspace_memory_region){.slot = 1, .flags = KVM_MEM_READONLY, .guest_phys_addr = SIZE,
							.memory_size = 0x1000, .userspace_addr = slots[0].userspace_addr};
	slots[2] = slots[1];
	slots[2].slot = 2;
	slots[2].flags = 0;
	slots[2].guest_phys_addr = 2 * SIZE;
	CHECK(!orc_ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &slots[1]));
	CHECK(!orc_ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &slots[2]));
	slots[2].memory_size = 0x2000; /* not so: the kernel refuses what would change it */
	d = orc_dirty_new(g.vm, slots, 3);
	CHECK(orc_dirty_log(d, true) == -EINVAL);
	CHECK(!dirty_sums(d).on && !slots[0].flags && slots[1].flags == KVM_MEM_READONLY && !slots[2].flags);
	slots[2].memory_size = 0x1000;
	CHECK(!orc_dirty_log(d, true));
	CHECK(slots[0].flags == KVM_MEM_LOG_DIRTY_PAGES && slots[1].flags == KVM_MEM_READONLY);
	CHECK(slots[2].flags == KVM_MEM_LOG_DIRTY_PAGES);
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(!orc_dirty_read(&d, 1));
	CHECK(dirty_sums(d).pages == WRITES);
	orc_dirty_free(d);
	guest_free(&g);
}

static void a_log_that_cant_be_read_is_told_and_the_others_are_read(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slots[2];
	orc_dirty *logs[2];

	if (!guest_new(&g, writes, writes_end))
		return;
	slots[0] = slots[1] = whole(&g);
	slots[0].slot = 5; /* there is none */
	slots[0].flags = KVM_MEM_LOG_DIRTY_PAGES;
	for (int i = 0; i < 2; i++)
		logs[i] = orc_dirty_new(g.vm, &slots[i], 1);
	CHECK(!orc_dirty_log(logs[1], true));
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(orc_dirty_read(logs, 2) == -ENOENT);
	CHECK(!dirty_sums(logs[0]).read && dirty_sums(logs[1]).pages == WRITES);
	for (int i = 0; i < 2; i++)
		orc_dirty_free(logs[i]);
	guest_free(&g);
}

static void readers_and_the_count_get_the_same_pages_and_none_gets_those_before_it_came(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slot;
	orc_dirty_reader *first, *late;
	uint64_t bitmap[(SIZE >> 12) / 64 + 1];
	size_t words;
	orc_dirty *d;

	if (!guest_new(&g, writes, writes_end))
		return;
	slot = whole(&g);
	d = orc_dirty_new(g.vm, &slot, 1);
	words = orc_dirty_words(d);
	CHECK(words <= sizeof(bitmap) / sizeof(*bitmap));
	CHECK(!orc_dirty_log(d, true) && !orc_dirty_open(d, &first));
	CHECK(orc_kvm_run(g.vcpu) == ORC_EXIT);
	CHECK(!orc_dirty_read(&d, 1) && dirty_sums(d).pages == WRITES);
	CHECK(!orc_dirty_open(d, &late));
	CHECK(!orc_dirty_take(late, bitmap) && orc_dirty_ones(bitmap, words) == 0);
	CHECK(!orc_dirty_take(first, bitmap) && orc_dirty_ones(bitmap, words) == WRITES);
	CHECK(!orc_dirty_take(first, bitmap) && orc_dirty_ones(bitmap, words) == 0);
	orc_dirty_mark(d, 0xfff, 2); /* the host writes over the end of a page */
	CHECK(!orc_dirty_take(late, bitmap) && bitmap[0] == 3);
	CHECK(!orc_dirty_log(d, false) && slot.flags == KVM_MEM_LOG_DIRTY_PAGES, "still logged, for the readers");
	CHECK(!orc_dirty_shut(late) && slot.flags == KVM_MEM_LOG_DIRTY_PAGES);
	orc_dirty_close(d);
	CHECK(!orc_dirty_take(first, bitmap) && bitmap[0] == 3, "what was not taken stays");
	CHECK(!orc_dirty_shut(first));
	orc_dirty_free(d);
	guest_free(&g);
}

static void a_reader_that_nobody_shut_goes_with_its_log(void)
{
	struct kvm_userspace_memory_region slot;
	struct guest g;
	orc_dirty_reader *open;
	orc_dirty *d;

	if (!guest_new(&g, writes, writes_end))
		return;
	slot = whole(&g);
	d = orc_dirty_new(g.vm, &slot, 1);
	CHECK(!orc_dirty_open(d, &open));
	open = NULL; /* so that AddressSanitizer looks for its memory in vain */
	orc_dirty_close(d);
	orc_dirty_free(d);
	guest_free(&g);
}

enum { READINGS = 200 };

static void *read_often(void *argument)
{
	orc_dirty *d = argument;

	for (int i = 0; i < READINGS; i++)
		CHECK(!orc_dirty_read(&d, 1));
	return NULL;
}

static void *switch_often(void *argument)
{
	for (int i = 0; i < READINGS / 10; i++)
		CHECK(!orc_dirty_log(argument, i % 2));
	return NULL;
}

static void *run_until_told(void *argument)
{
	struct guest *g = argument;

	orc_vcpu_attach(g->vcpu);
	CHECK(orc_kvm_run(g->vcpu) == ORC_COMMAND);
	orc_vcpu_detach(g->vcpu);
	return NULL;
}

static void a_log_may_be_read_switched_and_closed_by_several_threads_at_once(void)
{
	struct guest g;
	struct kvm_userspace_memory_region slot;
	pthread_t runner, threads[3];
	orc_dirty *d;

	if (!guest_new(&g, keeps_writing, keeps_writing_end))
		return;
	slot = whole(&g);
	d = orc_dirty_new(g.vm, &slot, 1);
	CHECK(!orc_dirty_log(d, true));
	runner = start(run_until_told, &g);
	while (!dirty_sums(d).pages) /* until the guest has had a CPU */
		CHECK(!orc_dirty_read(&d, 1));
	threads[0] = start(read_often, d);
	threads[1] = start(read_often, d);
	threads[2] = start(switch_often, d);
	for (int i = 0; i < 3; i++)
		join(threads[i]);
	CHECK(dirty_sums(d).pages > 0 && dirty_sums(d).pages <= WRITES * (1 + 2 * READINGS + READINGS / 10));
	threads[0] = start(read_often, d);
	orc_dirty_close(d); /* in the middle of it */
	orc_vcpu_command(g.vcpu, STOP, 0);
	join(runner);
	join(threads[0]);
	CHECK(!orc_dirty_log(d, true) && !orc_dirty_log(d, false) && !dirty_sums(d).on, "nothing to log any more");
	orc_dirty_free(d);
	guest_free(&g);
}

/* ---- who subscribes between an exit and its record ------------------------------------------------------------ */

static union {
	struct kvm_run run;
	uint8_t page[8192];
} shared;
static orc_vcpu *subscribed;
static int entries;

static int three_locked_outs(unsigned long request, void *argument)
{
	(void)argument;
	if (request != KVM_RUN)
		return 0;
	shared.run.exit_reason = entries < 3 ? KVM_EXIT_IO : KVM_EXIT_HLT;
	shared.run.flags = entries < 3 ? KVM_RUN_X86_BUS_LOCK : 0;
	shared.run.io.direction = KVM_EXIT_IO_OUT;
	shared.run.io.size = 1;
	shared.run.io.count = 1;
	shared.run.io.port = (uint16_t)(NOBODY + entries);
	shared.run.io.data_offset = 4096;
	shared.page[4096] = (uint8_t)entries;
	entries++;
	return 0;
}

/* Asked while an exit is accounted: that is when somebody subscribes. */
static bool subscribe(orc_vcpu *v, const struct orc_record *record, struct orc_site *site)
{
	(void)record, (void)site;
	if (entries == 2)
		orc_vcpu_subscribe(v, UINT64_MAX);
	return false;
}

static void a_subscription_in_the_middle_of_an_exit_is_told_the_next_and_nothing_stale(void)
{
	static const struct orc_witness witness = {.registers = subscribe};
	orc_fleet *f = orc_fleet_new();
	struct orc_record out[8];

	subscribed = orc_vcpu_new(f, 0, 64);
	orc_vcpu_bind_kvm(subscribed, -1, &shared.run, false);
	subscribed->witness = &witness;
	orc_vcpu_sample(subscribed, 1);
	entries = 0;
	played = three_locked_outs;
	CHECK(orc_kvm_run(subscribed) == ORC_EXIT);
	played = NULL;
	/* Of the second nobody had asked when it was described. */
	CHECK(orc_fleet_drain(f, out, 8) == 2);
	CHECK(out[0].reason == KVM_EXIT_IO && out[0].arg[0] == NOBODY + 2, "%#llx", (unsigned long long)out[0].arg[0]);
	CHECK(out[0].data_size == 1 && out[0].data[0] == 2 && out[1].reason == KVM_EXIT_HLT);
	orc_vcpu_free(subscribed);
	orc_fleet_free(f);
}

static int exits_that_need_nothing(unsigned long request, void *argument)
{
	static const unsigned reasons[] = {KVM_EXIT_SET_TPR, KVM_EXIT_TPR_ACCESS, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_INTR,
					   KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_X86_BUS_LOCK};

	(void)argument;
	if (request == KVM_RUN) {
		shared.run.exit_reason = entries < 600 ? reasons[entries % 6] : KVM_EXIT_HLT;
		shared.run.flags = 0;
		entries++;
	}
	return 0;
}

static void the_clock_is_read_only_if_somebody_needs_the_time(void)
{
	enum { EXITS = 601 };
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 0, 1024);
	orc_bucket *b = orc_bucket_new();
	int before;

	orc_vcpu_bind_kvm(v, -1, &shared.run, false);
	orc_vcpu_set_bucket(v, ORC_EXITS, ORC_VM, b);
	for (int needed = 0; needed < 3; needed++) { /* by nobody, by a limit, by who listens */
		orc_bucket_set(b, needed == 1 ? 1e9 : 0, 1e6, -1, orc_now());
		orc_vcpu_subscribe(v, needed == 2 ? UINT64_MAX : 0);
		entries = 0;
		before = clock_reads;
		played = exits_that_need_nothing;
		CHECK(orc_kvm_run(v) == ORC_EXIT);
		played = NULL;
		CHECK(clock_reads - before == (needed ? EXITS : 0), "%d", clock_reads - before);
	}
	orc_vcpu_free(v);
	orc_bucket_free(b);
	orc_fleet_free(f);
}

static void exits_that_need_nothing_done_stay_in_the_loop(void)
{
	orc_fleet *f = orc_fleet_new();
	orc_vcpu *v = orc_vcpu_new(f, 0, 64);
	struct orc_counters out;

	orc_vcpu_bind_kvm(v, -1, &shared.run, false);
	entries = 0;
	played = exits_that_need_nothing;
	CHECK(orc_kvm_run(v) == ORC_EXIT);
	played = NULL;
	CHECK(shared.run.exit_reason == KVM_EXIT_HLT, "%u came out", shared.run.exit_reason);
	orc_vcpu_counters(v, &out, orc_now());
	CHECK(out.exits[KVM_EXIT_SET_TPR] == 100 && out.exits[KVM_EXIT_IOAPIC_EOI] == 100);
	orc_vcpu_free(v);
	orc_fleet_free(f);
}

/* ---- the builder ---- */

static _Atomic int vms_made, newest_vm;
static unsigned long refused;

static int makes_vms(unsigned long request, void *argument)
{
	int vm;

	(void)argument;
	if (request == refused) {
		errno = ENOMEM;
		return -1;
	}
	if (request != KVM_CREATE_VM)
		return 0;
	vm = newest_vm = open("/dev/null", O_RDWR | O_CLOEXEC); /* two threads may be here */
	vms_made++;
	return vm;
}

static void wait_done(int done)
{
	eventfd_t times;

	CHECK(!eventfd_read(done, &times) && times == 1);
}

static void a_builder_makes_one_vm_ahead_and_takes_it_for_the_next_plan(void)
{
	orc_builder *b = orc_builder_new();
	int done = eventfd(0, EFD_CLOEXEC), ahead = -1;
	orc_ns since = 0;
	bool late = false; /* a test that had no CPU for so long finds the spare VM gone */

	vms_made = 0;
	refused = 0;
	played = makes_vms;
	for (int i = 1; i <= 3; i++) {
		struct orc_plan plan = {.kvm = 5, .vm = -1};

		CHECK(!orc_builder_begin(b, &plan, done));
		wait_done(done);
		CHECK(!plan.result && plan.vm >= 0);
		late = late || (since && orc_now() - since > SECOND / 2);
		CHECK(ahead < 0 || late || plan.vm == ahead, "%d, not %d", plan.vm, ahead);
		while (vms_made <= i)
			usleep(100);
		ahead = newest_vm;
		since = orc_now();
		close(plan.vm);
	}
	orc_builder_free(b);
	played = NULL;
	CHECK(late || vms_made == 4, "%d", vms_made);
	CHECK(fcntl(ahead, F_GETFD) < 0 && errno == EBADF);
	close(done);
}

static void a_spare_vm_goes_if_nothing_is_launched(void)
{
	orc_builder *b = orc_builder_new();
	struct orc_plan plan = {.kvm = 5, .vm = -1};
	int done = eventfd(0, EFD_CLOEXEC);

	vms_made = 0;
	played = makes_vms;
	CHECK(!orc_builder_begin(b, &plan, done));
	wait_done(done);
	close(plan.vm);
	while (vms_made < 2)
		usleep(100);
	for (int i = 0; i < 1000 && fcntl(newest_vm, F_GETFD) >= 0; i++)
		usleep(10000);
	CHECK(fcntl(newest_vm, F_GETFD) < 0);
	orc_builder_free(b);
	played = NULL;
	close(done);
}

static void a_plan_that_fails_says_at_which_step_and_nothing_is_made_ahead(void)
{
	orc_builder *b = orc_builder_new();
	struct orc_plan plan = {.kvm = 5, .vm = -1};
	int done = eventfd(0, EFD_CLOEXEC);

	refused = KVM_SET_TSS_ADDR;
	vms_made = 0;
	played = makes_vms;
	CHECK(!orc_builder_begin(b, &plan, done));
	wait_done(done);
	CHECK(plan.result == -ENOMEM && !strcmp(plan.step, "KVM_SET_TSS_ADDR"));
	CHECK(!close(plan.vm)); /* its owner's, as far as it got */
	usleep(10000);
	orc_builder_free(b);
	CHECK(vms_made == 1, "%d", vms_made); /* the host lacks something: nothing is made ahead */
	refused = 0;
	played = NULL;
	close(done);
}

static void plans_that_wait_are_made_before_a_builder_goes(void)
{
	enum { PLANS = 100 };
	orc_builder *b = orc_builder_new();
	struct orc_plan plans[PLANS];
	int done[PLANS];

	played = makes_vms;
	for (int i = 0; i < PLANS; i++) {
		plans[i] = (struct orc_plan){.kvm = 5, .vm = -1};
		done[i] = eventfd(0, EFD_CLOEXEC);
		CHECK(!orc_builder_begin(b, &plans[i], done[i]));
	}
	orc_builder_free(b);
	played = NULL;
	for (int i = 0; i < PLANS; i++) {
		wait_done(done[i]);
		CHECK(!plans[i].result && !close(plans[i].vm));
		close(done[i]);
	}
}

static void the_signal_may_be_installed_again(void)
{
	CHECK(!orc_signal_install());
	CHECK(!orc_signal_install());
}

const struct test kvm_tests[] = {
	TEST(the_signal_may_be_installed_again),
	TEST(a_subscription_in_the_middle_of_an_exit_is_told_the_next_and_nothing_stale),
	TEST(exits_that_need_nothing_done_stay_in_the_loop),
	TEST(the_clock_is_read_only_if_somebody_needs_the_time),
	TEST(accesses_to_claimed_ports_come_out_and_others_stay_in_the_loop),
	TEST(string_instructions_on_ports_move_every_byte),
	TEST(a_command_during_an_answer_comes_after_the_access_is_finished),
	TEST(exits_are_held_to_their_limit_in_the_loop),
	TEST(a_kick_just_before_the_guest_is_entered_holds_until_then),
	TEST(two_threads_kick_a_spinning_guest_2000_times_and_none_is_lost),
	TEST(a_builder_makes_one_vm_ahead_and_takes_it_for_the_next_plan),
	TEST(a_spare_vm_goes_if_nothing_is_launched),
	TEST(a_plan_that_fails_says_at_which_step_and_nothing_is_made_ahead),
	TEST(plans_that_wait_are_made_before_a_builder_goes),
	TEST(ones_are_counted_in_every_word),
	TEST(a_reading_counts_each_page_once_and_starts_the_log_over),
	TEST(what_was_written_before_logging_ends_counts),
	TEST(logging_is_all_or_nothing_and_leaves_out_what_the_guest_may_not_write),
	TEST(a_log_that_cant_be_read_is_told_and_the_others_are_read),
	TEST(readers_and_the_count_get_the_same_pages_and_none_gets_those_before_it_came),
	TEST(a_reader_that_nobody_shut_goes_with_its_log),
	TEST(a_log_may_be_read_switched_and_closed_by_several_threads_at_once),
	{NULL, NULL},
};
