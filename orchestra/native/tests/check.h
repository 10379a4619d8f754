/* A test is a function whose name states what is expected. `now` and all other times are given, never waited for,
 * but in the tests of waiting itself; those fail after PATIENCE instead of hanging. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "../core.h"

#define SECOND 1000000000ll
#define PATIENCE (10 * SECOND)

#define CHECK(condition, ...)                                                                                          \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: %s: not so: %s", __FILE__, __LINE__, __func__, #condition);            \
			fprintf(stderr, "; " __VA_ARGS__);                                                             \
			fputc('\n', stderr);                                                                           \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct test {
	const char *name;
	void (*run)(void);
};
#define TEST(function) {#function, function}

extern const struct test bucket_tests[], budget_tests[], ring_tests[], runner_tests[], wait_tests[], gate_tests[], bus_tests[],
	channel_tests[], ask_tests[], uart_tests[], virtqueue_tests[], virtio_tests[], io_tests[], pci_tests[], console_tests[],
	rules_tests[], store_tests[], blk_tests[], balloon_tests[],
	cap_tests[], profile_tests[], kvm_tests[], decode_tests[];
extern _Thread_local int clock_reads; /* of this thread, of any clock: test_cap.c */
extern const char *skipped; /* set by a test that can't be run here: why */

/* xorshift64*: the same numbers everywhere. */
static inline uint64_t random_number(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 2685821657736338717ull;
}

static inline double random_part(uint64_t *state) /* 0 <= x < 1 */
{
	return (double)(random_number(state) >> 11) / 9007199254740992.0;
}

static inline pthread_t start(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, run, argument))
		abort();
	return thread;
}

static inline void join(pthread_t thread)
{
	if (pthread_join(thread, NULL))
		abort();
}

#endif
