/* test_quantized.c - int8 and int4 weights: exact integer sums against naive loops, the same answers on every instruction
 * set, thread count and way of reading a prompt, float activations against the same weights as f32, damaged tensors. */
#include "../../runtime/csrc/migi_measure.h"
#include "tiny_model.h"

enum { MAX_COLUMNS = 4704 };

/* ---- migi_integer_sums */

static float naive_row(const float *x, int k, int8_t *q)
{
    float top = 0.f;
    for (int i = 0; i < k; i++) top = fmaxf(top, fabsf(x[i]));
    float inverse = top > 0.f ? 127.f / top : 0.f;
    for (int i = 0; i < k; i++) q[i] = (int8_t)rintf(x[i] * inverse);
    return top / 127.f;
}

static void check_sums(migi_pool *pool, const weights *w, const float *exact, const float *x, int rows, int n, int k, const char *isa)
{
    int np = (n + 15) / 16 * 16, bits = w->list[0].dtype == MIGI_I8 ? 8 : 4, wrong = 0;
    int32_t *sums = malloc((size_t)rows * (size_t)np * sizeof *sums);
    float *scales = malloc((size_t)rows * sizeof *scales), *stored = w->data[1];
    migi_error err = {0};
    CHECK(migi_integer_sums(pool, &w->list[0], bits == 4 ? &w->list[2] : NULL, x, rows, k, sums, scales, &err) == MIGI_OK, "%s",
          err.message);
    for (int r = 0; r < rows; r++) {
        int8_t q[MAX_COLUMNS];
        float scale = naive_row(x + (size_t)r * (size_t)k, k, q);
        wrong += scale != scales[r];
        for (int j = 0; j < np; j++) {
            int64_t want = 0;
            for (int i = 0; j < n && i < k; i++) want += q[i] * (int64_t)rintf(exact[(size_t)j * (size_t)k + (size_t)i] / stored[j]);
            wrong += want != sums[(size_t)r * (size_t)np + (size_t)j];
        }
    }
    CHECK(!wrong, "%s, %d threads, int%d, %d x %d x %d: %d of %d sums are wrong", isa, migi_pool_threads(pool), bits, rows, n, k, wrong,
          rows * np);
    free(sums);
    free(scales);
}

static void integer_sums(const char *isa)
{
    /* rows, outputs, columns, group: few rows and many, more than one block of columns, groups that no power of two divides */
    static const int shapes[][4] = {{1, 70, 48, 16},    {3, 16, 64, 64},    {4, 33, 4704, 32}, {5, 70, 4704, 32},
                                    {7, 65, 80, 16},    {70, 48, 200, 8},   {9, 17, 2112, 24}, {2, 17, 2112, 24},
                                    {6, 20, 2400, 120}, {130, 130, 136, 8}, {8, 1, 1176, 8}};
    seed = 77;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int rows = shapes[s][0], n = shapes[s][1], k = shapes[s][2], group = shapes[s][3];
        float *x = floats((size_t)rows * (size_t)k), *w = floats((size_t)n * (size_t)k), *exact = floats((size_t)n * (size_t)k);
        for (int i = 0; i < k; i++) x[i] *= 1e-3f * (float)(i % 7); /* rows of different sizes */
        w[0] = -1.2f;                                               /* int4 code 0 */
        for (int bits = 4; bits <= 8; bits += 4) {
            if (bits == 4 && ((k + 63) / 64 * 64) % group) continue;
            weights *to = calloc(1, sizeof *to);
            add_quantized(to, "m.weight", w, n, k, bits, group, exact);
            for (int threads = 1; threads <= 3; threads += 2) {
                migi_pool *pool;
                migi_error err = {0};
                CHECK(migi_pool_new(&pool, threads, isa, &err) == MIGI_OK, "%s", err.message);
                check_sums(pool, to, exact, x, rows, n, k, isa);
                migi_pool_free(pool);
            }
            free_weights(to);
        }
        free(x), free(w), free(exact);
    }
}

