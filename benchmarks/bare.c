/* The floor of the emulated backend: the least that a C program must do with the same unicorn, on the same guest.
 *
 *   bare mix   LIBRARY GUEST ROUNDS   no hooks: so many rounds of a guest that counts the word at 0x8000 down and halts
 *   bare locks LIBRARY GUEST LOCKS    a hook on the instruction at 0x1000 that stops there, and a restart, so many times
 *
 * Both print how many, nanoseconds of CPU, and of the clock. GUEST is loaded at 0x1000 and entered there, for `mix` in
 * 64-bit mode, for `locks` in real mode. The UC_ constants come from unicorn's Python package, as -D of the compiler. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { MEMORY = 1 << 20, LOAD = 0x1000, CODE = 0x2000, ROUNDS = 0x8000 };

typedef void engine;
static int (*uc_open)(int arch, int mode, engine **);
static int (*uc_mem_map_ptr)(engine *, uint64_t, uint64_t size, uint32_t, void *);
static int (*uc_hook_add)(engine *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
static int (*uc_emu_start)(engine *, uint64_t, uint64_t, uint64_t, size_t);
static int (*uc_emu_stop)(engine *);

static uint64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void check(bool good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s failed\n", what);
		exit(1);
	}
}

static void load(const char *path)
{
	void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);

	check(library, path);
#define FIND(name) check((*(void **)&name = dlsym(library, #name)), #name)
	FIND(uc_open);
	FIND(uc_mem_map_ptr);
	FIND(uc_hook_add);
	FIND(uc_emu_start);
	FIND(uc_emu_stop);
}

/* Only the code's own pages may be executed: writes to those that may are slower. */
static engine *make(int mode, const char *path, uint8_t **memory)
{
	FILE *guest = fopen(path, "rb");
	engine *uc;

	check(guest, path);
	*memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	check(*memory != MAP_FAILED, "mmap of guest memory");
	check(fread(*memory + LOAD, 1, CODE - LOAD, guest) > 0, path);
	check(!uc_open(UC_ARCH_X86, mode, &uc), "uc_open");
	check(!uc_mem_map_ptr(uc, 0, CODE, UC_PROT_READ | UC_PROT_WRITE | UC_PROT_EXEC, *memory) &&
	      !uc_mem_map_ptr(uc, CODE, MEMORY - CODE, UC_PROT_READ | UC_PROT_WRITE, *memory + CODE), "uc_mem_map_ptr");
	return uc;
}

static void mix(engine *uc, uint8_t *memory, uint32_t rounds)
{
	memcpy(memory + ROUNDS, &rounds, sizeof rounds);
	check(!uc_emu_start(uc, LOAD, UINT64_MAX, 0, 0), "uc_emu_start");
	memcpy(&rounds, memory + ROUNDS, sizeof rounds);
	check(!rounds, "a run to the end");
}

static bool passes;

static void on_lock(engine *uc, uint64_t address, uint32_t size, void *data)
{
	(void)address, (void)size, (void)data;
	if (!passes)
		uc_emu_stop(uc);
	passes = !passes;
}

static void locks(engine *uc, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		check(!uc_emu_start(uc, LOAD, UINT64_MAX, 0, 0), "uc_emu_start"); /* the lock of before, and up to the next */
}

int main(int argc, char **argv)
{
	uint64_t cpu, start, count;
	uint8_t *memory;
	engine *uc;
	size_t hook;
	bool stops;

	if (argc != 5)
		return 2;
	stops = !strcmp(argv[1], "locks");
	load(argv[2]);
	count = strtoull(argv[4], NULL, 10);
	uc = make(stops ? UC_MODE_16 : UC_MODE_64, argv[3], &memory);
	if (stops)
		check(!uc_hook_add(uc, &hook, UC_HOOK_CODE, (void *)on_lock, NULL, (uint64_t)LOAD, (uint64_t)LOAD),
		      "uc_hook_add");
	cpu = now(CLOCK_THREAD_CPUTIME_ID);
	start = now(CLOCK_MONOTONIC);
	if (stops)
		locks(uc, count);
	else
		mix(uc, memory, (uint32_t)count);
	start = now(CLOCK_MONOTONIC) - start;
	cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
	printf("%llu %llu %llu\n", (unsigned long long)count, (unsigned long long)cpu, (unsigned long long)start);
	return 0;
}
