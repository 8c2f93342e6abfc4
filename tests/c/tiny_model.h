/* tiny_model.h - a tiny random model with every kind of tensor, two pictures and a prompt: what the engine's tests share. */
#ifndef TINY_MODEL_H
#define TINY_MODEL_H

#include "../../runtime/csrc/migi.h"
#include "tables.h"

enum { MAX_TENSORS = 256, PICTURE = 7 };

typedef struct weights {
    migi_tensor list[MAX_TENSORS];
    char names[MAX_TENSORS][96];
    void *data[MAX_TENSORS];
    int count;
} weights;

/* clang-format off */
static const migi_config config = {.layers = 2, .hidden = 48, .intermediate = 80, .heads = 4, .kv_heads = 2, .head_dim = 16,
    .vocab = 61, .tied = 0, .mrope_section = {2, 3, 3}, .rms_eps = 1e-6f, .rope_theta = 10000.f, .image_token = PICTURE,
    .v_depth = 2, .v_dim = 32, .v_heads = 2, .v_mlp = 128, .patch = 14, .merge = 2, .temporal = 2, .channels = 3,
    .v_rope_theta = 10000.f, .mean = {.48f, .46f, .41f}, .std = {.27f, .26f, .28f}};
/* clang-format on */

static inline void add(weights *w, const char *name, int bf16, float base, float spread, int64_t rows, int64_t cols)
{
    int i = w->count++;
    size_t n = (size_t)(rows * (cols ? cols : 1));
    snprintf(w->names[i], sizeof w->names[i], "%s", name);
    w->data[i] = malloc(n * 4);
    for (size_t j = 0; j < n; j++) {
        float v = base + spread * noise();
        if (bf16) ((uint16_t *)w->data[i])[j] = migi_f32_to_bf16(v);
        else ((float *)w->data[i])[j] = v;
    }
    w->list[i] = (migi_tensor){w->names[i],  w->data[i],  (int64_t)n * (bf16 ? 2 : 4), bf16 ? MIGI_BF16 : MIGI_F32,
                               cols ? 2 : 1, {rows, cols}};
}

static inline void add_at(weights *w, const char *prefix, int layer, const char *name, float base, float spread, int64_t rows, int64_t cols)
{
    char full[96];
    snprintf(full, sizeof full, "%s.%d.%s", prefix, layer, name);
    add(w, full, cols != 0, base, spread, rows, cols);
}

static inline weights *make_weights(void)
{
    weights *w = calloc(1, sizeof *w);
    seed = 5;
    add(w, "model.embed_tokens.weight", 1, 0, 1.f, 61, 48);
    add(w, "lm_head.weight", 0, 0, .4f, 61, 48);
    add(w, "model.norm.weight", 1, 1, .2f, 48, 0);
    for (int i = 0; i < 2; i++) {
        const char *p = "model.layers";
        add_at(w, p, i, "input_layernorm.weight", 1, .2f, 48, 0), add_at(w, p, i, "post_attention_layernorm.weight", 1, .2f, 48, 0);
        add_at(w, p, i, "self_attn.q_proj.weight", 0, .3f, 64, 48), add_at(w, p, i, "self_attn.q_proj.bias", 0, .5f, 64, 0);
        add_at(w, p, i, "self_attn.k_proj.weight", 0, .3f, 32, 48), add_at(w, p, i, "self_attn.k_proj.bias", 0, .5f, 32, 0);
        add_at(w, p, i, "self_attn.v_proj.weight", 0, .3f, 32, 48), add_at(w, p, i, "self_attn.v_proj.bias", 0, .5f, 32, 0);
        add_at(w, p, i, "self_attn.o_proj.weight", 0, .2f, 48, 64), add_at(w, p, i, "mlp.gate_proj.weight", 0, .3f, 80, 48);
        add_at(w, p, i, "mlp.up_proj.weight", 0, .3f, 80, 48), add_at(w, p, i, "mlp.down_proj.weight", 0, .2f, 48, 80);
        p = "visual.blocks";
        add_at(w, p, i, "norm1.weight", 1, .2f, 32, 0), add_at(w, p, i, "norm1.bias", 0, .2f, 32, 0);
        add_at(w, p, i, "norm2.weight", 1, .2f, 32, 0), add_at(w, p, i, "norm2.bias", 0, .2f, 32, 0);
        add_at(w, p, i, "attn.qkv.weight", 0, .3f, 96, 32), add_at(w, p, i, "attn.qkv.bias", 0, .2f, 96, 0);
        add_at(w, p, i, "attn.proj.weight", 0, .2f, 32, 32), add_at(w, p, i, "attn.proj.bias", 0, .2f, 32, 0);
        add_at(w, p, i, "mlp.fc1.weight", 0, .2f, 128, 32), add_at(w, p, i, "mlp.fc1.bias", 0, .2f, 128, 0);
        add_at(w, p, i, "mlp.fc2.weight", 0, .1f, 32, 128), add_at(w, p, i, "mlp.fc2.bias", 0, .2f, 32, 0);
    }
    add(w, "visual.patch_embed.proj.weight", 1, 0, .03f, 32, 1176);
    add(w, "visual.merger.ln_q.weight", 1, 1, .2f, 32, 0), add(w, "visual.merger.ln_q.bias", 1, 0, .2f, 32, 0);
    add(w, "visual.merger.mlp.0.weight", 1, 0, .15f, 128, 128), add(w, "visual.merger.mlp.0.bias", 1, 0, .2f, 128, 0);
    add(w, "visual.merger.mlp.2.weight", 1, 0, .15f, 48, 128), add(w, "visual.merger.mlp.2.bias", 1, 0, .2f, 48, 0);
    return w;
}

