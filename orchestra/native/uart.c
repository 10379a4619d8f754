/* A 16550A UART.
 *
 * Source: National Semiconductor PC16550D data sheet. The line is infinitely fast: the transmitter is always empty, so a
 * THR-empty interrupt is pending whenever it is enabled, until the guest reads IIR or writes THR.
 *
 * Whoever types can't know when the guest is ready, and a driver that starts drops what it finds: it clears the FIFOs, and reads
 * the data register for luck (Linux, serial8250_do_startup). So the other end sends only while the guest listens, and what was
 * sent and is cleared unread it sends again. */
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum {
	LOOKS = 8, /* at the line status in a row, of a guest that waits for data. Linux makes up to three when a port is opened */
	IER_RX = 1, IER_THRE = 2, IER_LINE = 4, IER_MODEM = 8,
	IIR_NONE = 1, IIR_THRE = 2, IIR_RX = 4, IIR_LINE = 6, IIR_MODEM = 0, IIR_FIFO = 0xc0,
	FCR_ENABLE = 1, FCR_CLEAR_RX = 2,
	LCR_DLAB = 0x80,
	MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 16,
	LSR_DATA = 1, LSR_OVERRUN = 2, LSR_THRE = 0x20, LSR_IDLE = 0x40,
	MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80,
	MSR_CHANGED = 4, /* each line's bit says four bits lower that it changed */
	FIFO = ORC_UART_FIFO,
};

/* Of each register the bits that it can have; what a saved state is held to. */
enum { IER_BITS = 0x0f, MCR_BITS = 0x1f, MODEM_BITS = 0x0f };

struct orc_uart {
	orc_device device;
	orc_uart_output output;
	orc_uart_input input; /* NULL: it is given bytes by orc_uart_receive alone */
	orc_uart_unread unread;
	orc_uart_interrupt interrupt;
	void *to, *line;
	/* What follows, by any thread. Held while `output` and `interrupt` are called: the locks of a console and of the
	 * interrupt lines come behind it. */
	pthread_mutex_t lock;
	uint8_t received[FIFO], first, waiting; /* a ring; from where, and how many */
	bool looped[FIFO];                      /* it is the guest's own, from loopback */
	bool set_up, polls;                     /* see `listens` */
	uint8_t looks;                          /* for data, in a row, up to LOOKS */
	uint8_t ier, lcr, mcr, scratch, fcr;
	uint16_t divisor;
	uint8_t line_errors, modem_changes;
	bool thre_pending, level;
	_Atomic bool arrived; /* input came, and whoever had the lock looks before it goes on */
	_Atomic bool held;    /* the VM is paused: nothing comes in. Any thread */
};

/* ---- what follows from the registers -------------------------------------------------------------------------- */

static uint8_t depth(const orc_uart *u)
{
	return u->fcr & FCR_ENABLE ? FIFO : 1;
}

static uint8_t modem_lines(const orc_uart *u)
{
	if (!(u->mcr & MCR_LOOP))
		return MSR_CTS | MSR_DSR | MSR_DCD;
	return (u->mcr & MCR_RTS ? MSR_CTS : 0) | (u->mcr & MCR_DTR ? MSR_DSR : 0) | (u->mcr & MCR_OUT1 ? MSR_RI : 0) |
	       (u->mcr & MCR_OUT2 ? MSR_DCD : 0);
}

static uint8_t cause(const orc_uart *u)
{
	if (u->ier & IER_LINE && u->line_errors)
		return IIR_LINE;
	if (u->ier & IER_RX && u->waiting)
		return IIR_RX;
	if (u->ier & IER_THRE && u->thre_pending)
		return IIR_THRE;
	if (u->ier & IER_MODEM && u->modem_changes)
		return IIR_MODEM;
	return IIR_NONE;
}

static void put(orc_uart *u, uint8_t byte, bool looped)
{
	unsigned at = (u->first + u->waiting++) % FIFO;

	u->received[at] = byte;
	u->looped[at] = looped;
}

/* Whether the guest takes input. One that has not touched the port may; a driver that sets it up does once it has switched on
 * FIFOs or interrupts for data; and one that has neither, once it asks for data again and again. RTS says nothing: Linux sets it
 * for its console, and switches the FIFOs off and reads the data register for luck when the port is opened. */
static bool listens(const orc_uart *u)
{
	return !u->set_up || u->polls || u->fcr & FCR_ENABLE || u->ier & IER_RX;
}

/* In loopback the input is cut off. */
static bool has_room(const orc_uart *u)
{
	return !atomic_load(&u->held) && !(u->mcr & MCR_LOOP) && u->waiting < depth(u);
}

