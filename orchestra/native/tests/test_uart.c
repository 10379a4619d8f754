/* The 16550 under threads and under whatever a guest does. What its registers do: tests/test_machine_devices_serial.py. */
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"

enum { DATA, IER, IIR_FCR, LSR = 5, FIFOS = 1, RX = 1 };

struct line {
	bool level, restored;
	_Atomic int changes;
	size_t output;
};

static void count_output(void *to, orc_vcpu *by, const uint8_t *data, size_t size)
{
	struct line *l = to;

	(void)by, (void)data;
	l->output += size;
}

static void set_line(void *line, bool level)
{
	struct line *l = line;

	CHECK(level != l->level || l->restored, "told without a change");
	l->level = level;
	atomic_fetch_add(&l->changes, 1);
}

static uint64_t get(orc_uart *u, orc_u64 offset, uint32_t size)
{
	uint64_t value = 0;

	CHECK(orc_device_answer(orc_uart_device(u), offset, size, 1, false, &value));
	return value;
}

static void put(orc_uart *u, orc_u64 offset, uint32_t size, uint64_t value)
{
	CHECK(orc_device_answer(orc_uart_device(u), offset, size, 1, true, &value));
}

static void any_accesses_leave_the_line_at_the_level_that_iir_tells(void)
{
	struct line line = {0};
	orc_uart *u = orc_uart_new(count_output, &line, set_line, &line);
	uint64_t seed = 7;
	size_t written = 0;

	for (int i = 0; i < 200000; i++) {
		uint64_t n = random_number(&seed);
		uint32_t size = 1u << (n & 3);
		orc_u64 offset = n >> 2 & 1 ? n >> 8 & 7 : n & (1 << 20) ? UINT64_MAX - (n >> 21 & 15) : n >> 8;
		uint8_t bytes[40];
		bool level;

		memset(bytes, (int)n, sizeof bytes);
		switch (n >> 4 & 3) {
		case 0:
			put(u, offset, size, random_number(&seed));
			written += size;
			break;
		case 1:
			get(u, offset, size);
			break;
		case 2:
			CHECK(orc_uart_receive(u, bytes, n >> 32 & 31) <= 16);
			break;
		default:
			CHECK(orc_device_answer(orc_uart_device(u), n >> 8 & 7, 1, 40, true, bytes));
			written += 40;
		}
		if (n >> 40 & 1) { /* goes on in another one, as after a restore */
			struct orc_uart_state state, again;
			orc_uart *other = orc_uart_new(count_output, &line, set_line, &line);

			orc_uart_save(u, &state);
			CHECK(state.level == line.level);
			line.restored = true;
			CHECK(orc_uart_load(other, &state));
			line.restored = false;
			orc_uart_save(other, &again);
			CHECK(!memcmp(&state, &again, sizeof state));
			orc_device_free(orc_uart_device(u));
			u = other;
		}
		level = line.level;
		CHECK(!(get(u, IIR_FCR, 1) & 1) == level); /* which may end the transmitter's interrupt */
	}
	CHECK(line.output <= written && line.output > 0);
	orc_device_free(orc_uart_device(u));
}

static orc_uart *shared;
enum { BYTES = 5000 };

static void *send_bytes(void *unused)
{
	for (int sent = 0; sent < BYTES;) {
		uint8_t bytes[7];

		for (int i = 0; i < 7; i++)
			bytes[i] = (uint8_t)(sent + i);
		int taken = (int)orc_uart_receive(shared, bytes, BYTES - sent < 7 ? (size_t)(BYTES - sent) : 7);

		sent += taken;
		if (!taken)
			sched_yield(); /* as the reader does */
	}
	return unused;
}

static void bytes_that_another_thread_sends_are_read_in_order_and_each_is_once(void)
{
	struct line line = {0};
	pthread_t thread;
	orc_ns deadline = orc_now() + PATIENCE;

	shared = orc_uart_new(count_output, &line, set_line, &line);
	put(shared, IIR_FCR, 1, FIFOS);
	put(shared, IER, 1, RX);
	thread = start(send_bytes, NULL);
	for (int got = 0; got < BYTES;) {
		CHECK(orc_now() < deadline);
		if (get(shared, LSR, 1) & 1) {
			CHECK(get(shared, DATA, 1) == (uint8_t)got);
			got++;
		} else {
			sched_yield(); /* who polls without a pause keeps the lock from the other */
		}
	}
	join(thread);
	CHECK(!line.level && line.changes % 2 == 0);
	orc_device_free(orc_uart_device(shared));
}

