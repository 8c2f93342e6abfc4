/* model.c - finds and checks every tensor that the geometry asks for; matrices stay where they are mapped. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_SIZE = 1 << 20, MAX_DEPTH = 1024, MAX_HEAD = 1024, MAX_MERGE = 16 };

/* Every size, and every product of sizes that is the width of a matrix, fits MAX_SIZE: what follows computes in int. */
static migi_status check_sizes(const migi_config *c, migi_error *err)
{
    /* clang-format off */
    const struct { const char *what; int64_t n, max; } sizes[] = {
        {"layers", c->layers, MAX_DEPTH}, {"v_depth", c->v_depth, MAX_DEPTH}, {"hidden", c->hidden, MAX_SIZE},
        {"intermediate", c->intermediate, MAX_SIZE}, {"heads", c->heads, MAX_SIZE}, {"kv_heads", c->kv_heads, MAX_SIZE},
        {"head_dim", c->head_dim, MAX_HEAD}, {"vocab", c->vocab, MAX_SIZE}, {"v_dim", c->v_dim, MAX_SIZE},
        {"v_heads", c->v_heads, MAX_SIZE}, {"v_mlp", c->v_mlp, MAX_SIZE}, {"patch", c->patch, 256},
        {"merge", c->merge, MAX_MERGE}, {"temporal", c->temporal, 256}, {"channels", c->channels, 256},
        {"heads * head_dim", (int64_t)c->heads * c->head_dim, MAX_SIZE},
        {"v_dim * merge^2", (int64_t)c->v_dim * c->merge * c->merge, MAX_SIZE},
        {"channels * temporal * patch^2", (int64_t)c->channels * c->temporal * c->patch * c->patch, MAX_SIZE}};
    /* clang-format on */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].n < 1 || sizes[i].n > sizes[i].max)
            return migi_fail(err, MIGI_E_MODEL,
                             "%s is %lld in the config, 1 to %lld are served; take the config that belongs to "
                             "the weights",
                             sizes[i].what, (long long)sizes[i].n, (long long)sizes[i].max);
    return MIGI_OK;
}

static migi_status check_config(const migi_config *c, migi_error *err)
{
    migi_status status = check_sizes(c, err);
    if (status != MIGI_OK) return status;
    if (c->heads % c->kv_heads || c->head_dim % 2 || c->v_dim % c->v_heads || c->v_dim / c->v_heads % 4 || c->v_dim / c->v_heads > MAX_HEAD)
        return migi_fail(err, MIGI_E_MODEL,
                         "the heads of the config do not divide (%d / %d heads of %d, vision %d / %d); take the "
                         "config that belongs to the weights",
                         c->heads, c->kv_heads, c->head_dim, c->v_dim, c->v_heads);
    int64_t planes = 0;
    for (int i = 0; i < 3; i++) planes += c->mrope_section[i] < 0 ? MAX_HEAD : c->mrope_section[i];
    if (planes != c->head_dim / 2)
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
    TRY(migi_find_vector(f, NAME("input_layernorm.weight"), c->hidden, &l->before_attention.w, err));
    TRY(migi_find_vector(f, NAME("post_attention_layernorm.weight"), c->hidden, &l->before_mlp.w, err));
    TRY(migi_find_matrix(f, NAME("self_attn.q_proj.weight"), q, c->hidden, &l->q, err));
    TRY(migi_find_matrix(f, NAME("self_attn.k_proj.weight"), kv, c->hidden, &l->k, err));
    TRY(migi_find_matrix(f, NAME("self_attn.v_proj.weight"), kv, c->hidden, &l->v, err));
    TRY(migi_find_vector(f, NAME("self_attn.q_proj.bias"), q, &l->q_bias, err));
    TRY(migi_find_vector(f, NAME("self_attn.k_proj.bias"), kv, &l->k_bias, err));
    TRY(migi_find_vector(f, NAME("self_attn.v_proj.bias"), kv, &l->v_bias, err));
    TRY(migi_find_matrix(f, NAME("self_attn.o_proj.weight"), c->hidden, q, &l->o, err));
    TRY(migi_find_matrix(f, NAME("mlp.gate_proj.weight"), c->intermediate, c->hidden, &l->gate, err));
    TRY(migi_find_matrix(f, NAME("mlp.up_proj.weight"), c->intermediate, c->hidden, &l->up, err));
    TRY(migi_find_matrix(f, NAME("mlp.down_proj.weight"), c->hidden, c->intermediate, &l->down, err));
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
    TRY(migi_find_vector(f, NAME("norm1.weight"), d, &b->before_attention.w, err));
    TRY(migi_find_vector(f, NAME("norm1.bias"), d, &b->before_attention.b, err));
    TRY(migi_find_vector(f, NAME("norm2.weight"), d, &b->before_mlp.w, err));
    TRY(migi_find_vector(f, NAME("norm2.bias"), d, &b->before_mlp.b, err));
    TRY(migi_find_matrix(f, NAME("attn.qkv.weight"), 3 * d, d, &b->qkv, err));
    TRY(migi_find_vector(f, NAME("attn.qkv.bias"), 3 * d, &b->qkv_bias, err));
    TRY(migi_find_matrix(f, NAME("attn.proj.weight"), d, d, &b->proj, err));
    TRY(migi_find_vector(f, NAME("attn.proj.bias"), d, &b->proj_bias, err));
    TRY(migi_find_matrix(f, NAME("mlp.fc1.weight"), c->v_mlp, d, &b->fc1, err));
    TRY(migi_find_vector(f, NAME("mlp.fc1.bias"), c->v_mlp, &b->fc1_bias, err));
    TRY(migi_find_matrix(f, NAME("mlp.fc2.weight"), d, c->v_mlp, &b->fc2, err));
    TRY(migi_find_vector(f, NAME("mlp.fc2.bias"), d, &b->fc2_bias, err));
#undef NAME
done:
    return status;
}

