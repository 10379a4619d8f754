/* A device whose queues another process serves: when it gets them, what a reset waits for, who is told; and that process's life. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include "driver.h"

enum { RINGS = LOW, SIZE = 8, ID = 2 };

struct bench {
	struct guest g;
	orc_virtio *v;
	struct driver d[2];
	int kick[2], vector[3];
};

static void begin(struct bench *b)
{
	const uint8_t config[4] = {1, 2, 3, 4};

	guest_begin(&b->g, NULL);
	b->v = orc_virtio_lent_new(b->g.memory, ID, 2, 16, F_VERSION_1 | F_RINGS | 1ull << 9, config, sizeof config);
	CHECK(b->v);
	for (uint16_t i = 0; i < 2; i++) {
		b->kick[i] = new_eventfd();
		orc_virtio_set_kick_fd(b->v, i, b->kick[i]);
		b->d[i] = driver_at(&b->g, RINGS + 0x1000 * i, SIZE);
	}
	for (uint16_t i = 0; i < 3; i++) {
		b->vector[i] = new_eventfd();
		orc_virtio_set_vector_fd(b->v, i, b->vector[i]);
	}
}

static void end(struct bench *b)
{
	orc_device_free(orc_virtio_device(b->v));
	for (unsigned i = 0; i < 2; i++)
		close(b->kick[i]);
	for (unsigned i = 0; i < 3; i++)
		close(b->vector[i]);
	guest_end(&b->g);
}

static void run(struct bench *b)
{
	CHECK(negotiate(b->v, F_VERSION_1));
	for (uint16_t i = 0; i < 2; i++)
		set_up(b->v, i, &b->d[i], F_VERSION_1, i + 1);
	go(b->v);
}

static uint8_t status(orc_virtio *v)
{
	return (uint8_t)get(v, VIRTIO_PCI_COMMON_STATUS, 1);
}

static void queues_are_lent_once_from_driver_ok_on(void)
{
	struct bench b;
	struct orc_virtio_state s;
	const uint16_t next[ORC_VIRTIO_QUEUES] = {0};

	begin(&b);
	CHECK(!orc_virtio_lend(b.v, &s));
	CHECK(negotiate(b.v, F_VERSION_1));
	set_up(b.v, 1, &b.d[1], F_VERSION_1, 2);
	CHECK(!orc_virtio_live_queues(b.v));
	go(b.v);
	CHECK(orc_virtio_live_queues(b.v) == 2);
	CHECK(orc_virtio_lend(b.v, &s) == 2);
	CHECK(s.queue[1].enabled && s.queue[1].descriptors == b.d[1].descriptors && s.queue[1].vector == 2 && s.accepted == F_VERSION_1);
	CHECK(!orc_virtio_lend(b.v, &s), "they are lent already");
	orc_virtio_back(b.v, next);
	CHECK(orc_virtio_lend(b.v, &s) == 2);
	end(&b);
}

static void reset_is_over_when_the_queues_are_back(void)
{
	struct bench b;
	struct orc_virtio_state s;
	const uint16_t next[ORC_VIRTIO_QUEUES] = {3, 4};

	begin(&b);
	run(&b);
	CHECK(orc_virtio_lend(b.v, &s) == 3);
	CHECK(!put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, 0), "goes up: the back-end is to stop");
	CHECK(status(b.v), "not done yet");
	CHECK(!orc_virtio_live_queues(b.v));
	orc_virtio_back(b.v, next);
	CHECK(!status(b.v));
	run(&b);
	CHECK(orc_virtio_lend(b.v, &s) == 3);
	CHECK(!s.queue[0].next && !s.queue[1].next, "from the start");
	end(&b);
}

static void queues_go_on_where_they_came_back(void)
{
	struct bench b;
	struct orc_virtio_state s;
	const uint16_t next[ORC_VIRTIO_QUEUES] = {3, 0xffff};

	begin(&b);
	run(&b);
	CHECK(orc_virtio_lend(b.v, &s) == 3);
	orc_virtio_back(b.v, next);
	orc_virtio_save(b.v, &s);
	CHECK(s.queue[0].next == 3 && s.queue[1].next == 0xffff);
	CHECK(orc_virtio_load(b.v, &s));
	CHECK(orc_virtio_lend(b.v, &s) == 3);
	CHECK(s.queue[0].next == 3 && s.queue[1].next == 0xffff);
	CHECK(!orc_virtio_load(b.v, &s), "not while they are lent");
	end(&b);
}

static void what_concerns_the_back_end_goes_up_and_nothing_else(void)
{
	struct bench b;

	begin(&b);
	CHECK(!put(b.v, VIRTIO_PCI_COMMON_STATUS, 1, ACKNOWLEDGE));
	CHECK(put(b.v, VIRTIO_PCI_COMMON_Q_SELECT, 2, 1));
	CHECK(!put(b.v, VIRTIO_PCI_COMMON_Q_MSIX, 2, 1));
	CHECK(!put(b.v, VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1));
	CHECK(put(b.v, VIRTIO_PCI_COMMON_Q_SIZE, 2, 8));
	CHECK(put(b.v, ORC_BAR_DEVICE, 4, 7));
	CHECK(get(b.v, ORC_BAR_DEVICE, 4) == 0x04030201, "read-only");
	CHECK(!put(b.v, ORC_BAR_NOTIFY + ORC_NOTIFY_MULTIPLIER, 4, 1));
	CHECK(put(b.v, ORC_BAR_NOTIFY + ORC_NOTIFY_MULTIPLIER * 2, 4, 1), "there is no such queue");
	end(&b);
}

static void ring_reset_is_not_offered(void)
{
	struct bench b;

	begin(&b);
	CHECK(!negotiate(b.v, F_VERSION_1 | 1ull << VIRTIO_F_RING_RESET));
	end(&b);
}

static void eventfds_that_a_back_end_has_are_not_written_but_owed(void)
{
	struct bench b;
	struct orc_virtio_state s;
	uint64_t kicks = 99;

	begin(&b);
	run(&b);
	CHECK(!orc_virtio_owed(b.v, &kicks) && !kicks);
	orc_virtio_wake(b.v, 1);
	orc_virtio_wake(b.v, 99);
	CHECK(!put(b.v, ORC_BAR_NOTIFY, 4, 0), "goes up: Python is to notify the back-end");
	for (unsigned i = 0; i < 3; i++)
		CHECK(!is_readable(b.vector[i]) && (i > 1 || !is_readable(b.kick[i])));
	orc_virtio_save(b.v, &s);
	CHECK(s.pending == 4, "a vector that is owed is pending");
	CHECK(orc_virtio_owed(b.v, NULL) == 4 && !orc_virtio_owed(b.v, &kicks) && kicks == 3);
	CHECK(!orc_virtio_owed(b.v, &kicks) && !kicks, "once");
	orc_virtio_owe(b.v, 4);
	CHECK(get(b.v, ORC_BAR_PBA, 4) == 4, "it could not fire");
	orc_virtio_power_on(b.v);
	CHECK(!orc_virtio_owed(b.v, &kicks));
	end(&b);
}

static void numbers_that_do_not_fit_make_no_device(void)
{
	struct guest g;
	uint8_t config[ORC_VIRTIO_CONFIG + 1] = {0};

	guest_begin(&g, NULL);
	CHECK(!orc_virtio_lent_new(g.memory, ID, 0, 16, 0, config, 4));
	CHECK(!orc_virtio_lent_new(g.memory, ID, ORC_VIRTIO_QUEUES + 1, 16, 0, config, 4));
	CHECK(!orc_virtio_lent_new(g.memory, ID, 1, 24, 0, config, 4));
	CHECK(!orc_virtio_lent_new(g.memory, ID, 1, 0, 0, config, 4));
	CHECK(!orc_virtio_lent_new(g.memory, ID, 1, 2 * ORC_QUEUE_MOST, 0, config, 4));
	CHECK(!orc_virtio_lent_new(g.memory, ID, 1, 16, 0, config, sizeof config));
	guest_end(&g);
}

/* ---- the process ------------------------------------------------------------------------------------------------ */

