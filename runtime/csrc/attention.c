/* attention.c - attention in blocks with a running softmax (FlashAttention, arXiv 2205.14135): never a T x T buffer.
 *
 * One task is one head and one block of queries. Per block of keys: scores = q k^T through the f32 product kernel, a new
 * maximum and sum per row, the output so far scaled down to it, plus probabilities times v. Keys and values kept as half
 * floats are widened block by block. With few queries (decode) a task is some query heads of one key/value head, which
 * share what was widened.
 */
#include "internal.h"

#include <math.h>
#include <string.h>

enum {
    Q_BLOCK = 192,
    KEY_BLOCK = 128,  /* a multiple of every table's nr */
    FEW_QUERIES = 4,  /* up to here, packing keys costs more than it saves */
    FEW_KEYS = 256,   /* keys of a block then: 128 KB of floats for heads of 128 */
    MAX_SHARE = 16,   /* query heads of a task then */
};

typedef struct call {
    workspace *ws;
    const attention *a;
    int blocks; /* of queries */
    int share;  /* query heads of a task when queries are few */
    float factor;
} call;

/* Per worker: scores, scaled queries, output, packed keys, packed values, widened keys or values, maxima, sums. */
static size_t padded_size(const migi_kernels *k, int size) { return (size_t)((size + k->nr - 1) / k->nr * k->nr); }

size_t migi_attention_scratch(const migi_kernels *k, int size)
{
    size_t s = padded_size(k, size);
    return sizeof(float) * (Q_BLOCK * KEY_BLOCK + 2 * Q_BLOCK * s + 3 * KEY_BLOCK * s + 2 * Q_BLOCK);
}

/* Folds scores of one row into its running maximum and sum; returns the factor for what was summed before. */
static float fold(const migi_kernels *k, float *scores, int n, float *max, float *sum)
{
    float block_max = k->max(scores, n), new_max = block_max > *max ? block_max : *max;
    if (new_max == -INFINITY) new_max = 0.f; /* nothing visible or NaN: exp gives 0 or NaN, not a trap */
    float down = *max == -INFINITY ? 0.f : expf(*max - new_max);
    *sum = *sum * down + k->exp_sum(scores, n, new_max);
    *max = new_max;
    return down;
}

/* Rows [first, first + rows) of one head's keys or values as float: in place, or widened to `wide`. *ld: floats per row. */
static const float *as_floats(const call *c, const void *side, size_t head_at, int first, int rows, float *wide, size_t *ld)
{
    const attention *a = c->a;
    size_t at = head_at + (size_t)first * a->ldkv;
    *ld = a->half ? (size_t)a->size : a->ldkv;
    if (!a->half) return (const float *)side + at;
    for (int i = 0; i < rows; i++)
        c->ws->k->widen_f16(wide + (size_t)i * *ld, (const uint16_t *)side + at + (size_t)i * a->ldkv, (size_t)a->size);
    return wide;
}

/* `share` query heads from `head` on, all of one key/value head, and one query. */
static void few_queries(const call *c, int head, int query, float *scratch)
{
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    size_t size = (size_t)a->size, kv = (size_t)(head / (a->heads / a->kv_heads)) * a->kv_head, ld;
    float *scores = scratch, *q = scores + MAX_SHARE * FEW_KEYS, *wide = q + MAX_SHARE * size, max[MAX_SHARE], sum[MAX_SHARE];
    float *out = a->out + (size_t)query * a->ldo + (size_t)head * size;
    int keys = a->causal ? a->keys - a->queries + query + 1 : a->keys;
    memcpy(q, a->q + (size_t)query * a->ldq + (size_t)head * size, (size_t)c->share * size * sizeof *q);
    k->scale(q, c->share * a->size, c->factor);
    memset(out, 0, (size_t)c->share * size * sizeof *out);
    for (int h = 0; h < c->share; h++) max[h] = -INFINITY, sum[h] = 0.f;
    for (int k0 = 0; k0 < keys; k0 += FEW_KEYS) {
        int n = min_int(FEW_KEYS, keys - k0);
        const float *side = as_floats(c, a->k, kv, k0, n, wide, &ld);
        memset(scores, 0, (size_t)c->share * FEW_KEYS * sizeof *scores);
        for (int h = 0; h < c->share; h++) {
            k->gemv_f32(scores + h * FEW_KEYS, side, ld, q + (size_t)h * size, n, a->size);
            float down = fold(k, scores + h * FEW_KEYS, n, &max[h], &sum[h]);
            if (k0) k->scale(out + (size_t)h * size, a->size, down);
        }
        side = as_floats(c, a->v, kv, k0, n, wide, &ld);
        for (int h = 0; h < c->share; h++)
            k->weighted_sum(out + (size_t)h * size, side, ld, scores + h * FEW_KEYS, n, a->size);
    }
    for (int h = 0; h < c->share; h++) k->scale(out + (size_t)h * size, a->size, 1.f / sum[h]);
}

static void few_queries_task(void *arg, int task, int worker)
{
    const call *c = arg;
    float *scratch = (float *)(void *)(c->ws->scratch + (size_t)worker * c->ws->scratch_bytes);
    for (int i = 0; i < c->a->queries; i++) few_queries(c, task * c->share, i, scratch);
}

