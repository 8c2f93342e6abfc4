/* pool.c - a fixed set of threads that share out numbered tasks; the caller works too.
 *
 * Each worker has a range of neighbouring tasks, so that it reads memory in one long stream, and helps with what is left of
 * the others' ranges when its own is done.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { SPINS = 4000, MAX_THREADS = 256 };

/* Tasks next .. end; alone on its cache line, as its worker asks for it all the time. */
typedef struct range {
    _Alignas(64) atomic_int next;
    int end;
} range;

struct migi_pool {
    migi_kernels kernels;
    int threads, started;
    pthread_t *handles;
    pthread_mutex_t lock;
    pthread_cond_t wake, idle;
    atomic_uint generation; /* grows by one with every run */
    atomic_int busy;        /* workers still in this run */
    range *ranges;          /* one for each worker */
    bool stop;
    migi_work *work;
    void *arg;
};

typedef struct seat {
    migi_pool *pool;
    int worker;
} seat;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_tasks(migi_pool *pool, int worker)
{
    for (int i = 0; i < pool->threads; i++) {
        range *r = &pool->ranges[(worker + i) % pool->threads];
        for (int task; (task = atomic_fetch_add(&r->next, 1)) < r->end;) pool->work(pool->arg, task, worker);
    }
}

static void *worker_main(void *arg)
{
    seat *s = arg;
    migi_pool *pool = s->pool;
    int worker = s->worker;
    free(s);
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool->generation) == seen; i++) relax();
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->generation) == seen && !pool->stop) pthread_cond_wait(&pool->wake, &pool->lock);
        bool stop = pool->stop;
        seen = atomic_load(&pool->generation);
        pthread_mutex_unlock(&pool->lock);
        if (stop) return NULL;
        take_tasks(pool, worker);
        if (atomic_fetch_sub(&pool->busy, 1) == 1) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->idle);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

void migi_pool_run(migi_pool *pool, migi_work *work, void *arg, int tasks)
{
    if (pool->threads == 1 || tasks == 1) {
        for (int i = 0; i < tasks; i++) work(arg, i, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->work = work;
    pool->arg = arg;
    for (int i = 0; i < pool->threads; i++) {
        pool->ranges[i].end = (int)((int64_t)tasks * (i + 1) / pool->threads);
        atomic_store(&pool->ranges[i].next, (int)((int64_t)tasks * i / pool->threads));
    }
    atomic_store(&pool->busy, pool->threads - 1);
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    take_tasks(pool, 0);
    for (int i = 0; i < SPINS && atomic_load(&pool->busy); i++) relax();
    if (!atomic_load(&pool->busy)) return;
    pthread_mutex_lock(&pool->lock);
    while (atomic_load(&pool->busy)) pthread_cond_wait(&pool->idle, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

static int allowed_cpus(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

static void init_locks(migi_pool *pool)
{
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
}

static migi_status start(migi_pool *pool, migi_error *err)
{
    migi_status status = MIGI_OK;
    for (int i = 1; i < pool->threads; i++) {
        seat *s = malloc(sizeof *s);
        if (s) *s = (seat){pool, i};
        int failed = !s || pthread_create(&pool->handles[i], NULL, worker_main, s);
        if (failed) free(s);
        FAIL_IF(failed, MIGI_E_THREAD, "the system refused thread %d; ask for fewer with --threads", i + 1);
        pool->started = i;
    }
done:
    return status;
}

/* The locks are made anew too: a thread that is gone may hold them. */
void migi_pool_restart(migi_pool *pool)
{
    init_locks(pool);
    pool->started = 0;
    atomic_store(&pool->generation, 0);
    atomic_store(&pool->busy, 0);
    if (start(pool, NULL) != MIGI_OK) pool->threads = pool->started + 1; /* with the caller, those that could be had */
}

migi_status migi_pool_new(migi_pool **out, int32_t threads, const char *isa, migi_error *err)
{
    migi_status status = MIGI_OK;
    migi_pool *pool = NULL;
    *out = NULL;
    FAIL_IF(threads < 0 || threads > MAX_THREADS, MIGI_E_ARGUMENT, "%d threads asked for; give 0 (one per core) to %d", threads,
            MAX_THREADS);
    pool = calloc(1, sizeof *pool);
    FAIL_IF(!pool, MIGI_E_MEMORY, "no memory for the thread pool");
    init_locks(pool);
    int table = isa && *isa ? migi_kernels_named(isa) : migi_kernels_best();
    FAIL_IF(table < 0, MIGI_E_UNSUPPORTED, "this build has no kernels named '%s'; migician-run --kernels lists those it has", isa);
    FAIL_IF(!migi_kernels_fill(&pool->kernels, table), MIGI_E_UNSUPPORTED,
            "this CPU cannot run the '%s' kernels; unset MIGICIAN_ISA to take its best", isa);
    pool->threads = threads ? threads : allowed_cpus();
    if (pool->threads > MAX_THREADS) pool->threads = MAX_THREADS;
    pool->handles = calloc((size_t)pool->threads, sizeof *pool->handles);
    pool->ranges = migi_alloc((size_t)pool->threads, sizeof *pool->ranges);
    FAIL_IF(!pool->handles || !pool->ranges, MIGI_E_MEMORY, "no memory for %d threads", pool->threads);
    TRY(start(pool, err));
    *out = pool;
    return MIGI_OK;
done:
    migi_pool_free(pool);
    return status;
}

void migi_pool_free(migi_pool *pool)
{
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i <= pool->started; i++) pthread_join(pool->handles[i], NULL);
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool->handles);
    free(pool->ranges);
    free(pool);
}

int32_t migi_pool_threads(const migi_pool *pool) { return pool->threads; }
const char *migi_pool_isa(const migi_pool *pool) { return pool->kernels.isa; }
const migi_kernels *migi_pool_kernels(const migi_pool *pool) { return &pool->kernels; }
