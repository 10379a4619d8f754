/* A VM's console, or a port. What the guest wrote: of a console the last ORC_CONSOLE_KEPT bytes, and how many there were; of a
 * port what nobody has taken yet, up to that much. And what the guest is to read: at most ORC_CONSOLE_TYPED bytes, which wait
 * until the device that takes input has room. Any thread writes and reads.
 *
 * A vCPU's thread that writes may lose its CPU at any instruction, for as long as eight others run. Readers of output are event
 * loops, for which many VMs wait: they take no lock that such a thread may have, and read beside it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

struct orc_console {
	_Atomic uint32_t holders; /* its owner, and the devices on it */
	pthread_mutex_t lock; /* among those who write output. Readers don't take it: a vCPU that has it may wait long for a CPU */
	_Atomic orc_u64 total; /* bytes that can be read, and more than that while they are written: */
	_Atomic orc_u64 begun;
	uint8_t *kept;        /* byte n of the output is at n modulo ORC_CONSOLE_KEPT; pages that are never used cost nothing */
	_Atomic bool wanted;  /* a task waits for output, and was not notified yet */
	uint32_t openings;
	_Atomic uint32_t opening; /* of a port: which time it is that the guest has it open; 0: it has not */
	_Atomic bool stalled; /* its device waits for room for output, and was not told yet */
	_Atomic orc_u64 taken; /* output of a port that was read */

	pthread_mutex_t input_lock;
	_Atomic uint32_t typed; /* bytes that wait for the guest */
	uint32_t first;         /* where in `input` the oldest is */
	bool full;              /* a writer waits for room, and was not told yet */
	uint8_t *input;         /* a ring; most guests are never typed at, and have none */

	/* The device that takes input. Its lock is held while the device is told, and the device's own lock is taken within. */
	pthread_mutex_t reader_lock;
	struct orc_console_reader reader;
};

enum { ROOM = ORC_CONSOLE_KEPT };

orc_console *orc_console_new(void)
{
	orc_console *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	atomic_init(&c->holders, 1);
	c->kept = malloc(ROOM);
	if (!c->kept) {
		free(c);
		return NULL;
	}
	pthread_mutex_init(&c->lock, NULL);
	pthread_mutex_init(&c->input_lock, NULL);
	pthread_mutex_init(&c->reader_lock, NULL);
	return c;
}

orc_console *orc_console_hold(orc_console *c)
{
	atomic_fetch_add(&c->holders, 1);
	return c;
}

void orc_console_free(orc_console *c)
{
	if (!c || atomic_fetch_sub(&c->holders, 1) > 1)
		return;
	pthread_mutex_destroy(&c->reader_lock);
	pthread_mutex_destroy(&c->input_lock);
	pthread_mutex_destroy(&c->lock);
	free(c->input);
	free(c->kept);
	free(c);
}

/* ---- output ----------------------------------------------------------------------------------------------------- */

/* Bytes are copied while others read or write them, by words where that is possible. Whoever reads looks afterwards which of
 * them were overwritten. */
typedef orc_u64 __attribute__((may_alias)) word;

static bool is_word(orc_u64 position, size_t n)
{
	return position % sizeof(word) == 0 && n >= sizeof(word);
}

static void copy_in(orc_console *c, orc_u64 position, const uint8_t *data, size_t n)
{
	while (n) {
		uint8_t *at = c->kept + position % ROOM;
		size_t step = is_word(position, n) ? sizeof(word) : 1;
		word w;

		if (step == 1) {
			__atomic_store_n(at, *data, __ATOMIC_RELAXED);
		} else {
			memcpy(&w, data, sizeof w);
			__atomic_store_n((word *)at, w, __ATOMIC_RELAXED);
		}
		position += step;
		data += step;
		n -= step;
	}
}

static void copy_out(const orc_console *c, orc_u64 position, uint8_t *out, size_t n)
{
	while (n) {
		const uint8_t *at = c->kept + position % ROOM;
		size_t step = is_word(position, n) ? sizeof(word) : 1;
		word w;

		if (step == 1) {
			*out = __atomic_load_n(at, __ATOMIC_RELAXED);
		} else {
			w = __atomic_load_n((const word *)at, __ATOMIC_RELAXED);
			memcpy(out, &w, sizeof w);
		}
		position += step;
		out += step;
		n -= step;
	}
}

/* Lock held. */
static void keep(orc_console *c, const uint8_t *data, size_t size)
{
	orc_u64 end = atomic_load_explicit(&c->total, memory_order_relaxed) + size;
	size_t last = size < ROOM ? size : ROOM;

	atomic_store_explicit(&c->begun, end, memory_order_relaxed);
	atomic_thread_fence(memory_order_release); /* before the first of the bytes */
	copy_in(c, end - last, data + (size - last), last);
	atomic_store(&c->total, end);
}

