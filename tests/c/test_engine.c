/* test_engine.c - a tiny random model: the same answer on every instruction set, cold and from a kept prefix, in one
 * piece and token by token, with drafts right and wrong, in a session that grew, with one thread and two; errors; a refused
 * prompt; cancelling. */
#include "tiny_model.h"

#include <sys/wait.h>
#include <unistd.h>

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
    open_rig(&r, model, NULL, 1, 24, 1, NULL);
    int32_t bad = 99, many[30] = {0}, picture_token = PICTURE;
    CHECK(migi_session_append(r.session, many, 1, NULL, &r.err) == MIGI_E_ARGUMENT, "append before sync");
    CHECK(migi_session_sync(r.session, &bad, 1, NULL, 0, &r.err) == MIGI_E_ARGUMENT, "token outside the vocabulary");
    CHECK(migi_session_sync(r.session, many, 30, NULL, 0, &r.err) == MIGI_E_CONTEXT_FULL, "context");
    CHECK(migi_session_sync(r.session, &picture_token, 1, NULL, 0, &r.err) == MIGI_E_ARGUMENT, "no picture for a place");
    CHECK(migi_session_sync(r.session, prompt, PROMPT, (const migi_vision *const *)r.pictures, 1, &r.err) == MIGI_E_ARGUMENT,
          "one picture of two");
    CHECK(migi_session_logits(r.session) == NULL, "logits without a prompt");
    migi_vision *v;
    CHECK(migi_vision_encode(&v, r.session, rgb, 27, 28, &r.err) == MIGI_E_ARGUMENT && !v, "odd size");
    close_rig(&r);

    migi_error err;
    migi_config c = config;
    c.hidden = 40;
    CHECK(migi_model_new(&broken, &c, w->list, (size_t)w->count, &err) == MIGI_E_MODEL && !broken &&
              strstr(err.message, "model.embed_tokens.weight"),
          "%s", err.message);
    CHECK(migi_model_new(&broken, &config, w->list, 10, &err) == MIGI_E_MODEL && strstr(err.message, "missing"), "%s", err.message);
    c = config, c.mrope_section[0] = 1;
    CHECK(migi_model_new(&broken, &c, w->list, (size_t)w->count, &err) == MIGI_E_MODEL, "mrope_section");
    migi_pool *pool;
    CHECK(migi_pool_new(&pool, 1, "vax", &err) == MIGI_E_UNSUPPORTED && !pool, "%s", err.message);
    migi_pool_free(NULL), migi_model_free(NULL), migi_session_free(NULL), migi_vision_free(NULL);

    open_rig(&r, model, NULL, 2, 64, 1, countdown);
    stop_after = 1;
    CHECK(migi_session_sync(r.session, many, 10, NULL, 0, &r.err) == MIGI_E_CANCELLED, "cancelled by the poll");
    stop_after = 1000;
    CHECK(migi_session_sync(r.session, many, 10, NULL, 0, &r.err) == MIGI_OK, "usable after cancelling: %s", r.err.message);
    migi_session_cancel(r.session);
    CHECK(migi_session_append(r.session, many, 1, NULL, &r.err) == MIGI_E_CANCELLED, "cancelled from outside");
    close_rig(&r);
}

/* ---- two ways to the same bits */

enum { VOCAB = 61, LONG = 600 };

