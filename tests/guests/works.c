/* For Linux guests: does the same piece of work again and again, with no lock in it, and says how often. What else there is
 * on the machine, it shows by how much less it does.
 *
 *     works SECONDS [CPU]
 *
 * One round sums 256 KiB of memory. CPU is the one that it stays on. It prints `ROUNDS rounds in MS ms, CPU_MS ms of CPU`. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { WORDS = 32768 };

static volatile unsigned long memory[WORDS];

static double milliseconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 1, began;
	unsigned long sum = 0;
	long rounds = 0;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	if (argc > 2) {
		CPU_SET(atoi(argv[2]), &cpus);
		if (sched_setaffinity(0, sizeof cpus, &cpus))
			return perror("sched_setaffinity"), 1;
	}
	for (int i = 0; i < WORDS; i++)
		memory[i] = i;
	began = milliseconds(CLOCK_MONOTONIC);
	while (milliseconds(CLOCK_MONOTONIC) - began < seconds * 1e3) {
		for (int i = 0; i < WORDS; i++)
			sum += memory[i];
		rounds++;
	}
	printf("%ld rounds in %.0f ms, %.0f ms of CPU\n", rounds, milliseconds(CLOCK_MONOTONIC) - began,
	       milliseconds(CLOCK_PROCESS_CPUTIME_ID));
	return sum == 0;
}