static orc_console *console;

static void *print(void *uart)
{
	for (int i = 0; i < 500; i++) {
		uint8_t text[64];

		memset(text, 'x', sizeof text);
		CHECK(orc_device_answer(orc_uart_device(uart), DATA, 1, sizeof text, true, text));
	}
	return NULL;
}

static void several_serial_ports_write_to_one_console_and_lose_nothing(void)
{
	orc_uart *uarts[3];
	pthread_t threads[3];

	console = orc_console_new();
	for (int i = 0; i < 3; i++) {
		uarts[i] = orc_serial_new(console, NULL, 0);
		threads[i] = start(print, uarts[i]);
	}
	for (int i = 0; i < 3; i++)
		join(threads[i]);
	CHECK(orc_console_total(console) == 3 * 500 * 64);
	for (int i = 0; i < 3; i++)
		orc_device_free(orc_uart_device(uarts[i]));
	orc_console_free(console);
}

static void devices_on_a_console_may_be_used_and_freed_after_its_owner_freed_it(void)
{
	orc_console *goes = orc_console_new();
	orc_uart *u = orc_serial_new(goes, NULL, 0);
	orc_device *debug = orc_debug_console_new(goes, 0xe9);
	uint8_t text[4] = "text";

	orc_serial_listen(u);
	CHECK(orc_console_listened(goes) && orc_console_type(goes, text, 2) == 2);
	orc_console_free(goes); /* the sanitizers see whether it is gone */
	put(u, DATA, 1, 'x');
	CHECK(orc_device_answer(debug, 0xe9, 1, 4, true, text));
	CHECK(get(u, DATA, 1) == 't');
	orc_serial_stop(u);
	orc_device_free(orc_uart_device(u));
	orc_device_free(debug);
}

/* A page whose reader is held until it is let go: a thread that loses its CPU in the middle of what it does. */
static uint8_t *page;
static _Atomic bool held, let_go;

static void hold(int signal)
{
	(void)signal;
	atomic_store(&held, true);
	while (!atomic_load(&let_go))
		sched_yield();
	mprotect(page, 4096, PROT_READ);
}

static void *write_from_the_page(void *uart)
{
	CHECK(orc_device_answer(orc_uart_device(uart), DATA, 1, 64, true, page));
	return NULL;
}

static void who_reads_and_types_waits_for_no_guest_that_is_held_while_it_writes(void)
{
	struct sigaction ours = {.sa_handler = hold}, before;
	orc_uart *u;
	uint8_t text[80];
	orc_u64 position = 0;
	pthread_t guest;

	console = orc_console_new();
	u = orc_serial_new(console, NULL, 0);
	orc_serial_listen(u);
	atomic_store(&held, false);
	atomic_store(&let_go, false);
	page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(page != MAP_FAILED && !sigaction(SIGSEGV, &ours, &before));
	CHECK(!orc_console_put(console, (const uint8_t *)"hello", 5));
	guest = start(write_from_the_page, u);
	while (!atomic_load(&held))
		sched_yield();
	CHECK(orc_console_total(console) == 5);
	CHECK(orc_console_copy(console, &position, text, sizeof text) == 5 && !memcmp(text, "hello", 5));
	CHECK(orc_console_want(console, 5));
	CHECK(orc_console_type(console, (const uint8_t *)"x", 1) == 1 && orc_console_typed(console) == 1);
	atomic_store(&let_go, true);
	join(guest);
	CHECK(!sigaction(SIGSEGV, &before, NULL));
	CHECK(orc_console_total(console) == 5 + 64 && !orc_console_typed(console), "the guest took it when it went on");
	CHECK(get(u, DATA, 1) == 'x');
	CHECK(!munmap(page, 4096));
	orc_device_free(orc_uart_device(u));
	orc_console_free(console);
}

const struct test uart_tests[] = {
	TEST(any_accesses_leave_the_line_at_the_level_that_iir_tells),
	TEST(bytes_that_another_thread_sends_are_read_in_order_and_each_is_once),
	TEST(several_serial_ports_write_to_one_console_and_lose_nothing),
	TEST(devices_on_a_console_may_be_used_and_freed_after_its_owner_freed_it),
	TEST(who_reads_and_types_waits_for_no_guest_that_is_held_while_it_writes),
	{0},
};
