/* ceilings.c - what this machine can do at most: bytes read from memory, products per second.
 *
 * A report divides what a phase of the engine did by these. Reading streams a buffer larger than any cache. Products are
 * the faster of two: the table's own kernels on operands that stay in the first two caches, and, where this file has one
 * for the table, a loop that never leaves the registers; so a slow kernel does not lower its own ceiling. A product with
 * its addition counts as two operations. Every figure is the best of many short rounds, since others disturb only one way.
 */
#include "migi_measure.h"
#include "pool.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    STREAM = 256 << 20,  /* bytes; four times the third-level cache of most machines */
    PIECE = 2 << 20,     /* of them in a task */
    ROUND = 16,          /* pieces of a round, a millisecond or two: on a busy machine some rounds go undisturbed */
    BYTES_AHEAD = 2048,  /* bytes asked for early: without it a page's end costs a fifth of the speed (Zen 3) */
    OPERAND = 256 << 10, /* bytes of each operand of a kernel, for each thread */
    LOOPS = 20000,       /* of a register loop in a task */
};

typedef double product(const migi_kernels *k, char *a, char *w, char *c); /* returns the operations done */

typedef struct ceiling_call {
    const migi_kernels *k;
    char *memory; /* the stream, or three operands for each thread */
    product *run;
    double done;  /* of one task; every task does the same */
    size_t round; /* each round reads where the one before ended */
    _Atomic uint64_t sink;
} ceiling_call;

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void read_piece(void *arg, int task, int worker)
{
    ceiling_call *c = arg;
    (void)worker;
    const uint64_t *p = (const uint64_t *)(const void *)(c->memory + (c->round * ROUND + (size_t)task) % (STREAM / PIECE) * PIECE);
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < PIECE / sizeof *p; i += 8) {
        __builtin_prefetch((const char *)(p + i) + BYTES_AHEAD);
        for (int j = 0; j < 8; j++) sum[j] += p[i + (size_t)j];
    }
    uint64_t all = 0;
    for (int j = 0; j < 8; j++) all += sum[j];
    atomic_fetch_add(&c->sink, all); /* keeps the reads */
}

static void run_product(void *arg, int task, int worker)
{
    ceiling_call *c = arg;
    char *a = c->memory + (size_t)worker * 3 * OPERAND;
    double done = c->run(c->k, a, a + OPERAND, a + 2 * OPERAND);
    if (!task) c->done = done;
}

/* The best rate of whole rounds within `seconds`; amount: of one round, 0 where the tasks report theirs. */
static double best_rate(migi_pool *pool, migi_work *work, ceiling_call *c, int tasks, double amount, double seconds)
{
    double best = 0, end = seconds_now() + seconds;
    do {
        double start = seconds_now();
        migi_pool_run(pool, work, c, tasks);
        double spent = seconds_now() - start, rate = (amount > 0 ? amount : c->done * tasks) / (spent > 1e-9 ? spent : 1e-9);
        if (rate > best) best = rate;
        c->round++;
    } while (seconds_now() < end);
    return best;
}

/* ---- the table's kernels */

static double kernel_f32(const migi_kernels *k, char *a, char *w, char *c)
{
    enum { M = 24, K = 128, TIMES = 400 }; /* M: a multiple of every tile's rows but 16 */
    for (int i = 0; i < TIMES; i++)
        k->gemm_f32((float *)(void *)c, MIGI_MAX_NR, (const float *)(const void *)a, K, (const float *)(const void *)w, 0, M, k->nr, K, 1);
    return 2. * M * K * k->nr * TIMES;
}

static double kernel_bf16(const migi_kernels *k, char *a, char *w, char *c)
{
    enum { M = 96, K = 128, TIMES = 200 };
    for (int i = 0; i < TIMES; i++)
        k->gemm_bf16((float *)(void *)c, MIGI_MAX_NR, (const uint16_t *)(const void *)a, K, (const uint32_t *)(const void *)w, 0, M,
                     k->nr_bf16, K, 1);
    return 2. * M * K * k->nr_bf16 * TIMES;
}

static double kernel_int8(const migi_kernels *k, char *a, char *w, char *c)
{
    enum { M = 64, N = 64, K = 512, TIMES = 20 };
    for (int i = 0; i < TIMES; i++)
        k->gemm_i8((int32_t *)(void *)c, N, (const int8_t *)a, K, (const int8_t *)w, (size_t)K * MIGI_BLOCK, M, N, K, 1);
    return 2. * M * N * K * TIMES;
}

/* ---- registers alone: SUMS sums hide the latency of one instruction on every CPU so far */

enum { SUMS = 12 };

#define REGISTER_LOOP(name, features, type, zero, step, store, operations)                                 \
    __attribute__((target(features))) static double name(const migi_kernels *k, char *a, char *w, char *c) \
    {                                                                                                      \
        (void)k;                                                                                           \
        type x, y, sum[SUMS];                                                                              \
        memcpy(&x, a, sizeof x), memcpy(&y, w, sizeof y);                                                  \
        for (int j = 0; j < SUMS; j++) sum[j] = zero;                                                      \
        for (int i = 0; i < LOOPS; i++)                                                                    \
            for (int j = 0; j < SUMS; j++) { step; }                                                       \
        for (int j = 0; j < SUMS; j++) store;                                                              \
        return 2. * SUMS * LOOPS * (operations);                                                           \
    }

