/* neon_i8mm.c - aarch64 with int8 matrix products (Armv8.6: Neoverse V1 and N2, Cortex-A510 and A710, Apple M2).
 *
 *     gemm_i8   c[m, n] (+)= a[m, k] w[n, k]^T
 *
 * smmla multiplies two rows of a by two rows of w, eight k each, into four int32: 32 products an instruction, twice sdot's.
 * Two neighbouring quads of a block, zipped, are what it wants:
 *     q0 = w0[0..3] w1[0..3] w2[0..3] w3[0..3]      zip1 = w0[0..7] w1[0..7]
 *     q1 = w0[4..7] w1[4..7] w2[4..7] w3[4..7]      zip2 = w2[0..7] w3[0..7]
 * Tile 8 x 8: 16 sums of 2 x 2, 4 registers of a, 4 of weights; 4 zips serve 16 products. Rows past m read row m - 1 again
 * and are not stored. One or two rows are sdot's. Equal to scalar. Tested under qemu only; speed not measured.
 */
#if defined(__aarch64__) && defined(__linux__)
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#define SIMD_WIDTH 4
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "int8_sdot.inc"

/* c[m, 8] (+)= a[m, k] w^T, m <= 2 * pairs; w points at the first of eight rows of a block. */
INLINE void smmla_tile(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, int m, int pairs, int k, int add)
{
    int32x4_t sum[4][4];
    for (int i = 0; i < pairs; i++)
        for (int v = 0; v < 4; v++) sum[i][v] = vdupq_n_s32(0);
    const int8_t *row[8];
    for (int i = 0; i < 2 * pairs; i++) row[i] = a + (size_t)(i < m ? i : m - 1) * lda;
    for (int l = 0; l < k; l += 8, w += 8 * MIGI_BLOCK) {
        int32x4_t p0 = vreinterpretq_s32_s8(vld1q_s8(w)), p1 = vreinterpretq_s32_s8(vld1q_s8(w + 4 * MIGI_BLOCK));
        int32x4_t q0 = vreinterpretq_s32_s8(vld1q_s8(w + 16)), q1 = vreinterpretq_s32_s8(vld1q_s8(w + 4 * MIGI_BLOCK + 16));
        int8x16_t b[4] = {vreinterpretq_s8_s32(vzip1q_s32(p0, p1)), vreinterpretq_s8_s32(vzip2q_s32(p0, p1)),
                          vreinterpretq_s8_s32(vzip1q_s32(q0, q1)), vreinterpretq_s8_s32(vzip2q_s32(q0, q1))};
#pragma GCC unroll 4
        for (int i = 0; i < pairs; i++) {
            int8x16_t x = vcombine_s8(vld1_s8(row[2 * i] + l), vld1_s8(row[2 * i + 1] + l));
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) sum[i][v] = vmmlaq_s32(sum[i][v], x, b[v]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < 4; v++) {
            int32x4_t s = sum[i / 2][v];
            int32_t *to = c + i * ldc + v * 2;
            int32x2_t two = i % 2 ? vget_high_s32(s) : vget_low_s32(s);
            vst1_s32(to, add ? vadd_s32(vld1_s32(to), two) : two);
        }
}

static void gemm_i8(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, size_t ldw, int m, int n, int k, int add)
{
    if (m <= 2) {
        sdot_gemm_i8(c, ldc, a, lda, w, ldw, m, n, k, add);
        return;
    }
    for (int j = 0; j < n; j += 8) {
        const int8_t *p = w + (size_t)(j / MIGI_BLOCK) * ldw + j % MIGI_BLOCK * 4;
        int i = 0;
        for (; i + 8 <= m; i += 8) smmla_tile(c + i * ldc + j, ldc, a + i * lda, lda, p, 8, 4, k, add);
        int left = m - i;
        if (left > 4) smmla_tile(c + i * ldc + j, ldc, a + i * lda, lda, p, left, 4, k, add);
        else if (left > 0) smmla_tile(c + i * ldc + j, ldc, a + i * lda, lda, p, left, 2, k, add);
    }
}

const migi_kernels migi_own_neon_i8mm = {.isa = "neon-i8mm", .below = &migi_own_neon_dotprod, .gemm_i8 = gemm_i8};
#else
typedef int migi_no_neon_i8mm;
#endif
