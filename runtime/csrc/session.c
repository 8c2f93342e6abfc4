/* session.c - the language model on one timeline: prefix reuse, prefill in chunks, then few rows at a time.
 *
 * Two ways of computing a row must give the same bits, or an answer would depend on what was asked before it:
 *   decode   1 to MIGI_VERIFY_ROWS rows take the few-row paths of linear.c and attention.c, where each row is computed
 *            as if it were alone: drafts verified together equal tokens taken one by one.
 *   prefill  a chunk always has more rows than that (but for prompts that are shorter), so its rows take the many-row
 *            paths whatever the chunk starts at: a prompt on a kept prefix equals the same prompt cold.
 * In the last layer a prompt's last row alone is asked for more than keys and values, so it takes the few-row paths there.
 */
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_CONTEXT = 4096, MAX_CONTEXT = 1 << 20, LOGIT_ROWS = 16, SUM_BLOCK = 1024, BEST_BLOCK = 256 };

typedef struct sizes {
    size_t context, chunk, hidden, q, kv, half, mlp, vocab, cache, rounded, panels, scratch; /* cache, panels: bytes, rounded: elements */
} sizes;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static bool wants_fp32(const migi_session_options *options) { return options && options->fp32; }
static bool wants_bf16(const migi_kernels *k, const migi_session_options *options) { return k->bf16_dots && !wants_fp32(options); }
static bool wants_integers(const migi_model *m, const migi_session_options *options) { return m->quantized && !wants_fp32(options); }

static sizes session_layout(const migi_model *m, const migi_kernels *k, int context, const migi_session_options *options)
{
    const migi_config *c = &m->c;
    size_t merged = (size_t)c->v_dim * (size_t)c->merge * (size_t)c->merge;
    size_t patch = (size_t)c->channels * (size_t)c->temporal * (size_t)c->patch * (size_t)c->patch;
    sizes z = {.context = (size_t)context, .chunk = MIGI_CHUNK, .hidden = (size_t)c->hidden,
               .q = (size_t)c->heads * (size_t)c->head_dim, .kv = (size_t)c->kv_heads * (size_t)c->head_dim,
               .half = (size_t)c->head_dim / 2, .mlp = (size_t)c->intermediate, .vocab = (size_t)c->vocab};
    size_t widest = larger(larger(larger(z.hidden, z.q), larger(z.mlp, (size_t)c->v_mlp)), larger((size_t)c->v_dim, patch));
    z.cache = (size_t)c->layers * 2 * z.kv * (wants_fp32(options) ? sizeof(float) : sizeof(uint16_t));
    z.panels = migi_attention_panels(k, wants_bf16(k, options), c->kv_heads, c->head_dim, context);
    z.rounded = larger(z.chunk * migi_padded_int8(widest), z.chunk / (size_t)(c->merge * c->merge) * migi_padded_int8(merged));
    size_t attend = larger(migi_attention_scratch(k, c->head_dim), migi_attention_scratch(k, c->v_dim / c->v_heads));
    z.scratch = (larger(migi_linear_scratch(), attend) + 63) / 64 * 64;
    return z;
}

static int context_of(const migi_session_options *options) { return options && options->context ? options->context : DEFAULT_CONTEXT; }

int64_t migi_session_bytes(const migi_model *model, const migi_pool *pool, const migi_session_options *options)
{
    const migi_kernels *k = migi_pool_kernels(pool);
    sizes z = session_layout(model, k, context_of(options), options);
    size_t floats = z.chunk * (z.hidden + larger(z.hidden, z.q) + z.q + 2 * z.kv + z.mlp + 2 * z.half) + LOGIT_ROWS * z.vocab;
    size_t bytes = floats * sizeof(float) + z.context * (z.cache + 4 + 8 + 3 * 4) + z.vocab + z.panels +
                   z.scratch * (size_t)migi_pool_threads(pool);
    if (wants_bf16(k, options)) bytes += z.rounded * sizeof(uint16_t);
    if (wants_integers(model, options)) bytes += z.rounded + z.chunk * sizeof(float);
    return (int64_t)bytes;
}

/* Untouched pages of a large allocation cost nothing: a roomy cache takes memory as the timeline fills it. */
static void *alloc_untouched(size_t count, size_t size)
{
    if (count > (SIZE_MAX - 64) / size) return NULL;
    return aligned_alloc(64, (count * size + 63) / 64 * 64);
}

