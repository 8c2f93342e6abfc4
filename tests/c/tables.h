/* tables.h - goes through the kernel tables: for (int t = 0; next_table(&k, &t, 0);) */
#ifndef TABLES_H
#define TABLES_H

#include "../../runtime/csrc/kernels/kernels.h"
#include "harness.h"

/* *k <- the next table that this CPU can run, counted in *t; those it cannot run are skipped aloud. best: no other than the
 * best. 0 after the last. */
static inline int next_table(migi_kernels *k, int *t, int best)
{
    while (*t < migi_kernels_count()) {
        int which = (*t)++;
        if (best && which != migi_kernels_best()) continue;
        if (migi_kernels_fill(k, which)) return 1;
        printf("SKIPPED %s: this CPU cannot run it\n", k->isa);
        skipped++;
    }
    return 0;
}

#endif