static size_t copied_floats(const migi_config *c)
{
    size_t q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim, d = (size_t)c->v_dim;
    size_t merged = d * (size_t)c->merge * (size_t)c->merge;
    return (size_t)c->layers * (2 * (size_t)c->hidden + q + 2 * kv) + (size_t)c->hidden + (size_t)c->v_depth * (9 * d + (size_t)c->v_mlp) +
           2 * d + merged + (size_t)c->hidden;
}

migi_status migi_model_new(migi_model **out, const migi_config *config, const migi_tensor *tensors, size_t count, migi_error *err)
{
    migi_status status = MIGI_OK;
    finder f = {0};
    migi_model *m = NULL;
    *out = NULL;
    TRY(check_config(config, err));
    const migi_config *c = config;
    m = calloc(1, sizeof *m);
    FAIL_IF(!m, MIGI_E_MEMORY, "no memory for the model's tables; close other programs");
    m->c = *config;
    m->layers = calloc((size_t)c->layers, sizeof *m->layers);
    m->blocks = calloc((size_t)c->v_depth, sizeof *m->blocks);
    FAIL_IF(!m->layers || !m->blocks, MIGI_E_MEMORY, "no memory for the model's tables; close other programs");
    TRY(migi_finder_open(&f, tensors, count, copied_floats(c), &m->owned, err));

    int merged = c->v_dim * c->merge * c->merge;
    TRY(migi_find_matrix(&f, "model.embed_tokens.weight", c->vocab, c->hidden, &m->embedding, err));
    FAIL_IF(m->embedding.dtype == MIGI_U8, MIGI_E_MODEL, "model.embed_tokens.weight is int4; export the embedding as int8");
    m->head = m->embedding;
    if (!c->tied) TRY(migi_find_matrix(&f, "lm_head.weight", c->vocab, c->hidden, &m->head, err));
    TRY(migi_find_vector(&f, "model.norm.weight", c->hidden, &m->final.w, err));
    for (int i = 0; i < c->layers; i++) TRY(find_layer(&f, c, i, &m->layers[i], err));
    TRY(migi_find_matrix(&f, "visual.patch_embed.proj.weight", c->v_dim, c->channels * c->temporal * c->patch * c->patch, &m->patch_embed,
                         err));
    for (int i = 0; i < c->v_depth; i++) TRY(find_block(&f, c, i, &m->blocks[i], err));
    TRY(migi_find_vector(&f, "visual.merger.ln_q.weight", c->v_dim, &m->merger_norm.w, err));
    TRY(migi_find_vector(&f, "visual.merger.ln_q.bias", c->v_dim, &m->merger_norm.b, err));
    TRY(migi_find_matrix(&f, "visual.merger.mlp.0.weight", merged, merged, &m->merger_fc1, err));
    TRY(migi_find_vector(&f, "visual.merger.mlp.0.bias", merged, &m->merger_fc1_bias, err));
    TRY(migi_find_matrix(&f, "visual.merger.mlp.2.weight", c->hidden, merged, &m->merger_fc2, err));
    TRY(migi_find_vector(&f, "visual.merger.mlp.2.bias", c->hidden, &m->merger_fc2_bias, err));
    m->bytes = f.bytes;
    m->quantized = f.quantized;
    *out = m;
    m = NULL;
done:
    migi_finder_close(&f);
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
