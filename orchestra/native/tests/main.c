#include <string.h>

#include "check.h"

const char *skipped;

/* Runs all tests, or those whose names contain one of the arguments. A failed one aborts, so that a debugger or a
 * sanitizer stands where it happened. */
int main(int argc, char **argv)
{
	const struct test *const files[] = {
		bucket_tests, budget_tests, ring_tests, runner_tests, wait_tests, gate_tests, bus_tests, channel_tests, ask_tests,
		uart_tests, virtqueue_tests, virtio_tests, io_tests, pci_tests, console_tests, rules_tests, store_tests, blk_tests,
		balloon_tests, cap_tests, profile_tests, kvm_tests, decode_tests,
	};
	int ran = 0, left_out = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		for (const struct test *test = files[i]; test->name; test++) {
			bool wanted = argc == 1;

			for (int arg = 1; arg < argc; arg++)
				wanted = wanted || strstr(test->name, argv[arg]);
			if (!wanted)
				continue;
			skipped = NULL;
			printf("%s ", test->name);
			fflush(stdout);
			test->run();
			ran += !skipped;
			left_out += !!skipped;
			printf(skipped ? "- skipped: %s\n" : "- ok%s\n", skipped ? skipped : "");
		}
	}
	printf("%d passed, %d skipped\n", ran, left_out);
	return 0;
}
