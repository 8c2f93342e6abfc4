/* amx.h - the tile instructions the AMX kernels use, or the same in plain C.
 *
 * Eight tiles of 16 rows x 64 bytes. With MIGI_AMX_EMULATE they are an array of the function that opens with AMX_BEGIN,
 * so that the kernels' addressing is tested on machines without AMX; f32 sums are in the order of the instruction.
 */
#ifndef MIGI_AMX_H
#define MIGI_AMX_H

#include <stdint.h>
#include <string.h>

#ifdef MIGI_AMX_EMULATE

#include "kernels.h"

typedef union amx_tile {
    float f[16][16];
    uint16_t h[16][32];
    int32_t i[16][16];
    int8_t q[16][64];
    uint8_t row[16][64];
} amx_tile;

static inline void amx_load(amx_tile *t, const void *base, size_t stride)
{
    for (int r = 0; r < 16; r++) memcpy(t->row[r], (const uint8_t *)base + r * stride, 64);
}

static inline void amx_store(const amx_tile *t, void *base, size_t stride)
{
    for (int r = 0; r < 16; r++) memcpy((uint8_t *)base + r * stride, t->row[r], 64);
}

/* TDPBF16PS: c[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1] */
static inline void amx_dot_bf16(amx_tile *c, const amx_tile *a, const amx_tile *b)
{
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                c->f[m][n] += migi_bf16_to_f32(a->h[m][2 * k]) * migi_bf16_to_f32(b->h[k][2 * n]);
                c->f[m][n] += migi_bf16_to_f32(a->h[m][2 * k + 1]) * migi_bf16_to_f32(b->h[k][2 * n + 1]);
            }
}

/* TDPBSSD: c[m][n] += a[m][4k] b[k][4n] + .. + a[m][4k + 3] b[k][4n + 3] */
static inline void amx_dot_i8(amx_tile *c, const amx_tile *a, const amx_tile *b)
{
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 64; k++)
            for (int n = 0; n < 16; n++) c->i[m][n] += a->q[m][k] * b->q[k / 4][4 * n + k % 4];
}

#define AMX_BEGIN() amx_tile amx_tiles[8]
#define AMX_END() ((void)0)
#define AMX_ZERO(t) memset(&amx_tiles[t], 0, sizeof(amx_tile))
#define AMX_LOAD(t, base, stride) amx_load(&amx_tiles[t], base, stride)
#define AMX_STORE(t, base, stride) amx_store(&amx_tiles[t], base, stride)
#define AMX_DOT_BF16(c, a, b) amx_dot_bf16(&amx_tiles[c], &amx_tiles[a], &amx_tiles[b])
#define AMX_DOT_I8(c, a, b) amx_dot_i8(&amx_tiles[c], &amx_tiles[a], &amx_tiles[b])

#else

#include <immintrin.h>

/* Palette 1, all eight tiles 16 rows x 64 bytes. The barrier keeps GCC 12, which believes the instruction reads only
 * 8 bytes, from dropping the rest of the configuration. */
static inline __attribute__((always_inline)) void amx_configure(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

#define AMX_BEGIN() amx_configure()
#define AMX_END() _tile_release()
#define AMX_ZERO(t) _tile_zero(t)
/* GCC 12's load names no memory either: the barrier keeps stores to what it reads before it. */
#define AMX_LOAD(t, base, stride)            \
    do {                                     \
        __asm__ volatile("" : : : "memory"); \
        _tile_loadd(t, base, stride);        \
    } while (0)
#define AMX_STORE(t, base, stride) _tile_stored(t, base, stride)
#define AMX_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define AMX_DOT_I8(c, a, b) _tile_dpbssd(c, a, b)

#endif
#endif
