/* test_kernels.c - every table this CPU can run against the scalar one, to the bit, whole and tail shapes; and the scalar one
 * against double and libm. */
#include "../../runtime/csrc/migi.h"
#include "tables.h"

#include <sys/mman.h>

static const migi_kernels *truth;

static float worst(const float *a, const float *b, size_t n)
{
    float w = 0.f;
    for (size_t i = 0; i < n; i++) {
        float d = fabsf(a[i] - b[i]) / (1.f + fabsf(b[i]));
        if (!(d <= w)) w = d;
    }
    return w;
}

/* How many floats are not the same to the bit; zeros and NaNs are, whatever their sign. */
static int different(const float *a, const float *b, size_t n)
{
    int count = 0;
    for (size_t i = 0; i < n; i++) count += !(a[i] == b[i] || (isnan(a[i]) && isnan(b[i])));
    return count;
}

static void *copy_of(const void *from, size_t size)
{
    void *to = malloc(size ? size : 1);
    memcpy(to, from, size);
    return to;
}

static uint16_t *halves(size_t n)
{
    uint16_t *p = malloc((n ? n : 1) * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = migi_f32_to_bf16(noise());
    return p;
}

/* c[m, n] = or += a[m, k] w[n, k]^T by a table's own panels, some bytes between one and the next; w is floats or bf16 */
static void multiply(const migi_kernels *t, float *c, size_t ldc, const float *a, size_t lda, const void *w, int bf16_weights, int m, int n,
                     int k, int add)
{
    size_t ldp = (size_t)k * (size_t)t->nr + 3;
    float *panels = malloc((size_t)(n + t->nr) / (size_t)t->nr * ldp * 4);
    for (int j = 0; j < n; j += t->nr) {
        float *panel = panels + (size_t)(j / t->nr) * ldp;
        int cols = n - j < t->nr ? n - j : t->nr;
        size_t at = (size_t)j * (size_t)k;
        if (bf16_weights) t->pack_bf16(panel, (const uint16_t *)w + at, (size_t)k, cols, k);
        else t->pack_f32(panel, (const float *)w + at, (size_t)k, cols, k);
    }
    t->gemm_f32(c, ldc, a, lda, panels, ldp, m, n, k, add);
    free(panels);
}

/* c[m, n] = value; what lies between its rows stays. */
static void fill(float *c, size_t ldc, int m, int n, float value)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[(size_t)i * ldc + (size_t)j] = value;
}

static void product(const migi_kernels *t, int m, int n, int k, int bf16_weights)
{
    size_t lda = (size_t)k + 3, ldc = (size_t)n + 5;
    float *a = floats((size_t)m * lda), *w = floats((size_t)n * (size_t)k), *c = floats((size_t)m * ldc);
    uint16_t *h = halves((size_t)n * (size_t)k);
    float *want = copy_of(c, (size_t)m * ldc * 4), *same = copy_of(c, (size_t)m * ldc * 4);
    const void *weights = bf16_weights ? (const void *)h : w;
    multiply(t, c, ldc, a, lda, weights, bf16_weights, m, n, k, 1);
    multiply(truth, same, ldc, a, lda, weights, bf16_weights, m, n, k, 1);
    int unlike = different(c, same, (size_t)m * ldc);
    CHECK(!unlike, "%s gemm_f32 %dx%dx%d: %d values differ", t->isa, m, n, k, unlike);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++)
                sum += (double)a[(size_t)i * lda + (size_t)l] * (double)(bf16_weights
                                                                             ? migi_bf16_to_f32(h[(size_t)j * (size_t)k + (size_t)l])
                                                                             : w[(size_t)j * (size_t)k + (size_t)l]);
            want[(size_t)i * ldc + (size_t)j] += (float)sum;
        }
    CHECK(worst(c, want, (size_t)m * ldc) < 2e-5f, "%s gemm_f32 %dx%dx%d off by %g", t->isa, m, n, k,
          (double)worst(c, want, (size_t)m * ldc));
    fill(c, ldc, m, n, 0.f), fill(same, ldc, m, n, NAN);
    multiply(t, c, ldc, a, lda, weights, bf16_weights, m, n, k, 1), multiply(t, same, ldc, a, lda, weights, bf16_weights, m, n, k, 0);
    CHECK(!different(c, same, (size_t)m * ldc), "%s gemm_f32 %dx%dx%d: overwriting differs from adding to zeros", t->isa, m, n, k);
    free(a), free(w), free(c), free(h), free(want), free(same);
}

