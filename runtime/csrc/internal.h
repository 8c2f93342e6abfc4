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

/* Rows in each of the fewest parts of at most `most`, alike in size, whole tiles on every table: a short last part would take
 * as long to pack weights or keys for as a long one. */
enum { MIGI_TILE_ROWS = 48 };
static inline int even_part(int rows, int most)
{
    int parts = (rows + most - 1) / most, part = (rows + parts - 1) / parts;
    return min_int(most, (part + MIGI_TILE_ROWS - 1) / MIGI_TILE_ROWS * MIGI_TILE_ROWS);
}

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
    const void *data;       /* as stored. BF16, F32: [rows, cols] row-major; I8, U8: the int8 and int4 blocks of kernels.h */
    const uint8_t *factors; /* U8: [rows / 16][cols padded / group][16] */
    const float *scales;    /* I8, U8: [rows padded to 16] */
    migi_dtype dtype;
    int rows, cols, group;
} matrix;

static inline bool is_quantized(const matrix *m) { return m->dtype == MIGI_I8 || m->dtype == MIGI_U8; }

/* y[T, N] (+)= x[T, K] w[N, K]^T + bias */
typedef struct linear {
    const matrix *w;
    const float *bias; /* [N] or NULL */
    float *y;
    size_t ldy;
    bool add; /* y holds a residual to add to */
} linear;

typedef struct norm { float *w, *b; } norm; /* b NULL for RMS norms */

/* What is multiplied: rows of x, or those rows normed. */
typedef struct rows_in {
    const float *x; /* [T, K] */
    size_t ldx;
    const norm *norm; /* or NULL */
    float eps;
    float *room; /* [T, K] for normed rows that are multiplied as float */
} rows_in;

/* Where products run: threads, precision, buffers. One per session. */
typedef struct workspace {
    migi_pool *pool;
    const migi_kernels *k;
    bool bf16;            /* activations may be rounded to bf16 */
    bool integers;        /* activations of quantized weights become int8 */
    uint16_t *rounded;    /* [rows, K padded], rounded_len elements */
    int8_t *quantized;    /* [rows, K padded], quantized_len elements */
    float *row_scales;    /* [MIGI_CHUNK] of the quantized rows */
    size_t rounded_len, quantized_len;
    char *scratch;        /* scratch_bytes for each worker */
    size_t scratch_bytes;
} workspace;

enum {
    MIGI_CHUNK = 512,         /* rows of activations a tower carries at a time, but for vision's q, k, v */
    MIGI_LINEARS = 3,         /* linear maps that may share one barrier */
    MIGI_FEW_ROWS = 8,        /* up to here reading the weights costs more than the arithmetic; at least MIGI_VERIFY_ROWS */
};

/* Applies up to MIGI_LINEARS maps to the same x[T, K]. Up to MIGI_FEW_ROWS rows are computed each as if it were alone, to
 * the bit. */
void migi_linears(workspace *ws, const linear *jobs, int count, const float *x, size_t ldx, int rows);
/* The same for rows that may still need their norm; then `then(y, n)` over all outputs, NULL: nothing. */
void migi_linears_of(workspace *ws, const linear *jobs, int count, const rows_in *in, int rows, void (*then)(float *y, int n));
/* gate->y = silu(x gate^T) * (x up^T) */
void migi_gated(workspace *ws, const linear *gate, const matrix *up, const rows_in *in, int rows);
size_t migi_linear_scratch(void);
/* n padded to what bf16 products, and what integer products read. */
static inline size_t migi_padded(const migi_kernels *k, size_t n)
{
    size_t step = (size_t)k->k_bf16;
    return (n + step - 1) / step * step;
}
static inline size_t migi_padded_int8(size_t n) { return (n + MIGI_K_INT8 - 1) / MIGI_K_INT8 * MIGI_K_INT8; }
/* to[r * step_row + i * step_k] <- w[row + r, k + i], r < rows, i < depth, of a quantized matrix. */
void migi_dequantize(const matrix *w, int row, int rows, int k, int depth, float *to, size_t step_row, size_t step_k);

/* ---- attention */

/* out[T, H * S] = softmax(q k^T / sqrt(S)) v, head by head, in blocks: no T x T buffer. */
typedef struct attention {
    const float *q;
    size_t ldq; /* from one token to the next; head h at h * size */
    const void *k, *v; /* f32, or IEEE half */
    bool half;
    size_t ldkv;       /* from one token to the next, in elements */
    size_t kv_head;    /* from one key/value head to the next */
    float *out; /* may be q */
    size_t ldo;
    int queries, keys; /* with causal, query i sees keys [0, keys - queries + i] */
    int heads, kv_heads, size;
    bool causal;
    const float *cosine, *sine; /* [keys][size / 2] angles that queries and keys are turned by on their way, or NULL */
    void *panels; /* with angles, or more than MIGI_FEW_ROWS queries: migi_attention_panels bytes of room */
} attention;

void migi_attend(workspace *ws, const attention *a);
size_t migi_attention_scratch(const migi_kernels *k, int size);
size_t migi_attention_panels(const migi_kernels *k, bool bf16, int kv_heads, int size, int keys);

/* ---- weights as stored: checked, since a file may be hostile, and bound where they lie */

typedef struct finder {
    const migi_tensor **sorted; /* by name */
    size_t count;
    float *next; /* where the next copied vector goes */
    int64_t bytes;
    bool quantized; /* a matrix found so far is */
} finder;

/* Checks every tensor by itself, sorts them and makes room for at most `copies` floats of vectors in *owned (free it). */
migi_status migi_finder_open(finder *f, const migi_tensor *tensors, size_t count, size_t copies, float **owned, migi_error *err);
void migi_finder_close(finder *f);
/* `name` [rows, cols] in any storage; trailing dimensions of an unquantized tensor are taken as one. */
migi_status migi_find_matrix(finder *f, const char *name, int rows, int cols, matrix *m, migi_error *err);
/* `name` [n], copied as float. */
migi_status migi_find_vector(finder *f, const char *name, int n, float **out, migi_error *err);

/* dtype, shape, size and address of one tensor belong together. */
migi_status migi_check_tensor(const migi_tensor *t, migi_error *err);
/* m <- the blocks of a checked I8 or U8 tensor (factors: its companion or NULL), but for the scales. */
migi_status migi_bind_blocks(matrix *m, const migi_tensor *w, const migi_tensor *factors, int rows, int cols, migi_error *err);

/* ---- the model */

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
    bool quantized; /* some matrix is */
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
    int context, length, kept; /* kept: of the last sync's tokens, those that were there before */
    atomic_int cancelled;
    int (*poll)(void *);
    void *poll_arg;
    void *cache;        /* [layers][k, v][kv_heads][context][head_dim] in IEEE half, or f32 */
    bool half;
    void *panels;       /* one layer's keys and values as attention reads them */
    int32_t *tokens;    /* [context] */
    uint64_t *pictures; /* [context] serial of the picture a token belongs to, 0 for text */
    int32_t *positions; /* [3][context] */
    int32_t next_position;
    bool logits_ready;
    float *x, *h, *q, *gated, *angles, *logits; /* sized in migi_session_new */
    float *kv; /* [chunk][k, v][kv_heads][head_dim], on its way to the cache */
    unsigned char *seen;                                 /* [vocab] tokens on the timeline, for the repetition penalty */
};

/* MIGI_E_CANCELLED when the session was told to stop; called between layers. */
migi_status migi_session_checkpoint(migi_session *s, migi_error *err);

#endif
