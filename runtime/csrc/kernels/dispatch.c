/* dispatch.c - the tables of this build, which of them this CPU and operating system can run, and what serves each operation. */
#include "kernels.h"
#include "../migi.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
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

static bool all(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }

static bool has_avx2(void)
{
    features f = read_features();
    return (f.xcr0 & XCR0_AVX) == XCR0_AVX && all(f.leaf1_c, 1u << 12 | 1u << 29 /* FMA, F16C */) && all(f.leaf7_b, 1u << 5);
}

static bool has_avx512(void)
{
    features f = read_features();
    return (f.xcr0 & XCR0_AVX512) == XCR0_AVX512 && all(f.leaf7_b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31 /* F, DQ, BW, VL */);
}

static bool has_avx512vnni(void) { return all(read_features().leaf7_c, 1u << 11); }
static bool has_avx512bf16(void) { return all(read_features().leaf71_a, 1u << 5); }

#if __GNUC__ >= 11
/* Tiles need the kernel's permission for their large register state (Linux 5.16). */
static bool has_amx(void)
{
    features f = read_features();
    if (!all(f.leaf7_d, 1u << 22 | 1u << 24 | 1u << 25 /* AMX-BF16, AMX-TILE, AMX-INT8 */)) return false;
    return (f.xcr0 & XCR0_TILES) == XCR0_TILES && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA) == 0;
}
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static bool has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; } /* HWCAP_ASIMDDP */
static bool has_i8mm(void) { return getauxval(AT_HWCAP2) >> 13 & 1; }   /* HWCAP2_I8MM */
#endif

static bool has_nothing_special(void) { return true; }

/* Emulated instructions stand beside real float ones. */
#if defined(__x86_64__)
#define HAS_EMULATED has_avx2
#else
#define HAS_EMULATED has_nothing_special
#endif

typedef struct entry {
    const migi_kernels *own;
    bool (*cpu_has)(void); /* what it needs beyond the table below it */
    bool ranked;           /* takes part in the choice of the best */
} entry;

/* From worst to best. */
static const entry entries[] = {
    {&migi_own_scalar, has_nothing_special, true},
    {&migi_own_avx512vnni_emulated, HAS_EMULATED, false},
    {&migi_own_amx_emulated, has_nothing_special, false},
#if defined(__x86_64__)
    {&migi_own_avx2, has_avx2, true},
    {&migi_own_avx512, has_avx512, true},
    {&migi_own_avx512vnni, has_avx512vnni, true},
    {&migi_own_avx512bf16, has_avx512bf16, true},
#if __GNUC__ >= 11
    {&migi_own_amx, has_amx, true},
#endif
#endif
#if defined(__aarch64__)
    {&migi_own_neon, has_nothing_special, true},
#if defined(__linux__)
    {&migi_own_neon_dotprod, has_dotprod, true},
    {&migi_own_neon_i8mm, has_i8mm, true},
#endif
#endif
};
enum { ENTRIES = sizeof entries / sizeof entries[0] };

#define COUNT(kind, slot) +1
enum { SLOTS = 0 MIGI_KERNEL_SLOTS(COUNT) };
_Static_assert(sizeof(migi_kernels) == offsetof(migi_kernels, pack_f32) + SLOTS * sizeof(void (*)(void)),
               "a slot is not in MIGI_KERNEL_SLOTS");

int migi_kernels_count(void) { return ENTRIES; }

int migi_kernels_named(const char *isa)
{
    for (int i = 0; i < ENTRIES; i++)
        if (!strcmp(entries[i].own->isa, isa)) return i;
    return -1;
}

static bool runs(const migi_kernels *own) { return (!own->below || runs(own->below)) && entries[migi_kernels_named(own->isa)].cpu_has(); }

static void lay_over(migi_kernels *k, const migi_kernels *own)
{
    if (own->below) lay_over(k, own->below);
    k->isa = own->isa, k->below = own->below;
    /* clang-format off */
#define TAKE(kind, slot) if (own->slot) k->slot = own->slot;
    TAKE(, nr) TAKE(, bf16_dots) TAKE(, nr_bf16) TAKE(, k_bf16) TAKE(, i4_rows)
    MIGI_KERNEL_SLOTS(TAKE)
    /* clang-format on */
#undef TAKE
}

int migi_kernels_fill(migi_kernels *k, int which)
{
    *k = (migi_kernels){0};
    lay_over(k, entries[which].own);
    return runs(entries[which].own);
}

int migi_kernels_best(void)
{
    for (int i = ENTRIES - 1; i > 0; i--)
        if (entries[i].ranked && runs(entries[i].own)) return i;
    return 0;
}

/* ---- the report */

typedef struct slot {
    const char *kind;
    size_t at; /* in migi_kernels */
} slot;

#define SLOT(kind, slot) {#kind, offsetof(migi_kernels, slot)},
static const slot slots[SLOTS] = {MIGI_KERNEL_SLOTS(SLOT)};

static bool same_function(const migi_kernels *a, const migi_kernels *b, const slot *s)
{
    return !memcmp((const char *)a + s->at, (const char *)b + s->at, sizeof(void (*)(void)));
}

/* The lowest instruction set whose function it is. */
static const char *owner(const migi_kernels *k, const migi_kernels *own, const slot *s)
{
    const char *isa = own->isa;
    for (; own; own = own->below)
        if (same_function(k, own, s)) isa = own->isa;
    return isa;
}

typedef struct writer {
    char *text;
    size_t size, used; /* of text; what was to be written so far */
} writer;

static void put(writer *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(writer *w, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(w->used < w->size ? w->text + w->used : NULL, w->used < w->size ? w->size - w->used : 0, format, args);
    va_end(args);
    w->used += n > 0 ? (size_t)n : 0;
}

/* The owners of the slots of one kind, which begin at `first`, each once; returns where the next kind begins. */
static int put_kind(writer *w, const migi_kernels *k, const migi_kernels *own, int first)
{
    int end = first;
    put(w, "%s %s:", first ? ";" : "", slots[first].kind);
    for (; end < SLOTS && !strcmp(slots[end].kind, slots[first].kind); end++) {
        bool told = false;
        for (int i = first; i < end; i++) told |= owner(k, own, &slots[i]) == owner(k, own, &slots[end]);
        if (!told) put(w, "%s %s", end > first ? "," : "", owner(k, own, &slots[end]));
    }
    return end;
}

size_t migi_kernel_report(char *text, size_t size)
{
    writer w = {text, size, 0};
    int best = migi_kernels_best();
    for (int i = 0; i < ENTRIES; i++) {
        migi_kernels k;
        int can_run = migi_kernels_fill(&k, i);
        put(&w, "%-19s %-15s", k.isa, i == best ? "in use" : can_run ? "can run" : "not on this CPU");
        for (int next = 0; next < SLOTS;) next = put_kind(&w, &k, entries[i].own, next);
        put(&w, "%s\n", k.bf16_dots ? "" : "; bf16 products as float");
    }
    return w.used;
}
