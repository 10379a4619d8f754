/* For Linux guests: makes as many split locks as it is told, one after the other, and says so. */
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
	static alignas(128) char memory[128];
	int *across = (int *)(memory + 62); /* a line is 64 bytes */
	long n = argc > 1 ? atol(argv[1]) : 1;

	memory[62] = memory[65] = 0; /* a page's first touch is reported otherwise */
	for (long i = 0; i < n; i++)
		__asm__ volatile("lock incl (%0)" : : "r"(across) : "memory");
	printf("%d split locks\n", *across);
	return 0;
}