static void bf16_product(const migi_kernels *t, int m, int n, int k)
{
    int padded = (k + t->k_bf16 - 1) / t->k_bf16 * t->k_bf16;
    size_t ldc = (size_t)n + 5;
    float *c = floats((size_t)m * ldc), *want = malloc((size_t)m * ldc * 4), *x = floats((size_t)m * (size_t)k);
    uint16_t *a = calloc((size_t)m * (size_t)padded, 2), *h = halves((size_t)n * (size_t)k);
    size_t ldp = (size_t)padded / 2 * (size_t)t->nr_bf16 + 5;
    uint32_t *panels = malloc((size_t)(n + t->nr_bf16) / (size_t)t->nr_bf16 * ldp * 4);
    memcpy(want, c, (size_t)m * ldc * 4);
    for (int i = 0; i < m; i++) {
        t->round_bf16(a + (size_t)i * (size_t)padded, x + (size_t)i * (size_t)k, (size_t)k);
        for (int l = 0; l < k; l++)
            CHECK(a[(size_t)i * (size_t)padded + (size_t)l] == migi_f32_to_bf16(x[(size_t)i * (size_t)k + (size_t)l]),
                  "%s rounds differently", t->isa);
    }
    for (int j = 0; j < n; j += t->nr_bf16) {
        int cols = n - j < t->nr_bf16 ? n - j : t->nr_bf16;
        t->pack_pairs(panels + (size_t)(j / t->nr_bf16) * ldp, h + (size_t)j * (size_t)k, (size_t)k, cols, k, padded);
    }
    t->gemm_bf16(c, ldc, a, (size_t)padded, panels, ldp, m, n, padded, 1);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++)
                sum += (double)migi_bf16_to_f32(a[(size_t)i * (size_t)padded + (size_t)l]) *
                       (double)migi_bf16_to_f32(h[(size_t)j * (size_t)k + (size_t)l]);
            want[(size_t)i * ldc + (size_t)j] += (float)sum;
        }
    CHECK(worst(c, want, (size_t)m * ldc) < 2e-5f, "%s gemm_bf16 %dx%dx%d off by %g", t->isa, m, n, k,
          (double)worst(c, want, (size_t)m * ldc));
    memcpy(want, c, (size_t)m * ldc * 4);
    fill(c, ldc, m, n, 0.f), fill(want, ldc, m, n, NAN);
    t->gemm_bf16(c, ldc, a, (size_t)padded, panels, ldp, m, n, padded, 1),
        t->gemm_bf16(want, ldc, a, (size_t)padded, panels, ldp, m, n, padded, 0);
    CHECK(!different(c, want, (size_t)m * ldc), "%s gemm_bf16 %dx%dx%d: overwriting differs from adding to zeros", t->isa, m, n, k);
    free(c), free(want), free(x), free(a), free(h), free(panels);
}

static void vectors(const migi_kernels *t, int rows, int k)
{
    float *w = floats((size_t)rows * (size_t)k), *x = floats((size_t)k), *y = floats((size_t)rows), *z = malloc((size_t)rows * 4);
    uint16_t *h = halves((size_t)rows * (size_t)k);
    memcpy(z, y, (size_t)rows * 4);
    t->gemv_f32(y, w, (size_t)k, x, rows, k), truth->gemv_f32(z, w, (size_t)k, x, rows, k);
    CHECK(!different(y, z, (size_t)rows), "%s gemv_f32 %dx%d", t->isa, rows, k);
    t->gemv_bf16(y, h, (size_t)k, x, rows, k), truth->gemv_bf16(z, h, (size_t)k, x, rows, k);
    CHECK(!different(y, z, (size_t)rows), "%s gemv_bf16 %dx%d", t->isa, rows, k);
    float *s = floats((size_t)k), *u = malloc((size_t)k * 4), *p = floats((size_t)rows);
    memcpy(u, s, (size_t)k * 4);
    t->weighted_sum(s, w, (size_t)k, p, rows, k), truth->weighted_sum(u, w, (size_t)k, p, rows, k);
    CHECK(!different(s, u, (size_t)k), "%s weighted_sum %dx%d", t->isa, rows, k);
    free(w), free(x), free(y), free(z), free(h), free(s), free(u), free(p);
}

