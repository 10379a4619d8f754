/* A split virtqueue (virtio 1.2, 2.7), the device's side. */
#include <linux/virtio_ring.h>
#include <string.h>

#include "virtqueue.h"

static const char *const error_names[ORC_QUEUE_ERRORS] = {
	[ORC_QUEUE_FINE] = "no error",
	[ORC_QUEUE_BAD_SIZE] = "a queue size that is 0, no power of two or too large",
	[ORC_QUEUE_MISALIGNED] = "a misaligned ring",
	[ORC_QUEUE_RING_OUTSIDE] = "a ring outside of memory",
	[ORC_QUEUE_RING_READ_ONLY] = "a used ring in read-only memory",
	[ORC_QUEUE_JUMP] = "more chains made available than there are descriptors",
	[ORC_QUEUE_BAD_HEAD] = "a chain whose head is not in the descriptor table",
	[ORC_QUEUE_HEAD_IN_USE] = "a chain made available again before it was used",
	[ORC_QUEUE_BAD_NEXT] = "a next descriptor that is not in the table",
	[ORC_QUEUE_LOOP] = "a loop of descriptors",
	[ORC_QUEUE_ORDER] = "a readable buffer behind a writable one",
	[ORC_QUEUE_EMPTY] = "a buffer without a byte",
	[ORC_QUEUE_OVERFLOW] = "a length that overflows",
	[ORC_QUEUE_OUTSIDE] = "a buffer outside of memory",
	[ORC_QUEUE_READ_ONLY] = "a writable buffer in read-only memory",
	[ORC_QUEUE_TOO_MANY] = "a chain of too many pieces",
	[ORC_QUEUE_NO_INDIRECT] = "an indirect table that was not negotiated",
	[ORC_QUEUE_NESTED] = "an indirect table within an indirect table",
	[ORC_QUEUE_INDIRECT_NEXT] = "an indirect table with a next descriptor",
	[ORC_QUEUE_BAD_TABLE] = "an indirect table of a bad size or outside of memory",
	[ORC_QUEUE_BAD_REQUEST] = "a request that has no meaning for the device",
};

const char *orc_queue_error_name(enum orc_queue_error e)
{
	return (unsigned)e < ORC_QUEUE_ERRORS ? error_names[e] : "an unknown error";
}

/* ---- chains --------------------------------------------------------------------------------------------------- */

size_t orc_iov_slice(const struct iovec *iov, size_t n, size_t offset, size_t size, struct iovec *out)
{
	size_t pieces = 0;

	for (size_t i = 0; i < n && size; i++) {
		size_t piece;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		piece = iov[i].iov_len - offset < size ? iov[i].iov_len - offset : size;
		out[pieces++] = (struct iovec){(uint8_t *)iov[i].iov_base + offset, piece};
		size -= piece;
		offset = 0;
	}
	return pieces;
}

size_t orc_chain_read(const struct orc_chain *c, size_t offset, void *to, size_t size)
{
	struct iovec part[ORC_CHAIN_MOST];
	size_t n = orc_iov_slice(c->iov, c->readable, offset, size, part), done = 0;

	for (size_t i = 0; i < n; i++) {
		memcpy((uint8_t *)to + done, part[i].iov_base, part[i].iov_len);
		done += part[i].iov_len;
	}
	__asm__ volatile("" : : "r"(to) : "memory"); /* see read_once */
	return done;
}

size_t orc_chain_write(const struct orc_chain *c, size_t offset, const void *from, size_t size)
{
	struct iovec part[ORC_CHAIN_MOST];
	size_t n = orc_iov_slice(c->iov + c->readable, c->writable, offset, size, part), done = 0;

	for (size_t i = 0; i < n; i++) {
		memcpy(part[i].iov_base, (const uint8_t *)from + done, part[i].iov_len);
		done += part[i].iov_len;
	}
	return done;
}

/* ---- words that the guest shares ------------------------------------------------------------------------------ */

/* A copy that the compiler does not replace by another look at the original, which may be different then: for all it knows, this
 * has changed both. */
static void read_once(void *to, const void *from, size_t size)
{
	memcpy(to, from, size);
	__asm__ volatile("" : : "r"(to) : "memory");
}

static uint16_t load(const uint16_t *word) /* on x86 a stronger order costs a load nothing */
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static void store(const struct orc_queue *q, uint16_t *word, uint16_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
	orc_guest_memory_wrote(q->memory, word, sizeof *word);
}

static uint16_t *used_event(const struct orc_queue *q) /* 2.7.7: behind the available ring */
{
	return &q->avail->ring[q->size];
}

