/* kernels.h - what computes: one table for each instruction set.
 *
 * A file here says what its instruction set does better than the one below it, down to scalar, which does everything: a slot
 * that a table leaves out is taken from below. migi_kernels_fill lays the tables over each other, so that no slot is empty.
 *
 * To add an instruction set:
 *     NAME.c         what it does better: a table migi_own_NAME, and the one `below` it; compiles to nothing elsewhere
 *     kernels.h      the declaration of that table, beside the others
 *     dispatch.c     its line among `entries`, from worst to best, with the question whether this CPU has it
 * Builder, C tests and migi_kernel_report find it there. ceilings.c may be told a loop of its instruction that never leaves
 * the registers, and tests/runtime/test_same_bits.py names what it runs under qemu. A table that sets bf16_dots gives other
 * bits than the rest; the tests read that from the report.
 *
 * To add a slot: its pointer in migi_kernels, its name in MIGI_KERNEL_SLOTS, its function in scalar.c, and its test in
 * tests/c/test_kernels.c; then, where it is worth it, the faster ones.
 *
 * Kernels compute; they do not allocate, thread, log or choose. Products add to what the output holds, so that bias and
 * residual are whatever the caller put there first; gemm_f32, gemm_bf16 and gemm_i8 only where they are told to.
 *
 * Numbers are the same to the bit on every table but for bf16 dot products (bf16_dots), so that a model answers alike on
 * every machine: a product with its addition is rounded once (fma); a value of a matrix product is added up along k from zero,
 * then to the output; other sums over a row are MIGI_SUMS partial sums, element i in sum i mod MIGI_SUMS, added up by
 * migi_add_sums (dots_f16: eight of them), after which gemv and dots_f16 add the elements past the last whole round one by
 * one; exp and erf are scalar.c's polynomials.
 *
 * A panel is a block of weight rows turned so that one step along k reads `nr` neighbours:
 *     f32 panel   float[k][nr]                 panel[i * nr + r] = w[r, i]
 *     bf16 panel  uint32[k / 2][nr_bf16]       low half w[r, 2i], high half w[r, 2i + 1]
 * Rows past the matrix are zero. From one panel of a matrix to the next it is ldp elements.
 *
 * Quantized weights lie in the file as every table reads them, in blocks of 16 rows, k padded with zeros to a multiple of
 * MIGI_K_INT8 and rows to a multiple of 16. A quad is four neighbours along k:
 *     int8 block  int8[k / 4][16][4]           [j][r][i] = w[r, 4j + i]
 *     int4 block  uint8[k / 8][16][4]          [j][r][i] = low half u(r, 8j + i), high half u(r, 8j + 4 + i); u = q + 8
 *                 and factors uint8[k / group][16], 1 to 16: w[r, k] = (u - 8) * factor, within int8
 * A float for each row turns w into weights.
 */
#ifndef MIGI_KERNELS_H
#define MIGI_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum {
    MIGI_MAX_NR = 64, /* widest panel of any table */
    MIGI_K_INT8 = 64, /* quantized rows are padded with zeros to a multiple of this */
    MIGI_BLOCK = 16,  /* rows of a block of quantized weights */
    MIGI_SUMS = 16,   /* partial sums over a row */
    MIGI_ALL_ROWS = 1 << 30,
};

/* int4 blocks as stored: block b of 16 rows starts at w + b * ldw, its factors at factors + b * ldf. */
typedef struct migi_int4 {
    const uint8_t *w, *factors;
    size_t ldw, ldf;
    int group; /* columns that share a factor: a multiple of 8 up to 128 */
} migi_int4;

