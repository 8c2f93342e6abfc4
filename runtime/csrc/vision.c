/* vision.c - the vision encoder: patches -> blocks with 2-D RoPE and full attention -> merger. */
#include "vision.h"

#include "attention.h"
#include "geometry.h"

#include <math.h>
#include <stdlib.h>

static atomic_uint_least64_t serials;

/* One picture on its way. */
typedef struct encoding {
    runner *runner;
    const migi_model *m;
    int patches;
    float *x;             /* [P, D] the residual stream */
    float *qkv;           /* [P, 3 D]; attention's output takes q's place */
    void *panels;         /* keys and values as attention reads them */
    float *h;             /* [MIGI_CHUNK, D] normed input */
    float *mlp;           /* [MIGI_CHUNK, MLP or 4 D] */
    float *cosine, *sine; /* [P, S / 2] */
} encoding;

static void ask_buffers(encoding *e, buffers *b)
{
    const migi_config *c = &e->m->c;
    size_t d = (size_t)c->v_dim, p = (size_t)e->patches, half = d / (size_t)c->v_heads / 2;
    size_t wide = larger((size_t)c->v_mlp, d * (size_t)c->merge * (size_t)c->merge);
    e->x = migi_buffer(b, p * d, sizeof *e->x);
    e->qkv = migi_buffer(b, p * 3 * d, sizeof *e->qkv);
    e->panels = migi_buffer(b, migi_attention_panels(&e->runner->ws, c->v_heads, c->v_dim / c->v_heads, e->patches), 1);
    e->h = migi_buffer(b, MIGI_CHUNK * d, sizeof *e->h);
    e->mlp = migi_buffer(b, MIGI_CHUNK * wide, sizeof *e->mlp);
    e->cosine = migi_buffer(b, p * half, sizeof *e->cosine);
    e->sine = migi_buffer(b, p * half, sizeof *e->sine);
}

/* Rows turn the first quarter of a head's planes, columns the second; theta^(-2i / (S / 2)). In double, as in language.c. */
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

/* y = x w^T + bias, or y += */
static void apply(const encoding *e, const matrix *w, const float *bias, const float *x, size_t ldx, float *y, size_t ldy, int rows,
                  bool add)
{
    migi_linears(&e->runner->ws, &(linear){.w = w, .bias = bias, .y = y, .ldy = ldy, .add = add}, 1,
                 &(rows_in){.x = x, .ldx = ldx, .rows = rows});
}

/* y = then(norm(x) w^T + bias); y has `width` columns side by side */
static void apply_normed(const encoding *e, const matrix *w, const float *bias, const norm *n, const float *x, float *y, size_t width,
                         int rows, void (*then)(float *y, int n))
{
    migi_linears(&e->runner->ws, &(linear){.w = w, .bias = bias, .y = y, .ldy = width, .then = then}, 1,
                 &(rows_in){.x = x, .ldx = (size_t)e->m->c.v_dim, .rows = rows, .norm = n, .eps = 1e-6f, .room = e->h});
}

static void run_block(const encoding *e, const block *l)
{
    const migi_config *c = &e->m->c;
    const workspace *ws = &e->runner->ws;
    size_t d = (size_t)c->v_dim, mlp = (size_t)c->v_mlp;
    int chunk = even_part(e->patches, MIGI_CHUNK);
    for (int p = 0; p < e->patches; p += chunk)
        apply_normed(e, &l->qkv, l->qkv_bias, &l->before_attention, e->x + (size_t)p * d, e->qkv + (size_t)p * 3 * d, 3 * d,
                     min_int(chunk, e->patches - p), NULL);
    /* clang-format off */
    migi_attend(ws, &(attention){.q = e->qkv, .ldq = 3 * d, .k = e->qkv + d, .v = e->qkv + 2 * d, .ldkv = 3 * d,
        .kv_head = d / (size_t)c->v_heads, .out = e->qkv, .ldo = 3 * d, .queries = e->patches, .keys = e->patches,
        .heads = c->v_heads, .kv_heads = c->v_heads, .size = c->v_dim / c->v_heads, .causal = false, .cosine = e->cosine, .sine = e->sine,
        .panels = e->panels});
    /* clang-format on */
    for (int p = 0; p < e->patches; p += chunk) {
        int rows = min_int(chunk, e->patches - p);
        float *x = e->x + (size_t)p * d;
        apply(e, &l->proj, l->proj_bias, e->qkv + (size_t)p * 3 * d, 3 * d, x, d, rows, true);
        apply_normed(e, &l->fc1, l->fc1_bias, &l->before_mlp, x, e->mlp, mlp, rows, ws->k->quick_gelu);
        apply(e, &l->fc2, l->fc2_bias, e->mlp, mlp, x, d, rows, true);
    }
}