static uint16_t *avail_event(const struct orc_queue *q) /* 2.7.10: behind the used ring */
{
	return (uint16_t *)&q->used->ring[q->size];
}

/* ---- a queue's life --------------------------------------------------------------------------------------------- */

static bool is_aligned(orc_u64 address, size_t to)
{
	return !(address & (to - 1));
}

static enum orc_queue_error map_rings(struct orc_queue *q, uint16_t offered)
{
	const orc_u64 n = q->size;

	if (!n || n & (n - 1) || n > offered) /* offered: ORC_QUEUE_MOST at most */
		return ORC_QUEUE_BAD_SIZE;
	if (!is_aligned(q->descriptors, VRING_DESC_ALIGN_SIZE) || !is_aligned(q->driver, VRING_AVAIL_ALIGN_SIZE) ||
	    !is_aligned(q->device, VRING_USED_ALIGN_SIZE))
		return ORC_QUEUE_MISALIGNED;
	/* 2.7: with the event words, whether they are used or not. */
	q->table = orc_guest_memory_piece(q->memory, q->descriptors, n * sizeof(struct vring_desc), false);
	q->avail = orc_guest_memory_piece(q->memory, q->driver, 6 + 2 * n, false);
	q->used = orc_guest_memory_piece(q->memory, q->device, 6 + 8 * n, false);
	if (!q->table || !q->avail || !q->used)
		return ORC_QUEUE_RING_OUTSIDE;
	if (!orc_guest_memory_piece(q->memory, q->device, 6 + 8 * n, true))
		return ORC_QUEUE_RING_READ_ONLY;
	return ORC_QUEUE_FINE;
}

enum orc_queue_error orc_queue_enable(struct orc_queue *q, const orc_guest_memory *m, uint16_t offered, bool event_idx,
				      bool indirect, uint16_t next)
{
	q->memory = m;
	q->event_idx = event_idx;
	q->indirect = indirect;
	q->next_avail = q->next_used = q->signalled = next;
	q->error = map_rings(q, offered);
	q->enabled = true;
	return q->error;
}

void orc_queue_disable(struct orc_queue *q, uint16_t size)
{
	*q = (struct orc_queue){.size = size, .requests = q->requests};
}

static void break_it(struct orc_queue *q, enum orc_queue_error e)
{
	if (!q->error)
		q->error = e;
}

/* ---- taking ----------------------------------------------------------------------------------------------------- */

/* Follows a chain through the table, and through the one indirect table that it may end in (2.7.5.3). */
static enum orc_queue_error follow(const struct orc_queue *q, struct orc_chain *out)
{
	const uint8_t *table = (const uint8_t *)q->table;
	uint32_t entries = q->size, index = out->head, followed = 0;
	orc_u64 bytes[2] = {0, 0};
	size_t n = 0;
	bool nested = false;
	enum orc_queue_error e;

	out->readable = out->writable = 0;
	for (;;) {
		struct vring_desc d;
		bool write;

		if (followed++ == entries)
			return ORC_QUEUE_LOOP;
		read_once(&d, table + (size_t)index * sizeof d, sizeof d); /* an indirect table need not be aligned */
		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (!q->indirect)
				return ORC_QUEUE_NO_INDIRECT;
			if (nested)
				return ORC_QUEUE_NESTED;
			if (d.flags & VRING_DESC_F_NEXT)
				return ORC_QUEUE_INDIRECT_NEXT;
			if (!d.len || d.len % sizeof d)
				return ORC_QUEUE_BAD_TABLE;
			table = orc_guest_memory_piece(q->memory, d.addr, d.len, false);
			if (!table)
				return ORC_QUEUE_BAD_TABLE;
			entries = d.len / sizeof d;
			index = followed = 0;
			nested = true;
			continue;
		}
		write = d.flags & VRING_DESC_F_WRITE;
		if (!write && out->writable)
			return ORC_QUEUE_ORDER;
		/* Each descriptor is a piece at least, so a table of any length is left after ORC_CHAIN_MOST of them. */
		e = orc_guest_memory_map(q->memory, d.addr, d.len, write, out->iov, ORC_CHAIN_MOST, &n);
		if (e)
			return e;
		bytes[write] += d.len;
		if (bytes[0] + bytes[1] > UINT32_MAX)
			return ORC_QUEUE_OVERFLOW;
		*(write ? &out->writable : &out->readable) = (uint16_t)(write ? n - out->readable : n);
		if (!(d.flags & VRING_DESC_F_NEXT))
			break;
		if (d.next >= entries)
			return ORC_QUEUE_BAD_NEXT;
		index = d.next;
	}
	out->readable_bytes = (uint32_t)bytes[0];
	out->writable_bytes = (uint32_t)bytes[1];
	return ORC_QUEUE_FINE;
}

