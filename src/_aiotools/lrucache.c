/* lrucache.c: the cache of results of a coroutine function, behind lru_cache().
 *
 * Cache      the callable. Bound: the same, seen through an instance.
 * Entry      what one key leads to: the task that computes it while it does, then its outcome.
 * Call       one call that was no hit at once: an awaitable that starts the task or joins it.
 * Close      what cache_close() returns.
 *
 * States:     an entry is FLYING, then DONE, FAILED or CANCELLED, for good. It is cached while the dict leads to it, from
 *             the start of the flight until it is evicted, invalidated, expired, or found to be no result.
 * Invariants: a FLYING entry has calls in `waiting`, or its task was cancelled when the last of them left. `age` holds what is
 *             DONE and cached, in the order of completion, which is that of expiry.
 * Ownership:  the dict owns its entries, a call its entry, an entry its cache and its task; the links own nothing,
 *             who is freed takes itself out. The done callback of the task keeps the entry while it flies.
 * Locking:    all fields of all four belong to the critical section of the cache.
 * Re-entry:   hashing, comparing, making tasks and dropping references run any code: entries are held meanwhile and
 *             their state is read again after. Whether the dict's entry is the one that is meant is checked at removal.
 */

#include "lrucache.h"

#include "args.h"
#include "awaitable.h"
#include "link.h"
#include "waiter.h"

#include <math.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *dict;
    PyObject *weakrefs;
    PyObject *func;
    PyObject *entries;          /* {key: entry} */
    AiotLoop *loop;             /* of the first call, or NULL */
    Py_ssize_t maxsize;         /* -1: no limit */
    Py_ssize_t hits;
    Py_ssize_t misses;
    Py_ssize_t n_flights;
    double expire_after;        /* infinity: never */
    aiot_link recent;           /* cached entries, least recently used first */
    aiot_link ages;
    aiot_link flights;          /* FLYING entries of the loop, cached or not */
    aiot_link closers;
    bool typed;
    bool closed;
    bool warned;
} CacheObject;

typedef enum {
    FLYING,
    DONE,
    FAILED,
    CANCELLED,
} entry_state;

typedef struct {
    PyObject_HEAD
    CacheObject *cache;
    AiotLoop *loop;
    PyObject *key;
    PyObject *task;             /* while FLYING, once it was made */
    PyObject *value;            /* of DONE; else the exception */
    PyObject *traceback;        /* of the exception, as it came from the task */
    double expires;             /* loop.time(), at a clock_shift of: */
    double shift;
    aiot_link recent;
    aiot_link age;
    aiot_link flight;
    aiot_link waiting;          /* list of calls */
    uint8_t state;
    bool cached;
} EntryObject;

typedef struct {
    AIOT_AWAITABLE_HEAD
    CacheObject *cache;
    PyObject *key;
    PyObject *args;             /* tuple */
    PyObject *kwargs;           /* dict, or NULL */
    EntryObject *entry;         /* once started */
    AiotWaiter *waiter;
    aiot_link link;             /* in the entry's `waiting` */
} CallObject;

typedef struct {
    AIOT_AWAITABLE_HEAD
    CacheObject *cache;
    AiotWaiter *waiter;
    aiot_link link;
    bool wait;
} CloseObject;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    CacheObject *cache;
    PyObject *instance;
    PyObject *weakrefs;
} BoundObject;

static void
unlink_if_in(aiot_link *link)
{
    if (!aiot_link_is_out(link)) {
        aiot_link_remove(link);
    }
}

/* ---- keys --------------------------------------------------------------------------------------------------- */

/* As functools makes them: a lone str or int is its own key; else a tuple of the arguments, with a mark before the
 * keywords, and the types of all values when these count. instance comes first, if it isn't NULL. */
static PyObject *
key_new(aiot_state *state, bool typed, PyObject *instance, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    if (!typed && nkw == 0 && nargs + (instance != NULL) == 1) {
        PyObject *only = instance != NULL ? instance : args[0];
        if (PyUnicode_CheckExact(only) || PyLong_CheckExact(only)) {
            return Py_NewRef(only);
        }
    }
    Py_ssize_t n = nargs + (instance != NULL);
    PyObject *key = PyTuple_New(n + (nkw > 0 ? 1 + 2 * nkw : 0) + (typed ? n + nkw : 0));
    if (key == NULL) {
        return NULL;
    }
    Py_ssize_t at = 0;
    if (instance != NULL) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(instance));
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(args[i]));
    }
    if (nkw > 0) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(state->lru_mark));
        for (Py_ssize_t i = 0; i < nkw; i++) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef(PyTuple_GET_ITEM(kwnames, i)));
            PyTuple_SET_ITEM(key, at++, Py_NewRef(args[nargs + i]));
        }
    }
    if (typed) {
        if (instance != NULL) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef((PyObject *)Py_TYPE(instance)));
        }
        for (Py_ssize_t i = 0; i < nargs + nkw; i++) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef((PyObject *)Py_TYPE(args[i])));
        }
    }
    return key;
}

/* ---- entries ------------------------------------------------------------------------------------------------- */

