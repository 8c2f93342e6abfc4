/* geometry.c - where pixels go in the patch matrix and where tokens stand in M-RoPE space. */
#include "internal.h"

/* Patches come in blocks of merge x merge, so that the merger's four neighbours are consecutive; inside a patch the order
 * is channel, time (the same picture twice), row, column: Qwen2VLImageProcessor. */
migi_status migi_patchify(const migi_config *c, const uint8_t *rgb, int32_t height, int32_t width, float *patches, migi_error *err)
{
    int unit = c->patch * c->merge;
    if (height < unit || width < unit || height % unit || width % unit)
        return migi_fail(err, MIGI_E_ARGUMENT, "a picture of %d x %d pixels; both sides must be multiples of %d", width, height, unit);
    float value[3][256];
    for (int channel = 0; channel < 3; channel++)
        for (int v = 0; v < 256; v++) value[channel][v] = ((float)v * (1.f / 255.f) - c->mean[channel]) / c->std[channel];
    for (int by = 0; by < height / unit; by++)
        for (int bx = 0; bx < width / unit; bx++)
            for (int my = 0; my < c->merge; my++)
                for (int mx = 0; mx < c->merge; mx++) {
                    const uint8_t *from = rgb + 3 * ((size_t)(by * unit + my * c->patch) * (size_t)width + (size_t)(bx * unit + mx * c->patch));
                    for (int channel = 0; channel < 3; channel++)
                        for (int t = 0; t < c->temporal; t++)
                            for (int y = 0; y < c->patch; y++)
                                for (int x = 0; x < c->patch; x++)
                                    *patches++ = value[channel][from[3 * ((size_t)y * (size_t)width + (size_t)x) + (size_t)channel]];
                }
    return MIGI_OK;
}

/* Text counts up in all three axes; a picture's cells share one time and spread over rows and columns; what follows a
 * picture starts after its longer side: get_rope_index of transformers. */
migi_status migi_positions(const migi_config *c, const int32_t *tokens, int32_t count, const int32_t *grids, int32_t pictures,
                           int32_t *positions, migi_error *err)
{
    int32_t *time = positions, *row = positions + count, *col = positions + 2 * (size_t)count, next = 0, picture = 0;
    for (int32_t i = 0; i < count;) {
        if (tokens[i] != c->image_token) {
            time[i] = row[i] = col[i] = next++;
            i++;
            continue;
        }
        if (picture == pictures)
            return migi_fail(err, MIGI_E_ARGUMENT, "the prompt has places for more than the %d pictures given", pictures);
        int32_t rows = grids[2 * picture], cols = grids[2 * picture + 1];
        for (int32_t j = 0; j < rows * cols; j++, i++) {
            if (i == count || tokens[i] != c->image_token)
                return migi_fail(err, MIGI_E_ARGUMENT, "picture %d has %d tokens, the prompt holds %d for it", picture + 1, rows * cols, j);
            time[i] = next;
            row[i] = next + j / cols;
            col[i] = next + j % cols;
        }
        next += rows > cols ? rows : cols;
        picture++;
    }
    if (picture != pictures)
        return migi_fail(err, MIGI_E_ARGUMENT, "%d pictures given, the prompt has places for %d", pictures, picture);
    return MIGI_OK;
}
