/* e^t = 2^n * e^r with n = round(t * log2(e)) and r = t - n * ln 2, where ln 2 is split in two so
 * that the subtraction is exact to f32 (Cody and Waite). e^r for |r| <= ln(2) / 2 is the
 * interpolation polynomial of degree 6 at the Chebyshev nodes; with its coefficients rounded to f32
 * it is off by 2.0e-8 relative, and e^0 = 1 exactly. The error measured over [-86, 0] is 1.0 ulp
 * with FMA and 1.3 without (tests/test_attention_tile.c). Results below e^-86 are flushed to 0, so
 * that every intermediate is a normal number; against a row sum >= 1 they are nothing.
 *
 * Folding log2(e) into q and taking 2^x would save two instructions of sixteen. It is not done: it
 * rounds every query once more, and scores, page maxima and thresholds would differ in unit. */
#ifndef ATTENTION_ATTN_EXP_H
#define ATTENTION_ATTN_EXP_H

#define EXP_LOG2E  0x1.715476p+0f
#define EXP_LN2_HI 0x1.63p-1f
#define EXP_LN2_LO (-0x1.bd0106p-13f)
#define EXP_C3     0x1.555404p-3f /* c0 = c1 = 1, c2 = 1/2 */
#define EXP_C4     0x1.5554acp-5f
#define EXP_C5     0x1.126fa6p-7f
#define EXP_C6     0x1.6d7532p-10f
#define EXP_LO     (-86.0f)

#endif
