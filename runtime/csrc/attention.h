/* attention.h - softmax(q k^T / sqrt(S)) v, in blocks. */
#ifndef MIGI_ATTENTION_H
#define MIGI_ATTENTION_H

#include "workspace.h"

/* out[T, H * S] = softmax(q k^T / sqrt(S)) v, head by head, in blocks: no T x T buffer. */
typedef struct attention {
    const float *q;
    size_t ldq;        /* from one token to the next; head h at h * size */
    const void *k, *v; /* f32, or IEEE half */
    bool half;
    size_t ldkv;    /* from one token to the next, in elements */
    size_t kv_head; /* from one key/value head to the next */
    float *out;     /* may be q */
    size_t ldo;
    int queries, keys; /* with causal, query i sees keys [0, keys - queries + i] */
    int heads, kv_heads, size;
    bool causal;
    const float *cosine, *sine; /* [keys][size / 2] angles that queries and keys are turned by on their way, or NULL */
    void *panels;               /* with angles, or more than MIGI_FEW_ROWS queries: migi_attention_panels bytes of room */
} attention;

/* Up to MIGI_FEW_ROWS queries are computed each as if it were alone, to the bit. */
void migi_attend(const workspace *ws, const attention *a);
size_t migi_attention_scratch(const migi_kernels *k, int size);
size_t migi_attention_panels(const workspace *ws, int kv_heads, int size, int keys);

#endif
