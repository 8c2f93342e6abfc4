/* attention.c - attention in blocks with a running softmax (FlashAttention, arXiv 2205.14135): never a T x T buffer.
 *
 * Many queries: keys and values are packed once for all of them, block by block (and widened, if half floats). Then one task
 * is one head and up to TASK_QUERIES queries, and per block of keys and of queries: scores = q k^T through the product kernels,
 * a new maximum and sum per row, the output so far scaled down to it where the maximum grew, plus probabilities times v.
 * Queries are scaled by log2 e as well, as powers of two are cheaper than those of e. A session that rounds activations to
 * bf16 anyway rounds q, k, v and the probabilities too, where the table multiplies bf16 faster; sums, maxima and powers stay
 * float.
 * Few queries (decode): a task is some query heads of one key/value head and all queries; half floats are widened in
 * registers, once for all of them.
 *
 * A row's result depends neither on the rows beside it nor on where its block begins: keys past the last visible one are
 * -INFINITY and add zeros.
 */
#include "attention.h"

#include <math.h>
#include <string.h>

enum {
    Q_BLOCK = 48, /* queries whose scores are kept at a time */
    TASK_QUERIES = MIGI_CHUNK,
    TASKS = 4,               /* for every thread */
    KEY_BLOCK = 800,         /* a multiple of every table's nr, nr_bf16 and k_bf16 */
    SCORES = KEY_BLOCK + 32, /* floats from one query's scores to the next: no power of two, whose lines share few sets of a cache */
    FEW_QUERIES = MIGI_FEW_ROWS,
    FEW_KEYS = 256, /* keys of a block then */
    MAX_SHARE = 16, /* query heads of a task then */
};

typedef struct attention_call {
    const workspace *ws;
    const attention *a;
    int part, parts; /* queries of a task; tasks of a head */
    int share;       /* query heads of a task when queries are few */
    size_t s;        /* a head's size for panels of any kind */
    float factor;    /* of q: scores are exponents of two */
} attention_call;

/* A head's size for panels of any kind. */
static size_t padded_size(const migi_kernels *k, int size)
{
    size_t nr = (size_t)(k->nr > k->nr_bf16 ? k->nr : k->nr_bf16);
    return larger(((size_t)size + nr - 1) / nr * nr, migi_padded(k, (size_t)size));
}

size_t migi_attention_scratch(const migi_kernels *k, int size)
{
    size_t s = padded_size(k, size);
    size_t many = Q_BLOCK * SCORES + 2 * TASK_QUERIES * s + 2 * TASK_QUERIES + (Q_BLOCK * SCORES + TASK_QUERIES * s) / 2;
    size_t few = MAX_SHARE * FEW_QUERIES * (FEW_KEYS + 2 * (size_t)size + 2);
    return sizeof(float) * larger(larger(many, few), 2 * KEY_BLOCK * s);
}

/* Folds scores of one row into its running maximum and sum, and turns them into probabilities: in `half` as bf16, or NULL
 * and in place. Returns the factor for what was summed before. */
static float fold(const migi_kernels *k, float *scores, uint16_t *half, int n, float *max, float *sum)
{
    float block_max = k->max(scores, n), new_max = block_max > *max ? block_max : *max, down = 1.f;
    if (new_max == -INFINITY) new_max = 0.f; /* nothing visible or NaN: exp gives 0 or NaN, not a trap */
    if (*max == -INFINITY) down = 0.f;
    else if (new_max != *max) {
        down = *max;
        k->exp2_sum(&down, 1, new_max);
    }
    *sum = *sum * down + (half ? k->exp2_bf16(half, scores, n, new_max) : k->exp2_sum(scores, n, new_max));
    *max = new_max;
    return down;
}

/* ---- few queries */

/* How many of the keys [k0, k0 + n) row r sees; row r is query r / share. */
static int seen_keys(const attention_call *c, int r, int k0, int n)
{
    const attention *a = c->a;
    int last = a->causal ? a->keys - a->queries + r / c->share + 1 : a->keys, visible = min_int(n, last - k0);
    return visible < 0 ? 0 : visible;
}

