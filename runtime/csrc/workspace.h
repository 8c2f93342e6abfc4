/* workspace.h - where products run: threads, precision, buffers. */
#ifndef MIGI_WORKSPACE_H
#define MIGI_WORKSPACE_H

#include "pool.h"

enum {
    MIGI_CHUNK = 512,    /* rows of activations a tower carries at a time, but for vision's q, k, v */
    MIGI_FEW_ROWS = 8,   /* up to here reading the weights costs more than the arithmetic; at least MIGI_VERIFY_ROWS */
    MIGI_TILE_ROWS = 48, /* whole tiles on every table */
};

typedef struct workspace {
    migi_pool *pool;
    const migi_kernels *k;
    bool bf16;         /* activations may be rounded to bf16 */
    bool integers;     /* activations of quantized weights become int8 */
    uint16_t *rounded; /* [rows, K padded], rounded_len elements */
    int8_t *quantized; /* [rows, K padded], quantized_len elements */
    float *row_scales; /* [MIGI_CHUNK] of the quantized rows */
    size_t rounded_len, quantized_len;
    char *scratch; /* scratch_bytes for each worker */
    size_t scratch_bytes;
} workspace;

static inline void *worker_scratch(const workspace *ws, int worker) { return ws->scratch + (size_t)worker * ws->scratch_bytes; }

/* Rows in each of the fewest parts of at most `most`, alike in size, in whole tiles: a short last part would take as long to
 * pack weights or keys for as a long one. */
static inline int even_part(int rows, int most)
{
    int parts = (rows + most - 1) / most, part = (rows + parts - 1) / parts;
    return min_int(most, (part + MIGI_TILE_ROWS - 1) / MIGI_TILE_ROWS * MIGI_TILE_ROWS);
}

#endif