/* ---- quantized by rounding to the nearest */

static inline int group_of(int k)
{
    int group = 128;
    while (k % group) group /= 2;
    return group;
}

static inline void add_stored(weights *w, const char *name, const char *suffix, int dtype, int64_t bytes, int rank, const int64_t *shape)
{
    int i = w->count++;
    snprintf(w->names[i], sizeof w->names[i], "%s%s", name, suffix);
    w->data[i] = calloc(1, (size_t)bytes);
    w->list[i] = (migi_tensor){.name = w->names[i], .data = w->data[i], .bytes = bytes, .dtype = dtype, .rank = rank};
    for (int d = 0; d < rank; d++) w->list[i].shape[d] = shape[d];
}

/* The int8 or int4 (bits) blocks of f32 w[n, k] and what goes with them; exact[n, k] <- the weights they stand for. */
static inline void add_quantized(weights *to, const char *name, const float *w, int n, int k, int bits, int group, float *exact)
{
    int64_t blocks = (n + 15) / 16, kp = (k + 63) / 64 * 64;
    add_stored(to, name, "", bits == 8 ? MIGI_I8 : MIGI_U8, blocks * 16 * kp * bits / 8, 4, (int64_t[]){blocks, kp * bits / 32, 16, 4});
    add_stored(to, name, "_scale", MIGI_F32, blocks * 16 * 4, 1, (int64_t[]){blocks * 16});
    uint8_t *bytes = to->data[to->count - 2], *factors = NULL;
    float *scales = to->data[to->count - 1];
    if (bits == 4) {
        add_stored(to, name, "_group", MIGI_U8, blocks * 16 * (kp / group), 3, (int64_t[]){blocks, kp / group, 16});
        factors = to->data[to->count - 1];
        memset(factors, 1, (size_t)(blocks * 16 * (kp / group)));
        memset(bytes, 0x88, (size_t)(blocks * 16 * kp / 2));
    }
    for (int r = 0; r < n; r++) {
        float top = 0.f, group_top = 0.f;
        for (int i = 0; i < k; i++) top = fmaxf(top, fabsf(w[(size_t)r * (size_t)k + (size_t)i]));
        int e;
        float m = frexpf(bits == 8 ? top / 127.f : top / 7.f / 16.f, &e), scale = ldexpf(ceilf(m * 64.f), e - 6);
        scales[r] = scale;
        for (int i = 0; i < k; i++) {
            size_t at = (size_t)r * (size_t)k + (size_t)i,
                   quad = ((size_t)(r / 16) * (size_t)kp + (size_t)i / 4 * 4) * 16 + (size_t)(r % 16 * 4 + i % 4);
            if (bits == 8) {
                int q = (int)rintf(w[at] / scale);
                bytes[quad] = (uint8_t)(int8_t)q;
                exact[at] = (float)q * scale;
                continue;
            }
            uint8_t *factor = &factors[((size_t)(r / 16) * (size_t)(kp / group) + (size_t)(i / group)) * 16 + (size_t)(r % 16)];
            if (i % group == 0) {
                group_top = 0.f;
                for (int j = i; j < i + group; j++) group_top = fmaxf(group_top, fabsf(w[(size_t)r * (size_t)k + (size_t)j]));
                *factor = (uint8_t)fminf(16.f, fmaxf(1.f, rintf(group_top / 7.f / scale)));
            }
            int q = (int)fminf(7.f, fmaxf(-8.f, rintf(w[at] / scale / (float)*factor))), half = i % 8 / 4 * 4;
            size_t byte = ((size_t)(r / 16) * (size_t)(kp / 2) + (size_t)i / 8 * 4) * 16 + (size_t)(r % 16 * 4 + i % 4);
            bytes[byte] = (uint8_t)((bytes[byte] & ~(15 << half)) | (q + 8) << half);
            exact[at] = (float)(q * *factor) * scale;
        }
    }
}

static inline void add_copy(weights *to, const char *name, const void *data, const migi_tensor *like, int dtype)
{
    int64_t bytes = like->bytes / (like->dtype == MIGI_BF16 ? 2 : 4) * (dtype == MIGI_BF16 ? 2 : 4);
    add_stored(to, name, "", dtype, bytes, like->rank, like->shape);
    memcpy(to->data[to->count - 1], data, (size_t)bytes);
}

