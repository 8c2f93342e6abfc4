/* test_kernels.c - every table this CPU can run against the scalar one: whole and tail shapes. */
#include "../../runtime/csrc/kernels.h"
#include "harness.h"

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

static uint16_t *halves(size_t n)
{
    uint16_t *p = malloc((n ? n : 1) * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = migi_f32_to_bf16(noise());
    return p;
}

static void product(const migi_kernels *t, int m, int n, int k, int bf16_weights)
{
    size_t lda = (size_t)k + 3, ldc = (size_t)n + 5;
    float *a = floats((size_t)m * lda), *w = floats((size_t)n * (size_t)k), *c = floats((size_t)m * ldc);
    uint16_t *h = halves((size_t)n * (size_t)k);
    float *want = malloc((size_t)m * ldc * 4), *panel = malloc((size_t)k * MIGI_MAX_NR * 4);
    memcpy(want, c, (size_t)m * ldc * 4);
    for (int j = 0; j < n; j += t->nr) {
        int cols = n - j < t->nr ? n - j : t->nr;
        if (bf16_weights) t->pack_bf16(panel, h + (size_t)j * (size_t)k, (size_t)k, cols, k);
        else t->pack_f32(panel, w + (size_t)j * (size_t)k, (size_t)k, cols, k);
        t->gemm_f32(c + j, ldc, a, lda, panel, m, cols, k);
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++)
                sum += (double)a[(size_t)i * lda + (size_t)l] *
                       (double)(bf16_weights ? migi_bf16_to_f32(h[(size_t)j * (size_t)k + (size_t)l]) : w[(size_t)j * (size_t)k + (size_t)l]);
            want[(size_t)i * ldc + (size_t)j] += (float)sum;
        }
    CHECK(worst(c, want, (size_t)m * ldc) < 2e-5f, "%s gemm_f32 %dx%dx%d off by %g", t->isa, m, n, k, (double)worst(c, want, (size_t)m * ldc));
    free(a), free(w), free(c), free(h), free(want), free(panel);
}

static void bf16_product(const migi_kernels *t, int m, int n, int k)
{
    int padded = (k + MIGI_K_STEP - 1) / MIGI_K_STEP * MIGI_K_STEP;
    size_t ldc = (size_t)n + 5;
    float *c = floats((size_t)m * ldc), *want = malloc((size_t)m * ldc * 4), *x = floats((size_t)m * (size_t)k);
    uint16_t *a = calloc((size_t)m * (size_t)padded, 2), *h = halves((size_t)n * (size_t)k);
    uint32_t *panel = malloc((size_t)padded / 2 * MIGI_MAX_NR * 4);
    memcpy(want, c, (size_t)m * ldc * 4);
    for (int i = 0; i < m; i++) {
        t->round_bf16(a + (size_t)i * (size_t)padded, x + (size_t)i * (size_t)k, (size_t)k);
        for (int l = 0; l < k; l++)
            CHECK(a[(size_t)i * (size_t)padded + (size_t)l] == migi_f32_to_bf16(x[(size_t)i * (size_t)k + (size_t)l]), "%s rounds differently", t->isa);
    }
    for (int j = 0; j < n; j += t->nr_bf16) {
        int cols = n - j < t->nr_bf16 ? n - j : t->nr_bf16;
        t->pack_pairs(panel, h + (size_t)j * (size_t)k, (size_t)k, cols, k, padded);
        t->gemm_bf16(c + j, ldc, a, (size_t)padded, panel, m, cols, padded);
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++)
                sum += (double)migi_bf16_to_f32(a[(size_t)i * (size_t)padded + (size_t)l]) * (double)migi_bf16_to_f32(h[(size_t)j * (size_t)k + (size_t)l]);
            want[(size_t)i * ldc + (size_t)j] += (float)sum;
        }
    CHECK(worst(c, want, (size_t)m * ldc) < 2e-5f, "%s gemm_bf16 %dx%dx%d off by %g", t->isa, m, n, k, (double)worst(c, want, (size_t)m * ldc));
    free(c), free(want), free(x), free(a), free(h), free(panel);
}