static void wrong_sums(void)
{
    migi_pool *pool;
    migi_error err = {0};
    float x[64] = {0}, scales[1], exact[64 * 16], *w = floats(64 * 16);
    int32_t sums[16];
    weights *to = calloc(1, sizeof *to);
    add_quantized(to, "m.weight", w, 16, 64, 4, 64, exact);
    CHECK(migi_pool_new(&pool, 1, "scalar", &err) == MIGI_OK, "%s", err.message);
    CHECK(migi_integer_sums(pool, &to->list[0], NULL, x, 1, 64, sums, scales, &err) == MIGI_E_MODEL &&
              strstr(err.message, "_group is missing"),
          "%s", err.message);
    CHECK(migi_integer_sums(pool, &to->list[1], NULL, x, 1, 64, sums, scales, &err) == MIGI_E_ARGUMENT, "a float tensor");
    CHECK(migi_integer_sums(pool, &to->list[0], &to->list[2], x, 1, 65, sums, scales, &err) == MIGI_E_MODEL, "another K");
    CHECK(migi_integer_sums(pool, &to->list[0], &to->list[2], x, 0, 64, sums, scales, &err) == MIGI_E_ARGUMENT, "no rows");
    x[3] = NAN;
    CHECK(migi_integer_sums(pool, &to->list[0], &to->list[2], x, 1, 64, sums, scales, &err) == MIGI_OK && isnan(scales[0]) && !sums[0],
          "NaN is told by the scale");
    free_weights(to);
    free(w);

    w = floats(256 * 16), to = calloc(1, sizeof *to);
    add_quantized(to, "m.weight", w, 16, 256, 4, 256, w); /* groups end at 128 */
    CHECK(migi_integer_sums(pool, &to->list[0], &to->list[2], w, 1, 256, sums, scales, &err) == MIGI_E_MODEL, "a group of 256");
    migi_pool_free(pool);
    free_weights(to);
    free(w);
}

/* ---- whole models */

static migi_model *open_model(const migi_config *c, const weights *w)
{
    migi_model *model;
    migi_error err = {0};
    CHECK(migi_model_new(&model, c, w->list, (size_t)w->count, &err) == MIGI_OK, "%s", err.message);
    int64_t bytes = 0;
    for (int i = 0; i < w->count; i++)
        if (!c->tied || strncmp(w->list[i].name, "lm_head", 7)) bytes += w->list[i].bytes;
    CHECK(migi_model_bytes(model) == bytes, "%lld bytes, stored are %lld", (long long)migi_model_bytes(model), (long long)bytes);
    return model;
}

static void run(const migi_model *model, const char *isa, int threads, int fp32, int32_t *tokens, float *logprobs)
{
    rig r;
    open_rig(&r, model, isa, threads, 64, fp32, NULL);
    answer(&r, tokens, logprobs, NEW);
    close_rig(&r);
}