static void rows(const migi_kernels *t, int n)
{
    size_t size = (size_t)n;
    float *x = floats(size), *w = floats(size), *b = floats(size), *y = malloc(2 * size * 4), *z = malloc(2 * size * 4);
    t->rms_norm(y, x, w, n, 1e-6f), truth->rms_norm(z, x, w, n, 1e-6f);
    CHECK(!different(y, z, size), "%s rms_norm %d", t->isa, n);
    t->layer_norm(y, x, w, b, n, 1e-6f), truth->layer_norm(z, x, w, b, n, 1e-6f);
    CHECK(!different(y, z, size), "%s layer_norm %d", t->isa, n);
#define SAME(call)                                                   \
    do {                                                             \
        const migi_kernels *k = t;                                   \
        float *d = y;                                                \
        for (int i = 0; i < n; i++) y[i] = z[i] = 12.f * x[i];       \
        call;                                                        \
        k = truth, d = z;                                            \
        call;                                                        \
        CHECK(!different(y, z, size), "%s %s %d", t->isa, #call, n); \
    } while (0)
    SAME(k->silu_mul(d, w, n));
    SAME(k->quick_gelu(d, n));
    SAME(k->gelu(d, n));
    SAME(k->scale(d, n, 1.7f));
    for (int i = 0; i < n; i++) y[i] = z[i] = 40.f * x[i];
    if (n > 2) y[1] = z[1] = -INFINITY;
    uint16_t *p = malloc(size * sizeof *p), *q = malloc(size * sizeof *q);
    float top = t->max(y, n), best = truth->max(z, n), coarse = t->exp2_bf16(p, y, n, top), want = truth->exp2_bf16(q, z, n, best);
    CHECK(coarse == want && !memcmp(p, q, (size_t)n * sizeof *p), "%s exp2_bf16 %d", t->isa, n);
    float fine = t->exp2_sum(y, n, top), e = truth->exp2_sum(z, n, best);
    CHECK(top == best && fine == e && !different(y, z, size), "%s exp2_sum %d", t->isa, n);
    CHECK(fabsf(coarse - fine) < 4e-6f * fine, "%s exp2_bf16 %d: its sum is off by %g", t->isa, n, (double)(coarse / fine - 1.f));
    free(p), free(q);
    for (int i = 0; i < 2 * n; i++) y[i] = z[i] = noise();
    t->rope(y, w, b, n), truth->rope(z, w, b, n);
    CHECK(!different(y, z, 2 * size), "%s rope %d", t->isa, n);
    free(x), free(w), free(b), free(y), free(z);
}

/* ---- integer products: exact, against sums over the plain matrix */

enum { RANDOM, ALL_LOW, ALL_HIGH, MIXED, FILLS };

static uint32_t bits(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

static int8_t activation(int fill)
{
    return (int8_t)(fill == ALL_LOW    ? -127
                    : fill == ALL_HIGH ? 127
                    : fill == MIXED    ? (bits() & 1 ? 127 : -127)
                                       : (int)(bits() % 255) - 127);
}

static int32_t *counts(size_t n)
{
    int32_t *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (int32_t)bits() - (1 << 23);
    return p;
}

/* size bytes that end where no memory may be read, in one place for all callers: also where there is no ASan, and through
 * vector and tile loads that it does not watch, a step too far stops the test. */
static void *at_the_edge(size_t size)
{
    enum { ROOM = 1 << 20, WALL = 1 << 18 };
    static char *memory;
    if (!memory) {
        memory = mmap(NULL, ROOM + WALL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory + ROOM, WALL, PROT_NONE)) abort();
    }
    if (size > ROOM) abort();
    return memory + ROOM - size;
}

/* Strides larger than the matrix; every buffer ends where the last value read does, so that ASan sees a step too far. */
static void int8_product(const migi_kernels *t, int m, int n, int k, int fill)
{
    size_t lda = (size_t)k + 7, ldc = (size_t)n + 5, ldw = (size_t)k * MIGI_BLOCK + 64, blocks = (size_t)n / MIGI_BLOCK;
    size_t as = (size_t)(m - 1) * lda + (size_t)k, cs = (size_t)(m - 1) * ldc + (size_t)n, ws = (blocks - 1) * ldw + (size_t)k * MIGI_BLOCK;
    int8_t *a = at_the_edge(as), *w = malloc(ws);
    int32_t *c = counts(cs), *want = copy_of(c, cs * 4), *over = copy_of(c, cs * 4), *alone = copy_of(c, cs * 4);
    for (size_t i = 0; i < as; i++) a[i] = activation(fill);
    for (size_t i = 0; i < ws; i++) {
        int x = (int)(bits() % 256) - 128;
        w[i] = (int8_t)(fill == RANDOM ? x : fill == ALL_LOW ? -128 : fill == ALL_HIGH ? (x & 1 ? -128 : 0) : (x & 1 ? -128 : 127));
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            int32_t sum = 0;
            for (int l = 0; l < k; l++)
                sum += a[(size_t)i * lda + (size_t)l] * w[(size_t)(j / 16) * ldw + (size_t)(l / 4 * 64 + j % 16 * 4 + l % 4)];
            want[(size_t)i * ldc + (size_t)j] += sum;
            alone[(size_t)i * ldc + (size_t)j] = sum;
        }
    t->gemm_i8(c, ldc, a, lda, w, ldw, m, n, k, 1);
    CHECK(!memcmp(c, want, cs * 4), "%s gemm_i8 %dx%dx%d, fill %d", t->isa, m, n, k, fill);
    t->gemm_i8(over, ldc, a, lda, w, ldw, m, n, k, 0);
    CHECK(!memcmp(over, alone, cs * 4), "%s gemm_i8 %dx%dx%d overwriting, fill %d", t->isa, m, n, k, fill);
    free(w), free(c), free(want), free(alone), free(over);
}

/* u[n, k] and factors[n, k / group] as int4 blocks, each with some bytes between it and the next; expanded and multiplied. */
static void int4_product(const migi_kernels *t, int m, int n, int k, int group, int fill)
{
    size_t ldw = (size_t)k * MIGI_BLOCK / 2 + 64, ldf = (size_t)(k / group) * MIGI_BLOCK + 16, blocks = (size_t)n / MIGI_BLOCK;
    size_t lda = (size_t)k + 5, ldc = (size_t)n + 3, cs = (size_t)(m - 1) * ldc + (size_t)n, as = (size_t)(m - 1) * lda + (size_t)k;
    uint8_t *w = calloc((blocks - 1) * ldw + (size_t)k * MIGI_BLOCK / 2, 1),
            *factors = malloc((blocks - 1) * ldf + (size_t)(k / group) * MIGI_BLOCK);
    int8_t *plain = malloc((size_t)n * (size_t)k), *a = at_the_edge(as), *wide = malloc((size_t)k * MIGI_BLOCK);
    int32_t *c = counts(cs), *want = copy_of(c, cs * 4);
    for (size_t i = 0; i < (blocks - 1) * ldf + (size_t)(k / group) * MIGI_BLOCK; i++)
        factors[i] = (uint8_t)(fill == RANDOM ? 1 + bits() % 16 : 16);
    for (size_t i = 0; i < as; i++) a[i] = activation(fill);
    for (int j = 0; j < n; j++)
        for (int l = 0; l < k; l++) {
            int u = fill == RANDOM ? (int)(bits() % 16) : fill == ALL_LOW ? 0 : fill == ALL_HIGH ? 15 : bits() & 1 ? 15 : 0;
            int factor = factors[(size_t)(j / 16) * ldf + (size_t)(l / group * 16 + j % 16)];
            w[(size_t)(j / 16) * ldw + (size_t)(l / 8 * 64 + j % 16 * 4 + l % 4)] |= (uint8_t)(l % 8 < 4 ? u : u << 4);
            plain[(size_t)j * (size_t)k + (size_t)l] = (int8_t)((u - 8) * factor);
            for (int i = 0; i < m; i++) want[(size_t)i * ldc + (size_t)j] += a[(size_t)i * lda + (size_t)l] * (u - 8) * factor;
        }
    for (int j = 0; j < n; j += MIGI_BLOCK) {
        int wrong = 0;
        t->expand_i4(wide, w + (size_t)(j / 16) * ldw, factors + (size_t)(j / 16) * ldf, group, k);
        for (int r = 0; r < MIGI_BLOCK; r++)
            for (int l = 0; l < k; l++) wrong += wide[l / 4 * 64 + r * 4 + l % 4] != plain[(size_t)(j + r) * (size_t)k + (size_t)l];
        CHECK(!wrong, "%s expand_i4 %dx%d, groups of %d, fill %d: %d values differ", t->isa, n, k, group, fill, wrong);
    }
    t->gemm_i4(c, ldc, a, lda, &(migi_int4){w, factors, ldw, ldf, group}, m, n, k);
    CHECK(!memcmp(c, want, cs * 4), "%s gemm_i4 %dx%dx%d, groups of %d, fill %d", t->isa, m, n, k, group, fill);
    free(w), free(factors), free(plain), free(wide), free(c), free(want);
}

static void quantized(const migi_kernels *t, const float *x, int k, int padded)
{
    int8_t *q = malloc((size_t)padded), *want = malloc((size_t)padded);
    memset(q, 99, (size_t)padded);
    float a = t->quantize_i8(q, x, k, padded), b = truth->quantize_i8(want, x, k, padded);
    CHECK(!memcmp(q, want, (size_t)padded) && (isnan(a) ? isnan(b) : !memcmp(&a, &b, 4)), "%s quantize_i8 of %d: scale %g, not %g", t->isa,
          k, (double)a, (double)b);
    free(q), free(want);
}

static void quantizer(const migi_kernels *t)
{
    for (int k = 1; k < 300; k += k < 70 ? 1 : 37) {
        float *x = floats((size_t)k);
        int padded = (k + MIGI_K_INT8 - 1) / MIGI_K_INT8 * MIGI_K_INT8;
        quantized(t, x, k, padded);
        for (int i = 0; i < k; i++) x[i] = (float)(int)(bits() % 253) - 126.f + .5f; /* ties, as the factor is 1 */
        x[bits() % (uint32_t)k] = bits() & 1 ? 127.f : -127.f;
        quantized(t, x, k, padded);
        for (int i = 0; i < k; i++) x[i] = -x[i] * 3e-39f;
        quantized(t, x, k, padded);
        memset(x, 0, (size_t)k * 4);
        quantized(t, x, k, padded);
        static const float odd[] = {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, 1e-30f, 2e-30f};
        for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
            x[bits() % (uint32_t)k] = odd[i];
            quantized(t, x, k, padded);
            memset(x, 0, (size_t)k * 4);
        }
        free(x);
    }
    int8_t q[64];
    float scale = t->quantize_i8(q, (float[]){2.5f, -127.f, .5f, 1.5f, -3.5f}, 5, 64);
    CHECK(scale == 1.f && q[0] == 2 && q[1] == -127 && q[2] == 0 && q[3] == 2 && q[4] == -4 && !q[5] && !q[63],
          "%s quantize_i8: %d %d %d %d %d", t->isa, q[0], q[1], q[2], q[3], q[4]);
}

