/* lrucache_core.h: what the files of lru_cache share.
 *
 *   lrucache_store.c    keys; entries, what they hold, for how long, and which of them goes first
 *   lrucache_flight.c   the tasks that compute, the calls that wait for them, cache_close()
 *   lrucache.c          the callable and its bound twin: hits, methods, arguments
 *
 * Cache      the callable. Bound: the same, seen through an instance.
 * Entry      what one key leads to: a value or an error, or nothing yet.
 * Flight     one run of the function for an entry, on one loop: a task and the calls that wait for it.
 * Call       one call that was no hit at once: an awaitable that starts a flight or joins it.
 * Close      what cache_close() returns.
 *
 * States:     an entry is EMPTY, and then holds a VALUE or an ERROR; it is EMPTY again when that expired under a flight.
 *             It is cached while the dict leads to it: until it is evicted, invalidated, expired, or its flight brings nothing.
 *             A flight is FLYING, then LANDED, FAILED or CANCELLED, for good.
 * Invariants: a cached entry that is EMPTY has a flight. An entry is in `deadlines` when it holds something that will expire.
 *             A flight that is FLYING and not in the background has calls in `waiting`, or its task was cancelled when the
 *             last of them left. The calls of a flight are all of its loop. `weight` is the sum over the cached entries.
 * Ownership:  the dict owns its entries, a call its flight, a flight its entry and its task, an entry its cache. The
 *             done callback of the task keeps the flight; one in the background is owned by the cache too, as
 *             nobody waits for it. The other links own nothing: who is freed takes itself out.
 * Locking:    all fields of all of them belong to the critical section of the cache; what happens to a task and to
 *             waiters is done in the thread of their loop, or posted there.
 * Re-entry:   hashing, comparing, making tasks and dropping references run any code, and other threads meanwhile: entries are
 *             held and their state is read again after. Whether the dict's entry is the one that is meant is checked at
 *             removal.
 */
#ifndef AIOT_LRUCACHE_CORE_H
#define AIOT_LRUCACHE_CORE_H

#include "lrucache.h"

#include "awaitable.h"
#include "heap.h"
#include "link.h"
#include "waiter.h"

#include <math.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *dict;
    PyObject *weakrefs;
    PyObject *func;
    PyObject *key_func;         /* or NULL */
    PyObject *weigh;            /* or NULL */
    PyObject *random;           /* random.random, or NULL without jitter */
    PyObject *entries;          /* {key: entry} */
    AiotLoop *loop;             /* of the first call, or NULL; stays NULL when shared */
    Py_ssize_t maxsize;         /* -1: no limit */
    Py_ssize_t max_weight;      /* meaningful with weigh */
    Py_ssize_t weight;
    Py_ssize_t hits;
    Py_ssize_t misses;
    Py_ssize_t n_flights;
    double expire_after;        /* infinity: never */
    double jitter;
    double stale_for;
    double errors_for;
    aiot_heap deadlines;        /* of entries, when what they hold goes */
    aiot_link recent;           /* cached entries, least recently used first */
    aiot_link flights;          /* FLYING, for cached entries or not */
    aiot_link closers;
    bool typed;
    bool shared;                /* by several loops */
    bool closed;
    bool warned;
} CacheObject;

typedef enum {
    EMPTY,
    VALUE,
    ERROR,
} aiot_lru_content;

typedef struct {
    PyObject_HEAD
    CacheObject *cache;
    PyObject *key;
    PyObject *value;            /* of VALUE; the exception of ERROR */
    PyObject *traceback;        /* of the exception, as it came from the task */
    double fresh_until;         /* infinity: for ever */
    double gone_at;
    double retry_at;            /* no refresh before */
    double shift;               /* the clock_shift at which these three count */
    Py_ssize_t weight;
    aiot_heap_node deadline;    /* in the cache's deadlines, for gone_at */
    aiot_link recent;
    aiot_link flights;          /* those that can be joined */
    uint8_t content;
    bool cached;
} EntryObject;

typedef enum {
    FLYING,
    LANDED,
    FAILED,
    CANCELLED,
} aiot_lru_flight_state;

typedef struct {
    PyObject_HEAD
    EntryObject *entry;
    AiotLoop *loop;
    PyObject *task;             /* while FLYING, once it was made */
    PyObject *value;            /* of LANDED; else the exception, or NULL */
    PyObject *traceback;
    aiot_link in_entry;
    aiot_link in_cache;
    aiot_link waiting;          /* list of calls */
    aiot_post stop;
    uint8_t state;
    bool background;            /* a refresh: flies whether anybody waits or not */
    bool owned;                 /* by the cache */
    bool stopping;              /* the stop is under way */
} FlightObject;

/* ---- the store (lrucache_store.c); all with the lock held ----------------------------------------------------- */

/* The key of a call: what key= makes of the arguments, or what functools makes of them. instance comes first, if it isn't
 * NULL. Needs no lock. */
