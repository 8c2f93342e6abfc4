/* vision.c - the vision encoder: patches -> blocks with 2-D RoPE and full attention -> merger. */
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static atomic_uint_least64_t serials;

typedef struct buffers {
    int patches;
    float *x;          /* [P, D] the residual stream */
    float *qkv;        /* [P, 3 D]; attention's output takes q's place */
    void *panels;      /* keys and values as attention reads them */
    float *h;          /* [chunk, max(D, patch floats)] normed input */
    float *mlp;        /* [chunk, MLP or 4 D] */
    float *cosine, *sine; /* [P, S / 2] */
} buffers;

static void free_buffers(buffers *b)
{
    free(b->x);
    free(b->qkv);
    free(b->panels);
    free(b->h);
    free(b->mlp);
    free(b->cosine);
    free(b->sine);
}

/* Rows turn the first quarter of a head's planes, columns the second; theta^(-2i / (S / 2)). In double, as in session.c. */
static void rope_tables(const migi_config *c, int height, int width, float *cosine, float *sine)
{
    int quarter = c->v_dim / c->v_heads / 4, unit = c->merge, p = 0;
    for (int by = 0; by < height / unit; by++)
        for (int bx = 0; bx < width / unit; bx++)
            for (int my = 0; my < unit; my++)
                for (int mx = 0; mx < unit; mx++, p++)
                    for (int i = 0; i < quarter; i++) {
                        float frequency = (float)(1. / pow((double)c->v_rope_theta, (double)(2 * i) / (double)(2 * quarter)));
                        float at_row = (float)(by * unit + my) * frequency, at_col = (float)(bx * unit + mx) * frequency;
                        size_t to = (size_t)p * 2 * (size_t)quarter + (size_t)i;
                        cosine[to] = (float)cos((double)at_row), sine[to] = (float)sin((double)at_row);
                        cosine[to + (size_t)quarter] = (float)cos((double)at_col), sine[to + (size_t)quarter] = (float)sin((double)at_col);
                    }
}

static void apply(migi_session *s, const matrix *w, const float *bias, const float *x, size_t ldx, float *y, size_t ldy, int rows, bool add)
{
    migi_linears(&s->ws, &(linear){w, bias, y, ldy, add}, 1, x, ldx, rows);
}

/* y = then(norm(x) w^T + bias); y has `width` columns side by side */
static void apply_normed(migi_session *s, const matrix *w, const float *bias, const norm *n, const float *x, buffers *b, float *y,
                         size_t width, int rows, void (*then)(float *y, int n))
{
    migi_linears_of(&s->ws, &(linear){w, bias, y, width, false}, 1,
                    &(rows_in){.x = x, .ldx = (size_t)s->model->c.v_dim, .norm = n, .eps = 1e-6f, .room = b->h}, rows, then);
}

static void run_block(migi_session *s, const block *l, buffers *b)
{
    const migi_config *c = &s->model->c;
    size_t d = (size_t)c->v_dim, mlp = (size_t)c->v_mlp;
    int chunk = even_part(b->patches, MIGI_CHUNK);
    for (int p = 0; p < b->patches; p += chunk)
        apply_normed(s, &l->qkv, l->qkv_bias, &l->before_attention, b->x + (size_t)p * d, b, b->qkv + (size_t)p * 3 * d, 3 * d,
                     min_int(chunk, b->patches - p), NULL);
    migi_attend(&s->ws, &(attention){.q = b->qkv, .ldq = 3 * d, .k = b->qkv + d, .v = b->qkv + 2 * d, .ldkv = 3 * d,
        .kv_head = d / (size_t)c->v_heads, .out = b->qkv, .ldo = 3 * d, .queries = b->patches, .keys = b->patches,
        .heads = c->v_heads, .kv_heads = c->v_heads, .size = c->v_dim / c->v_heads, .causal = false, .cosine = b->cosine, .sine = b->sine,
        .panels = b->panels});
    for (int p = 0; p < b->patches; p += chunk) {
        int rows = min_int(chunk, b->patches - p);
        float *x = b->x + (size_t)p * d;
        apply(s, &l->proj, l->proj_bias, b->qkv + (size_t)p * 3 * d, 3 * d, x, d, rows, true);
        apply_normed(s, &l->fc1, l->fc1_bias, &l->before_mlp, x, b, b->mlp, mlp, rows, s->ws.k->quick_gelu);
        apply(s, &l->fc2, l->fc2_bias, b->mlp, mlp, x, d, rows, true);
    }
}

typedef struct norm_call {
    const migi_session *s;
    const buffers *b;
    int first;
} norm_call;

static void norm_row(void *arg, int row, int worker)
{
    const norm_call *r = arg;
    const migi_model *m = r->s->model;
    size_t d = (size_t)m->c.v_dim;
    (void)worker;
    r->s->ws.k->layer_norm(r->b->h + (size_t)row * d, r->b->x + (size_t)(r->first + row) * d, m->merger_norm.w, m->merger_norm.b,
                           m->c.v_dim, 1e-6f);
}