static void scaled_sums(const migi_kernels *t, int n)
{
    int32_t *c = counts((size_t)n);
    float *scales = floats((size_t)n), *bias = floats((size_t)n), *y = floats((size_t)n), *want = copy_of(y, (size_t)n * 4);
    for (int with = 0; with < 2; with++) {
        t->add_scaled(y, c, 3e-5f, scales, with ? bias : NULL, n), truth->add_scaled(want, c, 3e-5f, scales, with ? bias : NULL, n);
        CHECK(!different(y, want, (size_t)n), "%s add_scaled %d bias %d", t->isa, n, with);
    }
    for (int with = 0; with < 2; with++) {
        memset(y, 0xff, (size_t)n * 4), memset(want, 0xff, (size_t)n * 4); /* NaN: nothing may be read */
        t->put_scaled(y, c, 3e-5f, scales, with ? bias : NULL, n), truth->put_scaled(want, c, 3e-5f, scales, with ? bias : NULL, n);
        CHECK(!different(y, want, (size_t)n), "%s put_scaled %d", t->isa, n);
    }
    free(bias), free(c), free(scales), free(y), free(want);
}

static void half_floats(const migi_kernels *t)
{
    enum { N = 1 << 16 };
    uint16_t *h = malloc(N * 2), *g = malloc(N * 2), *e = malloc(N * 2);
    float *x = malloc(N * 4), *want = malloc(N * 4);
    for (int i = 0; i < N; i++) h[i] = (uint16_t)i;
    t->widen_f16(x, h, N), truth->widen_f16(want, h, N);
    int wrong = 0;
    for (int i = 0; i < N; i++) wrong += isnan(want[i]) ? !isnan(x[i]) : memcmp(x + i, want + i, 4) != 0;
    CHECK(!wrong, "%s widen_f16: %d values differ", t->isa, wrong);
    t->narrow_f16(g, want, N);
    wrong = 0;
    for (int i = 0; i < N; i++) wrong += isnan(want[i]) ? (g[i] & 0x7c00) != 0x7c00 || !(g[i] & 0x3ff) : g[i] != h[i];
    CHECK(!wrong, "%s narrow_f16: %d halves change on the way there and back", t->isa, wrong);
    for (int i = 0; i < N; i++) { /* halfway between neighbours, one place to either side, and anything */
        uint32_t word = bits() << 8 | bits() % 256, half = word & 0x7fff;
        if (i & 3 && half < 0x7bff) {
            float middle = .5f * (migi_f16_to_f32((uint16_t)half) + migi_f16_to_f32((uint16_t)(half + 1)));
            memcpy(&word, &middle, 4);
            word += (uint32_t)(i & 3) - 2u;
            word |= bits() << 31;
        }
        memcpy(x + i, &word, 4);
        if (isnan(x[i])) x[i] = 65520.f;
    }
    for (int n = N; n > N - 40; n--) {
        memset(g, 0, N * 2), memset(e, 0, N * 2);
        t->narrow_f16(g, x, (size_t)n), truth->narrow_f16(e, x, (size_t)n);
        CHECK(!memcmp(g, e, N * 2), "%s narrow_f16 of %d values", t->isa, n);
    }
    for (size_t n = 0; n < 40; n++) {
        float *tail = copy_of(x, 41 * 4);
        t->widen_f16(tail, e, n), truth->widen_f16(x, e, n);
        CHECK(!memcmp(tail, x, 41 * 4), "%s widen_f16 of %d values", t->isa, (int)n);
        free(tail);
    }
    free(h), free(g), free(e), free(x), free(want);
}