typedef struct norm_call {
    const encoding *e;
    int first;
} norm_call;

static void norm_row(void *arg, int row, int worker)
{
    const norm_call *r = arg;
    const encoding *e = r->e;
    size_t d = (size_t)e->m->c.v_dim;
    (void)worker;
    e->runner->ws.k->layer_norm(e->h + (size_t)row * d, e->x + (size_t)(r->first + row) * d, e->m->merger_norm.w, e->m->merger_norm.b,
                                e->m->c.v_dim, 1e-6f);
}

/* x[P, D] -> normed and taken four at a time -> embeddings[P / 4, hidden] */
static void run_merger(const encoding *e, float *embeddings)
{
    const migi_model *m = e->m;
    const migi_config *c = &m->c;
    const workspace *ws = &e->runner->ws;
    int per_cell = c->merge * c->merge, chunk = MIGI_CHUNK / per_cell;
    size_t merged = (size_t)(c->v_dim * per_cell), hidden = (size_t)c->hidden;
    for (int cell = 0; cell < e->patches / per_cell; cell += chunk) {
        int cells = min_int(chunk, e->patches / per_cell - cell);
        migi_pool_run(ws->pool, norm_row, &(norm_call){e, cell * per_cell}, cells * per_cell);
        migi_linears(ws, &(linear){.w = &m->merger_fc1, .bias = m->merger_fc1_bias, .y = e->mlp, .ldy = merged, .then = ws->k->gelu}, 1,
                     &(rows_in){.x = e->h, .ldx = merged, .rows = cells});
        apply(e, &m->merger_fc2, m->merger_fc2_bias, e->mlp, merged, embeddings + (size_t)cell * hidden, hidden, cells, false);
    }
}

/* The patches of a picture, embedded: x. */
static migi_status embed_patches(const encoding *e, const uint8_t *rgb, int height, int width, migi_error *err)
{
    const migi_config *c = &e->m->c;
    size_t numbers = (size_t)c->channels * (size_t)c->temporal * (size_t)c->patch * (size_t)c->patch, d = (size_t)c->v_dim;
    float *pixels = migi_alloc((size_t)e->patches * numbers, sizeof *pixels); /* large, and not needed for long */
    migi_status status = MIGI_OK;
    FAIL_IF(!pixels, MIGI_E_MEMORY, "no memory for a picture of %d patches; lower --max-pixels", e->patches);
    TRY(migi_patchify(c, rgb, height, width, pixels, err));
    for (int p = 0; p < e->patches; p += MIGI_CHUNK)
        apply(e, &e->m->patch_embed, NULL, pixels + (size_t)p * numbers, numbers, e->x + (size_t)p * d, d,
              min_int(MIGI_CHUNK, e->patches - p), false);
done:
    free(pixels);
    return status;
}

migi_status migi_encode(migi_vision **out, runner *r, const migi_model *m, const uint8_t *rgb, int height, int width, migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_config *c = &m->c;
    buffers made = {0};
    migi_vision *v = NULL;
    *out = NULL;
    int unit = c->patch * c->merge;
    FAIL_IF(height < unit || width < unit || height % unit || width % unit || (int64_t)height * width > 1 << 28, MIGI_E_ARGUMENT,
            "a picture of %d x %d pixels; both sides must be multiples of %d, the area at most 2^28", width, height, unit);
    int rows = height / unit, cols = width / unit;
    encoding e = {.runner = r, .m = m, .patches = rows * cols * c->merge * c->merge};
    ask_buffers(&e, &made);
    v = calloc(1, sizeof *v);
    if (v) *v = (migi_vision){.rows = rows, .cols = cols, .hidden = c->hidden};
    if (v) v->embeddings = migi_alloc((size_t)rows * (size_t)cols * (size_t)c->hidden, sizeof *v->embeddings);
    FAIL_IF(made.failed || !v || !v->embeddings, MIGI_E_MEMORY, "no memory for a picture of %d patches; lower --max-pixels", e.patches);

    TRY(embed_patches(&e, rgb, height, width, err));
    rope_tables(c, height / c->patch, width / c->patch, e.cosine, e.sine);
    for (int i = 0; i < c->v_depth; i++) {
        TRY(migi_runner_stopped(r, err));
        run_block(&e, &m->blocks[i]);
    }
    run_merger(&e, v->embeddings);
    float sum = 0.f;
    for (size_t i = 0; i < (size_t)rows * (size_t)cols * (size_t)c->hidden; i++) sum += v->embeddings[i] * 0.f;
    FAIL_IF(!(sum == 0.f), MIGI_E_NUMERIC, "the vision encoder's output is not finite: its weights are damaged; take the checkpoint anew");
    v->serial = atomic_fetch_add(&serials, 1) + 1;
    *out = v;
    v = NULL;
done:
    migi_free_buffers(&made);
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
