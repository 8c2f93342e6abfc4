/* internal.h - what every file of the core uses: errors and memory. And the core's map.
 *
 * A -> B: a file of A includes B's header, and with it what that includes. Nothing points back. internal.h is everyone's.
 *
 *   session   -> language vision geometry     the timeline, and the public calls on it
 *   language  -> runner attention             Qwen2: tokens to logits, and the KV cache
 *   vision    -> runner attention geometry    pixels to embeddings
 *   runner    -> model attention              a session's workspace, and the word to stop
 *   model     -> linear                       the tensors that a geometry asks for
 *   attention -> workspace                    softmax(q k^T / sqrt(S)) v
 *   linear    -> weights workspace            y (+)= x w^T + bias
 *   weights   -> kernels                      stored tensors, checked and bound
 *   workspace -> pool                         threads, precision and buffers of products
 *   geometry                                  where pixels and tokens stand
 *   ceilings  -> pool                         what the machine does at most
 *   pool      -> kernels                      threads
 *   kernels                                   a folder: one table for each instruction set
 *
 * Letters: T tokens, P patches, D width of a tower, K inputs and N outputs of a linear map, H heads, S head size.
 */
#ifndef MIGI_INTERNAL_H
#define MIGI_INTERNAL_H

#include "migi.h"

#include <stdbool.h>

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* ---- errors */

migi_status migi_fail(migi_error *err, migi_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

#define TRY(call)                         \
    do {                                  \
        status = (call);                  \
        if (status != MIGI_OK) goto done; \
    } while (0)
#define FAIL_IF(condition, code, ...)                   \
    do {                                                \
        if (condition) {                                \
            status = migi_fail(err, code, __VA_ARGS__); \
            goto done;                                  \
        }                                               \
    } while (0)

/* ---- memory */

/* 64-byte aligned and zeroed; NULL when there is no memory or the size overflows. Freed by free(). */
void *migi_alloc(size_t count, size_t size);

/* The buffers of one owner. One function of the owner asks for them, one after the other: with `counting` it only sums up
 * their bytes, else it makes them, and what it made is freed together. After one that could not be had all are NULL. */
enum { MIGI_MOST_BUFFERS = 16 };
typedef struct buffers {
    bool counting, failed;
    size_t bytes;
    int count;
    void *made[MIGI_MOST_BUFFERS];
} buffers;

void *migi_buffer(buffers *b, size_t count, size_t size); /* zeroed */
/* Not written to: pages take no memory until they are used, so that there may be much more room than is needed. */
void *migi_untouched_buffer(buffers *b, size_t count, size_t size);
void migi_free_buffers(buffers *b);

#endif