/* What one instruction set does better than the table below it: 0 and NULL are taken from there. Or, once filled, everything. */
typedef struct migi_kernels migi_kernels;
struct migi_kernels {
    const char *isa;
    const migi_kernels *below; /* NULL for scalar */
    int nr;                    /* columns of an f32 panel; the packing and gemm_f32 go with it */
    int bf16_dots;             /* 1: gemm_bf16 is faster than gemm_f32 on this instruction set */
    int nr_bf16;               /* columns of a bf16 panel; pack_pairs and gemm_bf16 go with it */
    int k_bf16;                /* bf16 rows are padded with zeros to a multiple of this, at most 32 */
    int i4_rows;               /* more rows than this are multiplied faster by expand_i4 and gemm_i8 than by gemm_i4 */

    /* panel <- rows w[0..rows) x k, rows <= nr */
    void (*pack_f32)(float *panel, const float *w, size_t ldw, int rows, int k);
    void (*pack_bf16)(float *panel, const uint16_t *w, size_t ldw, int rows, int k);
    /* c[m, n] = a[m, k] w[n, k]^T, or += with add */
    void (*gemm_f32)(float *c, size_t ldc, const float *a, size_t lda, const float *panels, size_t ldp, int m, int n, int k, int add);

    /* dst <- src rounded to bf16, ties to even; subnormals may become zeros where bf16_dots, whose products take them so */
    void (*round_bf16)(uint16_t *dst, const float *src, size_t n);
    /* bf16 panel <- rows w[0..rows) x k, rows <= nr_bf16, k padded with zeros to k_padded */
    void (*pack_pairs)(uint32_t *panel, const uint16_t *w, size_t ldw, int rows, int k, int k_padded);
    /* the same, bf16 x bf16 with f32 sums; k a multiple of k_bf16 */
    void (*gemm_bf16)(float *c, size_t ldc, const uint16_t *a, size_t lda, const uint32_t *panels, size_t ldp, int m, int n, int k,
                      int add);

    /* y[rows] += w[rows, k] x[k] */
    void (*gemv_f32)(float *y, const float *w, size_t ldw, const float *x, int rows, int k);
    void (*gemv_bf16)(float *y, const uint16_t *w, size_t ldw, const float *x, int rows, int k);
    /* ---- integer products: the sums are exact and the same on every instruction set
     * q[k] <- x / scale rounded to the nearest, ties to even, in -127..127; zeros to k_padded. Returns scale =
     * max |x| / 127, NaN when x holds one. x is multiplied by the float 127 / max |x|; all zeros give
     * scale 0, and a row of at most 1e-30 gives zeros, as 127 / max would overflow. */
    float (*quantize_i8)(int8_t *q, const float *x, int k, int k_padded);
    /* c[m, n] = a[m, k] w[n, k]^T, or += with add; block b of 16 rows of w starts at w + b * ldw; n a multiple of 16, k of
     * MIGI_K_INT8. a within -127..127 */
    void (*gemm_i8)(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, size_t ldw, int m, int n, int k, int add);
    /* one int8 block <- one int4 block of k columns, k a multiple of group, group a multiple of 8 */
    void (*expand_i4)(int8_t *to, const uint8_t *w, const uint8_t *factors, int group, int k);
    /* c[m, n] += a[m, k] w[n, k]^T from int4 blocks as stored; n a multiple of 16, k of the group and of 8 */
    void (*gemm_i4)(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const migi_int4 *w, int m, int n, int k);
    /* y[n] = y[n] + bias[n] + c[n] * (scale * scales[n]); bias may be NULL */
    void (*add_scaled)(float *y, const int32_t *c, float scale, const float *scales, const float *bias, int n);
    /* y[n] = c[n] * (scale * scales[n]) + bias[n]; bias may be NULL */
    void (*put_scaled)(float *y, const int32_t *c, float scale, const float *scales, const float *bias, int n);
    /* dst <- src as IEEE half, ties to even; and back */
    void (*narrow_f16)(uint16_t *dst, const float *src, size_t n);
    void (*widen_f16)(float *dst, const uint16_t *src, size_t n);

