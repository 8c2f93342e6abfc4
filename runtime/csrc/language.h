/* language.h - the language model: rows of a chunk through the layers, keys and values into the cache, and logits. */
#ifndef MIGI_LANGUAGE_H
#define MIGI_LANGUAGE_H

#include "runner.h"

enum { MIGI_LOGIT_ROWS = 16 };

/* Keys and values of the tokens on the timeline. */
typedef struct kv_cache {
    int context;  /* tokens it has room for */
    bool half;    /* IEEE half floats, not f32 */
    void *data;   /* [layers][k, v][kv_heads][context][head_dim] */
    void *panels; /* one layer's keys and values as attention reads them */
} kv_cache;

typedef struct language {
    const migi_model *m;
    runner *runner;
    const kv_cache *cache;
    float *x;      /* [MIGI_CHUNK, hidden] rows on their way through the layers */
    float *h;      /* [MIGI_CHUNK, max(hidden, q)] */
    float *q;      /* [MIGI_CHUNK, heads, head_dim] */
    float *kv;     /* [MIGI_CHUNK][k, v][kv_heads][head_dim], on its way to the cache */
    float *gated;  /* [MIGI_CHUNK, intermediate] */
    float *angles; /* [MIGI_CHUNK][cosine, sine][head_dim / 2] */
    float *logits; /* [MIGI_LOGIT_ROWS, vocab] */
} language;

/* Asks for a cache's buffers, of `context` tokens and as `half` says. */
void migi_cache_buffers(kv_cache *cache, buffers *b, const migi_model *m, const workspace *ws);
/* The first `length` tokens of another cache of the same model. */
void migi_cache_copy(const kv_cache *to, const kv_cache *from, const migi_model *m, int length);

void migi_language_buffers(language *l, buffers *b);
/* Row `row` of the next chunk is a token of text, or a cell of a picture: f32[hidden]; it stands at `at` in M-RoPE space. */
void migi_put_token(language *l, int row, int32_t token, const int32_t at[3]);
void migi_put_cell(language *l, int row, const float *embedding, const int32_t at[3]);
/* The rows of a chunk, standing at timeline [first, first + rows), go through all layers; x keeps the result of the last
 * `wanted`. */
migi_status migi_forward(language *l, int first, int rows, int wanted, migi_error *err);
/* logits <- those of rows [row, row + count) of x, count <= MIGI_LOGIT_ROWS. */
migi_status migi_logits_of(language *l, int row, int count, migi_error *err);

#endif
