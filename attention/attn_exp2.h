/* 2^f for f in [-1/2, 1/2]: the interpolation polynomial of degree 6 at the Chebyshev nodes, off by
 * 2.6e-9 relative before rounding, 2^0 = 1 exactly. With 2^n put into the exponent it is exp2; the
 * measured error over [-125, 0] is below 1 ulp (tests/test_attention_tile.c). Flushing results
 * below 2^-125 keeps every intermediate a normal number; against a row sum >= 1 they are nothing.
 */
#ifndef ATTENTION_ATTN_EXP2_H
#define ATTENTION_ATTN_EXP2_H

#define EXP2_C1 0x1.62e430p-1f
#define EXP2_C2 0x1.ebfbe0p-3f
#define EXP2_C3 0x1.c6aeccp-5f
#define EXP2_C4 0x1.3b2a1cp-7f
#define EXP2_C5 0x1.5f48c0p-10f
#define EXP2_C6 0x1.444000p-13f
#define EXP2_LO (-125.0f)

#endif