    /* y[m, n] = x[m, k] w[n, k]^T of halves. One value's sum is the same whatever the rows beside it. */
    void (*dots_f16)(float *y, size_t ldy, const float *x, const uint16_t *w, size_t ldw, int m, int n, int k);
    /* y[m, n] += p[m, rows] v[rows, n] of halves; row by row as well */
    void (*weighted_f16)(float *y, const float *p, size_t ldp, const uint16_t *v, size_t ldv, int m, int rows, int n);
    /* y[n] += sum over rows of p[row] * v[row, n] */
    void (*weighted_sum)(float *y, const float *v, size_t ldv, const float *p, int rows, int n);

    /* y = x / sqrt(mean(x^2) + eps) * w */
    void (*rms_norm)(float *y, const float *x, const float *w, int n, float eps);
    /* y = (x - mean(x)) / sqrt(var(x) + eps) * w + b */
    void (*layer_norm)(float *y, const float *x, const float *w, const float *b, int n, float eps);
    /* gate = gate / (1 + exp(-gate)) * up */
    void (*silu_mul)(float *gate, const float *up, int n);
    /* x = x / (1 + exp(-1.702 x)) */
    void (*quick_gelu)(float *x, int n);
    /* x = x (1 + erf(x / sqrt 2)) / 2 */
    void (*gelu)(float *x, int n);
    /* rotates planes (x[i], x[i + half]) by the angle whose cosine and sine are given; half = head_dim / 2 */
    void (*rope)(float *x, const float *cosine, const float *sine, int half);
    /* s = 2^(s - max), within 2 ULP, 0 below -125; no s is above max + 127; returns the sum */
    float (*exp2_sum)(float *s, int n, float max);
    /* the same, within 3e-6 of the value and then rounded to bf16 in p; the sum is of what was not rounded yet */
    float (*exp2_bf16)(uint16_t *p, const float *s, int n, float max);
    float (*max)(const float *s, int n);
    /* x *= f */
    void (*scale)(float *x, int n, float f);
};

/* Every slot, and the kind of work it serves in reports: X(kind, slot). */
/* clang-format off */
#define MIGI_KERNEL_SLOTS(X)                                                                                          \
    X(float, pack_f32) X(float, pack_bf16) X(float, gemm_f32) X(float, gemv_f32) X(float, gemv_bf16)                  \
    X(bf16, round_bf16) X(bf16, pack_pairs) X(bf16, gemm_bf16) X(bf16, exp2_bf16)                                     \
    X(int8, quantize_i8) X(int8, gemm_i8) X(int8, add_scaled) X(int8, put_scaled) X(int4, expand_i4) X(int4, gemm_i4) \
    X(half, narrow_f16) X(half, widen_f16) X(half, dots_f16) X(half, weighted_f16)                                    \
    X(rows, weighted_sum) X(rows, rms_norm) X(rows, layer_norm) X(rows, silu_mul) X(rows, quick_gelu) X(rows, gelu)   \
    X(rows, rope) X(rows, exp2_sum) X(rows, max) X(rows, scale)
/* clang-format on */

extern const migi_kernels migi_own_scalar, migi_own_avx512vnni_emulated, migi_own_amx_emulated;
extern const migi_kernels migi_own_avx2, migi_own_avx512, migi_own_avx512vnni, migi_own_avx512bf16, migi_own_amx; /* x86-64 */
extern const migi_kernels migi_own_neon, migi_own_neon_dotprod, migi_own_neon_i8mm;                               /* aarch64 */

/* The tables of this build are numbered from worst to best; 0 is scalar. */
int migi_kernels_count(void);
/* *k <- table `which`, every slot filled. Returns whether this CPU and operating system can run it. */
int migi_kernels_fill(migi_kernels *k, int which);
/* The number of the table named `isa`, -1 if this build has none. */
int migi_kernels_named(const char *isa);
/* The best that this CPU can run. */
int migi_kernels_best(void);

