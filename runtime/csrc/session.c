/* session.c - one timeline: prefix reuse, prefill in chunks, then few rows at a time; and the public calls on it.
 *
 * Two ways of computing a row must give the same bits, or an answer would depend on what was asked before it:
 *   decode   1 to MIGI_VERIFY_ROWS rows take the few-row paths of linear.c and attention.c, where each row is computed
 *            as if it were alone: drafts verified together equal tokens taken one by one.
 *   prefill  a chunk always has more rows than that (but for prompts that are shorter), so its rows take the many-row
 *            paths whatever the chunk starts at: a prompt on a kept prefix equals the same prompt cold.
 * In the last layer a prompt's last row alone is asked for more than keys and values, so it takes the few-row paths there.
 */
#include "geometry.h"
#include "language.h"
#include "vision.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_CONTEXT = 4096, MAX_CONTEXT = 1 << 20, SUM_BLOCK = 1024, BEST_BLOCK = 256 };

/* What has a place for every token of the context. */
typedef struct places {
    kv_cache cache;
    int32_t *tokens;
    uint64_t *pictures; /* serial of the picture a token belongs to, 0 for text */
} places;

struct migi_session {
    const migi_model *model;
    runner runner;
    language language;
    unsigned char *seen; /* [vocab] tokens on the timeline, for the repetition penalty */
    places places;
    buffers fixed, growing; /* growing: of places */
    int length, kept;       /* kept: of the last sync's tokens, those that were there before */
    int32_t next_position;
    bool logits_ready;
};

/* ---- buffers */

static void place_buffers(places *p, buffers *b, const migi_session *s)
{
    migi_cache_buffers(&p->cache, b, s->model, &s->runner.ws);
    p->tokens = migi_buffer(b, (size_t)p->cache.context, sizeof *p->tokens);
    p->pictures = migi_buffer(b, (size_t)p->cache.context, sizeof *p->pictures);
}

/* Everything that a session holds; b: of a fixed size. */
static void session_buffers(migi_session *s, buffers *b, buffers *growing)
{
    migi_runner_buffers(&s->runner, b, s->model);
    migi_language_buffers(&s->language, b);
    s->seen = migi_buffer(b, (size_t)s->model->c.vocab, 1);
    place_buffers(&s->places, growing, s);
}

/* A session without buffers. */
static void session_init(migi_session *s, const migi_model *model, migi_pool *pool, const migi_session_options *given)
{
    migi_session_options options = given ? *given : (migi_session_options){0};
    s->model = model;
    migi_runner_init(&s->runner, pool, model, &options);
    s->places.cache = (kv_cache){.context = options.context ? options.context : DEFAULT_CONTEXT, .half = !options.fp32};
    s->language = (language){.m = model, .runner = &s->runner, .cache = &s->places.cache};
}

int64_t migi_session_bytes(const migi_model *model, const migi_pool *pool, const migi_session_options *options)
{
    migi_session s = {0};
    buffers all = {.counting = true};
    session_init(&s, model, (migi_pool *)pool, options); /* nothing is run */
    session_buffers(&s, &all, &all);
    return (int64_t)all.bytes;
}

migi_status migi_session_new(migi_session **out, const migi_model *model, migi_pool *pool, const migi_session_options *options,
                             migi_error *err)
{
    migi_status status = MIGI_OK;
    migi_session *s = calloc(1, sizeof *s);
    *out = NULL;
    FAIL_IF(!s, MIGI_E_MEMORY, "no memory for a session");
    session_init(s, model, pool, options);
    int context = s->places.cache.context;
    FAIL_IF(context < 1 || context > MAX_CONTEXT, MIGI_E_ARGUMENT, "a context of %d tokens; give 1 to %d", context, MAX_CONTEXT);
    session_buffers(s, &s->fixed, &s->growing);
    FAIL_IF(s->fixed.failed || s->growing.failed, MIGI_E_MEMORY,
            "no memory for a session of %d tokens (%lld MB); ask for fewer or smaller pictures", context,
            (long long)((s->fixed.bytes + s->growing.bytes) >> 20));
    *out = s;
    return MIGI_OK;
done:
    migi_session_free(s);
    return status;
}

void migi_session_free(migi_session *s)
{
    if (!s) return;
    migi_free_buffers(&s->growing);
    migi_free_buffers(&s->fixed);
    free(s);
}

