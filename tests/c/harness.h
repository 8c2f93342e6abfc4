/* harness.h - counts checks; a test file ends with REPORT(). */
#ifndef HARNESS_H
#define HARNESS_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef QUICK
#define QUICK 0 /* 1 under sanitizers and emulators, where the best table alone is slow enough */
#endif

static int passed, failed, skipped;

#define CHECK(condition, ...)                                          \
    do {                                                               \
        if (condition) passed++;                                       \
        else {                                                         \
            failed++;                                                  \
            printf("FAIL %s:%d %s: ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__);                                       \
            printf("\n");                                              \
        }                                                              \
    } while (0)
#define REPORT() return printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped), failed != 0

static uint32_t seed = 1;

/* uniform in [-1, 1) */
static inline float noise(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed * (1.f / 2147483648.f);
}

static inline float *floats(size_t n)
{
    float *p = malloc((n ? n : 1) * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = noise();
    return p;
}

#endif
