/* scalar.c - the truth: plain C, one formula per function. Every other table is tested against this one, to the bit. */
#include "kernels.h"

#include <math.h>

enum { NR = 8 };

static void pack_f32(float *panel, const float *w, size_t ldw, int rows, int k)
{
    for (int i = 0; i < k; i++)
        for (int r = 0; r < NR; r++) panel[(size_t)i * NR + r] = r < rows ? w[r * ldw + i] : 0.f;
}

static void pack_bf16(float *panel, const uint16_t *w, size_t ldw, int rows, int k)
{
    for (int i = 0; i < k; i++)
        for (int r = 0; r < NR; r++) panel[(size_t)i * NR + r] = r < rows ? migi_bf16_to_f32(w[r * ldw + i]) : 0.f;
}

static void gemm_f32(float *c, size_t ldc, const float *a, size_t lda, const float *panels, size_t ldp, int m, int n, int k, int add)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const float *panel = panels + (size_t)(j / NR) * ldp + j % NR;
            float sum = 0.f;
            for (int l = 0; l < k; l++) sum = migi_fma(a[i * lda + l], panel[(size_t)l * NR], sum);
            c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
        }
}

static void round_bf16(uint16_t *dst, const float *src, size_t n)
{
    for (size_t i = 0; i < n; i++) dst[i] = migi_f32_to_bf16(src[i]);
}

static void pack_pairs(uint32_t *panel, const uint16_t *w, size_t ldw, int rows, int k, int k_padded)
{
    for (int i = 0; i < k_padded; i += 2)
        for (int r = 0; r < NR; r++) {
            uint32_t lo = r < rows && i < k ? w[r * ldw + i] : 0, hi = r < rows && i + 1 < k ? w[r * ldw + i + 1] : 0;
            panel[(size_t)(i / 2) * NR + r] = lo | hi << 16;
        }
}

static void gemm_bf16(float *c, size_t ldc, const uint16_t *a, size_t lda, const uint32_t *panels, size_t ldp, int m, int n, int k, int add)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const uint32_t *panel = panels + (size_t)(j / NR) * ldp + j % NR;
            float sum = 0.f;
            for (int l = 0; l < k; l += 2) {
                uint32_t pair = panel[(size_t)(l / 2) * NR];
                sum = migi_fma(migi_bf16_to_f32(a[i * lda + l]), migi_bf16_to_f32((uint16_t)pair), sum);
                sum = migi_fma(migi_bf16_to_f32(a[i * lda + l + 1]), migi_bf16_to_f32((uint16_t)(pair >> 16)), sum);
            }
            c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
        }
}

static void gemv_f32(float *y, const float *w, size_t ldw, const float *x, int rows, int k)
{
    int whole = k / MIGI_SUMS * MIGI_SUMS;
    for (int r = 0; r < rows; r++) {
        float part[MIGI_SUMS] = {0};
        for (int i = 0; i < whole; i++) part[i % MIGI_SUMS] = migi_fma(w[r * ldw + i], x[i], part[i % MIGI_SUMS]);
        float sum = migi_add_sums(part);
        for (int i = whole; i < k; i++) sum = migi_fma(w[r * ldw + i], x[i], sum);
        y[r] += sum;
    }
}

static void gemv_bf16(float *y, const uint16_t *w, size_t ldw, const float *x, int rows, int k)
{
    int whole = k / MIGI_SUMS * MIGI_SUMS;
    for (int r = 0; r < rows; r++) {
        float part[MIGI_SUMS] = {0};
        for (int i = 0; i < whole; i++) part[i % MIGI_SUMS] = migi_fma(migi_bf16_to_f32(w[r * ldw + i]), x[i], part[i % MIGI_SUMS]);
        float sum = migi_add_sums(part);
        for (int i = whole; i < k; i++) sum = migi_fma(migi_bf16_to_f32(w[r * ldw + i]), x[i], sum);
        y[r] += sum;
    }
}

static void weighted_sum(float *y, const float *v, size_t ldv, const float *p, int rows, int n)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) y[i] = migi_fma(p[r], v[r * ldv + i], y[i]);
}