/* Each row as if it were alone. */
static void half_products(const migi_kernels *t, int m, int n, int k)
{
    size_t ldy = (size_t)n + 3, ldw = (size_t)k + 9, size = (size_t)m * ldy;
    float *x = floats((size_t)m * (size_t)k), *y = floats(size), *want = copy_of(y, size * 4), *lone = copy_of(y, size * 4);
    uint16_t *w = malloc(((size_t)(n - 1) * ldw + (size_t)k) * 2);
    for (size_t i = 0; i < (size_t)(n - 1) * ldw + (size_t)k; i++) w[i] = migi_f32_to_f16(noise());
    t->dots_f16(y, ldy, x, w, ldw, m, n, k), truth->dots_f16(want, ldy, x, w, ldw, m, n, k);
    for (int i = 0; i < m; i++) t->dots_f16(lone + (size_t)i * ldy, ldy, x + i * k, w, ldw, 1, n, k);
    CHECK(!different(y, want, size), "%s dots_f16 %dx%dx%d", t->isa, m, n, k);
    CHECK(!memcmp(y, lone, size * 4), "%s dots_f16 %dx%dx%d: rows depend on each other", t->isa, m, n, k);
    float *sum = floats((size_t)m * (size_t)k), *wanted = copy_of(sum, (size_t)m * (size_t)k * 4),
          *single = copy_of(sum, (size_t)m * (size_t)k * 4);
    t->weighted_f16(sum, y, ldy, w, ldw, m, n, k), truth->weighted_f16(wanted, y, ldy, w, ldw, m, n, k);
    for (int i = 0; i < m; i++) t->weighted_f16(single + i * k, y + (size_t)i * ldy, ldy, w, ldw, 1, n, k);
    CHECK(!different(sum, wanted, (size_t)m * (size_t)k), "%s weighted_f16 %dx%dx%d", t->isa, m, n, k);
    CHECK(!memcmp(sum, single, (size_t)m * (size_t)k * 4), "%s weighted_f16 %dx%dx%d: rows depend on each other", t->isa, m, n, k);
    free(x), free(y), free(want), free(lone), free(w), free(sum), free(wanted), free(single);
}