static int spawned(const char *script, const int *keep, size_t n, int output, int *pidfd)
{
	char *argv[] = {(char *)"sh", (char *)"-c", (char *)(uintptr_t)script, NULL};

	return orc_spawn("/bin/sh", argv, keep, n, output, SIGTERM, pidfd);
}

static void await_end(int pidfd)
{
	struct pollfd p = {.fd = pidfd, .events = POLLIN};

	CHECK(poll(&p, 1, (int)(PATIENCE / 1000000)) == 1, "it goes on");
}

static size_t all_of(int fd, char *text, size_t room)
{
	size_t n = 0;
	ssize_t got;

	while ((got = read(fd, text + n, room - 1 - n)) > 0)
		n += (size_t)got;
	text[n] = 0;
	return n;
}

static void program_has_its_output_and_the_descriptors_it_is_given(void)
{
	int out[2], given, other, pidfd, pid, status;
	char text[256], script[128], wanted[128];

	CHECK(!pipe(out));
	given = fcntl(0, F_DUPFD_CLOEXEC, 50);
	other = fcntl(0, F_DUPFD, 60); /* of a program that does not think of it */
	CHECK(given >= 50 && other >= 60);
	snprintf(script, sizeof script, "[ -e /proc/self/fd/%d ] && echo given; [ -e /proc/self/fd/%d ] || echo no; cat; exit 7", given, other);
	pid = spawned(script, &given, 1, out[1], &pidfd);
	CHECK(pid > 0);
	close(out[1]);
	all_of(out[0], text, sizeof text);
	snprintf(wanted, sizeof wanted, "given\nno\n");
	CHECK(!strcmp(text, wanted), "%s", text);
	await_end(pidfd);
	CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 7);
	close(out[0]);
	close(given);
	close(other);
	close(pidfd);
}