migi_status migi_session_new(migi_session **out, const migi_model *model, migi_pool *pool, const migi_session_options *options,
                             migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_kernels *k = migi_pool_kernels(pool);
    migi_session *s = NULL;
    int context = context_of(options);
    *out = NULL;
    FAIL_IF(context < 1 || context > MAX_CONTEXT, MIGI_E_ARGUMENT, "a context of %d tokens; give 1 to %d", context, MAX_CONTEXT);
    s = calloc(1, sizeof *s);
    FAIL_IF(!s, MIGI_E_MEMORY, "no memory for a session");
    sizes z = session_layout(model, k, context, options);
    s->model = model;
    s->context = context;
    s->poll = options ? options->poll : NULL;
    s->poll_arg = options ? options->poll_arg : NULL;
    s->ws = (workspace){.pool = pool, .k = k, .bf16 = wants_bf16(k, options), .integers = wants_integers(model, options),
                        .scratch_bytes = z.scratch};
    s->half = !wants_fp32(options);
    s->ws.rounded_len = s->ws.bf16 ? z.rounded : 0;
    s->ws.quantized_len = s->ws.integers ? z.rounded : 0;
    s->ws.quantized = migi_alloc(s->ws.quantized_len, 1);
    s->ws.row_scales = migi_alloc(s->ws.integers ? z.chunk : 0, sizeof *s->ws.row_scales);
    s->ws.rounded = migi_alloc(s->ws.rounded_len, sizeof *s->ws.rounded);
    s->ws.scratch = migi_alloc(z.scratch, (size_t)migi_pool_threads(pool));
    s->cache = alloc_untouched(z.context, z.cache);
    s->panels = alloc_untouched(z.panels, 1);
    s->tokens = migi_alloc(z.context, sizeof *s->tokens);
    s->pictures = migi_alloc(z.context, sizeof *s->pictures);
    s->positions = migi_alloc(3 * z.context, sizeof *s->positions);
    s->x = migi_alloc(z.chunk * z.hidden, sizeof(float));
    s->h = migi_alloc(z.chunk * larger(z.hidden, z.q), sizeof(float));
    s->q = migi_alloc(z.chunk * z.q, sizeof(float));
    s->kv = migi_alloc(z.chunk * 2 * z.kv, sizeof(float));
    s->gated = migi_alloc(z.chunk * z.mlp, sizeof(float));
    s->angles = migi_alloc(z.chunk * 2 * z.half, sizeof(float));
    s->logits = migi_alloc(LOGIT_ROWS * z.vocab, sizeof(float));
    s->seen = migi_alloc(z.vocab, 1);
    FAIL_IF(!s->ws.rounded || !s->ws.quantized || !s->ws.row_scales || !s->ws.scratch || !s->cache || !s->panels || !s->tokens ||
                !s->pictures || !s->positions || !s->x || !s->h || !s->q || !s->kv || !s->gated || !s->angles || !s->logits || !s->seen,
            MIGI_E_MEMORY, "no memory for a session of %d tokens (%lld MB); ask for fewer or smaller pictures", context,
            (long long)(migi_session_bytes(model, pool, options) >> 20));
    *out = s;
    return MIGI_OK;
done:
    migi_session_free(s);
    return status;
}

void migi_session_free(migi_session *s)
{
    if (!s) return;
    void *parts[] = {s->seen, s->logits, s->angles, s->gated, s->kv, s->q, s->h, s->x, s->positions, s->pictures, s->tokens,
                     s->panels, s->cache, s->ws.scratch, s->ws.row_scales, s->ws.quantized, s->ws.rounded};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    free(s);
}

void migi_session_cancel(migi_session *s) { atomic_store(&s->cancelled, 1); }
int32_t migi_session_length(const migi_session *s) { return s->length; }
int32_t migi_session_kept(const migi_session *s) { return s->kept; }
const float *migi_session_logits(const migi_session *s) { return s->logits_ready ? s->logits : NULL; }

migi_status migi_session_checkpoint(migi_session *s, migi_error *err)
{
    if (!atomic_exchange(&s->cancelled, 0) && !(s->poll && s->poll(s->poll_arg))) return MIGI_OK;
    return migi_fail(err, MIGI_E_CANCELLED, "cancelled");
}

