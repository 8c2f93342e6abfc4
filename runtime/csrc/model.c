/* model.c - finds and checks every tensor that the geometry asks for; matrices stay where they are mapped. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct finder {
    const migi_tensor *tensors;
    size_t count;
    const migi_tensor **sorted;
    float *next; /* where the next copied vector goes */
    int64_t bytes;
} finder;

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const migi_tensor *const *)a)->name, (*(const migi_tensor *const *)b)->name);
}

static int name_against(const void *name, const void *t) { return strcmp(name, (*(const migi_tensor *const *)t)->name); }

static const migi_tensor *lookup(const finder *f, const char *name)
{
    const migi_tensor **hit = bsearch(name, f->sorted, f->count, sizeof *f->sorted, name_against);
    return hit ? *hit : NULL;
}

/* The tensor `name` with `rows` x `cols` elements (cols 0: a vector); trailing dimensions are taken as one. */
static migi_status find(finder *f, const char *name, int64_t rows, int64_t cols, const migi_tensor **out, migi_error *err)
{
    const migi_tensor *t = lookup(f, name);
    if (!t) return migi_fail(err, MIGI_E_MODEL, "tensor %s is missing; take a complete checkpoint", name);
    if (t->dtype != MIGI_BF16 && t->dtype != MIGI_F32)
        return migi_fail(err, MIGI_E_MODEL, "tensor %s is neither bf16 nor f32; convert the checkpoint to bf16", name);
    int64_t got_cols = 1;
    for (int i = 1; i < t->rank; i++) got_cols *= t->shape[i];
    if (!t->data || t->rank < 1 || t->shape[0] != rows || got_cols != (cols ? cols : 1) || (!cols && t->rank != 1))
        return migi_fail(err, MIGI_E_MODEL, "tensor %s has %lld x %lld elements, the config asks for %lld x %lld; take the config "
                         "that belongs to the weights", name, (long long)(t->rank ? t->shape[0] : 0), (long long)got_cols,
                         (long long)rows, (long long)(cols ? cols : 1));
    f->bytes += rows * got_cols * (t->dtype == MIGI_BF16 ? 2 : 4);
    *out = t;
    return MIGI_OK;
}

static migi_status find_matrix(finder *f, const char *name, int rows, int cols, matrix *m, migi_error *err)
{
    const migi_tensor *t;
    migi_status status = find(f, name, rows, cols, &t, err);
    if (status == MIGI_OK) *m = (matrix){t->data, (migi_dtype)t->dtype, rows, cols};
    return status;
}

static migi_status find_vector(finder *f, const char *name, int n, float **out, migi_error *err)
{
    const migi_tensor *t;
    migi_status status = find(f, name, n, 0, &t, err);
    if (status != MIGI_OK) return status;
    for (int i = 0; i < n; i++) {
        uint16_t half;
        if (t->dtype == MIGI_F32)
            memcpy(f->next + i, (const char *)t->data + 4 * (size_t)i, 4);
        else {
            memcpy(&half, (const char *)t->data + 2 * (size_t)i, 2);
            f->next[i] = migi_bf16_to_f32(half);
        }
    }
    *out = f->next;
    f->next += n;
    return MIGI_OK;
}

