/* virtio devices (virtio 1.2) on PCI, and the thread of a VM that serves them.
 *
 *   runner    accesses BAR 0 (virtio_pci.c): registers, MSI-X table
 *   I/O       the VM's one thread in io.c: takes requests from queues, writes guest memory, fires vectors
 *   owner     makes, wires, holds, saves and frees
 *
 * Locks: io->lock, then virtio->lock, then those of a device's own, of a console and of a dirty log. A runner takes
 * virtio->lock for registers alone, and whoever has it does nothing that may take long: a device reads and writes files
 * asynchronously, or on a thread of its own.
 *
 * Lifetimes: orc_io_stop before guest memory goes and before the vCPU of orc_io_set_voice is freed; orc_io_free after the devices
 * (orc_device_free of orc_virtio_device, once no bus has it) or after orc_io_detach of each, with no other thread at them; the
 * eventfds that were given stay the caller's, and open until orc_io_stop. */
#ifndef ORC_VIRTIO_H
#define ORC_VIRTIO_H

#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "virtqueue.h"

/* Numbers that older kernel headers lack: include/uapi/linux/virtio_config.h and virtio_pci.h of Linux 6.1. */
#ifndef VIRTIO_F_RING_RESET
#define VIRTIO_F_RING_RESET 40
#endif
#ifndef VIRTIO_PCI_COMMON_Q_RESET
#define VIRTIO_PCI_COMMON_Q_NDATA 56
#define VIRTIO_PCI_COMMON_Q_RESET 58
#endif

typedef struct orc_virtio orc_virtio;
typedef struct orc_io orc_io;

enum {
	ORC_VIRTIO_QUEUES = 16,
	ORC_VIRTIO_VECTORS = ORC_VIRTIO_QUEUES + 1, /* one for each queue, and one for changes of the configuration */
	ORC_VIRTIO_CONFIG = 128,                    /* bytes of the device's own configuration, at most */
	ORC_VIRTIO_KIND = 64,                       /* bytes of state that only its kind knows */
	ORC_VIRTIO_WISH = 8,                        /* bytes of the configuration that the owner changes at once */
};
#define ORC_KICKED_CONFIG (1ull << 63) /* the owner has changed the configuration */
struct orc_virtio_state;

/* BAR 0 of every device, whatever it has. A page for each part: a hypervisor above us could map them one by one, and the
 * offsets need no arithmetic. The size is a power of two, as that of a BAR is. */
enum {
	ORC_BAR_COMMON = 0x0,    /* 4.1.4.3 */
	ORC_BAR_ISR = 0x1000,    /* 4.1.4.5 */
	ORC_BAR_DEVICE = 0x2000, /* 4.1.4.6 */
	ORC_BAR_NOTIFY = 0x3000, /* 4.1.4.4: queue n at 4 * n */
	ORC_BAR_TABLE = 0x4000,  /* MSI-X */
	ORC_BAR_PBA = 0x5000,
	ORC_BAR_SIZE = 0x8000,
	ORC_BAR_PART = 0x1000, /* the most that a part has */
	ORC_BAR_COMMON_SIZE = 60, /* up to and with queue_reset and the padding to 4 */
	ORC_NOTIFY_MULTIPLIER = 4, /* a doubleword for each queue: an ioeventfd of any width */
};

/* ---- what a kind of device is --------------------------------------------------------------------------------- */

/* What became of a queue that was served. */
enum orc_served {
	ORC_DRAINED, /* orc_queue_take gave nothing: the driver is to notify us of more */
	ORC_MORE,    /* a ring's worth was served: again, after the others */
	ORC_WAITING, /* for something else than the driver: again after orc_virtio_again, or after a callback of this device */
};

