/* linear.c - y (+)= x w^T + bias, shared out over threads by blocks of output columns.
 *
 * Few rows (decode): each worker streams its weight rows once from memory and dots them with every row of x.
 * Many rows (vision, prefill): each worker turns a block of K_BLOCK x N_BLOCK weights into panels that stay in its L1 and
 * L2 caches and multiplies M_BLOCK rows of x at a time with them. Weights are widened or paired while packing, which
 * costs 1 / rows of the products.
 *
 * Quantized weights are multiplied as integers: rows of x become int8 once for all maps that share them, sums are int32
 * and exact, so they depend on no blocking, thread or instruction set. int8 blocks are read in place; so are int4 blocks by
 * up to as many rows as the table says (i4_rows), beyond which they are expanded to int8, K_BLOCK_INT columns at a time. A
 * norm before the map, bias, scales, gate and activation function work on rows and blocks that are in the cache anyway. A session
 * that keeps activations float turns the weights to float panels instead.
 */
#include "internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    FEW_ROWS = MIGI_FEW_ROWS,
    GEMV_ROWS = 4,     /* of weights, which the vector kernels take together */
    N_BLOCK = 64,      /* output columns of a task; a multiple of every table's nr */
    K_BLOCK_F32 = 256, /* 16 columns x 256 x 4 bytes = 16 KB: half an L1 */
    K_BLOCK_BF16 = 1024,
    M_BLOCK = 192, /* rows x K_BLOCK_F32 x 4 bytes = 196 KB: under an L2 */
    K_BLOCK_INT = 2048, /* 64 columns x 2048 bytes = 128 KB */
    M_BLOCK_INT = 192,
    WIDE_TASK = 1 << 16, /* with few rows, bytes of weights that make a task */
    AHEAD = 12,          /* rows of y that are asked for before they are written, as no prefetcher sees them coming */
};

typedef struct call {
    workspace *ws;
    const linear *jobs;
    int first[MIGI_LINEARS + 1]; /* first task of each map */
    const matrix *up; /* of the one map, where it is gated */
    const rows_in *in;
    const float *x; /* what float products read */
    size_t ldx;
    void (*then)(float *y, int n);
    int rows, block; /* rows of x; columns per task */
    size_t ld_rounded, ld_quantized; /* 0: x is not rounded, not quantized */
} call;

/* A worker's room: columns of a gated map's second half, then what a product needs; integer products keep their sums before
 * the widened weights. */
enum { UP_BYTES = MIGI_CHUNK * N_BLOCK * 4, SUMS_BYTES = MIGI_CHUNK * N_BLOCK * 4 };

size_t migi_linear_scratch(void)
{
    size_t f32 = (size_t)K_BLOCK_F32 * N_BLOCK * 4, bf16 = (size_t)K_BLOCK_BF16 / 2 * N_BLOCK * 4;
    size_t integers = SUMS_BYTES + (size_t)K_BLOCK_INT * N_BLOCK;
    return UP_BYTES + (integers > f32 && integers > bf16 ? integers : f32 > bf16 ? f32 : bf16);
}

/* ---- integer products */

/* Columns widened at a time: as many as fit K_BLOCK_INT in whole groups and whole steps of the product kernel. */
static int block_depth(const matrix *w)
{
    int step = MIGI_K_INT8;
    while (w->dtype == MIGI_U8 && step % w->group) step += MIGI_K_INT8; /* at most 15 times, as groups end at 128 */
    return K_BLOCK_INT / step * step;
}

