/* avx512vnni_emulated.c - the VNNI kernels on an emulated instruction, for tests on machines without it; slow. The rest is in
 * vectors of four, as on NEON. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define MIGI_VNNI_EMULATE
#define SIMD_WIDTH 4
#define SIMD_MR 4
#define SIMD_NV 2
#include "simd.inc"
#include "int8_vnni.inc"

const migi_kernels migi_own_avx512vnni_emulated = {.isa = "avx512vnni-emulated", .below = &migi_own_scalar, SIMD_SLOTS, VNNI_SLOTS};