/* All but `free` with virtio->lock held; whoever is called may use orc_queue_*, and what says so. */
struct orc_virtio_ops {
	uint16_t type;       /* 5: VIRTIO_ID_* */
	uint16_t queues;     /* or 0: orc_virtio_init's */
	uint16_t queue_size; /* the most, of each queue: a power of two up to ORC_QUEUE_MOST */
	uint32_t config_size;
	orc_u64 features;    /* the device's own, 1ull << n; those of queues are added: orc_virtio_init */
	/* I/O thread: takes at most a ring's worth of chains, and puts those that are done. The device is live, and the queue is
	 * enabled. What is to be interrupted for it is seen to, and so is a queue that broke. NULL: another process serves its
	 * queues (virtio_lent.c). */
	enum orc_served (*serve)(orc_virtio *, uint16_t queue);
	/* Runner: within config_size, 1 to 8 bytes. To store them in v->config is its own affair. NULL: nothing is written. */
	void (*config_write)(orc_virtio *, uint32_t offset, const uint8_t *data, uint32_t size);
	/* Any thread: the owner has changed the configuration. NULL: nothing. */
	void (*configured)(orc_virtio *);
	/* Any thread: the driver has set DRIVER_OK, or a saved state has it; v->accepted says what was negotiated. NULL: nothing. */
	void (*start)(orc_virtio *);
	/* Any thread: nothing is taken from now on. Requests in flight end as they may, soon, and are put, which writes nothing
	 * any more; the reset ends with the last of them. Also of a device that was not started. NULL: nothing. */
	void (*reset)(orc_virtio *);
	/* Runner: the same of one queue (2.6.1): whatever the device keeps of it is forgotten. NULL: nothing. */
	void (*queue_reset)(orc_virtio *, uint16_t queue);
	/* Any thread, nothing in flight: what only this kind keeps, in state->kind, which is zeroed; whether it can be in that state;
	 * and to be in it, which was reset and has all else of it already. NULL, all of them: it keeps nothing. */
	void (*save)(const orc_virtio *, struct orc_virtio_state *);
	bool (*fits)(const orc_virtio *, const struct orc_virtio_state *);
	void (*load)(orc_virtio *, const struct orc_virtio_state *);
	void (*free)(orc_virtio *); /* frees it, after orc_virtio_fini. Nothing is in flight */
};

/* A callback of a descriptor that the device watches. I/O thread, with virtio->lock held; also while the I/O thread is held and
 * something is in flight. It reads the descriptor, or is called again at once. Queues may be put to, and are served after it
 * if they were ORC_WAITING; interrupts are seen to. */
typedef void orc_virtio_ready(orc_virtio *, int fd);

/* First member of each kind's own structure. */
struct orc_virtio {
	orc_device bar;
	const struct orc_virtio_ops *ops;
	const orc_guest_memory *memory;
	uint16_t queues, vectors;
	orc_u64 offered;
	_Atomic(orc_io *) io;     /* that serves it; NULL: none yet */
	/* Queues that are to be served, a bit each, and ORC_KICKED_CONFIG. Any thread sets, the I/O thread clears. */
	_Atomic orc_u64 kicked;
	int watched;              /* a descriptor; -1: none. Before it is attached */
	orc_virtio_ready *ready;

	pthread_mutex_t lock;     /* what follows */
	orc_u64 accepted;         /* feature bits that the driver wrote; in force once FEATURES_OK is set */
	uint32_t device_feature_select, driver_feature_select;
	uint8_t status, isr, generation;
	bool config_changed;      /* since the driver read any of it: 4.1.4.3.1 */
	bool resetting;           /* something is in flight or lent still; `status` is as it was */
	bool master;              /* the bus lets it access memory: orc_virtio_set_master */
	orc_u64 lent;             /* queues that another process serves now, a bit each */
	orc_u64 owed_kicks;       /* of such a device: queues whose kick_fd is to be written, */
	uint32_t owed_vectors;    /* and vectors that are to fire (orc_virtio_owed) */
	uint16_t queue_select, config_vector;
	struct orc_queue queue[ORC_VIRTIO_QUEUES];
	uint16_t queue_vector[ORC_VIRTIO_QUEUES];
	orc_u64 queue_resetting, waiting; /* a bit for each queue */
	struct orc_vector {
		orc_u64 address;
		uint32_t data;
		bool masked;
	} vector[ORC_VIRTIO_VECTORS];
	int kick_fd[ORC_VIRTIO_QUEUES], vector_fd[ORC_VIRTIO_VECTORS]; /* -1: none */
	enum orc_queue_error error; /* why it needs a reset: what the driver broke, in which queue */
	uint16_t error_queue;
	orc_u64 interrupts, kicks;
	uint8_t config[ORC_VIRTIO_CONFIG]; /* little-endian, as the guest reads it */

	pthread_mutex_t wish_lock; /* what follows; last of all */
	struct {
		uint32_t offset, size; /* size 0: none */
		uint8_t data[ORC_VIRTIO_WISH];
	} wish; /* of orc_virtio_config_set */
};

/* ---- for the author of a kind ----------------------------------------------------------------------------------- */

/* The structure that begins with it is zeroed. `queues`: as many as the device has, where ops->queues is 0. Offers VERSION_1,
 * INDIRECT_DESC, EVENT_IDX, RING_RESET and ops->features | features. */