PyObject *aiot_lru_key(aiot_state *state, CacheObject *self, PyObject *instance, PyObject *const *args, Py_ssize_t nargs,
                       PyObject *kwnames);

/* A reading of the clock of a loop, and how far that clock was set ahead of the one that the loops share (clock.c). Times of
 * one loop compare exactly; those of another loop, or from before another clock was put in, but for rounding. */
typedef struct {
    double at;
    double shift;
} aiot_lru_time;

static inline bool
aiot_lru_is_before(aiot_lru_time now, double when, double shift)
{
    return now.at < (now.shift == shift ? when : when + (now.shift - shift));
}

/* loop NULL: whichever can be had. 0 or -1. */
int aiot_lru_now(CacheObject *self, AiotLoop *loop, aiot_lru_time *now);

/* What is cached for a key: 1 with a new reference, 0, or -1. It may be expired. */
static inline int
aiot_lru_find(CacheObject *self, PyObject *key, EntryObject **found)
{
    PyObject *op;
    int there = PyDict_GetItemRef(self->entries, key, &op);
    *found = (EntryObject *)op;
    if (AIOT_UNLIKELY(there > 0 && !(*found)->cached)) {
        Py_CLEAR(*found);
        return 0;
    }
    return there;
}

/* The same, but what is gone is dropped. *fresh says whether it is not stale. */
int aiot_lru_find_current(CacheObject *self, AiotLoop *loop, PyObject *key, EntryObject **found, bool *fresh);

/* The entry for a key, made and put in when there is none: new reference. Its flight must follow at once. */
EntryObject *aiot_lru_obtain(aiot_state *state, CacheObject *self, PyObject *key);

static inline void
aiot_lru_touch(EntryObject *self)
{
    if (!aiot_link_is_out(&self->recent) && self->recent.next != &self->cache->recent) {
        aiot_link_remove(&self->recent);
        aiot_link_append(&self->cache->recent, &self->recent);
    }
}

/* Takes it out of the cache, if it is there, and stops refreshes that nobody waits for. Keeps a pending exception. Hold a
 * reference to it. */
void aiot_lru_drop(EntryObject *self);

/* Drops it if it holds nothing and nothing is to come. */
void aiot_lru_drop_if_vain(EntryObject *self);

/* Drops what is over. 0 or -1. */
int aiot_lru_expire(CacheObject *self);

/* Drops what is over, then the least recently used, until there are not more than maxsize. Called with no exception set. */
void aiot_lru_evict(CacheObject *self);

/* The cache is empty afterwards; flights go on, but for refreshes. */
void aiot_lru_empty(CacheObject *self);

/* What a value weighs (*weight is -1 when no int of ours can say it): 0, or -1 with the error of weight= or about its answer. */
int aiot_lru_weigh(CacheObject *self, PyObject *value, Py_ssize_t *weight);

/* A cached entry gets its value, with its time from now on, unless it is too heavy. 0, or -1 and nothing is kept. */
int aiot_lru_keep(EntryObject *self, AiotLoop *loop, PyObject *value, Py_ssize_t weight);

/* The same with an exception, for the time that errors are kept. */
int aiot_lru_keep_error(EntryObject *self, AiotLoop *loop, PyObject *exc);

/* cache_invalidate_where(): how many were dropped, or NULL. Takes the lock itself. */
PyObject *aiot_lru_invalidate_where(CacheObject *self, PyObject *instance, PyObject *predicate);

/* ---- flights (lrucache_flight.c) ------------------------------------------------------------------------------- */

/* Cancels the task, in its loop. With the lock held; sets no exception. */
void aiot_lru_stop(FlightObject *self);

/* What somebody awaits who was no hit at once. */
PyObject *aiot_lru_call(aiot_state *state, CacheObject *cache, PyObject *key, PyObject *instance, PyObject *const *args,
                        Py_ssize_t nargs, PyObject *kwnames);

/* What cache_close() returns. */
PyObject *aiot_lru_close(aiot_state *state, CacheObject *cache, bool wait);

/* For the collector: the flights that the cache owns. */
int aiot_lru_traverse_flights(CacheObject *self, visitproc visit, void *arg);
void aiot_lru_disown_flights(CacheObject *self);

static inline int
aiot_lru_check_open(CacheObject *self)
{
    if (AIOT_LIKELY(!self->closed)) {
        return 0;
    }
    PyErr_Format(PyExc_RuntimeError, "the cache of %R is closed", self->func);
    return -1;
}

static inline void
aiot_lru_unlink(aiot_link *link)
{
    if (!aiot_link_is_out(link)) {
        aiot_link_remove(link);
    }
}

int aiot_lrucache_store_add_types(PyObject *module);
int aiot_lrucache_flight_add_types(PyObject *module);

#endif /* AIOT_LRUCACHE_CORE_H */
