/* migi.h - the C core of Migician on the edge: Qwen2-VL inference on CPUs.
 *
 * The core eats token ids and pixels. Words, picture files and model files stay with the caller.
 *
 *   pool     threads and the kernels chosen for this CPU; shared by any number of sessions, one at a time
 *   model    immutable weights and geometry; shared between threads
 *   session  one timeline: KV cache and buffers; used by one thread at a time
 *   vision   one encoded picture; reusable in any session of the same model
 *
 * Calls that can fail return a migi_status and, when `err` is not NULL, fill it with one line that ends in what to
 * do. On failure *out is NULL. All-zero options mean the defaults. Every free call takes NULL.
 * Calls that only measure and test are in migi_measure.h.
 * OWNED = free it with the named call. BORROWED = valid until the named event. COPIED = yours may die after the call.
 */
#ifndef MIGI_H
#define MIGI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIGI_VERSION "0.2.0"
#if defined(__GNUC__)
#define MIGI_API __attribute__((visibility("default")))
#else
#define MIGI_API
#endif

/* Values are never reused. */
typedef enum migi_status {
    MIGI_OK = 0,
    MIGI_E_ARGUMENT = 1,     /* a value the call cannot take */
    MIGI_E_MODEL = 2,        /* a tensor is missing, or has the wrong shape or type */
    MIGI_E_CONTEXT_FULL = 3, /* more tokens than the session was made for */
    MIGI_E_MEMORY = 4,       /* the system has no memory left */
    MIGI_E_UNSUPPORTED = 5,  /* this CPU or this build cannot do it */
    MIGI_E_CANCELLED = 6,    /* migi_session_cancel or the poll function stopped the work */
    MIGI_E_THREAD = 7,       /* the system gave no thread */
    MIGI_E_NUMERIC = 8       /* a result is NaN or infinite: damaged weights */
} migi_status;

typedef struct migi_error {
    migi_status status;
    char message[240];
} migi_error;

typedef enum migi_dtype { MIGI_BF16 = 1, MIGI_F32 = 2, MIGI_I8 = 3, MIGI_U8 = 4 } migi_dtype;

/* One stored tensor, row-major. name and shape are COPIED; data is BORROWED until migi_model_free (a mapped file); its
 * address suits its type (4 bytes for F32, 2 for BF16).
 *
 * A matrix "P.weight" of N rows and K columns is BF16 or F32 [N, K], or quantized, in blocks of 16 rows (Np = N rounded up
 * to 16, Kp = K rounded up to 64, padding adds nothing):
 *   int8   P.weight I8 [Np / 16, Kp / 4, 16, 4]: [b, j, r, i] = q(16 b + r, 4 j + i)
 *   int4   P.weight U8 [Np / 16, Kp / 8, 16, 4]: [b, j, r, i] = u(16 b + r, 8 j + i) in the low half, u(16 b + r, 8 j + 4 + i)
 *          in the high half; P.weight_group U8 [Np / 16, Kp / group, 16], factors of 1 to 16; q = (u - 8) * factor
 *   both   P.weight_scale F32 [Np], finite and not negative; w = q * scale */
typedef struct migi_tensor {
    const char *name; /* published layout: "model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.bias" */
    const void *data;
    int64_t bytes; /* size of data, checked against dtype and shape */
    int32_t dtype; /* migi_dtype */
    int32_t rank;
    int64_t shape[5];
} migi_tensor;

/* The geometry of one Qwen2-VL model. All sizes count elements. */
typedef struct migi_config {
    /* language model */
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab;
    int32_t tied;             /* 1: the output head is the embedding table */
    int32_t mrope_section[3]; /* rotation planes that turn by time, row, column; sums to head_dim / 2 */
    float rms_eps, rope_theta;
    int32_t image_token; /* the placeholder that a merged picture cell takes in the prompt */
    /* vision encoder */
    int32_t v_depth, v_dim, v_heads, v_mlp, patch, merge, temporal, channels;
    float v_rope_theta;
    float mean[3], std[3]; /* pixel / 255 is normalised by these */
} migi_config;

typedef struct migi_pool migi_pool;
typedef struct migi_model migi_model;
typedef struct migi_session migi_session;
typedef struct migi_vision migi_vision;

/* "0.2.0". BORROWED for ever. */
MIGI_API const char *migi_version(void);

/* Starts `threads` workers (0: one per physical core the process may use) with the kernels named `isa` (NULL: the best
 * this CPU has), of those that migi_kernel_report lists. OWNED: migi_pool_free. */
MIGI_API migi_status migi_pool_new(migi_pool **out, int32_t threads, const char *isa, migi_error *err);
MIGI_API void migi_pool_free(migi_pool *pool);
/* Starts the workers anew in a child process after fork(), where the parent's threads are not; fewer where the system gives
 * no more. Only such a child may call it, from its one thread, before it uses the pool or frees it. */
MIGI_API void migi_pool_restart(migi_pool *pool);
MIGI_API int32_t migi_pool_threads(const migi_pool *pool);
MIGI_API const char *migi_pool_isa(const migi_pool *pool); /* BORROWED from the pool */