static void program_that_is_not_there_is_an_error(void)
{
	char *argv[] = {(char *)"nothing", NULL};
	int pidfd = -1;

	CHECK(orc_spawn("/nothing/there", argv, NULL, 0, 2, SIGTERM, &pidfd) == -ENOENT);
	CHECK(pidfd == -1);
	CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "no child is left");
}

struct begun {
	int out, pid, pidfd;
};

static void *begin_and_end(void *argument)
{
	struct begun *b = argument;

	b->pid = spawned("echo begun; exec sleep 1000", NULL, 0, b->out, &b->pidfd);
	return NULL;
}

static void program_ends_with_the_thread_that_began_it(void)
{
	struct begun b;
	pthread_t thread;
	int out[2], status;

	CHECK(!pipe(out));
	b.out = out[1];
	CHECK(!pthread_create(&thread, NULL, begin_and_end, &b));
	pthread_join(thread, NULL);
	CHECK(b.pid > 0);
	await_end(b.pidfd);
	CHECK(waitpid(b.pid, &status, 0) == b.pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
	close(b.pidfd);
	close(out[0]);
	close(out[1]);
}

const struct test lent_tests[] = {
	TEST(queues_are_lent_once_from_driver_ok_on),
	TEST(reset_is_over_when_the_queues_are_back),
	TEST(queues_go_on_where_they_came_back),
	TEST(what_concerns_the_back_end_goes_up_and_nothing_else),
	TEST(ring_reset_is_not_offered),
	TEST(eventfds_that_a_back_end_has_are_not_written_but_owed),
	TEST(numbers_that_do_not_fit_make_no_device),
	TEST(program_has_its_output_and_the_descriptors_it_is_given),
	TEST(program_that_is_not_there_is_an_error),
	TEST(program_ends_with_the_thread_that_began_it),
	{0},
};
