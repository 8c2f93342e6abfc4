/* avx512vnni.c - AVX-512 with integer dot products (Cascade Lake, Ice Lake): int8_vnni.inc. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "int8_vnni.inc"

const migi_kernels migi_own_avx512vnni = {.isa = "avx512vnni", .below = &migi_own_avx512, VNNI_SLOTS};
#else
typedef int migi_no_avx512vnni;
#endif
