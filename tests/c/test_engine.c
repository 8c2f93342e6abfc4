/* test_engine.c - a tiny random model: the same answer on every instruction set, cold and from a kept prefix, in one
 * piece and token by token, with one thread and two; errors; cancelling. */
#include "../../runtime/csrc/kernels.h"
#include "../../runtime/csrc/migi.h"
#include "harness.h"

enum { MAX_TENSORS = 128, PICTURE = 7 };

typedef struct weights {
    migi_tensor list[MAX_TENSORS];
    char names[MAX_TENSORS][96];
    void *data[MAX_TENSORS];
    int count;
} weights;

static const migi_config config = {.layers = 2, .hidden = 48, .intermediate = 80, .heads = 4, .kv_heads = 2, .head_dim = 16,
    .vocab = 61, .tied = 0, .mrope_section = {2, 3, 3}, .rms_eps = 1e-6f, .rope_theta = 10000.f, .image_token = PICTURE,
    .v_depth = 2, .v_dim = 32, .v_heads = 2, .v_mlp = 128, .patch = 14, .merge = 2, .temporal = 2, .channels = 3,
    .v_rope_theta = 10000.f, .mean = {.48f, .46f, .41f}, .std = {.27f, .26f, .28f}};

static void add(weights *w, const char *name, int bf16, float base, float spread, int64_t rows, int64_t cols)
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
    w->list[i] = (migi_tensor){w->names[i], w->data[i], bf16 ? MIGI_BF16 : MIGI_F32, cols ? 2 : 1, {rows, cols}};
}

static void add_at(weights *w, const char *prefix, int layer, const char *name, float base, float spread, int64_t rows, int64_t cols)
{
    char full[96];
    snprintf(full, sizeof full, "%s.%d.%s", prefix, layer, name);
    add(w, full, cols != 0, base, spread, rows, cols);
}

static weights *make_weights(void)
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

static void free_weights(weights *w)
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

static void picture(uint8_t *rgb, int h, int w, uint32_t start)
{
    seed = start;
    for (int i = 0; i < 3 * h * w; i++) rgb[i] = (uint8_t)(128.f + 127.f * noise());
}

static void open_rig(rig *r, const migi_model *model, const char *isa, int threads, int context, int (*poll)(void *))
{
    uint8_t rgb[84 * 84 * 3];
    memset(r, 0, sizeof *r);
    CHECK(migi_pool_new(&r->pool, threads, isa, &r->err) == MIGI_OK, "%s", r->err.message);
    migi_session_options o = {.context = context, .fp32 = 1, .poll = poll};
    CHECK(migi_session_new(&r->session, model, r->pool, &o, &r->err) == MIGI_OK, "%s", r->err.message);
    CHECK(migi_session_bytes(model, r->pool, &o) > 0, "no bytes");
    if (poll) return;
    picture(rgb, 84, 56, 3);
    CHECK(migi_vision_encode(&r->pictures[0], r->session, rgb, 84, 56, &r->err) == MIGI_OK, "%s", r->err.message);
    picture(rgb, 28, 84, 4);
    CHECK(migi_vision_encode(&r->pictures[1], r->session, rgb, 28, 84, &r->err) == MIGI_OK, "%s", r->err.message);
}

static void close_rig(rig *r)
{
    migi_vision_free(r->pictures[0]), migi_vision_free(r->pictures[1]);
    migi_session_free(r->session);
    migi_pool_free(r->pool);
}

/* text, picture of 3 x 2 cells, text, picture of 1 x 3 cells, text */
enum { PROMPT = 3 + 6 + 2 + 3 + 4 };
static const int32_t prompt[PROMPT] = {1, 2, 3, PICTURE, PICTURE, PICTURE, PICTURE, PICTURE, PICTURE, 4, 5, PICTURE, PICTURE, PICTURE, 6, 8, 9, 10};

