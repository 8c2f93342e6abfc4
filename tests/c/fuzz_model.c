/* fuzz_model.c - hostile tensors into the core: an input becomes a small config and a list of tensors, each an exactly sized
 * copy of a piece of the input; what migi_model_new takes then reads a picture and a prompt and writes two tokens.
 *
 *   clang -fsanitize=fuzzer,address   LLVMFuzzerTestOneInput alone
 *   -DREPLAY                          a main that runs the files on its command line; --seeds FOLDER writes the first corpus
 *
 * Layout of an input, all sizes little-endian:
 *   [CONFIG] one byte each: layers, hidden / 4, intermediate / 4, heads, kv_heads, head_dim / 2, vocab, tied, mrope_section[3],
 *            v_depth, v_dim / 4, v_heads, v_mlp / 4, merge, flags (1: fp32, 2: amx-emulated)
 *   tensors: u8 name, u8 layer, u8 dtype, i8 rank, 5 sizes (u8 n: n below 250, else one of `hostile`), u16 first, u16 bytes:
 *            data = input[end of the list + first, + bytes), a zero-filled rest where the input ends early
 *   a tensor name of 255 ends the list
 */
#include "tiny_model.h"

#include <sys/stat.h>

enum { CONFIG = 17, ENTRY = 13, MOST = 120, END = 255, MOST_BYTES = 1 << 16 };

static const int64_t hostile[6] = {-1, INT64_MAX, INT64_MIN, INT64_C(1) << 32, INT64_C(1) << 62, 65536};

/* clang-format off */
static const char *const tensor_names[] = {
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight",
    "visual.merger.ln_q.bias", "visual.merger.mlp.0.weight", "visual.merger.mlp.0.bias", "visual.merger.mlp.2.weight",
    "visual.merger.mlp.2.bias", "model.layers.%d.input_layernorm.weight", "model.layers.%d.post_attention_layernorm.weight",
    "model.layers.%d.self_attn.q_proj.weight", "model.layers.%d.self_attn.q_proj.bias", "model.layers.%d.self_attn.k_proj.weight",
    "model.layers.%d.self_attn.k_proj.bias", "model.layers.%d.self_attn.v_proj.weight", "model.layers.%d.self_attn.v_proj.bias",
    "model.layers.%d.self_attn.o_proj.weight", "model.layers.%d.mlp.gate_proj.weight", "model.layers.%d.mlp.up_proj.weight",
    "model.layers.%d.mlp.down_proj.weight", "visual.blocks.%d.norm1.weight", "visual.blocks.%d.norm1.bias",
    "visual.blocks.%d.norm2.weight", "visual.blocks.%d.norm2.bias", "visual.blocks.%d.attn.qkv.weight",
    "visual.blocks.%d.attn.qkv.bias", "visual.blocks.%d.attn.proj.weight", "visual.blocks.%d.attn.proj.bias",
    "visual.blocks.%d.mlp.fc1.weight", "visual.blocks.%d.mlp.fc1.bias", "visual.blocks.%d.mlp.fc2.weight", "visual.blocks.%d.mlp.fc2.bias"};
/* clang-format on */
enum { NAMES = sizeof tensor_names / sizeof *tensor_names };
static const char *const suffixes[] = {"", "_scale", "_group"};

static migi_config read_config(const uint8_t *b)
{
    migi_config c = config;
    c.layers = b[0], c.hidden = 4 * b[1], c.intermediate = 4 * b[2], c.heads = b[3], c.kv_heads = b[4], c.head_dim = 2 * b[5];
    c.vocab = b[6], c.tied = b[7] & 1;
    for (int i = 0; i < 3; i++) c.mrope_section[i] = (int8_t)b[8 + i];
    c.v_depth = b[11], c.v_dim = 4 * b[12], c.v_heads = b[13], c.v_mlp = 4 * b[14], c.merge = b[15];
    c.patch = 2; /* 24 numbers */
    return c;
}

static int64_t read_size(uint8_t b) { return b < 250 ? b : hostile[b - 250]; }

