/* Which instruction stands there, as far as the emulated backend has to know: those that may lock the bus or wrongly claim
 * to, those that touch a port, HLT, and what unicorn gets wrong. Everything else is nobody's business here. */
#ifndef ORC_DECODE_H
#define ORC_DECODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum orc_insn_kind {
	ORC_INSN_OTHER,
	ORC_INSN_LOCK,
	ORC_INSN_IN,
	ORC_INSN_OUT,
	ORC_INSN_INS,
	ORC_INSN_OUTS,
	ORC_INSN_HLT,
	ORC_INSN_INT,     /* INT n, INT3, INTO */
	ORC_INSN_SYSCALL, /* SYSCALL, SYSENTER */
	ORC_INSN_FLAGS,   /* SETcc, RCL and RCR of memory */
	ORC_INSN_WIDE,    /* CMPXCHG8B and CMPXCHG16B without LOCK */
	ORC_INSN_ILLEGAL, /* a LOCK prefix where none may be; its length is not told */
};

enum { ORC_INSN_MAX = 15, ORC_NO_REGISTER = 16, ORC_NO_SEGMENT = 6 };

struct orc_insn {
	uint8_t kind;         /* enum orc_insn_kind */
	uint8_t length;       /* bytes, prefixes included */
	uint8_t size;         /* of the operand, in bytes */
	uint8_t address_bits; /* 16, 32 or 64 */
	bool rep;
	/* The operand in memory: segment:[base + index * scale + displacement], or relative to the next instruction. */
	uint8_t segment; /* 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS */
	uint8_t base, index, scale;
	bool relative;
	uint8_t bit_offset; /* register that holds it (BTS, BTR, BTC with a register): it moves the operand */
	int64_t displacement;
	int16_t port; /* -1: in DX; of INT its vector */
	uint8_t opcode; /* the last byte of it */
	uint8_t reg;    /* ModR/M's field of that name */
};

bool orc_is_prefix(uint8_t byte, int bits);
/* Whether one of those, or its part behind the prefixes, may begin there: what to decode at all. */
bool orc_may_matter(const uint8_t *code, size_t n);
/* Decodes what begins at `code`, of which `n` bytes are known. False, with kind OTHER, if it is none of the above (or not
 * all of it is known). `bits` is 16, 32 or 64: the code segment's default. */
bool orc_decode(const uint8_t *code, size_t n, int bits, struct orc_insn *out);

#endif