static void start(rig *r)
{
    CHECK(migi_session_sync(r->session, prompt, PROMPT, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s",
          r->err.message);
}

/* What sync refuses leaves the timeline, its logits and what follows as they were. */
static void refused(const migi_model *model)
{
    rig r;
    int32_t broken[PROMPT + 1], many[80] = {0}, next = 12;
    float before[VOCAB], want[VOCAB];
    open_rig(&r, model, NULL, 1, 64, 0, NULL);
    const migi_vision *three[] = {r.pictures[0], r.pictures[1], r.pictures[1]}, *other_way[] = {r.pictures[1], r.pictures[0]};
    start(&r);
    CHECK(migi_session_append(r.session, &next, 1, NULL, &r.err) == MIGI_OK, "%s", r.err.message);
    memcpy(want, migi_session_logits(r.session), sizeof want);
    start(&r);
    memcpy(before, migi_session_logits(r.session), sizeof before);
    for (int i = 0; i < 8; i++) {
        migi_status status = MIGI_E_ARGUMENT;
        const migi_vision *const *pictures = three;
        int count = PROMPT, given = 2;
        memcpy(broken, prompt, sizeof prompt);
        broken[PROMPT] = 20;
        if (i == 0) given = 1;
        if (i == 1) given = 3;
        if (i == 2) pictures = other_way;              /* of other sizes than the places */
        if (i == 3) broken[5] = 20;                    /* a picture with a hole */
        if (i == 4) broken[PROMPT] = PICTURE, count++; /* a place too many */
        if (i == 5) count = 12;                        /* cut off within a picture */
        if (i == 6) broken[1] = VOCAB;
        if (i == 7) count = 80, status = MIGI_E_CONTEXT_FULL;
        CHECK(migi_session_sync(r.session, i == 7 ? many : broken, count, pictures, given, &r.err) == status, "case %d is not refused", i);
        CHECK(migi_session_length(r.session) == PROMPT && migi_session_logits(r.session) &&
                  !memcmp(before, migi_session_logits(r.session), sizeof before),
              "case %d costs the timeline", i);
        start(&r);
        CHECK(migi_session_kept(r.session) == PROMPT, "case %d: %d kept", i, migi_session_kept(r.session));
    }
    CHECK(migi_session_append(r.session, &next, 1, NULL, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(!memcmp(want, migi_session_logits(r.session), sizeof want), "what follows a refused prompt differs");
    close_rig(&r);
}

/* Another picture in the same place is another prompt from there on. */
static void another_picture(const migi_model *model)
{
    rig r;
    uint8_t rgb[84 * 56 * 3];
    float before[VOCAB];
    open_rig(&r, model, NULL, 1, 64, 0, NULL);
    migi_vision *mine = r.pictures[0];
    start(&r);
    memcpy(before, migi_session_logits(r.session), sizeof before);
    picture(rgb, 84, 56, 9);
    CHECK(migi_vision_encode(&r.pictures[0], r.session, rgb, 84, 56, &r.err) == MIGI_OK, "%s", r.err.message);
    start(&r);
    CHECK(migi_session_kept(r.session) == 3, "%d kept before another picture", migi_session_kept(r.session));
    CHECK(memcmp(before, migi_session_logits(r.session), sizeof before), "another picture changes nothing");
    migi_vision_free(r.pictures[0]);
    r.pictures[0] = mine;
    start(&r);
    CHECK(!memcmp(before, migi_session_logits(r.session), sizeof before), "the first picture again");
    close_rig(&r);
}

/* One more token by itself, as plain decoding does; logits[VOCAB] <- those after it. */
static void one(rig *r, int32_t token, float penalty, int32_t *next, float *logprob, float *logits)
{
    CHECK(migi_session_append(r->session, &token, 1, NULL, &r->err) == MIGI_OK, "%s", r->err.message);
    CHECK(migi_session_greedy(r->session, penalty, next, logprob, &r->err) == MIGI_OK, "%s", r->err.message);
    memcpy(logits, migi_session_logits(r->session), VOCAB * sizeof *logits);
    if (*next == PICTURE) *next = 11;
}

enum { STEPS = 16 };

/* A draft of `count` tokens whose guess number `wrong` is wrong (0: none is), at every place of an answer. */
static void drafts(rig *r, float penalty, int count, int wrong, const char *what)
{
    int32_t want[STEPS + 1], choices[MIGI_VERIFY_ROWS], kept, draft[MIGI_VERIFY_ROWS];
    float lwant[STEPS + 1], logits[STEPS + 1][VOCAB], logprobs[MIGI_VERIFY_ROWS];
    start(r);
    CHECK(migi_session_greedy(r->session, penalty, &want[0], &lwant[0], &r->err) == MIGI_OK, "%s", r->err.message);
    for (int i = 0; i < STEPS; i++) one(r, want[i], penalty, &want[i + 1], &lwant[i + 1], logits[i + 1]);
    start(r);
    for (int at = 0; at + count <= STEPS; at += kept) {
        for (int i = 0; i < count; i++) draft[i] = want[at + i];
        if (wrong && wrong < count) draft[wrong] = (draft[wrong] + 1) % PICTURE;
        CHECK(migi_session_verify(r->session, draft, count, penalty, &kept, choices, logprobs, &r->err) == MIGI_OK, "%s: %s", what,
              r->err.message);
        int expected = wrong && wrong < count ? wrong : count;
        for (int i = 0; i < kept; i++) {
            if (choices[i] == PICTURE) expected = expected < i + 1 ? expected : i + 1, choices[i] = 11; /* `one` puts 11 there */
            CHECK(choices[i] == want[at + i + 1] && memcmp(&logprobs[i], &lwant[at + i + 1], sizeof(float)) == 0,
                  "%s: draft of %d: token %d is %d (%g), expected %d (%g)", what, count, at + i + 1, choices[i], (double)logprobs[i],
                  want[at + i + 1], (double)lwant[at + i + 1]);
        }
        CHECK(kept == expected, "%s: draft of %d, wrong at %d: %d kept", what, count, wrong, kept);
        CHECK(migi_session_length(r->session) == PROMPT + at + kept, "%s: length", what);
        CHECK(memcmp(migi_session_logits(r->session), logits[at + kept], sizeof logits[0]) == 0,
              "%s: draft of %d: the logits after token %d differ from one by one", what, count, at + kept);
        if (kept < 1) break;
    }
}

/* A long prompt on every kind of kept prefix, and in a session that grew, gives the bits of the cold one. */
static void prefixes(const migi_model *model, rig *r, const char *isa, int fp32)
{
    static int32_t tokens[LONG];
    float cold[VOCAB];
    rig other;
    for (int i = 0; i < LONG; i++) tokens[i] = i < PROMPT ? prompt[i] : 8 + (i * 7 + i / 9) % 50;
    CHECK(migi_session_sync(r->session, tokens, LONG, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s",
          r->err.message);
    memcpy(cold, migi_session_logits(r->session), sizeof cold);
    const int kept[] = {2, 9, 80, 255, 595};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        int32_t before = tokens[kept[i]];
        tokens[kept[i]] = 60;
        CHECK(migi_session_sync(r->session, tokens, LONG, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s",
              r->err.message);
        tokens[kept[i]] = before;
        CHECK(migi_session_sync(r->session, tokens, LONG, (const migi_vision *const *)r->pictures, 2, &r->err) == MIGI_OK, "%s",
              r->err.message);
        CHECK(migi_session_kept(r->session) <= kept[i] && migi_session_kept(r->session) >= kept[i] - MIGI_VERIFY_ROWS, "%s: %d kept of %d",
              isa, migi_session_kept(r->session), kept[i]);
        CHECK(memcmp(cold, migi_session_logits(r->session), sizeof cold) == 0, "%s, fp32 %d: a prefix of %d changes the logits", isa, fp32,
              kept[i]);
    }
    open_rig(&other, model, isa, 1, 200, fp32, NULL);
    CHECK(migi_session_sync(other.session, tokens, 190, (const migi_vision *const *)other.pictures, 2, &other.err) == MIGI_OK, "%s",
          other.err.message);
    CHECK(migi_session_sync(other.session, tokens, LONG, (const migi_vision *const *)other.pictures, 2, &other.err) == MIGI_E_CONTEXT_FULL,
          "does not fit");
    CHECK(migi_session_grow(other.session, LONG + 3, &other.err) == MIGI_OK, "%s", other.err.message);
    CHECK(migi_session_grow(other.session, 10, &other.err) == MIGI_OK && migi_session_length(other.session) == 190, "growing to less");
    CHECK(migi_session_sync(other.session, tokens, LONG, (const migi_vision *const *)other.pictures, 2, &other.err) == MIGI_OK, "%s",
          other.err.message);
    CHECK(migi_session_kept(other.session) == 190, "%d kept of 190 when the session grew", migi_session_kept(other.session));
    CHECK(memcmp(cold, migi_session_logits(other.session), sizeof cold) == 0, "%s: growing changes the logits", isa);
    CHECK(migi_session_grow(other.session, 1 << 30, &other.err) == MIGI_E_ARGUMENT && migi_session_length(other.session) == LONG,
          "growing beyond reason");
    close_rig(&other);
}

static void same_bits(const weights *w, const char *kind)
{
    migi_model *model;
    migi_error err = {0};
    char what[96];
    CHECK(migi_model_new(&model, &config, w->list, (size_t)w->count, &err) == MIGI_OK, "%s", err.message);
    migi_kernels k;
    for (int t = 0; next_table(&k, &t, QUICK);) {
        for (int fp32 = 0; fp32 < 2; fp32++) {
            rig r;
            open_rig(&r, model, k.isa, 1 + fp32, LONG, fp32, NULL);
            snprintf(what, sizeof what, "%s weights, %s, fp32 %d", kind, k.isa, fp32);
            for (int count = 1; count <= MIGI_VERIFY_ROWS; count += count < 4 ? 1 : 2)
                for (int wrong = 0; wrong < count; wrong += 2)
                    drafts(&r, (float[]){1.f, 1.05f, 1.3f, .9f}[(count + wrong) % 4], count, wrong, what);
            prefixes(model, &r, k.isa, fp32);
            close_rig(&r);
        }
    }
    migi_model_free(model);
}

static void draft_errors(const migi_model *model)
{
    rig r;
    int32_t tokens[MIGI_VERIFY_ROWS + 1] = {8, 9, 10}, choices[MIGI_VERIFY_ROWS], kept, place[] = {8, PICTURE}, beyond[] = {8, VOCAB};
    float logprobs[MIGI_VERIFY_ROWS];
    open_rig(&r, model, NULL, 1, PROMPT + 2, 0, NULL);
    CHECK(migi_session_verify(r.session, tokens, 1, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT && kept == 0, "before sync");
    start(&r);
    CHECK(migi_session_verify(r.session, tokens, 0, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT, "no token");
    CHECK(migi_session_verify(r.session, tokens, MIGI_VERIFY_ROWS + 1, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT,
          "too many");
    CHECK(migi_session_verify(r.session, tokens, 3, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_CONTEXT_FULL, "no room");
    CHECK(migi_session_verify(r.session, tokens, 1, 0.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT, "penalty");
    CHECK(migi_session_verify(r.session, place, 2, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT, "a picture's place");
    CHECK(migi_session_verify(r.session, beyond, 2, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_ARGUMENT, "outside the vocabulary");
    CHECK(migi_session_length(r.session) == PROMPT && migi_session_logits(r.session), "what is refused leaves the session as it was");
    migi_session_cancel(r.session);
    CHECK(migi_session_verify(r.session, tokens, 2, 1.f, &kept, choices, logprobs, &r.err) == MIGI_E_CANCELLED && kept == 0, "cancelled");
    CHECK(migi_session_length(r.session) == PROMPT, "a cancelled draft leaves nothing");
    start(&r);
    CHECK(migi_session_verify(r.session, tokens, 2, 1.f, &kept, choices, logprobs, &r.err) == MIGI_OK, "usable after cancelling: %s",
          r.err.message);
    close_rig(&r);
}

/* A child process has none of the parent's threads until the pool is restarted; the parent goes on. */
static void forked(const migi_model *model, const int32_t *want, const float *lwant)
{
#if defined(__SANITIZE_THREAD__) || (defined(__aarch64__) && QUICK)
    (void)model, (void)want, (void)lwant; /* neither TSan nor qemu-user lets a forked child start threads */
    printf("SKIPPED a forked child: not under TSan, not under qemu-user\n");
    skipped++;
#else
    int32_t got[NEW];
    float lgot[NEW];
    rig r;
    open_rig(&r, model, "scalar", 3, 64, 1, NULL);
    answer(&r, got, lgot, NEW);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        alarm(60);
        migi_pool_restart(r.pool);
        answer(&r, got, lgot, NEW);
        close_rig(&r);
        _exit(memcmp(got, want, sizeof got) || memcmp(lgot, lwant, sizeof lgot) ? 1 : 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "a forked child ended with %d", status);
    answer(&r, got, lgot, NEW);
    same(got, lgot, want, lwant, 0.f, "after a fork");
    close_rig(&r);
#endif
}

int main(void)
{
    weights *w = make_weights();
    migi_model *model;
    migi_error err = {0};
    CHECK(migi_model_new(&model, &config, w->list, (size_t)w->count, &err) == MIGI_OK, "%s", err.message);
    int32_t want[NEW], got[NEW];
    float lwant[NEW], lgot[NEW];
    rig r;
    open_rig(&r, model, "scalar", 1, 64, 1, NULL);
    answer(&r, want, lwant, NEW);
    answer(&r, got, lgot, NEW);
    same(got, lgot, want, lwant, 2e-4f, "kept prefix");
    float scores[NEW];
    CHECK(migi_session_sync(r.session, prompt, PROMPT, (const migi_vision *const *)r.pictures, 2, &r.err) == MIGI_OK, "%s", r.err.message);
    CHECK(migi_session_append(r.session, want, NEW, scores, &r.err) == MIGI_OK, "%s", r.err.message);
    same(want, scores, want, lwant, 2e-4f, "scored in one piece");
    CHECK(migi_session_length(r.session) == PROMPT + NEW, "length");
    close_rig(&r);
    migi_kernels k;
    for (int t = 1; next_table(&k, &t, 0);) {
        for (int threads = 1; threads <= 3; threads += 2) {
            open_rig(&r, model, k.isa, threads, 64, 1, NULL);
            answer(&r, got, lgot, NEW);
            same(got, lgot, want, lwant, 0.f, k.isa);
            close_rig(&r);
        }
    }
    forked(model, want, lwant);
    errors(model, w);
    refused(model);
    another_picture(model);
    draft_errors(model);
    same_bits(w, "plain");
    for (int bits = 0; bits <= 8; bits += 4) {
        weights *twin, *quantized = quantize_weights(w, bits, &twin);
        same_bits(quantized, (const char *[]){"mixed", "int4", "int8"}[bits / 4]);
        free_weights(quantized), free_weights(twin);
    }
    migi_model_free(model);
    free_weights(w);
    REPORT();
}
