/* model.h - every tensor of one model, bound to its place. */
#ifndef MIGI_MODEL_H
#define MIGI_MODEL_H

#include "linear.h"

typedef struct layer {
    norm before_attention, before_mlp;
    matrix q, k, v, o, gate, up, down;
    float *q_bias, *k_bias, *v_bias;
} layer;

typedef struct block {
    norm before_attention, before_mlp;
    matrix qkv, proj, fc1, fc2;
    float *qkv_bias, *proj_bias, *fc1_bias, *fc2_bias;
} block;

struct migi_model {
    migi_config c;
    matrix embedding, head; /* [vocab, hidden] */
    layer *layers;
    norm final;
    matrix patch_embed; /* [v_dim, channels * temporal * patch^2] */
    block *blocks;
    norm merger_norm;
    matrix merger_fc1, merger_fc2;
    float *merger_fc1_bias, *merger_fc2_bias;
    float *owned; /* norms and biases, one allocation */
    int64_t bytes;
    bool quantized; /* some matrix is */
};

#endif
