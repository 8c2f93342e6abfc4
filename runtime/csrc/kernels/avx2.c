/* avx2.c - AVX2, FMA and F16C: 6 x 16 f32 tile, 12 sums + 2 panel vectors + 1 broadcast in 16 registers; integer
 * products: int8_maddubs.inc. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define SIMD_WIDTH 8
#define SIMD_MR 6
#define SIMD_NV 2
#include "simd.inc"
#include "half_x86.inc"
#include "int8_maddubs.inc"

const migi_kernels migi_own_avx2 = {.isa = "avx2", .below = &migi_own_scalar, SIMD_SLOTS, HALF_SLOTS, MADDUBS_SLOTS};
#else
typedef int migi_no_avx2;
#endif
