/* geometry.h - where the tokens of a prompt stand; where pixels go is said in migi_measure.h. */
#ifndef MIGI_GEOMETRY_H
#define MIGI_GEOMETRY_H

#include "internal.h"
#include "migi_measure.h"

typedef struct grid {
    int rows, cols; /* merged cells of a picture */
} grid;

typedef struct place {
    int32_t at[3];     /* in M-RoPE space: time, row, column */
    int picture, cell; /* the picture a token stands for a cell of, -1 for text */
} place;

/* Goes through a prompt token by token. */
typedef struct walker {
    int32_t image_token;
    grid (*grid_of)(const void *given, int picture); /* of the pictures, in the order of their places */
    const void *given;
    int pictures;
    int picture, cell; /* the next picture, and its next cell */
    int32_t next;      /* where the next text, or the next picture begins */
} walker;

place migi_walk(walker *w, int32_t token);
/* Whether the tokens hold places for exactly the pictures given: a status and nothing else. w begins at tokens[0]. */
migi_status migi_check_places(walker w, const int32_t *tokens, int32_t count, migi_error *err);

#endif