static EntryObject *
entry_new(aiot_state *state, CacheObject *cache, AiotLoop *loop, PyObject *key)
{
    EntryObject *self = (EntryObject *)state->LruEntryType->tp_alloc(state->LruEntryType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_link_init(&self->recent);
    aiot_link_init(&self->age);
    aiot_link_init(&self->flight);
    aiot_link_init(&self->waiting);
    self->cache = (CacheObject *)Py_NewRef((PyObject *)cache);
    self->loop = (AiotLoop *)Py_NewRef((PyObject *)loop);
    self->key = Py_NewRef(key);
    return self;
}

/* Takes it out of the cache, if it is there. Keeps a pending exception. Hold a reference to it. */
static void
entry_drop_lock_held(EntryObject *self)
{
    CacheObject *cache = self->cache;
    if (!self->cached) {
        return;
    }
    self->cached = false;
    unlink_if_in(&self->recent);
    unlink_if_in(&self->age);
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *entries = Py_NewRef(cache->entries);
    PyObject *found;
    int failed = PyDict_GetItemRef(entries, self->key, &found);
    if (failed > 0) {
        failed = found == (PyObject *)self ? PyDict_DelItem(entries, self->key) : 0;
        Py_DECREF(found);
    }
    if (failed < 0) {
        /* A key that can't be compared any more. What stays in the dict does not count as cached. */
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) {
            aiot_write_unraisable((PyObject *)cache);
        }
        PyErr_Clear();
    }
    Py_DECREF(entries);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* The first of a list of the cache, dropped. */
static void
drop_first_lock_held(EntryObject *first)
{
    Py_INCREF(first);
    entry_drop_lock_held(first);
    Py_DECREF(first);
}

/* The time that expiry is measured by: finer than that of a loop whose clock is coarse. 0 or -1. */
static int
read_clock(AiotLoop *loop, double *now)
{
    return aiot_loop_deadline(loop, 0.0, now);
}

static bool
entry_is_expired(EntryObject *self, double now)
{
    double expires = self->expires;
    if (self->shift != self->loop->clock_shift) {
        /* Another clock was put into the loop; what is left of the time stays the same. */
        expires += self->loop->clock_shift - self->shift;
    }
    return now >= expires;
}

/* Drops what is over. 0 or -1. */
static int
cache_expire_lock_held(CacheObject *self)
{
    if (aiot_link_is_empty(&self->ages)) {
        return 0;
    }
    double now;
    if (read_clock(self->loop, &now) < 0) {
        return -1;
    }
    while (!aiot_link_is_empty(&self->ages)) {
        EntryObject *first = AIOT_CONTAINER_OF(aiot_link_first(&self->ages), EntryObject, age);
        if (!entry_is_expired(first, now)) {
            break;
        }
        drop_first_lock_held(first);
    }
    return 0;
}

/* What is cached for a key, expired or not: 1 with a new reference, 0, or -1. */
static int
cache_find_lock_held(CacheObject *self, PyObject *key, EntryObject **found)
{
    PyObject *op;
    int there = PyDict_GetItemRef(self->entries, key, &op);
    *found = (EntryObject *)op;
    if (there > 0 && !(*found)->cached) {
        Py_CLEAR(*found);
        return 0;
    }
    return there;
}

/* The same, but what is expired is dropped. */
static int
cache_find_fresh_lock_held(CacheObject *self, PyObject *key, EntryObject **found)
{
    int there = cache_find_lock_held(self, key, found);
    if (there <= 0 || (*found)->state != DONE || isinf((*found)->expires)) {
        return there;
    }
    double now;
    if (read_clock((*found)->loop, &now) < 0) {
        Py_CLEAR(*found);
        return -1;
    }
    if (!entry_is_expired(*found, now)) {
        return 1;
    }
    entry_drop_lock_held(*found);
    Py_CLEAR(*found);
    return 0;
}

static void
entry_touch_lock_held(EntryObject *self)
{
    if (!aiot_link_is_out(&self->recent) && self->recent.next != &self->cache->recent) {
        aiot_link_remove(&self->recent);
        aiot_link_append(&self->cache->recent, &self->recent);
    }
}

/* Puts a new entry in, and what is too much out. 0 or -1. */
static int
entry_insert_lock_held(EntryObject *self)
{
    CacheObject *cache = self->cache;
    if (PyDict_SetItem(cache->entries, self->key, (PyObject *)self) < 0) {
        return -1;
    }
    self->cached = true;
    aiot_link_append(&cache->recent, &self->recent);
    while (cache->maxsize >= 0 && PyDict_GET_SIZE(cache->entries) > cache->maxsize
           && !aiot_link_is_empty(&cache->recent))
    {
        drop_first_lock_held(AIOT_CONTAINER_OF(aiot_link_first(&cache->recent), EntryObject, recent));
    }
    return 0;
}

/* The cache is empty afterwards; flights go on. */
static void
cache_empty_lock_held(CacheObject *self)
{
    while (!aiot_link_is_empty(&self->recent)) {
        drop_first_lock_held(AIOT_CONTAINER_OF(aiot_link_first(&self->recent), EntryObject, recent));
    }
    /* Those that could not be found again. */
    PyDict_Clear(self->entries);
}

/* ---- flights ------------------------------------------------------------------------------------------------- */

static void
cache_wake_closers_lock_held(CacheObject *self)
{
    while (self->n_flights == 0 && !aiot_link_is_empty(&self->closers)) {
        CloseObject *closer = AIOT_CONTAINER_OF(aiot_link_first(&self->closers), CloseObject, link);
        aiot_link_remove(&closer->link);
        if (closer->waiter != NULL) {
            aiot_waiter_wake_quietly(closer->waiter);
        }
    }
}

static void
entry_leave_flights_lock_held(EntryObject *self)
{
    if (!aiot_link_is_out(&self->flight)) {
        aiot_link_remove(&self->flight);
        self->cache->n_flights--;
        cache_wake_closers_lock_held(self->cache);
    }
}

/* The flight is over: state, and value or exception (stolen). Keeps a pending exception. */
static void
entry_settle_lock_held(EntryObject *self, entry_state state, PyObject *value)
{
    assert(self->state == FLYING);
    self->state = (uint8_t)state;
    self->value = value;
    if (state != DONE) {
        self->traceback = value == NULL ? NULL : PyException_GetTraceback(value);
        entry_drop_lock_held(self);
    }
    for (aiot_link *link = self->waiting.next; link != &self->waiting; link = link->next) {
        CallObject *call = AIOT_CONTAINER_OF(link, CallObject, link);
        if (call->waiter != NULL) {
            aiot_waiter_wake_quietly(call->waiter);
        }
    }
    entry_leave_flights_lock_held(self);
    Py_CLEAR(self->task);
}

/* A result that may stay, with its time from now on. 0 or -1. */
static int
entry_keep_lock_held(EntryObject *self)
{
    CacheObject *cache = self->cache;
    self->expires = INFINITY;
    if (isinf(cache->expire_after) || !self->cached) {
        return 0;
    }
    double now;
    if (cache_expire_lock_held(cache) < 0 || read_clock(self->loop, &now) < 0) {
        return -1;
    }
    self->expires = now + cache->expire_after;
    self->shift = self->loop->clock_shift;
    if (self->cached) {
        aiot_link_append(&cache->ages, &self->age);
    }
    return 0;
}

/* The task is done. 0, or -1 with an exception, and the flight over in any case. */
static int
entry_land_lock_held(EntryObject *self, PyObject *task)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    if (self->state != FLYING) {
        return 0;
    }
    if (aiot_link_is_empty(&self->waiting)) {
        /* All left. An exception stays with the task, which reports it. */
        entry_settle_lock_held(self, CANCELLED, NULL);
        return 0;
    }
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == Py_None) {
        Py_DECREF(exc);
        PyObject *value = PyObject_CallMethodNoArgs(task, state->str_result);
        if (value != NULL) {
            int failed = entry_keep_lock_held(self);
            if (self->state == FLYING) {
                if (failed) {
                    entry_drop_lock_held(self);
                }
                entry_settle_lock_held(self, DONE, value);
            }
            else {
                Py_DECREF(value);
            }
            return failed;
        }
        exc = NULL;
    }
    entry_state outcome = FAILED;
    if (exc == NULL) {
        exc = PyErr_GetRaisedException();
        outcome = CANCELLED;
    }
    if (self->state == FLYING) {
        entry_settle_lock_held(self, outcome, exc);
    }
    else {
        Py_DECREF(exc);
    }
    return 0;
}

