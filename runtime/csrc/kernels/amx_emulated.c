/* amx_emulated.c - the AMX kernel on emulated tiles, for tests on machines without AMX; slow. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define MIGI_AMX_EMULATE
#define MIGI_VNNI_EMULATE
#define SIMD_WIDTH 4
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "int8_vnni.inc"
#include "amx_gemm.inc"

const migi_kernels migi_own_amx_emulated = {.isa = "amx-emulated", .below = &migi_own_avx512vnni_emulated, AMX_SLOTS};