/* scores[rows][FEW_KEYS] <- q[rows, size] of the keys [k0, k0 + n) of one key/value head */
static void few_scores(const attention_call *c, float *scores, const float *q, size_t kv, int k0, int rows, int n)
{
    const attention *a = c->a;
    size_t at = kv + (size_t)k0 * a->ldkv;
    if (a->half) {
        c->ws->k->dots_f16(scores, FEW_KEYS, q, (const uint16_t *)a->k + at, a->ldkv, rows, n, a->size);
        return;
    }
    for (int r = 0; r < rows; r++) {
        int own = seen_keys(c, r, k0, n); /* the last keys of a product are added in another order than those before */
        memset(scores + r * FEW_KEYS, 0, (size_t)n * sizeof *scores);
        c->ws->k->gemv_f32(scores + r * FEW_KEYS, (const float *)a->k + at, a->ldkv, q + (size_t)r * (size_t)a->size, own, a->size);
    }
}

/* out[rows, size] += the values, weighted by scores */
static void few_values(const attention_call *c, float *out, const float *scores, size_t kv, int k0, int rows, int n)
{
    const attention *a = c->a;
    size_t at = kv + (size_t)k0 * a->ldkv;
    if (a->half) {
        c->ws->k->weighted_f16(out, scores, FEW_KEYS, (const uint16_t *)a->v + at, a->ldkv, rows, n, a->size);
        return;
    }
    for (int r = 0; r < rows; r++)
        c->ws->k->weighted_sum(out + (size_t)r * (size_t)a->size, (const float *)a->v + at, a->ldkv, scores + r * FEW_KEYS,
                               seen_keys(c, r, k0, n), a->size);
}

/* `share` query heads from `head` on, all of one key/value head, and all queries. */
static void few_queries(const attention_call *c, int head, float *scratch)
{
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    int rows = a->queries * c->share;
    size_t size = (size_t)a->size, kv = (size_t)(head / (a->heads / a->kv_heads)) * a->kv_head,
           row_bytes = (size_t)c->share * size * sizeof(float);
    float *scores = scratch, *q = scores + MAX_SHARE * FEW_QUERIES * FEW_KEYS, *out = q + (size_t)rows * size;
    float *max = out + (size_t)rows * size, *sum = max + rows;
    for (int i = 0; i < a->queries; i++)
        memcpy(q + (size_t)(i * c->share) * size, a->q + (size_t)i * a->ldq + (size_t)head * size, row_bytes);
    k->scale(q, rows * a->size, c->factor);
    memset(out, 0, (size_t)rows * size * sizeof *out);
    for (int r = 0; r < rows; r++) max[r] = -INFINITY, sum[r] = 0.f;
    for (int k0 = 0; k0 < a->keys; k0 += FEW_KEYS) {
        int n = min_int(FEW_KEYS, a->keys - k0);
        few_scores(c, scores, q, kv, k0, rows, n);
        for (int r = 0; r < rows; r++) {
            int visible = seen_keys(c, r, k0, n);
            float *row = scores + r * FEW_KEYS, down = visible ? fold(k, row, NULL, visible, &max[r], &sum[r]) : 1.f;
            if (n > visible) memset(row + visible, 0, (size_t)(n - visible) * sizeof *row);
            if (k0 && down != 1.f) k->scale(out + (size_t)r * size, a->size, down);
        }
        few_values(c, out, scores, kv, k0, rows, n);
    }
    for (int r = 0; r < rows; r++) k->scale(out + (size_t)r * size, a->size, 1.f / sum[r]);
    for (int i = 0; i < a->queries; i++)
        memcpy(a->out + (size_t)i * a->ldo + (size_t)head * size, out + (size_t)(i * c->share) * size, row_bytes);
}

static void few_queries_task(void *arg, int task, int worker)
{
    const attention_call *c = arg;
    few_queries(c, task * c->share, worker_scratch(c->ws, worker));
}

/* The most query heads of one key/value head that a task may take and still leave one task for every thread. */
static int shared_heads(const attention *a, int threads)
{
    int group = a->heads / a->kv_heads;
    for (int share = min_int(group, MAX_SHARE); share > 1; share--)
        if (group % share == 0 && a->heads / share >= threads) return share;
    return 1;
}

