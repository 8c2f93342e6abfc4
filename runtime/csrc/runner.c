/* runner.c - what a session lends to its towers: a workspace wide enough for them, and the word to stop. */
#include "runner.h"

#include "attention.h"

void migi_runner_init(runner *r, migi_pool *pool, const migi_model *m, const migi_session_options *options)
{
    const migi_kernels *k = migi_pool_kernels(pool);
    r->ws = (workspace){.pool = pool, .k = k, .bf16 = k->bf16_dots && !options->fp32, .integers = m->quantized && !options->fp32};
    r->poll = options->poll;
    r->poll_arg = options->poll_arg;
    atomic_init(&r->cancelled, 0);
}

void migi_runner_buffers(runner *r, buffers *b, const migi_model *m)
{
    workspace *ws = &r->ws;
    const migi_config *c = &m->c;
    size_t cells = (size_t)c->merge * (size_t)c->merge, merged = (size_t)c->v_dim * cells; /* the merger's rows are wide and few */
    size_t patch = (size_t)c->channels * (size_t)c->temporal * (size_t)c->patch * (size_t)c->patch;
    size_t widest = larger(larger((size_t)c->hidden, (size_t)c->heads * (size_t)c->head_dim), (size_t)c->intermediate);
    widest = larger(larger(widest, larger((size_t)c->v_dim, patch)), (size_t)c->v_mlp);
    size_t padded = larger(MIGI_CHUNK * migi_padded_int8(widest), MIGI_CHUNK / cells * migi_padded_int8(merged));
    size_t attend = larger(migi_attention_scratch(ws->k, c->head_dim), migi_attention_scratch(ws->k, c->v_dim / c->v_heads));
    ws->rounded_len = ws->bf16 ? padded : 0;
    ws->quantized_len = ws->integers ? padded : 0;
    ws->scratch_bytes = (larger(migi_linear_scratch(), attend) + 63) / 64 * 64;
    ws->rounded = migi_buffer(b, ws->rounded_len, sizeof *ws->rounded);
    ws->quantized = migi_buffer(b, ws->quantized_len, 1);
    ws->row_scales = migi_buffer(b, ws->integers ? MIGI_CHUNK : 0, sizeof *ws->row_scales);
    ws->scratch = migi_buffer(b, ws->scratch_bytes, (size_t)migi_pool_threads(ws->pool));
}

void migi_runner_cancel(runner *r) { atomic_store(&r->cancelled, 1); }

migi_status migi_runner_stopped(runner *r, migi_error *err)
{
    if (!atomic_exchange(&r->cancelled, 0) && !(r->poll && r->poll(r->poll_arg))) return MIGI_OK;
    return migi_fail(err, MIGI_E_CANCELLED, "cancelled");
}