migi_status migi_session_grow(migi_session *s, int32_t context, migi_error *err)
{
    places grown = {.cache = {.context = context, .half = s->places.cache.half}};
    buffers made = {0};
    if (context <= s->places.cache.context) return MIGI_OK;
    if (context > MAX_CONTEXT) return migi_fail(err, MIGI_E_ARGUMENT, "a context of %d tokens; give 1 to %d", context, MAX_CONTEXT);
    place_buffers(&grown, &made, s);
    if (made.failed) {
        migi_free_buffers(&made);
        return migi_fail(err, MIGI_E_MEMORY, "no memory for a context of %d tokens (%zu MB); ask for fewer or smaller pictures", context,
                         made.bytes >> 20);
    }
    migi_cache_copy(&grown.cache, &s->places.cache, s->model, s->length);
    memcpy(grown.tokens, s->places.tokens, (size_t)s->length * sizeof *grown.tokens);
    memcpy(grown.pictures, s->places.pictures, (size_t)s->length * sizeof *grown.pictures);
    migi_free_buffers(&s->growing);
    s->places = grown, s->growing = made;
    return MIGI_OK;
}

void migi_session_cancel(migi_session *s) { migi_runner_cancel(&s->runner); }
int32_t migi_session_length(const migi_session *s) { return s->length; }
int32_t migi_session_kept(const migi_session *s) { return s->kept; }
const float *migi_session_logits(const migi_session *s) { return s->logits_ready ? s->language.logits : NULL; }

migi_status migi_vision_encode(migi_vision **out, migi_session *s, const uint8_t *rgb, int32_t height, int32_t width, migi_error *err)
{
    return migi_encode(out, &s->runner, s->model, rgb, height, width, err);
}

/* ---- choosing a token */

static double log_sum_exp(const migi_kernels *k, const float *logits, int n)
{
    float max = k->max(logits, n), part[SUM_BLOCK];
    double sum = 0;
    for (int i = 0; i < n; i += SUM_BLOCK) {
        int m = min_int(SUM_BLOCK, n - i);
        memcpy(part, logits + i, (size_t)m * sizeof *part);
        k->scale(part, m, LOG2_E);
        sum += (double)k->exp2_sum(part, m, max * LOG2_E);
    }
    return (double)max + log(sum);
}

static float log_probability(const migi_kernels *k, const float *logits, int n, int32_t token)
{
    return (float)((double)logits[token] - log_sum_exp(k, logits, n));
}

/* The first of the largest logits after the penalty, and its log-probability without. A penalty of 1 or more raises no
 * logit, so a block whose largest is no better than the best so far is passed over. */
static void choose_greedily(const migi_session *s, const float *logits, float penalty, int32_t *token, float *logprob)
{
    const migi_kernels *k = s->runner.ws.k;
    int vocab = s->model->c.vocab;
    float best = -INFINITY;
    *token = 0;
    for (int first = 0; first < vocab; first += BEST_BLOCK) {
        int end = min_int(first + BEST_BLOCK, vocab);
        if (penalty >= 1.f && k->max(logits + first, end - first) <= best) continue;
        for (int i = first; i < end; i++) {
            float v = logits[i];
            if (s->seen[i]) v = v > 0.f ? v / penalty : v * penalty;
            if (v > best) best = v, *token = i;
        }
    }
    *logprob = log_probability(k, logits, vocab, *token);
}

/* ---- the timeline */

static grid vision_grid(const void *given, int picture)
{
    const migi_vision *v = ((const migi_vision *const *)given)[picture];
    return (grid){v->rows, v->cols};
}

/* The picture that a token is a cell of, NULL for text. */
static const migi_vision *vision_at(const walker *w, place p)
{
    return p.picture < 0 ? NULL : ((const migi_vision *const *)w->given)[p.picture];
}

/* Tokens of the vocabulary that fit behind the first `at`. */
static migi_status check_tokens(const migi_session *s, const int32_t *tokens, int32_t count, int32_t at, migi_error *err)
{
    if (count < 1) return migi_fail(err, MIGI_E_ARGUMENT, "no tokens given");
    if (count > s->places.cache.context - at)
        return migi_fail(err, MIGI_E_CONTEXT_FULL, "%d tokens do not fit the %d that the session holds; use fewer or smaller pictures",
                         at + count, s->places.cache.context);
    for (int32_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->c.vocab)
            return migi_fail(err, MIGI_E_ARGUMENT, "token %d at %d is outside the vocabulary of %d", tokens[i], i, s->model->c.vocab);
    return MIGI_OK;
}

