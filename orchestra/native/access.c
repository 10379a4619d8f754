/* The accesses that vCPUs wait for, in pieces: whatever needs no Python is answered here.
 *
 *   orc_access_begin --> pieces of nobody, and of devices in C: answered --> done
 *                          `- a piece, or a chunk of elements, for Python --> orc_access_next goes on behind it */
#include <string.h>

#include "core.h"

/* `size` bytes of the access are answered, or `count` whole elements. */
static void advance(struct orc_pending *io, uint32_t size, uint32_t count)
{
	if (size == io->size) {
		io->done += count;
		return;
	}
	io->byte += size;
	if (io->byte == io->size) {
		io->byte = 0;
		io->done++;
	}
}

static bool is_device_size(uint32_t size)
{
	return size <= 8 && !(size & (size - 1));
}

/* The naturally aligned piece that begins there, as hardware would transfer it. */
static uint32_t aligned_piece(orc_u64 address, uint32_t most)
{
	uint32_t size = 8;

	while (size > most || address & (size - 1))
		size /= 2;
	return size;
}

/* The next piece of the access: answers it, or sets v->access and returns that Python is to. */
static bool go_on(orc_vcpu *v, const struct orc_table *t)
{
	struct orc_pending *io = &v->io;
	orc_u64 address = io->address + io->byte, last;
	const struct orc_claim *claim = orc_table_find(t, address, &last);
	uint8_t *data = io->data + (size_t)io->done * io->size + io->byte;
	uint32_t size = io->size - io->byte, count = 1;

	if (last - address < size - 1) /* as far as this claim, or this gap, goes */
		size = (uint32_t)(last - address) + 1;
	if (claim && (size != io->size || !is_device_size(size)))
		size = aligned_piece(address, size);
	if (size == io->size)
		count = io->count - io->done;
	if (!claim) { /* Nobody drives the bus: it reads as ones. */
		if (!io->write)
			memset(data, 0xff, (size_t)size * count);
		io->nobody = true;
		advance(io, size, count);
		return false;
	}
	v->access = (struct orc_access){.address = address, .offset = address - claim->start, .claim = claim->version,
					.size = size, .count = count, .write = io->write, .task = claim->task, .data = data};
	if (claim->device && claim->device->answer(claim->device, v, &v->access)) {
		advance(io, size, count);
		return false;
	}
	if (count > ORC_CHUNK)
		v->access.count = ORC_CHUNK;
	if (count == 1)
		memcpy(&v->access.value, data, size); /* the guest does not run: nobody else writes there */
	io->value = v->access.value;
	if (claim->task) /* which is asked for each element: who answers one may be another than who answers the next */
		v->access.count = 1;
	return true;
}

bool orc_access_next(orc_vcpu *v)
{
	struct orc_pending *io = &v->io;
	struct orc_reader *r = io->why == ORC_IO ? &v->on_ports : &v->on_mmio;
	const struct orc_table *t;
	bool python = false;

	if (!io->open)
		return false;
	if (v->access.count == 1 && !v->access.write && v->access.value != io->value)
		memcpy(v->access.data, &v->access.value, v->access.size);
	if (v->access.count)
		advance(io, v->access.size, v->access.count); /* that was answered since */
	v->access.count = 0;
	t = orc_table_hold(r);
	while (io->done < io->count && !python)
		python = go_on(v, t);
	orc_table_let_go(r);
	if (python)
		return true;
	orc_count(&v->unclaimed, io->nobody);
	v->access.count = 0;
	io->open = false;
	return false;
}

void orc_access_abandon(orc_vcpu *v)
{
	struct orc_pending *io = &v->io;
	size_t answered = (size_t)io->done * io->size + io->byte;

	if (io->open && !io->write)
		memset(io->data + answered, 0xff, (size_t)io->count * io->size - answered);
	v->access.count = 0;
	io->open = false;
}

enum orc_why orc_access_up(orc_vcpu *v)
{
	return v->io.why;
}

enum orc_why orc_access_begin(orc_vcpu *v, enum orc_why why, orc_u64 address, uint32_t size, uint32_t count, bool write,
			      void *data)
{
	v->io = (struct orc_pending){.why = why, .open = true, .address = address, .size = size, .count = count, .write = write,
				.data = data};
	v->access.count = 0;
	return orc_access_next(v) ? orc_access_up(v) : ORC_ANSWERED;
}

enum orc_why orc_access_resume(orc_vcpu *v)
{
	while (orc_access_next(v)) {
		uint32_t commands = orc_vcpu_commands(v);

		if (commands & ORC_STOP) {
			orc_access_abandon(v);
			break;
		}
		/* Other commands come when all of it is answered: in the middle of a string its registers are not what the
		 * guest would see. So it does not wait for its turn or a cap either, which a command would end at once. */
		if (commands & ~(uint32_t)ORC_CAP || (!commands && (!v->waiting || orc_wait_turn(v))))
			return orc_access_up(v);
		orc_commanded(v); /* waits for a cap */
		v->access.count = 0; /* not asked after all: somebody else may be there by now */
	}
	return ORC_ANSWERED;
}

bool orc_device_answer(orc_device *d, orc_u64 offset, uint32_t size, uint32_t count, bool write, void *data)
{
	const struct orc_access access = {.offset = offset, .size = size, .count = count, .write = write, .data = data};

	return d->answer(d, NULL, &access);
}

void orc_device_free(orc_device *d)
{
	if (d)
		d->free(d);
}
