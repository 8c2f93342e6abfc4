/* linear.h - y (+)= x w^T + bias for one matrix or several that share x, and what goes with it: norms before, activation
 * functions and gates after. */
#ifndef MIGI_LINEAR_H
#define MIGI_LINEAR_H

#include "weights.h"
#include "workspace.h"

typedef struct norm {
    float *w, *b; /* b NULL for RMS norms */
} norm;

/* What is multiplied: rows of x[T, K], or those rows normed. */
typedef struct rows_in {
    const float *x;
    size_t ldx;
    int rows;         /* at most MIGI_CHUNK */
    const norm *norm; /* or NULL */
    float eps;
    float *room; /* [T, K] for normed rows that are multiplied as float */
} rows_in;

/* y[T, N] (+)= x[T, K] w[N, K]^T + bias */
typedef struct linear {
    const matrix *w;
    const float *bias; /* [N] or NULL */
    float *y;
    size_t ldy;
    bool add;                      /* y holds a residual to add to */
    void (*then)(float *y, int n); /* what becomes of the outputs of a row in the end, or NULL */
} linear;

enum { MIGI_LINEARS = 3 }; /* linear maps that may share one barrier */

/* Applies up to MIGI_LINEARS maps to the same rows. Up to MIGI_FEW_ROWS rows are computed each as if it were alone, to the
 * bit. */
void migi_linears(const workspace *ws, const linear *jobs, int count, const rows_in *in);
/* gate->y = silu(x gate^T) * (x up^T) */
void migi_gated(const workspace *ws, const linear *gate, const matrix *up, const rows_in *in);
size_t migi_linear_scratch(void);

/* to[r * step_row + i * step_k] <- w[row + r, k + i], r < rows, i < depth, of a quantized matrix. */
void migi_dequantize(const matrix *w, int row, int rows, int k, int depth, float *to, size_t step_row, size_t step_k);

#endif
