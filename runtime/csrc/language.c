/* language.c - the language model: rows of a chunk through the layers, keys and values into the cache, and logits.
 *
 * In the last layer rows that are not asked for are needed for their keys and values alone.
 */
#include "language.h"

#include "attention.h"

#include <math.h>
#include <string.h>

/* ---- buffers */

static size_t element_bytes(const kv_cache *cache) { return cache->half ? sizeof(uint16_t) : sizeof(float); }

/* Keys or values of a layer's heads lie one after the other over the whole context. */
static size_t rows_of_heads(const migi_model *m) { return (size_t)m->c.layers * 2 * (size_t)m->c.kv_heads; }

void migi_cache_buffers(kv_cache *cache, buffers *b, const migi_model *m, const workspace *ws)
{
    const migi_config *c = &m->c;
    cache->data = migi_untouched_buffer(b, (size_t)cache->context, rows_of_heads(m) * (size_t)c->head_dim * element_bytes(cache));
    cache->panels = migi_untouched_buffer(b, migi_attention_panels(ws, c->kv_heads, c->head_dim, cache->context), 1);
}

void migi_cache_copy(const kv_cache *to, const kv_cache *from, const migi_model *m, int length)
{
    size_t token = (size_t)m->c.head_dim * element_bytes(from);
    for (size_t head = 0; head < rows_of_heads(m); head++)
        memcpy((char *)to->data + head * (size_t)to->context * token, (const char *)from->data + head * (size_t)from->context * token,
               (size_t)length * token);
}

void migi_language_buffers(language *l, buffers *b)
{
    const migi_config *c = &l->m->c;
    size_t hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim;
    l->x = migi_buffer(b, MIGI_CHUNK * hidden, sizeof *l->x);
    l->h = migi_buffer(b, MIGI_CHUNK * larger(hidden, q), sizeof *l->h);
    l->q = migi_buffer(b, MIGI_CHUNK * q, sizeof *l->q);
    l->kv = migi_buffer(b, MIGI_CHUNK * 2 * kv, sizeof *l->kv);
    l->gated = migi_buffer(b, MIGI_CHUNK * (size_t)c->intermediate, sizeof *l->gated);
    l->angles = migi_buffer(b, MIGI_CHUNK * (size_t)c->head_dim, sizeof *l->angles);
    l->logits = migi_buffer(b, MIGI_LOGIT_ROWS * (size_t)c->vocab, sizeof *l->logits);
}

/* ---- rows of a chunk */

/* Angles of one row: the first mrope_section[0] planes turn by time, the next by row, the last by column. In double, where
 * C libraries agree to the last place of a float. */
static void set_angles(const language *l, int row, const int32_t position[3])
{
    const migi_config *c = &l->m->c;
    int half = c->head_dim / 2;
    float *cosine = l->angles + (size_t)row * 2 * (size_t)half, *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        int axis = i < c->mrope_section[0] ? 0 : i < c->mrope_section[0] + c->mrope_section[1] ? 1 : 2;
        float angle = (float)position[axis] * (float)(1. / pow((double)c->rope_theta, (double)(2 * i) / (double)c->head_dim));
        cosine[i] = (float)cos((double)angle), sine[i] = (float)sin((double)angle);
    }
}

void migi_put_token(language *l, int row, int32_t token, const int32_t at[3])
{
    const matrix *e = &l->m->embedding;
    size_t n = (size_t)e->cols, first = (size_t)token * n;
    float *to = l->x + (size_t)row * n;
    if (e->dtype == MIGI_I8) migi_dequantize(e, token, 1, 0, e->cols, to, n, 1);
    else if (e->dtype == MIGI_F32) memcpy(to, (const float *)e->data + first, n * sizeof *to);
    else
        for (size_t i = 0; i < n; i++) to[i] = migi_bf16_to_f32(((const uint16_t *)e->data)[first + i]);
    set_angles(l, row, at);
}

void migi_put_cell(language *l, int row, const float *embedding, const int32_t at[3])
{
    size_t n = (size_t)l->m->c.hidden;
    memcpy(l->x + (size_t)row * n, embedding, n * sizeof *l->x);
    set_angles(l, row, at);
}

/* ---- the layers */

typedef struct layer_call {
    const language *l;
    int layer, first; /* of the chunk on the timeline */
    int from;         /* rows before it are asked for keys and values alone */
} layer_call;

/* Keys or values of one head and token `at` in the cache; the head's next token lies behind. */
static void *cached(const language *l, int index, bool values, int head, size_t at)
{
    const migi_config *c = &l->m->c;
    size_t row = ((size_t)index * 2 + values) * (size_t)c->kv_heads + (size_t)head;
    return (char *)l->cache->data + (row * (size_t)l->cache->context + at) * (size_t)c->head_dim * element_bytes(l->cache);
}

/* Half floats end at 65504, and keys carry large biases: what lies beyond is held there, NaN stays NaN. */
static void store(const language *l, void *to, float *from, size_t n)
{
    if (!l->cache->half) {
        memcpy(to, from, n * sizeof *from);
        return;
    }
    for (size_t i = 0; i < n; i++) from[i] = from[i] > 65504.f ? 65504.f : from[i] < -65504.f ? -65504.f : from[i];
    l->runner->ws.k->narrow_f16(to, from, n);
}

