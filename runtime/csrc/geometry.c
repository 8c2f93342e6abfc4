/* geometry.c - where pixels go in the patch matrix and where tokens stand in M-RoPE space. */
#include "geometry.h"

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
                    const uint8_t *from = rgb +
                                          3 * ((size_t)(by * unit + my * c->patch) * (size_t)width + (size_t)(bx * unit + mx * c->patch));
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
place migi_walk(walker *w, int32_t token)
{
    if (token != w->image_token || w->picture == w->pictures) {
        int32_t at = w->next++;
        return (place){.at = {at, at, at}, .picture = -1};
    }
    grid g = w->grid_of(w->given, w->picture);
    place p = {.at = {w->next, w->next + w->cell / g.cols, w->next + w->cell % g.cols}, .picture = w->picture, .cell = w->cell};
    if (++w->cell == g.rows * g.cols) w->picture++, w->cell = 0, w->next += g.rows > g.cols ? g.rows : g.cols;
    return p;
}

migi_status migi_check_places(walker w, const int32_t *tokens, int32_t count, migi_error *err)
{
    for (int32_t i = 0; i <= count; i++) {
        bool cell = i < count && tokens[i] == w.image_token;
        if (!cell && w.cell) {
            grid g = w.grid_of(w.given, w.picture);
            return migi_fail(err, MIGI_E_ARGUMENT, "picture %d has %d tokens, the prompt holds %d for it", w.picture + 1, g.rows * g.cols,
                             w.cell);
        }
        if (cell && w.picture == w.pictures)
            return migi_fail(err, MIGI_E_ARGUMENT, "the prompt has places for more than the %d pictures given", w.pictures);
        if (i < count) migi_walk(&w, tokens[i]);
    }
    if (w.picture == w.pictures) return MIGI_OK;
    return migi_fail(err, MIGI_E_ARGUMENT, "%d pictures given, the prompt has places for %d", w.pictures, w.picture);
}

/* ---- for those who measure */

static grid plain_grid(const void *given, int picture)
{
    const int32_t *grids = given;
    return (grid){grids[2 * picture], grids[2 * picture + 1]};
}

migi_status migi_positions(const migi_config *c, const int32_t *tokens, int32_t count, const int32_t *grids, int32_t pictures,
                           int32_t *positions, migi_error *err)
{
    walker w = {.image_token = c->image_token, .grid_of = plain_grid, .given = grids, .pictures = pictures};
    for (int i = 0; i < pictures; i++)
        if (grids[2 * i] < 1 || grids[2 * i + 1] < 1 || (int64_t)grids[2 * i] * grids[2 * i + 1] > INT32_MAX)
            return migi_fail(err, MIGI_E_ARGUMENT, "picture %d has %d x %d cells; give 1 x 1 or more", i + 1, grids[2 * i],
                             grids[2 * i + 1]);
    migi_status status = migi_check_places(w, tokens, count, err);
    for (int32_t i = 0; i < count && status == MIGI_OK; i++) {
        place p = migi_walk(&w, tokens[i]);
        for (int axis = 0; axis < 3; axis++) positions[(size_t)axis * (size_t)count + (size_t)i] = p.at[axis];
    }
    return status;
}