void orc_virtio_init(orc_virtio *, const struct orc_virtio_ops *, const orc_guest_memory *, uint16_t queues, orc_u64 features);
void orc_virtio_fini(orc_virtio *); /* from ops->free */
static inline bool orc_virtio_has(const orc_virtio *v, unsigned feature) /* negotiated; lock held */
{
	return v->accepted >> feature & 1;
}
/* For `serve` of a queue whose buffers are all to be written, or all to be read: does the work on each chain, for a turn. What is
 * not so is refused (ORC_QUEUE_BAD_REQUEST). Lock held. */
enum { ORC_LATER = -1, ORC_REFUSED = -2, ORC_TURN_BYTES = 64 * 1024 /* that are read in a turn: some microseconds */ };
struct orc_chain_work {
	bool writes;
	bool (*ready)(void *of); /* there is something to do it with. NULL: always */
	/* Bytes that were written, 0 or more; or ORC_LATER: nothing can be done now (the same chain comes again); or ORC_REFUSED. */
	int64_t (*work)(void *of, const struct orc_chain *);
};
enum orc_served orc_virtio_each(struct orc_queue *, const struct orc_chain_work *, void *of);
/* Its chains may be taken: DRIVER_OK, no error, enabled, not being reset, bus master. Lock held. */
bool orc_virtio_live(const orc_virtio *, uint16_t queue);
/* Have a queue served by the I/O thread. Any thread, the lock held or not. */
void orc_virtio_again(orc_virtio *, uint16_t queue);
/* Changes the configuration (up to ORC_VIRTIO_WISH bytes, always the same ones of a device), and tells the driver. Any thread, no
 * lock held: it waits for nobody. If another thread is at an attached device, the I/O thread does it soon, or once it is held no
 * more; of several changes the last counts. */
void orc_virtio_config_set(orc_virtio *, uint32_t offset, const void *data, uint32_t size);
/* Before it is attached: whatever else wakes it (an io_uring's eventfd, input). The descriptor is the device's own: it closes it
 * in orc_virtio_stop, or when it is freed. One for each device. */
void orc_virtio_watch(orc_virtio *, int fd, orc_virtio_ready *);

/* ---- between io.c and virtio*.c --------------------------------------------------------------------------------- */

/* Lock held, all of them. */
void orc_virtio_reset(orc_virtio *);     /* begins it: 2.4 */
void orc_virtio_all_again(orc_virtio *); /* each queue */
void orc_virtio_serve(orc_virtio *, uint16_t queue); /* if it is live */
void orc_virtio_configure(orc_virtio *); /* as the owner has wished by orc_virtio_config_set */
void orc_virtio_settle(orc_virtio *); /* after requests were put: interrupts, errors, resets that waited for them */
void orc_virtio_called(orc_virtio *); /* what it watches is ready */
uint32_t orc_virtio_in_flight(const orc_virtio *);
uint32_t orc_virtio_pending(const orc_virtio *); /* vectors that fired and that no irqfd has taken, a bit each */
struct orc_virtio_state;
void orc_virtio_look_at_state(orc_virtio *, struct orc_virtio_state *); /* orc_virtio_save, which takes the lock */
/* Registers by offset, of any size and at any place; what is not there reads as 0 and ignores writes. */
void orc_virtio_common_read(orc_virtio *, uint32_t offset, uint8_t *data, uint32_t size);
void orc_virtio_common_write(orc_virtio *, uint32_t offset, const uint8_t *data, uint32_t size);
void orc_virtio_config_read(orc_virtio *, uint32_t offset, uint8_t *data, uint32_t size);
void orc_virtio_config_write(orc_virtio *, uint32_t offset, const uint8_t *data, uint32_t size);
bool orc_virtio_pci_answer(orc_device *, orc_vcpu *by, const struct orc_access *);

/* ---- for the owner --------------------------------------------------------------------------------------------- */

/* BAR 0, to be claimed; free it to free all. An access to it that concerns where or whether a vector fires (its mask, or the
 * address or data of one that is not masked) is stored and then goes up to Python, which looks at orc_virtio_vector and binds
 * or unbinds the vector's eventfd, before the guest goes on. Nothing else does. */