/* ---- one chunk of tokens through the layers */

typedef struct rows_call {
    migi_session *s;
    int layer, first; /* of the chunk on the timeline */
    int from;         /* rows before it are asked for keys and values alone */
} rows_call;

/* Keys or values of one head and token `at` in the cache; the head's next token lies behind. */
static void *cached(const migi_session *s, int index, bool values, int head, size_t at)
{
    const migi_config *c = &s->model->c;
    size_t element = s->half ? sizeof(uint16_t) : sizeof(float), row = ((size_t)index * 2 + values) * (size_t)c->kv_heads + (size_t)head;
    return (char *)s->cache + (row * (size_t)s->context + at) * (size_t)c->head_dim * element;
}

/* Half floats end at 65504, and keys carry large biases: what lies beyond is held there, NaN stays NaN. */
static void store(const migi_session *s, void *to, float *from, size_t n)
{
    if (!s->half) {
        memcpy(to, from, n * sizeof *from);
        return;
    }
    for (size_t i = 0; i < n; i++) from[i] = from[i] > 65504.f ? 65504.f : from[i] < -65504.f ? -65504.f : from[i];
    s->ws.k->narrow_f16(to, from, n);
}

/* Turns queries and keys by their position and puts keys and values into the cache. */
static void rope_row(void *arg, int row, int worker)
{
    const rows_call *r = arg;
    const migi_session *s = r->s;
    const migi_config *c = &s->model->c;
    (void)worker;
    size_t size = (size_t)c->head_dim, half = size / 2;
    size_t kv = (size_t)c->kv_heads * size, at = (size_t)(r->first + row);
    float *keys = s->kv + (size_t)row * 2 * kv;
    const float *cosine = s->angles + (size_t)row * 2 * half, *sine = cosine + half;
    for (int head = 0; head < c->heads && row >= r->from; head++)
        s->ws.k->rope(s->q + ((size_t)row * (size_t)c->heads + (size_t)head) * size, cosine, sine, (int)half);
    for (int head = 0; head < c->kv_heads; head++, keys += size) {
        s->ws.k->rope(keys, cosine, sine, (int)half);
        store(s, cached(s, r->layer, false, head, at), keys, size);
        store(s, cached(s, r->layer, true, head, at), keys + kv, size);
    }
}

/* Angles of one row: the first mrope_section[0] planes turn by time, the next by row, the last by column. In double, where
 * C libraries agree to the last place of a float. */
static void set_angles(migi_session *s, int row, const int32_t position[3])
{
    const migi_config *c = &s->model->c;
    int half = c->head_dim / 2;
    float *cosine = s->angles + (size_t)row * 2 * (size_t)half, *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        int axis = i < c->mrope_section[0] ? 0 : i < c->mrope_section[0] + c->mrope_section[1] ? 1 : 2;
        float angle = (float)position[axis] * (float)(1. / pow((double)c->rope_theta, (double)(2 * i) / (double)c->head_dim));
        cosine[i] = (float)cos((double)angle), sine[i] = (float)sin((double)angle);
    }
}

/* q of the rows from r->from on, keys and values of all rows of a chunk. */
static void project_rows(const rows_call *r, const layer *l, int rows)
{
    migi_session *s = r->s;
    const migi_config *c = &s->model->c;
    size_t hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim;
    size_t from = (size_t)r->from;
    linear jobs[] = {{&l->k, l->k_bias, s->kv, 2 * kv, false},
                     {&l->v, l->v_bias, s->kv + kv, 2 * kv, false},
                     {&l->q, l->q_bias, s->q + from * q, q, false}};
    rows_in all = {.x = s->x, .ldx = hidden, .norm = &l->before_attention, .eps = c->rms_eps, .room = s->h}, some = all;
    some.x += from * hidden;
    migi_linears_of(&s->ws, jobs, from ? 2 : 3, &all, rows, NULL);
    if (from && r->from < rows) migi_linears_of(&s->ws, jobs + 2, 1, &some, rows - r->from, NULL);
}

/* The rows in s->x, standing at timeline [first, first + rows), go through all layers; x keeps the result of the last
 * `wanted`. */
