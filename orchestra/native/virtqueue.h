/* Guest memory as devices see it, and split virtqueues in it: the device's side of virtio 1.2, 2.7.
 *
 * The guest may change any word of its memory at any time. So each word is read once, into a variable of ours, and what was
 * read is checked and used. What a guest breaks has a name (enum orc_queue_error), and ends that queue's device alone.
 *
 * A queue has no lock: its device's lock is held for all calls (virtio.h). */
#ifndef ORC_VIRTQUEUE_H
#define ORC_VIRTQUEUE_H

#include <sys/uio.h>

#include "orc.h"

/* ---- guest memory --------------------------------------------------------------------------------------------- */

/* Never changes; it and the memory itself outlive all devices that have it. Slots that go on in each other, for the guest and
 * for us, are one region: a buffer may cross from one into the other. */
struct orc_region {
	orc_u64 start, size;
	uint8_t *host;
	bool writable;
};
typedef struct orc_guest_memory orc_guest_memory;
struct orc_guest_memory {
	orc_dirty *dirty; /* NULL: nobody is told of what devices write */
	size_t n;
	struct orc_region region[]; /* by address */
};
/* Of a VM's slots, in any order. The log is told of each write; it outlives this. NULL with errno (EINVAL: slots overlap). */
orc_guest_memory *orc_guest_memory_new(const struct kvm_userspace_memory_region *, size_t slots, orc_dirty *);
void orc_guest_memory_free(orc_guest_memory *);

/* Has the host give its pages now, for writing: MADV_POPULATE_WRITE (Linux 5.14), else by touching each. What is there stays,
 * also while others write it. Any thread. 0 or a negative errno. */
int orc_populate(void *host, size_t size);
void orc_touch(void *host, size_t size); /* the latter; a page that the host has not ends the process */

enum orc_queue_error {
	ORC_QUEUE_FINE = 0,
	/* When a queue is enabled, or taken over. */
	ORC_QUEUE_BAD_SIZE,       /* 0, no power of two, or more than the device offers */
	ORC_QUEUE_MISALIGNED,     /* 2.7: descriptors to 16, the driver's area to 2, the device's to 4 */
	ORC_QUEUE_RING_OUTSIDE,   /* a part of it does not lie within one region */
	ORC_QUEUE_RING_READ_ONLY, /* the device's area is in memory that is not to be written */
	/* When a chain is taken. */
	ORC_QUEUE_JUMP,          /* more is made available than there are descriptors */
	ORC_QUEUE_BAD_HEAD,      /* beyond the table */
	ORC_QUEUE_HEAD_IN_USE,   /* made available again before it was used */
	ORC_QUEUE_BAD_NEXT,      /* beyond the table */
	ORC_QUEUE_LOOP,          /* longer than the table */
	ORC_QUEUE_ORDER,         /* something to read behind something to write: 2.7.4.2 */
	ORC_QUEUE_EMPTY,         /* a buffer of no bytes */
	ORC_QUEUE_OVERFLOW,      /* an address beyond the last one, or more than 4 GiB in one chain: 2.7.5.2 */
	ORC_QUEUE_OUTSIDE,       /* not in memory */
	ORC_QUEUE_READ_ONLY,     /* to be written, in memory that is not */
	ORC_QUEUE_TOO_MANY,      /* pieces: ORC_CHAIN_MOST */
	ORC_QUEUE_NO_INDIRECT,   /* an indirect table that was not negotiated */
	ORC_QUEUE_NESTED,        /* an indirect table within one: 2.7.5.3.1 */
	ORC_QUEUE_INDIRECT_NEXT, /* an indirect table, and a next descriptor: 2.7.5.3.1 */
	ORC_QUEUE_BAD_TABLE,     /* an indirect table of no or of broken descriptors, or not in one region */
	/* What a device finds in a chain. */
	ORC_QUEUE_BAD_REQUEST, /* it has no meaning for this kind of device, and can't be answered with an error */
	ORC_QUEUE_ERRORS,
};
const char *orc_queue_error_name(enum orc_queue_error); /* for people: "a loop of descriptors" */

/* Where guest memory is, in as many pieces as there are regions; *n grows. `write`: it is to be written. */
enum orc_queue_error orc_guest_memory_map(const orc_guest_memory *, orc_u64 address, orc_u64 size, bool write,
					  struct iovec *out, size_t room, size_t *n);
