/* For Linux guests: makes as many split locks as it is told, one after the other or at a rate, and says so.
 *
 *     splitlocks COUNT [RATE [CPU]]
 *
 * RATE is locks a second, 0 for as fast as they come. CPU is the one that it stays on. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static alignas(128) char memory[128];
static int *const across = (int *)(memory + 62); /* a line is 64 bytes */

__attribute__((noinline)) static void split_lock(void)
{
	__asm__ volatile("lock incl (%0)" : : "r"(across) : "memory");
}

static void wait_until(const struct timespec *began, double seconds)
{
	long long at = began->tv_nsec + (long long)(seconds * 1e9);
	struct timespec then = {began->tv_sec + at / 1000000000, at % 1000000000};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &then, NULL))
		;
}

int main(int argc, char **argv)
{
	long n = argc > 1 ? atol(argv[1]) : 1;
	double rate = argc > 2 ? atof(argv[2]) : 0;
	struct timespec began;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	if (argc > 3) {
		CPU_SET(atoi(argv[3]), &cpus);
		if (sched_setaffinity(0, sizeof cpus, &cpus))
			return perror("sched_setaffinity"), 1;
	}
	memory[62] = memory[65] = 0; /* a page's first touch is reported otherwise */
	clock_gettime(CLOCK_MONOTONIC, &began);
	for (long i = 0; i < n; i++) {
		if (rate > 0)
			wait_until(&began, i / rate);
		split_lock();
	}
	printf("%d split locks\n", *across);
	return 0;
}