/* Reads the list into w; every tensor's data is a block of its own, so that a sanitizer sees each byte too far. */
static void read_tensors(weights *w, const uint8_t *list, size_t size)
{
    size_t count = 0;
    while (count < MOST && (count + 1) * ENTRY <= size && list[count * ENTRY] != END) count++;
    const uint8_t *data = list + count * ENTRY;
    size_t left = size - count * ENTRY;
    if (left) data++, left--; /* the mark of the end */
    for (size_t i = 0; i < count; i++) {
        const uint8_t *e = list + i * ENTRY;
        size_t first = (size_t)e[9] | (size_t)e[10] << 8, bytes = (size_t)e[11] | (size_t)e[12] << 8, at = w->count;
        char name[96];
        snprintf(name, sizeof name, tensor_names[e[0] / 3 % NAMES], e[1]);
        snprintf(w->names[at], sizeof w->names[at], "%.80s%s", name, suffixes[e[0] % 3]);
        w->data[at] = calloc(1, bytes ? bytes : 1);
        if (first < left) memcpy(w->data[at], data + first, bytes < left - first ? bytes : left - first);
        w->list[at] = (migi_tensor){
            .name = w->names[at], .data = w->data[at], .bytes = (int64_t)bytes, .dtype = e[2], .rank = (int8_t)e[3]};
        for (int d = 0; d < 5; d++) w->list[at].shape[d] = read_size(e[4 + d]);
        w->count++;
    }
}

static void use(const migi_model *model, const migi_config *c, int flags)
{
    migi_pool *pool;
    migi_session *s = NULL;
    migi_vision *v = NULL;
    migi_error err;
    int32_t tokens[24] = {0}, count = 0, token;
    float logprob;
    int unit = c->patch * c->merge;
    uint8_t *rgb = malloc((size_t)(6 * unit * unit));
    picture(rgb, unit, 2 * unit, 9); /* two cells */
    if (migi_pool_new(&pool, 1, flags & 2 ? "amx-emulated" : NULL, &err) != MIGI_OK) abort();
    migi_session_options o = {.context = 32, .fp32 = flags & 1};
    if (migi_session_new(&s, model, pool, &o, &err) != MIGI_OK || migi_vision_encode(&v, s, rgb, unit, 2 * unit, &err) != MIGI_OK)
        goto done;
    tokens[count++] = 1 % c->vocab;
    for (int i = 0; i < 2 && c->image_token < c->vocab; i++) tokens[count++] = c->image_token;
    for (int i = 0; i < 6; i++) tokens[count++] = i % c->vocab == c->image_token ? 0 : i % c->vocab;
    const migi_vision *pictures[] = {v};
    if (migi_session_sync(s, tokens, count, pictures, c->image_token < c->vocab, &err) != MIGI_OK) goto done;
    for (int i = 0; i < 2 && migi_session_greedy(s, 1.05f, &token, &logprob, &err) == MIGI_OK; i++)
        if (migi_session_append(s, &token, 1, NULL, &err) != MIGI_OK) break;
done:
    migi_vision_free(v);
    migi_session_free(s);
    migi_pool_free(pool);
    free(rgb);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < CONFIG || size > MOST_BYTES) return 0;
    migi_config c = read_config(input);
    weights *w = calloc(1, sizeof *w);
    migi_model *model;
    migi_error err;
    read_tensors(w, input + CONFIG, size - CONFIG);
    if (migi_model_new(&model, &c, w->list, (size_t)w->count, &err) == MIGI_OK) use(model, &c, input[CONFIG - 1]);
    migi_model_free(model);
    free_weights(w);
    return 0;
}

#ifdef REPLAY

/* ---- seeds: small whole models, then single tensors with one thing wrong */

typedef struct input {
    uint8_t bytes[MOST_BYTES], data[MOST_BYTES];
    size_t list, used; /* bytes of the list, of the data */
    int entries[MOST]; /* where each begins */
    int count;
} input;

