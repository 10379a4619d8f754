#include <string.h>

#include "../decode.h"
#include "check.h"

static const int modes[] = {16, 32, 64};

/* Decodes a copy that ends where the bytes end, so that a sanitizer sees a read beyond. */
static bool decode(const uint8_t *code, size_t n, int bits, struct orc_insn *insn)
{
	uint8_t *copy = malloc(n ? n : 1);
	bool found;

	if (!copy)
		abort();
	memcpy(copy, code, n);
	found = orc_decode(copy, n, bits, insn);
	free(copy);
	return found;
}

static void each_kind_is_told(void)
{
	static const struct {
		const char *code;
		size_t n;
		int bits, kind, length, size;
	} known[] = {
#define KNOWN(code, bits, kind, size) {code, sizeof code - 1, bits, ORC_INSN_##kind, sizeof code - 1, size}
		KNOWN("\xf0\x01\x03", 32, LOCK, 4),
		KNOWN("\x66\xf0\x49\x83\x44\x24\x10\x01", 64, LOCK, 8),
		KNOWN("\x87\x06\x34\x12", 16, LOCK, 2),
		KNOWN("\xf0\x48\x0f\xc7\x08", 64, LOCK, 16),
		KNOWN("\xe5\x80", 16, IN, 2),
		KNOWN("\x66\xef", 32, OUT, 2),
		KNOWN("\xf3\x6c", 64, INS, 1),
		KNOWN("\x65\x6f", 32, OUTS, 4),
		KNOWN("\xf4", 64, HLT, 0),
		KNOWN("\xcd\x80", 32, INT, 0),
		KNOWN("\x0f\x05", 64, SYSCALL, 0),
		KNOWN("\x0f\x94\x05\x01\x02\x03\x04", 32, FLAGS, 1),
		KNOWN("\xc1\x1b\x05", 32, FLAGS, 4),
		KNOWN("\x0f\xc7\x0b", 32, WIDE, 8),
	};

	for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
		struct orc_insn insn;

		CHECK(decode((const uint8_t *)known[i].code, known[i].n, known[i].bits, &insn), "%zu", i);
		CHECK(insn.kind == known[i].kind && insn.length == known[i].length && insn.size == known[i].size,
		      "%zu: kind %d, length %d, size %d", i, insn.kind, insn.length, insn.size);
		for (size_t less = 0; less < known[i].n; less++)
			CHECK(!decode((const uint8_t *)known[i].code, less, known[i].bits, &insn), "%zu of %zu", less, i);
	}
}

static void no_byte_beyond_the_known_ones_is_read(void)
{
	uint64_t state = 88172645463325252ull;

	for (int round = 0; round < 300000; round++) {
		static const uint8_t likely[] = {0xf0, 0x66, 0x67, 0x48, 0x0f, 0x87, 0x81, 0xf7, 0x04, 0x84, 0x25, 0xc7, 0xf3, 0x6d};
		uint8_t code[ORC_INSN_MAX + 5];
		struct orc_insn insn;
		size_t n = random_number(&state) % (sizeof code + 1);
		int bits = modes[random_number(&state) % 3];

		for (size_t i = 0; i < n; i++) {
			uint64_t chance = random_number(&state);

			code[i] = chance >> 62 ? likely[chance % sizeof likely] : (uint8_t)(chance >> 8);
		}
		if (!decode(code, n, bits, &insn)) {
			CHECK(insn.kind == ORC_INSN_OTHER);
			continue;
		}
		CHECK(insn.kind > ORC_INSN_OTHER && insn.kind <= ORC_INSN_ILLEGAL, "%d", insn.kind);
		CHECK(insn.length <= n && insn.length <= ORC_INSN_MAX, "%d of %zu", insn.length, n);
		CHECK(insn.base <= ORC_NO_REGISTER && insn.index <= ORC_NO_REGISTER && insn.bit_offset <= ORC_NO_REGISTER);
		CHECK(insn.segment <= ORC_NO_SEGMENT && insn.size <= 16);
		if (n)
			orc_may_matter(code, n);
	}
}

const struct test decode_tests[] = {
	TEST(each_kind_is_told),
	TEST(no_byte_beyond_the_known_ones_is_read),
	{0},
};
