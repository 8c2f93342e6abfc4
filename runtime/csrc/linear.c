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
#include "linear.h"
#include "migi_measure.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    FEW_ROWS = MIGI_FEW_ROWS,
    GEMV_ROWS = 4,     /* of weights, which the vector kernels take together */
    N_BLOCK = 64,      /* output columns of a task; a multiple of every table's nr */
    K_BLOCK_F32 = 256, /* 16 columns x 256 x 4 bytes = 16 KB: half an L1 */
    K_BLOCK_BF16 = 1024,
    M_BLOCK = 192,      /* rows x K_BLOCK_F32 x 4 bytes = 196 KB: under an L2 */
    K_BLOCK_INT = 2048, /* 64 columns x 2048 bytes = 128 KB */
    M_BLOCK_INT = 192,
    WIDE_TASK = 1 << 16, /* with few rows, bytes of weights that make a task */
    Y_AHEAD = 12,        /* rows of y that are asked for before they are written, as no prefetcher sees them coming */
};

/* A worker's room: columns of a gated map's second half, then what a product needs; integer products keep their sums before
 * the widened weights. */
enum { UP_BYTES = MIGI_CHUNK * N_BLOCK * 4, SUMS_BYTES = MIGI_CHUNK * N_BLOCK * 4 };

size_t migi_linear_scratch(void)
{
    size_t f32 = (size_t)K_BLOCK_F32 * N_BLOCK * 4, bf16 = (size_t)K_BLOCK_BF16 / 2 * N_BLOCK * 4;
    size_t integers = SUMS_BYTES + (size_t)K_BLOCK_INT * N_BLOCK;
    return UP_BYTES + (integers > f32 && integers > bf16 ? integers : f32 > bf16 ? f32 : bf16);
}

/* ---- rows made ready: normed, rounded, turned to integers, once for all maps that share them */

/* As what a map reads its rows. */
typedef enum form { AS_FLOAT, AS_BF16, AS_INT8 } form;

static form form_of(const workspace *ws, const matrix *w, int rows)
{
    if (is_quantized(w)) return ws->integers ? AS_INT8 : AS_FLOAT;
    return ws->bf16 && w->dtype == MIGI_BF16 && rows > FEW_ROWS ? AS_BF16 : AS_FLOAT;
}

/* Rows of K values in every form that was asked for. */
typedef struct operand {
    int rows, cols;
    const float *x;
    uint16_t *rounded;
    int8_t *quantized; /* x ~ quantized * scales[row] */
    float *scales;
    size_t ldx, ld_rounded, ld_quantized; /* from one row to the next; padded with zeros */
} operand;

typedef struct preparation {
    const workspace *ws;
    const rows_in *in;
    operand o;
} preparation;

static void norm_row(const preparation *p, int row, float *to)
{
    const rows_in *in = p->in;
    const float *x = in->x + (size_t)row * in->ldx;
    if (in->norm->b) p->ws->k->layer_norm(to, x, in->norm->w, in->norm->b, p->o.cols, in->eps);
    else p->ws->k->rms_norm(to, x, in->norm->w, p->o.cols, in->eps);
}

static void norm_to_room(void *arg, int row, int worker)
{
    const preparation *p = arg;
    (void)worker;
    norm_row(p, row, p->in->room + (size_t)row * (size_t)p->o.cols);
}

static void round_row(void *arg, int row, int worker)
{
    const preparation *p = arg;
    const operand *o = &p->o;
    uint16_t *to = o->rounded + (size_t)row * o->ld_rounded;
    size_t k = (size_t)o->cols;
    (void)worker;
    p->ws->k->round_bf16(to, o->x + (size_t)row * o->ldx, k);
    memset(to + k, 0, (o->ld_rounded - k) * sizeof *to);
}

static void quantize(const preparation *p, int row, const float *x)
{
    const operand *o = &p->o;
    o->scales[row] = p->ws->k->quantize_i8(o->quantized + (size_t)row * o->ld_quantized, x, o->cols, (int)o->ld_quantized);
}

static void quantize_row(void *arg, int row, int worker)
{
    const preparation *p = arg;
    (void)worker;
    quantize(p, row, p->o.x + (size_t)row * p->o.ldx);
}

/* The normed row is made on the way, where it stays in the cache. */
static void norm_and_quantize_row(void *arg, int row, int worker)
{
    const preparation *p = arg;
    float *x = worker_scratch(p->ws, worker);
    norm_row(p, row, x);
    quantize(p, row, x);
}