static migi_status forward(migi_session *s, int first, int rows, int wanted, migi_error *err)
{
    const migi_model *m = s->model;
    const migi_config *c = &m->c;
    workspace *ws = &s->ws;
    size_t hidden = (size_t)c->hidden, q = (size_t)c->heads * (size_t)c->head_dim, mlp = (size_t)c->intermediate;
    rows_call r = {.s = s, .first = first};
    for (int i = 0; i < c->layers; i++) {
        const layer *l = &m->layers[i];
        migi_status status = migi_session_checkpoint(s, err);
        if (status != MIGI_OK) return status;

        r.layer = i, r.from = i + 1 < c->layers ? 0 : rows - wanted;
        project_rows(&r, l, rows);
        migi_pool_run(ws->pool, rope_row, &r, rows);
        int n = rows - r.from;
        if (n == 0) break;
        float *x = s->x + (size_t)r.from * hidden;
        rows_in before_mlp = {.x = x, .ldx = hidden, .norm = &l->before_mlp, .eps = c->rms_eps, .room = s->h};
        migi_attend(ws, &(attention){.q = s->q + (size_t)r.from * q, .ldq = q, .k = cached(s, i, false, 0, 0), .v = cached(s, i, true, 0, 0),
            .half = s->half, .ldkv = (size_t)c->head_dim, .kv_head = (size_t)s->context * (size_t)c->head_dim, .out = s->h, .ldo = q,
            .queries = n, .keys = first + rows, .heads = c->heads, .kv_heads = c->kv_heads, .size = c->head_dim, .causal = true,
            .panels = s->panels});
        migi_linears(ws, &(linear){&l->o, NULL, x, hidden, true}, 1, s->h, q, n);
        migi_gated(ws, &(linear){&l->gate, NULL, s->gated, mlp, false}, &l->up, &before_mlp, n);
        migi_linears(ws, &(linear){&l->down, NULL, x, hidden, true}, 1, s->gated, mlp, n);
    }
    return MIGI_OK;
}

/* Logits of rows [row, row + count) of s->x, count <= LOGIT_ROWS. */
static migi_status project(migi_session *s, int row, int count, migi_error *err)
{
    const migi_model *m = s->model;
    const migi_config *c = &m->c;
    for (int r = 0; r < count; r++)
        s->ws.k->rms_norm(s->h + (size_t)r * (size_t)c->hidden, s->x + (size_t)(row + r) * (size_t)c->hidden, m->final.w, c->hidden,
                          c->rms_eps);
    migi_linears(&s->ws, &(linear){&m->head, NULL, s->logits, (size_t)c->vocab, false}, 1, s->h, (size_t)c->hidden, count);
    float sums[16] = {0}; /* side by side, so that the compiler may use vectors */
    size_t n = (size_t)count * (size_t)c->vocab, i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += s->logits[i + (size_t)j] * 0.f;
    for (; i < n; i++) sums[0] += s->logits[i] * 0.f;
    for (int j = 1; j < 16; j++) sums[0] += sums[j];
    if (sums[0] == 0.f) return MIGI_OK;
    return migi_fail(err, MIGI_E_NUMERIC, "the logits are not finite: the model's weights are damaged; take the checkpoint anew");
}

static void embed_text(migi_session *s, int row, int32_t token)
{
    const matrix *e = &s->model->embedding;
    size_t n = (size_t)e->cols, at = (size_t)token * n;
    float *to = s->x + (size_t)row * n;
    if (e->dtype == MIGI_I8)
        migi_dequantize(e, token, 1, 0, e->cols, to, n, 1);
    else if (e->dtype == MIGI_F32)
        memcpy(to, (const float *)e->data + at, n * sizeof *to);
    else
        for (size_t i = 0; i < n; i++) to[i] = migi_bf16_to_f32(((const uint16_t *)e->data)[at + i]);
}

static double log_sum_exp(const migi_kernels *k, const float *logits, int n)
{
    float max = k->max(logits, n), part[SUM_BLOCK];
    double sum = 0;
    for (int i = 0; i < n; i += SUM_BLOCK) {
        int m = min_int(SUM_BLOCK, n - i);
        memcpy(part, logits + i, (size_t)m * sizeof *part);
        k->scale(part, m, LOG2_E);
        sum += (double)k->exp2_sum(part, m, max * LOG2_E);
    }
    return (double)max + log(sum);
}

