/* A VM's console, or a port. What the guest wrote: of a console the last ORC_CONSOLE_KEPT bytes, and how many there were; of a
 * port what nobody has taken yet, up to that much. And what the guest is to read: at most ORC_CONSOLE_TYPED bytes, which wait
 * until the device that takes input has room. Any thread writes and reads. */
#include <stdlib.h>
#include <string.h>

#include "core.h"

struct orc_console {
	pthread_mutex_t lock; /* all but `reader`; nothing is locked within */
	orc_u64 total;
	bool wanted; /* a task waits for output, and was not notified yet */
	uint8_t *kept; /* byte n of the output is at n modulo `room`, which grows as long as nothing was overwritten */
	size_t room;
	bool is_port, open; /* a port: nothing is overwritten; the guest has it open */
	uint32_t openings;
	bool stalled;       /* its device waits for room for output, and was not told yet */
	orc_u64 taken;      /* output of a port that was read */

	_Atomic uint32_t typed; /* bytes that wait for the guest */
	uint32_t first;         /* where in `input` the oldest is */
	bool full;              /* a writer waits for room, and was not told yet */
	uint8_t *input;         /* a ring; most guests are never typed at, and have none */

	/* The device that takes input. Its lock is held while the device is told, and the device's own lock is taken within. */
	pthread_mutex_t reader_lock;
	struct orc_console_reader reader;
};

orc_console *orc_console_new(void)
{
	orc_console *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	pthread_mutex_init(&c->lock, NULL);
	pthread_mutex_init(&c->reader_lock, NULL);
	return c;
}

orc_console *orc_port_new(void)
{
	orc_console *c = orc_console_new();

	if (!c)
		return NULL;
	c->is_port = true;
	c->kept = malloc(ORC_CONSOLE_KEPT); /* pages that are never used cost nothing */
	if (!c->kept) {
		orc_console_free(c);
		return NULL;
	}
	c->room = ORC_CONSOLE_KEPT;
	return c;
}

void orc_console_free(orc_console *c)
{
	if (!c)
		return;
	pthread_mutex_destroy(&c->reader_lock);
	pthread_mutex_destroy(&c->lock);
	free(c->input);
	free(c->kept);
	free(c);
}

/* Most guests say little. Without memory it keeps less. */
static void grow(orc_console *c, size_t size)
{
	size_t room = c->room ? c->room : 1024;
	uint8_t *kept;

	if (c->total > c->room || c->total + size <= c->room || c->room == ORC_CONSOLE_KEPT)
		return;
	while (room < ORC_CONSOLE_KEPT && room < c->total + size)
		room *= 2;
	kept = realloc(c->kept, room);
	if (!kept)
		return;
	c->kept = kept;
	c->room = room;
}

/* Lock held, as of all the following. */
static void keep(orc_console *c, const uint8_t *data, size_t size)
{
	size_t at, first;

	grow(c, size);
	c->total += size;
	if (size > c->room) {
		data += size - c->room;
		size = c->room;
	}
	if (!size)
		return;
	at = (c->total - size) % c->room;
	first = c->room - at < size ? c->room - at : size;
	memcpy(c->kept + at, data, first);
	memcpy(c->kept, data + first, size - first);
}

static void copy_out(const orc_console *c, orc_u64 from, uint8_t *out, size_t n)
{
	size_t at, first;

	if (!n)
		return;
	at = from % c->room;
	first = c->room - at < n ? c->room - at : n;
	memcpy(out, c->kept + at, first);
	memcpy(out + first, c->kept, n - first);
}

static bool is_wanted(orc_console *c) /* and will be told now */
{
	bool wanted = c->wanted;

	c->wanted = false;
	return wanted;
}

bool orc_console_put(orc_console *c, const uint8_t *data, size_t size)
{
	bool wanted;

	pthread_mutex_lock(&c->lock);
	keep(c, data, size);
	wanted = is_wanted(c);
	pthread_mutex_unlock(&c->lock);
	return wanted;
}

bool orc_console_load(orc_console *c, orc_u64 total, const uint8_t *data, size_t size)
{
	if (size > ORC_CONSOLE_KEPT || size > total || (size < total && size != ORC_CONSOLE_KEPT))
		return false;
	if (size < total) { /* as much as it ever keeps: `grow` would not, once something was overwritten */
		c->kept = malloc(ORC_CONSOLE_KEPT);
		if (!c->kept)
			return false;
		c->room = ORC_CONSOLE_KEPT;
	}
	c->total = total - size;
	orc_console_put(c, data, size);
	return true;
}

orc_u64 orc_console_total(orc_console *c)
{
	orc_u64 total;

	pthread_mutex_lock(&c->lock);
	total = c->total;
	pthread_mutex_unlock(&c->lock);
	return total;
}

size_t orc_console_copy(orc_console *c, orc_u64 *position, uint8_t *out, size_t room)
{
	orc_u64 from = *position;
	size_t n;

	pthread_mutex_lock(&c->lock);
	if (c->total - from > c->room)
		from = c->total - c->room;
	n = c->total - from < room ? (size_t)(c->total - from) : room;
	copy_out(c, from, out, n);
	pthread_mutex_unlock(&c->lock);
	*position = from + n;
	return n;
}