/* Turns queries and keys by their position and puts keys and values into the cache. */
static void rope_row(void *arg, int row, int worker)
{
    const layer_call *r = arg;
    const language *l = r->l;
    const migi_config *c = &l->m->c;
    const migi_kernels *k = l->runner->ws.k;
    (void)worker;
    size_t size = (size_t)c->head_dim, half = size / 2;
    size_t kv = (size_t)c->kv_heads * size, at = (size_t)(r->first + row);
    float *keys = l->kv + (size_t)row * 2 * kv;
    const float *cosine = l->angles + (size_t)row * 2 * half, *sine = cosine + half;
    for (int head = 0; head < c->heads && row >= r->from; head++)
        k->rope(l->q + ((size_t)row * (size_t)c->heads + (size_t)head) * size, cosine, sine, (int)half);
    for (int head = 0; head < c->kv_heads; head++, keys += size) {
        k->rope(keys, cosine, sine, (int)half);
        store(l, cached(l, r->layer, false, head, at), keys, size);
        store(l, cached(l, r->layer, true, head, at), keys + kv, size);
    }
}

/* q of the rows from r->from on, keys and values of all rows of a chunk. */
static void project_rows(const layer_call *r, const layer *w, int rows)
{
    const language *l = r->l;
    const migi_config *c = &l->m->c;
    size_t hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim;
    size_t from = (size_t)r->from;
    linear jobs[] = {{.w = &w->k, .bias = w->k_bias, .y = l->kv, .ldy = 2 * kv},
                     {.w = &w->v, .bias = w->v_bias, .y = l->kv + kv, .ldy = 2 * kv},
                     {.w = &w->q, .bias = w->q_bias, .y = l->q + from * q, .ldy = q}};
    rows_in all = {.x = l->x, .ldx = hidden, .rows = rows, .norm = &w->before_attention, .eps = c->rms_eps, .room = l->h}, some = all;
    some.x += from * hidden, some.rows -= r->from;
    migi_linears(&l->runner->ws, jobs, from ? 2 : 3, &all);
    if (from && some.rows) migi_linears(&l->runner->ws, jobs + 2, 1, &some);
}

/* x += o(attention), x += down(silu(gate(x)) * up(x)) of the rows from r->from on. */
static void finish_rows(const layer_call *r, const layer *w, int rows)
{
    const language *l = r->l;
    const migi_config *c = &l->m->c;
    const workspace *ws = &l->runner->ws;
    size_t hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim, mlp = (size_t)c->intermediate,
           size = (size_t)c->head_dim;
    int n = rows - r->from;
    float *x = l->x + (size_t)r->from * hidden;
    /* clang-format off */
    migi_attend(ws, &(attention){.q = l->q + (size_t)r->from * q, .ldq = q, .k = cached(l, r->layer, false, 0, 0),
        .v = cached(l, r->layer, true, 0, 0), .half = l->cache->half, .ldkv = size, .kv_head = (size_t)l->cache->context * size,
        .out = l->h, .ldo = q, .queries = n, .keys = r->first + rows, .heads = c->heads, .kv_heads = c->kv_heads, .size = c->head_dim,
        .causal = true, .panels = l->cache->panels});
    /* clang-format on */
    migi_linears(ws, &(linear){.w = &w->o, .y = x, .ldy = hidden, .add = true}, 1, &(rows_in){.x = l->h, .ldx = q, .rows = n});
    migi_gated(ws, &(linear){.w = &w->gate, .y = l->gated, .ldy = mlp}, &w->up,
               &(rows_in){.x = x, .ldx = hidden, .rows = n, .norm = &w->before_mlp, .eps = c->rms_eps, .room = l->h});
    migi_linears(ws, &(linear){.w = &w->down, .y = x, .ldy = hidden, .add = true}, 1, &(rows_in){.x = l->gated, .ldx = mlp, .rows = n});
}

migi_status migi_forward(language *l, int first, int rows, int wanted, migi_error *err)
{
    layer_call r = {.l = l, .first = first};
    for (int i = 0; i < l->m->c.layers; i++) {
        const layer *w = &l->m->layers[i];
        migi_status status = migi_runner_stopped(l->runner, err);
        if (status != MIGI_OK) return status;
        r.layer = i, r.from = i + 1 < l->m->c.layers ? 0 : rows - wanted;
        project_rows(&r, w, rows);
        migi_pool_run(l->runner->ws.pool, rope_row, &r, rows);
        if (r.from < rows) finish_rows(&r, w, rows);
    }
    return MIGI_OK;
}

/* ---- logits */

/* NaN and infinity times zero are NaN. */
static bool all_finite(const float *x, size_t n)
{
    float sums[16] = {0}; /* side by side, so that the compiler may use vectors */
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + (size_t)j] * 0.f;
    for (; i < n; i++) sums[0] += x[i] * 0.f;
    for (int j = 1; j < 16; j++) sums[0] += sums[j];
    return sums[0] == 0.f;
}

migi_status migi_logits_of(language *l, int row, int count, migi_error *err)
{
    const migi_model *m = l->m;
    size_t hidden = (size_t)m->c.hidden, vocab = (size_t)m->c.vocab;
    for (int r = 0; r < count; r++)
        l->runner->ws.k->rms_norm(l->h + (size_t)r * hidden, l->x + (size_t)(row + r) * hidden, m->final.w, m->c.hidden, m->c.rms_eps);
    migi_linears(&l->runner->ws, &(linear){.w = &m->head, .y = l->logits, .ldy = vocab}, 1,
                 &(rows_in){.x = l->h, .ldx = hidden, .rows = count});
    if (all_finite(l->logits, (size_t)count * vocab)) return MIGI_OK;
    return migi_fail(err, MIGI_E_NUMERIC, "the logits are not finite: the model's weights are damaged; take the checkpoint anew");
}
