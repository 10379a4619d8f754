/* Sources: Intel SDM vol. 2, 2.1 (prefixes, ModR/M, SIB), "LOCK" and "XCHG" (what may be locked), and the opcode maps of
 * appendix A. */
#include <string.h>

#include "decode.h"

struct reader {
	const uint8_t *code;
	size_t n, at;
	bool short_of; /* it ends before the instruction does */
};

static uint8_t take(struct reader *r)
{
	if (r->at >= r->n || r->at >= ORC_INSN_MAX) {
		r->short_of = true;
		return 0;
	}
	return r->code[r->at++];
}

static int64_t take_signed(struct reader *r, int bytes)
{
	uint64_t value = 0;

	for (int i = 0; i < bytes; i++)
		value |= (uint64_t)take(r) << (8 * i);
	return bytes == 1 ? (int8_t)value : bytes == 2 ? (int16_t)value : (int32_t)value;
}

bool orc_is_prefix(uint8_t byte, int bits)
{
	switch (byte) {
	case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67:
	case 0xf0: case 0xf2: case 0xf3:
		return true;
	default:
		return bits == 64 && (byte & 0xf0) == 0x40;
	}
}

static void operand_16(struct reader *r, uint8_t modrm, struct orc_insn *insn)
{
	enum { BX = 3, BP = 5, SI = 6, DI = 7, NONE = ORC_NO_REGISTER };
	static const uint8_t base[8] = {BX, BX, BP, BP, SI, DI, BP, BX};
	static const uint8_t index[8] = {SI, DI, SI, DI, NONE, NONE, NONE, NONE};
	int mod = modrm >> 6, rm = modrm & 7;

	insn->base = base[rm];
	insn->index = index[rm];
	insn->scale = 1;
	if (mod == 0 && rm == 6) {
		insn->base = NONE;
		insn->displacement = take_signed(r, 2);
	} else if (mod) {
		insn->displacement = take_signed(r, mod);
	}
	if (insn->segment == ORC_NO_SEGMENT)
		insn->segment = insn->base == BP ? 2 : 3;
}

static void operand_32(struct reader *r, uint8_t modrm, uint8_t rex, int bits, struct orc_insn *insn)
{
	enum { SP = 4, BP = 5 };
	int mod = modrm >> 6, rm = modrm & 7;

	insn->base = (uint8_t)(rm | (rex & 1) << 3);
	insn->scale = 1;
	if (rm == 4) {
		uint8_t sib = take(r), index = (uint8_t)(((sib >> 3) & 7) | (rex & 2) << 2);

		insn->base = (uint8_t)((sib & 7) | (rex & 1) << 3);
		insn->index = index == SP ? ORC_NO_REGISTER : index; /* R12 is an index, SP is none */
		insn->scale = (uint8_t)(1 << (sib >> 6));
		if (mod == 0 && (sib & 7) == BP) {
			insn->base = ORC_NO_REGISTER;
			insn->displacement = take_signed(r, 4);
		}
	} else if (mod == 0 && rm == BP) {
		insn->base = ORC_NO_REGISTER;
		insn->relative = bits == 64;
		insn->displacement = take_signed(r, 4);
	}
	if (mod)
		insn->displacement = take_signed(r, mod == 1 ? 1 : 4);
	if (insn->segment == ORC_NO_SEGMENT)
		insn->segment = insn->base == SP || insn->base == BP ? 2 : 3;
}

/* With which values of ModR/M's reg field `opcode` (0x0f00 and up: the two-byte ones) may be locked, a bit each; its
 * operand's width, and how many bytes of constants follow. Width 0: as the operand size says. */