/* Writes one line per instruction set, from worst to best: its name, whether this CPU can run it, and which instruction set's
 * functions serve each kind of work. Returns the length needed without the final zero; writes at most size bytes, zero-ended. */
MIGI_API size_t migi_kernel_report(char *text, size_t size);

/* Checks every tensor that `config` asks for and keeps pointers to them. config and the tensor list are COPIED, the
 * weights are BORROWED until migi_model_free; only norms and biases are copied (as float). OWNED: migi_model_free. */
MIGI_API migi_status migi_model_new(migi_model **out, const migi_config *config, const migi_tensor *tensors, size_t count, migi_error *err);
MIGI_API void migi_model_free(migi_model *model);
MIGI_API int64_t migi_model_bytes(const migi_model *model); /* weights in use, mapped and copied */

typedef struct migi_session_options {
    int32_t context;        /* tokens the KV cache holds; 0: 4096 */
    int32_t fp32;           /* 1: activations stay float: no bf16 dot products, quantized weights widened to float, no
                             * integer products, a float KV cache. 0: int8 activations for quantized weights, bf16
                             * ones where the CPU multiplies them faster, a KV cache of half floats */
    int (*poll)(void *arg); /* called on the calling thread between layers; nonzero cancels. May be NULL */
    void *poll_arg;
} migi_session_options;

/* Memory a session would take, in bytes, without making it. */
MIGI_API int64_t migi_session_bytes(const migi_model *model, const migi_pool *pool, const migi_session_options *options);

/* model and pool are BORROWED until migi_session_free. Nothing is allocated after this call but for pictures.
 * OWNED: migi_session_free. */
MIGI_API migi_status migi_session_new(migi_session **out, const migi_model *model, migi_pool *pool, const migi_session_options *options,
                                      migi_error *err);
MIGI_API void migi_session_free(migi_session *session);

/* Stops the work of another thread in this session within one layer; the call there returns MIGI_E_CANCELLED. The
 * session stays usable: what was complete before is kept. */
MIGI_API void migi_session_cancel(migi_session *session);

/* Encodes one picture: rgb u8[height, width, 3], both sides multiples of patch * merge; COPIED. The session lends its
 * threads, precision and cancel flag; its timeline is not touched. OWNED: migi_vision_free. */
MIGI_API migi_status migi_vision_encode(migi_vision **out, migi_session *session, const uint8_t *rgb, int32_t height, int32_t width,
                                        migi_error *err);
MIGI_API void migi_vision_free(migi_vision *vision);
MIGI_API int32_t migi_vision_tokens(const migi_vision *vision);
MIGI_API const float *migi_vision_embeddings(const migi_vision *vision); /* f32[tokens, hidden]; BORROWED from vision */

/* Makes the timeline hold exactly `tokens`, in which runs of image_token stand for the pictures in order. The common
 * prefix with what the session holds is kept but for its last few tokens, the rest is computed; logits of the last token
 * are ready after it. A picture is the same only if it is the same migi_vision.
 * tokens and visions are COPIED or used within the call. */
MIGI_API migi_status migi_session_sync(migi_session *session, const int32_t *tokens, int32_t count, const migi_vision *const *visions,
                                       int32_t pictures, migi_error *err);

/* Appends text tokens to the timeline. With logprobs not NULL, logprobs[i] is the natural log of the probability that
 * the model gave to tokens[i] before reading it (i = 0: by the logits that stood). */
MIGI_API migi_status migi_session_append(migi_session *session, const int32_t *tokens, int32_t count, float *logprobs, migi_error *err);

/* Makes room for `context` tokens; the timeline stays. On failure the session is as it was. */
MIGI_API migi_status migi_session_grow(migi_session *session, int32_t context, migi_error *err);

/* f32[vocab] after the last token; BORROWED until the next call on the session. NULL before the first sync. */
MIGI_API const float *migi_session_logits(const migi_session *session);
MIGI_API int32_t migi_session_length(const migi_session *session); /* tokens on the timeline */
MIGI_API int32_t migi_session_kept(const migi_session *session);   /* tokens that the last sync did not compute again */

/* The most probable next token after the repetition penalty (1: none), which divides positive and multiplies negative
 * logits of every token already on the timeline. *logprob is the natural log of its probability WITHOUT the penalty. */
MIGI_API migi_status migi_session_greedy(migi_session *session, float repetition_penalty, int32_t *token, float *logprob, migi_error *err);

/* Decodes with drafts: tokens[0] is the next token, what follows it guesses, count at most MIGI_VERIFY_ROWS. All go
 * through the model in one pass; tokens[0] stays on the timeline, and each guess for as long as it is the choice after the
 * tokens before it, *kept in all. choices[i] and logprobs[i], i < *kept: what migi_session_greedy says after tokens[i], to
 * the bit, had they been appended one by one. choices[*kept - 1] is the next token, not yet on the timeline. */
enum { MIGI_VERIFY_ROWS = 8 };
MIGI_API migi_status migi_session_verify(migi_session *session, const int32_t *tokens, int32_t count, float repetition_penalty,
                                         int32_t *kept, int32_t *choices, float *logprobs, migi_error *err);

#ifdef __cplusplus
}
#endif
#endif