/* n padded to what bf16 products, and what integer products read. */
static inline size_t migi_padded(const migi_kernels *k, size_t n)
{
    size_t step = (size_t)k->k_bf16;
    return (n + step - 1) / step * step;
}
static inline size_t migi_padded_int8(size_t n) { return (n + MIGI_K_INT8 - 1) / MIGI_K_INT8 * MIGI_K_INT8; }

/* exp(x) = 2^(x log2 e), and 2^(n + r) = 2^n 2^r. For |r| <= 1/2, 2^r is 1 + EXP2_1 r + EXP2_2 r^2 ..., fitted for the least
 * relative error: 2e-9 by six terms, 2.8e-6 by the four coarse ones. ROUND_127 is 1.5 * 2^23 + 127. */
#define LOG2_E 1.44269502f
#define LOG2_E_REST 1.92596303e-8f
#define ROUND_127 12583039.f
#define EXP2_1 6.931471825e-1f
#define EXP2_2 2.402264774e-1f
#define EXP2_3 5.550332367e-2f
#define EXP2_4 9.618436918e-3f
#define EXP2_5 1.339887385e-3f
#define EXP2_6 1.535336196e-4f
#define EXP2_COARSE_1 6.931241751e-1f
#define EXP2_COARSE_2 2.402409911e-1f
#define EXP2_COARSE_3 5.590642616e-2f
#define EXP2_COARSE_4 9.582852945e-3f

/* A float and its bits. */
typedef union migi_word {
    float f;
    uint32_t u;
} migi_word;

static inline float migi_bf16_to_f32(uint16_t h)
{
    migi_word v = {.u = (uint32_t)h << 16};
    return v.f;
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
static inline uint16_t migi_f32_to_bf16(float f)
{
    migi_word v = {.f = f};
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(v.u >> 16 | 0x40);
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

/* a * b + c, rounded once. Without such an instruction the sum of the exact product is rounded to odd in double, after which
 * rounding to float is as if from the exact value (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008). */
static inline float migi_fma(float a, float b, float c)
{
#if defined(__FP_FAST_FMAF) || defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    double product = (double)a * (double)b, d = (double)c;
    union {
        double f;
        int64_t i;
    } sum = {.f = product + d};
    double part = sum.f - product, error = (product - (sum.f - part)) + (d - part);
    if (error != 0. && !(sum.i & 1)) sum.i += (error > 0.) == (sum.f > 0.) ? 1 : -1;
    return (float)sum.f;
#endif
}

/* Partial sums folded in half, then neighbour with neighbour. */
static inline float migi_add_eight(const float *s) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); }
static inline float migi_add_sums(const float *s)
{
    float half[8];
    for (int i = 0; i < 8; i++) half[i] = s[i] + s[i + 8];
    return migi_add_eight(half);
}

static inline float migi_f16_to_f32(uint16_t h)
{
    migi_word v = {.u = (uint32_t)(h & 0x7fff) << 13}, magic = {.u = (127u - 15 + 127) << 23};
    v.f *= magic.f; /* the exponent's bias changes by a multiplication, which serves subnormals too */
    if ((h & 0x7c00) == 0x7c00) v.u |= 0xffu << 23;
    v.u |= (uint32_t)(h & 0x8000) << 16;
    return v.f;
}

/* Rounds to nearest, ties to even; beyond 65504 it is infinite; NaN stays NaN. */
static inline uint16_t migi_f32_to_f16(float f)
{
    migi_word v = {.f = f}, magic;
    uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    v.u &= 0x7fffffffu;
    if (v.u > 0x7f800000u) return sign | 0x7e00;
    if (v.u >= 0x477ff000u) return sign | 0x7c00; /* rounds to 65536 or more */
    if (v.u < 0x38800000u) {                      /* subnormal: adding 0.5 aligns the last place to 2^-24 */
        magic.f = .5f;
        v.f += magic.f;
        return sign | (uint16_t)(v.u - magic.u);
    }
    return sign | (uint16_t)((v.u + 0xfff + (v.u >> 13 & 1) - ((127u - 15) << 23)) >> 13);
}

#endif
