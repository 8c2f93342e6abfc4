/* avx512bf16.c - AVX-512 with bf16 dot products (Zen 4, Cooper Lake and later).
 *
 * vdpbf16ps adds two bf16 products to each f32 lane, twice the rate of f32 multiply-adds. Tile 12 x 32: 24 sums, 2 panel
 * vectors of pairs, 1 broadcast pair of a. Tolerance against scalar: same rounded inputs, sums differ by order.
 * What is rounded to bf16 is so by vcvtneps2bf16 (simd_bf16.inc). Panels are AVX-512's.
 */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_MR 12
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "simd_bf16.inc"

/* The last vector of c's rows holds `last` values. m and vectors are constants where it is inlined. */
INLINE void bf16_tile(float *c, size_t ldc, const uint16_t *a, size_t lda, const uint32_t *panel, int m, int vectors, int last, int k,
                      int add)
{
    __m512 sum[SIMD_MR][2];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int l = 0; l < k; l += 2) {
        const uint32_t *p = panel + (size_t)(l / 2) * NR;
        __m512bh b[2];
        for (int v = 0; v < vectors; v++) b[v] = (__m512bh)_mm512_loadu_si512(p + 16 * v);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) {
            int32_t pair;
            memcpy(&pair, a + i * lda + l, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, b[v]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < vectors; v++) {
            __mmask16 mask = v < vectors - 1 ? 0xffff : (__mmask16)((1u << last) - 1);
            float *to = c + i * ldc + v * 16;
            if (add) sum[i][v] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum[i][v]);
            _mm512_mask_storeu_ps(to, mask, sum[i][v]);
        }
}

INLINE void bf16_rows(float *c, size_t ldc, const uint16_t *a, size_t lda, const uint32_t *panel, int m, int vectors, int last, int k,
                      int add)
{
    int i = 0;
    for (; i + SIMD_MR <= m; i += SIMD_MR) bf16_tile(c + i * ldc, ldc, a + i * lda, lda, panel, SIMD_MR, vectors, last, k, add);
    for (; i + 4 <= m; i += 4) bf16_tile(c + i * ldc, ldc, a + i * lda, lda, panel, 4, vectors, last, k, add);
    for (; i < m; i++) bf16_tile(c + i * ldc, ldc, a + i * lda, lda, panel, 1, vectors, last, k, add);
}

static void gemm_dots(float *c, size_t ldc, const uint16_t *a, size_t lda, const uint32_t *panels, size_t ldp, int m, int n, int k, int add)
{
    for (; n > 16; n -= NR, c += NR, panels += ldp) bf16_rows(c, ldc, a, lda, panels, m, 2, (n < NR ? n : NR) - 16, k, add);
    if (n > 0) bf16_rows(c, ldc, a, lda, panels, m, 1, n, k, add);
}

const migi_kernels migi_own_avx512bf16 = {.isa = "avx512bf16",
                                          .below = &migi_own_avx512vnni,
                                          .bf16_dots = 1,
                                          .round_bf16 = round_bf16,
                                          .gemm_bf16 = gemm_dots,
                                          .exp2_bf16 = exp2_bf16};
#else
typedef int migi_no_avx512bf16;
#endif
