/* kernels_neon_dotprod.c - aarch64 with dot products (Cortex-A55 and A76, Apple M1, Graviton 2 and later); see int8_sdot.inc. */
#if defined(__aarch64__) && defined(__linux__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#define SIMD_WIDTH 4
#define SIMD_MR 8
#define SIMD_NV 2
#include "kernels_simd.inc"
#include "half_neon.inc"
#include "int8_sdot.inc"

const migi_kernels migi_kernels_neon_dotprod = {.isa = "neon-dotprod", SIMD_F32_SLOTS, SIMD_BF16_SLOTS,
                                                .gemm_i8 = sdot_gemm_i8, .gemm_i4 = sdot_gemm_i4, .i4_rows = 8, HALF_SLOTS};
#else
typedef int migi_no_neon_dotprod;
#endif