/* x[P, D] -> normed and taken four at a time -> embeddings[P / 4, hidden] */
static void run_merger(migi_session *s, buffers *b, float *embeddings)
{
    const migi_model *m = s->model;
    const migi_config *c = &m->c;
    int per_cell = c->merge * c->merge, merged = c->v_dim * per_cell, chunk = MIGI_CHUNK / per_cell;
    for (int cell = 0; cell < b->patches / per_cell; cell += chunk) {
        int cells = min_int(chunk, b->patches / per_cell - cell);
        migi_pool_run(s->ws.pool, norm_row, &(norm_call){s, b, cell * per_cell}, cells * per_cell);
        migi_linears_of(&s->ws, &(linear){&m->merger_fc1, m->merger_fc1_bias, b->mlp, (size_t)merged, false}, 1,
                        &(rows_in){.x = b->h, .ldx = (size_t)merged}, cells, s->ws.k->gelu);
        apply(s, &m->merger_fc2, m->merger_fc2_bias, b->mlp, (size_t)merged, embeddings + (size_t)cell * (size_t)c->hidden,
              (size_t)c->hidden, cells, false);
    }
}

static migi_status make_buffers(buffers *b, const migi_session *s, int patches, migi_error *err)
{
    const migi_config *c = &s->model->c;
    size_t d = (size_t)c->v_dim, p = (size_t)patches, merged = d * (size_t)c->merge * (size_t)c->merge;
    size_t mlp = (size_t)c->v_mlp, half = d / (size_t)c->v_heads / 2;
    *b = (buffers){.patches = patches};
    b->x = migi_alloc(p * d, sizeof(float));
    b->qkv = migi_alloc(p * 3 * d, sizeof(float));
    b->panels = migi_alloc(migi_attention_panels(s->ws.k, s->ws.bf16, c->v_heads, c->v_dim / c->v_heads, patches), 1);
    b->h = migi_alloc(MIGI_CHUNK * d, sizeof(float));
    b->mlp = migi_alloc(MIGI_CHUNK * (mlp > merged ? mlp : merged), sizeof(float));
    b->cosine = migi_alloc(p * half, sizeof(float));
    b->sine = migi_alloc(p * half, sizeof(float));
    if (b->x && b->qkv && b->panels && b->h && b->mlp && b->cosine && b->sine) return MIGI_OK;
    return migi_fail(err, MIGI_E_MEMORY, "no memory for a picture of %d patches; lower --max-pixels", patches);
}

migi_status migi_vision_encode(migi_vision **out, migi_session *s, const uint8_t *rgb, int32_t height, int32_t width, migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_model *m = s->model;
    const migi_config *c = &m->c;
    buffers b = {0};
    migi_vision *v = NULL;
    float *pixels = NULL;
    *out = NULL;
    int unit = c->patch * c->merge;
    size_t per_patch = (size_t)c->channels * (size_t)c->temporal * (size_t)c->patch * (size_t)c->patch;
    FAIL_IF(height < unit || width < unit || height % unit || width % unit || (int64_t)height * width > 1 << 28, MIGI_E_ARGUMENT,
            "a picture of %d x %d pixels; both sides must be multiples of %d, the area at most 2^28", width, height, unit);
    int rows = height / c->patch, cols = width / c->patch, patches = rows * cols, tokens = patches / (c->merge * c->merge);
    TRY(make_buffers(&b, s, patches, err));
    v = calloc(1, sizeof *v);
    pixels = migi_alloc((size_t)patches * per_patch, sizeof(float));
    FAIL_IF(!v || !pixels, MIGI_E_MEMORY, "no memory for a picture of %d patches; lower --max-pixels", patches);
    v->embeddings = migi_alloc((size_t)tokens * (size_t)c->hidden, sizeof(float));
    FAIL_IF(!v->embeddings, MIGI_E_MEMORY, "no memory for a picture of %d patches; lower --max-pixels", patches);

    TRY(migi_patchify(c, rgb, height, width, pixels, err));
    rope_tables(c, rows, cols, b.cosine, b.sine);
    for (int p = 0; p < patches; p += MIGI_CHUNK)
        apply(s, &m->patch_embed, NULL, pixels + (size_t)p * per_patch, per_patch, b.x + (size_t)p * (size_t)c->v_dim,
              (size_t)c->v_dim, patches - p < MIGI_CHUNK ? patches - p : MIGI_CHUNK, false);
    free(pixels);
    pixels = NULL;
    for (int i = 0; i < c->v_depth; i++) {
        TRY(migi_session_checkpoint(s, err));
        run_block(s, &m->blocks[i], &b);
    }
    run_merger(s, &b, v->embeddings);
    float sum = 0.f;
    for (size_t i = 0; i < (size_t)tokens * (size_t)c->hidden; i++) sum += v->embeddings[i] * 0.f;
    FAIL_IF(!(sum == 0.f), MIGI_E_NUMERIC, "the vision encoder's output is not finite: its weights are damaged; take the checkpoint anew");
    v->rows = rows / c->merge, v->cols = cols / c->merge, v->hidden = c->hidden;
    v->serial = atomic_fetch_add(&serials, 1) + 1;
    *out = v;
    v = NULL;
done:
    free(pixels);
    free_buffers(&b);
    migi_vision_free(v);
    return status;
}

void migi_vision_free(migi_vision *vision)
{
    if (!vision) return;
    free(vision->embeddings);
    free(vision);
}

int32_t migi_vision_tokens(const migi_vision *vision) { return vision->rows * vision->cols; }
const float *migi_vision_embeddings(const migi_vision *vision) { return vision->embeddings; }
