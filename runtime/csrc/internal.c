/* internal.c - errors and memory. */
#include "internal.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *migi_version(void) { return MIGI_VERSION; }

migi_status migi_fail(migi_error *err, migi_status status, const char *format, ...)
{
    if (!err) return status;
    err->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return status;
}

static void *alloc(size_t count, size_t size, bool zeroed)
{
    if (size && count > (SIZE_MAX - 64) / size) return NULL;
    size_t bytes = (larger(count * size, 1) + 63) / 64 * 64;
    void *p = aligned_alloc(64, bytes);
    if (p && zeroed) memset(p, 0, bytes);
    return p;
}

void *migi_alloc(size_t count, size_t size) { return alloc(count, size, true); }

static void *buffer(buffers *b, size_t count, size_t size, bool zeroed)
{
    b->bytes += count * size;
    if (b->counting || b->failed) return NULL;
    assert(b->count < MIGI_MOST_BUFFERS);
    void *p = alloc(count, size, zeroed);
    if (p) b->made[b->count++] = p;
    b->failed = !p;
    return p;
}

void *migi_buffer(buffers *b, size_t count, size_t size) { return buffer(b, count, size, true); }
void *migi_untouched_buffer(buffers *b, size_t count, size_t size) { return buffer(b, count, size, false); }

void migi_free_buffers(buffers *b)
{
    while (b->count) free(b->made[--b->count]);
}
