/* kernels_amx_emulated.c - the AMX kernel on emulated tiles, for tests on machines without AMX; slow. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define MIGI_AMX_EMULATE
#define MIGI_VNNI_EMULATE
#define SIMD_WIDTH 4
#define SIMD_MR 4
#define SIMD_NV 2
#include "kernels_simd.inc"
#include "int8_vnni.inc"
#include "amx_gemm.inc"

const migi_kernels migi_kernels_amx_emulated = {.isa = "amx-emulated", SIMD_F32_SLOTS, AMX_SLOTS, MIGI_SCALAR_HALF_SLOTS};
