/* migi_measure.h - what tests, exporters and reports ask of the core beside answers.
 *
 * Answering needs none of it. While migi.h keeps its calls, these may change with any version.
 */
#ifndef MIGI_MEASURE_H
#define MIGI_MEASURE_H

#include "migi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pure functions.
 * patches: f32[(height / patch) * (width / patch), channels * temporal * patch * patch], in merge-block order.
 * positions: i32[3, count] (time, row, column); grids i32[pictures, 2] = rows and columns of merged cells. */
MIGI_API migi_status migi_patchify(const migi_config *config, const uint8_t *rgb, int32_t height, int32_t width, float *patches,
                                   migi_error *err);
MIGI_API migi_status migi_positions(const migi_config *config, const int32_t *tokens, int32_t count, const int32_t *grids, int32_t pictures,
                                    int32_t *positions, migi_error *err);

/* The core's integer product on one quantized matrix, as a session runs it. weight: I8 or U8 as in migi_tensor; factors:
 * its group factors, NULL for I8. x f32[rows, k] becomes int8 row by row: x ~ a * scales[row], a in -127..127.
 * sums: i32[rows, Np], exact; scales: f32[rows]. A row that holds NaN or infinity has the scale NaN. */
MIGI_API migi_status migi_integer_sums(migi_pool *pool, const migi_tensor *weight, const migi_tensor *factors, const float *x, int32_t rows,
                                       int32_t k, int32_t *sums, float *scales, migi_error *err);

/* What this machine does at most with the pool's threads and kernels, each per second: bytes read from memory, operations
 * of float, int8 and bf16 products (a product and its addition are two). bf16_ops is 0 where bf16 is multiplied as float.
 * Takes about 7 * `seconds` and 256 MB. For reports; nothing in the engine asks. */
typedef struct migi_ceilings {
    double read_bytes, f32_ops, int8_ops, bf16_ops;
} migi_ceilings;
MIGI_API migi_status migi_measure_ceilings(migi_pool *pool, double seconds, migi_ceilings *out, migi_error *err);

#ifdef __cplusplus
}
#endif
#endif