static unsigned lockable(unsigned opcode, int *width, int *constants, bool *bit_offset)
{
	*width = opcode & 1 ? 0 : 1;
	*constants = 0;
	*bit_offset = false;
	switch (opcode) {
	case 0x00: case 0x01: case 0x08: case 0x09: case 0x10: case 0x11: case 0x18: case 0x19: /* ADD OR ADC SBB */
	case 0x20: case 0x21: case 0x28: case 0x29: case 0x30: case 0x31:                       /* AND SUB XOR */
	case 0x86: case 0x87:                                                                   /* XCHG */
	case 0x0fb0: case 0x0fb1: case 0x0fc0: case 0x0fc1:                                     /* CMPXCHG XADD */
		return 0xff;
	case 0x80: case 0x82: case 0x83: /* but for CMP */
		*constants = 1;
		return 0x7f;
	case 0x81:
		*constants = 4; /* 2 with a 16-bit operand */
		return 0x7f;
	case 0xf6: case 0xf7: /* NOT NEG */
		return 1 << 2 | 1 << 3;
	case 0xfe: case 0xff: /* INC DEC */
		return 1 << 0 | 1 << 1;
	case 0x0fab: case 0x0fb3: case 0x0fbb: /* BTS BTR BTC */
		*width = 0;
		*bit_offset = true;
		return 0xff;
	case 0x0fba:
		*width = 0;
		*constants = 1;
		return 0xe0;
	case 0x0fc7: /* CMPXCHG8B, CMPXCHG16B */
		*width = 8;
		return 1 << 1;
	default:
		return 0;
	}
}

/* The same for what matters without the prefix, and what it is. */
static unsigned of_interest(unsigned opcode, enum orc_insn_kind *kind, int *width, int *constants)
{
	*width = opcode & 1 ? 0 : 1;
	*constants = 0;
	*kind = ORC_INSN_FLAGS;
	switch (opcode) {
	case 0x86: case 0x87:
		*kind = ORC_INSN_LOCK;
		return 0xff;
	case 0xc0: case 0xc1:
		*constants = 1;
		/* fall through */
	case 0xd0: case 0xd1: case 0xd2: case 0xd3:
		return 1 << 2 | 1 << 3;
	case 0x0fc7:
		*kind = ORC_INSN_WIDE;
		*width = 8;
		return 1 << 1;
	default:
		*width = 1;
		return (opcode & 0xfff0) == 0x0f90 ? 0xff : 0;
	}
}

struct prefixes {
	bool lock, operand, address;
	uint8_t rex;
};

/* An instruction with an operand in memory, if it is one of the two lists. */
static void decode_memory(struct reader *r, const struct prefixes *p, unsigned opcode, int operand, int bits,
			  struct orc_insn *insn)
{
	enum orc_insn_kind kind = ORC_INSN_LOCK;
	int width, constants, reg;
	bool bit_offset = false;
	unsigned may = p->lock ? lockable(opcode, &width, &constants, &bit_offset)
			       : of_interest(opcode, &kind, &width, &constants);
	uint8_t modrm;

	insn->kind = p->lock ? ORC_INSN_ILLEGAL : ORC_INSN_OTHER;
	if (!may || (opcode == 0x82 && bits == 64))
		return;
	modrm = take(r);
	reg = (modrm >> 3) & 7;
	if (modrm >> 6 == 3 || !(may >> reg & 1))
		return;
	insn->kind = kind;
	insn->reg = (uint8_t)reg;
	insn->size = (uint8_t)(width ? width : operand);
	if (opcode == 0x0fc7 && p->rex & 8)
		insn->size = 16;
	if (bit_offset)
		insn->bit_offset = (uint8_t)(reg | (p->rex & 4) << 1);
	if (insn->address_bits == 16)
		operand_16(r, modrm, insn);
	else
		operand_32(r, modrm, p->rex, bits, insn);
	if (constants == 4 && operand == 2)
		constants = 2;
	for (int i = 0; i < constants; i++)
		take(r);
}