#if defined(__x86_64__)
#include <immintrin.h>

/* clang-format off */
REGISTER_LOOP(fma_256, "avx2,fma", __m256, _mm256_setzero_ps(), sum[j] = _mm256_fmadd_ps(sum[j], x, y),
              _mm256_storeu_ps((float *)(void *)c + 8 * j, sum[j]), 8)
/* the empty assembly makes x a new value each time: else one product would serve all sums */
REGISTER_LOOP(maddubs_256, "avx2", __m256i, _mm256_setzero_si256(),
              __asm__ volatile("" : "+x"(x));
              sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), y)),
              _mm256_storeu_si256((__m256i *)(void *)c + j, sum[j]), 32)
REGISTER_LOOP(fma_512, "avx512f", __m512, _mm512_setzero_ps(), sum[j] = _mm512_fmadd_ps(sum[j], x, y),
              _mm512_storeu_ps(c + 64 * j, sum[j]), 16)
REGISTER_LOOP(maddubs_512, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(),
              __asm__ volatile("" : "+v"(x));
              sum[j] = _mm512_add_epi32(sum[j], _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), y)),
              _mm512_storeu_si512(c + 64 * j, sum[j]), 64)
REGISTER_LOOP(dpbusd_512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), sum[j] = _mm512_dpbusd_epi32(sum[j], x, y),
              _mm512_storeu_si512(c + 64 * j, sum[j]), 64)
REGISTER_LOOP(dpbf16_512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
              sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)x, (__m512bh)y), _mm512_storeu_ps(c + 64 * j, sum[j]), 32)
#elif defined(__aarch64__)
#include <arm_neon.h>

REGISTER_LOOP(fma_128, "arch=armv8-a", float32x4_t, vdupq_n_f32(0), sum[j] = vfmaq_f32(sum[j], x, y),
              vst1q_f32((float *)(void *)c + 4 * j, sum[j]), 4)
#endif
/* clang-format on */

/* Which register loops say what the table's instructions can do; NULL: none, the kernel's rate stands alone. */
static const struct loops {
    const char *isa;
    product *f32, *bf16, *int8;
} loops[] = {
#if defined(__x86_64__)
    {"avx2", fma_256, NULL, maddubs_256},
    {"avx512", fma_512, NULL, maddubs_512},
    {"avx512vnni", fma_512, NULL, dpbusd_512},
    {"avx512bf16", fma_512, dpbf16_512, dpbusd_512},
    {"amx", fma_512, NULL, dpbusd_512},
#elif defined(__aarch64__)
    {"neon", fma_128, NULL, NULL},
    {"neon-dotprod", fma_128, NULL, NULL},
    {"neon-i8mm", fma_128, NULL, NULL},
#endif
    {NULL, NULL, NULL, NULL},
};

static double best_product(migi_pool *pool, ceiling_call *c, product *kernel, product *loop, double seconds)
{
    int tasks = migi_pool_threads(pool);
    c->run = kernel;
    double rate = best_rate(pool, run_product, c, tasks, 0, seconds), other = 0;
    c->run = loop;
    if (loop) other = best_rate(pool, run_product, c, tasks, 0, seconds);
    return other > rate ? other : rate;
}

migi_status migi_measure_ceilings(migi_pool *pool, double seconds, migi_ceilings *out, migi_error *err)
{
    migi_status status = MIGI_OK;
    ceiling_call c = {.k = migi_pool_kernels(pool)};
    size_t threads = (size_t)migi_pool_threads(pool);
    const struct loops *l = loops;
    *out = (migi_ceilings){0};
    FAIL_IF(!(seconds > 0 && seconds <= 60), MIGI_E_ARGUMENT, "%g seconds for a ceiling; give up to 60", seconds);
    while (l->isa && strcmp(l->isa, c.k->isa)) l++;
    c.memory = migi_alloc(STREAM, 1);
    FAIL_IF(!c.memory, MIGI_E_MEMORY, "no memory to measure reading (%d MB); free some", STREAM >> 20);
    out->read_bytes = best_rate(pool, read_piece, &c, ROUND, (double)ROUND * PIECE, seconds);
    free(c.memory);
    c.memory = migi_alloc(threads * 3, OPERAND); /* zeros: products cost the same whatever the values */
    FAIL_IF(!c.memory, MIGI_E_MEMORY, "no memory to measure products of %zu threads; use fewer", threads);
    out->f32_ops = best_product(pool, &c, kernel_f32, l->f32, seconds);
    out->int8_ops = best_product(pool, &c, kernel_int8, l->int8, seconds);
    if (c.k->bf16_dots) out->bf16_ops = best_product(pool, &c, kernel_bf16, l->bf16, seconds);
done:
    free(c.memory);
    return status;
}
