/* kernels_avx512vnni.c - AVX-512 with integer dot products (Cascade Lake, Ice Lake): int8_vnni.inc; the rest as AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_MR 12
#define SIMD_NV 2
#include "kernels_simd.inc"
#include "half_x86.inc"
#include "int8_vnni.inc"

const migi_kernels migi_kernels_avx512vnni = {.isa = "avx512vnni", SIMD_F32_SLOTS, SIMD_BF16_SLOTS, VNNI_SLOTS, HALF_SLOTS};
#else
typedef int migi_no_avx512vnni;
#endif
