/* neon_dotprod.c - aarch64 with dot products (Cortex-A55 and A76, Apple M1, Graviton 2 and later); see int8_sdot.inc. */
#if defined(__aarch64__) && defined(__linux__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#define SIMD_WIDTH 4
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "int8_sdot.inc"

const migi_kernels migi_own_neon_dotprod = {.isa = "neon-dotprod", .below = &migi_own_neon, SDOT_SLOTS};
#else
typedef int migi_no_neon_dotprod;
#endif