static void answer(rig *r, int32_t *tokens, float *logprobs, int n)
{
    CHECK(migi_session_sync(r->session, prompt, PROMPT, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s", r->err.message);
    for (int i = 0; i < n; i++) {
        CHECK(migi_session_greedy(r->session, 1.05f, &tokens[i], &logprobs[i], &r->err) == MIGI_OK, "%s", r->err.message);
        if (tokens[i] == PICTURE) tokens[i] = 11;
        CHECK(migi_session_append(r->session, &tokens[i], 1, NULL, &r->err) == MIGI_OK, "%s", r->err.message);
    }
}

enum { NEW = 9 };

static void same(const int32_t *a, const float *la, const int32_t *b, const float *lb, const char *what)
{
    for (int i = 0; i < NEW; i++)
        CHECK(a[i] == b[i] && fabsf(la[i] - lb[i]) < 2e-4f, "%s: token %d is %d (%g), expected %d (%g)", what, i, a[i], (double)la[i], b[i], (double)lb[i]);
}

static int stop_after;
static int countdown(void *arg)
{
    (void)arg;
    return stop_after-- == 0;
}

static void errors(const migi_model *model, const weights *w)
{
    rig r;
    migi_model *broken;
    uint8_t rgb[28 * 28 * 3] = {0};
    open_rig(&r, model, NULL, 1, 24, NULL);
    int32_t bad = 99, many[30] = {0}, picture_token = PICTURE;
    CHECK(migi_session_append(r.session, many, 1, NULL, &r.err) == MIGI_E_ARGUMENT, "append before sync");
    CHECK(migi_session_sync(r.session, &bad, 1, NULL, 0, &r.err) == MIGI_E_ARGUMENT, "token outside the vocabulary");
    CHECK(migi_session_sync(r.session, many, 30, NULL, 0, &r.err) == MIGI_E_CONTEXT_FULL, "context");
    CHECK(migi_session_sync(r.session, &picture_token, 1, NULL, 0, &r.err) == MIGI_E_ARGUMENT, "no picture for a place");
    CHECK(migi_session_sync(r.session, prompt, PROMPT, (const migi_vision *const *)r.pictures, 1, &r.err) == MIGI_E_ARGUMENT, "one picture of two");
    CHECK(migi_session_logits(r.session) == NULL, "logits without a prompt");
    migi_vision *v;
    CHECK(migi_vision_encode(&v, r.session, rgb, 27, 28, &r.err) == MIGI_E_ARGUMENT && !v, "odd size");
    close_rig(&r);

    migi_error err;
    migi_config c = config;
    c.hidden = 40;
    CHECK(migi_model_new(&broken, &c, w->list, (size_t)w->count, &err) == MIGI_E_MODEL && !broken && strstr(err.message, "model.embed_tokens.weight"), "%s", err.message);
    CHECK(migi_model_new(&broken, &config, w->list, 10, &err) == MIGI_E_MODEL && strstr(err.message, "missing"), "%s", err.message);
    c = config, c.mrope_section[0] = 1;
    CHECK(migi_model_new(&broken, &c, w->list, (size_t)w->count, &err) == MIGI_E_MODEL, "mrope_section");
    migi_pool *pool;
    CHECK(migi_pool_new(&pool, 1, "vax", &err) == MIGI_E_UNSUPPORTED && !pool, "%s", err.message);
    migi_pool_free(NULL), migi_model_free(NULL), migi_session_free(NULL), migi_vision_free(NULL);

    open_rig(&r, model, NULL, 2, 64, countdown);
    stop_after = 1;
    CHECK(migi_session_sync(r.session, many, 10, NULL, 0, &r.err) == MIGI_E_CANCELLED, "cancelled by the poll");
    stop_after = 1000;
    CHECK(migi_session_sync(r.session, many, 10, NULL, 0, &r.err) == MIGI_OK, "usable after cancelling: %s", r.err.message);
    migi_session_cancel(r.session);
    CHECK(migi_session_append(r.session, many, 1, NULL, &r.err) == MIGI_E_CANCELLED, "cancelled from outside");
    close_rig(&r);
}

int main(void)
{
    static const char *names[] = {"avx2", "avx512", "avx512bf16", "amx", "amx-emulated", "neon"};
    weights *w = make_weights();
    migi_model *model;
    migi_error err = {0};
    CHECK(migi_model_new(&model, &config, w->list, (size_t)w->count, &err) == MIGI_OK, "%s", err.message);
    int32_t want[NEW], got[NEW];
    float lwant[NEW], lgot[NEW];
    rig r;
    open_rig(&r, model, "scalar", 1, 64, NULL);
    answer(&r, want, lwant, NEW);
    answer(&r, got, lgot, NEW);
    same(got, lgot, want, lwant, "kept prefix");
    float scores[NEW];
    CHECK(migi_session_sync(r.session, prompt, PROMPT, (const migi_vision *const *)r.pictures, 2, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, want, NEW, scores, &r.err) == MIGI_OK, "%s", r.err.message);
    same(want, scores, want, lwant, "scored in one piece");
    CHECK(migi_session_length(r.session) == PROMPT + NEW, "length");
    close_rig(&r);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int runs;
        const migi_kernels *t = migi_kernels_find(names[i], &runs);
        if (!t || !runs) {
            printf("SKIPPED %s: %s\n", names[i], t ? "this CPU cannot run it" : "not in this build");
            skipped++;
            continue;
        }
        for (int threads = 1; threads <= 3; threads += 2) {
            open_rig(&r, model, names[i], threads, 64, NULL);
            answer(&r, got, lgot, NEW);
            same(got, lgot, want, lwant, names[i]);
            close_rig(&r);
        }
    }
    errors(model, w);
    migi_model_free(model);
    free_weights(w);
    REPORT();
}