bool orc_console_want(orc_console *c, orc_u64 position)
{
	bool nothing_new;

	pthread_mutex_lock(&c->lock);
	nothing_new = c->total == position;
	c->wanted = c->wanted || nothing_new;
	pthread_mutex_unlock(&c->lock);
	return nothing_new;
}

void orc_console_say(orc_console *c, orc_vcpu *by, const uint8_t *data, size_t size)
{
	if (orc_console_put(c, data, size) && by)
		orc_talk(by);
}

/* ---- output of a port ------------------------------------------------------------------------------------------- */

size_t orc_port_say(orc_console *c, orc_vcpu *by, const uint8_t *data, size_t size)
{
	size_t room;
	bool wanted;

	pthread_mutex_lock(&c->lock);
	room = c->room - (size_t)(c->total - c->taken);
	if (size > room) {
		c->stalled = true;
		size = room;
	}
	keep(c, data, size);
	wanted = size && is_wanted(c);
	pthread_mutex_unlock(&c->lock);
	if (wanted && by)
		orc_talk(by);
	return size;
}

size_t orc_port_take(orc_console *c, uint8_t *out, size_t room)
{
	size_t n;
	bool told;

	pthread_mutex_lock(&c->lock);
	n = c->total - c->taken < room ? (size_t)(c->total - c->taken) : room;
	copy_out(c, c->taken, out, n);
	c->taken += n;
	told = c->stalled && c->total - c->taken <= c->room / 2; /* not for each byte of a reader that is slow */
	c->stalled = c->stalled && !told;
	pthread_mutex_unlock(&c->lock);
	if (told) {
		pthread_mutex_lock(&c->reader_lock);
		if (c->reader.room)
			c->reader.room(c->reader.device);
		pthread_mutex_unlock(&c->reader_lock);
	}
	return n;
}

void orc_port_set_open(orc_console *c, orc_vcpu *by, bool open)
{
	bool told;

	pthread_mutex_lock(&c->lock);
	told = open != c->open && is_wanted(c);
	if (open && !c->open && !++c->openings)
		c->openings = 1; /* 0 says that it is not open */
	c->open = open;
	if (!open) { /* what was written for the program that had it is for no other */
		atomic_store_explicit(&c->typed, 0, memory_order_relaxed);
		told = told || c->full;
		c->full = false;
	}
	pthread_mutex_unlock(&c->lock);
	if (told && by)
		orc_talk(by);
}

uint32_t orc_port_opening(orc_console *c)
{
	uint32_t opening;

	pthread_mutex_lock(&c->lock);
	opening = c->open ? c->openings : 0;
	pthread_mutex_unlock(&c->lock);
	return opening;
}

bool orc_port_want(orc_console *c, uint32_t opening, bool output)
{
	bool nothing_new;

	pthread_mutex_lock(&c->lock);
	nothing_new = (c->open ? c->openings : 0) == opening && !(output && c->total != c->taken);
	c->wanted = c->wanted || nothing_new;
	pthread_mutex_unlock(&c->lock);
	return nothing_new;
}

/* ---- input ---------------------------------------------------------------------------------------------------- */

enum { TYPED = ORC_CONSOLE_TYPED };

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

static size_t add_input(orc_console *c, const uint8_t *data, size_t size)
{
	uint32_t typed, n = 0;

	pthread_mutex_lock(&c->lock);
	typed = atomic_load_explicit(&c->typed, memory_order_relaxed);
	if (!c->input)
		c->input = malloc(TYPED);
	if (c->input)
		for (; n < size && typed + n < TYPED; n++)
			c->input[(c->first + typed + n) % TYPED] = data[n];
	atomic_store_explicit(&c->typed, typed + n, memory_order_relaxed);
	c->full = c->full || n < size;
	pthread_mutex_unlock(&c->lock);
	return n;
}

size_t orc_console_type(orc_console *c, const uint8_t *data, size_t size)
{
	size_t n = add_input(c, data, size);

	pthread_mutex_lock(&c->reader_lock);
	if (n && c->reader.typed)
		c->reader.typed(c->reader.device);
	pthread_mutex_unlock(&c->reader_lock);
	return n;
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
	pthread_mutex_lock(&c->lock);
	typed = atomic_load_explicit(&c->typed, memory_order_relaxed);
	n = typed < size ? typed : (uint32_t)size;
	for (uint32_t i = 0; i < n; i++)
		out[i] = c->input[(c->first + i) % TYPED];
	c->first = (c->first + n) % TYPED;
	atomic_store_explicit(&c->typed, typed - n, memory_order_relaxed);
	told = c->full && by && typed - n <= TYPED / 2; /* not for each byte of a guest that reads slowly */
	c->full = c->full && !told;
	pthread_mutex_unlock(&c->lock);
	if (told)
		orc_talk(by);
	return n;
}