static PyObject *
entry_landed(PyObject *op, PyObject *task)
{
    EntryObject *self = (EntryObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    failed = entry_land_lock_held(self, task);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef entry_landed_method = {
    "landed", entry_landed, METH_O, "What a cached call's task calls when it is done.",
};

/* Stops the task. Sets no exception. */
static void
entry_cancel_lock_held(EntryObject *self)
{
    PyObject *task = Py_XNewRef(self->task);
    if (task == NULL) {
        return;
    }
    PyObject *answer = PyObject_CallMethodNoArgs(task, aiot_state_of_exact_type(Py_TYPE(self))->str_cancel);
    if (answer == NULL) {
        aiot_write_unraisable(task);
    }
    Py_XDECREF(answer);
    Py_DECREF(task);
}

/* coro.close(), with the exception that is set kept. */
static void
close_coroutine(aiot_state *state, PyObject *coro)
{
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *answer = PyObject_CallMethodNoArgs(coro, state->str_close);
    if (answer == NULL) {
        PyErr_WriteUnraisable(coro);
    }
    Py_XDECREF(answer);
    PyErr_SetRaisedException(exc);
}

/* Makes the task of an entry. 0 or -1; then the flight is not over. */
static int
entry_take_off_lock_held(EntryObject *self, PyObject *coro)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *loop = aiot_loop_object(self->loop);
    PyObject *task = loop == NULL ? NULL : PyObject_CallMethodOneArg(loop, state->str_create_task, coro);
    Py_XDECREF(loop);
    if (task == NULL) {
        close_coroutine(state, coro);
        return -1;
    }
    Py_XSETREF(self->task, Py_NewRef(task));
    int failed = -1;
    PyObject *answer = PyObject_CallMethodNoArgs(task, state->str_done);
    int is_done = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (is_done > 0) {
        /* It started eagerly and needed no loop. */
        failed = entry_land_lock_held(self, task);
    }
    else if (is_done == 0) {
        PyObject *landed = PyCFunction_New(&entry_landed_method, (PyObject *)self);
        answer = landed == NULL ? NULL : PyObject_CallMethodOneArg(task, state->str_add_done_callback, landed);
        Py_XDECREF(landed);
        failed = answer == NULL ? -1 : 0;
        Py_XDECREF(answer);
    }
    if (failed && self->state == FLYING) {
        PyObject *exc = PyErr_GetRaisedException();
        entry_cancel_lock_held(self);
        PyErr_SetRaisedException(exc);
    }
    Py_DECREF(task);
    return failed;
}

/* ---- calls --------------------------------------------------------------------------------------------------- */

/* The outcome of the entry, for one of its calls. */
static PySendResult
call_finish_lock_held(CallObject *self, PyObject **result)
{
    EntryObject *entry = self->entry;
    unlink_if_in(&self->link);
    Py_CLEAR(self->waiter);
    if (entry->state == DONE) {
        *result = Py_NewRef(entry->value);
        return PYGEN_RETURN;
    }
    if (entry->value == NULL) {
        PyErr_SetNone(aiot_state_of_exact_type(Py_TYPE(self))->CancelledError);
        return PYGEN_ERROR;
    }
    /* Each call raises the same exception; what the others added to its traceback is not theirs to see. */
    PyObject *exc = Py_NewRef(entry->value);
    if (PyException_SetTraceback(exc, entry->traceback != NULL ? entry->traceback : Py_None) < 0) {
        PyErr_Clear();
    }
    PyErr_SetRaisedException(exc);
    return PYGEN_ERROR;
}

/* Leaves the entry; the last to do so ends the flight. */
static void
call_leave_lock_held(CallObject *self)
{
    EntryObject *entry = self->entry;
    Py_CLEAR(self->waiter);
    if (entry == NULL || aiot_link_is_out(&self->link)) {
        return;
    }
    aiot_link_remove(&self->link);
    if (entry->state == FLYING && aiot_link_is_empty(&entry->waiting)) {
        Py_INCREF(entry);
        entry_drop_lock_held(entry);
        if (entry->state == FLYING && aiot_link_is_empty(&entry->waiting)) {
            entry_cancel_lock_held(entry);
        }
        Py_DECREF(entry);
    }
}

static void
Call_abandon(aiot_awaitable *op)
{
    CallObject *self = (CallObject *)op;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    call_leave_lock_held(self);
    Py_END_CRITICAL_SECTION();
}

static PySendResult
call_suspend_lock_held(CallObject *self, PyObject **result)
{
    self->waiter = aiot_waiter_new(self->entry->loop, AIOT_PENDING);
    if (self->waiter == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        call_leave_lock_held(self);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

static PySendResult
call_join_lock_held(CallObject *self, PyObject **result)
{
    if (self->entry->state != FLYING) {
        return call_finish_lock_held(self, result);
    }
    aiot_link_append(&self->entry->waiting, &self->link);
    return call_suspend_lock_held(self, result);
}

static PySendResult
call_launch_lock_held(CallObject *self, AiotLoop *loop, PyObject **result)
{
    CacheObject *cache = self->cache;
    aiot_state *state = loop->state;
    PyObject *coro = PyObject_Call(cache->func, self->args, self->kwargs);
    if (coro == NULL) {
        return PYGEN_ERROR;
    }
    EntryObject *entry = entry_new(state, cache, loop, self->key);
    if (entry == NULL) {
        close_coroutine(state, coro);
        Py_DECREF(coro);
        return PYGEN_ERROR;
    }
    self->entry = entry;
    aiot_link_append(&entry->waiting, &self->link);
    aiot_link_append(&cache->flights, &entry->flight);
    cache->n_flights++;
    int failed = entry_insert_lock_held(entry);
    if (failed) {
        close_coroutine(state, coro);
    }
    else {
        failed = entry_take_off_lock_held(entry, coro);
    }
    Py_DECREF(coro);
    if (failed) {
        PyObject *exc = PyErr_GetRaisedException();
        if (entry->state == FLYING) {
            entry_settle_lock_held(entry, FAILED, Py_NewRef(exc));
        }
        unlink_if_in(&self->link);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    return entry->state == FLYING ? call_suspend_lock_held(self, result) : call_finish_lock_held(self, result);
}

static int
check_open(CacheObject *self)
{
    if (AIOT_LIKELY(!self->closed)) {
        return 0;
    }
    PyErr_Format(PyExc_RuntimeError, "the cache of %R is closed", self->func);
    return -1;
}

/* The cache is used on this loop from now on. 0 or -1. */
static int
cache_move_lock_held(CacheObject *self, AiotLoop *loop)
{
    if (self->loop == loop) {
        return 0;
    }
    if (self->loop != NULL) {
        /* What flies there belongs to that loop and lands there. */
        while (!aiot_link_is_empty(&self->flights)) {
            entry_leave_flights_lock_held(AIOT_CONTAINER_OF(aiot_link_first(&self->flights), EntryObject, flight));
        }
        self->hits = self->misses = 0;
        cache_empty_lock_held(self);
    }
    bool warn = self->loop != NULL && !self->warned;
    Py_INCREF(loop);
    Py_XSETREF(self->loop, loop);
    if (warn) {
        self->warned = true;
        return PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                                "the cache of %R was filled on another event loop; it was cleared", self->func);
    }
    return 0;
}

static PySendResult
call_start_lock_held(CallObject *self, AiotLoop *loop, PyObject **result)
{
    CacheObject *cache = self->cache;
    EntryObject *entry;
    int there;
    if (check_open(cache) < 0 || cache_move_lock_held(cache, loop) < 0
        || (there = cache_find_fresh_lock_held(cache, self->key, &entry)) < 0)
    {
        return PYGEN_ERROR;
    }
    if (there == 0) {
        cache->misses++;
        return call_launch_lock_held(self, loop, result);
    }
    cache->hits++;
    entry_touch_lock_held(entry);
    self->entry = entry;
    return call_join_lock_held(self, result);
}

static PySendResult
Call_start(aiot_awaitable *op, PyObject **result)
{
    CallObject *self = (CallObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    PySendResult answer;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    answer = call_start_lock_held(self, loop, result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(loop);
    return answer;
}

static PySendResult
Call_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    CallObject *self = (CallObject *)op;
    PySendResult answer = PYGEN_ERROR;
    if (aiot_waiter_check_resumed(self->waiter) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        Call_abandon(op);
        PyErr_SetRaisedException(exc);
        return answer;
    }
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    answer = call_finish_lock_held(self, result);
    Py_END_CRITICAL_SECTION();
    return answer;
}

static const aiot_awaitable_ops call_ops = {
    .name = "lru_cache",
    .start = Call_start,
    .resume = Call_resume,
    .abandon = Call_abandon,
};

static int
Call_traverse(PyObject *op, visitproc visit, void *arg)
{
    CallObject *self = (CallObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->cache);
    Py_VISIT(self->key);
    Py_VISIT(self->args);
    Py_VISIT(self->kwargs);
    Py_VISIT(self->entry);
    Py_VISIT(self->waiter);
    return 0;
}

/* Not the cache and the entry, which it must be able to leave. */
static int
Call_clear(PyObject *op)
{
    CallObject *self = (CallObject *)op;
    Py_CLEAR(self->key);
    Py_CLEAR(self->args);
    Py_CLEAR(self->kwargs);
    Py_CLEAR(self->waiter);
    return 0;
}

static void
Call_dealloc(PyObject *op)
{
    CallObject *self = (CallObject *)op;
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    unlink_if_in(&self->link);
    Call_clear(op);
    Py_CLEAR(self->entry);
    Py_CLEAR(self->cache);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Call_slots[] = {
    {Py_tp_doc, "What a cached function returns unless it is a hit: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Call_traverse},
    {Py_tp_clear, Call_clear},
    {Py_tp_dealloc, Call_dealloc},
    {0, NULL},
};

static PyType_Spec Call_spec = {
    .name = "aiotools._aiotools.LruCall",
    .basicsize = sizeof(CallObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Call_slots,
};

/* ---- the type of entries -------------------------------------------------------------------------------------- */

static int
Entry_traverse(PyObject *op, visitproc visit, void *arg)
{
    EntryObject *self = (EntryObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->cache);
    Py_VISIT(self->loop);
    Py_VISIT(self->key);
    Py_VISIT(self->task);
    Py_VISIT(self->value);
    Py_VISIT(self->traceback);
    return 0;
}

/* Its value and key stay for calls that still have it; the cache clears the dict, and so breaks the cycle. */
static int
Entry_clear(PyObject *op)
{
    Py_CLEAR(((EntryObject *)op)->task);
    return 0;
}

static void
Entry_dealloc(PyObject *op)
{
    EntryObject *self = (EntryObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(aiot_link_is_empty(&self->waiting));
    unlink_if_in(&self->recent);
    unlink_if_in(&self->age);
    entry_leave_flights_lock_held(self);
    Py_CLEAR(self->task);
    Py_CLEAR(self->value);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->key);
    Py_CLEAR(self->loop);
    Py_CLEAR(self->cache);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Entry_slots[] = {
    {Py_tp_doc, "What one key of a cache leads to."},
    {Py_tp_traverse, Entry_traverse},
    {Py_tp_clear, Entry_clear},
    {Py_tp_dealloc, Entry_dealloc},
    {0, NULL},
};

static PyType_Spec Entry_spec = {
    .name = "aiotools._aiotools.LruEntry",
    .basicsize = sizeof(EntryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Entry_slots,
};

/* ---- cache_close() -------------------------------------------------------------------------------------------- */

static PySendResult
close_start_lock_held(CloseObject *self, AiotLoop *loop, PyObject **result)
{
    CacheObject *cache = self->cache;
    if (cache_move_lock_held(cache, loop) < 0) {
        return PYGEN_ERROR;
    }
    cache->closed = true;
    if (cache->n_flights > 0 && (self->waiter = aiot_waiter_new(loop, AIOT_PENDING)) == NULL) {
        return PYGEN_ERROR;
    }
    if (!self->wait) {
        /* Cancelling may end flights, so the list is walked by the tasks that it had. */
        PyObject *entries = PyList_New(0);
        if (entries == NULL) {
            return PYGEN_ERROR;
        }
        for (aiot_link *link = cache->flights.next; link != &cache->flights; link = link->next) {
            if (PyList_Append(entries, (PyObject *)AIOT_CONTAINER_OF(link, EntryObject, flight)) < 0) {
                Py_DECREF(entries);
                return PYGEN_ERROR;
            }
        }
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); i++) {
            entry_cancel_lock_held((EntryObject *)PyList_GET_ITEM(entries, i));
        }
        Py_DECREF(entries);
    }
    if (cache->n_flights == 0) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    aiot_link_append(&cache->closers, &self->link);
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

static PySendResult
Close_start(aiot_awaitable *op, PyObject **result)
{
    CloseObject *self = (CloseObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    PySendResult answer;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    answer = close_start_lock_held(self, loop, result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(loop);
    return answer;
}

static void
Close_abandon(aiot_awaitable *op)
{
    CloseObject *self = (CloseObject *)op;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    unlink_if_in(&self->link);
    Py_CLEAR(self->waiter);
    Py_END_CRITICAL_SECTION();
}

static PySendResult
Close_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    CloseObject *self = (CloseObject *)op;
    int failed = aiot_waiter_check_resumed(self->waiter);
    PyObject *exc = failed ? PyErr_GetRaisedException() : NULL;
    Close_abandon(op);
    if (failed) {
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static const aiot_awaitable_ops close_ops = {
    .name = "cache_close",
    .start = Close_start,
    .resume = Close_resume,
    .abandon = Close_abandon,
};

static int
Close_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((CloseObject *)op)->cache);
    Py_VISIT(((CloseObject *)op)->waiter);
    return 0;
}

static int
Close_clear(PyObject *op)
{
    Py_CLEAR(((CloseObject *)op)->waiter);
    return 0;
}

static void
Close_dealloc(PyObject *op)
{
    CloseObject *self = (CloseObject *)op;
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    unlink_if_in(&self->link);
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->cache);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Close_slots[] = {
    {Py_tp_doc, "What cache_close() returns: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Close_traverse},
    {Py_tp_clear, Close_clear},
    {Py_tp_dealloc, Close_dealloc},
    {0, NULL},
};

static PyType_Spec Close_spec = {
    .name = "aiotools._aiotools.LruClose",
    .basicsize = sizeof(CloseObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Close_slots,
};

/* ---- calling the cache ----------------------------------------------------------------------------------------- */

/* A new awaitable that is done, when the key's value is there. 1, 0 or -1. */
static int
cache_hit_lock_held(CacheObject *self, aiot_state *state, PyObject *key, PyObject **result)
{
    EntryObject *entry;
    int there = cache_find_fresh_lock_held(self, key, &entry);
    if (there <= 0) {
        return there;
    }
    if (entry->state != DONE) {
        Py_DECREF(entry);
        return 0;
    }
    *result = entry->value == Py_None ? aiot_done_none(state) : aiot_done_new(state, entry->value);
    if (*result != NULL) {
        self->hits++;
        entry_touch_lock_held(entry);
    }
    Py_DECREF(entry);
    return *result == NULL ? -1 : 1;
}

/* Whether the running loop is the one of the cache. */
static bool
cache_is_at_home(CacheObject *self, aiot_state *state)
{
    if (self->loop == NULL) {
        return false;
    }
    PyObject *loop = PyObject_CallNoArgs(state->maybe_running_loop);
    if (loop == NULL) {
        /* Said again when the call is awaited. */
        PyErr_Clear();
        return false;
    }
    bool same = loop == self->loop->loop;
    Py_DECREF(loop);
    return same;
}

static PyObject *
call_new(aiot_state *state, CacheObject *cache, PyObject *key, PyObject *instance, PyObject *const *args,
         Py_ssize_t nargs, PyObject *kwnames)
{
    CallObject *call = (CallObject *)state->LruCallType->tp_alloc(state->LruCallType, 0);
    if (call == NULL) {
        return NULL;
    }
    aiot_awaitable_init(call, &call_ops);
    aiot_link_init(&call->link);
    call->cache = (CacheObject *)Py_NewRef((PyObject *)cache);
    call->key = Py_NewRef(key);
    Py_ssize_t first = instance != NULL;
    call->args = PyTuple_New(first + nargs);
    if (call->args == NULL) {
        goto error;
    }
    if (instance != NULL) {
        PyTuple_SET_ITEM(call->args, 0, Py_NewRef(instance));
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyTuple_SET_ITEM(call->args, first + i, Py_NewRef(args[i]));
    }
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    if (nkw > 0 && (call->kwargs = PyDict_New()) == NULL) {
        goto error;
    }
    for (Py_ssize_t i = 0; i < nkw; i++) {
        if (PyDict_SetItem(call->kwargs, PyTuple_GET_ITEM(kwnames, i), args[nargs + i]) < 0) {
            goto error;
        }
    }
    return (PyObject *)call;
error:
    call->phase = AIOT_FINISHED;
    Py_DECREF(call);
    return NULL;
}

static PyObject *
cache_call(CacheObject *self, PyObject *instance, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    if (check_open(self) < 0) {
        return NULL;
    }
    PyObject *key = key_new(state, self->typed, instance, args, nargs, kwnames);
    if (key == NULL) {
        return NULL;
    }
    PyObject *result = NULL;
    int there = 0;
    if (cache_is_at_home(self, state)) {
        Py_BEGIN_CRITICAL_SECTION(self);
        there = cache_hit_lock_held(self, state, key, &result);
        Py_END_CRITICAL_SECTION();
    }
    else if (PyObject_Hash(key) == -1) {
        there = -1;
    }
    if (there == 0) {
        result = call_new(state, self, key, instance, args, nargs, kwnames);
    }
    Py_DECREF(key);
    return result;
}

static PyObject *
Cache_vectorcall(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    return cache_call((CacheObject *)op, NULL, args, PyVectorcall_NARGS(nargsf), kwnames);
}

static PyObject *
Bound_vectorcall(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    BoundObject *self = (BoundObject *)op;
    return cache_call(self->cache, self->instance, args, PyVectorcall_NARGS(nargsf), kwnames);
}

/* ---- methods of the cache and of what is bound ------------------------------------------------------------------ */

static CacheObject *
cache_of(PyObject *op, PyObject **instance)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    *instance = NULL;
    if (Py_TYPE(op) == state->LruBoundType) {
        *instance = ((BoundObject *)op)->instance;
        return ((BoundObject *)op)->cache;
    }
    return (CacheObject *)op;
}

static PyObject *
maxsize_object(CacheObject *self)
{
    return self->maxsize < 0 ? Py_NewRef(Py_None) : PyLong_FromSsize_t(self->maxsize);
}

PyDoc_STRVAR(cache_info_doc,
"cache_info($self, /)\n--\n\n"
"A named tuple: hits, misses, maxsize, currsize.\n\n"
"A call that joins one that is under way counts as a hit. currsize includes calls\n"
"that are under way, and nothing that is expired.");

static PyObject *
cache_info(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    Py_ssize_t hits, misses, size;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = cache_expire_lock_held(self);
    hits = self->hits;
    misses = self->misses;
    size = PyDict_GET_SIZE(self->entries);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    return PyObject_CallFunction(aiot_state_of_exact_type(Py_TYPE(op))->LruInfo, "nnNn", hits, misses,
                                 maxsize_object(self), size);
}

PyDoc_STRVAR(cache_parameters_doc,
"cache_parameters($self, /)\n--\n\n"
"A new dict: maxsize, typed, tasks (how many calls are under way), closed.");

static PyObject *
cache_parameters(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    return Py_BuildValue("{sNsOsnsO}", "maxsize", maxsize_object(self), "typed", self->typed ? Py_True : Py_False,
                         "tasks", self->n_flights, "closed", self->closed ? Py_True : Py_False);
}

PyDoc_STRVAR(cache_clear_doc,
"cache_clear($self, /)\n--\n\n"
"Forget all results and set the counters to zero.\n\n"
"Calls that are under way go on for those who wait for them; their results are\n"
"not kept.");

static PyObject *
cache_clear(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    Py_BEGIN_CRITICAL_SECTION(self);
    self->hits = self->misses = 0;
    cache_empty_lock_held(self);
    if (self->n_flights == 0) {
        /* Nothing of that loop is left: the next one may be any. */
        Py_CLEAR(self->loop);
    }
    Py_END_CRITICAL_SECTION();
    Py_RETURN_NONE;
}

/* Is the key of these arguments cached? If drop, not any more. True, False or NULL. */
static PyObject *
cache_look(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, bool drop)
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    PyObject *key = key_new(aiot_state_of_exact_type(Py_TYPE(op)), self->typed, instance, args, nargs, kwnames);
    if (key == NULL) {
        return NULL;
    }
    int there;
    Py_BEGIN_CRITICAL_SECTION(self);
    EntryObject *entry;
    there = cache_find_fresh_lock_held(self, key, &entry);
    if (there > 0) {
        if (drop) {
            entry_drop_lock_held(entry);
        }
        Py_DECREF(entry);
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(key);
    return there < 0 ? NULL : PyBool_FromLong(there);
}

PyDoc_STRVAR(cache_invalidate_doc,
"cache_invalidate($self, /, *args, **kwargs)\n--\n\n"
"Forget the result for these arguments. Returns whether there was one.\n\n"
"A call that is under way goes on for those who wait for it; its result is not\n"
"kept. Raises TypeError when the arguments are not hashable.");

static PyObject *
cache_invalidate(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return cache_look(op, args, nargs, kwnames, true);
}

PyDoc_STRVAR(cache_contains_doc,
"cache_contains($self, /, *args, **kwargs)\n--\n\n"
"Whether a call with these arguments would be a hit, or join one under way.\n\n"
"Changes neither the counters nor what is evicted next. Raises TypeError when the\n"
"arguments are not hashable.");

static PyObject *
cache_contains(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return cache_look(op, args, nargs, kwnames, false);
}

PyDoc_STRVAR(cache_close_doc,
"cache_close($self, /, *, wait=False)\n--\n\n"
"Refuse new calls with RuntimeError, and see calls under way to their end; await it.\n\n"
"They are cancelled, unless wait is true: then they are waited for. The results stay\n"
"in the cache until cache_clear().");

static PyObject *
cache_close(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"cache_close", 0, 0, 1, {AIOT_NAME(wait)}};
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    PyObject *given[1];
    if (aiot_bind(state, &params, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    int wait = given[0] == NULL ? 0 : PyObject_IsTrue(given[0]);
    if (wait < 0) {
        return NULL;
    }
    PyObject *instance;
    CacheObject *cache = cache_of(op, &instance);
    CloseObject *self = (CloseObject *)state->LruCloseType->tp_alloc(state->LruCloseType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, &close_ops);
    aiot_link_init(&self->link);
    self->cache = (CacheObject *)Py_NewRef((PyObject *)cache);
    self->wait = wait;
    return (PyObject *)self;
}

static PyObject *
cache_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyObject_GetAttrString(op, "__qualname__");
}

static PyObject *
cache_copy(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(op);
}

#define KEYWORDS(f) (PyCFunction)(void (*)(void))f, METH_FASTCALL | METH_KEYWORDS
#define CACHE_METHODS                                                   \
    {"cache_info", cache_info, METH_NOARGS, cache_info_doc},            \
    {"cache_parameters", cache_parameters, METH_NOARGS, cache_parameters_doc}, \
    {"cache_clear", cache_clear, METH_NOARGS, cache_clear_doc},         \
    {"cache_invalidate", KEYWORDS(cache_invalidate), cache_invalidate_doc}, \
    {"cache_contains", KEYWORDS(cache_contains), cache_contains_doc},   \
    {"cache_close", KEYWORDS(cache_close), cache_close_doc}

static PyMethodDef Bound_methods[] = {
    CACHE_METHODS,
    {NULL, NULL, 0, NULL},
};

static PyMethodDef Cache_methods[] = {
    CACHE_METHODS,
    {"__reduce__", cache_reduce, METH_NOARGS, NULL},
    {"__copy__", cache_copy, METH_NOARGS, NULL},
    {"__deepcopy__", cache_copy, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

/* ---- the type of what is bound ---------------------------------------------------------------------------------- */

/* What it lacks is that of the cache: its name, its documentation, what marks it as a coroutine function. */
static PyObject *
Bound_getattro(PyObject *op, PyObject *name)
{
    BoundObject *self = (BoundObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    aiot_state *state = aiot_state_of_exact_type(type);
    if (name == state->str___doc__ || name == state->str___module__) {
        return PyObject_GetAttr((PyObject *)self->cache, name);
    }
    PyObject *value;
    value = PyObject_GenericGetAttr(op, name);
    if (value == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        value = PyObject_GetAttr((PyObject *)self->cache, name);
    }
    return value;
}

static PyObject *
Bound_repr(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    return PyUnicode_FromFormat("<bound %R of %R>", self->cache, self->instance);
}

static PyObject *
Bound_richcompare(PyObject *a, PyObject *b, int how)
{
    if ((how != Py_EQ && how != Py_NE) || Py_TYPE(a) != Py_TYPE(b)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    BoundObject *x = (BoundObject *)a;
    BoundObject *y = (BoundObject *)b;
    return PyBool_FromLong((x->cache == y->cache && x->instance == y->instance) == (how == Py_EQ));
}

static Py_hash_t
Bound_hash(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    Py_hash_t hash = (Py_hash_t)(((size_t)self->cache >> 4) ^ ((size_t)self->instance >> 5));
    return hash == -1 ? -2 : hash;
}

static int
Bound_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((BoundObject *)op)->cache);
    Py_VISIT(((BoundObject *)op)->instance);
    return 0;
}

static void
Bound_dealloc(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Py_CLEAR(self->cache);
    Py_CLEAR(self->instance);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef Bound_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(BoundObject, vectorcall), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(BoundObject, weakrefs), Py_READONLY, NULL},
    {"__self__", Py_T_OBJECT_EX, offsetof(BoundObject, instance), Py_READONLY, "The instance."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Bound_slots[] = {
    {Py_tp_doc, "A cached method, seen through an instance."},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_getattro, Bound_getattro},
    {Py_tp_repr, Bound_repr},
    {Py_tp_richcompare, Bound_richcompare},
    {Py_tp_hash, Bound_hash},
    {Py_tp_methods, Bound_methods},
    {Py_tp_members, Bound_members},
    {Py_tp_traverse, Bound_traverse},
    {Py_tp_dealloc, Bound_dealloc},
    {0, NULL},
};

static PyType_Spec Bound_spec = {
    .name = "aiotools._aiotools.LruBound",
    .basicsize = sizeof(BoundObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION
             | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = Bound_slots,
};

/* ---- the type of caches ------------------------------------------------------------------------------------------- */

static PyObject *
Cache_descr_get(PyObject *op, PyObject *instance, PyObject *Py_UNUSED(owner))
{
    if (instance == NULL || instance == Py_None) {
        return Py_NewRef(op);
    }
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    BoundObject *bound = (BoundObject *)state->LruBoundType->tp_alloc(state->LruBoundType, 0);
    if (bound == NULL) {
        return NULL;
    }
    bound->vectorcall = Bound_vectorcall;
    bound->cache = (CacheObject *)Py_NewRef(op);
    bound->instance = Py_NewRef(instance);
    return (PyObject *)bound;
}

static PyObject *
Cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *func, *maxsize, *seconds;
    int typed;
    static char *names[] = {"func", "maxsize", "typed", "expire_after", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOpO:lru_cache", names, &func, &maxsize, &typed, &seconds)) {
        return NULL;
    }
    Py_ssize_t size = -1;
    double expire_after = INFINITY;
    if (maxsize != Py_None) {
        size = PyNumber_AsSsize_t(maxsize, PyExc_OverflowError);
        if (size == -1 && PyErr_Occurred()) {
            return NULL;
        }
        size = size < 0 ? 0 : size;
    }
    if (seconds != Py_None) {
        if (aiot_as_seconds(seconds, "expire_after", &expire_after) < 0) {
            return NULL;
        }
        if (expire_after < 0) {
            PyErr_SetString(PyExc_ValueError, "expire_after must not be negative");
            return NULL;
        }
    }
    CacheObject *self = (CacheObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_link_init(&self->recent);
    aiot_link_init(&self->ages);
    aiot_link_init(&self->flights);
    aiot_link_init(&self->closers);
    self->vectorcall = Cache_vectorcall;
    self->func = Py_NewRef(func);
    self->maxsize = size;
    self->typed = typed;
    self->expire_after = expire_after;
    self->entries = PyDict_New();
    if (self->entries == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *
Cache_repr(PyObject *op)
{
    return PyUnicode_FromFormat("<lru_cache of %R>", ((CacheObject *)op)->func);
}

static int
Cache_traverse(PyObject *op, visitproc visit, void *arg)
{
    CacheObject *self = (CacheObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->dict);
    Py_VISIT(self->func);
    Py_VISIT(self->entries);
    Py_VISIT(self->loop);
    return 0;
}

/* The members that calls rely on stay; emptying the dict breaks the cycle with the entries. */
static int
Cache_clear(PyObject *op)
{
    CacheObject *self = (CacheObject *)op;
    Py_CLEAR(self->dict);
    if (self->entries != NULL) {
        PyDict_Clear(self->entries);
    }
    PyObject *func = self->func;
    self->func = Py_NewRef(Py_None);
    Py_XDECREF(func);
    return 0;
}

static void
Cache_dealloc(PyObject *op)
{
    CacheObject *self = (CacheObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Py_CLEAR(self->dict);
    Py_CLEAR(self->entries);
    Py_CLEAR(self->func);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef Cache_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(CacheObject, vectorcall), Py_READONLY, NULL},
    {"__dictoffset__", Py_T_PYSSIZET, offsetof(CacheObject, dict), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(CacheObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef Cache_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Cache_slots[] = {
    {Py_tp_doc, "LruCache(func, maxsize, typed, expire_after)\n--\n\n"
                "A coroutine function with a cache of its results; lru_cache() makes it."},
    {Py_tp_new, Cache_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, Cache_descr_get},
    {Py_tp_repr, Cache_repr},
    {Py_tp_methods, Cache_methods},
    {Py_tp_members, Cache_members},
    {Py_tp_getset, Cache_getset},
    {Py_tp_traverse, Cache_traverse},
    {Py_tp_clear, Cache_clear},
    {Py_tp_dealloc, Cache_dealloc},
    {0, NULL},
};

static PyType_Spec Cache_spec = {
    .name = "aiotools._aiotools.LruCache",
    .basicsize = sizeof(CacheObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_VECTORCALL
             | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .slots = Cache_slots,
};

int
aiot_lrucache_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->lru_mark = PyObject_CallNoArgs((PyObject *)&PyBaseObject_Type)) == NULL
        || (state->LruInfo = PyObject_CallFunction(state->namedtuple, "ss", "CacheInfo",
                                                   "hits misses maxsize currsize")) == NULL
        || aiot_add_type(module, &state->LruEntryType, &Entry_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCallType, &Call_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCloseType, &Close_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruBoundType, &Bound_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCacheType, &Cache_spec, NULL, true) < 0)
    {
        return -1;
    }
    return 0;
}