static void integers(const migi_kernels *t)
{
    for (int m = 1; m <= 30; m++) int4_product(t, m, 16 + m % 3 * 16, 128, 1 << m % 5 << 3, RANDOM);
    int8_product(t, 200, 32, 640, RANDOM), int8_product(t, 193, 16, 576, MIXED);
    int4_product(t, 200, 32, 640, 128, RANDOM), int4_product(t, 193, 16, 1152, 24, MIXED);
    for (int m = 1; m <= 40; m++) int8_product(t, m, 16 + m % 4 * 16, 64, RANDOM);
    for (int n = 16; n <= 64; n += 16)
        for (int fill = 0; fill < FILLS; fill++) {
            static const int shapes[][2] = {{1, 2048}, {2, 192}, {3, 640}, {4, 128}, {7, 1216}, {9, 320}, {17, 256}, {33, 448}};
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) int8_product(t, shapes[s][0], n, shapes[s][1], fill);
            for (int group = 8; group <= 128; group *= 2) {
                int4_product(t, 1, n, 128, group, fill);
                int4_product(t, 1 + group / 8, n, 640, group, fill);
            }
            for (int group = 24; group <= 128; group += 16) int4_product(t, n / 4, n, 64 * group, group, fill); /* no powers of two */
            int4_product(t, 13, n, 64, 64, fill);
            int4_product(t, 8, n, 192, 32, fill);
            if (n < 48)
                int4_product(t, 3, n, 8960, n * 4, fill), int4_product(t, 1, n, 4160, 8, fill), int4_product(t, 14, n, 8256, 24, fill);
        }
    quantizer(t);
    for (int n = 1; n < 70; n++) scaled_sums(t, n);
    half_floats(t);
    for (int m = 1; m < 14; m++)
        for (int k = 1; k < 150; k += k < 40 ? 3 : 29) half_products(t, m, 1 + (m * 7 + k) % 23, k);
}

/* ---- the tables */