static void put_entry(input *in, int name, int suffix, int layer, const migi_tensor *t)
{
    uint8_t *e = in->bytes + in->list;
    size_t first = 0, bytes = (size_t)t->bytes; /* where the data holds these bytes already, or ends with their beginning */
    while (memcmp(in->data + first, t->data, bytes < in->used - first ? bytes : in->used - first)) first++;
    memcpy(in->data + first, t->data, bytes);
    if (first + bytes > in->used) in->used = first + bytes;
    e[0] = (uint8_t)(3 * name + suffix), e[1] = (uint8_t)layer, e[2] = (uint8_t)t->dtype, e[3] = (uint8_t)t->rank;
    for (int d = 0; d < 5; d++) e[4 + d] = (uint8_t)t->shape[d];
    e[9] = (uint8_t)first, e[10] = (uint8_t)(first >> 8), e[11] = (uint8_t)t->bytes, e[12] = (uint8_t)(t->bytes >> 8);
    in->entries[in->count++] = (int)in->list;
    in->list += ENTRY;
}

/* A matrix (bits 4, 8, 16) or a vector (cols 0) of repeating values, so that its bytes repeat too. */
static void put(input *in, int name, int layer, int rows, int cols, int bits)
{
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    float *w = malloc(n * sizeof *w);
    for (size_t i = 0; i < n; i++) w[i] = cols ? .11f * (float)((int)(i % (size_t)cols * 5 % 8) - 3) : 1.f;
    weights *to = calloc(1, sizeof *to);
    if (cols && bits != 16) add_quantized(to, "", w, rows, cols, bits, group_of(cols), w);
    else {
        add_stored(to, "", "", MIGI_BF16, (int64_t)n * 2, cols ? 2 : 1, (int64_t[]){rows, cols});
        for (size_t i = 0; i < n; i++) ((uint16_t *)to->data[0])[i] = migi_f32_to_bf16(w[i]);
    }
    for (int i = 0; i < to->count; i++) put_entry(in, name, i, layer, &to->list[i]);
    free_weights(to);
    free(w);
}

enum { HIDDEN = 16, MLP = 16, HEADS = 2, KV_HEADS = 2, SIZE = 8, VOCAB = 16, V_DIM = 16, V_MLP = 16, PATCH = 24 };

static input *seed_model(int bits, int tied, int flags)
{
    int merged = bits ? V_DIM : 4 * V_DIM;
    input *in = calloc(1, sizeof *in);
    memcpy(in->bytes,
           (uint8_t[CONFIG]){1, HIDDEN / 4, MLP / 4, HEADS, KV_HEADS, SIZE / 2, VOCAB, (uint8_t)tied, 2, 1, 1, 1, V_DIM / 4, 1, V_MLP / 4,
                             (uint8_t)(bits ? 1 : 2), (uint8_t)flags},
           CONFIG);
    in->list = CONFIG;
    /* clang-format off */
    const int shapes[NAMES][2] = {{VOCAB, HIDDEN}, {VOCAB, HIDDEN}, {HIDDEN, 0}, {V_DIM, PATCH}, {V_DIM, 0}, {V_DIM, 0}, {merged, merged},
        {merged, 0}, {HIDDEN, merged}, {HIDDEN, 0}, {HIDDEN, 0}, {HIDDEN, 0}, {HEADS * SIZE, HIDDEN}, {HEADS * SIZE, 0}, {KV_HEADS * SIZE, HIDDEN},
        {KV_HEADS * SIZE, 0}, {KV_HEADS * SIZE, HIDDEN}, {KV_HEADS * SIZE, 0}, {HIDDEN, HEADS * SIZE}, {MLP, HIDDEN}, {MLP, HIDDEN}, {HIDDEN, MLP}, {V_DIM, 0}, {V_DIM, 0},
        {V_DIM, 0}, {V_DIM, 0}, {3 * V_DIM, V_DIM}, {3 * V_DIM, 0}, {V_DIM, V_DIM}, {V_DIM, 0}, {V_MLP, V_DIM}, {V_MLP, 0}, {V_DIM, V_MLP}, {V_DIM, 0}};
    /* clang-format on */
    for (int i = 0; i < NAMES; i++)
        if (i != 1 || !tied) put(in, i, 0, shapes[i][0], shapes[i][1], i == 0 && bits < 8 ? 8 : bits ? bits : (int[]){4, 8, 16}[i % 3]);
    return in;
}