/* From the kept prefix, scored in one piece, and the whole text token by token. */
static void ways(const migi_model *model, const char *isa, const int32_t *want, const float *lwant, float tolerance)
{
    rig r;
    int32_t got[NEW], text[] = {3, 9, 27, 20, 60, 58, 52, 34, 41};
    float lgot[NEW], whole[NEW], single[NEW];
    enum { TEXT = sizeof text / sizeof *text };
    open_rig(&r, model, isa, 2, 64, 0, NULL);
    answer(&r, got, lgot, NEW);
    answer(&r, got, lgot, NEW);
    same(got, lgot, want, lwant, tolerance, "kept prefix");
    CHECK(migi_session_sync(r.session, prompt, PROMPT, (const migi_vision *const *)r.pictures, 2, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, want, NEW, lgot, &r.err) == MIGI_OK, "%s", r.err.message);
    same(want, lgot, want, lwant, tolerance, "scored in one piece");
    CHECK(migi_session_sync(r.session, prompt, 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, text, TEXT, whole, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_sync(r.session, prompt, 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
    for (int i = 0; i < TEXT; i++) CHECK(migi_session_append(r.session, &text[i], 1, &single[i], &r.err) == MIGI_OK, "%s", r.err.message);
    same(text, single, text, whole, tolerance, "token by token");
    close_rig(&r);
}

/* More keys than a block of few queries takes, more tokens than a chunk: in one piece, token by token, and as a prompt, of which
 * the last layer works for the last token alone. */
static void long_text(const migi_model *model, const char *isa, int fp32, float tolerance)
{
    enum { LONG = 600 };
    int32_t text[LONG + 1] = {prompt[0]}, *rest = text + 1;
    float whole[LONG], single[LONG], worst = 0.f, next, after_prompt;
    rig r = {0};
    migi_session_options o = {.context = LONG + 2, .fp32 = fp32};
    CHECK(migi_pool_new(&r.pool, 2, isa, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_new(&r.session, model, r.pool, &o, &r.err) == MIGI_OK, "%s", r.err.message);
    for (int i = 0; i < LONG; i++) rest[i] = 8 + i * i % 53;
    CHECK(migi_session_sync(r.session, prompt, 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, rest, LONG, whole, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_sync(r.session, prompt, 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
    for (int i = 0; i < LONG; i++) CHECK(migi_session_append(r.session, &rest[i], 1, &single[i], &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, rest, 1, &next, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_sync(r.session, rest, 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message); /* nothing is kept */
    CHECK(migi_session_sync(r.session, text, LONG + 1, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, rest, 1, &after_prompt, &r.err) == MIGI_OK, "%s", r.err.message);
    for (int i = 0; i < LONG; i++) worst = fmaxf(worst, fabsf(whole[i] - single[i]));
    CHECK(worst <= tolerance, "%s, fp32 %d: a long text in one piece and token by token differ by %g", isa, fp32, (double)worst);
    CHECK(fabsf(next - after_prompt) <= tolerance, "%s, fp32 %d: after a long prompt %g, token by token %g", isa, fp32,
          (double)after_prompt, (double)next);
    close_rig(&r);
}

/* Up to MIGI_VERIFY_ROWS tokens together give the bits that they give one by one: short and on more keys than a block has. */
static void few_rows(const migi_model *model, const char *isa, int fp32)
{
    enum { LONG = 270 };
    int32_t text[LONG + MIGI_VERIFY_ROWS];
    float together[MIGI_VERIFY_ROWS], single[MIGI_VERIFY_ROWS];
    rig r = {0};
    migi_session_options o = {.context = LONG + MIGI_VERIFY_ROWS, .fp32 = fp32};
    CHECK(migi_pool_new(&r.pool, 2, isa, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_new(&r.session, model, r.pool, &o, &r.err) == MIGI_OK, "%s", r.err.message);
    for (int i = 0; i < LONG + MIGI_VERIFY_ROWS; i++) text[i] = 8 + (i * i + i / 5) % 53;
    for (int first = 20; first <= LONG; first += 250)
        for (int count = 2; count <= MIGI_VERIFY_ROWS; count += 3) {
            CHECK(migi_session_sync(r.session, text, first, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
            CHECK(migi_session_append(r.session, text + first, count, together, &r.err) == MIGI_OK, "%s", r.err.message);
            CHECK(migi_session_sync(r.session, text, first, NULL, 0, &r.err) == MIGI_OK, "%s", r.err.message);
            for (int i = 0; i < count; i++)
                CHECK(migi_session_append(r.session, &text[first + i], 1, &single[i], &r.err) == MIGI_OK, "%s", r.err.message);
            int wrong = 0;
            for (int i = 0; i < count; i++) wrong += memcmp(&together[i], &single[i], 4) != 0;
            CHECK(!wrong, "%s, fp32 %d: of %d tokens after %d, %d differ from those taken one by one", isa, fp32, count, first, wrong);
        }
    close_rig(&r);
}

static void models(const weights *plain, int bits, int tied)
{
    weights *twin_weights, *w = quantize_weights(plain, bits, &twin_weights);
    migi_config c = config;
    c.tied = tied;
    migi_model *model = open_model(&c, w), *twin = open_model(&c, twin_weights);
    int32_t want[NEW], got[NEW];
    float lwant[NEW], lgot[NEW];
    run(twin, "scalar", 1, 1, want, lwant);
    run(model, "scalar", 1, 1, got, lgot);
    same(got, lgot, want, lwant, 2e-4f, "float activations");
    run(model, "scalar", 1, 0, want, lwant);
    ways(model, "scalar", want, lwant, .01f);
    migi_kernels k;
    for (int t = 1; next_table(&k, &t, 0);) {
        /* the same bits, but for bf16 products: those round activations, and what lies next to a border then becomes another int8 */
        float tolerance = k.bf16_dots ? .1f : 0.f;
        for (int threads = 1; threads <= 3; threads += 2) {
            run(model, k.isa, threads, 0, got, lgot);
            same(got, lgot, want, lwant, tolerance, k.isa);
        }
        if (!tied) few_rows(model, k.isa, 0), few_rows(model, k.isa, 1);
        float reference[NEW];
        int32_t tokens[NEW];
        run(model, "scalar", 1, 1, got, reference);
        run(model, k.isa, 2, 1, tokens, lgot);
        same(tokens, lgot, got, reference, 0.f, k.isa);
    }
    migi_model_free(model), migi_model_free(twin);
    free_weights(w), free_weights(twin_weights);
}

/* ---- the half KV cache */

static void half_cache(const weights *plain)
{
    migi_model *model = open_model(&config, plain);
    migi_pool *pool;
    migi_error err = {0};
    int32_t want[NEW], got[NEW];
    float lwant[NEW], lgot[NEW];
    run(model, "scalar", 1, 1, want, lwant);
    run(model, "scalar", 1, 0, got, lgot);
    same(got, lgot, want, lwant, .01f, "half cache against f32");
    int differs = 0;
    for (int i = 0; i < NEW; i++) differs |= lgot[i] != lwant[i];
    CHECK(differs, "the cache is not half");
    long_text(model, "scalar", 0, .005f);
    long_text(model, "scalar", 1, 2e-4f);
    CHECK(migi_pool_new(&pool, 1, "scalar", &err) == MIGI_OK, "%s", err.message);
    migi_session_options o = {.context = 2000, .fp32 = 1}, half = {.context = 2000};
    int64_t cache = (int64_t)config.layers * 2 * config.kv_heads * config.head_dim * 2000;
    CHECK(migi_session_bytes(model, pool, &o) - migi_session_bytes(model, pool, &half) == 2 * cache, "bytes of the caches");
    migi_pool_free(pool);
    for (int i = 0; i < plain->count; i++)
        if (strstr(plain->list[i].name, "v_proj.bias"))
            for (int j = 0; j < 32; j++) ((uint16_t *)plain->data[i])[j] = 0, ((float *)plain->data[i])[j] = j % 2 ? 7e4f : -7e4f;
    migi_model_free(model);
    model = open_model(&config, plain);
    run(model, NULL, 1, 0, got, lgot); /* saturated: an infinity would end as MIGI_E_NUMERIC */
    migi_model_free(model);
}

/* ---- damaged tensors */

static migi_tensor *named(weights *w, const char *name)
{
    for (int i = 0; i < w->count; i++)
        if (!strcmp(w->names[i], name)) return &w->list[i];
    return NULL;
}

static void refused(weights *w, const char *word, const char *what)
{
    migi_model *model;
    migi_error err = {0};
    migi_status status = migi_model_new(&model, &config, w->list, (size_t)w->count, &err);
    CHECK(status == MIGI_E_MODEL && !model && strstr(err.message, word), "%s: status %d, %s", what, status, err.message);
    migi_model_free(model);
}

static void damaged_fields(weights *w, const char *name)
{
    migi_tensor *t = named(w, name), good = *t;
    static const int64_t shapes[][5] = {{INT64_MAX, INT64_MAX, 16, 4},
                                        {INT64_C(1) << 62, 4, 1, 1},
                                        {INT64_C(1) << 32, INT64_C(1) << 32, 1, 1},
                                        {-1, -1, 16, 4},
                                        {INT64_MIN, 1, 1, 1},
                                        {0, 1, 1, 1},
                                        {1, 0, INT64_MAX, INT64_MAX}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        memcpy(t->shape, shapes[i], sizeof t->shape);
        refused(w, name, "shape");
        t->bytes = 0;
        refused(w, name, "shape without data");
        *t = good;
    }
    for (int rank = -1; rank < 8; rank++) {
        t->rank = rank;
        if (rank != good.rank) refused(w, name, "rank");
    }
    *t = good, t->rank = INT32_MAX;
    refused(w, name, "rank");
    *t = good, t->bytes--;
    refused(w, name, "one byte less");
    t->bytes += 2;
    refused(w, name, "one byte more");
    *t = good, t->data = NULL;
    refused(w, name, "no data");
    for (int dtype = 0; dtype < 7; dtype++) {
        t->dtype = dtype, t->data = good.data;
        if (dtype != good.dtype) refused(w, name, "dtype");
    }
    *t = good, t->name = "elsewhere";
    refused(w, "missing", name);
    *t = good;
}

static void damaged(const weights *plain)
{
    weights *twin, *w = quantize_weights(plain, 4, &twin);
    static const char *q = "model.layers.1.self_attn.q_proj.weight", *scale = "model.layers.1.self_attn.q_proj.weight_scale",
                      *group = "model.layers.1.self_attn.q_proj.weight_group", *embedding = "model.embed_tokens.weight";
    damaged_fields(w, q), damaged_fields(w, scale), damaged_fields(w, group), damaged_fields(w, embedding);
    damaged_fields(w, "model.norm.weight"), damaged_fields(w, "visual.patch_embed.proj.weight_scale");
    float *scales = (float *)(uintptr_t)named(w, scale)->data, kept = scales[5];
    static const float bad[] = {NAN, INFINITY, -INFINITY, -1e-6f};
    for (int i = 0; i < 4; i++) scales[5] = bad[i], refused(w, scale, "scale");
    scales[5] = kept;
    uint8_t *factors = (uint8_t *)(uintptr_t)named(w, group)->data, factor = factors[7];
    static const uint8_t bad_factors[] = {0, 17, 255};
    for (int i = 0; i < 3; i++) factors[7] = bad_factors[i], refused(w, group, "factor");
    factors[7] = factor;

    migi_tensor *t = named(w, group), good = *t;
    t->shape[1] = 16, t->bytes = 4 * 16 * 16; /* groups of 4 columns */
    refused(w, group, "group of 4");
    *t = good;
    weights *embeds = calloc(1, sizeof *embeds);
    float table[61 * 48] = {0};
    add_quantized(embeds, embedding, table, 61, 48, 4, 16, table);
    migi_tensor *e = named(w, embedding), was = *e, *s = named(w, "lm_head.weight_scale");
    *e = embeds->list[0];
    w->list[w->count] = embeds->list[2], w->list[w->count++].name = "model.embed_tokens.weight_group";
    refused(w, "int4", "an int4 embedding");
    w->count--;
    *e = was;
    const char *name = s->name;
    s->name = NULL;
    refused(w, "no name", "NULL name");
    s->name = q;
    refused(w, "twice", "two of a name");
    s->name = name;
    migi_tensor *v = named(w, "model.layers.0.self_attn.v_proj.bias");
    good = *v;
    v->shape[0] /= 2, v->bytes /= 2;
    refused(w, v->name, "half a vector");
    *v = good;
    migi_model *model = open_model(&config, w); /* and all is well again */
    migi_model_free(model);
    free_weights(embeds), free_weights(w), free_weights(twin);
}

/* Unquantized matrices: the last dimensions are taken as one, and their product counts. */
static void plain_shapes(weights *plain)
{
    migi_tensor *t = named(plain, "visual.patch_embed.proj.weight"), good = *t;
    t->rank = 5, memcpy(t->shape, (int64_t[]){32, 3, 2, 14, 14}, sizeof t->shape);
    migi_model_free(open_model(&config, plain));
    t->shape[4] = 7, t->bytes /= 2;
    refused(plain, t->name, "half a patch");
    *t = good;
    migi_model_free(open_model(&config, plain));
}

/* A config whose products overflow int is refused before anything is sized by it. */
static void hostile_configs(const weights *plain)
{
    migi_model *model;
    migi_error err;
    for (int i = 0; i < 8; i++) {
        migi_config c = config;
        if (i == 0) c.heads = 1 << 20, c.head_dim = 1 << 10;
        if (i == 1) c.heads = 1 << 20, c.head_dim = 1 << 20;
        if (i == 2) c.merge = 1 << 16;
        if (i == 3) c.patch = 1 << 16;
        if (i == 4) c.layers = 1 << 20;
        if (i == 5) c.mrope_section[0] = c.mrope_section[1] = INT32_MAX, c.mrope_section[2] = 10;
        if (i == 6) c.v_depth = 0;
        if (i == 7) c.intermediate = INT32_MIN;
        CHECK(migi_model_new(&model, &c, plain->list, (size_t)plain->count, &err) == MIGI_E_MODEL && !model, "config %d", i);
    }
}

int main(void)
{
    weights *plain = make_weights();
    migi_kernels k;
    for (int t = 0; next_table(&k, &t, 0);) integer_sums(k.isa);
    wrong_sums();
    models(plain, 8, 0), models(plain, 4, 0), models(plain, 0, 0), models(plain, 8, 1), models(plain, 4, 1);
    damaged(plain);
    plain_shapes(plain);
    hostile_configs(plain);
    half_cache(plain);
    free_weights(plain);
    REPORT();
}
