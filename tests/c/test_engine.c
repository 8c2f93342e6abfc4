/* test_engine.c - a tiny random model: the same answer on every instruction set, cold and from a kept prefix, in one
 * piece and token by token, with one thread and two; errors; cancelling. */
#include "tiny_model.h"

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

    open_rig(&r, model, NULL, 2, 64, 1, countdown);
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
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!runs_here(names[i])) continue;
        for (int threads = 1; threads <= 3; threads += 2) {
            open_rig(&r, model, names[i], threads, 64, 1, NULL);
            answer(&r, got, lgot, NEW);
            same(got, lgot, want, lwant, 2e-4f, names[i]);
            close_rig(&r);
        }
    }
    errors(model, w);
    migi_model_free(model);
    free_weights(w);
    REPORT();
}
