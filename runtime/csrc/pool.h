/* pool.h - threads that share out numbered tasks, and the kernels of their CPU. */
#ifndef MIGI_POOL_H
#define MIGI_POOL_H

#include "internal.h"
#include "kernels/kernels.h"

/* Runs work(arg, task, worker) for every task in [0, tasks); worker < migi_pool_threads. Returns when all are done. */
typedef void migi_work(void *arg, int task, int worker);
void migi_pool_run(migi_pool *pool, migi_work *work, void *arg, int tasks);
const migi_kernels *migi_pool_kernels(const migi_pool *pool);

#endif
