/* The whole user space of a measured Linux guest: /init of its initrd, static.
 *
 *   says "init" on the console; loads the modules of the initrd, *.ko in the order of their names, and says "ready";
 *   then does what the host types, a line each, and answers with a line that begins with "did" or "failed"
 *
 *     read FILE SIZE DEEP RANDOM MS    reads of a disk, so many at the same time, past the page cache: bytes and nanoseconds
 *     work MS                          arithmetic on CPU 0: rounds
 *     cpus                             how many are up
 *     offend                           a process on the last CPU makes split locks for ever
 *     desist                           and is ended
 *     off                              powers off */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { DEEPEST = 64, LINE = 256 };

static long cpus;

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void failed(const char *what)
{
	printf("failed: %s: %s\n", what, strerror(errno));
	for (;;)
		pause();
}

/* ---- modules ----------------------------------------------------------------------------------------------------- */

static int is_module(const struct dirent *entry)
{
	return strstr(entry->d_name, ".ko") != NULL;
}

static void load_modules(void)
{
	struct dirent **found;
	int n = scandir("/", &found, is_module, alphasort);

	for (int i = 0; i < n; i++) {
		char path[LINE + 8];
		int fd;

		snprintf(path, sizeof path, "/%s", found[i]->d_name);
		fd = open(path, O_RDONLY);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != ENODEV))
			failed(path);
		close(fd);
	}
}

/* ---- a disk ------------------------------------------------------------------------------------------------------ */

static uint64_t drawn = 88172645463325252ull; /* xorshift64 (Marsaglia) */

static uint64_t draw(void)
{
	drawn ^= drawn << 13;
	drawn ^= drawn >> 7;
	return drawn ^= drawn << 17;
}

static void read_disk(const char *path, size_t size, unsigned deep, int random, int64_t milliseconds)
{
	static struct iocb cb[DEEPEST];
	static struct io_event done[DEEPEST];
	struct iocb *next[DEEPEST];
	aio_context_t context = 0;
	const size_t total = deep * size;
	uint8_t *buffer = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	uint64_t disk, blocks, place = 0, requests = 0;
	int fd = open(path, O_RDONLY | O_DIRECT);
	int64_t begun, until;
	long n = deep, flying = 0;

	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &disk))
		failed(path);
	if (buffer == MAP_FAILED || syscall(SYS_io_setup, DEEPEST, &context))
		failed("io_setup");
	blocks = disk / size;
	for (unsigned i = 0; i < deep; i++) {
		cb[i] = (struct iocb){.aio_fildes = (uint32_t)fd, .aio_lio_opcode = IOCB_CMD_PREAD,
				      .aio_buf = (uintptr_t)(buffer + i * size), .aio_nbytes = size, .aio_data = i};
		next[i] = &cb[i];
	}
	begun = now();
	until = begun + milliseconds * 1000000;
	for (;;) {
		if (now() < until) {
			for (long i = 0; i < n; i++)
				next[i]->aio_offset = (int64_t)((random ? draw() % blocks : place++ % blocks) * size);
			for (long sent = 0; sent < n;) {
				long taken = syscall(SYS_io_submit, context, n - sent, next + sent);

				if (taken < 0)
					failed("io_submit");
				sent += taken;
			}
			flying += n;
		}
		if (!flying)
			break;
		n = syscall(SYS_io_getevents, context, 1, flying, done, NULL);
		if (n < 0)
			failed("io_getevents");
		flying -= n;
		requests += (uint64_t)n;
		for (long i = 0; i < n; i++) {
			if (done[i].res != (int64_t)size)
				failed("a read");
			next[i] = &cb[done[i].data];
		}
	}
	printf("did %llu %lld\n", (unsigned long long)(requests * size), (long long)(now() - begun));
	syscall(SYS_io_destroy, context);
	munmap(buffer, total);
	close(fd);
}

/* ---- split locks, and work beside them ----------------------------------------------------------------------------- */

static void pin(long cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET((size_t)cpu, &one);
	sched_setaffinity(0, sizeof one, &one);
}

static _Noreturn void lock_for_ever(void)
{
	static alignas(128) char memory[128];
	int *across = (int *)(memory + 62); /* a line is 64 bytes */

	pin(cpus - 1);
	memory[62] = memory[65] = 0; /* a page's first touch is reported otherwise */
	for (;;)
		__asm__ volatile("lock incl (%0)" : : "r"(across) : "memory");
}

static void work(int64_t milliseconds)
{
	enum { ROUND = 20000 };
	int64_t begun, until;
	uint64_t rounds = 0;

	pin(0);
	begun = now();
	until = begun + milliseconds * 1000000;
	while (now() < until) {
		for (long i = 0; i < ROUND; i++)
			__asm__ volatile("" : "+r"(i));
		rounds++;
	}
	printf("did %llu %lld\n", (unsigned long long)rounds, (long long)(now() - begun));
}

/* ---- orders -------------------------------------------------------------------------------------------------------- */

static void obey(const char *line)
{
	static pid_t offender;
	char path[LINE];
	unsigned size, deep;
	int random;
	long milliseconds;

	if (sscanf(line, "read %255s %u %u %d %ld", path, &size, &deep, &random, &milliseconds) == 5 && deep && deep <= DEEPEST) {
		read_disk(path, size, deep, random, milliseconds);
	} else if (sscanf(line, "work %ld", &milliseconds) == 1) {
		work(milliseconds);
	} else if (!strncmp(line, "cpus", 4)) {
		printf("did %ld\n", cpus);
	} else if (!strncmp(line, "offend", 6)) {
		offender = fork();
		if (!offender)
			lock_for_ever();
		puts("did offend");
	} else if (!strncmp(line, "desist", 6)) {
		kill(offender, SIGKILL);
		waitpid(offender, NULL, 0);
		puts("did desist");
	} else if (!strncmp(line, "off", 3)) {
		reboot(RB_POWER_OFF);
	} else {
		printf("failed: no such order: %s", line);
	}
}

int main(void)
{
	char line[LINE];
	struct termios terminal;

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("init");
	/* Before this process is pinned: without /sys and /proc the C library counts the CPUs that it may use. */
	cpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (!tcgetattr(0, &terminal)) {
		terminal.c_lflag &= ~(tcflag_t)ECHO;
		tcsetattr(0, TCSANOW, &terminal);
	}
	mount("dev", "/dev", "devtmpfs", 0, "");
	load_modules();
	puts("ready");
	while (fgets(line, sizeof line, stdin))
		obey(line);
	for (;;)
		pause();
}
