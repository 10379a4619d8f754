/* The floor: the least that a C program must do for what orchestra does, on the same guest and with the same ioctls.
 *
 *   floor exits  GUEST SECONDS BUSLOCK   one vCPU runs for so long: prints exits, nanoseconds of CPU, of the clock
 *   floor launch GUEST VMS     BUSLOCK   so many one-vCPU VMs up to the first exit of each: prints nanoseconds of the clock, of CPU
 *
 * BUSLOCK is 1 to have bus locks reported. GUEST is loaded at 0x1000 and entered there in real mode. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MEMORY = 1 << 20, LOAD = 0x1000, ENTRIES = 256, BUS_LOCK_EXIT = 193, DETECT = 2 };

static int kvm;
static size_t run_size;
static char image[4096];
static size_t image_size;
static struct kvm_cpuid2 *cpuid;
static sem_t exited;

struct machine {
	int vm, vcpu;
	struct kvm_run *run;
	pthread_t thread;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static int call(int fd, unsigned long request, void *argument, const char *what)
{
	int rc;

	do
		rc = ioctl(fd, request, argument);
	while (rc < 0 && errno == EINTR);
	if (rc < 0)
		die(what);
	return rc;
}
#define CALL(fd, request, argument) call(fd, request, (void *)(uintptr_t)(argument), #request)

/* The same steps in the same order as orchestra's backend/kvm/machine.py. */
static void make(struct machine *m, int bus_locks)
{
	struct kvm_userspace_memory_region region = {.memory_size = MEMORY};
	struct kvm_enable_cap cap = {.cap = BUS_LOCK_EXIT, .args = {DETECT}};
	uint64_t identity = 0xfffbc000;
	struct kvm_regs regs = {.rip = LOAD, .rflags = 2};
	struct kvm_sregs sregs;
	char *memory;

	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap of guest memory");
	m->vm = CALL(kvm, KVM_CREATE_VM, 0);
	CALL(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	CALL(m->vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	if (bus_locks) {
		if (!(CALL(m->vm, KVM_CHECK_EXTENSION, BUS_LOCK_EXIT) & DETECT)) {
			fprintf(stderr, "this host does not report bus locks\n");
			exit(1);
		}
		CALL(m->vm, KVM_ENABLE_CAP, &cap);
	}
	region.userspace_addr = (uintptr_t)memory;
	CALL(m->vm, KVM_SET_USER_MEMORY_REGION, &region);
	CALL(m->vm, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS);
	m->vcpu = CALL(m->vm, KVM_CREATE_VCPU, 0);
	m->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
	if (m->run == MAP_FAILED)
		die("mmap of kvm_run");
	CALL(m->vcpu, KVM_SET_CPUID2, cpuid);
	memcpy(memory + LOAD, image, image_size);
	CALL(m->vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CALL(m->vcpu, KVM_SET_SREGS, &sregs);
	CALL(m->vcpu, KVM_SET_REGS, &regs);
}

/* One exit that the guest can go on from. */
static void run_once(struct machine *m)
{
	while (ioctl(m->vcpu, KVM_RUN, 0) < 0)
		if (errno != EINTR && errno != EAGAIN)
			die("KVM_RUN");
	switch (m->run->exit_reason) {
	case KVM_EXIT_IO:
	case KVM_EXIT_X86_BUS_LOCK:
		return;
	default:
		fprintf(stderr, "unexpected exit %u\n", m->run->exit_reason);
		exit(1);
	}
}

static void *first_exit(void *m)
{
	run_once(m);
	sem_post(&exited);
	pause(); /* alive until the process ends */
	return NULL;
}

static void exits(double seconds, int bus_locks, uint64_t out[3])
{
	struct machine m;
	uint64_t n = 0, start, end, until, cpu;

	make(&m, bus_locks);
	for (int i = 0; i < 100; i++)
		run_once(&m);
	cpu = now(CLOCK_THREAD_CPUTIME_ID);
	start = now(CLOCK_MONOTONIC);
	until = start + (uint64_t)(seconds * 1e9);
	do {
		for (int i = 0; i < 64; i++)
			run_once(&m);
		n += 64;
		end = now(CLOCK_MONOTONIC);
	} while (end < until);
	out[0] = n;
	out[1] = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
	out[2] = end - start;
	munmap(m.run, run_size);
	close(m.vcpu);
	close(m.vm);
}

static void launch(int vms, int bus_locks)
{
	struct machine *machines = calloc((size_t)vms, sizeof *machines);
	uint64_t start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);

	for (int i = 0; i < vms; i++) {
		make(&machines[i], bus_locks);
		if (pthread_create(&machines[i].thread, NULL, first_exit, &machines[i]))
			die("pthread_create");
	}
	for (int i = 0; i < vms; i++)
		while (sem_wait(&exited))
			;
	start = now(CLOCK_MONOTONIC) - start;
	printf("%llu %llu\n", (unsigned long long)start, (unsigned long long)(now(CLOCK_PROCESS_CPUTIME_ID) - cpu));
}

static void prepare(const char *path)
{
	FILE *guest = fopen(path, "rb");

	if (!guest)
		die(path);
	image_size = fread(image, 1, sizeof image, guest);
	fclose(guest);
	if (kvm)
		return;
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	run_size = (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	cpuid = calloc(1, sizeof *cpuid + ENTRIES * sizeof cpuid->entries[0]);
	cpuid->nent = ENTRIES;
	CALL(kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
}

/* The same loop for another program, on its thread, if this is compiled as a library. */
void floor_exits(const char *path, double seconds, int bus_locks, uint64_t out[3])
{
	prepare(path);
	exits(seconds, bus_locks, out);
}

/* A question and its answer between two threads, with nothing on either side: an eventfd there, a futex back. `pings` asks for
 * so long; whoever waits for the eventfd calls `pong`. Returns nanoseconds for each. */
static _Atomic uint32_t answers;

double floor_pings(int eventfd, double seconds)
{
	uint64_t n = 0, one = 1, start = now(CLOCK_MONOTONIC), end, until = start + (uint64_t)(seconds * 1e9);

	do {
		uint32_t seen = atomic_load(&answers);

		if (write(eventfd, &one, sizeof one) < 0)
			die("write to an eventfd");
		while (atomic_load(&answers) == seen)
			syscall(SYS_futex, &answers, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, seen, NULL, NULL, 0);
		n++;
		end = now(CLOCK_MONOTONIC);
	} while (end < until);
	return (double)(end - start) / (double)n;
}

void floor_pong(int eventfd)
{
	uint64_t count;

	if (read(eventfd, &count, sizeof count) < 0)
		return; /* nobody asked */
	atomic_fetch_add(&answers, 1);
	syscall(SYS_futex, &answers, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
}

static void *pongs(void *eventfd)
{
	struct epoll_event event = {.events = EPOLLIN};
	int fd = *(int *)eventfd, epoll = epoll_create1(EPOLL_CLOEXEC);

	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	for (;;) {
		pthread_testcancel();
		epoll_wait(epoll, &event, 1, -1); /* a cancellation point */
		floor_pong(fd);
	}
	return NULL;
}

/* Both sides in C. */
double floor_ping_pong(double seconds)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_t other;
	double each;

	if (fd < 0 || pthread_create(&other, NULL, pongs, &fd))
		die("ping-pong");
	each = floor_pings(fd, seconds);
	pthread_cancel(other);
	pthread_join(other, NULL);
	close(fd);
	return each;
}

int main(int argc, char **argv)
{
	uint64_t out[3];

	if (argc != 5)
		return 2;
	prepare(argv[2]);
	sem_init(&exited, 0, 0);
	if (!strcmp(argv[1], "exits")) {
		exits(atof(argv[3]), atoi(argv[4]), out);
		printf("%llu %llu %llu\n", (unsigned long long)out[0], (unsigned long long)out[1], (unsigned long long)out[2]);
	} else if (!strcmp(argv[1], "launch"))
		launch(atoi(argv[3]), atoi(argv[4]));
	else
		return 2;
	fflush(stdout);
	_exit(0); /* the kernel takes the threads and VMs down, outside the measurement */
}
