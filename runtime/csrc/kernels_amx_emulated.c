/* kernels_amx_emulated.c - the AMX kernel on emulated tiles, for tests on machines without AMX; slow. */
#define MIGI_AMX_EMULATE
#define SIMD_WIDTH 4
#define SIMD_MR 4
#define SIMD_NV 2
#include "kernels_simd.inc"
#include "amx_gemm.inc"

const migi_kernels migi_kernels_amx_emulated = {.isa = "amx-emulated", SIMD_F32_SLOTS, .bf16_dots = 1, .nr_bf16 = AMX_NR,
                                                .pack_pairs = amx_pack_pairs, .gemm_bf16 = amx_gemm_bf16};