/* sums[rows, n] = a[rows, Kp] w[n0 .. n0 + n)^T; n0 and n multiples of MIGI_BLOCK. wide: N_BLOCK * K_BLOCK_INT bytes. */
static void sum_columns(const migi_kernels *k, const matrix *w, const int8_t *a, int rows, int n0, int n, int32_t *sums,
                        size_t ld, int8_t *wide)
{
    size_t kp = migi_padded_int8((size_t)w->cols), first = (size_t)n0 / MIGI_BLOCK, line = kp * MIGI_BLOCK;
    size_t groups = w->group ? kp / (size_t)w->group * MIGI_BLOCK : 0;
    int part = even_part(rows, M_BLOCK_INT);
    if (w->dtype == MIGI_U8 && rows <= k->i4_rows) {
        for (int r = 0; r < rows; r++) memset(sums + (size_t)r * ld, 0, (size_t)n * sizeof *sums);
        migi_int4 from = {(const uint8_t *)w->data + first * line / 2, w->factors + first * groups, line / 2, groups, w->group};
        for (int r = 0; r < rows; r += part)
            k->gemm_i4(sums + (size_t)r * ld, ld, a + (size_t)r * kp, kp, &from, min_int(part, rows - r), n, (int)kp);
        return;
    }
    int step = block_depth(w);
    for (int k0 = 0; k0 < (int)kp; k0 += step) {
        int depth = min_int(step, (int)kp - k0);
        size_t at = (size_t)k0 * MIGI_BLOCK, ldw = w->dtype == MIGI_I8 ? line : (size_t)step * MIGI_BLOCK;
        for (size_t b = 0; w->dtype == MIGI_U8 && b < (size_t)n / MIGI_BLOCK; b++)
            k->expand_i4(wide + b * ldw, (const uint8_t *)w->data + ((first + b) * line + at) / 2,
                         w->factors + (first + b) * groups + at / (size_t)w->group, w->group, depth);
        const int8_t *from = w->dtype == MIGI_I8 ? (const int8_t *)w->data + first * line + at : wide;
        for (int r = 0; r < rows; r += part)
            k->gemm_i8(sums + (size_t)r * ld, ld, a + (size_t)r * kp + k0, kp, from, ldw, min_int(part, rows - r), n, depth, k0 > 0);
    }
}

/* In what follows `some` is a map from its column n0 on: its y and bias begin there. */

static void integer_columns(const call *c, const linear *some, int n0, int n, char *scratch)
{
    int32_t *sums = (int32_t *)(void *)scratch;
    int whole = (n + MIGI_BLOCK - 1) / MIGI_BLOCK * MIGI_BLOCK;
    sum_columns(c->ws->k, some->w, c->ws->quantized, c->rows, n0, whole, sums, N_BLOCK, (int8_t *)scratch + SUMS_BYTES);
    const float *scales = some->w->scales + n0;
    for (int r = 0; r < c->rows; r++) {
        float *y = some->y + (size_t)r * some->ldy;
        const int32_t *sum = sums + (size_t)r * N_BLOCK;
        for (int j = 0; j < n && r + AHEAD < c->rows; j += 16) __builtin_prefetch(y + AHEAD * some->ldy + j, 1);
        (some->add ? c->ws->k->add_scaled : c->ws->k->put_scaled)(y, sum, c->ws->row_scales[r], scales, some->bias, n);
        if (c->then) c->then(y, n);
    }
}

/* A row as it is multiplied: where it lies, or made in `room`. */
static const float *ready_row(const call *c, int row, float *room)
{
    const rows_in *in = c->in;
    const migi_kernels *k = c->ws->k;
    const float *x = in->x + (size_t)row * in->ldx;
    int n = c->jobs[0].w->cols;
    if (in->norm && in->norm->b)
        k->layer_norm(room, x, in->norm->w, in->norm->b, n, in->eps);
    else if (in->norm)
        k->rms_norm(room, x, in->norm->w, n, in->eps);
    else
        return x;
    return room;
}

static void row_to_room(void *arg, int row, int worker)
{
    const call *c = arg;
    (void)worker;
    ready_row(c, row, c->in->room + (size_t)row * (size_t)c->jobs[0].w->cols);
}

static void quantize_row(void *arg, int row, int worker)
{
    const call *c = arg;
    const workspace *ws = c->ws;
    const float *x = c->x ? c->x + (size_t)row * c->ldx : NULL;
    if (!x) /* made on the way, where it stays in the cache */
        x = ready_row(c, row, (float *)(void *)(ws->scratch + (size_t)worker * ws->scratch_bytes));
    ws->row_scales[row] = ws->k->quantize_i8(ws->quantized + (size_t)row * c->ld_quantized, x, c->jobs[0].w->cols, (int)c->ld_quantized);
}

/* ---- quantized weights as float */