static void rms_norm(float *y, const float *x, const float *w, int n, float eps)
{
    float part[MIGI_SUMS] = {0};
    for (int i = 0; i < n; i++) part[i % MIGI_SUMS] = migi_fma(x[i], x[i], part[i % MIGI_SUMS]);
    float f = 1.f / sqrtf(migi_add_sums(part) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * f * w[i];
}

static void layer_norm(float *y, const float *x, const float *w, const float *b, int n, float eps)
{
    float part[MIGI_SUMS] = {0}, square[MIGI_SUMS] = {0};
    for (int i = 0; i < n; i++) part[i % MIGI_SUMS] += x[i];
    float mean = migi_add_sums(part) / (float)n;
    for (int i = 0; i < n; i++) square[i % MIGI_SUMS] = migi_fma(x[i] - mean, x[i] - mean, square[i % MIGI_SUMS]);
    float f = 1.f / sqrtf(migi_add_sums(square) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = migi_fma((x[i] - mean) * f, w[i], b[i]);
}

/* 2^n times a polynomial in r, |r| <= 1/2 (coefficients in kernels.h); the low bits of t hold n + 127, as adding ROUND_127
 * rounds to the nearest integer. */
static float exp2_of(float t, float r, int coarse)
{
    migi_word scale = {.f = t};
    float p = coarse ? EXP2_COARSE_4 : EXP2_6;
    if (!coarse) p = migi_fma(migi_fma(p, r, EXP2_5), r, EXP2_4);
    p = migi_fma(p, r, coarse ? EXP2_COARSE_3 : EXP2_3);
    p = migi_fma(p, r, coarse ? EXP2_COARSE_2 : EXP2_2);
    p = migi_fma(p, r, coarse ? EXP2_COARSE_1 : EXP2_1);
    scale.u <<= 23;
    return migi_fma(p, r, 1.f) * scale.f;
}

static float migi_exp2(float x, int coarse)
{
    float t = x + ROUND_127;
    return x < -125.f ? 0.f : exp2_of(t, x - (t - ROUND_127), coarse);
}

static float migi_exp(float x)
{
    if (x < -87.f) return 0.f;
    x = x > 88.f ? 88.f : x;
    float t = migi_fma(x, LOG2_E, ROUND_127);
    return exp2_of(t, migi_fma(x, LOG2_E_REST, migi_fma(x, LOG2_E, ROUND_127 - t)), 0);
}

static float sigmoid(float x) { return 1.f / (1.f + migi_exp(-x)); }

static void silu_mul(float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

static void quick_gelu(float *x, int n)
{
    for (int i = 0; i < n; i++) x[i] = x[i] * sigmoid(x[i] * 1.702f);
}

/* erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7 */
static void gelu(float *x, int n)
{
    for (int i = 0; i < n; i++) {
        float z = x[i] * .70710678f, a = z < 0.f ? -z : z, t = 1.f / migi_fma(.3275911f, a, 1.f);
        float p = migi_fma(t, 1.061405429f, -1.453152027f);
        p = migi_fma(t, p, 1.421413741f);
        p = migi_fma(t, p, -.284496736f);
        p = t * migi_fma(t, p, .254829592f);
        float e = migi_fma(-p, migi_exp(-a * a), 1.f);
        x[i] = .5f * x[i] * (1.f + (z < 0.f ? -e : e));
    }
}

static void rope(float *x, const float *cosine, const float *sine, int half)
{
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = migi_fma(a, cosine[i], -(b * sine[i]));
        x[i + half] = migi_fma(b, cosine[i], a * sine[i]);
    }
}

static float exp2_sum(float *s, int n, float max)
{
    float part[MIGI_SUMS] = {0};
    for (int i = 0; i < n; i++) part[i % MIGI_SUMS] += s[i] = migi_exp2(s[i] - max, 0);
    return migi_add_sums(part);
}

static float exp2_bf16(uint16_t *p, const float *s, int n, float max)
{
    float part[MIGI_SUMS] = {0};
    for (int i = 0; i < n; i++) {
        float e = migi_exp2(s[i] - max, 1);
        part[i % MIGI_SUMS] += e;
        p[i] = migi_f32_to_bf16(e);
    }
    return migi_add_sums(part);
}

static float maximum(const float *s, int n)
{
    float m = -INFINITY;
    for (int i = 0; i < n; i++) m = s[i] > m ? s[i] : m;
    return m;
}

static void scale(float *x, int n, float f)
{
    for (int i = 0; i < n; i++) x[i] *= f;
}

/* ---- integer products */

static float quantize_i8(int8_t *q, const float *x, int k, int k_padded)
{
    float top = 0.f, nan = 0.f;
    for (int i = 0; i < k; i++) {
        float size = fabsf(x[i]);
        if (size > top) top = size;
        nan += x[i] * 0.f; /* 0, or NaN from a NaN or an infinity */
    }
    float inverse = top > 1e-30f ? 127.f / top : 0.f; /* below, the quotient could overflow; such rows count as zero */
    for (int i = 0; i < k_padded; i++) q[i] = i < k && nan == 0.f ? (int8_t)rintf(x[i] * inverse) : 0;
    return top / 127.f + nan;
}

static void gemm_i8(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const int8_t *w, size_t ldw, int m, int n, int k, int add)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const int8_t *block = w + (size_t)(j / MIGI_BLOCK) * ldw;
            int32_t sum = add ? c[i * ldc + j] : 0;
            for (int l = 0; l < k; l++) sum += a[i * lda + l] * block[(l / 4 * MIGI_BLOCK + j % MIGI_BLOCK) * 4 + l % 4];
            c[i * ldc + j] = sum;
        }
}