orc_device *orc_virtio_device(orc_virtio *);
uint16_t orc_virtio_type(const orc_virtio *);
uint8_t orc_virtio_isr(orc_virtio *); /* 4.1.4.5, as it is, without the effect of a read. Any thread, the lock not held */
uint16_t orc_virtio_queues(const orc_virtio *);
uint16_t orc_virtio_vectors(const orc_virtio *);
uint32_t orc_virtio_config_size(const orc_virtio *); /* of ORC_BAR_DEVICE; 0: it has none */

/* Before the device is attached: the ioeventfd at ORC_BAR_NOTIFY + 4 * queue. Non-blocking. */
void orc_virtio_set_kick_fd(orc_virtio *, uint16_t queue, int fd);
/* Before the guest runs: written when the vector fires, whether an irqfd listens or not. Non-blocking. Without one (-1) it
 * does not fire. What was written and nobody took is its pending bit. */
void orc_virtio_set_vector_fd(orc_virtio *, uint16_t vector, int fd);
/* Whether the PCI function is a bus master (6.2.2 of PCI 3.0); at first it is. If not, the device touches no guest memory: nothing
 * is taken, and a queue of which something is in flight is broken (ORC_QUEUE_CUT_OFF), as nobody could be told of its end.
 * What the kernel transfers already it goes on with. (QEMU stops the device as well, and takes DRIVER_OK from it:
 * virtio_write_config.) Any thread. Whether its vectors reach anybody is for whoever binds them. */
void orc_virtio_set_master(orc_virtio *, bool on);
/* As the guest programmed it. Any thread. */
void orc_virtio_vector(orc_virtio *, uint16_t vector, struct orc_vector *out);

int orc_virtio_outstanding(orc_virtio *); /* requests in flight, now; -1: it is being served. Waits for no lock. Any thread */
struct orc_virtio_counters {
	orc_u64 requests, interrupts, kicks;
	uint8_t status;
	uint16_t error, error_queue; /* enum orc_queue_error, since the last reset: why it needs one */
};
void orc_virtio_look(orc_virtio *, struct orc_virtio_counters *out); /* any thread */

/* All that it keeps, but who it is wired to. Nothing is in flight: the I/O thread is held, or does not have it. */
struct orc_queue_state {
	orc_u64 descriptors, driver, device;
	uint16_t size, vector, next, error;
	bool enabled;
};
struct orc_virtio_state {
	orc_u64 accepted;
	uint32_t device_feature_select, driver_feature_select;
	uint8_t status, isr, generation;
	bool config_changed;
	uint16_t queue_select, config_vector, error, error_queue;
	uint16_t queues, vectors;
	struct orc_queue_state queue[ORC_VIRTIO_QUEUES];
	struct orc_vector vector[ORC_VIRTIO_VECTORS];
	uint32_t pending; /* vectors that fired and that no irqfd has taken, a bit each */
	uint8_t config[ORC_VIRTIO_CONFIG];
	uint8_t kind[ORC_VIRTIO_KIND];
};
void orc_virtio_save(orc_virtio *, struct orc_virtio_state *);
/* Gives back its descriptor. After orc_io_stop; nothing else but looks at it is done then. A second call does nothing. */
void orc_virtio_stop(orc_virtio *);
/* As one that was saved, of the same kind with the same features and memory. Its eventfds are set: those of pending vectors are
 * written, and all queues are looked at once. False: no such device can be in that state, and this one is as it was. */
bool orc_virtio_load(orc_virtio *, const struct orc_virtio_state *);
/* As it was made: also the MSI-X table, which the driver's own reset leaves. Not while it is attached and let go. */
void orc_virtio_power_on(orc_virtio *);

/* ---- io.c ----------------------------------------------------------------------------------------------------- */

/* A thread of that name, which serves what is attached. 0 or a negative errno. Any thread, all of these; one at a time, of those
 * that wait. */
int orc_io_start(const char *name, orc_io **out);
/* Who is told of output of consoles, and that a hold has come to rest: any vCPU of the VM (orc_talk). Before a device is attached. */
void orc_io_set_voice(orc_io *, orc_vcpu *);
/* What notifications of queues are charged to, one each, and who waits for: levels from 0 on. Before a device is attached. They
 * outlive it. */
void orc_io_set_bucket(orc_io *, int level, orc_bucket *);
/* cap.c: it, with those that work for it, may use that part of a CPU; 1: it has no cap, which is to be so before orc_io_free. Owner.
 * 0 or a negative errno. */
