/* attention.c - attention in blocks with a running softmax (FlashAttention, arXiv 2205.14135): never a T x T buffer.
 *
 * One task is one head and one block of queries. Per block of keys: scores = q k^T through the f32 product kernel, a new
 * maximum and sum per row, the output so far scaled down to it, plus probabilities times v.
 */
#include "internal.h"

#include <math.h>
#include <string.h>

enum {
    Q_BLOCK = 192,
    KEY_BLOCK = 128,  /* a multiple of every table's nr */
    FEW_QUERIES = 4,  /* below, packing keys costs more than it saves */
};

typedef struct call {
    workspace *ws;
    const attention *a;
    int blocks; /* of queries */
    float factor;
} call;

/* Per worker: scores, scaled queries, output, packed keys, packed values, maxima, sums. */
static size_t padded_size(const migi_kernels *k, int size) { return (size_t)((size + k->nr - 1) / k->nr * k->nr); }

size_t migi_attention_scratch(const migi_kernels *k, int size)
{
    size_t s = padded_size(k, size);
    return sizeof(float) * (Q_BLOCK * KEY_BLOCK + 2 * Q_BLOCK * s + 2 * KEY_BLOCK * s + 2 * Q_BLOCK);
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

static void one_query(const call *c, int head, int query, float *scratch)
{
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    size_t kv = (size_t)(head / (a->heads / a->kv_heads)) * a->kv_head;
    const float *q = a->q + (size_t)query * a->ldq + (size_t)head * (size_t)a->size;
    float *out = a->out + (size_t)query * a->ldo + (size_t)head * (size_t)a->size;
    float *scaled = scratch, *scores = scratch + padded_size(k, a->size);
    int keys = a->causal ? a->keys - a->queries + query + 1 : a->keys;
    float max = -INFINITY, sum = 0.f;
    memcpy(scaled, q, (size_t)a->size * sizeof *q);
    k->scale(scaled, a->size, c->factor);
    memset(out, 0, (size_t)a->size * sizeof *out);
    enum { KEYS = Q_BLOCK * KEY_BLOCK / 2 };
    for (int k0 = 0; k0 < keys; k0 += KEYS) {
        int n = min_int(KEYS, keys - k0);
        memset(scores, 0, (size_t)n * sizeof *scores);
        k->gemv_f32(scores, a->k + kv + (size_t)k0 * a->ldkv, a->ldkv, scaled, n, a->size);
        float down = fold(k, scores, n, &max, &sum);
        if (k0) k->scale(out, a->size, down);
        k->weighted_sum(out, a->v + kv + (size_t)k0 * a->ldkv, a->ldkv, scores, n, a->size);
    }
    k->scale(out, a->size, 1.f / sum);
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

static void query_block(void *arg, int task, int worker)
{
    const call *c = arg;
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    float *scratch = (float *)(void *)(c->ws->scratch + (size_t)worker * c->ws->scratch_bytes);
    int head = task / c->blocks, q0 = task % c->blocks * Q_BLOCK, rows = min_int(Q_BLOCK, a->queries - q0);
    if (a->queries <= FEW_QUERIES) {
        for (int i = 0; i < rows; i++) one_query(c, head, q0 + i, scratch);
        return;
    }
    size_t s = padded_size(k, a->size), kv = (size_t)(head / (a->heads / a->kv_heads)) * a->kv_head;
    float *scores = scratch, *q = scores + Q_BLOCK * KEY_BLOCK, *out = q + Q_BLOCK * s, *keys = out + Q_BLOCK * s,
          *values = keys + KEY_BLOCK * s, *max = values + KEY_BLOCK * s, *sum = max + Q_BLOCK;
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
        for (int j = 0; j < n; j += k->nr)
            k->pack_f32(keys + (size_t)j * s, a->k + kv + (size_t)(k0 + j) * a->ldkv, a->ldkv, min_int(k->nr, n - j), a->size);
        pack_values(k, values, a->v + kv + (size_t)k0 * a->ldkv, a->ldkv, n, a->size);
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
    migi_pool_run(ws->pool, query_block, &c, a->heads * c.blocks);
}
