/* weights.h - tensors as stored: checked, since a file may be hostile, and bound where they lie. */
#ifndef MIGI_WEIGHTS_H
#define MIGI_WEIGHTS_H

#include "internal.h"

typedef struct matrix {
    const void *data;       /* as stored. BF16, F32: [rows, cols] row-major; I8, U8: the int8 and int4 blocks of kernels.h */
    const uint8_t *factors; /* U8: [rows / 16][cols padded / group][16] */
    const float *scales;    /* I8, U8: [rows padded to 16] */
    migi_dtype dtype;
    int rows, cols, group;
} matrix;

static inline bool is_quantized(const matrix *m) { return m->dtype == MIGI_I8 || m->dtype == MIGI_U8; }

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

#endif