/* What waits at the other end comes as soon as there is room. */
static void refill(orc_uart *u, orc_vcpu *by)
{
	uint8_t bytes[FIFO];
	size_t n = u->input && listens(u) && has_room(u) ? u->input(u->to, by, bytes, depth(u) - u->waiting) : 0;

	for (size_t i = 0; i < n; i++)
		put(u, bytes[i], false);
}

/* Drops what waits. What came from the other end goes back there. */
static void clear(orc_uart *u)
{
	uint8_t bytes[FIFO];
	size_t n = 0;

	for (unsigned i = 0; i < u->waiting; i++)
		if (!u->looped[(u->first + i) % FIFO])
			bytes[n++] = u->received[(u->first + i) % FIFO];
	u->waiting = 0;
	if (n && u->unread)
		u->unread(u->to, bytes, n);
}

/* After each change: by whom it was made. */
static void update(orc_uart *u, orc_vcpu *by)
{
	bool level;

	refill(u, by);
	level = cause(u) != IIR_NONE;
	if (level == u->level)
		return;
	u->level = level;
	u->interrupt(u->line, level);
}

/* Input came, or whoever had the lock has let go of it. Nobody waits for the lock here: who types is an event loop, and a vCPU's
 * thread that has the lock may wait long for a CPU. */
static void look(orc_uart *u, orc_vcpu *by)
{
	while (atomic_load(&u->arrived) && !pthread_mutex_trylock(&u->lock)) {
		if (atomic_exchange(&u->arrived, false))
			update(u, by);
		pthread_mutex_unlock(&u->lock);
		atomic_thread_fence(memory_order_seq_cst); /* it may have come since: who types has the other order */
	}
}

static void unlock(orc_uart *u, orc_vcpu *by)
{
	pthread_mutex_unlock(&u->lock);
	atomic_thread_fence(memory_order_seq_cst);
	look(u, by);
}

/* ---- data ----------------------------------------------------------------------------------------------------- */

static uint8_t take(orc_uart *u)
{
	uint8_t byte;

	if (!u->waiting)
		return 0;
	byte = u->received[u->first];
	u->first = (u->first + 1) % FIFO;
	u->waiting--;
	return byte;
}

static void transmit(orc_uart *u, orc_vcpu *by, const uint8_t *data, size_t n)
{
	if (!(u->mcr & MCR_LOOP)) {
		u->output(u->to, by, data, n);
		return;
	}
	for (size_t i = 0; i < n; i++) {
		if (u->waiting < depth(u)) {
			put(u, data[i], true);
			continue;
		}
		u->line_errors |= LSR_OVERRUN;
		if (!(u->fcr & FCR_ENABLE)) { /* without a FIFO the new byte takes the old one's place, with one it is lost */
			clear(u);
			put(u, data[i], true);
		}
	}
}

/* ---- registers ------------------------------------------------------------------------------------------------ */

static uint8_t read_register(orc_uart *u, orc_vcpu *by, orc_u64 number)
{
	uint8_t value;

	if (number != 5)
		u->looks = 0;
	if (u->lcr & LCR_DLAB && number < 2)
		return (uint8_t)(number ? u->divisor >> 8 : u->divisor);
	switch (number) {
	case 0:
		value = take(u);
		break;
	case 1:
		return u->ier;
	case 2:
		value = cause(u);
		if (value == IIR_THRE)
			u->thre_pending = false;
		value |= u->fcr & FCR_ENABLE ? IIR_FIFO : 0;
		break;
	case 3:
		return u->lcr;
	case 4:
		return u->mcr;
	case 5:
		if (u->looks < LOOKS && ++u->looks == LOOKS)
			u->polls = true;
		refill(u, by);
		value = LSR_THRE | LSR_IDLE | u->line_errors | (u->waiting ? LSR_DATA : 0);
		u->line_errors = 0;
		break;
	case 6:
		value = modem_lines(u) | u->modem_changes;
		u->modem_changes = 0;
		break;
	case 7:
		return u->scratch;
	default: /* nobody is there */
		return 0xff;
	}
	update(u, by);
	return value;
}

static void set_up(orc_uart *u)
{
	u->set_up = true;
	u->polls = false;
}

