/* kernels_amx.c - AMX-bf16 (Sapphire Rapids and later) for the big products; everything else is AVX-512's.
 *
 * Why 32 x 32: see amx_gemm.inc. Tolerance against scalar: same rounded inputs, sums differ by order.
 */
#if defined(__x86_64__) && __GNUC__ >= 11
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_MR 12
#define SIMD_NV 2
#include "kernels_simd.inc"
#include "amx_gemm.inc"

const migi_kernels migi_kernels_amx = {.isa = "amx", SIMD_F32_SLOTS, .bf16_dots = 1, .nr_bf16 = AMX_NR,
                                       .pack_pairs = amx_pack_pairs, .gemm_bf16 = amx_gemm_bf16};
#else
typedef int migi_no_amx;
#endif
