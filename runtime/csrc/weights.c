/* weights.c - stored tensors: checked, since a file may be hostile, and bound where they lie. */
#include "weights.h"

#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_RANK = 5,
    MAX_GROUP = 128,
    MAX_FACTOR = 16,
    MAX_COLS_INT = 65536, /* 127 * 128 * 65536 < 2^31: an int32 sum cannot overflow */
};
#define AGAIN "download or export the model again"

static int element_bytes(int32_t dtype)
{
    return dtype == MIGI_F32 ? 4 : dtype == MIGI_BF16 ? 2 : dtype == MIGI_I8 || dtype == MIGI_U8 ? 1 : 0;
}

migi_status migi_check_tensor(const migi_tensor *t, migi_error *err)
{
    migi_status status = MIGI_OK;
    FAIL_IF(!t->name, MIGI_E_MODEL, "a tensor has no name; " AGAIN);
    int size = element_bytes(t->dtype);
    FAIL_IF(!size, MIGI_E_MODEL, "tensor %.100s is neither bf16, f32, int8 nor int4; convert the checkpoint to bf16", t->name);
    FAIL_IF(t->rank < 0 || t->rank > MAX_RANK, MIGI_E_MODEL, "tensor %.100s has %d dimensions, 0 to %d are served; " AGAIN, t->name,
            t->rank, MAX_RANK);
    int64_t elements = 1;
    for (int i = 0; i < t->rank; i++) {
        int64_t n = t->shape[i];
        FAIL_IF(n < 0 || (n && elements > INT64_MAX / size / n), MIGI_E_MODEL, "tensor %.100s has an impossible dimension of %lld; " AGAIN,
                t->name, (long long)n);
        elements *= n;
    }
    FAIL_IF(t->bytes != elements * size, MIGI_E_MODEL, "tensor %.100s holds %lld bytes, its shape asks for %lld; " AGAIN, t->name,
            (long long)t->bytes, (long long)(elements * size));
    FAIL_IF(elements && !t->data, MIGI_E_MODEL, "tensor %.100s has no data; " AGAIN, t->name);
    FAIL_IF((uintptr_t)t->data % (unsigned)size, MIGI_E_MODEL, "tensor %.100s lies at an odd address; copy it to memory of its own",
            t->name);
done:
    return status;
}

/* ---- finding by name */

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const migi_tensor *const *)a)->name, (*(const migi_tensor *const *)b)->name);
}

static int name_against(const void *name, const void *t) { return strcmp(name, (*(const migi_tensor *const *)t)->name); }

static const migi_tensor *lookup(const finder *f, const char *name)
{
    const migi_tensor **hit = bsearch(name, f->sorted, f->count, sizeof *f->sorted, name_against);
    return hit ? *hit : NULL;
}

/* The companion `name` + `suffix`, or NULL. */
static const migi_tensor *companion(const finder *f, const char *name, const char *suffix)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    return lookup(f, full);
}

migi_status migi_finder_open(finder *f, const migi_tensor *tensors, size_t count, size_t copies, float **owned, migi_error *err)
{
    migi_status status = MIGI_OK;
    size_t given = 0; /* elements of all vectors: a config that asks for more will not find them */
    *f = (finder){.count = count};
    for (size_t i = 0; i < count; i++) {
        TRY(migi_check_tensor(&tensors[i], err));
        if (tensors[i].rank == 1) given += (size_t)tensors[i].bytes / (size_t)element_bytes(tensors[i].dtype);
    }
    f->sorted = malloc((count ? count : 1) * sizeof *f->sorted);
    *owned = f->next = migi_alloc(given < copies ? given : copies, sizeof(float));
    FAIL_IF(!f->sorted || !*owned, MIGI_E_MEMORY, "no memory for norms and biases; close other programs");
    for (size_t i = 0; i < count; i++) f->sorted[i] = &tensors[i];
    qsort(f->sorted, count, sizeof *f->sorted, by_name);
    for (size_t i = 1; i < count; i++)
        FAIL_IF(!by_name(&f->sorted[i - 1], &f->sorted[i]), MIGI_E_MODEL, "tensor %.100s is given twice; " AGAIN, f->sorted[i]->name);
done:
    return status;
}

void migi_finder_close(finder *f) { free(f->sorted); }

/* ---- binding */

/* The unquantized tensor `name` with `rows` x `cols` elements (cols 0: a vector). */
static migi_status find(finder *f, const char *name, int64_t rows, int64_t cols, const migi_tensor **out, migi_error *err)
{
    const migi_tensor *t = lookup(f, name);
    if (!t) return migi_fail(err, MIGI_E_MODEL, "tensor %s is missing; take a complete checkpoint", name);
    if (t->dtype != MIGI_BF16 && t->dtype != MIGI_F32)
        return migi_fail(err, MIGI_E_MODEL, "tensor %s is neither bf16 nor f32; convert the checkpoint to bf16", name);
    int64_t got_rows = t->rank ? t->shape[0] : 0, got_cols = 1;
    for (int i = 1; i < t->rank && got_rows; i++) got_cols *= t->shape[i]; /* checked not to overflow but for a zero */
    if (got_rows != rows || got_cols != (cols ? cols : 1) || (!cols && t->rank != 1))
        return migi_fail(err, MIGI_E_MODEL,
                         "tensor %s has %lld x %lld elements, the config asks for %lld x %lld; take the config "
                         "that belongs to the weights",
                         name, (long long)got_rows, (long long)got_cols, (long long)rows, (long long)(cols ? cols : 1));
    f->bytes += t->bytes;
    *out = t;
    return MIGI_OK;
}

