/* avx512.c - AVX-512: 12 x 32 f32 tile, 24 sums + 2 panel vectors + 1 broadcast in 32 registers; integer products:
 * int8_maddubs.inc. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_MR 12
#define SIMD_NV 2
#include "simd.inc"
#include "half_x86.inc"
#include "int8_maddubs.inc"

const migi_kernels migi_own_avx512 = {.isa = "avx512", .below = &migi_own_avx2, SIMD_SLOTS, HALF_SLOTS, MADDUBS_SLOTS};
#else
typedef int migi_no_avx512;
#endif