/* No slot is empty, whether this CPU can run the table or not, and every table stands on the scalar one. */
static void slots(void)
{
    for (int which = 0; which < migi_kernels_count(); which++) {
        migi_kernels k;
        migi_kernels_fill(&k, which);
#define FILLED(kind, slot) CHECK(k.slot != NULL, "%s has no %s", k.isa, #slot);
        MIGI_KERNEL_SLOTS(FILLED)
#undef FILLED
        CHECK(k.nr > 0 && k.nr <= MIGI_MAX_NR && k.nr_bf16 > 0 && k.nr_bf16 <= MIGI_MAX_NR && k.k_bf16 > 0 && k.k_bf16 <= 32 &&
                  k.i4_rows > 0,
              "%s: nr %d, nr_bf16 %d, k_bf16 %d, i4_rows %d", k.isa, k.nr, k.nr_bf16, k.k_bf16, k.i4_rows);
        CHECK(migi_kernels_named(k.isa) == which, "%s is not found by its name, or twice in the list", k.isa);
        const migi_kernels *lowest = &k;
        while (lowest->below) lowest = lowest->below;
        CHECK(!strcmp(lowest->isa, "scalar"), "%s stands on %s", k.isa, lowest->isa);
    }
    CHECK(migi_kernels_named("vax") == -1, "a table that is not there");
}

/* The report says whose functions serve; it is cut where there is no room. */
static void report(void)
{
    size_t size = migi_kernel_report(NULL, 0);
    char *text = malloc(size + 1), small[20];
    migi_kernels k;
    CHECK(migi_kernel_report(text, size + 1) == size && strlen(text) == size, "%zu bytes announced, %zu written", size, strlen(text));
    for (int which = 0; which < migi_kernels_count(); which++) {
        migi_kernels_fill(&k, which);
        CHECK(strstr(text, k.isa) != NULL, "%s is not in the report", k.isa);
    }
    const char *scalar = strstr(
        text, "float: scalar; bf16: scalar; int8: scalar; int4: scalar; half: scalar; rows: scalar; bf16 products as float\n");
    CHECK(scalar && scalar < strchr(text, '\n'), "the first line is not scalar's: %s", text);
    const char *vnni = strstr(text, "\navx512vnni ");
    if (vnni)
        CHECK(strstr(vnni, "float: avx512; bf16: avx512; int8: avx512, avx512vnni; int4: avx512, avx512vnni; half: avx512; rows: avx512; "),
              "what serves avx512vnni: %s", vnni);
    const char *dots = strstr(text, "\nneon-dotprod ");
    if (dots) CHECK(strstr(dots, "float: neon; bf16: neon; int8: neon, neon-dotprod; "), "what serves neon-dotprod: %s", dots);
    memset(small, 'x', sizeof small);
    CHECK(migi_kernel_report(small, 10) == size && !strncmp(small, text, 9) && !small[9] && small[10] == 'x', "cut to ten bytes: %.20s",
          small);
    free(text);
}

/* ---- the scalar table itself */

/* fmaf of the C library rounds once; these cases are where rounding twice, through double, would not. */
static void multiply_adds(void)
{
    int wrong = 0;
    for (int i = 0; i < (QUICK ? 100000 : 2000000); i++) {
        float a = ldexpf(noise(), (int)(bits() % 60) - 30), b = ldexpf(noise(), (int)(bits() % 60) - 30),
              c = ldexpf(noise(), (int)(bits() % 120) - 60);
        if (i % 4 == 0) c = ldexpf(a * b, (int)(bits() % 50) - 25); /* sums that nearly cancel, or end beside a tie */
        if (i % 4 == 1)
            a = 1.f + ldexpf((float)(bits() % 8), -23), b = 1.f + ldexpf((float)(bits() % 8), -23),
            c = ldexpf(bits() & 1 ? 1.f : -1.f, -(int)(bits() % 80));
        float got = migi_fma(a, b, c), want = fmaf(a, b, c);
        wrong += got != want;
    }
    CHECK(!wrong, "migi_fma: %d values differ from fmaf", wrong);
    CHECK(isnan(migi_fma(NAN, 1.f, 1.f)) && migi_fma(INFINITY, 1.f, 1.f) == INFINITY && isnan(migi_fma(INFINITY, 0.f, 1.f)) &&
              migi_fma(3e38f, 10.f, 0.f) == INFINITY && migi_fma(-3e38f, 10.f, 1.f) == -INFINITY,
          "migi_fma of what is not finite");
}