static migi_status check_config(const migi_config *c, migi_error *err)
{
    const int32_t sizes[] = {c->layers, c->hidden, c->intermediate, c->heads, c->kv_heads, c->head_dim, c->vocab, c->v_depth,
                             c->v_dim, c->v_heads, c->v_mlp, c->patch, c->merge, c->temporal, c->channels};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] > 1 << 20)
            return migi_fail(err, MIGI_E_MODEL, "size number %zu of the config is %d; sizes run from 1 to 1048576", i, sizes[i]);
    if (c->heads % c->kv_heads || c->head_dim % 2 || c->v_dim % c->v_heads || c->v_dim / c->v_heads % 4)
        return migi_fail(err, MIGI_E_MODEL, "the heads of the config do not divide (%d / %d heads of %d, vision %d / %d)", c->heads,
                         c->kv_heads, c->head_dim, c->v_dim, c->v_heads);
    if (c->mrope_section[0] + c->mrope_section[1] + c->mrope_section[2] != c->head_dim / 2 || c->mrope_section[0] < 0 ||
        c->mrope_section[1] < 0 || c->mrope_section[2] < 0)
        return migi_fail(err, MIGI_E_MODEL, "mrope_section does not sum to half the head size %d; fix the config", c->head_dim);
    if (c->channels != 3) return migi_fail(err, MIGI_E_UNSUPPORTED, "%d colour channels; only RGB is served", c->channels);
    return MIGI_OK;
}

static migi_status find_layer(finder *f, const migi_config *c, int index, layer *l, migi_error *err)
{
    migi_status status = MIGI_OK;
    char name[128];
    int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
#define NAME(suffix) (snprintf(name, sizeof name, "model.layers.%d." suffix, index), name)
    TRY(find_vector(f, NAME("input_layernorm.weight"), c->hidden, &l->before_attention.w, err));
    TRY(find_vector(f, NAME("post_attention_layernorm.weight"), c->hidden, &l->before_mlp.w, err));
    TRY(find_matrix(f, NAME("self_attn.q_proj.weight"), q, c->hidden, &l->q, err));
    TRY(find_matrix(f, NAME("self_attn.k_proj.weight"), kv, c->hidden, &l->k, err));
    TRY(find_matrix(f, NAME("self_attn.v_proj.weight"), kv, c->hidden, &l->v, err));
    TRY(find_vector(f, NAME("self_attn.q_proj.bias"), q, &l->q_bias, err));
    TRY(find_vector(f, NAME("self_attn.k_proj.bias"), kv, &l->k_bias, err));
    TRY(find_vector(f, NAME("self_attn.v_proj.bias"), kv, &l->v_bias, err));
    TRY(find_matrix(f, NAME("self_attn.o_proj.weight"), c->hidden, q, &l->o, err));
    TRY(find_matrix(f, NAME("mlp.gate_proj.weight"), c->intermediate, c->hidden, &l->gate, err));
    TRY(find_matrix(f, NAME("mlp.up_proj.weight"), c->intermediate, c->hidden, &l->up, err));
    TRY(find_matrix(f, NAME("mlp.down_proj.weight"), c->hidden, c->intermediate, &l->down, err));
#undef NAME
done:
    return status;
}

static migi_status find_block(finder *f, const migi_config *c, int index, block *b, migi_error *err)
{
    migi_status status = MIGI_OK;
    char name[128];
    int d = c->v_dim;
#define NAME(suffix) (snprintf(name, sizeof name, "visual.blocks.%d." suffix, index), name)
    TRY(find_vector(f, NAME("norm1.weight"), d, &b->before_attention.w, err));
    TRY(find_vector(f, NAME("norm1.bias"), d, &b->before_attention.b, err));
    TRY(find_vector(f, NAME("norm2.weight"), d, &b->before_mlp.w, err));
    TRY(find_vector(f, NAME("norm2.bias"), d, &b->before_mlp.b, err));
    TRY(find_matrix(f, NAME("attn.qkv.weight"), 3 * d, d, &b->qkv, err));
    TRY(find_vector(f, NAME("attn.qkv.bias"), 3 * d, &b->qkv_bias, err));
    TRY(find_matrix(f, NAME("attn.proj.weight"), d, d, &b->proj, err));
    TRY(find_vector(f, NAME("attn.proj.bias"), d, &b->proj_bias, err));
    TRY(find_matrix(f, NAME("mlp.fc1.weight"), c->v_mlp, d, &b->fc1, err));
    TRY(find_vector(f, NAME("mlp.fc1.bias"), c->v_mlp, &b->fc1_bias, err));
    TRY(find_matrix(f, NAME("mlp.fc2.weight"), d, c->v_mlp, &b->fc2, err));
    TRY(find_vector(f, NAME("mlp.fc2.bias"), d, &b->fc2_bias, err));
#undef NAME
done:
    return status;
}