/* forms: a bit for each that is needed. */
static operand prepare(const workspace *ws, const rows_in *in, int cols, unsigned forms)
{
    preparation p = {.ws = ws,
                     .in = in,
                     .o = {.rows = in->rows,
                           .cols = cols,
                           .x = in->x,
                           .ldx = in->ldx,
                           .rounded = ws->rounded,
                           .ld_rounded = migi_padded(ws->k, (size_t)cols),
                           .quantized = ws->quantized,
                           .scales = ws->row_scales,
                           .ld_quantized = migi_padded_int8((size_t)cols)}};
    bool on_the_way = in->norm && forms == 1u << AS_INT8 && (size_t)cols * sizeof(float) <= ws->scratch_bytes;
    if (in->norm && !on_the_way) {
        migi_pool_run(ws->pool, norm_to_room, &p, in->rows);
        p.o.x = in->room, p.o.ldx = (size_t)cols;
    }
    if (forms >> AS_BF16 & 1) {
        assert(p.o.ld_rounded * (size_t)in->rows <= ws->rounded_len);
        migi_pool_run(ws->pool, round_row, &p, in->rows);
    }
    if (forms >> AS_INT8 & 1) {
        assert(p.o.ld_quantized * (size_t)in->rows <= ws->quantized_len);
        migi_pool_run(ws->pool, on_the_way ? norm_and_quantize_row : quantize_row, &p, in->rows);
    }
    return p.o;
}

/* ---- integer products */

/* Columns widened at a time: as many as fit K_BLOCK_INT in whole groups and whole steps of the product kernel. */
static int block_depth(const matrix *w)
{
    int step = MIGI_K_INT8;
    while (w->dtype == MIGI_U8 && step % w->group) step += MIGI_K_INT8; /* at most 15 times, as groups end at 128 */
    return K_BLOCK_INT / step * step;
}