/* The first of the largest logits after the penalty, and its log-probability without. A penalty of 1 or more raises no
 * logit, so a block whose largest is no better than the best so far is passed over. */
static void choose_greedily(const migi_session *s, const float *logits, float penalty, int32_t *token, float *logprob)
{
    const migi_kernels *k = s->ws.k;
    int vocab = s->model->c.vocab;
    float best = -INFINITY;
    *token = 0;
    for (int first = 0; first < vocab; first += BEST_BLOCK) {
        int end = min_int(first + BEST_BLOCK, vocab);
        if (penalty >= 1.f && k->max(logits + first, end - first) <= best) continue;
        for (int i = first; i < end; i++) {
            float v = logits[i];
            if (s->seen[i]) v = v > 0.f ? v / penalty : v * penalty;
            if (v > best) best = v, *token = i;
        }
    }
    *logprob = (float)((double)logits[*token] - log_sum_exp(k, logits, vocab));
}

/* ---- the timeline */

/* Walks a prompt and knows, for each picture token, its picture and cell. */
typedef struct walker {
    const migi_vision *const *visions;
    int pictures, picture, cell;
} walker;

static const migi_vision *walk(walker *w, int32_t image_token, int32_t token, int *cell)
{
    if (token != image_token || w->picture == w->pictures) return NULL;
    const migi_vision *v = w->visions[w->picture];
    *cell = w->cell++;
    if (w->cell == migi_vision_tokens(v)) w->picture++, w->cell = 0;
    return v;
}

static migi_status check_tokens(const migi_session *s, const int32_t *tokens, int32_t count, int32_t at, migi_error *err)
{
    if (count < 1) return migi_fail(err, MIGI_E_ARGUMENT, "no tokens given");
    if (count > s->context - at)
        return migi_fail(err, MIGI_E_CONTEXT_FULL, "%d tokens do not fit the %d that the session holds; use fewer or smaller pictures",
                         at + count, s->context);
    for (int32_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->c.vocab)
            return migi_fail(err, MIGI_E_ARGUMENT, "token %d at %d is outside the vocabulary of %d", tokens[i], i, s->model->c.vocab);
    return MIGI_OK;
}

/* How many tokens of the new prompt the session already holds. */
static int common_prefix(const migi_session *s, const int32_t *tokens, int32_t count, walker w)
{
    int i = 0, cell;
    for (; i < count && i < s->length && s->tokens[i] == tokens[i]; i++) {
        const migi_vision *v = walk(&w, s->model->c.image_token, tokens[i], &cell);
        if (s->pictures[i] != (v ? v->serial : 0)) break;
    }
    return i;
}

static void cut(migi_session *s, int length)
{
    memset(s->seen, 0, (size_t)s->model->c.vocab);
    for (int i = 0; i < length; i++) s->seen[s->tokens[i]] = 1;
    s->length = length;
    s->logits_ready = false;
}