/* ---- many queries */

/* A worker's room: all floats but what is said. T: TASK_QUERIES, s: the padded head size. */
typedef struct room {
    float *scores, *q, *out, *max, *sum; /* [Q][SCORES], [T][s], [T][s], [T], [T] */
    uint16_t *p_half, *q_half;           /* bf16 [Q][SCORES], [T][s] */
} room;

static room make_room(const attention_call *c, int worker)
{
    room r = {.scores = worker_scratch(c->ws, worker)};
    r.q = r.scores + Q_BLOCK * SCORES;
    r.out = r.q + TASK_QUERIES * c->s;
    r.max = r.out + TASK_QUERIES * c->s;
    r.sum = r.max + TASK_QUERIES;
    r.p_half = (uint16_t *)(void *)(r.sum + TASK_QUERIES);
    r.q_half = r.p_half + Q_BLOCK * SCORES;
    return r;
}

/* Bytes of one side, keys or values, of a packed block of one key/value head. */
static size_t side_bytes(bool bf16, size_t s) { return KEY_BLOCK * s * (bf16 ? sizeof(uint16_t) : sizeof(float)); }

size_t migi_attention_panels(const workspace *ws, int kv_heads, int size, int keys)
{
    return (size_t)kv_heads * (((size_t)keys + KEY_BLOCK - 1) / KEY_BLOCK) * 2 * side_bytes(ws->bf16, padded_size(ws->k, size));
}

/* A packed block: its keys, and side_bytes behind them its values. */
static char *packed_block(const attention_call *c, int kv_head, int number)
{
    size_t blocks = ((size_t)c->a->keys + KEY_BLOCK - 1) / KEY_BLOCK;
    return (char *)c->a->panels + ((size_t)kv_head * blocks + (size_t)number) * 2 * side_bytes(c->ws->bf16, c->s);
}

/* x, a query or key of one head, turned by the angles of its token */
static void turn(const attention_call *c, float *x, int token)
{
    size_t half = (size_t)c->a->size / 2, at = (size_t)token * half;
    c->ws->k->rope(x, c->a->cosine + at, c->a->sine + at, (int)half);
}

/* Rows [first, first + rows) of one head's keys or values as float: in place, or widened or turned in `wide`. *ld: floats
 * per row. */