/* How many tokens of the new prompt the session already holds. */
static int common_prefix(const migi_session *s, const int32_t *tokens, int32_t count, walker w)
{
    int i = 0;
    for (; i < count && i < s->length && s->places.tokens[i] == tokens[i]; i++) {
        const migi_vision *v = vision_at(&w, migi_walk(&w, tokens[i]));
        if (s->places.pictures[i] != (v ? v->serial : 0)) break;
    }
    return i;
}

static void cut(migi_session *s, int length)
{
    memset(s->seen, 0, (size_t)s->model->c.vocab);
    for (int i = 0; i < length; i++) s->seen[s->places.tokens[i]] = 1;
    s->length = length;
    s->logits_ready = false;
}

/* Row `row` of the chunk that starts at the end of the timeline. */
static void put_row(migi_session *s, int row, int32_t token, const migi_vision *v, place p)
{
    s->places.tokens[s->length + row] = token;
    s->places.pictures[s->length + row] = v ? v->serial : 0;
    if (v) migi_put_cell(&s->language, row, v->embeddings + (size_t)p.cell * (size_t)v->hidden, p.at);
    else migi_put_token(&s->language, row, token, p.at);
}

/* The timeline ends behind the chunk, too. */
static void lengthen(migi_session *s, int rows)
{
    for (int i = s->length; i < s->length + rows; i++) s->seen[s->places.tokens[i]] = 1;
    s->length += rows;
}

/* Tokens, places and pictures belong together and fit the session. */
static migi_status check_prompt(const migi_session *s, const int32_t *tokens, int32_t count, walker w, migi_error *err)
{
    migi_status status = check_tokens(s, tokens, count, 0, err);
    for (int i = 0; i < w.pictures && status == MIGI_OK; i++)
        if (((const migi_vision *const *)w.given)[i]->hidden != s->model->c.hidden)
            return migi_fail(err, MIGI_E_ARGUMENT, "picture %d was encoded by another model; encode it anew", i + 1);
    return status == MIGI_OK ? migi_check_places(w, tokens, count, err) : status;
}

migi_status migi_session_sync(migi_session *s, const int32_t *tokens, int32_t count, const migi_vision *const *visions, int32_t pictures,
                              migi_error *err)
{
    migi_status status = MIGI_OK;
    walker w = {.image_token = s->model->c.image_token, .grid_of = vision_grid, .given = visions, .pictures = pictures};
    TRY(check_prompt(s, tokens, count, w, err)); /* nothing is changed before */
    int keep = common_prefix(s, tokens, count, w);
    s->kept = keep;
    if (keep == count && s->length == count && s->logits_ready) goto done;
    /* the last tokens are computed again: for the logits, and with enough rows for the many-row paths */
    s->kept = keep = min_int(keep, count > MIGI_VERIFY_ROWS ? count - MIGI_VERIFY_ROWS - 1 : 0);
    cut(s, keep);
    for (int i = 0; i < keep; i++) migi_walk(&w, tokens[i]);
    while (s->length < count) {
        int first = s->length, left = count - first, rows = min_int(left, even_part(left, MIGI_CHUNK)); /* so no chunk of few rows */
        bool last = rows == left;
        for (int i = 0; i < rows; i++) {
            place p = migi_walk(&w, tokens[first + i]);
            put_row(s, i, tokens[first + i], vision_at(&w, p), p);
        }
        TRY(migi_forward(&s->language, first, rows, last, err));
        lengthen(s, rows);
        if (last) TRY(migi_logits_of(&s->language, rows - 1, 1, err));
    }
    s->next_position = w.next;
    s->logits_ready = true;
done:
    return status;
}

/* What follows a prompt: text tokens that fit. */
static migi_status check_text(const migi_session *s, const int32_t *tokens, int32_t count, migi_error *err)
{
    if (!s->logits_ready) return migi_fail(err, MIGI_E_ARGUMENT, "the session holds no prompt; call migi_session_sync first");
    migi_status status = check_tokens(s, tokens, count, s->length, err);
    for (int32_t i = 0; i < count && status == MIGI_OK; i++)
        if (tokens[i] == s->model->c.image_token)
            return migi_fail(err, MIGI_E_ARGUMENT, "token %d is a picture's place; pictures come with migi_session_sync", i);
    return status;
}