static void write_register(orc_uart *u, orc_vcpu *by, orc_u64 number, uint8_t value)
{
	uint8_t before;

	u->looks = 0;
	if (u->lcr & LCR_DLAB && number < 2) {
		u->divisor = number ? (uint16_t)((u->divisor & 0xff) | value << 8) : (uint16_t)((u->divisor & 0xff00) | value);
		return;
	}
	switch (number) {
	case 0:
		transmit(u, by, &value, 1);
		u->thre_pending = true;
		break;
	case 1:
		set_up(u);
		if (value & IER_THRE && !(u->ier & IER_THRE))
			u->thre_pending = true;
		u->ier = value & IER_BITS;
		break;
	case 2:
		set_up(u);
		/* A change of FIFO mode clears the FIFOs; without the enable bit the others are not programmed. */
		if ((value ^ u->fcr) & FCR_ENABLE || (value & FCR_ENABLE && value & FCR_CLEAR_RX))
			clear(u);
		u->fcr = value & FCR_ENABLE ? value : 0;
		break;
	case 3:
		u->lcr = value;
		break;
	case 4:
		set_up(u);
		before = modem_lines(u);
		u->mcr = value & MCR_BITS;
		/* The ring indicator tells its trailing edge only, the others any change. */
		u->modem_changes |= ((before ^ modem_lines(u)) & ~(MSR_RI & modem_lines(u))) >> MSR_CHANGED;
		break;
	case 7:
		u->scratch = value;
		break;
	default:
		return;
	}
	update(u, by);
}

/* ---- the device ----------------------------------------------------------------------------------------------- */

/* Wider accesses than a byte reach one register after the other, as on the 8-bit bus it sits on. */
static void access_registers(orc_uart *u, orc_vcpu *by, const struct orc_access *a, uint8_t *data)
{
	for (uint32_t i = 0; i < a->size; i++) {
		if (a->write)
			write_register(u, by, a->offset + i, data[i]);
		else
			data[i] = read_register(u, by, a->offset + i);
	}
}

static bool answer(orc_device *d, orc_vcpu *by, const struct orc_access *a)
{
	orc_uart *u = (orc_uart *)d;

	pthread_mutex_lock(&u->lock);
	if (a->write && a->size == 1 && a->offset == 0 && !(u->lcr & LCR_DLAB)) { /* a string is transmitted as a whole */
		u->looks = 0;
		transmit(u, by, a->data, a->count);
		u->thre_pending = true;
		update(u, by);
	} else {
		for (uint32_t i = 0; i < a->count; i++)
			access_registers(u, by, a, a->data + (size_t)i * a->size);
	}
	unlock(u, by);
	return true;
}

static void free_uart(orc_device *d)
{
	orc_uart *u = (orc_uart *)d;

	pthread_mutex_destroy(&u->lock);
	free(u);
}

/* ---- state ---------------------------------------------------------------------------------------------------- */

static void power_on(struct orc_uart_state *s)
{
	*s = (struct orc_uart_state){.divisor = 12 /* 9600 baud, as firmware leaves it */};
}

void orc_uart_save(orc_uart *u, struct orc_uart_state *s)
{
	pthread_mutex_lock(&u->lock);
	*s = (struct orc_uart_state){
		.waiting = u->waiting, .ier = u->ier, .lcr = u->lcr, .mcr = u->mcr, .scratch = u->scratch, .fcr = u->fcr,
		.line_errors = u->line_errors, .modem_changes = u->modem_changes, .divisor = u->divisor,
		.thre_pending = u->thre_pending, .level = u->level};
	for (uint8_t i = 0; i < u->waiting; i++)
		s->received[i] = u->received[(u->first + i) % FIFO];
	unlock(u, NULL);
}

static void take_over(orc_uart *u, const struct orc_uart_state *s)
{
	memcpy(u->received, s->received, FIFO);
	u->first = 0;
	u->waiting = s->waiting;
	u->ier = s->ier;
	u->lcr = s->lcr;
	u->mcr = s->mcr;
	u->scratch = s->scratch;
	u->fcr = s->fcr;
	u->line_errors = s->line_errors;
	u->modem_changes = s->modem_changes;
	u->divisor = s->divisor;
	u->thre_pending = s->thre_pending;
	memset(u->looped, 0, sizeof u->looped);
	u->polls = false;
	u->looks = 0;
	u->set_up = s->ier || s->mcr || s->fcr;
}

/* Into a state, and its line to the level that follows: also if it is the same, as the irqchip may be another one. */
static void enter(orc_uart *u, const struct orc_uart_state *s)
{
	pthread_mutex_lock(&u->lock);
	take_over(u, s);
	u->level = cause(u) != IIR_NONE;
	u->interrupt(u->line, u->level);
	unlock(u, NULL);
}

