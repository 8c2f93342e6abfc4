/* linear.c - y (+)= x w^T + bias, shared out over threads by blocks of output columns.
 *
 * Few rows (decode): each worker streams its weight rows once from memory and dots them with every row of x.
 * Many rows (vision, prefill): each worker turns a block of K_BLOCK x N_BLOCK weights into panels that stay in its L1 and
 * L2 caches and multiplies M_BLOCK rows of x at a time with them. Weights are widened or paired while packing, which
 * costs 1 / rows of the products.
 */
#include "internal.h"

#include <string.h>

enum {
    FEW_ROWS = 4,      /* up to here reading the weights costs more than the arithmetic */
    N_BLOCK = 64,      /* output columns of a task; a multiple of every table's nr */
    K_BLOCK_F32 = 256, /* 16 columns x 256 x 4 bytes = 16 KB: half an L1 */
    K_BLOCK_BF16 = 1024,
    M_BLOCK = 192, /* rows x K_BLOCK_F32 x 4 bytes = 196 KB: under an L2 */
};

typedef struct call {
    workspace *ws;
    const linear *jobs;
    int first[MIGI_LINEARS + 1]; /* first task of each map */
    const float *x;
    size_t ldx;
    int rows, block; /* rows of x; columns per task */
    size_t ld_rounded;
} call;

size_t migi_linear_scratch(void)
{
    size_t f32 = (size_t)K_BLOCK_F32 * N_BLOCK * 4, bf16 = (size_t)K_BLOCK_BF16 / 2 * N_BLOCK * 4;
    return f32 > bf16 ? f32 : bf16;
}

static void few_rows(const call *c, const linear *job, int n0, int n)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = job->w;
    for (int r = 0; r < c->rows; r++) {
        float *y = job->y + (size_t)r * job->ldy + n0;
        const float *x = c->x + (size_t)r * c->ldx;
        if (w->dtype == MIGI_BF16)
            k->gemv_bf16(y, (const uint16_t *)w->data + (size_t)n0 * (size_t)w->cols, (size_t)w->cols, x, n, w->cols);
        else
            k->gemv_f32(y, (const float *)w->data + (size_t)n0 * (size_t)w->cols, (size_t)w->cols, x, n, w->cols);
    }
}

static void many_rows_f32(const call *c, const linear *job, int n0, int n, float *panels)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = job->w;
    size_t ldw = (size_t)w->cols;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_F32) {
        int depth = min_int(K_BLOCK_F32, w->cols - k0);
        for (int j = 0; j < n; j += k->nr) {
            size_t at = (size_t)(n0 + j) * ldw + (size_t)k0;
            float *panel = panels + (size_t)j * K_BLOCK_F32;
            if (w->dtype == MIGI_BF16)
                k->pack_bf16(panel, (const uint16_t *)w->data + at, ldw, min_int(k->nr, n - j), depth);
            else
                k->pack_f32(panel, (const float *)w->data + at, ldw, min_int(k->nr, n - j), depth);
        }
        for (int r = 0; r < c->rows; r += M_BLOCK)
            for (int j = 0; j < n; j += k->nr)
                k->gemm_f32(job->y + (size_t)r * job->ldy + n0 + j, job->ldy, c->x + (size_t)r * c->ldx + k0, c->ldx,
                            panels + (size_t)j * K_BLOCK_F32, min_int(M_BLOCK, c->rows - r), min_int(k->nr, n - j), depth);
    }
}

static void many_rows_bf16(const call *c, const linear *job, int n0, int n, uint32_t *panels)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = job->w;
    size_t ldw = (size_t)w->cols;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_BF16) {
        int depth = min_int(K_BLOCK_BF16, w->cols - k0), padded = (int)migi_padded((size_t)depth);
        for (int j = 0; j < n; j += k->nr_bf16)
            k->pack_pairs(panels + (size_t)j * (K_BLOCK_BF16 / 2), (const uint16_t *)w->data + (size_t)(n0 + j) * ldw + (size_t)k0,
                          ldw, min_int(k->nr_bf16, n - j), depth, padded);
        for (int r = 0; r < c->rows; r += M_BLOCK)
            for (int j = 0; j < n; j += k->nr_bf16)
                k->gemm_bf16(job->y + (size_t)r * job->ldy + n0 + j, job->ldy,
                             c->ws->rounded + (size_t)r * c->ld_rounded + k0, c->ld_rounded,
                             panels + (size_t)j * (K_BLOCK_BF16 / 2), min_int(M_BLOCK, c->rows - r),
                             min_int(k->nr_bf16, n - j), padded);
    }
}

static void columns(void *arg, int task, int worker)
{
    const call *c = arg;
    int which = 0;
    while (task >= c->first[which + 1]) which++;
    const linear *job = &c->jobs[which];
    int n0 = (task - c->first[which]) * c->block, n = min_int(c->block, job->w->rows - n0);
    for (int r = 0; r < c->rows && !(job->add && !job->bias); r++) {
        float *y = job->y + (size_t)r * job->ldy + n0;
        if (job->add)
            for (int j = 0; j < n; j++) y[j] += job->bias[n0 + j];
        else if (job->bias)
            memcpy(y, job->bias + n0, (size_t)n * sizeof *y);
        else
            memset(y, 0, (size_t)n * sizeof *y);
    }
    void *panels = c->ws->scratch + (size_t)worker * c->ws->scratch_bytes;
    if (c->rows <= FEW_ROWS)
        few_rows(c, job, n0, n);
    else if (c->ld_rounded && job->w->dtype == MIGI_BF16)
        many_rows_bf16(c, job, n0, n, panels);
    else
        many_rows_f32(c, job, n0, n, panels);
}

static void round_row(void *arg, int row, int worker)
{
    const call *c = arg;
    (void)worker;
    size_t k = (size_t)c->jobs[0].w->cols;
    uint16_t *to = c->ws->rounded + (size_t)row * c->ld_rounded;
    c->ws->k->round_bf16(to, c->x + (size_t)row * c->ldx, k);
    memset(to + k, 0, (c->ld_rounded - k) * sizeof *to);
}

void migi_linears(workspace *ws, const linear *jobs, int count, const float *x, size_t ldx, int rows)
{
    call c = {.ws = ws, .jobs = jobs, .x = x, .ldx = ldx, .rows = rows, .block = N_BLOCK};
    for (int i = 0; i < count; i++)
        c.first[i + 1] = c.first[i] + (jobs[i].w->rows + c.block - 1) / c.block;
    if (rows > FEW_ROWS && ws->bf16) {
        c.ld_rounded = migi_padded((size_t)jobs[0].w->cols);
        if (c.ld_rounded * (size_t)rows > ws->rounded_len) c.ld_rounded = 0; /* callers size it; a safe fallback */
        else migi_pool_run(ws->pool, round_row, &c, rows);
    }
    migi_pool_run(ws->pool, columns, &c, c.first[count]);
}