static inline int stored(const matrix *w, int row, int k)
{
    size_t kp = migi_padded_int8((size_t)w->cols), b = (size_t)row / MIGI_BLOCK, r = (size_t)row % MIGI_BLOCK, i = (size_t)k;
    if (w->dtype == MIGI_I8) return ((const int8_t *)w->data)[b * kp * MIGI_BLOCK + (i / 4 * MIGI_BLOCK + r) * 4 + i % 4];
    int pair = ((const uint8_t *)w->data)[b * kp / 2 * MIGI_BLOCK + (i / 8 * MIGI_BLOCK + r) * 4 + i % 4];
    size_t groups = kp / (size_t)w->group;
    return ((i % 8 < 4 ? pair & 15 : pair >> 4) - 8) * w->factors[(b * groups + i / (size_t)w->group) * MIGI_BLOCK + r];
}

void migi_dequantize(const matrix *w, int row, int rows, int k, int depth, float *to, size_t step_row, size_t step_k)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < depth; i++)
            to[(size_t)r * step_row + (size_t)i * step_k] = (float)stored(w, row + r, k + i) * w->scales[row + r];
}

static void few_rows_widened(const call *c, const linear *some, int n0, int n, float *wide)
{
    for (int k0 = 0; k0 < some->w->cols; k0 += K_BLOCK_F32) {
        int depth = min_int(K_BLOCK_F32, some->w->cols - k0);
        migi_dequantize(some->w, n0, n, k0, depth, wide, K_BLOCK_F32, 1);
        for (int r = 0; r < c->rows; r++)
            c->ws->k->gemv_f32(some->y + (size_t)r * some->ldy, wide, K_BLOCK_F32, c->x + (size_t)r * c->ldx + k0, n, depth);
    }
}

/* ---- float products */

/* f32 panel <- weights [row, row + rows) x [k, k + depth) of any storage */
static void pack(const migi_kernels *k, const matrix *w, int row, int rows, int k0, int depth, float *panel)
{
    size_t ldw = (size_t)w->cols, at = (size_t)row * ldw + (size_t)k0;
    if (w->dtype == MIGI_BF16) k->pack_bf16(panel, (const uint16_t *)w->data + at, ldw, rows, depth);
    else if (w->dtype == MIGI_F32) k->pack_f32(panel, (const float *)w->data + at, ldw, rows, depth);
    else {
        memset(panel, 0, (size_t)depth * (size_t)k->nr * sizeof *panel);
        migi_dequantize(w, row, rows, k0, depth, panel, 1, (size_t)k->nr);
    }
}

static void few_rows(const call *c, const linear *some, int n0, int n)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = some->w;
    size_t ldw = (size_t)w->cols;
    int step = c->rows > 1 ? GEMV_ROWS : n; /* weights come from memory once, from a cache for every further row of x */
    for (int j = 0; j < n; j += step)
        for (int r = 0; r < c->rows; r++) {
            float *y = some->y + (size_t)r * some->ldy + j;
            const float *x = c->x + (size_t)r * c->ldx;
            size_t at = (size_t)(n0 + j) * ldw;
            if (w->dtype == MIGI_BF16)
                k->gemv_bf16(y, (const uint16_t *)w->data + at, ldw, x, min_int(step, n - j), w->cols);
            else
                k->gemv_f32(y, (const float *)w->data + at, ldw, x, min_int(step, n - j), w->cols);
        }
}

static void many_rows_f32(const call *c, const linear *some, int n0, int n, float *panels)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = some->w;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_F32) {
        int depth = min_int(K_BLOCK_F32, w->cols - k0);
        for (int j = 0; j < n; j += k->nr)
            pack(k, w, n0 + j, min_int(k->nr, n - j), k0, depth, panels + (size_t)j * K_BLOCK_F32);
        for (int r = 0; r < c->rows; r += M_BLOCK)
            k->gemm_f32(some->y + (size_t)r * some->ldy, some->ldy, c->x + (size_t)r * c->ldx + k0, c->ldx, panels,
                        (size_t)k->nr * K_BLOCK_F32, min_int(M_BLOCK, c->rows - r), n, depth, 1);
    }
}

static void many_rows_bf16(const call *c, const linear *some, int n0, int n, uint32_t *panels)
{
    const migi_kernels *k = c->ws->k;
    const matrix *w = some->w;
    size_t ldw = (size_t)w->cols;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_BF16) {
        int depth = min_int(K_BLOCK_BF16, w->cols - k0), padded = (int)migi_padded(k, (size_t)depth);
        for (int j = 0; j < n; j += k->nr_bf16)
            k->pack_pairs(panels + (size_t)j * (K_BLOCK_BF16 / 2), (const uint16_t *)w->data + (size_t)(n0 + j) * ldw + (size_t)k0,
                          ldw, min_int(k->nr_bf16, n - j), depth, padded);
        for (int r = 0; r < c->rows; r += M_BLOCK)
            k->gemm_bf16(some->y + (size_t)r * some->ldy, some->ldy, c->ws->rounded + (size_t)r * c->ld_rounded + k0, c->ld_rounded,
                         panels, (size_t)k->nr_bf16 * (K_BLOCK_BF16 / 2), min_int(M_BLOCK, c->rows - r), n, padded, 1);
    }
}

