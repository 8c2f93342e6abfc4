/* runner.h - what a session lends to its towers: a workspace wide enough for them, and the word to stop. */
#ifndef MIGI_RUNNER_H
#define MIGI_RUNNER_H

#include "model.h"

#include <stdatomic.h>

typedef struct runner {
    workspace ws;
    atomic_int cancelled;
    int (*poll)(void *);
    void *poll_arg;
} runner;

/* Takes the pool's kernels, and of them and the model's weights what the options allow; the workspace has no buffers yet. */
void migi_runner_init(runner *r, migi_pool *pool, const migi_model *m, const migi_session_options *options);
/* Asks for those buffers: for every map and every head of `m`. */
void migi_runner_buffers(runner *r, buffers *b, const migi_model *m);
void migi_runner_cancel(runner *r); /* from any thread */
/* MIGI_E_CANCELLED when the work is to stop; called between layers. */
migi_status migi_runner_stopped(runner *r, migi_error *err);

#endif