/* Writes the input with its data, or with `keep` bytes of it and the rest read as zeros. */
static void save(const char *folder, const char *name, const input *in, size_t keep)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    if (!f) {
        perror(path);
        exit(1);
    }
    fwrite(in->bytes, 1, in->list, f);
    fputc(END, f);
    fwrite(in->data, 1, keep < in->used ? keep : in->used, f);
    fclose(f);
}

static void save_seeds(const char *folder)
{
    static const struct {
        const char *name;
        int bits, tied, flags;
    } whole[] = {{"int4", 4, 0, 0}, {"int8-tied", 8, 1, 2}, {"mixed-fp32", 0, 0, 1}, {"bf16", 16, 1, 2}};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        input *in = seed_model(whole[i].bits, whole[i].tied, whole[i].flags);
        save(folder, whole[i].name, in, MOST_BYTES);
        free(in);
    }
    /* entry, byte of it, value: name, layer, dtype, rank, sizes, offset, length. Such an entry is refused by itself */
    static const int faults[][3] = {{0, 0, 200}, {3, 2, 9},     {6, 3, 250}, {6, 3, 7},    {9, 4, 251}, {12, 5, 252}, {15, 5, 254},
                                    {18, 11, 1}, {21, 12, 255}, {24, 1, 7},  {30, 6, 250}, {36, 4, 0},  {41, 5, 251}};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        char name[32];
        input *in = seed_model(4, 0, 0);
        int entry = in->entries[faults[i][0] % in->count];
        in->bytes[entry + faults[i][1]] = (uint8_t)faults[i][2];
        memmove(in->bytes + CONFIG, in->bytes + entry, ENTRY);
        in->list = CONFIG + ENTRY;
        snprintf(name, sizeof name, "fault-%02zu", i);
        save(folder, name, in, 0);
        free(in);
    }
    input *in = seed_model(4, 0, 0);
    save(folder, "zeros", in, 0); /* factors of 0 */
    free(in);
}

static int replay(const char *path)
{
    static uint8_t bytes[MOST_BYTES + 1];
    FILE *f = fopen(path, "rb");
    if (!f) return perror(path), 1;
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    uint8_t *exact = malloc(n ? n : 1); /* a block of its own: no byte past the input */
    memcpy(exact, bytes, n);
    LLVMFuzzerTestOneInput(exact, n);
    free(exact);
    return 0;
}

/* The untouched seeds are whole models: if they were refused, the corpus would test little. */
static int seeds_open(void)
{
    int refused = 0;
    for (int bits = 0; bits <= 16; bits += 4) {
        if (bits == 12) continue;
        input *in = seed_model(bits, 0, 0);
        weights *w = calloc(1, sizeof *w);
        migi_model *model;
        migi_error err;
        migi_config c = read_config(in->bytes);
        uint8_t *joined = malloc(in->list - CONFIG + 1 + in->used);
        memcpy(joined, in->bytes + CONFIG, in->list - CONFIG);
        joined[in->list - CONFIG] = END;
        memcpy(joined + in->list - CONFIG + 1, in->data, in->used);
        read_tensors(w, joined, in->list - CONFIG + 1 + in->used);
        if (migi_model_new(&model, &c, w->list, (size_t)w->count, &err) != MIGI_OK)
            refused++, printf("seed of %d bits: %s\n", bits, err.message);
        migi_model_free(model);
        free_weights(w);
        free(joined);
        free(in);
    }
    return refused;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--seeds")) {
        mkdir(argv[2], 0755);
        return save_seeds(argv[2]), 0;
    }
    int bad = seeds_open();
    for (int i = 1; i < argc; i++) bad += replay(argv[i]);
    printf("%d inputs replayed, %d bad\n", argc - 1, bad);
    return bad != 0 || argc < 2;
}
#endif