int orc_io_cap(orc_fleet *, orc_io *, double share);
struct orc_cap **orc_io_cap_of(orc_io *); /* cap.c's */
int orc_io_tid(const orc_io *); /* the kernel's number of its thread; 0: it has not begun, or has ended. Any thread */
void orc_io_spent(orc_virtio *, orc_u64 ns); /* I/O thread, in a device: another thread has used so much CPU for it */
orc_u64 orc_io_others(const orc_io *); /* the sum of those. Any thread */
void orc_io_rest(orc_io *, bool on); /* the capper: it serves nothing until it may go on. What is in flight for a hold ends */
orc_vcpu *orc_io_voice(orc_virtio *); /* I/O thread, in a device */
int orc_io_attach(orc_io *, orc_virtio *); /* 0 or a negative errno. Its kick_fds are set */
void orc_io_detach(orc_io *, orc_virtio *); /* waits until nothing of it is in flight */
/* Waits until nothing is in flight, and nothing is taken from a queue until each hold was let go. Notifications are kept. */
void orc_io_hold(orc_io *);
/* The same in two parts, for whoever must not wait at once: the thread finishes the queue that it is at, and what is in flight.
 * orc_io_wait waits for both. Or the voice is told (orc_talk) once it is still, unless it is so at once. */
void orc_io_hold_soon(orc_io *);
void orc_io_wait(orc_io *);
/* In this hold nothing is in flight any more. It waits for no lock: so at first it may say no of what the thread is just finishing.
 * Whoever holds it, and not while others attach or detach. */
bool orc_io_is_still(const orc_io *);
void orc_io_let_go(orc_io *);
/* Waits until nothing is in flight, and for the thread's end: no guest memory is touched any more, whoever notifies. */
void orc_io_stop(orc_io *);
void orc_io_free(orc_io *); /* stops it, if need be; after its devices are freed */
void orc_io_wake(orc_io *); /* any thread */

/* ---- kinds ------------------------------------------------------------------------------------------------------ */

/* virtio_rng.c: the host's getrandom(2). The one to copy. NULL: no memory. */
orc_virtio *orc_virtio_rng_new(const orc_guest_memory *);

/* virtio_console.c: output goes to the console. With `ports`, at most ORC_CONSOLE_PORTS, it has so many besides (5.3,
 * VIRTIO_CONSOLE_F_MULTIPORT), each of which must be given next. NULL: no memory. The console and its ports outlive it. */
enum {
	ORC_CONSOLE_PORTS = (ORC_VIRTIO_QUEUES - 4) / 2, /* two queues each, beside those of the console and for control messages */
	ORC_CONSOLE_NAME = 64,                           /* bytes of a port's name */
};
orc_virtio *orc_virtio_console_new(const orc_guest_memory *, orc_console *, uint16_t columns, uint16_t rows, unsigned ports);
/* Before it is attached: port 1 to `ports` is that one (orc_console_new). Its name: UTF-8, `size` bytes. */
void orc_virtio_console_port(orc_virtio *, unsigned port, const char *name, size_t size, orc_console *);
void orc_virtio_console_listen(orc_virtio *); /* it takes the console's input from now on; that of its ports it always takes */
/* It takes no input and gives no output any more: what is done at the console and its ports reaches neither the device nor its I/O
 * thread, which is to be so before orc_io_free. A second call does nothing. */
void orc_virtio_console_stop(orc_virtio *);
void orc_virtio_console_resize(orc_virtio *, uint16_t columns, uint16_t rows); /* any thread */

/* virtio_balloon.c: memory that the guest does not use goes back to the host. Its memory has pages of 4 KiB. 0 or a negative errno. */
enum {
	ORC_BALLOON_SHARED = 1, /* memory of a memfd, whose pages are removed there */
	ORC_BALLOON_FILE = 2,   /* private over a file: a page that was given back is as it is in the file */
	ORC_BALLOON_REPORTING = 4, ORC_BALLOON_DEFLATE_ON_OOM = 8, ORC_BALLOON_MUST_TELL_HOST = 16, /* features to be offered */
	ORC_BALLOON_STATISTICS = 10, /* that a driver may tell, by the numbers of VIRTIO_BALLOON_S_*: 5.5.6.4 */
};
int orc_virtio_balloon_new(const orc_guest_memory *, unsigned flags, orc_ns interval, orc_virtio **out);
void orc_virtio_balloon_set_target(orc_virtio *, uint32_t pages); /* how many the guest shall do without. Any thread */
struct orc_balloon_counters {
	bool driver;       /* there is one */
	uint32_t actual;   /* pages that it does without, by its own account */
	orc_u64 inflated, deflated; /* pages that it told of */
	orc_u64 reported;           /* bytes that it said are free */
	orc_u64 given_back, failed; /* bytes that the host has, and that the kernel did not take */
	orc_u64 updates;   /* how often it told its statistics */
	orc_ns updated;    /* when, last */
	uint32_t known;    /* those that it has told, a bit each */
	orc_u64 statistic[ORC_BALLOON_STATISTICS];
};
void orc_virtio_balloon_look(orc_virtio *, struct orc_balloon_counters *out); /* any thread; waits for nobody */