migi_status migi_session_sync(migi_session *s, const int32_t *tokens, int32_t count, const migi_vision *const *visions,
                              int32_t pictures, migi_error *err)
{
    migi_status status = MIGI_OK;
    s->kept = 0;
    const migi_config *c = &s->model->c;
    walker w = {.visions = visions, .pictures = pictures};
    int32_t grids[2 * 64], *grid = pictures <= 64 ? grids : malloc((size_t)pictures * 2 * sizeof *grid);
    FAIL_IF(!grid, MIGI_E_MEMORY, "no memory for %d pictures", pictures);
    TRY(check_tokens(s, tokens, count, 0, err));
    for (int i = 0; i < pictures; i++) {
        FAIL_IF(visions[i]->hidden != c->hidden, MIGI_E_ARGUMENT, "picture %d was encoded by another model; encode it anew", i + 1);
        grid[2 * i] = visions[i]->rows, grid[2 * i + 1] = visions[i]->cols;
    }
    int keep = common_prefix(s, tokens, count, w);
    s->kept = keep;
    if (keep == count && s->length == count && s->logits_ready) goto done;
    /* the last tokens are computed again: for the logits, and with enough rows for the many-row paths */
    s->kept = keep = min_int(keep, count > MIGI_VERIFY_ROWS ? count - MIGI_VERIFY_ROWS - 1 : 0);
    status = migi_positions(c, tokens, count, grid, pictures, s->positions, err);
    if (status != MIGI_OK) s->kept = keep = 0;
    cut(s, keep);
    if (status != MIGI_OK) goto done;

    int cell;
    for (int i = 0; i < keep; i++) walk(&w, c->image_token, tokens[i], &cell);
    while (s->length < count) {
        int first = s->length, left = count - first, rows = min_int(left, even_part(left, MIGI_CHUNK)); /* so no chunk of few rows */
        for (int i = 0; i < rows; i++) {
            const migi_vision *v = walk(&w, c->image_token, tokens[first + i], &cell);
            s->tokens[first + i] = tokens[first + i];
            s->pictures[first + i] = v ? v->serial : 0;
            if (v)
                memcpy(s->x + (size_t)i * (size_t)c->hidden, v->embeddings + (size_t)cell * (size_t)c->hidden, (size_t)c->hidden * sizeof *s->x);
            else
                embed_text(s, i, tokens[first + i]);
            const int32_t *p = s->positions + first + i;
            set_angles(s, i, (int32_t[3]){p[0], p[count], p[2 * (size_t)count]});
        }
        bool last = first + rows == count;
        TRY(forward(s, first, rows, last, err));
        for (int i = first; i < first + rows; i++) s->seen[s->tokens[i]] = 1;
        s->length += rows;
        if (last) TRY(project(s, rows - 1, 1, err));
    }
    s->next_position = 0;
    for (int i = 0; i < 3 * count; i++)
        if (s->positions[i] >= s->next_position) s->next_position = s->positions[i] + 1;
    s->logits_ready = true;
done:
    if (grid != grids) free(grid);
    return status;
}

/* What follows a prompt: text tokens that fit. */
static migi_status check_text(const migi_session *s, const int32_t *tokens, int32_t count, migi_error *err)
{
    if (!s->logits_ready) return migi_fail(err, MIGI_E_ARGUMENT, "the session holds no prompt; call migi_session_sync first");
    migi_status status = check_tokens(s, tokens, count, s->length, err);
    for (int32_t i = 0; i < count && status == MIGI_OK; i++)
        if (tokens[i] == s->model->c.image_token)
            return migi_fail(err, MIGI_E_ARGUMENT, "token %d is a picture's place; pictures come with migi_session_sync", i);
    return status;
}

/* Text tokens behind the timeline go through the layers; the caller lengthens the timeline by those it keeps. */
static migi_status forward_text(migi_session *s, const int32_t *tokens, int rows, int wanted, migi_error *err)
{
    for (int i = 0; i < rows; i++) {
        int32_t position = s->next_position + i;
        s->tokens[s->length + i] = tokens[i], s->pictures[s->length + i] = 0;
        embed_text(s, i, tokens[i]);
        set_angles(s, i, (int32_t[3]){position, position, position});
    }
    s->logits_ready = false;
    return forward(s, s->length, rows, wanted, err);
}

migi_status migi_session_append(migi_session *s, const int32_t *tokens, int32_t count, float *logprobs, migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_config *c = &s->model->c;
    TRY(check_text(s, tokens, count, err));
    if (logprobs) logprobs[0] = (float)((double)s->logits[tokens[0]] - log_sum_exp(s->ws.k, s->logits, c->vocab));
    for (int32_t done_tokens = 0; done_tokens < count;) {
        int rows = count - done_tokens < MIGI_CHUNK ? count - done_tokens : MIGI_CHUNK, first = s->length;
        bool last = done_tokens + rows == count;
        TRY(forward_text(s, tokens + done_tokens, rows, logprobs ? rows : last, err));
        for (int i = first; i < first + rows; i++) s->seen[s->tokens[i]] = 1;
        s->length += rows;
        s->next_position += rows;
        for (int i = 0; logprobs && i < rows; i += LOGIT_ROWS) {
            int n = rows - i < LOGIT_ROWS ? rows - i : LOGIT_ROWS;
            TRY(project(s, i, n, err));
            for (int j = 0; j < n && done_tokens + i + j + 1 < count; j++) {
                const float *row = s->logits + (size_t)j * (size_t)c->vocab;
                logprobs[done_tokens + i + j + 1] = (float)((double)row[tokens[done_tokens + i + j + 1]] - log_sum_exp(s->ws.k, row, c->vocab));
            }
        }
        done_tokens += rows;
        if (last) TRY(project(s, rows - 1, 1, err));
    }
    s->logits_ready = true;
done:
    return status;
}

