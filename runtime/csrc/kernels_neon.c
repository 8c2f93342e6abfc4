/* kernels_neon.c - aarch64 NEON: 8 x 8 tile, 16 sums + 2 panel vectors + broadcasts in 32 registers. */
#if defined(__aarch64__)
#define SIMD_WIDTH 4
#define SIMD_MR 8
#define SIMD_NV 2
#include "kernels_simd.inc"

const migi_kernels migi_kernels_neon = {.isa = "neon", SIMD_F32_SLOTS, SIMD_BF16_SLOTS};
#else
typedef int migi_no_neon;
#endif
