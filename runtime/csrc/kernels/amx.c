/* amx.c - AMX (Sapphire Rapids and later, which all have AVX-512 BF16) for the big bf16 and int8 products.
 *
 * Why 32 x 32: see amx_gemm.inc. Tolerance against scalar: same rounded inputs, f32 sums differ by order, integers equal.
 */
#if defined(__x86_64__) && __GNUC__ >= 11
#pragma GCC target( \
    "amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define SIMD_WIDTH 16
#define SIMD_NV 2
#include "simd_vectors.inc"
#include "int8_vnni.inc"
#include "amx_gemm.inc"

const migi_kernels migi_own_amx = {.isa = "amx", .below = &migi_own_avx512bf16, AMX_SLOTS};
#else
typedef int migi_no_amx;
#endif