static void formulas(void)
{
    float top = 0.f, coarse = 0.f, off = 0.f, gates = 0.f;
    for (float x = -124.9f; x < 0.f; x += .0007f) {
        float e = x, g = x * .1f, h = -x * .1f;
        uint16_t rounded;
        float about = truth->exp2_bf16(&rounded, &e, 1, 0.f), exact = (float)exp2((double)x);
        CHECK(rounded == migi_f32_to_bf16(about), "exp2_bf16 of %g is not rounded to the nearest", (double)x);
        truth->exp2_sum(&e, 1, 0.f);
        top = fmaxf(top, fabsf(e - exact) / exact), coarse = fmaxf(coarse, fabsf(about - exact) / exact);
        for (int side = 0; side < 2; side++) {
            float y = side ? g : h, z = y, u = y, one = 1.f;
            truth->gelu(&y, 1), truth->quick_gelu(&u, 1);
            float want = .5f * z * (1.f + erff(z * .70710678f)), quick = z / (1.f + expf(-1.702f * z));
            off = fabsf(y - want) > off ? fabsf(y - want) : off;
            truth->silu_mul(&z, &one, 1);
            float silu = (side ? g : h) / (1.f + expf(-(side ? g : h))), apart = fabsf(z - silu) + fabsf(u - quick);
            gates = apart > gates ? apart : gates;
        }
    }
    CHECK(top < 2.4e-7f && coarse < 3e-6f, "exp2_sum is off by %g, exp2_bf16 by %g", (double)top, (double)coarse);
    float edge[] = {0.f, -125.1f, -INFINITY, NAN, -1e30f};
    truth->exp2_sum(edge, 5, 0.f);
    CHECK(edge[0] == 1.f && edge[1] == 0.f && edge[2] == 0.f && isnan(edge[3]) && edge[4] == 0.f, "exp2 at its edges");
    CHECK(off < 2e-6f && gates < 2e-6f, "gelu is off by %g, silu and quick_gelu by %g", (double)off, (double)gates);
    for (int n = 1; n < 200; n += 7) {
        float *x = floats((size_t)n), *w = floats((size_t)n), *b = floats((size_t)n), *y = malloc((size_t)n * 4),
              *z = malloc((size_t)n * 4);
        double square = 0, sum = 0, spread = 0;
        for (int i = 0; i < n; i++) square += (double)x[i] * (double)x[i], sum += (double)x[i];
        for (int i = 0; i < n; i++) spread += ((double)x[i] - sum / n) * ((double)x[i] - sum / n);
        truth->rms_norm(y, x, w, n, 1e-6f);
        for (int i = 0; i < n; i++) z[i] = (float)((double)x[i] / sqrt(square / n + 1e-6) * (double)w[i]);
        CHECK(worst(y, z, (size_t)n) < 1e-6f, "rms_norm %d off by %g", n, (double)worst(y, z, (size_t)n));
        truth->layer_norm(y, x, w, b, n, 1e-6f);
        for (int i = 0; i < n; i++) z[i] = (float)(((double)x[i] - sum / n) / sqrt(spread / n + 1e-6) * (double)w[i] + (double)b[i]);
        CHECK(worst(y, z, (size_t)n) < 2e-6f || n == 1, "layer_norm %d off by %g", n, (double)worst(y, z, (size_t)n));
        float dot = 0.f;
        double want = 0;
        for (int i = 0; i < n; i++) want += (double)x[i] * (double)w[i];
        truth->gemv_f32(&dot, w, (size_t)n, x, 1, n);
        CHECK(fabs((double)dot - want) < 1e-5, "gemv_f32 %d", n);
        free(x), free(w), free(b), free(y), free(z);
    }
}

int main(void)
{
    static const int shapes[][3] = {{1, 1, 1},    {2, 7, 9},     {5, 16, 33},    {6, 17, 64}, {13, 31, 100},
                                    {33, 64, 96}, {70, 45, 257}, {12, 32, 1176}, {48, 80, 96}};
    migi_kernels k;
    const migi_kernels *t = &k;
    truth = &migi_own_scalar;
    slots();
    report();
    multiply_adds();
    formulas();
    for (int which = 0; next_table(&k, &which, 0);) {
        printf("testing %s\n", t->isa);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            product(t, shapes[s][0], shapes[s][1], shapes[s][2], 0);
            product(t, shapes[s][0], shapes[s][1], shapes[s][2], 1);
            bf16_product(t, shapes[s][0], shapes[s][1], shapes[s][2]);
            vectors(t, shapes[s][1], shapes[s][2]);
            rows(t, shapes[s][2]);
        }
        integers(t);
    }
    CHECK(migi_f32_to_bf16(1.f + 1.f / 256) == 0x3f80 && migi_f32_to_bf16(1.f + 3.f / 256) == 0x3f82, "ties go to even");
    REPORT();
}
