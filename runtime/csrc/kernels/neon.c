/* neon.c - aarch64 NEON: 8 x 8 f32 tile, 16 sums + 2 panel vectors + broadcasts in 32 registers.
 *
 *     gemm_i8   c[m, n] (+)= a[m, k] w[n, k]^T      gemm_i4   c[m, n] += a[m, k] ((u - 8) * factor)[n, k]^T
 *
 * int8 block, 64 bytes for four k: a register holds four rows' quads, smull takes two rows at once:
 *     lanes:  w[r, 4j .. 4j + 3]  w[r + 1, 4j .. 4j + 3]   as int16, times a[4j .. 4j + 3] twice
 * smull and smlal of two quads reach 2 * 128 * 127 = 32512, which int16 holds; sadalp adds them pairwise to int32, and the
 * two sums of a row are added at the end. Tile 2 x 16: 16 sums, 3 instructions for 16 products.
 * int4 block, 64 bytes for eight k: int16 holds the sums of a whole group of 128, 32 values a lane, which start from
 * -8 * sum(a) and so end within 32 * 8 * 127 = 32512; what wraps on the way comes back.
 * Exact, so equal to scalar. Tested under qemu only; speed not measured.
 */
#if defined(__aarch64__)
#define SIMD_WIDTH 4
#define SIMD_MR 8
#define SIMD_NV 2
#include "simd.inc"
#include "half_neon.inc"

enum { SLAB = 4096 };

INLINE int8x16_t four(const int8_t *a)
{
    int32_t x;
    memcpy(&x, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

INLINE void int_tile(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, int m, int k, int add)
{
    int32x4_t sum[2][8];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < 8; v++) sum[i][v] = vdupq_n_s32(0);
    for (int l = 0; l < k; l += 8, w += 8 * MIGI_BLOCK) {
        int8x16_t x[2], y[2];
        for (int i = 0; i < m; i++) x[i] = four(a + i * lda + l), y[i] = four(a + i * lda + l + 4);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            int8x16_t p = vld1q_s8(w + v * 16), q = vld1q_s8(w + 4 * MIGI_BLOCK + v * 16);
#pragma GCC unroll 2
            for (int i = 0; i < m; i++) {
                int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(p), vget_low_s8(x[i])), vget_low_s8(q), vget_low_s8(y[i]));
                int16x8_t high = vmlal_high_s8(vmull_high_s8(p, x[i]), q, y[i]);
                sum[i][2 * v] = vpadalq_s16(sum[i][2 * v], low);
                sum[i][2 * v + 1] = vpadalq_s16(sum[i][2 * v + 1], high);
            }
        }
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < 4; v++) {
            int32_t *to = c + i * ldc + v * 4;
            int32x4_t whole = vpaddq_s32(sum[i][2 * v], sum[i][2 * v + 1]);
            vst1q_s32(to, add ? vaddq_s32(vld1q_s32(to), whole) : whole);
        }
}

static void gemm_i8(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, size_t ldw, int m, int n, int k, int add)
{
    for (int j = 0; j < n; j += MIGI_BLOCK, c += MIGI_BLOCK, w += ldw) {
        int i = 0;
        for (; i + 2 <= m; i += 2) int_tile(c + i * ldc, ldc, a + i * lda, lda, w, 2, k, add);
        if (i < m) int_tile(c + i * ldc, ldc, a + i * lda, lda, w, 1, k, add);
    }
}

/* c[16] += one group of one block */
INLINE void i4_group(int32_t *c, const int8_t *a, int16x4_t offset, const uint8_t *w, const uint8_t *factors, int group)
{
    int16x8_t sum[8];
    for (int v = 0; v < 8; v++) sum[v] = vcombine_s16(offset, offset);
    for (int l = 0; l < group; l += 8, w += 4 * MIGI_BLOCK) {
        int8x16_t x = four(a + l), y = four(a + l + 4);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            uint8x16_t pair = vld1q_u8(w + v * 16);
            int8x16_t low = vreinterpretq_s8_u8(vandq_u8(pair, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(pair, 4));
            sum[2 * v] = vmlal_s8(sum[2 * v], vget_low_s8(low), vget_low_s8(x));
            sum[2 * v + 1] = vmlal_high_s8(sum[2 * v + 1], low, x);
            sum[2 * v] = vmlal_s8(sum[2 * v], vget_low_s8(high), vget_low_s8(y));
            sum[2 * v + 1] = vmlal_high_s8(sum[2 * v + 1], high, y);
        }
    }
    for (int v = 0; v < 4; v++) {
        vi factor = (vi) __builtin_convertvector(*(const vq *)(factors + v * 4), vu);
        int32x4_t whole = vpaddq_s32(vpaddlq_s16(sum[2 * v]), vpaddlq_s16(sum[2 * v + 1]));
        vst1q_s32(c + v * 4, vmlaq_s32(vld1q_s32(c + v * 4), whole, (int32x4_t)factor));
    }
}

static void row_i4(int32_t *c, const int8_t *a, const migi_int4 *w, int n, int k)
{
    int16_t offset[SLAB / 8][4];
    int group = w->group, slab = SLAB / group * group;
    for (int from = 0; from < k; from += slab) {
        int to = k - from < slab ? k : from + slab;
        for (int l = from; l < to; l += group) {
            int sum[4] = {0};
            for (int i = 0; i < group; i++) sum[i % 4] += a[l + i];
            for (int i = 0; i < 4; i++) offset[(l - from) / group][i] = (int16_t)(-8 * sum[i]);
        }
        for (int j = 0; j < n; j += MIGI_BLOCK)
            for (int l = from; l < to; l += group)
                i4_group(c + j, a + l, vld1_s16(offset[(l - from) / group]),
                         w->w + (size_t)(j / MIGI_BLOCK) * w->ldw + (size_t)(l / 2) * MIGI_BLOCK,
                         w->factors + (size_t)(j / MIGI_BLOCK) * w->ldf + (size_t)(l / group) * MIGI_BLOCK, group);
    }
}

static void gemm_i4(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const migi_int4 *w, int m, int n, int k)
{
    for (int i = 0; i < m; i++) row_i4(c + i * ldc, a + i * lda, w, n, k);
}

const migi_kernels migi_own_neon = {
    .isa = "neon", .below = &migi_own_scalar, SIMD_SLOTS, HALF_SLOTS, .gemm_i8 = gemm_i8, .gemm_i4 = gemm_i4, .i4_rows = 2};
#else
typedef int migi_no_neon;
#endif
