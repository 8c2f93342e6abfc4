/* dispatch.c - which instruction sets this CPU and this operating system can run, and the table for each. */
#include "kernels.h"
#include "migi.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6, XCR0_TILES = 0x60000, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILEDATA = 18 };

typedef struct features {
    unsigned leaf1_c, leaf7_b, leaf7_c, leaf7_d, leaf71_a;
    uint64_t xcr0;
} features;

static features read_features(void)
{
    features f = {0};
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) f.leaf1_c = c;
    if (f.leaf1_c >> 27 & 1) { /* OSXSAVE */
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        f.xcr0 = (uint64_t)high << 32 | low;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) f.leaf7_b = b, f.leaf7_c = c, f.leaf7_d = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.leaf71_a = a;
    return f;
}

static int runs_avx2(void)
{
    features f = read_features();
    unsigned wanted = 1u << 12 | 1u << 29; /* FMA, F16C */
    return (f.xcr0 & XCR0_AVX) == XCR0_AVX && (f.leaf1_c & wanted) == wanted && (f.leaf7_b >> 5 & 1);
}

static int runs_avx512(void)
{
    features f = read_features();
    unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    return runs_avx2() && (f.xcr0 & XCR0_AVX512) == XCR0_AVX512 && (f.leaf7_b & wanted) == wanted;
}

static int runs_avx512vnni(void) { return runs_avx512() && (read_features().leaf7_c >> 11 & 1); }
static int runs_avx512bf16(void) { return runs_avx512vnni() && (read_features().leaf71_a >> 5 & 1); }

/* Tiles need the kernel's permission for their large register state (Linux 5.16). */
static int runs_amx(void)
{
    features f = read_features();
    unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    if (!runs_avx512bf16() || (f.leaf7_d & wanted) != wanted) return 0;
    if ((f.xcr0 & XCR0_TILES) != XCR0_TILES) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA) == 0;
}
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static int runs_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }                    /* HWCAP_ASIMDDP */
static int runs_i8mm(void) { return runs_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); } /* HWCAP2_I8MM */
#endif

static int runs_always(void) { return 1; }

/* Emulated instructions beside real float ones. */
static int runs_emulated(void)
{
#if defined(__x86_64__)
    return runs_avx2();
#else
    return 1;
#endif
}

typedef struct entry {
    const migi_kernels *table;
    int (*runs)(void);
    int ranked; /* takes part in the choice of the best */
    const char *f32_file, *bf16_file, *int8_file;
} entry;

/* From worst to best. */
static const entry entries[] = {
    {&migi_kernels_scalar, runs_always, 1, "kernels_scalar.c", "kernels_scalar.c", "kernels_scalar.c"},
    {&migi_kernels_avx512vnni_emulated, runs_emulated, 0, "kernels_avx512vnni_emulated.c", "kernels_avx512vnni_emulated.c",
     "int8_vnni.inc, emulated"},
    {&migi_kernels_amx_emulated, runs_emulated, 0, "kernels_amx_emulated.c", "amx_gemm.inc on emulated tiles",
     "amx_gemm.inc on emulated tiles"},
#if defined(__x86_64__)
    {&migi_kernels_avx2, runs_avx2, 1, "kernels_avx2.c", "kernels_avx2.c (widened to f32)", "int8_maddubs.inc (vpmaddubsw)"},
    {&migi_kernels_avx512, runs_avx512, 1, "kernels_avx512.c", "kernels_avx512.c (widened to f32)",
     "int8_maddubs.inc (vpmaddubsw)"},
    {&migi_kernels_avx512vnni, runs_avx512vnni, 1, "kernels_avx512vnni.c", "kernels_avx512vnni.c (widened to f32)",
     "int8_vnni.inc (vpdpbusd)"},
    {&migi_kernels_avx512bf16, runs_avx512bf16, 1, "kernels_avx512bf16.c", "kernels_avx512bf16.c (vdpbf16ps)",
     "int8_vnni.inc (vpdpbusd)"},
#if __GNUC__ >= 11
    {&migi_kernels_amx, runs_amx, 1, "kernels_amx.c (avx512)", "amx_gemm.inc (tdpbf16ps)", "amx_gemm.inc (tdpbssd)"},
#endif
#endif
#if defined(__aarch64__)
    {&migi_kernels_neon, runs_always, 1, "kernels_neon.c", "kernels_neon.c (widened to f32)", "kernels_neon.c (smull)"},
#if defined(__linux__)
    {&migi_kernels_neon_dotprod, runs_dotprod, 1, "kernels_neon_dotprod.c", "kernels_neon_dotprod.c (widened to f32)",
     "int8_sdot.inc (sdot)"},
    {&migi_kernels_neon_i8mm, runs_i8mm, 1, "kernels_neon_i8mm.c", "kernels_neon_i8mm.c (widened to f32)",
     "kernels_neon_i8mm.c (smmla)"},
#endif
#endif
};
enum { ENTRIES = sizeof entries / sizeof entries[0] };

const migi_kernels *migi_kernels_find(const char *isa, int *runs)
{
    for (int i = 0; i < ENTRIES; i++)
        if (!strcmp(entries[i].table->isa, isa)) {
            *runs = entries[i].runs();
            return entries[i].table;
        }
    *runs = 0;
    return NULL;
}

const migi_kernels *migi_kernels_best(void)
{
    for (int i = ENTRIES - 1; i > 0; i--)
        if (entries[i].ranked && entries[i].runs()) return entries[i].table;
    return &migi_kernels_scalar;
}

size_t migi_kernel_report(char *text, size_t size)
{
    const migi_kernels *best = migi_kernels_best();
    size_t used = 0;
    for (int i = 0; i < ENTRIES; i++) {
        const migi_kernels *t = entries[i].table;
        const char *state = t == best ? "in use" : entries[i].runs() ? "can run" : "not on this CPU";
        int n = snprintf(used < size ? text + used : NULL, used < size ? size - used : 0,
                         "%-19s %-16s f32 products, rows, attention: %s; bf16 products: %s; int8, int4 products: %s\n", t->isa, state,
                         entries[i].f32_file, t->bf16_dots ? entries[i].bf16_file : "as f32", entries[i].int8_file);
        used += n > 0 ? (size_t)n : 0;
    }
    return used;
}
