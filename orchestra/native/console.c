/* What a guest wrote: the last ORC_CONSOLE_KEPT bytes, and how many there were. Any thread writes and reads. */
#include <stdlib.h>
#include <string.h>

#include "core.h"

struct orc_console {
	pthread_mutex_t lock; /* all of it; nothing is locked within */
	orc_u64 total;
	bool wanted; /* a task waits for output, and was not notified yet */
	uint8_t *kept; /* byte n of the output is at n modulo `room`, which grows as long as nothing was overwritten */
	size_t room;
};

orc_console *orc_console_new(void)
{
	orc_console *c = calloc(1, sizeof *c);

	if (c)
		pthread_mutex_init(&c->lock, NULL);
	return c;
}

void orc_console_free(orc_console *c)
{
	if (!c)
		return;
	pthread_mutex_destroy(&c->lock);
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

bool orc_console_put(orc_console *c, const uint8_t *data, size_t size)
{
	size_t at, first;
	bool wanted;

	pthread_mutex_lock(&c->lock);
	grow(c, size);
	c->total += size;
	if (size > c->room) {
		data += size - c->room;
		size = c->room;
	}
	if (size) {
		at = (c->total - size) % c->room;
		first = c->room - at < size ? c->room - at : size;
		memcpy(c->kept + at, data, first);
		memcpy(c->kept, data + first, size - first);
	}
	wanted = c->wanted;
	c->wanted = false;
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
	size_t n, at, first;

	pthread_mutex_lock(&c->lock);
	if (c->total - from > c->room)
		from = c->total - c->room;
	n = c->total - from < room ? (size_t)(c->total - from) : room;
	if (n) {
		at = from % c->room;
		first = c->room - at < n ? c->room - at : n;
		memcpy(out, c->kept + at, first);
		memcpy(out + first, c->kept, n - first);
	}
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
