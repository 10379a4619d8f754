/* What a subscriber of exits has yet to receive. All of it is the owner's: no other thread looks here.
 *
 *   rings of the vCPUs --> orc_fleet_deliver --> the channels whose mask and VM fit --> orc_channel_take --> columns
 *
 * A channel is one buffer for as many records as may wait. Whenever it is empty it begins at its start again, so that a
 * subscriber who keeps up goes over the same few pages all the time, and no page is touched that was never needed. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

orc_channel *orc_channel_new(orc_fleet *f, orc_u64 mask, uint32_t vm, uint32_t capacity, bool drop_oldest)
{
	orc_channel *c = calloc(1, sizeof *c);
	void *records;

	if (!c) {
		errno = ENOMEM;
		return NULL;
	}
	records = mmap(NULL, (size_t)capacity * sizeof *c->records, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (records == MAP_FAILED) {
		free(c);
		return NULL;
	}
	*c = (orc_channel){.mask = mask, .vm = vm, .capacity = capacity, .drop_oldest = drop_oldest, .records = records,
			   .fleet = f};
	if (f) {
		c->next = f->channels;
		f->channels = c;
	}
	return c;
}

void orc_channel_end(orc_channel *c)
{
	orc_channel **link;

	if (!c->fleet)
		return;
	link = &c->fleet->channels;
	while (*link && *link != c)
		link = &(*link)->next;
	if (*link)
		*link = c->next;
	c->fleet = NULL;
}

void orc_channel_free(orc_channel *c)
{
	if (!c)
		return;
	munmap(c->records, (size_t)c->capacity * sizeof *c->records);
	free(c);
}

static void put(orc_channel *c, const struct orc_record *record)
{
	c->received++;
	if (c->waiting == c->capacity) {
		c->missed++;
		if (!c->drop_oldest)
			return;
		c->first = c->first + 1 == c->capacity ? 0 : c->first + 1;
		c->waiting--;
	}
	c->records[((orc_u64)c->first + c->waiting) % c->capacity] = *record;
	c->waiting++;
}

size_t orc_fleet_deliver(orc_fleet *f, orc_vcpu *v, struct orc_record *scratch, size_t most)
{
	size_t n = v ? orc_vcpu_drain(v, scratch, most) : orc_fleet_drain(f, scratch, most);

	for (orc_channel *c = f->channels; c; c = c->next)
		for (size_t i = 0; i < n; i++)
			if ((c->vm == ORC_EVERY_VM || c->vm == scratch[i].vm) &&
			    orc_mask_has(c->mask, scratch[i].reason, scratch[i].flags))
				put(c, &scratch[i]);
	return n;
}

size_t orc_channel_take(orc_channel *c, struct orc_record *out, size_t most)
{
	size_t n = c->waiting < most ? c->waiting : most, first = c->capacity - c->first;

	if (first > n)
		first = n;
	memcpy(out, &c->records[c->first], first * sizeof *out);
	memcpy(out + first, c->records, (n - first) * sizeof *out);
	c->waiting -= (uint32_t)n;
	c->first = c->waiting ? (uint32_t)((c->first + n) % c->capacity) : 0;
	return n;
}

void orc_channel_drop(orc_channel *c)
{
	c->missed += c->waiting;
	c->waiting = c->first = 0;
}

/* ---- columns -------------------------------------------------------------------------------------------------- */

#define COPY(type, value)                                                \
	do {                                                             \
		for (size_t i = 0; i < n; i++)                           \
			((type *)out)[i] = (type)(value);                \
	} while (0)

static bool writes(const struct orc_record *r)
{
	return (r->reason == KVM_EXIT_IO && r->arg[3] == 1) || (r->reason == KVM_EXIT_MMIO && r->arg[2] == 1);
}

void orc_records_column(const struct orc_record *r, size_t n, enum orc_column column, void *out)
{
	switch (column) {
	case ORC_COLUMN_TIME:
		COPY(orc_u64, r[i].time);
		break;
	case ORC_COLUMN_RIP:
		COPY(orc_u64, r[i].has_rip ? r[i].rip : 0);
		break;
	case ORC_COLUMN_HAS_RIP:
		COPY(uint8_t, r[i].has_rip != 0);
		break;
	case ORC_COLUMN_WAIT:
		COPY(orc_u64, r[i].wait);
		break;
	case ORC_COLUMN_VM:
		COPY(uint32_t, r[i].vm);
		break;
	case ORC_COLUMN_VCPU:
		COPY(uint32_t, r[i].vcpu);
		break;
	case ORC_COLUMN_KIND:
		COPY(uint16_t, r[i].reason);
		break;
	case ORC_COLUMN_BUS_LOCK:
		COPY(uint8_t, (r[i].flags & KVM_RUN_X86_BUS_LOCK) != 0);
		break;
	case ORC_COLUMN_GUEST_MODE:
		COPY(uint8_t, (r[i].flags & KVM_RUN_X86_GUEST_MODE) != 0);
		break;
	case ORC_COLUMN_SMM:
		COPY(uint8_t, (r[i].flags & KVM_RUN_X86_SMM) != 0);
		break;
	case ORC_COLUMN_ADDRESS:
		COPY(orc_u64, r[i].arg[0]);
		break;
	case ORC_COLUMN_SIZE:
		COPY(orc_u64, r[i].arg[1]);
		break;
	case ORC_COLUMN_WRITE:
		COPY(uint8_t, writes(&r[i]));
		break;
	case ORC_COLUMN_ARGUMENTS:
		for (size_t i = 0; i < n; i++)
			memcpy((uint8_t *)out + i * sizeof r->arg, r[i].arg, sizeof r->arg);
		break;
	case ORC_COLUMN_DATA_SIZE:
		COPY(uint8_t, r[i].data_size < sizeof r->data ? r[i].data_size : sizeof r->data);
		break;
	case ORC_COLUMN_DATA:
		memset(out, 0, n * sizeof r->data); /* behind data_size may be what an earlier exit had there */
		for (size_t i = 0; i < n; i++)
			memcpy((uint8_t *)out + i * sizeof r->data, r[i].data,
			       r[i].data_size < sizeof r->data ? r[i].data_size : sizeof r->data);
		break;
	}
}

size_t orc_records_vms(const struct orc_record *r, size_t n, uint32_t *out)
{
	size_t known = 0;

	for (size_t i = 0; i < n; i++) {
		size_t k = 0;

		/* A vCPU's records come in a row. */
		if (i && r[i].vm == r[i - 1].vm)
			continue;
		while (k < known && out[k] != r[i].vm)
			k++;
		if (k == known)
			out[known++] = r[i].vm;
	}
	return known;
}