/* After a change that somebody may wait for. Who waits has set `wanted` before it looks at what may change. */
static bool is_wanted(orc_console *c) /* and will be told now */
{
	return atomic_load(&c->wanted) && atomic_exchange(&c->wanted, false);
}

bool orc_console_put(orc_console *c, const uint8_t *data, size_t size)
{
	pthread_mutex_lock(&c->lock);
	keep(c, data, size);
	pthread_mutex_unlock(&c->lock);
	return is_wanted(c);
}

orc_u64 orc_console_total(orc_console *c)
{
	return atomic_load(&c->total);
}

/* A guest that writes faster than this copies has it copy fewer bytes, the last ones, until they hold still. */
size_t orc_console_copy(orc_console *c, orc_u64 *position, uint8_t *out, size_t room)
{
	for (size_t most = ROOM; most; most /= 2) {
		orc_u64 end = atomic_load(&c->total), from = end - *position > most ? end - most : *position, torn;
		size_t n = end - from < room ? (size_t)(end - from) : room;

		copy_out(c, from, out, n);
		atomic_thread_fence(memory_order_acquire); /* after the last of the bytes */
		torn = atomic_load_explicit(&c->begun, memory_order_relaxed) - from;
		torn = torn > ROOM ? torn - ROOM : 0;
		if (torn && torn >= n)
			continue;
		memmove(out, out + torn, n - (size_t)torn);
		*position = from + n;
		return n - (size_t)torn;
	}
	*position = atomic_load(&c->total);
	return 0;
}

bool orc_console_want(orc_console *c, orc_u64 position)
{
	if (atomic_load(&c->total) != position)
		return false;
	atomic_store(&c->wanted, true);
	return atomic_load(&c->total) == position;
}

void orc_console_say(orc_console *c, orc_vcpu *by, const uint8_t *data, size_t size)
{
	if (orc_console_put(c, data, size) && by)
		orc_talk(by);
}

/* ---- output of a port ------------------------------------------------------------------------------------------- */

static size_t waiting(orc_console *c)
{
	return (size_t)(atomic_load(&c->total) - atomic_load(&c->taken));
}

size_t orc_port_say(orc_console *c, orc_vcpu *by, const uint8_t *data, size_t size)
{
	pthread_mutex_lock(&c->lock);
	if (size > ROOM - waiting(c)) {
		atomic_store(&c->stalled, true); /* before the look that counts: the reader looks the other way round */
		if (size > ROOM - waiting(c))
			size = ROOM - waiting(c);
	}
	keep(c, data, size);
	pthread_mutex_unlock(&c->lock);
	if (size && is_wanted(c) && by)
		orc_talk(by);
	return size;
}

size_t orc_port_take(orc_console *c, uint8_t *out, size_t room)
{
	orc_u64 from = atomic_load(&c->taken);
	size_t n = waiting(c) < room ? waiting(c) : room;

	copy_out(c, from, out, n);
	atomic_store(&c->taken, from + n);
	/* Not for each byte of a reader that is slow. */
	if (waiting(c) <= ROOM / 2 && atomic_load(&c->stalled) && atomic_exchange(&c->stalled, false)) {
		pthread_mutex_lock(&c->reader_lock);
		if (c->reader.room)
			c->reader.room(c->reader.device);
		pthread_mutex_unlock(&c->reader_lock);
	}
	return n;
}

void orc_port_set_open(orc_console *c, orc_vcpu *by, bool open)
{
	bool changed = open != (atomic_load(&c->opening) != 0), waits = false;

	if (open) {
		if (changed && !++c->openings)
			c->openings = 1;
		atomic_store(&c->opening, c->openings);
	} else { /* what was written for the program that had it is for no other, and gone for whoever sees that it is closed */
		pthread_mutex_lock(&c->input_lock);
		atomic_store_explicit(&c->typed, 0, memory_order_relaxed);
		waits = c->full;
		c->full = false;
		atomic_store(&c->opening, 0);
		pthread_mutex_unlock(&c->input_lock);
	}
	if (((changed && is_wanted(c)) || waits) && by)
		orc_talk(by);
}

uint32_t orc_port_opening(orc_console *c)
{
	return atomic_load(&c->opening);
}

static bool is_news(orc_console *c, uint32_t opening, bool output)
{
	return atomic_load(&c->opening) != opening || (output && waiting(c));
}

bool orc_port_want(orc_console *c, uint32_t opening, bool output)
{
	if (is_news(c, opening, output))
		return false;
	atomic_store(&c->wanted, true);
	return !is_news(c, opening, output);
}

/* ---- input ---------------------------------------------------------------------------------------------------- */

/* The ring has room for what a device gives back, however much waits. */
enum { TYPED = ORC_CONSOLE_TYPED, RING = ORC_CONSOLE_WAITING };
_Static_assert(RING == TYPED + ORC_UART_FIFO, "room for a FIFO that is given back");