/* sums[T, n] = quantized[T, Kp] w[n0 .. n0 + n)^T; n0 and n multiples of MIGI_BLOCK. wide: N_BLOCK * K_BLOCK_INT bytes. */
static void sum_columns(const migi_kernels *k, const matrix *w, const operand *in, int n0, int n, int32_t *sums, size_t ld, int8_t *wide)
{
    int rows = in->rows;
    const int8_t *a = in->quantized;
    size_t kp = in->ld_quantized, first = (size_t)n0 / MIGI_BLOCK, line = kp * MIGI_BLOCK;
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

static void integer_columns(const workspace *ws, const operand *in, const linear *some, int n0, int n, char *scratch)
{
    int32_t *sums = (int32_t *)(void *)scratch;
    int whole = (n + MIGI_BLOCK - 1) / MIGI_BLOCK * MIGI_BLOCK;
    sum_columns(ws->k, some->w, in, n0, whole, sums, N_BLOCK, (int8_t *)scratch + SUMS_BYTES);
    const float *scales = some->w->scales + n0;
    for (int r = 0; r < in->rows; r++) {
        float *y = some->y + (size_t)r * some->ldy;
        const int32_t *sum = sums + (size_t)r * N_BLOCK;
        for (int j = 0; j < n && r + Y_AHEAD < in->rows; j += 16) __builtin_prefetch(y + Y_AHEAD * some->ldy + j, 1);
        (some->add ? ws->k->add_scaled : ws->k->put_scaled)(y, sum, in->scales[r], scales, some->bias, n);
        if (some->then) some->then(y, n);
    }
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

static void few_rows_widened(const migi_kernels *k, const operand *in, const linear *some, int n0, int n, float *wide)
{
    for (int k0 = 0; k0 < some->w->cols; k0 += K_BLOCK_F32) {
        int depth = min_int(K_BLOCK_F32, some->w->cols - k0);
        migi_dequantize(some->w, n0, n, k0, depth, wide, K_BLOCK_F32, 1);
        for (int r = 0; r < in->rows; r++)
            k->gemv_f32(some->y + (size_t)r * some->ldy, wide, K_BLOCK_F32, in->x + (size_t)r * in->ldx + k0, n, depth);
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

static void few_rows(const migi_kernels *k, const operand *in, const linear *some, int n0, int n)
{
    const matrix *w = some->w;
    size_t ldw = (size_t)w->cols;
    int step = in->rows > 1 ? GEMV_ROWS : n; /* weights come from memory once, from a cache for every further row of x */
    for (int j = 0; j < n; j += step)
        for (int r = 0; r < in->rows; r++) {
            float *y = some->y + (size_t)r * some->ldy + j;
            const float *x = in->x + (size_t)r * in->ldx;
            size_t at = (size_t)(n0 + j) * ldw;
            if (w->dtype == MIGI_BF16) k->gemv_bf16(y, (const uint16_t *)w->data + at, ldw, x, min_int(step, n - j), w->cols);
            else k->gemv_f32(y, (const float *)w->data + at, ldw, x, min_int(step, n - j), w->cols);
        }
}

static void many_rows_f32(const migi_kernels *k, const operand *in, const linear *some, int n0, int n, float *panels)
{
    const matrix *w = some->w;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_F32) {
        int depth = min_int(K_BLOCK_F32, w->cols - k0);
        for (int j = 0; j < n; j += k->nr) pack(k, w, n0 + j, min_int(k->nr, n - j), k0, depth, panels + (size_t)j * K_BLOCK_F32);
        for (int r = 0; r < in->rows; r += M_BLOCK)
            k->gemm_f32(some->y + (size_t)r * some->ldy, some->ldy, in->x + (size_t)r * in->ldx + k0, in->ldx, panels,
                        (size_t)k->nr * K_BLOCK_F32, min_int(M_BLOCK, in->rows - r), n, depth, 1);
    }
}

static void many_rows_bf16(const migi_kernels *k, const operand *in, const linear *some, int n0, int n, uint32_t *panels)
{
    const matrix *w = some->w;
    size_t ldw = (size_t)w->cols;
    for (int k0 = 0; k0 < w->cols; k0 += K_BLOCK_BF16) {
        int depth = min_int(K_BLOCK_BF16, w->cols - k0), padded = (int)migi_padded(k, (size_t)depth);
        for (int j = 0; j < n; j += k->nr_bf16)
            k->pack_pairs(panels + (size_t)j * (K_BLOCK_BF16 / 2), (const uint16_t *)w->data + (size_t)(n0 + j) * ldw + (size_t)k0, ldw,
                          min_int(k->nr_bf16, n - j), depth, padded);
        for (int r = 0; r < in->rows; r += M_BLOCK)
            k->gemm_bf16(some->y + (size_t)r * some->ldy, some->ldy, in->rounded + (size_t)r * in->ld_rounded + k0, in->ld_rounded, panels,
                         (size_t)k->nr_bf16 * (K_BLOCK_BF16 / 2), min_int(M_BLOCK, in->rows - r), n, padded, 1);
    }
}

static void start_with_bias(const linear *some, int rows, int n)
{
    for (int r = 0; r < rows; r++) {
        float *y = some->y + (size_t)r * some->ldy;
        if (some->add)
            for (int j = 0; j < n && some->bias; j++) y[j] += some->bias[j];
        else if (some->bias) memcpy(y, some->bias, (size_t)n * sizeof *y);
        else memset(y, 0, (size_t)n * sizeof *y);
    }
}

/* Columns [n0, n0 + n) of a map. */
static void multiply(const workspace *ws, const operand *in, const linear *some, int n0, int n, void *scratch)
{
    form as = form_of(ws, some->w, in->rows);
    if (as == AS_INT8) {
        integer_columns(ws, in, some, n0, n, scratch);
        return;
    }
    start_with_bias(some, in->rows, n);
    if (as == AS_BF16) many_rows_bf16(ws->k, in, some, n0, n, scratch);
    else if (in->rows > FEW_ROWS) many_rows_f32(ws->k, in, some, n0, n, scratch);
    else if (is_quantized(some->w)) few_rows_widened(ws->k, in, some, n0, n, scratch);
    else few_rows(ws->k, in, some, n0, n);
    for (int r = 0; r < in->rows && some->then; r++) some->then(some->y + (size_t)r * some->ldy, n);
}

/* ---- tasks: blocks of output columns */

typedef struct linear_call {
    const workspace *ws;
    const operand *in;
    const linear *jobs;
    int first[MIGI_LINEARS + 1]; /* first task of each map */
    int block;                   /* columns per task */
} linear_call;

/* A map from its column n0 on. */
static linear from_column(const linear *job, int n0)
{
    linear some = *job;
    some.y += n0;
    if (some.bias) some.bias += n0;
    return some;
}

static void columns(void *arg, int task, int worker)
{
    const linear_call *c = arg;
    int which = 0;
    while (task >= c->first[which + 1]) which++;
    int n0 = (task - c->first[which]) * c->block, n = min_int(c->block, c->jobs[which].w->rows - n0);
    linear some = from_column(&c->jobs[which], n0);
    multiply(c->ws, c->in, &some, n0, n, (char *)worker_scratch(c->ws, worker) + UP_BYTES);
}

typedef struct gated_call {
    const workspace *ws;
    const operand *in;
    const linear *gate;
    const matrix *up;
    int block;
} gated_call;

static void gated_columns(void *arg, int task, int worker)
{
    const gated_call *c = arg;
    char *scratch = worker_scratch(c->ws, worker);
    int n0 = task * c->block, n = min_int(c->block, c->up->rows - n0);
    linear gate = from_column(c->gate, n0), up = {.w = c->up, .y = (float *)(void *)scratch, .ldy = N_BLOCK};
    multiply(c->ws, c->in, &gate, n0, n, scratch + UP_BYTES);
    multiply(c->ws, c->in, &up, n0, n, scratch + UP_BYTES);
    for (int r = 0; r < c->in->rows; r++) c->ws->k->silu_mul(gate.y + (size_t)r * gate.ldy, up.y + (size_t)r * up.ldy, n);
}

/* Columns of a task: with few rows as many as are WIDE_TASK bytes of weights, so that no thread waits long for the last. */
static int task_columns(const matrix *w, int rows)
{
    size_t row_bytes = (size_t)w->cols * (w->dtype == MIGI_F32 ? 8 : w->dtype == MIGI_BF16 ? 4 : w->dtype == MIGI_I8 ? 2 : 1) / 2;
    int n = N_BLOCK;
    while (rows <= FEW_ROWS && n > MIGI_BLOCK && row_bytes * (size_t)n > WIDE_TASK) n /= 2;
    return n;
}

void migi_linears(const workspace *ws, const linear *jobs, int count, const rows_in *in)
{
    linear_call c = {.ws = ws, .jobs = jobs, .block = task_columns(jobs[0].w, in->rows)};
    unsigned forms = 0;
    assert(in->rows <= MIGI_CHUNK);
    for (int i = 0; i < count; i++) {
        c.first[i + 1] = c.first[i] + (jobs[i].w->rows + c.block - 1) / c.block;
        forms |= 1u << form_of(ws, jobs[i].w, in->rows);
    }
    operand ready = prepare(ws, in, jobs[0].w->cols, forms);
    c.in = &ready;
    migi_pool_run(ws->pool, columns, &c, c.first[count]);
}

void migi_gated(const workspace *ws, const linear *gate, const matrix *up, const rows_in *in)
{
    gated_call c = {.ws = ws, .gate = gate, .up = up, .block = task_columns(gate->w, in->rows)};
    assert(in->rows <= MIGI_CHUNK);
    operand ready = prepare(ws, in, up->cols, 1u << form_of(ws, gate->w, in->rows) | 1u << form_of(ws, up, in->rows));
    c.in = &ready;
    migi_pool_run(ws->pool, gated_columns, &c, (up->rows + c.block - 1) / c.block);
}

/* ---- the integer sums alone, for those who measure */

typedef struct sums_call {
    const workspace *ws;
    const operand *in;
    matrix w;
    int32_t *sums;
} sums_call;

static void columns_of_sums(void *arg, int task, int worker)
{
    const sums_call *c = arg;
    int n0 = task * N_BLOCK, n = min_int(N_BLOCK, c->w.rows - n0);
    sum_columns(c->ws->k, &c->w, c->in, n0, n, c->sums + n0, (size_t)c->w.rows, worker_scratch(c->ws, worker));
}

migi_status migi_integer_sums(migi_pool *pool, const migi_tensor *weight, const migi_tensor *factors, const float *x, int32_t rows,
                              int32_t k, int32_t *sums, float *scales, migi_error *err)
{
    migi_status status = MIGI_OK;
    workspace ws = {
        .pool = pool, .k = migi_pool_kernels(pool), .integers = true, .row_scales = scales, .scratch_bytes = (size_t)K_BLOCK_INT * N_BLOCK};
    sums_call c = {.ws = &ws, .sums = sums};
    TRY(migi_check_tensor(weight, err));
    if (factors) TRY(migi_check_tensor(factors, err));
    FAIL_IF(weight->dtype != MIGI_I8 && weight->dtype != MIGI_U8, MIGI_E_ARGUMENT, "tensor %.100s is not quantized; give int8 or int4",
            weight->name);
    FAIL_IF(rows < 1 || k < 1, MIGI_E_ARGUMENT, "x has %d rows of %d; give at least one of each", rows, k);
    FAIL_IF(weight->rank < 1 || weight->shape[0] < 1 || weight->shape[0] > INT32_MAX / N_BLOCK, MIGI_E_ARGUMENT,
            "tensor %.100s has no rows, or too many; give a matrix", weight->name);
    TRY(migi_bind_blocks(&c.w, weight, factors, (int)weight->shape[0] * MIGI_BLOCK, k, err));
    ws.quantized_len = (size_t)rows * migi_padded_int8((size_t)k);
    ws.quantized = migi_alloc(ws.quantized_len, 1);
    ws.scratch = migi_alloc(ws.scratch_bytes, (size_t)migi_pool_threads(pool));
    FAIL_IF(!ws.quantized || !ws.scratch, MIGI_E_MEMORY, "no memory for %d rows of %d; give fewer", rows, k);
    operand ready = prepare(&ws, &(rows_in){.x = x, .ldx = (size_t)k, .rows = rows}, k, 1u << AS_INT8);
    c.in = &ready;
    migi_pool_run(pool, columns_of_sums, &c, (c.w.rows + N_BLOCK - 1) / N_BLOCK);
done:
    free(ws.quantized);
    free(ws.scratch);
    return status;
}