static migi_status check_penalty(float penalty, migi_error *err)
{
    if (penalty > 0.f) return MIGI_OK;
    return migi_fail(err, MIGI_E_ARGUMENT, "a repetition penalty of %g; give a number above 0", (double)penalty);
}

migi_status migi_session_greedy(migi_session *s, float repetition_penalty, int32_t *token, float *logprob, migi_error *err)
{
    if (!s->logits_ready) return migi_fail(err, MIGI_E_ARGUMENT, "the session holds no prompt; call migi_session_sync first");
    migi_status status = check_penalty(repetition_penalty, err);
    if (status == MIGI_OK) choose_greedily(s, s->logits, repetition_penalty, token, logprob);
    return status;
}

migi_status migi_session_verify(migi_session *s, const int32_t *tokens, int32_t count, float repetition_penalty, int32_t *kept,
                                int32_t *choices, float *logprobs, migi_error *err)
{
    migi_status status = MIGI_OK;
    size_t vocab = (size_t)s->model->c.vocab;
    int32_t n = 0;
    *kept = 0;
    FAIL_IF(count > MIGI_VERIFY_ROWS, MIGI_E_ARGUMENT, "%d tokens to verify at once; give at most %d", count, MIGI_VERIFY_ROWS);
    TRY(check_penalty(repetition_penalty, err));
    TRY(check_text(s, tokens, count, err));
    TRY(forward_text(s, tokens, count, count, err));
    TRY(project(s, 0, count, err));
    do { /* a choice depends on the tokens seen before it, so position by position */
        s->seen[tokens[n]] = 1;
        choose_greedily(s, s->logits + (size_t)n * vocab, repetition_penalty, &choices[n], &logprobs[n]);
        n++;
    } while (n < count && tokens[n] == choices[n - 1]);
    if (n > 1) memcpy(s->logits, s->logits + (size_t)(n - 1) * vocab, vocab * sizeof *s->logits);
    s->length += n, s->next_position += n, *kept = n;
    s->logits_ready = true;
done:
    return status;
}

/* Keys or values of a layer lie one after the other over the whole context, so each moves by itself. */
migi_status migi_session_grow(migi_session *s, int32_t context, migi_error *err)
{
    const migi_config *c = &s->model->c;
    size_t row = (size_t)c->head_dim * (s->half ? sizeof(uint16_t) : sizeof(float)), room = (size_t)context;
    size_t heads = (size_t)c->layers * 2 * (size_t)c->kv_heads;
    if (context <= s->context) return MIGI_OK;
    if (context > MAX_CONTEXT) return migi_fail(err, MIGI_E_ARGUMENT, "a context of %d tokens; give 1 to %d", context, MAX_CONTEXT);
    char *cache = alloc_untouched(room, heads * row);
    void *panels = alloc_untouched(migi_attention_panels(s->ws.k, s->ws.bf16, c->kv_heads, c->head_dim, context), 1);
    int32_t *tokens = migi_alloc(room, sizeof *tokens), *positions = migi_alloc(3 * room, sizeof *positions);
    uint64_t *pictures = migi_alloc(room, sizeof *pictures);
    if (!cache || !panels || !tokens || !positions || !pictures) {
        free(cache), free(panels), free(tokens), free(positions), free(pictures);
        return migi_fail(err, MIGI_E_MEMORY, "no memory for a context of %d tokens (%zu MB); ask for fewer or smaller pictures", context,
                         room * heads * row >> 20);
    }
    for (size_t head = 0; head < heads; head++)
        memcpy(cache + head * room * row, (char *)s->cache + head * (size_t)s->context * row, (size_t)s->length * row);
    memcpy(tokens, s->tokens, (size_t)s->length * sizeof *tokens);
    memcpy(pictures, s->pictures, (size_t)s->length * sizeof *pictures);
    free(s->cache), free(s->panels), free(s->tokens), free(s->positions), free(s->pictures);
    s->cache = cache, s->panels = panels, s->tokens = tokens, s->positions = positions, s->pictures = pictures;
    s->context = context;
    return MIGI_OK;
}