static void expand_i4(int8_t *to, const uint8_t *w, const uint8_t *factors, int group, int k)
{
    for (int l = 0; l < k; l++)
        for (int r = 0; r < MIGI_BLOCK; r++) {
            int pair = w[(l / 8 * MIGI_BLOCK + r) * 4 + l % 4], u = l % 8 < 4 ? pair & 15 : pair >> 4;
            to[(l / 4 * MIGI_BLOCK + r) * 4 + l % 4] = (int8_t)((u - 8) * factors[l / group * MIGI_BLOCK + r]);
        }
}

static void gemm_i4(int32_t *c, size_t ldc, const int8_t *a, size_t lda, const migi_int4 *w, int m, int n, int k)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            size_t b = (size_t)(j / MIGI_BLOCK), r = (size_t)(j % MIGI_BLOCK);
            const uint8_t *block = w->w + b * w->ldw, *factor = w->factors + b * w->ldf;
            for (int l = 0; l < k; l++) {
                int pair = block[(size_t)(l / 8 * MIGI_BLOCK * 4 + l % 4) + 4 * r], u = l % 8 < 4 ? pair & 15 : pair >> 4;
                c[i * ldc + j] += a[i * lda + l] * (u - 8) * factor[(size_t)(l / w->group * MIGI_BLOCK) + r];
            }
        }
}

static void add_scaled(float *y, const int32_t *c, float scale, const float *scales, const float *bias, int n)
{
    for (int j = 0; j < n; j++) y[j] = (bias ? y[j] + bias[j] : y[j]) + (float)c[j] * (scale * scales[j]);
}

static void put_scaled(float *y, const int32_t *c, float scale, const float *scales, const float *bias, int n)
{
    for (int j = 0; j < n; j++) y[j] = (float)c[j] * (scale * scales[j]) + (bias ? bias[j] : 0.f);
}

static void narrow_f16(uint16_t *dst, const float *src, size_t n)
{
    for (size_t i = 0; i < n; i++) dst[i] = migi_f32_to_f16(src[i]);
}

static void widen_f16(float *dst, const uint16_t *src, size_t n)
{
    for (size_t i = 0; i < n; i++) dst[i] = migi_f16_to_f32(src[i]);
}

static void dots_f16(float *y, size_t ldy, const float *x, const uint16_t *w, size_t ldw, int m, int n, int k)
{
    int whole = k / 8 * 8;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const float *row = x + i * k;
            const uint16_t *key = w + (size_t)j * ldw;
            float part[8] = {0};
            for (int l = 0; l < whole; l++) part[l % 8] = migi_fma(row[l], migi_f16_to_f32(key[l]), part[l % 8]);
            float sum = migi_add_eight(part);
            for (int l = whole; l < k; l++) sum = migi_fma(row[l], migi_f16_to_f32(key[l]), sum);
            y[(size_t)i * ldy + (size_t)j] = sum;
        }
}

static void weighted_f16(float *y, const float *p, size_t ldp, const uint16_t *v, size_t ldv, int m, int rows, int n)
{
    for (int i = 0; i < m; i++)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < n; j++)
                y[i * n + j] = migi_fma(p[(size_t)i * ldp + (size_t)r], migi_f16_to_f32(v[(size_t)r * ldv + (size_t)j]), y[i * n + j]);
}

/* clang-format off */
const migi_kernels migi_own_scalar = {
    .isa = "scalar", .nr = NR, .nr_bf16 = NR, .k_bf16 = 2, .i4_rows = 8,
    .pack_f32 = pack_f32, .pack_bf16 = pack_bf16, .gemm_f32 = gemm_f32, .gemv_f32 = gemv_f32, .gemv_bf16 = gemv_bf16,
    .round_bf16 = round_bf16, .pack_pairs = pack_pairs, .gemm_bf16 = gemm_bf16, .exp2_bf16 = exp2_bf16,
    .quantize_i8 = quantize_i8, .gemm_i8 = gemm_i8, .add_scaled = add_scaled, .put_scaled = put_scaled,
    .expand_i4 = expand_i4, .gemm_i4 = gemm_i4,
    .narrow_f16 = narrow_f16, .widen_f16 = widen_f16, .dots_f16 = dots_f16, .weighted_f16 = weighted_f16,
    .weighted_sum = weighted_sum, .rms_norm = rms_norm, .layer_norm = layer_norm, .silu_mul = silu_mul, .quick_gelu = quick_gelu,
    .gelu = gelu, .rope = rope, .exp2_sum = exp2_sum, .max = maximum, .scale = scale,
};
/* clang-format on */