static void product(const call *c, const linear *some, int n0, int n, void *scratch)
{
    const matrix *w = some->w;
    if (c->ld_quantized && is_quantized(w)) {
        integer_columns(c, some, n0, n, scratch);
        return;
    }
    for (int r = 0; r < c->rows; r++) {
        float *y = some->y + (size_t)r * some->ldy;
        if (some->add)
            for (int j = 0; j < n && some->bias; j++) y[j] += some->bias[j];
        else if (some->bias)
            memcpy(y, some->bias, (size_t)n * sizeof *y);
        else
            memset(y, 0, (size_t)n * sizeof *y);
    }
    if (c->rows <= FEW_ROWS && is_quantized(w))
        few_rows_widened(c, some, n0, n, scratch);
    else if (c->rows <= FEW_ROWS)
        few_rows(c, some, n0, n);
    else if (c->ld_rounded && w->dtype == MIGI_BF16)
        many_rows_bf16(c, some, n0, n, scratch);
    else
        many_rows_f32(c, some, n0, n, scratch);
    for (int r = 0; r < c->rows && c->then; r++) c->then(some->y + (size_t)r * some->ldy, n);
}

static void columns(void *arg, int task, int worker)
{
    const call *c = arg;
    int which = 0;
    while (task >= c->first[which + 1]) which++;
    const linear *job = &c->jobs[which];
    int n0 = (task - c->first[which]) * c->block, n = min_int(c->block, job->w->rows - n0);
    char *scratch = c->ws->scratch + (size_t)worker * c->ws->scratch_bytes;
    linear some = {job->w, job->bias ? job->bias + n0 : NULL, job->y + n0, job->ldy, job->add};
    linear other = {c->up, NULL, (float *)(void *)scratch, N_BLOCK, false};
    product(c, &some, n0, n, scratch + UP_BYTES);
    if (!c->up) return;
    product(c, &other, n0, n, scratch + UP_BYTES);
    for (int r = 0; r < c->rows; r++)
        c->ws->k->silu_mul(some.y + (size_t)r * some.ldy, other.y + (size_t)r * other.ldy, n);
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

/* Columns of a task: with few rows as many as are WIDE_TASK bytes of weights, so that no thread waits long for the last. */
static int task_columns(const linear *jobs, int rows)
{
    const matrix *w = jobs[0].w;
    size_t row_bytes = (size_t)w->cols * (w->dtype == MIGI_F32 ? 8 : w->dtype == MIGI_BF16 ? 4 : w->dtype == MIGI_I8 ? 2 : 1) / 2;
    int n = N_BLOCK;
    while (rows <= FEW_ROWS && n > MIGI_BLOCK && row_bytes * (size_t)n > WIDE_TASK) n /= 2;
    return n;
}

static void run(call *c, int count)
{
    workspace *ws = c->ws;
    const rows_in *in = c->in;
    bool any_bf16 = false, any_integers = false, any_floats = false;
    c->block = task_columns(c->jobs, c->rows);
    for (int i = 0; i < count + (c->up != NULL); i++) {
        const matrix *w = i < count ? c->jobs[i].w : c->up;
        bool integers = ws->integers && is_quantized(w);
        if (i < count) c->first[i + 1] = c->first[i] + (w->rows + c->block - 1) / c->block;
        any_bf16 |= w->dtype == MIGI_BF16;
        any_integers |= integers;
        any_floats |= !integers;
    }
    size_t cols = (size_t)c->jobs[0].w->cols;
    assert(c->rows <= MIGI_CHUNK);
    if (!in->norm)
        c->x = in->x, c->ldx = in->ldx;
    else if (any_floats || cols * sizeof(float) > ws->scratch_bytes) {
        migi_pool_run(ws->pool, row_to_room, c, c->rows);
        c->x = in->room, c->ldx = cols;
    }
    if (c->rows > FEW_ROWS && ws->bf16 && any_bf16) {
        c->ld_rounded = migi_padded(ws->k, cols);
        assert(c->ld_rounded * (size_t)c->rows <= ws->rounded_len);
        migi_pool_run(ws->pool, round_row, c, c->rows);
    }
    if (any_integers) {
        c->ld_quantized = migi_padded_int8(cols);
        assert(c->ld_quantized * (size_t)c->rows <= ws->quantized_len);
        migi_pool_run(ws->pool, quantize_row, c, c->rows);
    }
    migi_pool_run(ws->pool, columns, c, c->first[count]);
}

void migi_linears_of(workspace *ws, const linear *jobs, int count, const rows_in *in, int rows, void (*then)(float *y, int n))
{
    run(&(call){.ws = ws, .jobs = jobs, .in = in, .rows = rows, .then = then}, count);
}

void migi_linears(workspace *ws, const linear *jobs, int count, const float *x, size_t ldx, int rows)
{
    migi_linears_of(ws, jobs, count, &(rows_in){.x = x, .ldx = ldx}, rows, NULL);
}

void migi_gated(workspace *ws, const linear *gate, const matrix *up, const rows_in *in, int rows)
{
    run(&(call){.ws = ws, .jobs = gate, .up = up, .in = in, .rows = rows}, 1);
}

/* ---- the integer path alone */

typedef struct sums_call {
    call c; /* no jobs' outputs: sums go to the caller */
    matrix w;
    int32_t *sums;
} sums_call;

static void caller_sums(void *arg, int task, int worker)
{
    const sums_call *s = arg;
    const workspace *ws = s->c.ws;
    int n0 = task * N_BLOCK, n = min_int(N_BLOCK, s->w.rows - n0);
    sum_columns(ws->k, &s->w, ws->quantized, s->c.rows, n0, n, s->sums + n0, (size_t)s->w.rows,
                (int8_t *)ws->scratch + (size_t)worker * ws->scratch_bytes);
}

static void caller_row(void *arg, int row, int worker)
{
    sums_call *s = arg;
    quantize_row(&s->c, row, worker);
}

migi_status migi_integer_sums(migi_pool *pool, const migi_tensor *weight, const migi_tensor *factors, const float *x, int32_t rows,
                              int32_t k, int32_t *sums, float *scales, migi_error *err)
{
    migi_status status = MIGI_OK;
    workspace ws = {.pool = pool, .k = migi_pool_kernels(pool), .integers = true, .row_scales = scales,
                    .scratch_bytes = (size_t)K_BLOCK_INT * N_BLOCK};
    sums_call s = {.sums = sums};
    TRY(migi_check_tensor(weight, err));
    if (factors) TRY(migi_check_tensor(factors, err));
    FAIL_IF(weight->dtype != MIGI_I8 && weight->dtype != MIGI_U8, MIGI_E_ARGUMENT, "tensor %.100s is not quantized; give int8 or int4",
            weight->name);
    FAIL_IF(rows < 1 || k < 1, MIGI_E_ARGUMENT, "x has %d rows of %d; give at least one of each", rows, k);
    FAIL_IF(weight->rank < 1 || weight->shape[0] < 1 || weight->shape[0] > INT32_MAX / N_BLOCK, MIGI_E_ARGUMENT,
            "tensor %.100s has no rows, or too many; give a matrix", weight->name);
    TRY(migi_bind_blocks(&s.w, weight, factors, (int)weight->shape[0] * MIGI_BLOCK, k, err));
    linear job = {.w = &s.w};
    s.c = (call){.ws = &ws, .jobs = &job, .x = x, .ldx = (size_t)k, .rows = rows, .ld_quantized = migi_padded_int8((size_t)k)};
    ws.quantized = migi_alloc((size_t)rows, s.c.ld_quantized);
    ws.scratch = migi_alloc(ws.scratch_bytes, (size_t)migi_pool_threads(pool));
    FAIL_IF(!ws.quantized || !ws.scratch, MIGI_E_MEMORY, "no memory for %d rows of %d; give fewer", rows, k);
    migi_pool_run(pool, caller_row, &s, rows);
    migi_pool_run(pool, caller_sums, &s, (s.w.rows + N_BLOCK - 1) / N_BLOCK);
done:
    free(ws.quantized);
    free(ws.scratch);
    return status;
}