/* virtio_lent.c: a device whose queues another process serves. `features`: all that it offers. `config_size` bytes are its
 * configuration, which stays; queue_size is a power of two up to ORC_QUEUE_MOST. NULL: no memory, or a number that does not fit. It
 * is never attached to an orc_io. An access that concerns whom the queues belong to (status, a queue's enable and vector) is
 * stored and then goes up to Python; so does one that notifies a queue, where no ioeventfd is. */
orc_virtio *orc_virtio_lent_new(const orc_guest_memory *, uint16_t type, uint16_t queues, uint16_t queue_size, orc_u64 features,
				const uint8_t *config, uint32_t config_size);
/* Any thread, all of these. Which queues the driver has running, a bit each: those that should be lent. */
orc_u64 orc_virtio_live_queues(orc_virtio *);
/* They are lent from now on, with the device as `out` says; 0: none is running, or they are lent already. Until they are back, a
 * reset of the driver's is not over. */
orc_u64 orc_virtio_lend(orc_virtio *, struct orc_virtio_state *out);
/* All that was lent is back, and nobody touches guest memory for it any more; `next`: where each queue is. */
void orc_virtio_back(orc_virtio *, const uint16_t *next);
/* Notifies the back-end, as it may have taken a notification that it did not act on before, and the driver, as what was used last
 * may have been told to nobody: both are owed from now on. */
void orc_virtio_wake(orc_virtio *, uint16_t queue);
/* Who is to be notified, a bit each; they are the caller's then. `kicks` NULL: vectors alone. Any thread. */
uint32_t orc_virtio_owed(orc_virtio *, uint64_t *kicks);
void orc_virtio_owe(orc_virtio *, uint32_t vectors); /* back: they can't fire now, and are pending */

/* virtio_blk.c: a disk whose bytes a store has (store.h), which it frees; not if this fails. `id`: at most 20 characters, for the
 * guest's /dev/disk/by-id. 0 or a negative errno. */
typedef struct orc_store orc_store;
int orc_virtio_blk_new(const orc_guest_memory *, orc_store *, const char *id, orc_virtio **out);
/* What is limited: requests, and their data, in sectors of 512 bytes (a bucket counts no more than 1e9 a second). Each by a
 * bucket of the disk, and by those that disks of a VM, a group and a tenant share. A bucket counts what has been done already
 * (orc.h), and a request waits before it is done: so of a bucket with a burst of b + 1, b go at once. */
enum { ORC_BLK_OPERATIONS, ORC_BLK_SECTORS, ORC_BLK_METERS };
enum { ORC_BLK_OWN, ORC_BLK_VM, ORC_BLK_GROUP, ORC_BLK_TENANT, ORC_BLK_LEVELS };
/* Before it is attached. The bucket outlives the device, or its close. 0 or a negative errno. */
int orc_virtio_blk_set_bucket(orc_virtio *, int meter, int level, orc_bucket *);
void orc_virtio_blk_limit_changed(orc_virtio *); /* of a bucket that it has: whoever waits looks again. Any thread */
/* The kernel's number of its store's thread; 0: it has none (yet: one that begins later is where the I/O thread is). Owner. */
int orc_virtio_blk_thread(orc_virtio *);
/* Its store is freed now, and its files are closed, so that another one can have them; of its buckets it needs none any more. After
 * orc_io_stop. A second call does nothing. */
void orc_virtio_blk_close(orc_virtio *);
struct orc_blk_counters {
	orc_u64 reads, writes, flushes, discards, zeroes; /* that were done */
	orc_u64 read_bytes, written_bytes;
	orc_u64 errors;   /* requests that the guest got an error for */
	orc_u64 no_space; /* those among them that the host had no room for */
	orc_u64 waits;    /* requests that a bucket has kept waiting */
	orc_u64 waited[ORC_BLK_LEVELS]; /* ns for which one has, by the level of the slowest */
};
void orc_virtio_blk_look(orc_virtio *, struct orc_blk_counters *out); /* any thread */

#endif