static migi_status bind_factors(matrix *m, const migi_tensor *w, const migi_tensor *t, int64_t blocks, int64_t k, migi_error *err)
{
    migi_status status = MIGI_OK;
    FAIL_IF(!t, MIGI_E_MODEL, "tensor %.100s_group is missing; " AGAIN, w->name);
    bool fits = t->dtype == MIGI_U8 && t->rank == 3 && t->shape[0] == blocks && t->shape[1] > 0 && k % t->shape[1] == 0 &&
                t->shape[2] == MIGI_BLOCK;
    int64_t group = fits ? k / t->shape[1] : 0;
    FAIL_IF(!fits || group % 8 || group > MAX_GROUP, MIGI_E_MODEL,
            "tensor %.100s does not hold the factors of %lld rows of %lld in "
            "groups of 8 to %d; " AGAIN,
            t->name, (long long)blocks * MIGI_BLOCK, (long long)k, MAX_GROUP);
    const uint8_t *factors = t->data;
    unsigned bad = 0;
    for (int64_t i = 0; i < t->bytes; i++) bad |= (unsigned)(factors[i] - 1) >= MAX_FACTOR;
    FAIL_IF(bad, MIGI_E_MODEL, "tensor %.100s holds a factor outside 1 to %d; " AGAIN, t->name, MAX_FACTOR);
    m->factors = factors;
    m->group = (int)group;
done:
    return status;
}

migi_status migi_bind_blocks(matrix *m, const migi_tensor *w, const migi_tensor *factors, int rows, int cols, migi_error *err)
{
    migi_status status = MIGI_OK;
    int64_t blocks = ((int64_t)rows + MIGI_BLOCK - 1) / MIGI_BLOCK, k = (int64_t)migi_padded_int8((size_t)cols);
    FAIL_IF(cols > MAX_COLS_INT, MIGI_E_UNSUPPORTED, "tensor %.100s is quantized and has %d columns, %d are served; export it as bf16",
            w->name, cols, MAX_COLS_INT);
    FAIL_IF(w->rank != 4 || w->shape[0] != blocks || w->shape[1] != k / (w->dtype == MIGI_I8 ? 4 : 8) || w->shape[2] != MIGI_BLOCK ||
                w->shape[3] != 4,
            MIGI_E_MODEL,
            "tensor %.100s does not hold the blocks of %d x %d quantized weights; take the config "
            "that belongs to the weights",
            w->name, rows, cols);
    *m = (matrix){.data = w->data, .dtype = (migi_dtype)w->dtype, .rows = rows, .cols = cols};
    if (w->dtype == MIGI_U8) TRY(bind_factors(m, w, factors, blocks, k, err));
done:
    return status;
}

static migi_status find_scales(finder *f, const char *name, matrix *m, migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_tensor *t = companion(f, name, "_scale");
    int64_t rows = ((int64_t)m->rows + MIGI_BLOCK - 1) / MIGI_BLOCK * MIGI_BLOCK;
    FAIL_IF(!t, MIGI_E_MODEL, "tensor %s_scale is missing; " AGAIN, name);
    FAIL_IF(t->dtype != MIGI_F32 || t->rank != 1 || t->shape[0] != rows, MIGI_E_MODEL, "tensor %.100s is not f32[%lld]; " AGAIN, t->name,
            (long long)rows);
    const float *scales = t->data;
    bool sound = true;
    for (int64_t i = 0; i < rows; i++) sound &= scales[i] >= 0.f && isfinite(scales[i]);
    FAIL_IF(!sound, MIGI_E_MODEL, "tensor %.100s holds a scale that is negative or not finite; " AGAIN, t->name);
    m->scales = scales;
    f->bytes += t->bytes;
done:
    return status;
}

migi_status migi_find_matrix(finder *f, const char *name, int rows, int cols, matrix *m, migi_error *err)
{
    migi_status status = MIGI_OK;
    const migi_tensor *t = lookup(f, name);
    if (!t || (t->dtype != MIGI_I8 && t->dtype != MIGI_U8)) {
        TRY(find(f, name, rows, cols, &t, err));
        *m = (matrix){.data = t->data, .dtype = (migi_dtype)t->dtype, .rows = rows, .cols = cols};
        goto done;
    }
    const migi_tensor *factors = t->dtype == MIGI_U8 ? companion(f, name, "_group") : NULL;
    TRY(migi_bind_blocks(m, t, factors, rows, cols, err));
    TRY(find_scales(f, name, m, err));
    f->bytes += t->bytes + (factors ? factors->bytes : 0);
    f->quantized = true;
done:
    return status;
}

migi_status migi_find_vector(finder *f, const char *name, int n, float **out, migi_error *err)
{
    const migi_tensor *t;
    migi_status status = find(f, name, n, 0, &t, err);
    if (status != MIGI_OK) return status;
    if (t->dtype == MIGI_F32) memcpy(f->next, t->data, (size_t)n * sizeof *f->next);
    else
        for (int i = 0; i < n; i++) f->next[i] = migi_bf16_to_f32(((const uint16_t *)t->data)[i]);
    *out = f->next;
    f->next += n;
    return MIGI_OK;
}
