/* test_attention.c - attention against sums in double: one block and many of queries and keys, causal and not, shared
 * key/value heads, half and float, turned on the way; the same bits whatever the threads and the queries beside a query. */
#include "../../runtime/csrc/attention.h"
#include "tables.h"

enum { HEADS = 4, KV_HEADS = 2, SIZE = 20, WIDTH = HEADS * SIZE, KV_WIDTH = KV_HEADS * SIZE, MOST_KEYS = 1650 };

static float q[MOST_KEYS * WIDTH], keys[MOST_KEYS * KV_WIDTH], values[MOST_KEYS * KV_WIDTH];
static uint16_t half_keys[MOST_KEYS * KV_WIDTH], half_values[MOST_KEYS * KV_WIDTH];

static attention call_of(float *out, int queries, int all, bool causal, bool half)
{
    /* clang-format off */
    return (attention){.q = q, .ldq = WIDTH, .k = half ? (void *)half_keys : keys, .v = half ? (void *)half_values : values,
                       .half = half, .ldkv = KV_WIDTH, .kv_head = SIZE, .out = out, .ldo = WIDTH, .queries = queries,
                       .keys = all, .heads = HEADS, .kv_heads = KV_HEADS, .size = SIZE, .causal = causal};
    /* clang-format on */
}

static void run(const char *isa, int threads, bool bf16, const attention *a)
{
    migi_pool *pool;
    migi_error err;
    CHECK(migi_pool_new(&pool, threads, isa, &err) == MIGI_OK, "%s", err.message);
    const migi_kernels *k = migi_pool_kernels(pool);
    workspace ws = {.pool = pool, .k = k, .bf16 = bf16, .scratch_bytes = (migi_attention_scratch(k, SIZE) + 63) / 64 * 64};
    ws.scratch = migi_alloc(ws.scratch_bytes, (size_t)threads);
    attention call = *a;
    call.panels = migi_alloc(migi_attention_panels(&ws, a->kv_heads, a->size, a->keys), 1);
    migi_attend(&ws, &call);
    free(call.panels);
    free(ws.scratch);
    migi_pool_free(pool);
}

static double dot_of(const float *a, const float *b)
{
    double dot = 0.;
    for (int x = 0; x < SIZE; x++) dot += (double)a[x] * (double)b[x];
    return dot;
}

/* The largest difference from softmax(q k^T / sqrt(SIZE)) v. */
static double error_of(const attention *a)
{
    double worst = 0.;
    for (int i = 0; i < a->queries; i++)
        for (int h = 0; h < HEADS; h++) {
            double sum = 0., out[SIZE] = {0};
            int kv = h / (HEADS / KV_HEADS) * SIZE, seen = a->causal ? a->keys - a->queries + i + 1 : a->keys;
            for (int j = 0; j < seen; j++) {
                double p = exp(dot_of(q + i * WIDTH + h * SIZE, keys + j * KV_WIDTH + kv) / sqrt((double)SIZE));
                sum += p;
                for (int x = 0; x < SIZE; x++) out[x] += p * (double)values[j * KV_WIDTH + kv + x];
            }
            for (int x = 0; x < SIZE; x++) { /* fmax here: GCC 12 for aarch64 fails inside its vectorizer */
                double off = fabs(out[x] / sum - (double)a->out[i * WIDTH + h * SIZE + x]);
                if (!(off <= worst)) worst = off;
            }
        }
    return worst;
}

