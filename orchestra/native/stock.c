/* What the vCPUs of a fleet live in, their own memory and the stacks of their threads, side by side in a few large mappings.
 *
 * Whatever maps, unmaps or protects memory of this process costs by what there is of it: KVM_CREATE_VM goes through all
 * mappings (mm_take_all_locks, 0.1 us for each), mprotect and munmap through all VMs (their MMU notifiers). A thread of the C
 * library's adds two mappings, its stack and the page below that nobody may touch; and malloc, on threads other than the
 * first, protects its memory anew for each page that it grows by. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 /* include/uapi/asm-generic/mman-common.h, Linux 6.13 */
#endif

enum {
	PAGE = 4096,
	VCPUS = 62,  /* in a mapping: 32 pages, of which those are touched that are used */
	FEWEST = 4,  /* stacks of a mapping: as many as there are already, from 32 MiB of addresses (a fleet of few VMs on a */
	MOST = 32,   /* host that counts addresses as memory, vm.overcommit_memory=2) to 256; a thread touches some pages of 8 */
	WARM = 64,   /* stacks that nobody uses and that keep their pages: so many VMs may end and others begin */
};

struct orc_block {
	struct orc_block *next;
	void *memory;
	size_t size;
	struct orc_stack_memory stack[];
};

struct orc_place {
	struct orc_place *next;
};

/* As large as any thread's of this process: a device in Python may need as much on it. */
static size_t stack_size(void)
{
	pthread_attr_t attr;
	size_t size = 8 << 20;

	if (!pthread_attr_init(&attr)) {
		pthread_attr_getstacksize(&attr, &size);
		pthread_attr_destroy(&attr);
	}
	return (size + PAGE - 1) & ~(size_t)(PAGE - 1);
}

void orc_stock_init(struct orc_stock *s)
{
	pthread_mutex_init(&s->lock, NULL);
	s->stack_size = stack_size();
}

void orc_stock_free(struct orc_stock *s)
{
	struct orc_block *next;

	for (struct orc_block *block = s->blocks; block; block = next) {
		next = block->next;
		munmap(block->memory, block->size);
		free(block);
	}
	pthread_mutex_destroy(&s->lock);
}

/* With the lock. NULL, and errno: there is no memory. */
static struct orc_block *add_block(struct orc_stock *s, size_t size, size_t stacks)
{
	struct orc_block *block = calloc(1, sizeof *block + stacks * sizeof block->stack[0]);

	if (!block)
		return NULL;
	block->size = size;
	block->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (block->memory == MAP_FAILED) {
		free(block);
		return NULL;
	}
	block->next = s->blocks;
	s->blocks = block;
	return block;
}

/* ---- vCPUs ---------------------------------------------------------------------------------------------------- */

#ifdef __SANITIZE_ADDRESS__ /* which knows what malloc gave and took back, and nothing of this stock */
orc_vcpu *orc_stock_vcpu(struct orc_stock *s)
{
	orc_vcpu *v = aligned_alloc(ORC_CACHE_LINE, sizeof *v);

	(void)s;
	return v ? memset(v, 0, sizeof *v) : NULL;
}

void orc_stock_vcpu_back(struct orc_stock *s, orc_vcpu *v)
{
	(void)s;
	free(v);
}
#else
orc_vcpu *orc_stock_vcpu(struct orc_stock *s)
{
	struct orc_place *place;
	struct orc_block *block;

	pthread_mutex_lock(&s->lock);
	if (!s->vcpus && (block = add_block(s, VCPUS * sizeof(orc_vcpu), 0))) {
		for (int i = VCPUS; i-- > 0;) {
			place = (struct orc_place *)((orc_vcpu *)block->memory + i);
			place->next = s->vcpus;
			s->vcpus = place;
		}
	}
	if ((place = s->vcpus))
		s->vcpus = place->next;
	pthread_mutex_unlock(&s->lock);
	return place ? memset(place, 0, sizeof(orc_vcpu)) : NULL;
}

void orc_stock_vcpu_back(struct orc_stock *s, orc_vcpu *v)
{
	struct orc_place *place = (struct orc_place *)v;

	pthread_mutex_lock(&s->lock);
	place->next = s->vcpus;
	s->vcpus = place;
	pthread_mutex_unlock(&s->lock);
}
#endif

/* ---- stacks --------------------------------------------------------------------------------------------------- */

/* The lowest page of a stack is nobody's: a stack that overflows ends the process and corrupts no other. */
static int guard(void *page)
{
	if (!madvise(page, PAGE, MADV_GUARD_INSTALL))
		return 0;
	return errno == EINVAL ? mprotect(page, PAGE, PROT_NONE) : -1; /* before Linux 6.13: two mappings more */
}

static void add_stacks(struct orc_stock *s)
{
	uint32_t n = s->stacks < FEWEST ? FEWEST : s->stacks > MOST ? MOST : s->stacks;
	struct orc_block *block = add_block(s, s->stack_size * n, n);

	if (block) {
		s->stacks += n;
		/* A stack has some pages in use, and a huge one would be 2 MiB of memory for each thread. The C library's
		 * MAP_STACK says the same, but not before Linux 6.7. An error: this kernel has no huge pages. */
		madvise(block->memory, block->size, MADV_NOHUGEPAGE);
	}
	for (uint32_t i = n; block && i-- > 0;) {
		block->stack[i] = (struct orc_stack_memory){
			.next = s->fresh,
			.memory = (char *)block->memory + (size_t)i * s->stack_size + PAGE,
			.size = s->stack_size - PAGE,
		};
		s->fresh = &block->stack[i];
	}
}

/* Those first whose pages are there. With the lock. */
static struct orc_stack_memory *take_used(struct orc_stock *s)
{
	struct orc_stack_memory **list = s->warm ? &s->warm : &s->cold, *stack = *list;

	if (stack)
		*list = stack->next;
	s->warm_stacks -= list == &s->warm;
	return stack;
}

static void put(struct orc_stack_memory **list, struct orc_stack_memory *stack)
{
	stack->next = *list;
	*list = stack;
}

int orc_stock_stack(struct orc_stock *s, struct orc_stack_memory **out)
{
	struct orc_stack_memory *stack;
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	if (!s->warm && !s->cold && !s->fresh)
		add_stacks(s);
	if (!(stack = take_used(s))) {
		if (!(stack = s->fresh))
			rc = -ENOMEM;
		else if (guard(stack->memory - PAGE))
			rc = -errno;
		else
			s->fresh = stack->next;
	}
	pthread_mutex_unlock(&s->lock);
	*out = stack;
	return rc;
}

void orc_stock_stack_back(struct orc_stock *s, struct orc_stack_memory *stack)
{
	pthread_mutex_lock(&s->lock);
	put(&s->warm, stack);
	s->warm_stacks++;
	pthread_mutex_unlock(&s->lock);
}

void orc_stock_trim(struct orc_stock *s)
{
	struct orc_stack_memory *stack;

	for (;;) {
		pthread_mutex_lock(&s->lock);
		stack = s->warm_stacks > WARM ? take_used(s) : NULL;
		pthread_mutex_unlock(&s->lock);
		if (!stack)
			return;
		madvise(stack->memory, stack->size, MADV_DONTNEED); /* without the lock, as it takes its time */
		pthread_mutex_lock(&s->lock);
		put(&s->cold, stack);
		pthread_mutex_unlock(&s->lock);
	}
}