/* Text tokens behind the timeline go through the layers; the caller lengthens the timeline by those it keeps. */
static migi_status forward_text(migi_session *s, const int32_t *tokens, int rows, int wanted, migi_error *err)
{
    for (int i = 0; i < rows; i++) {
        int32_t at = s->next_position + i;
        put_row(s, i, tokens[i], NULL, (place){.at = {at, at, at}, .picture = -1});
    }
    s->logits_ready = false;
    return migi_forward(&s->language, s->length, rows, wanted, err);
}

/* logprobs[i + 1] <- that of tokens[i + 1], i + 1 < count, by row i of the chunk, which is tokens[0] to tokens[rows - 1]. */
static migi_status score(migi_session *s, const int32_t *tokens, int rows, int count, float *logprobs, migi_error *err)
{
    size_t vocab = (size_t)s->model->c.vocab;
    for (int i = 0; i < rows; i += MIGI_LOGIT_ROWS) {
        int n = min_int(MIGI_LOGIT_ROWS, rows - i);
        migi_status status = migi_logits_of(&s->language, i, n, err);
        if (status != MIGI_OK) return status;
        for (int j = i; j < i + n && j + 1 < count; j++) {
            const float *row = s->language.logits + (size_t)(j - i) * vocab;
            logprobs[j + 1] = log_probability(s->runner.ws.k, row, s->model->c.vocab, tokens[j + 1]);
        }
    }
    return MIGI_OK;
}

migi_status migi_session_append(migi_session *s, const int32_t *tokens, int32_t count, float *logprobs, migi_error *err)
{
    migi_status status = MIGI_OK;
    TRY(check_text(s, tokens, count, err));
    if (logprobs) logprobs[0] = log_probability(s->runner.ws.k, s->language.logits, s->model->c.vocab, tokens[0]);
    for (int32_t at = 0, rows; at < count; at += rows) {
        rows = min_int(count - at, MIGI_CHUNK);
        bool last = at + rows == count;
        TRY(forward_text(s, tokens + at, rows, logprobs ? rows : last, err));
        lengthen(s, rows);
        s->next_position += rows;
        if (logprobs) TRY(score(s, tokens + at, rows, count - at, logprobs + at, err));
        if (last) TRY(migi_logits_of(&s->language, rows - 1, 1, err));
    }
    s->logits_ready = true;
done:
    return status;
}

static migi_status check_penalty(float penalty, migi_error *err)
{
    if (penalty > 0.f) return MIGI_OK;
    return migi_fail(err, MIGI_E_ARGUMENT, "a repetition penalty of %g; give a number above 0", (double)penalty);
}

migi_status migi_session_greedy(migi_session *s, float repetition_penalty, int32_t *token, float *logprob, migi_error *err)
{
    if (!s->logits_ready) return migi_fail(err, MIGI_E_ARGUMENT, "the session holds no prompt; call migi_session_sync first");
    migi_status status = check_penalty(repetition_penalty, err);
    if (status == MIGI_OK) choose_greedily(s, s->language.logits, repetition_penalty, token, logprob);
    return status;
}

migi_status migi_session_verify(migi_session *s, const int32_t *tokens, int32_t count, float repetition_penalty, int32_t *kept,
                                int32_t *choices, float *logprobs, migi_error *err)
{
    migi_status status = MIGI_OK;
    size_t vocab = (size_t)s->model->c.vocab;
    int32_t n = 0;
    *kept = 0;
    FAIL_IF(count > MIGI_VERIFY_ROWS, MIGI_E_ARGUMENT, "%d tokens to verify at once; give at most %d", count, MIGI_VERIFY_ROWS);
    TRY(check_penalty(repetition_penalty, err));
    TRY(check_text(s, tokens, count, err));
    TRY(forward_text(s, tokens, count, count, err));
    TRY(migi_logits_of(&s->language, 0, count, err));
    do { /* a choice depends on the tokens seen before it, so position by position */
        s->seen[tokens[n]] = 1;
        choose_greedily(s, s->language.logits + (size_t)n * vocab, repetition_penalty, &choices[n], &logprobs[n]);
        n++;
    } while (n < count && tokens[n] == choices[n - 1]);
    if (n > 1) memcpy(s->language.logits, s->language.logits + (size_t)(n - 1) * vocab, vocab * sizeof *s->language.logits);
    s->length += n, s->next_position += n, *kept = n;
    s->logits_ready = true;
done:
    return status;
}
