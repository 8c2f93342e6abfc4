/* internal.h - what the core's files share: errors, matrices, the structs behind migi.h.
 *
 * Letters: T tokens, P patches, D width of a tower, K inputs and N outputs of a linear map, H heads, S head size.
 */
#ifndef MIGI_INTERNAL_H
#define MIGI_INTERNAL_H

#include "kernels.h"
#include "migi.h"

#include <stdatomic.h>
#include <stdbool.h>

static inline int min_int(int a, int b) { return a < b ? a : b; }

/* ---- errors */

migi_status migi_fail(migi_error *err, migi_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

#define TRY(call)                                        \
    do {                                                 \
        status = (call);                                 \
        if (status != MIGI_OK) goto done;                \
    } while (0)
#define FAIL_IF(condition, code, ...)                    \
    do {                                                 \
        if (condition) {                                 \
            status = migi_fail(err, code, __VA_ARGS__);  \
            goto done;                                   \
        }                                                \
    } while (0)

/* 64-byte aligned and zeroed; NULL when there is no memory or the size overflows. Freed by free(). */
void *migi_alloc(size_t count, size_t size);

/* ---- threads */

/* Runs work(arg, task, worker) for every task in [0, tasks); worker < migi_pool_threads. Returns when all are done. */
typedef void migi_work(void *arg, int task, int worker);
void migi_pool_run(migi_pool *pool, migi_work *work, void *arg, int tasks);
const migi_kernels *migi_pool_kernels(const migi_pool *pool);

/* ---- linear maps */

typedef struct matrix {
    const void *data; /* [rows, cols] row-major, as stored */
    migi_dtype dtype;
    int rows, cols;
} matrix;

/* y[T, N] (+)= x[T, K] w[N, K]^T + bias */
typedef struct linear {
    const matrix *w;
    const float *bias; /* [N] or NULL */
    float *y;
    size_t ldy;
    bool add; /* y holds a residual to add to */
} linear;

/* Where products run: threads, precision, buffers. One per session. */
typedef struct workspace {
    migi_pool *pool;
    const migi_kernels *k;
    bool bf16;          /* activations may be rounded to bf16 */
    uint16_t *rounded;  /* [rows, K padded] */
    size_t rounded_len; /* elements */
    char *scratch;      /* scratch_bytes for each worker */
    size_t scratch_bytes;
} workspace;

enum {
    MIGI_CHUNK = 512,         /* rows of activations a tower carries at a time, but for vision's q, k, v */
    MIGI_LINEARS = 3,         /* linear maps that may share one barrier */
};

/* Applies up to MIGI_LINEARS maps to the same x[T, K]. */
void migi_linears(workspace *ws, const linear *jobs, int count, const float *x, size_t ldx, int rows);
size_t migi_linear_scratch(void);
/* n padded to what bf16 products read. */
static inline size_t migi_padded(size_t n) { return (n + MIGI_K_STEP - 1) / MIGI_K_STEP * MIGI_K_STEP; }

/* ---- attention */

/* out[T, H * S] = softmax(q k^T / sqrt(S)) v, head by head, in blocks: no T x T buffer. */
typedef struct attention {
    const float *q;
    size_t ldq; /* from one token to the next; head h at h * size */
    const float *k, *v;
    size_t ldkv;       /* from one token to the next */
    size_t kv_head;    /* from one key/value head to the next */
    float *out;
    size_t ldo;
    int queries, keys; /* with causal, query i sees keys [0, keys - queries + i] */
    int heads, kv_heads, size;
    bool causal;
} attention;

void migi_attend(workspace *ws, const attention *a);
size_t migi_attention_scratch(const migi_kernels *k, int size);

/* ---- the model */

typedef struct norm { float *w, *b; } norm; /* b NULL for RMS norms */

typedef struct layer {
    norm before_attention, before_mlp;
    matrix q, k, v, o, gate, up, down;
    float *q_bias, *k_bias, *v_bias;
} layer;

typedef struct block {
    norm before_attention, before_mlp;
    matrix qkv, proj, fc1, fc2;
    float *qkv_bias, *proj_bias, *fc1_bias, *fc2_bias;
} block;

struct migi_model {
    migi_config c;
    matrix embedding, head; /* [vocab, hidden] */
    layer *layers;
    norm final;
    matrix patch_embed; /* [v_dim, channels * temporal * patch^2] */
    block *blocks;
    norm merger_norm;
    matrix merger_fc1, merger_fc2;
    float *merger_fc1_bias, *merger_fc2_bias;
    float *owned; /* norms and biases, one allocation */
    int64_t bytes;
};

struct migi_vision {
    uint64_t serial; /* tells pictures apart in the prefix comparison */
    int rows, cols;  /* merged cells */
    int hidden;
    float *embeddings; /* [rows * cols, hidden] */
};

struct migi_session {
    const migi_model *model;
    workspace ws;
    int context, length;
    atomic_int cancelled;
    int (*poll)(void *);
    void *poll_arg;
    float *cache;       /* [layers][k, v][kv_heads][context][head_dim] */
    int32_t *tokens;    /* [context] */
    uint64_t *pictures; /* [context] serial of the picture a token belongs to, 0 for text */
    int32_t *positions; /* [3][context] */
    int32_t next_position;
    bool logits_ready;
    float *x, *h, *q, *gate, *up, *angles, *logits; /* sized in migi_session_new */
    unsigned char *seen;                                 /* [vocab] tokens on the timeline, for the repetition penalty */
};

/* MIGI_E_CANCELLED when the session was told to stop; called between layers. */
migi_status migi_session_checkpoint(migi_session *s, migi_error *err);

#endif