/* Quantizes all matrices to int8 (bits 8) or to int4 where that is served (bits 4); bits 0 leaves every third one alone and
 * takes turns with the rest. *twin: the same weights as f32. */
static inline weights *quantize_weights(const weights *plain, int bits, weights **twin)
{
    weights *to = calloc(1, sizeof *to), *same_as = *twin = calloc(1, sizeof *to);
    int turn = 0;
    for (int i = 0; i < plain->count; i++) {
        const migi_tensor *t = &plain->list[i];
        int n = (int)t->shape[0], k = (int)t->shape[1], embedding = i == 0, this_one = bits ? bits : (int[]){4, 8, 16}[turn++ % 3];
        size_t elements = (size_t)n * (size_t)(t->rank == 2 ? k : 1);
        float *w = malloc(elements * sizeof *w);
        for (size_t j = 0; j < elements; j++)
            w[j] = t->dtype == MIGI_F32 ? ((const float *)t->data)[j] : migi_bf16_to_f32(((const uint16_t *)t->data)[j]);
        if (t->rank == 1) turn--;
        if (t->rank == 1 || (this_one == 16 && !embedding)) add_copy(to, t->name, t->data, t, t->dtype);
        else add_quantized(to, t->name, w, n, k, embedding || group_of(k) < 16 ? 8 : this_one, group_of(k), w);
        add_copy(same_as, t->name, w, t, MIGI_F32);
        free(w);
    }
    return to;
}

static inline void free_weights(weights *w)
{
    for (int i = 0; i < w->count; i++) free(w->data[i]);
    free(w);
}

typedef struct rig {
    migi_pool *pool;
    migi_session *session;
    migi_vision *pictures[2];
    migi_error err;
} rig;

static inline void picture(uint8_t *rgb, int h, int w, uint32_t start)
{
    seed = start;
    for (int i = 0; i < 3 * h * w; i++) rgb[i] = (uint8_t)(128.f + 127.f * noise());
}

static inline void open_rig(rig *r, const migi_model *model, const char *isa, int threads, int context, int fp32, int (*poll)(void *))
{
    uint8_t rgb[84 * 84 * 3];
    memset(r, 0, sizeof *r);
    CHECK(migi_pool_new(&r->pool, threads, isa, &r->err) == MIGI_OK, "%s", r->err.message);
    migi_session_options o = {.context = context, .fp32 = fp32, .poll = poll};
    CHECK(migi_session_new(&r->session, model, r->pool, &o, &r->err) == MIGI_OK, "%s", r->err.message);
    CHECK(migi_session_bytes(model, r->pool, &o) > 0, "no bytes");
    if (poll) return;
    picture(rgb, 84, 56, 3);
    CHECK(migi_vision_encode(&r->pictures[0], r->session, rgb, 84, 56, &r->err) == MIGI_OK, "%s", r->err.message);
    picture(rgb, 28, 84, 4);
    CHECK(migi_vision_encode(&r->pictures[1], r->session, rgb, 28, 84, &r->err) == MIGI_OK, "%s", r->err.message);
}

static inline void close_rig(rig *r)
{
    migi_vision_free(r->pictures[0]), migi_vision_free(r->pictures[1]);
    migi_session_free(r->session);
    migi_pool_free(r->pool);
}

/* text, picture of 3 x 2 cells, text, picture of 1 x 3 cells, text */
enum { PROMPT = 3 + 6 + 2 + 3 + 4 };
static const int32_t prompt[PROMPT] = {1, 2, 3,       PICTURE, PICTURE, PICTURE, PICTURE, PICTURE, PICTURE,
                                       4, 5, PICTURE, PICTURE, PICTURE, 6,       8,       9,       10};

static inline void answer(rig *r, int32_t *tokens, float *logprobs, int n)
{
    CHECK(migi_session_sync(r->session, prompt, PROMPT, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s",
          r->err.message);
    for (int i = 0; i < n; i++) {
        CHECK(migi_session_greedy(r->session, 1.05f, &tokens[i], &logprobs[i], &r->err) == MIGI_OK, "%s", r->err.message);
        if (tokens[i] == PICTURE) tokens[i] = 11;
        CHECK(migi_session_append(r->session, &tokens[i], 1, NULL, &r->err) == MIGI_OK, "%s", r->err.message);
    }
}

enum { NEW = 9 };

static inline void same(const int32_t *a, const float *la, const int32_t *b, const float *lb, float tolerance, const char *what)
{
    for (int i = 0; i < NEW; i++)
        CHECK(a[i] == b[i] && fabsf(la[i] - lb[i]) <= tolerance, "%s: token %d is %d (%g), expected %d (%g)", what, i, a[i], (double)la[i],
              b[i], (double)lb[i]);
}

#endif