static const float *as_floats(const attention_call *c, const void *side, size_t head_at, int first, int rows, bool turned, float *wide,
                              size_t *ld)
{
    const attention *a = c->a;
    size_t at = head_at + (size_t)first * a->ldkv;
    if (!a->half && !turned) {
        *ld = a->ldkv;
        return (const float *)side + at;
    }
    *ld = (size_t)a->size;
    for (int i = 0; i < rows; i++, at += a->ldkv) {
        float *row = wide + (size_t)i * *ld;
        if (a->half) c->ws->k->widen_f16(row, (const uint16_t *)side + at, *ld);
        else memcpy(row, (const float *)side + at, *ld * sizeof *row);
        if (turned) turn(c, row, first + i);
    }
    return wide;
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

/* panel[key / 2][nr_bf16] <- pairs of v[key, j], v[key + 1, j]; zero past the head, and keys up to `padded` */
static void pack_value_pairs(const migi_kernels *k, uint32_t *panels, const uint16_t *v, size_t ldv, int keys, int padded, int size)
{
    for (int j = 0; j < size; j += k->nr_bf16) {
        int n = min_int(k->nr_bf16, size - j);
        uint32_t *panel = panels + (size_t)j * (KEY_BLOCK / 2);
        memset(panel, 0, (size_t)padded / 2 * (size_t)k->nr_bf16 * sizeof *panel);
        for (int i = 0; i < keys; i += 2) {
            uint32_t *to = panel + (size_t)(i / 2) * (size_t)k->nr_bf16;
            const uint16_t *low = v + (size_t)i * ldv + j, *high = low + ldv;
            if (i + 1 < keys)
                for (int x = 0; x < n; x++) to[x] = low[x] | (uint32_t)high[x] << 16;
            else
                for (int x = 0; x < n; x++) to[x] = low[x];
        }
    }
}

/* One block of keys and values of one head: widened if half floats, keys turned by their angles, rounded to bf16 or not, packed
 * to panels. */
static void pack_block(void *arg, int task, int worker)
{
    const attention_call *c = arg;
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    int head = task % a->kv_heads, number = task / a->kv_heads, first = number * KEY_BLOCK, n = min_int(KEY_BLOCK, a->keys - first);
    size_t s = c->s, at = (size_t)head * a->kv_head, ldk, ldv;
    float *wide = worker_scratch(c->ws, worker);
    uint16_t *half = (uint16_t *)(void *)(wide + KEY_BLOCK * s);
    char *to = packed_block(c, head, number), *to_values = to + side_bytes(c->ws->bf16, s);
    const float *keys = as_floats(c, a->k, at, first, n, a->cosine != NULL, wide, &ldk);
    if (c->ws->bf16) {
        for (int i = 0; i < n; i++) k->round_bf16(half + (size_t)i * s, keys + (size_t)i * ldk, (size_t)a->size);
        for (int j = 0; j < n; j += k->nr_bf16)
            k->pack_pairs((uint32_t *)(void *)(to + (size_t)j * s * sizeof *half), half + (size_t)j * s, s, min_int(k->nr_bf16, n - j),
                          a->size, (int)migi_padded(k, (size_t)a->size));
    } else
        for (int j = 0; j < n; j += k->nr)
            k->pack_f32((float *)(void *)to + (size_t)j * s, keys + (size_t)j * ldk, ldk, min_int(k->nr, n - j), a->size);
    const float *values = as_floats(c, a->v, at, first, n, false, wide, &ldv);
    if (c->ws->bf16) {
        for (int i = 0; i < n; i++) k->round_bf16(half + (size_t)i * s, values + (size_t)i * ldv, (size_t)a->size);
        pack_value_pairs(k, (uint32_t *)(void *)to_values, half, s, n, (int)migi_padded(k, (size_t)n), a->size);
    } else pack_values(k, (float *)(void *)to_values, values, ldv, n, a->size);
}

/* scores[rows][SCORES] = q k^T of the task's queries from `row` on and n packed keys */
static void block_scores(const attention_call *c, const room *r, const char *keys, int row, int rows, int n)
{
    const migi_kernels *k = c->ws->k;
    size_t at = (size_t)row * c->s;
    if (c->ws->bf16)
        k->gemm_bf16(r->scores, SCORES, r->q_half + at, c->s, (const uint32_t *)(const void *)keys, (size_t)k->nr_bf16 * c->s / 2, rows, n,
                     (int)migi_padded(k, (size_t)c->a->size), 0);
    else k->gemm_f32(r->scores, SCORES, r->q + at, c->s, (const float *)(const void *)keys, (size_t)k->nr * c->s, rows, n, c->a->size, 0);
}

/* out[rows][s] of the task's queries from `row` on = probabilities times n packed values, or with add += */
static void block_values(const attention_call *c, const room *r, const char *values, int row, int rows, int n, int add)
{
    const migi_kernels *k = c->ws->k;
    float *out = r->out + (size_t)row * c->s;
    if (c->ws->bf16)
        k->gemm_bf16(out, c->s, r->p_half, SCORES, (const uint32_t *)(const void *)values, (size_t)k->nr_bf16 * (KEY_BLOCK / 2), rows,
                     c->a->size, (int)migi_padded(k, (size_t)n), add);
    else
        k->gemm_f32(out, c->s, r->scores, SCORES, (const float *)(const void *)values, (size_t)k->nr * KEY_BLOCK, rows, c->a->size, n, add);
}

/* The task's queries from `row` on meet a packed block of the keys [k0, k0 + n); `before`: keys ahead of the first of these
 * queries. */
static void meet_keys(const attention_call *c, const room *r, const char *packed, int row, int rows, int k0, int n, int before)
{
    const migi_kernels *k = c->ws->k;
    int padded = (int)migi_padded(k, (size_t)n);
    block_scores(c, r, packed, row, rows, n);
    for (int i = 0; i < rows; i++) {
        float *scores = r->scores + (size_t)i * SCORES;
        uint16_t *half = c->ws->bf16 ? r->p_half + (size_t)i * SCORES : NULL;
        int seen = c->a->causal ? before + i + 1 - k0 : n;
        for (int j = seen < 0 ? 0 : min_int(seen, n); j < n; j++) scores[j] = -INFINITY;
        float down = fold(k, scores, half, n, &r->max[row + i], &r->sum[row + i]);
        if (half) memset(half + n, 0, (size_t)(padded - n) * sizeof *half);
        if (k0 && down != 1.f) k->scale(r->out + (size_t)(row + i) * c->s, c->a->size, down);
    }
    block_values(c, r, packed + side_bytes(c->ws->bf16, c->s), row, rows, n, k0 > 0);
}

static void many_queries(void *arg, int task, int worker)
{
    const attention_call *c = arg;
    const attention *a = c->a;
    const migi_kernels *k = c->ws->k;
    room r = make_room(c, worker);
    int head = task / c->parts, q0 = task % c->parts * c->part, rows = min_int(c->part, a->queries - q0);
    size_t s = c->s, size = (size_t)a->size;
    int before = a->keys - a->queries + q0; /* keys before the task's first query */
    int visible = a->causal ? before + rows : a->keys, part = even_part(rows, Q_BLOCK);
    for (int i = 0; i < rows; i++) {
        memcpy(r.q + (size_t)i * s, a->q + (size_t)(q0 + i) * a->ldq + (size_t)head * size, size * sizeof *r.q);
        if (a->cosine) turn(c, r.q + (size_t)i * s, before + i);
        k->scale(r.q + (size_t)i * s, a->size, c->factor);
        r.max[i] = -INFINITY, r.sum[i] = 0.f;
        if (!c->ws->bf16) continue;
        k->round_bf16(r.q_half + (size_t)i * s, r.q + (size_t)i * s, size);
        memset(r.q_half + (size_t)i * s + size, 0, (s - size) * sizeof *r.q_half);
    }
    for (int k0 = 0; k0 < visible; k0 += KEY_BLOCK) {
        const char *packed = packed_block(c, head / (a->heads / a->kv_heads), k0 / KEY_BLOCK);
        for (int i = 0; i < rows; i += part) {
            int some = min_int(part, rows - i), n = min_int(KEY_BLOCK, (a->causal ? before + i + some : a->keys) - k0);
            if (n > 0) meet_keys(c, &r, packed, i, some, k0, n, before + i);
        }
    }
    for (int i = 0; i < rows; i++) {
        float *to = a->out + (size_t)(q0 + i) * a->ldo + (size_t)head * size;
        memcpy(to, r.out + (size_t)i * s, size * sizeof *to);
        k->scale(to, a->size, 1.f / r.sum[i]);
    }
}

/* Queries of a task: many share the packing, but every thread wants a few tasks. */
static int task_queries(const attention *a, int threads)
{
    int part = even_part(a->queries, TASK_QUERIES);
    while (part > Q_BLOCK && a->heads * ((a->queries + part - 1) / part) < TASKS * threads) part -= MIGI_TILE_ROWS;
    return part;
}

void migi_attend(const workspace *ws, const attention *a)
{
    attention_call c = {.ws = ws, .a = a, .factor = LOG2_E / sqrtf((float)a->size), .s = padded_size(ws->k, a->size)};
    int threads = migi_pool_threads(ws->pool);
    if (a->queries > FEW_QUERIES || a->cosine) {
        c.part = task_queries(a, threads);
        c.parts = (a->queries + c.part - 1) / c.part;
        migi_pool_run(ws->pool, pack_block, &c, (a->keys + KEY_BLOCK - 1) / KEY_BLOCK * a->kv_heads);
        migi_pool_run(ws->pool, many_queries, &c, a->heads * c.parts);
        return;
    }
    c.share = shared_heads(a, threads);
    migi_pool_run(ws->pool, few_queries_task, &c, a->heads / c.share);
}