static orc_u64 *word_of(struct orc_queue *q, uint16_t head)
{
	return &q->heads[head / 64];
}

static enum orc_queue_error take(struct orc_queue *q, struct orc_chain *out)
{
	out->head = load(&q->avail->ring[q->next_avail & (q->size - 1)]);
	if (out->head >= q->size)
		return ORC_QUEUE_BAD_HEAD;
	if (*word_of(q, out->head) >> out->head % 64 & 1)
		return ORC_QUEUE_HEAD_IN_USE;
	return follow(q, out);
}

bool orc_queue_take(struct orc_queue *q, struct orc_chain *out)
{
	uint16_t available;

	if (q->error || !q->enabled)
		return false;
	/* The entry and its descriptors were written before the index was (2.7.13), and are read behind it: acquire. */
	available = (uint16_t)(load(&q->avail->idx) - q->next_avail);
	if (!available)
		return false;
	/* Of so many descriptors there are no more chains, those in flight among them. So a guest can't have more in flight than
	 * there is room for, by not waiting for any. */
	break_it(q, available + q->in_flight > q->size ? ORC_QUEUE_JUMP : take(q, out));
	if (q->error)
		return false;
	*word_of(q, out->head) |= 1ull << out->head % 64;
	q->next_avail++;
	q->in_flight++;
	return true;
}

/* ---- putting ---------------------------------------------------------------------------------------------------- */

void orc_queue_put_head(struct orc_queue *q, uint16_t head, uint32_t written)
{
	struct vring_used_elem *element;

	*word_of(q, head) &= ~(1ull << head % 64);
	q->in_flight--;
	if (q->error || !q->enabled)
		return;
	element = &q->used->ring[q->next_used & (q->size - 1)];
	__atomic_store_n(&element->id, head, __ATOMIC_RELAXED);
	__atomic_store_n(&element->len, written, __ATOMIC_RELAXED);
	orc_guest_memory_wrote(q->memory, element, sizeof *element);
	/* After what it tells of (2.7.8.2), and seq_cst: before we look at what the driver wants, in orc_queue_wants_interrupt. The
	 * driver writes its wish and then looks at the index (2.7.14): one of the two sees the other. */
	store(q, &q->used->idx, ++q->next_used);
	q->requests++;
}

void orc_queue_put(struct orc_queue *q, const struct orc_chain *c, uint32_t written)
{
	for (unsigned i = 0; i < c->writable; i++) /* all of it: more than `written` may have been, also before a reset */
		orc_guest_memory_wrote(q->memory, c->iov[c->readable + i].iov_base, c->iov[c->readable + i].iov_len);
	orc_queue_put_head(q, c->head, written);
}

void orc_queue_give_back(struct orc_queue *q, const struct orc_chain *c)
{
	*word_of(q, c->head) &= ~(1ull << c->head % 64);
	q->in_flight--;
	q->next_avail--;
}

void orc_queue_refuse(struct orc_queue *q, const struct orc_chain *c)
{
	break_it(q, ORC_QUEUE_BAD_REQUEST);
	orc_queue_put(q, c, 0);
}

/* ---- notifications ---------------------------------------------------------------------------------------------- */

bool orc_queue_wants_interrupt(struct orc_queue *q)
{
	uint16_t before = q->signalled;

	q->signalled = q->next_used;
	if (q->error || !q->enabled || before == q->next_used)
		return false;
	if (q->event_idx) /* 2.7.7.2: if the entry of that index is among those that were put since */
		return (uint16_t)(q->next_used - load(used_event(q)) - 1) < (uint16_t)(q->next_used - before);
	return !(load(&q->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

void orc_queue_silence(struct orc_queue *q)
{
	/* With event indices the last one that we asked for lies behind us, and nobody notifies. */
	if (q->enabled && !q->error && !q->event_idx)
		store(q, &q->used->flags, VRING_USED_F_NO_NOTIFY);
}

bool orc_queue_listen(struct orc_queue *q)
{
	if (!q->enabled || q->error)
		return false;
	if (load(&q->used->flags)) /* with event indices too: 2.7.10.2 */
		store(q, &q->used->flags, 0);
	if (q->event_idx)
		store(q, avail_event(q), q->next_avail);
	/* seq_cst, both: the driver writes the index and then looks whether to notify (2.7.13.4.1), we the other way round. What it
	 * made available before it could see our wish we see here. */
	return load(&q->avail->idx) != q->next_avail;
}