static size_t copied_floats(const migi_config *c)
{
    size_t q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim, d = (size_t)c->v_dim;
    size_t merged = d * (size_t)c->merge * (size_t)c->merge;
    return (size_t)c->layers * (2 * (size_t)c->hidden + q + 2 * kv) + (size_t)c->hidden +
           (size_t)c->v_depth * (9 * d + (size_t)c->v_mlp) + 2 * d + merged + (size_t)c->hidden;
}

migi_status migi_model_new(migi_model **out, const migi_config *config, const migi_tensor *tensors, size_t count, migi_error *err)
{
    migi_status status = MIGI_OK;
    finder f = {.tensors = tensors, .count = count};
    migi_model *m = NULL;
    *out = NULL;
    TRY(check_config(config, err));
    const migi_config *c = config;
    m = calloc(1, sizeof *m);
    f.sorted = malloc((count ? count : 1) * sizeof *f.sorted);
    FAIL_IF(!m || !f.sorted, MIGI_E_MEMORY, "no memory for the model's tables");
    for (size_t i = 0; i < count; i++) f.sorted[i] = &tensors[i];
    qsort(f.sorted, count, sizeof *f.sorted, by_name);
    m->c = *config;
    m->layers = calloc((size_t)c->layers, sizeof *m->layers);
    m->blocks = calloc((size_t)c->v_depth, sizeof *m->blocks);
    m->owned = f.next = migi_alloc(copied_floats(c), sizeof(float));
    FAIL_IF(!m->layers || !m->blocks || !m->owned, MIGI_E_MEMORY, "no memory for norms and biases");

    int merged = c->v_dim * c->merge * c->merge;
    TRY(find_matrix(&f, "model.embed_tokens.weight", c->vocab, c->hidden, &m->embedding, err));
    m->head = m->embedding;
    if (!c->tied) TRY(find_matrix(&f, "lm_head.weight", c->vocab, c->hidden, &m->head, err));
    TRY(find_vector(&f, "model.norm.weight", c->hidden, &m->final.w, err));
    for (int i = 0; i < c->layers; i++) TRY(find_layer(&f, c, i, &m->layers[i], err));
    TRY(find_matrix(&f, "visual.patch_embed.proj.weight", c->v_dim, c->channels * c->temporal * c->patch * c->patch,
                    &m->patch_embed, err));
    for (int i = 0; i < c->v_depth; i++) TRY(find_block(&f, c, i, &m->blocks[i], err));
    TRY(find_vector(&f, "visual.merger.ln_q.weight", c->v_dim, &m->merger_norm.w, err));
    TRY(find_vector(&f, "visual.merger.ln_q.bias", c->v_dim, &m->merger_norm.b, err));
    TRY(find_matrix(&f, "visual.merger.mlp.0.weight", merged, merged, &m->merger_fc1, err));
    TRY(find_vector(&f, "visual.merger.mlp.0.bias", merged, &m->merger_fc1_bias, err));
    TRY(find_matrix(&f, "visual.merger.mlp.2.weight", c->hidden, merged, &m->merger_fc2, err));
    TRY(find_vector(&f, "visual.merger.mlp.2.bias", c->hidden, &m->merger_fc2_bias, err));
    m->bytes = f.bytes;
    *out = m;
    m = NULL;
done:
    free(f.sorted);
    migi_model_free(m);
    return status;
}

void migi_model_free(migi_model *model)
{
    if (!model) return;
    free(model->owned);
    free(model->blocks);
    free(model->layers);
    free(model);
}

int64_t migi_model_bytes(const migi_model *model) { return model->bytes; }