/* The most query heads of one key/value head that a task may take and still leave one task for every thread. */
static int shared_heads(const attention *a, int threads)
{
    int group = a->heads / a->kv_heads;
    for (int share = min_int(group, MAX_SHARE); share > 1; share--)
        if (group % share == 0 && a->heads / share >= threads) return share;
    return 1;
}

/* panel[key][nr] <- v[key, j..j + nr) for all columns, zero past the head */
static void pack_values(const migi_kernels *k, float *panels, const float *v, size_t ldv, int keys, int size)
{
    for (int j = 0; j < size; j += k->nr) {
        int n = min_int(k->nr, size - j);
        float *panel = panels + (size_t)j * KEY_BLOCK;
        for (int i = 0; i < keys; i++) {
            memcpy(panel + (size_t)i * (size_t)k->nr, v + (size_t)i * ldv + j, (size_t)n * sizeof *v);
            if (n < k->nr) memset(panel + (size_t)i * (size_t)k->nr + n, 0, (size_t)(k->nr - n) * sizeof *v);
        }
    }
}

/* Panels of keys and of values [first, first + n) of one head. */
static void pack_sides(const call *c, size_t head_at, int first, int n, float *keys, float *values, float *wide)
{
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    size_t s = padded_size(k, a->size), ld;
    const float *side = as_floats(c, a->k, head_at, first, n, wide, &ld);
    for (int j = 0; j < n; j += k->nr)
        k->pack_f32(keys + (size_t)j * s, side + (size_t)j * ld, ld, min_int(k->nr, n - j), a->size);
    side = as_floats(c, a->v, head_at, first, n, wide, &ld);
    pack_values(k, values, side, ld, n, a->size);
}

static void query_block(void *arg, int task, int worker)
{
    const call *c = arg;
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    float *scratch = (float *)(void *)(c->ws->scratch + (size_t)worker * c->ws->scratch_bytes);
    int head = task / c->blocks, q0 = task % c->blocks * Q_BLOCK, rows = min_int(Q_BLOCK, a->queries - q0);
    size_t s = padded_size(k, a->size), kv = (size_t)(head / (a->heads / a->kv_heads)) * a->kv_head;
    float *scores = scratch, *q = scores + Q_BLOCK * KEY_BLOCK, *out = q + Q_BLOCK * s, *keys = out + Q_BLOCK * s,
          *values = keys + KEY_BLOCK * s, *wide = values + KEY_BLOCK * s, *max = wide + KEY_BLOCK * s,
          *sum = max + Q_BLOCK;
    int behind = a->keys - a->queries; /* keys before the first query */
    int visible = a->causal ? behind + q0 + rows : a->keys;
    for (int i = 0; i < rows; i++) {
        memcpy(q + (size_t)i * s, a->q + (size_t)(q0 + i) * a->ldq + (size_t)head * (size_t)a->size, (size_t)a->size * sizeof *q);
        k->scale(q + (size_t)i * s, a->size, c->factor);
        max[i] = -INFINITY, sum[i] = 0.f;
    }
    memset(out, 0, (size_t)rows * s * sizeof *out);
    for (int k0 = 0; k0 < visible; k0 += KEY_BLOCK) {
        int n = min_int(KEY_BLOCK, visible - k0);
        pack_sides(c, kv, k0, n, keys, values, wide);
        memset(scores, 0, (size_t)rows * KEY_BLOCK * sizeof *scores);
        for (int j = 0; j < n; j += k->nr)
            k->gemm_f32(scores + j, KEY_BLOCK, q, s, keys + (size_t)j * s, rows, min_int(k->nr, n - j), a->size);
        for (int i = 0; i < rows; i++) {
            float *row = scores + (size_t)i * KEY_BLOCK;
            for (int j = a->causal ? behind + q0 + i + 1 - k0 : n; j < n; j++)
                if (j >= 0) row[j] = -INFINITY;
            float down = fold(k, row, n, &max[i], &sum[i]);
            if (k0) k->scale(out + (size_t)i * s, a->size, down);
        }
        for (int j = 0; j < a->size; j += k->nr)
            k->gemm_f32(out + j, s, scores, KEY_BLOCK, values + (size_t)j * KEY_BLOCK, rows, min_int(k->nr, a->size - j), n);
    }
    for (int i = 0; i < rows; i++) {
        float *to = a->out + (size_t)(q0 + i) * a->ldo + (size_t)head * (size_t)a->size;
        memcpy(to, out + (size_t)i * s, (size_t)a->size * sizeof *to);
        k->scale(to, a->size, 1.f / sum[i]);
    }
}

void migi_attend(workspace *ws, const attention *a)
{
    call c = {.ws = ws, .a = a, .blocks = (a->queries + Q_BLOCK - 1) / Q_BLOCK, .factor = 1.f / sqrtf((float)a->size)};
    if (a->queries > FEW_QUERIES) {
        migi_pool_run(ws->pool, query_block, &c, a->heads * c.blocks);
        return;
    }
    c.share = shared_heads(a, migi_pool_threads(ws->pool));
    migi_pool_run(ws->pool, few_queries_task, &c, a->heads / c.share);
}