static void vectors(const migi_kernels *t, int rows, int k)
{
    float *w = floats((size_t)rows * (size_t)k), *x = floats((size_t)k), *y = floats((size_t)rows), *z = malloc((size_t)rows * 4);
    uint16_t *h = halves((size_t)rows * (size_t)k);
    memcpy(z, y, (size_t)rows * 4);
    t->gemv_f32(y, w, (size_t)k, x, rows, k), truth->gemv_f32(z, w, (size_t)k, x, rows, k);
    CHECK(worst(y, z, (size_t)rows) < 2e-5f, "%s gemv_f32 %dx%d", t->isa, rows, k);
    t->gemv_bf16(y, h, (size_t)k, x, rows, k), truth->gemv_bf16(z, h, (size_t)k, x, rows, k);
    CHECK(worst(y, z, (size_t)rows) < 4e-5f, "%s gemv_bf16 %dx%d", t->isa, rows, k);
    float *s = floats((size_t)k), *u = malloc((size_t)k * 4), *p = floats((size_t)rows);
    memcpy(u, s, (size_t)k * 4);
    t->weighted_sum(s, w, (size_t)k, p, rows, k), truth->weighted_sum(u, w, (size_t)k, p, rows, k);
    CHECK(worst(s, u, (size_t)k) < 2e-5f, "%s weighted_sum %dx%d", t->isa, rows, k);
    free(w), free(x), free(y), free(z), free(h), free(s), free(u), free(p);
}

static void rows(const migi_kernels *t, int n)
{
    size_t size = (size_t)n;
    float *x = floats(size), *w = floats(size), *b = floats(size), *y = malloc(2 * size * 4), *z = malloc(2 * size * 4);
    t->rms_norm(y, x, w, n, 1e-6f), truth->rms_norm(z, x, w, n, 1e-6f);
    CHECK(worst(y, z, size) < 1e-5f, "%s rms_norm %d", t->isa, n);
    t->layer_norm(y, x, w, b, n, 1e-6f), truth->layer_norm(z, x, w, b, n, 1e-6f);
    CHECK(worst(y, z, size) < 2e-5f, "%s layer_norm %d", t->isa, n);
#define SAME(call, limit)                                                          \
    do {                                                                           \
        const migi_kernels *k = t;                                                 \
        float *d = y;                                                              \
        for (int i = 0; i < n; i++) y[i] = z[i] = 12.f * x[i];                      \
        call;                                                                      \
        k = truth, d = z;                                                          \
        call;                                                                      \
        CHECK(worst(y, z, size) < (limit), "%s %s %d off by %g", t->isa, #call, n, (double)worst(y, z, size)); \
    } while (0)
    SAME(k->silu_mul(d, w, n), 2e-6f);
    SAME(k->quick_gelu(d, n), 2e-6f);
    SAME(k->gelu(d, n), 2e-6f);
    SAME(k->scale(d, n, 1.7f), 1e-7f);
    for (int i = 0; i < n; i++) y[i] = z[i] = 40.f * x[i];
    if (n > 2) y[1] = z[1] = -INFINITY;
    float top = t->max(y, n), a = t->exp_sum(y, n, top), e = truth->exp_sum(z, n, truth->max(z, n));
    CHECK(top == truth->max((float[]){top}, 1) && fabsf(a - e) < 1e-5f * e && worst(y, z, size) < 1e-6f, "%s exp_sum %d", t->isa, n);
    for (int i = 0; i < 2 * n; i++) y[i] = z[i] = noise();
    t->rope(y, w, b, n), truth->rope(z, w, b, n);
    CHECK(worst(y, z, 2 * size) < 1e-6f, "%s rope %d", t->isa, n);
    free(x), free(w), free(b), free(y), free(z);
}

int main(void)
{
    static const char *names[] = {"scalar", "avx2", "avx512", "avx512bf16", "amx", "amx-emulated", "neon"};
    static const int shapes[][3] = {{1, 1, 1}, {2, 7, 9}, {5, 16, 33}, {6, 17, 64}, {13, 31, 100}, {33, 64, 96}, {70, 45, 257}, {12, 32, 1176}};
    truth = &migi_kernels_scalar;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int runs;
        const migi_kernels *t = migi_kernels_find(names[i], &runs);
        if (!t || !runs) {
            printf("SKIPPED %s: %s\n", names[i], t ? "this CPU cannot run it" : "not in this build");
            skipped++;
            continue;
        }
        printf("testing %s\n", names[i]);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            product(t, shapes[s][0], shapes[s][1], shapes[s][2], 0);
            product(t, shapes[s][0], shapes[s][1], shapes[s][2], 1);
            bf16_product(t, shapes[s][0], shapes[s][1], shapes[s][2]);
            vectors(t, shapes[s][1], shapes[s][2]);
            rows(t, shapes[s][2]);
        }
    }
    CHECK(migi_kernels_best() != NULL, "no kernels");
    CHECK(migi_f32_to_bf16(1.f + 1.f / 256) == 0x3f80 && migi_f32_to_bf16(1.f + 3.f / 256) == 0x3f82, "ties go to even");
    REPORT();
}
