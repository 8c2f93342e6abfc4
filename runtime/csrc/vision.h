/* vision.h - the vision encoder: pixels to embeddings. */
#ifndef MIGI_VISION_H
#define MIGI_VISION_H

#include "runner.h"

struct migi_vision {
    uint64_t serial; /* tells pictures apart in the prefix comparison */
    int rows, cols;  /* merged cells */
    int hidden;
    float *embeddings; /* [rows * cols, hidden] */
};

/* migi_vision_encode, by a session's runner. */
migi_status migi_encode(migi_vision **out, runner *r, const migi_model *m, const uint8_t *rgb, int height, int width, migi_error *err);

#endif