static void decode_other(struct reader *r, unsigned opcode, int operand, int bits, struct orc_insn *insn)
{
	int width = operand > 4 ? 4 : operand; /* of port I/O: at most 4 */

	switch (opcode) {
	case 0xf4:
		insn->kind = ORC_INSN_HLT;
		break;
	case 0xe4: case 0xe5: case 0xe6: case 0xe7:
		insn->port = take(r);
		/* fall through */
	case 0xec: case 0xed: case 0xee: case 0xef:
		insn->kind = opcode & 2 ? ORC_INSN_OUT : ORC_INSN_IN;
		insn->size = (uint8_t)(opcode & 1 ? width : 1);
		break;
	case 0x6c: case 0x6d: case 0x6e: case 0x6f:
		insn->kind = opcode & 2 ? ORC_INSN_OUTS : ORC_INSN_INS;
		insn->size = (uint8_t)(opcode & 1 ? width : 1);
		if (insn->segment == ORC_NO_SEGMENT)
			insn->segment = 3;
		break;
	case 0xce:
		if (bits == 64)
			break;
		/* fall through */
	case 0xcc: case 0xcd:
		insn->kind = ORC_INSN_INT;
		insn->port = opcode == 0xcd ? take(r) : opcode == 0xcc ? 3 : 4;
		break;
	case 0x0f05: case 0x0f34:
		insn->kind = ORC_INSN_SYSCALL;
		break;
	default:
		break;
	}
}

bool orc_may_matter(const uint8_t *code, size_t n)
{
	switch (code[0]) {
	case 0x0f:
		return n > 1 && (code[1] == 0x05 || code[1] == 0x34 || code[1] == 0xc7 || (code[1] & 0xf0) == 0x90);
	case 0x6c: case 0x6d: case 0x6e: case 0x6f: case 0x86: case 0x87: case 0xc0: case 0xc1: case 0xcc: case 0xcd:
	case 0xce: case 0xd0: case 0xd1: case 0xd2: case 0xd3: case 0xe4: case 0xe5: case 0xe6: case 0xe7: case 0xec:
	case 0xed: case 0xee: case 0xef: case 0xf0: case 0xf4:
		return true;
	default:
		return false;
	}
}

bool orc_decode(const uint8_t *code, size_t n, int bits, struct orc_insn *insn)
{
	struct reader r = {.code = code, .n = n};
	struct prefixes p = {0};
	uint8_t byte;
	unsigned opcode;
	int operand;

	*insn = (struct orc_insn){.segment = ORC_NO_SEGMENT, .base = ORC_NO_REGISTER, .index = ORC_NO_REGISTER,
				  .bit_offset = ORC_NO_REGISTER, .port = -1};
	for (;;) {
		byte = take(&r);
		if (r.short_of)
			return false;
		if (!orc_is_prefix(byte, bits))
			break;
		p.rex = 0; /* only the one right before the opcode counts */
		switch (byte) {
		case 0x26: case 0x2e: case 0x36: case 0x3e: /* ignored in 64-bit code, also behind one of the other two */
			if (bits != 64 || insn->segment < 4 || insn->segment == ORC_NO_SEGMENT)
				insn->segment = (byte >> 3) & 3;
			break;
		case 0x64: insn->segment = 4; break;
		case 0x65: insn->segment = 5; break;
		case 0x66: p.operand = true; break;
		case 0x67: p.address = true; break;
		case 0xf0: p.lock = true; break;
		case 0xf2: case 0xf3: insn->rep = true; break;
		default: p.rex = byte; break;
		}
	}
	operand = bits == 64 ? (p.rex & 8 ? 8 : p.operand ? 2 : 4) : (bits == 16) == p.operand ? 4 : 2;
	insn->address_bits = bits == 64 ? (p.address ? 32 : 64) : (bits == 16) == p.address ? 32 : 16;
	opcode = byte == 0x0f ? 0x0f00u | take(&r) : byte;
	insn->opcode = (uint8_t)opcode;
	decode_memory(&r, &p, opcode, operand, bits, insn);
	if (insn->kind == ORC_INSN_OTHER)
		decode_other(&r, opcode, operand, bits, insn);
	if (r.short_of)
		insn->kind = ORC_INSN_OTHER;
	insn->length = (uint8_t)r.at;
	return insn->kind != ORC_INSN_OTHER;
}