bool orc_uart_load(orc_uart *u, const struct orc_uart_state *s)
{
	const orc_uart of = {.ier = s->ier, .waiting = s->waiting, .line_errors = s->line_errors,
			     .modem_changes = s->modem_changes, .thre_pending = s->thre_pending};

	if (s->ier & ~IER_BITS || s->mcr & ~MCR_BITS || s->modem_changes & ~MODEM_BITS || s->line_errors & ~LSR_OVERRUN ||
	    (s->fcr && !(s->fcr & FCR_ENABLE)) || s->waiting > (s->fcr & FCR_ENABLE ? FIFO : 1) ||
	    s->level != (cause(&of) != IIR_NONE))
		return false;
	enter(u, s);
	return true;
}

void orc_uart_reset(orc_uart *u)
{
	struct orc_uart_state s;

	pthread_mutex_lock(&u->lock);
	clear(u);
	unlock(u, NULL);
	power_on(&s);
	enter(u, &s);
}

static void make(orc_uart *u, orc_uart_output output, void *to, orc_uart_interrupt interrupt, void *line)
{
	struct orc_uart_state s;

	memset(u, 0, sizeof *u);
	u->device = (orc_device){answer, free_uart};
	u->output = output;
	u->to = to;
	u->interrupt = interrupt;
	u->line = line;
	power_on(&s);
	take_over(u, &s); /* and the line, which is low, is not set */
	pthread_mutex_init(&u->lock, NULL);
}

orc_uart *orc_uart_new(orc_uart_output output, void *to, orc_uart_interrupt interrupt, void *line)
{
	orc_uart *u = malloc(sizeof *u);

	if (u)
		make(u, output, to, interrupt, line);
	return u;
}

orc_device *orc_uart_device(orc_uart *u)
{
	return &u->device;
}

size_t orc_uart_receive(orc_uart *u, const uint8_t *data, size_t n)
{
	size_t taken = 0;

	pthread_mutex_lock(&u->lock);
	for (; taken < n && has_room(u); taken++)
		put(u, data[taken], false);
	update(u, NULL);
	unlock(u, NULL);
	return taken;
}

/* ---- on a console and an interrupt line ----------------------------------------------------------------------- */

struct serial {
	orc_uart uart;
	orc_console *console;
	orc_interrupts *interrupts;
	uint32_t gsi;
};

static void say(void *to, orc_vcpu *by, const uint8_t *data, size_t size)
{
	orc_console_say(to, by, data, size);
}

static size_t hear(void *to, orc_vcpu *by, uint8_t *out, size_t size)
{
	return orc_console_read(to, by, out, size);
}

static void give_back(void *to, const uint8_t *data, size_t size)
{
	orc_console_unread(to, data, size);
}

static void typed(void *device)
{
	orc_uart *u = device;

	atomic_store(&u->arrived, true);
	atomic_thread_fence(memory_order_seq_cst);
	look(u, NULL);
}

void orc_serial_hold(orc_uart *u, bool on)
{
	atomic_store(&u->held, on); /* a vCPU that is at the registers has not parked: whoever waits for that sees what it did */
	if (!on)
		typed(u); /* what was typed meanwhile */
}

void orc_serial_stop(orc_uart *u)
{
	struct serial *s = (struct serial *)u;

	orc_console_detach(s->console, s);
	pthread_mutex_lock(&u->lock);
	if (u->input) /* what the guest has not read is for the next run */
		clear(u);
	u->input = NULL;
	u->unread = NULL;
	unlock(u, NULL);
}

static void free_serial(orc_device *d)
{
	orc_serial_stop((orc_uart *)d);
	orc_console_free(((struct serial *)d)->console);
	free_uart(d);
}

static void raise_or_lower(void *line, bool level)
{
	struct serial *s = line;

	if (s->interrupts)
		orc_interrupts_set(s->interrupts, s->gsi, level); /* the spec's number was checked; nobody could be told here */
}

orc_uart *orc_serial_new(orc_console *console, orc_interrupts *interrupts, uint32_t gsi)
{
	struct serial *s = malloc(sizeof *s);

	if (!s)
		return NULL;
	make(&s->uart, say, console, raise_or_lower, s);
	s->uart.device.free = free_serial;
	s->console = orc_console_hold(console);
	s->interrupts = interrupts;
	s->gsi = gsi;
	return &s->uart;
}

void orc_serial_listen(orc_uart *u)
{
	struct serial *s = (struct serial *)u;

	pthread_mutex_lock(&u->lock);
	u->input = hear; /* not before: it is for the one device that takes input */
	u->unread = give_back;
	unlock(u, NULL);
	orc_console_attach(s->console, (struct orc_console_reader){.typed = typed, .device = u});
	typed(u); /* what was typed before */
}