static void one_shape(const char *isa, bool bf16, int queries, int all, bool causal, bool half)
{
    float *out = floats((size_t)queries * WIDTH), *again = floats((size_t)queries * WIDTH);
    attention a = call_of(out, queries, all, causal, half), other = call_of(again, queries, all, causal, half);
    run(isa, 1, bf16, &a);
    double off = error_of(&a);
    CHECK(off < (bf16 ? 2e-2 : 2e-6), "%s, %d queries, %d keys, causal %d, half %d: off by %g", isa, queries, all, causal, half, off);
    run(isa, 3, bf16, &other);
    CHECK(!memcmp(out, again, (size_t)queries * WIDTH * sizeof *out), "%s, %d queries, %d keys: threads change it", isa, queries, all);
    memcpy(again, q, (size_t)queries * WIDTH * sizeof *q); /* the output in the queries' place */
    other.q = again;
    run(isa, 3, bf16, &other);
    CHECK(!memcmp(out, again, (size_t)queries * WIDTH * sizeof *out), "%s, %d queries, %d keys: output over q differs", isa, queries, all);
    if (queries > 2 * MIGI_FEW_ROWS) { /* the last ones by themselves */
        int few = queries / 2 + 1, first = queries - few;
        other.queries = few, other.q = q + first * WIDTH;
        run(isa, 1, bf16, &other);
        CHECK(!memcmp(out + first * WIDTH, again, (size_t)few * WIDTH * sizeof *out),
              "%s, %d queries, %d keys: a query depends on those before it", isa, queries, all);
    }
    free(out), free(again);
}

/* Queries and keys turned on their way equal those turned before: to the bit, but where few of these take the other path. */
static void turned(const char *isa, bool bf16, int tokens)
{
    size_t wide = (size_t)tokens * WIDTH, narrow = (size_t)tokens * KV_WIDTH, planes = (size_t)tokens * SIZE / 2;
    float *out = floats(wide), *want = floats(wide), *cosine = floats(planes), *sine = floats(planes);
    float *turned_q = malloc(wide * sizeof *q), *turned_keys = malloc(narrow * sizeof *keys);
    memcpy(turned_q, q, wide * sizeof *q), memcpy(turned_keys, keys, narrow * sizeof *keys);
    for (int i = 0; i < tokens; i++) {
        const float *c = cosine + i * SIZE / 2, *s = sine + i * SIZE / 2;
        for (int h = 0; h < HEADS; h++) migi_own_scalar.rope(turned_q + i * WIDTH + h * SIZE, c, s, SIZE / 2);
        for (int h = 0; h < KV_HEADS; h++) migi_own_scalar.rope(turned_keys + i * KV_WIDTH + h * SIZE, c, s, SIZE / 2);
    }
    attention a = call_of(out, tokens, tokens, false, false), before = call_of(want, tokens, tokens, false, false);
    a.cosine = cosine, a.sine = sine, before.q = turned_q, before.k = turned_keys;
    run(isa, 2, bf16, &a), run(isa, 2, bf16, &before);
    if (tokens > MIGI_FEW_ROWS) CHECK(!memcmp(out, want, wide * sizeof *out), "%s, %d tokens: turning on the way differs", isa, tokens);
    float off = 0.f;
    for (size_t i = 0; i < wide; i++) off = fabsf(out[i] - want[i]) <= off ? off : fabsf(out[i] - want[i]);
    CHECK(off < (bf16 ? 2e-2f : 2e-6f), "%s, %d tokens: turning on the way is off by %g", isa, tokens, (double)off);
    free(out), free(want), free(cosine), free(sine), free(turned_q), free(turned_keys);
}

int main(void)
{
    static const int shapes[][2] = {{1, 1}, {3, 300}, {9, 9}, {47, 130}, {193, 193}, {200, 456}, {512, 512}, {431, 700}, {100, 1650}};
    for (int i = 0; i < MOST_KEYS * WIDTH; i++) q[i] = 4.f * noise();
    for (int i = 0; i < MOST_KEYS * KV_WIDTH; i++) { /* exact as halves */
        half_keys[i] = migi_f32_to_f16(noise()), keys[i] = migi_f16_to_f32(half_keys[i]);
        half_values[i] = migi_f32_to_f16(noise()), values[i] = migi_f16_to_f32(half_values[i]);
    }
    migi_kernels k;
    for (int t = 0; next_table(&k, &t, QUICK);) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int kind = 0; kind < 4; kind++)
                for (int bf16 = 0; bf16 <= k.bf16_dots; bf16++) one_shape(k.isa, bf16, shapes[s][0], shapes[s][1], kind & 1, kind >> 1);
        for (int bf16 = 0; bf16 <= k.bf16_dots; bf16++) turned(k.isa, bf16, 4), turned(k.isa, bf16, 830);
    }
    REPORT();
}