void orc_console_attach(orc_console *c, struct orc_console_reader reader)
{
	pthread_mutex_lock(&c->reader_lock);
	c->reader = reader;
	pthread_mutex_unlock(&c->reader_lock);
}

void orc_console_detach(orc_console *c, void *device)
{
	pthread_mutex_lock(&c->reader_lock);
	if (c->reader.device == device)
		c->reader = (struct orc_console_reader){0};
	pthread_mutex_unlock(&c->reader_lock);
}

bool orc_console_listened(orc_console *c)
{
	bool listened;

	pthread_mutex_lock(&c->reader_lock);
	listened = c->reader.typed != NULL;
	pthread_mutex_unlock(&c->reader_lock);
	return listened;
}

/* Lock held. */
static bool has_ring(orc_console *c)
{
	if (!c->input)
		c->input = malloc(RING);
	return c->input;
}

static ssize_t add_input(orc_console *c, const uint8_t *data, size_t size)
{
	uint32_t typed;
	ssize_t n = 0;

	if (!size)
		return 0;
	pthread_mutex_lock(&c->input_lock);
	if (has_ring(c)) {
		typed = atomic_load_explicit(&c->typed, memory_order_relaxed);
		for (; (size_t)n < size && typed < TYPED; n++)
			c->input[(c->first + typed++) % RING] = data[n];
		atomic_store_explicit(&c->typed, typed, memory_order_relaxed);
		c->full = c->full || (size_t)n < size;
	} else {
		n = -ENOMEM;
	}
	pthread_mutex_unlock(&c->input_lock);
	return n;
}

ssize_t orc_console_type(orc_console *c, const uint8_t *data, size_t size)
{
	ssize_t n = add_input(c, data, size);

	pthread_mutex_lock(&c->reader_lock);
	if (n > 0 && c->reader.typed)
		c->reader.typed(c->reader.device);
	pthread_mutex_unlock(&c->reader_lock);
	return n;
}

void orc_console_unread(orc_console *c, const uint8_t *data, size_t size)
{
	uint32_t typed;

	pthread_mutex_lock(&c->input_lock);
	typed = atomic_load_explicit(&c->typed, memory_order_relaxed);
	if (has_ring(c))
		for (; size && typed < RING; typed++) {
			c->first = (c->first + RING - 1) % RING;
			c->input[c->first] = data[--size];
		}
	atomic_store_explicit(&c->typed, typed, memory_order_relaxed);
	pthread_mutex_unlock(&c->input_lock);
}

size_t orc_console_copy_typed(orc_console *c, uint8_t *out, size_t room)
{
	size_t n;

	pthread_mutex_lock(&c->input_lock);
	n = atomic_load_explicit(&c->typed, memory_order_relaxed);
	n = n < room ? n : room;
	for (size_t i = 0; i < n; i++)
		out[i] = c->input[(c->first + i) % RING];
	pthread_mutex_unlock(&c->input_lock);
	return n;
}

bool orc_console_load(orc_console *c, orc_u64 total, const uint8_t *data, size_t size, const uint8_t *typed, size_t waiting)
{
	if (size > ORC_CONSOLE_KEPT || size > total || (size < total && size != ORC_CONSOLE_KEPT) || waiting > RING)
		return false;
	if (waiting) {
		if (!has_ring(c))
			return false;
		memcpy(c->input, typed, waiting);
		atomic_store_explicit(&c->typed, (uint32_t)waiting, memory_order_relaxed);
	}
	atomic_store(&c->total, total - size);
	orc_console_put(c, data, size);
	return true;
}

size_t orc_console_typed(orc_console *c)
{
	return atomic_load_explicit(&c->typed, memory_order_relaxed);
}

size_t orc_console_read(orc_console *c, orc_vcpu *by, uint8_t *out, size_t size)
{
	uint32_t typed, n;
	bool told;

	/* Nothing is missed: who types tells the device afterwards, which takes the device's lock, as the caller does. */
	if (!size || !atomic_load_explicit(&c->typed, memory_order_relaxed))
		return 0;
	pthread_mutex_lock(&c->input_lock);
	typed = atomic_load_explicit(&c->typed, memory_order_relaxed);
	n = typed < size ? typed : (uint32_t)size;
	for (uint32_t i = 0; i < n; i++)
		out[i] = c->input[(c->first + i) % RING];
	c->first = (c->first + n) % RING;
	atomic_store_explicit(&c->typed, typed - n, memory_order_relaxed);
	told = c->full && by && typed - n <= TYPED / 2; /* not for each byte of a guest that reads slowly */
	c->full = c->full && !told;
	pthread_mutex_unlock(&c->input_lock);
	if (told)
		orc_talk(by);
	return n;
}
