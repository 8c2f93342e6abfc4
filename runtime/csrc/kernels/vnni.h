/* vnni.h - the AVX-512 VNNI instruction the integer kernels use, or the same in plain C.
 *
 * Everything else those kernels do is written in GCC vector types and compiles for any CPU, so with MIGI_VNNI_EMULATE
 * their addressing, tails and corrections are tested on machines without AVX-512.
 */
#ifndef MIGI_VNNI_H
#define MIGI_VNNI_H

#include <stdint.h>
#include <string.h>

typedef int32_t vnni __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t vnni_bytes __attribute__((vector_size(16), aligned(1), may_alias));

#ifdef MIGI_VNNI_EMULATE

/* VPDPBUSD: lane[i] += u[4i] s[4i] + .. + u[4i + 3] s[4i + 3], u unsigned, s signed bytes; wraps. */
static inline void vnni_dot(void *sum, const void *u, const void *s)
{
    uint32_t lane[16];
    memcpy(lane, sum, sizeof lane);
    for (int i = 0; i < 64; i++) lane[i / 4] += (uint32_t)(((const uint8_t *)u)[i] * ((const int8_t *)s)[i]);
    memcpy(sum, lane, sizeof lane);
}
#define VNNI_DOT(sum, u, s) vnni_dot(&(sum), &(u), &(s))

#else

#include <immintrin.h>
#define VNNI_DOT(sum, u, s) ((sum) = (vnni)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(u), (__m512i)(s)))

#endif
#endif