/* The same in one piece, or NULL. */
void *orc_guest_memory_piece(const orc_guest_memory *, orc_u64 address, orc_u64 size, bool write);
/* A device wrote there, at addresses of ours that were mapped by these functions: the dirty log is told. After the write. */
void orc_guest_memory_wrote(const orc_guest_memory *, const void *host, size_t size);

/* ---- chains --------------------------------------------------------------------------------------------------- */

enum {
	ORC_QUEUE_MOST = 256, /* the largest queue that a device may offer */
	/* Pieces of one chain: a ring's worth (2.7.4.1: a device may have a reasonable limit). An indirect table may be longer
	 * than the ring, as Linux's are, up to here. */
	ORC_CHAIN_MOST = 256,
};

/* A request, checked: what the device reads, and then what it writes. */
struct orc_chain {
	uint16_t head;
	uint16_t readable, writable;    /* pieces: iov[0] on, and iov[readable] on */
	uint32_t readable_bytes, writable_bytes;
	struct iovec iov[ORC_CHAIN_MOST];
};
/* Copies from what is to be read, or to what is to be written, from byte `offset` of it on: how many there were. */
size_t orc_chain_read(const struct orc_chain *, size_t offset, void *to, size_t size);
size_t orc_chain_write(const struct orc_chain *, size_t offset, const void *from, size_t size);
/* A part of these pieces, as pieces: how many. `out` has room for n. */
size_t orc_iov_slice(const struct iovec *, size_t n, size_t offset, size_t size, struct iovec *out);

/* ---- a queue -------------------------------------------------------------------------------------------------- */

struct orc_queue {
	/* As the driver sets it up (4.1.4.3). */
	uint16_t size;
	bool enabled;
	orc_u64 descriptors, driver, device; /* guest addresses of the table, the available and the used ring */

	/* Since it was enabled. */
	const orc_guest_memory *memory;
	const struct vring_desc *table; /* of ours; what is there is the guest's */
	struct vring_avail *avail;
	struct vring_used *used;
	bool event_idx, indirect;
	uint16_t next_avail, next_used; /* free-running: what is taken next, and where the next one is put */
	uint16_t signalled;             /* next_used when the driver's wish was looked at last */
	uint16_t in_flight;             /* taken and not put */
	orc_u64 heads[ORC_QUEUE_MOST / 64]; /* whose they are */
	enum orc_queue_error error;     /* the first; once there is one, or it is not enabled, nothing is taken, and a put writes nothing */
	orc_u64 requests;               /* that were put, ever */
};

/* The driver has set it up: finds its rings, and goes on at `next` (0, or where a saved queue was: with nothing in flight it is at
 * the same place in both rings). `offered`: its largest size. The error is left in `error` as well. Reads and writes no guest
 * memory. */
enum orc_queue_error orc_queue_enable(struct orc_queue *, const orc_guest_memory *, uint16_t offered, bool event_idx,
				      bool indirect, uint16_t next);
/* Nothing of it is in flight: as at power on, with this size. Its count of requests stays. */
void orc_queue_disable(struct orc_queue *, uint16_t size);

/* The next chain. False: there is none, or the queue is broken (`error`). */
bool orc_queue_take(struct orc_queue *, struct orc_chain *out);
/* The chain is done; the first `written` bytes of what was to be written are. Its head, readable, writable and iov are as they
 * were taken. In any order. */
void orc_queue_put(struct orc_queue *, const struct orc_chain *, uint32_t written);
/* The same of one whose pieces are not kept: whatever was written of guest memory, orc_guest_memory_wrote was told. */
void orc_queue_put_head(struct orc_queue *, uint16_t head, uint32_t written);
/* The chain that was taken last, and nothing was done with it: it is taken again, as it is then. */
void orc_queue_give_back(struct orc_queue *, const struct orc_chain *);
/* Instead of it: the chain breaks a rule of the device (ORC_QUEUE_BAD_REQUEST), and ends the queue. */
void orc_queue_refuse(struct orc_queue *, const struct orc_chain *);

/* Whether the driver wants an interrupt for what was put since this was asked last. */
bool orc_queue_wants_interrupt(struct orc_queue *);
/* The driver need not notify us while we look at the queue anyway; and it shall again: true if more came meanwhile, for which
 * it has not notified anybody. */
void orc_queue_silence(struct orc_queue *);
bool orc_queue_listen(struct orc_queue *);

#endif
