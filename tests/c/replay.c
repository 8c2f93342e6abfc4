/* replay.c - answers one question that a Python test has written down: replay FILE ISA
 *
 * FILE, in this machine's own layout (both of ours are 64-bit little-endian):
 *   migi_config, then i32 tensors; each: i32 name bytes, name, i32 dtype, i32 rank, i64 shape[5], i64 bytes, data
 *   i32 pictures; each: i32 height, i32 width, rgb
 *   i32 tokens, i32 ids[]; i32 new tokens, f32 repetition penalty
 * Prints a line for each new token: its id and the bits of its log-probability.
 */
#include "../../runtime/csrc/migi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096, PICTURES = 16 };

static void need(int condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "replay: %s\n", what);
    exit(1);
}

static void *take(FILE *f, size_t size)
{
    void *data = malloc(size ? size : 1);
    need(data && fread(data, 1, size, f) == size, "the file is too short");
    return data;
}

static int32_t take_int(FILE *f)
{
    int32_t n;
    need(fread(&n, sizeof n, 1, f) == 1, "the file is too short");
    return n;
}

static migi_tensor take_tensor(FILE *f)
{
    int32_t length = take_int(f);
    char *name = take(f, (size_t)length + 1); /* with its final zero */
    migi_tensor t = {.name = name, .dtype = take_int(f), .rank = take_int(f)};
    int64_t *sizes = take(f, 6 * sizeof *sizes);
    memcpy(t.shape, sizes, sizeof t.shape);
    t.bytes = sizes[5];
    t.data = take(f, (size_t)t.bytes);
    free(sizes);
    return t;
}

int main(int argc, char **argv)
{
    static migi_tensor tensors[MOST];
    migi_vision *pictures[PICTURES];
    migi_error err = {0};
    migi_pool *pool;
    migi_model *model;
    migi_session *session;
    need(argc == 3, "give FILE and ISA");
    FILE *f = fopen(argv[1], "rb");
    need(f != NULL, "the file cannot be opened");
    migi_config *config = take(f, sizeof *config);
    int32_t count = take_int(f);
    need(count <= MOST, "too many tensors");
    for (int i = 0; i < count; i++) tensors[i] = take_tensor(f);
    need(migi_pool_new(&pool, 1, argv[2], &err) == MIGI_OK, err.message);
    need(migi_model_new(&model, config, tensors, (size_t)count, &err) == MIGI_OK, err.message);
    need(migi_session_new(&session, model, pool, NULL, &err) == MIGI_OK, err.message);
    int32_t shown = take_int(f);
    need(shown <= PICTURES, "too many pictures");
    for (int i = 0; i < shown; i++) {
        int32_t height = take_int(f), width = take_int(f);
        uint8_t *rgb = take(f, (size_t)height * (size_t)width * 3);
        need(migi_vision_encode(&pictures[i], session, rgb, height, width, &err) == MIGI_OK, err.message);
        free(rgb);
    }
    int32_t length = take_int(f), *ids = take(f, (size_t)length * sizeof *ids), left = take_int(f), token;
    float *penalty = take(f, sizeof *penalty), logprob;
    need(migi_session_sync(session, ids, length, (const migi_vision *const *)pictures, shown, &err) == MIGI_OK, err.message);
    for (;;) {
        need(migi_session_greedy(session, *penalty, &token, &logprob, &err) == MIGI_OK, err.message);
        uint32_t bits;
        memcpy(&bits, &logprob, sizeof bits);
        printf("%d %08x\n", token, bits);
        if (!--left) break;
        need(migi_session_append(session, &token, 1, NULL, &err) == MIGI_OK, err.message);
    }
    return 0; /* the end of the process frees the rest */
}
