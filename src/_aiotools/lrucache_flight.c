/* lrucache_flight.c: the tasks that compute what lru_cache keeps, the calls that wait for them, cache_close().
 *
 * The picture of the whole is in lrucache_core.h. A task is cancelled in the thread of its loop only; a flight on another loop
 * gets a post. What is left behind on a loop that was closed is given up by whoever comes across it.
 */

#include "lrucache_core.h"

typedef struct {
    AIOT_AWAITABLE_HEAD
    CacheObject *cache;
    PyObject *key;
    PyObject *args;             /* tuple */
    PyObject *kwargs;           /* dict, or NULL */
    FlightObject *flight;       /* once it waits for one */
    AiotWaiter *waiter;
    aiot_link link;             /* in the flight's `waiting` */
} CallObject;

typedef struct {
    AIOT_AWAITABLE_HEAD
    CacheObject *cache;
    AiotWaiter *waiter;
    aiot_link link;
    aiot_post post;             /* wakes the waiter, from another thread */
    bool posted;
    bool wait;
} CloseObject;

/* coro.close(), with the exception that is set kept, if any. */
static void
close_coroutine(aiot_state *state, PyObject *coro)
{
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *answer = PyObject_CallMethodNoArgs(coro, state->str_close);
    if (answer == NULL) {
        aiot_write_unraisable(coro);
    }
    Py_XDECREF(answer);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* ---- the end of flights --------------------------------------------------------------------------------------- */

static void
wake_closers_lock_held(CacheObject *self)
{
    while (self->n_flights == 0 && !aiot_link_is_empty(&self->closers)) {
        CloseObject *closer = AIOT_CONTAINER_OF(aiot_link_first(&self->closers), CloseObject, link);
        aiot_link_remove(&closer->link);
        if (closer->waiter == NULL) {
            continue;
        }
        if (aiot_loop_ran_here(closer->waiter->loop)) {
            aiot_waiter_wake_quietly(closer->waiter);
        }
        else if (!closer->posted) {
            closer->posted = true;
            AiotLoop *loop = (AiotLoop *)Py_NewRef((PyObject *)closer->waiter->loop);
            aiot_loop_post(loop, &closer->post);
            Py_DECREF(loop);
        }
    }
}

/* It does not count any more. Hold a reference to it. */
static void
flight_leave_lock_held(FlightObject *self)
{
    aiot_lru_unlink(&self->in_entry);
    if (aiot_link_is_out(&self->in_cache)) {
        return;
    }
    aiot_link_remove(&self->in_cache);
    CacheObject *cache = self->entry->cache;
    cache->n_flights--;
    wake_closers_lock_held(cache);
    if (self->owned) {
        self->owned = false;
        Py_DECREF(self);
    }
}

/* The flight is over: state, and value or exception (stolen). Keeps a pending exception. */
static void
flight_settle_lock_held(FlightObject *self, aiot_lru_flight_state state, PyObject *value)
{
    assert(self->state == FLYING);
    Py_INCREF(self);
    self->state = (uint8_t)state;
    self->value = value;
    if (state != LANDED && value != NULL) {
        self->traceback = PyException_GetTraceback(value);
    }
    /* Waking calls the loop, and calls may leave meanwhile. */
    aiot_link *first;
    while ((first = aiot_link_first(&self->waiting)) != NULL) {
        CallObject *call = AIOT_CONTAINER_OF(first, CallObject, link);
        aiot_link_remove(first);
        if (call->waiter != NULL) {
            aiot_waiter_wake_quietly(call->waiter);
        }
    }
    flight_leave_lock_held(self);
    aiot_lru_drop_if_vain(self->entry);
    Py_CLEAR(self->task);
    Py_DECREF(self);
}

/* A failure that nobody gets goes to the handler of the loop. Keeps no exception, but for a handler that raises SystemExit or
 * KeyboardInterrupt: then -1. */
static int
report_failure(AiotLoop *loop, PyObject *exc, const char *message, PyObject *task)
{
    if (PyErr_GivenExceptionMatches(exc, PyExc_SystemExit) || PyErr_GivenExceptionMatches(exc, PyExc_KeyboardInterrupt)) {
        /* The task has stopped the loop with it. */
        return 0;
    }
    PyErr_SetRaisedException(Py_NewRef(exc));
    PyObject *alive = aiot_loop_object_anywhere(loop);
    if (alive == NULL) {
        aiot_write_unraisable(task);
        return 0;
    }
    int failed = aiot_loop_report(loop, message, task == NULL ? NULL : loop->state->str_task, task);
    Py_DECREF(alive);
    return failed;
}

/* The task raised exc (stolen), or what was to be done with its result. 0, or -1 with an exception. */
static int
flight_fail_lock_held(FlightObject *self, PyObject *task, PyObject *exc)
{
    EntryObject *entry = self->entry;
    bool joined = !aiot_link_is_out(&self->in_entry) && entry->cached;
    int failed = 0;
    if (joined && entry->cache->errors_for > 0.0 && PyErr_GivenExceptionMatches(exc, PyExc_Exception)) {
        failed = aiot_lru_keep_error(entry, self->loop, exc);
    }
    if (self->state != FLYING) {
        Py_DECREF(exc);
        return failed;
    }
    PyObject *problem = failed ? PyErr_GetRaisedException() : NULL;
    Py_INCREF(exc);
    bool lonely = aiot_link_is_empty(&self->waiting);
    const char *message = self->background ? "refreshing a result of lru_cache failed"
                                           : "a function behind lru_cache failed after all its callers had left";
    flight_settle_lock_held(self, FAILED, exc);
    if (lonely) {
        failed |= report_failure(self->loop, exc, message, task);
    }
    Py_DECREF(exc);
    if (problem != NULL) {
        if (PyErr_Occurred()) {
            Py_DECREF(problem);
        }
        else {
            PyErr_SetRaisedException(problem);
        }
    }
    return failed;
}

/* The task is done. 0, or -1 with an exception, and the flight over in any case. */
static int
flight_land_lock_held(FlightObject *self, PyObject *task)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    if (self->state != FLYING) {
        return 0;
    }
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == NULL) {
        exc = PyErr_GetRaisedException();
        if (self->state == FLYING) {
            flight_settle_lock_held(self, CANCELLED, exc);
        }
        else {
            Py_DECREF(exc);
        }
        return 0;
    }
    if (exc != Py_None) {
        return flight_fail_lock_held(self, task, exc);
    }
    Py_DECREF(exc);
    PyObject *value = PyObject_CallMethodNoArgs(task, state->str_result);
    Py_ssize_t weight;
    if (value == NULL || (!aiot_link_is_out(&self->in_entry) && aiot_lru_weigh(self->entry->cache, value, &weight) < 0)) {
        Py_XDECREF(value);
        return flight_fail_lock_held(self, task, PyErr_GetRaisedException());
    }
    int failed = 0;
    if (!aiot_link_is_out(&self->in_entry) && self->entry->cached) {
        failed = aiot_lru_keep(self->entry, self->loop, value, weight);
    }
    if (self->state == FLYING) {
        flight_settle_lock_held(self, LANDED, value);
    }
    else {
        Py_DECREF(value);
    }
    return failed;
}

static PyObject *
flight_landed(PyObject *op, PyObject *task)
{
    FlightObject *self = (FlightObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self->entry->cache);
    failed = flight_land_lock_held(self, task);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef flight_landed_method = {
    "landed", flight_landed, METH_O, "What a cached call's task calls when it is done.",
};

/* ---- stopping them -------------------------------------------------------------------------------------------- */

/* loop.is_closed() or loop.is_running() of any loop: when_gone once there is none. Sets no exception. */
static bool
ask_loop(AiotLoop *loop, PyObject *name, bool when_gone)
{
    PyObject *alive = aiot_loop_object_anywhere(loop);
    if (alive == NULL) {
        return when_gone;
    }
    PyObject *answer = PyObject_CallMethodNoArgs(alive, name);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    Py_DECREF(alive);
    if (yes < 0) {
        aiot_write_unraisable((PyObject *)loop);
        return when_gone;
    }
    return yes;
}

/* The loop is closed: the task will never be done. */
static void
flight_give_up_lock_held(FlightObject *self)
{
    if (self->state == FLYING) {
        flight_settle_lock_held(self, CANCELLED, NULL);
    }
}

/* In the thread of the loop. Sets no exception. */
static void
flight_cancel_lock_held(FlightObject *self)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *task = Py_XNewRef(self->task);
    if (task == NULL) {
        return;
    }
    PyObject *answer = PyObject_CallMethodNoArgs(task, state->str_cancel);
    if (answer == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        if (PyErr_GivenExceptionMatches(exc, PyExc_RuntimeError) && ask_loop(self->loop, state->str_is_closed, true)) {
            Py_DECREF(exc);
            flight_give_up_lock_held(self);
        }
        else {
            PyErr_SetRaisedException(exc);
            aiot_write_unraisable(task);
        }
    }
    Py_XDECREF(answer);
    Py_DECREF(task);
}

static void
flight_run_stop(AiotLoop *Py_UNUSED(loop), PyObject *owner, aiot_post_outcome outcome)
{
    FlightObject *self = (FlightObject *)owner;
    PyObject *pending = PyErr_GetRaisedException();
    Py_BEGIN_CRITICAL_SECTION(self->entry->cache);
    self->stopping = false;
    if (outcome == AIOT_POST_DELIVERED) {
        flight_cancel_lock_held(self);
    }
    else if (outcome == AIOT_POST_CLOSED) {
        flight_give_up_lock_held(self);
    }
    Py_END_CRITICAL_SECTION();
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

void
aiot_lru_stop(FlightObject *self)
{
    if (self->stopping) {
        return;
    }
    if (aiot_loop_ran_here(self->loop)) {
        flight_cancel_lock_held(self);
        return;
    }
    self->stopping = true;
    aiot_loop_post(self->loop, &self->stop);
}

int
aiot_lru_traverse_flights(CacheObject *self, visitproc visit, void *arg)
{
    for (aiot_link *link = self->flights.next; link != &self->flights; link = link->next) {
        FlightObject *flight = AIOT_CONTAINER_OF(link, FlightObject, in_cache);
        if (flight->owned) {
            Py_VISIT(flight);
        }
    }
    return 0;
}

void
aiot_lru_disown_flights(CacheObject *self)
{
    aiot_link *link = self->flights.next;
    while (link != &self->flights) {
        FlightObject *flight = AIOT_CONTAINER_OF(link, FlightObject, in_cache);
        link = link->next;
        if (flight->owned) {
            flight->owned = false;
            Py_DECREF(flight);
            /* Whatever that ran, the list may be another one. */
            link = self->flights.next;
        }
    }
}

/* ---- the start of flights ------------------------------------------------------------------------------------- */

/* One for an entry, in all lists. */
static FlightObject *
flight_new_lock_held(EntryObject *entry, AiotLoop *loop)
{
    aiot_state *state = loop->state;
    FlightObject *self = (FlightObject *)state->LruFlightType->tp_alloc(state->LruFlightType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_link_init(&self->in_entry);
    aiot_link_init(&self->in_cache);
    aiot_link_init(&self->waiting);
    self->stop.owner = (PyObject *)self;
    self->stop.run = flight_run_stop;
    self->entry = (EntryObject *)Py_NewRef((PyObject *)entry);
    self->loop = (AiotLoop *)Py_NewRef((PyObject *)loop);
    aiot_link_append(&entry->flights, &self->in_entry);
    aiot_link_append(&entry->cache->flights, &self->in_cache);
    entry->cache->n_flights++;
    return self;
}

/* Makes the task. 0 or -1; then the flight is not over. */
static int
flight_take_off_lock_held(FlightObject *self, PyObject *coro)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *loop = aiot_loop_object(self->loop);
    PyObject *task = loop == NULL ? NULL : PyObject_CallMethodOneArg(loop, state->str_create_task, coro);
    Py_XDECREF(loop);
    if (task == NULL) {
        close_coroutine(state, coro);
        return -1;
    }
    if (self->state == FLYING) {
        Py_XSETREF(self->task, Py_NewRef(task));
    }
    int failed = -1;
    PyObject *answer = PyObject_CallMethodNoArgs(task, state->str_done);
    int is_done = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (is_done > 0) {
        /* It started eagerly and needed no loop. */
        failed = flight_land_lock_held(self, task);
    }
    else if (is_done == 0) {
        PyObject *landed = PyCFunction_New(&flight_landed_method, (PyObject *)self);
        answer = landed == NULL ? NULL : PyObject_CallMethodOneArg(task, state->str_add_done_callback, landed);
        Py_XDECREF(landed);
        failed = answer == NULL ? -1 : 0;
        Py_XDECREF(answer);
    }
    if (failed && self->state == FLYING) {
        PyObject *exc = PyErr_GetRaisedException();
        flight_cancel_lock_held(self);
        PyErr_SetRaisedException(exc);
    }
    Py_DECREF(task);
    return failed;
}

/* The one on a loop that can be joined, borrowed, or NULL. */
static FlightObject *
flight_to_join_lock_held(EntryObject *entry, AiotLoop *loop)
{
    for (aiot_link *link = entry->flights.next; link != &entry->flights; link = link->next) {
        FlightObject *flight = AIOT_CONTAINER_OF(link, FlightObject, in_entry);
        if (flight->loop == loop && !flight->stopping) {
            return flight;
        }
    }
    return NULL;
}

/* Whether a new result is on its way, on any loop. Gives up what was left behind on closed ones. */
static bool
entry_is_refreshing_lock_held(EntryObject *entry, AiotLoop *loop)
{
    aiot_link *link = entry->flights.next;
    while (link != &entry->flights) {
        FlightObject *flight = AIOT_CONTAINER_OF(link, FlightObject, in_entry);
        if (flight->loop == loop) {
            return true;
        }
        Py_INCREF(flight);
        bool closed = ask_loop(flight->loop, loop->state->str_is_closed, true);
        if (closed) {
            flight_give_up_lock_held(flight);
            aiot_lru_unlink(&flight->in_entry);
        }
        Py_DECREF(flight);
        if (!closed) {
            return true;
        }
        link = entry->flights.next;
    }
    return false;
}

/* ---- calls --------------------------------------------------------------------------------------------------- */

/* Raises an error that was kept; what others added to its traceback is not theirs to see. */
static PySendResult
raise_kept(PyObject *exc, PyObject *traceback)
{
    Py_INCREF(exc);
    if (PyException_SetTraceback(exc, traceback != NULL ? traceback : Py_None) < 0) {
        PyErr_Clear();
    }
    PyErr_SetRaisedException(exc);
    return PYGEN_ERROR;
}

/* The error of an entry. Loops in several threads can't raise one object at the same time: each gets a copy. */
static PySendResult
raise_error_of_entry(EntryObject *entry)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(entry));
    PyObject *exc = Py_NewRef(entry->value);
    PyObject *traceback = Py_XNewRef(entry->traceback);
    if (entry->cache->shared) {
        PyObject *copy = PyObject_CallOneArg(state->copy_copy, exc);
        if (copy == NULL && !PyErr_ExceptionMatches(PyExc_Exception)) {
            Py_DECREF(exc);
            Py_XDECREF(traceback);
            return PYGEN_ERROR;
        }
        if (copy != NULL && Py_TYPE(copy) == Py_TYPE(exc)) {
            PyException_SetCause(copy, PyException_GetCause(exc));
            PyException_SetContext(copy, PyException_GetContext(exc));
            /* To set a cause, even none, says that the context does not matter. */
            ((PyBaseExceptionObject *)copy)->suppress_context = ((PyBaseExceptionObject *)exc)->suppress_context;
            Py_SETREF(exc, Py_NewRef(copy));
        }
        /* One that can't be copied is better than none. */
        PyErr_Clear();
        Py_XDECREF(copy);
    }
    raise_kept(exc, traceback);
    Py_DECREF(exc);
    Py_XDECREF(traceback);
    return PYGEN_ERROR;
}

/* The outcome of the flight, for one of its calls. */
static PySendResult
call_finish_lock_held(CallObject *self, PyObject **result)
{
    FlightObject *flight = self->flight;
    aiot_lru_unlink(&self->link);
    Py_CLEAR(self->waiter);
    if (flight->state == LANDED) {
        *result = Py_NewRef(flight->value);
        return PYGEN_RETURN;
    }
    if (flight->value == NULL) {
        PyErr_SetNone(aiot_state_of_exact_type(Py_TYPE(self))->CancelledError);
        return PYGEN_ERROR;
    }
    return raise_kept(flight->value, flight->traceback);
}

/* Leaves the flight; the last to do so ends it, unless the cache wants it. */
static void
call_leave_lock_held(CallObject *self)
{
    FlightObject *flight = self->flight;
    Py_CLEAR(self->waiter);
    if (flight == NULL || aiot_link_is_out(&self->link)) {
        return;
    }
    aiot_link_remove(&self->link);
    if (flight->state != FLYING || !aiot_link_is_empty(&flight->waiting)
        || (flight->background && flight->entry->cached))
    {
        return;
    }
    Py_INCREF(flight);
    aiot_lru_unlink(&flight->in_entry);
    aiot_lru_drop_if_vain(flight->entry);
    if (flight->state == FLYING && aiot_link_is_empty(&flight->waiting)) {
        aiot_lru_stop(flight);
    }
    Py_DECREF(flight);
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
    self->waiter = aiot_waiter_new(self->flight->loop, AIOT_PENDING);
    if (self->waiter == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        call_leave_lock_held(self);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

/* Steals the reference to flight. */
static PySendResult
call_join_lock_held(CallObject *self, FlightObject *flight, PyObject **result)
{
    self->flight = flight;
    aiot_link_append(&flight->waiting, &self->link);
    return call_suspend_lock_held(self, result);
}

/* Starts a flight for an entry: 0, or -1 with an exception. */
static int
flight_start_lock_held(FlightObject *self, PyObject *coro)
{
    aiot_lru_touch(self->entry);
    aiot_lru_evict(self->entry->cache);
    if (flight_take_off_lock_held(self, coro) == 0) {
        return 0;
    }
    PyObject *exc = PyErr_GetRaisedException();
    if (self->state == FLYING) {
        flight_settle_lock_held(self, FAILED, Py_NewRef(exc));
    }
    PyErr_SetRaisedException(exc);
    return -1;
}

typedef enum {
    START_FAILED = -1,
    STARTED,
    START_OVER,
} start_result;

/* Runs the function for this call. START_OVER when somebody else did while its coroutine was made. */
static start_result
call_launch_lock_held(CallObject *self, AiotLoop *loop)
{
    CacheObject *cache = self->cache;
    aiot_state *state = loop->state;
    PyObject *coro = PyObject_Call(cache->func, self->args, self->kwargs);
    if (coro == NULL) {
        return START_FAILED;
    }
    start_result answer = START_FAILED;
    FlightObject *flight = NULL;
    EntryObject *entry = aiot_lru_obtain(state, cache, self->key);
    if (entry != NULL && (entry->content != EMPTY || flight_to_join_lock_held(entry, loop) != NULL)) {
        answer = START_OVER;
    }
    else if (entry != NULL && cache->closed) {
        /* Meanwhile: starting over says so. */
        aiot_lru_drop_if_vain(entry);
        answer = START_OVER;
    }
    else if (entry != NULL && (flight = flight_new_lock_held(entry, loop)) == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        aiot_lru_drop_if_vain(entry);
        PyErr_SetRaisedException(exc);
    }
    Py_XDECREF(entry);
    if (flight == NULL) {
        close_coroutine(state, coro);
    }
    else {
        self->flight = flight;
        aiot_link_append(&flight->waiting, &self->link);
        if (flight_start_lock_held(flight, coro) == 0) {
            answer = STARTED;
        }
        else {
            aiot_lru_unlink(&self->link);
        }
    }
    Py_DECREF(coro);
    return answer;
}

/* What goes wrong before the task runs is told as what goes wrong in it: the call has its value. 0, or -1 with SystemExit or
 * KeyboardInterrupt. */
static int
call_refresh_lock_held(CallObject *self, EntryObject *entry, AiotLoop *loop)
{
    CacheObject *cache = self->cache;
    aiot_state *state = loop->state;
    if (entry_is_refreshing_lock_held(entry, loop)) {
        return 0;
    }
    aiot_lru_time now;
    if (aiot_lru_now(cache, loop, &now) < 0) {
        return -1;
    }
    if (aiot_lru_is_before(now, entry->retry_at, entry->shift)) {
        return 0;
    }
    int failed = -1;
    PyObject *coro = PyObject_Call(cache->func, self->args, self->kwargs);
    if (coro != NULL && (!entry->cached || cache->closed || !aiot_link_is_empty(&entry->flights))) {
        close_coroutine(state, coro);
        failed = 0;
    }
    else if (coro != NULL) {
        FlightObject *flight = flight_new_lock_held(entry, loop);
        if (flight == NULL) {
            close_coroutine(state, coro);
        }
        else {
            flight->background = true;
            flight->owned = true;
            Py_INCREF(flight);
            failed = flight_start_lock_held(flight, coro);
            Py_DECREF(flight);
        }
    }
    Py_XDECREF(coro);
    return failed ? aiot_loop_report(loop, "refreshing a result of lru_cache failed", NULL, NULL) : 0;
}

/* The cache is used on this loop from now on. 0 or -1. */
static int
cache_move_lock_held(CacheObject *self, AiotLoop *loop)
{
    if (self->shared || self->loop == loop) {
        return 0;
    }
    if (self->loop != NULL) {
        self->hits = self->misses = 0;
        aiot_lru_empty(self);
        /* What flies there belongs to that loop and lands there. */
        while (!aiot_link_is_empty(&self->flights)) {
            FlightObject *flight = AIOT_CONTAINER_OF(aiot_link_first(&self->flights), FlightObject, in_cache);
            Py_INCREF(flight);
            flight_leave_lock_held(flight);
            Py_DECREF(flight);
        }
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

/* The key leads to this. STARTED: *answer is there. */
static start_result
call_use_entry_lock_held(CallObject *self, EntryObject *entry, bool fresh, AiotLoop *loop, PySendResult *answer,
                         PyObject **result)
{
    CacheObject *cache = self->cache;
    FlightObject *flight;
    switch (entry->content) {
    case VALUE:
        cache->hits++;
        aiot_lru_touch(entry);
        *result = Py_NewRef(entry->value);
        *answer = PYGEN_RETURN;
        if (!fresh && call_refresh_lock_held(self, entry, loop) < 0) {
            Py_CLEAR(*result);
            *answer = PYGEN_ERROR;
        }
        return STARTED;
    case ERROR:
        cache->hits++;
        aiot_lru_touch(entry);
        *answer = raise_error_of_entry(entry);
        return STARTED;
    default:
        flight = flight_to_join_lock_held(entry, loop);
        if (flight == NULL) {
            return START_OVER;
        }
        cache->hits++;
        aiot_lru_touch(entry);
        *answer = call_join_lock_held(self, (FlightObject *)Py_NewRef((PyObject *)flight), result);
        return STARTED;
    }
}

static PySendResult
call_start_lock_held(CallObject *self, AiotLoop *loop, PyObject **result)
{
    CacheObject *cache = self->cache;
    for (;;) {
        EntryObject *entry;
        bool fresh;
        int there;
        if (aiot_lru_check_open(cache) < 0 || cache_move_lock_held(cache, loop) < 0
            || (there = aiot_lru_find_current(cache, loop, self->key, &entry, &fresh)) < 0)
        {
            return PYGEN_ERROR;
        }
        if (there) {
            PySendResult answer;
            start_result used = call_use_entry_lock_held(self, entry, fresh, loop, &answer, result);
            Py_DECREF(entry);
            if (used == STARTED) {
                return answer;
            }
        }
        cache->misses++;
        switch (call_launch_lock_held(self, loop)) {
        case STARTED:
            return self->flight->state == FLYING ? call_suspend_lock_held(self, result)
                                                 : call_finish_lock_held(self, result);
        case START_FAILED:
            return PYGEN_ERROR;
        case START_OVER:
            break;
        }
        cache->misses--;
    }
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
    Py_VISIT(self->flight);
    Py_VISIT(self->waiter);
    return 0;
}

/* Not the cache and the flight, which it must be able to leave. */
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
    aiot_lru_unlink(&self->link);
    Call_clear(op);
    Py_CLEAR(self->flight);
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

PyObject *
aiot_lru_call(aiot_state *state, CacheObject *cache, PyObject *key, PyObject *instance, PyObject *const *args,
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

/* ---- the type of flights --------------------------------------------------------------------------------------- */

static int
Flight_traverse(PyObject *op, visitproc visit, void *arg)
{
    FlightObject *self = (FlightObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->entry);
    Py_VISIT(self->loop);
    Py_VISIT(self->task);
    Py_VISIT(self->value);
    Py_VISIT(self->traceback);
    return 0;
}

/* The outcome stays for calls that still have it. */
static int
Flight_clear(PyObject *op)
{
    Py_CLEAR(((FlightObject *)op)->task);
    return 0;
}

static void
Flight_dealloc(PyObject *op)
{
    FlightObject *self = (FlightObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(aiot_link_is_empty(&self->waiting));
    /* In the lists still when its task never came to an end. */
    Py_BEGIN_CRITICAL_SECTION(self->entry->cache);
    flight_leave_lock_held(self);
    Py_END_CRITICAL_SECTION();
    Py_CLEAR(self->task);
    Py_CLEAR(self->value);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->loop);
    Py_CLEAR(self->entry);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Flight_slots[] = {
    {Py_tp_doc, "One run of a cached function."},
    {Py_tp_traverse, Flight_traverse},
    {Py_tp_clear, Flight_clear},
    {Py_tp_dealloc, Flight_dealloc},
    {0, NULL},
};

static PyType_Spec Flight_spec = {
    .name = "aiotools._aiotools.LruFlight",
    .basicsize = sizeof(FlightObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Flight_slots,
};

/* ---- cache_close() -------------------------------------------------------------------------------------------- */

/* A new list of what flies, or NULL. Walking the list of the cache itself would meet its changes. */
static PyObject *
list_flights_lock_held(CacheObject *self)
{
    PyObject *list = PyList_New(0);
    for (aiot_link *link = self->flights.next; list != NULL && link != &self->flights; link = link->next) {
        if (PyList_Append(list, (PyObject *)AIOT_CONTAINER_OF(link, FlightObject, in_cache)) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

/* Cancels all flights, unless they are to be waited for; leaves alone those whose loop does not run. 0 or -1. */
static int
close_flights_lock_held(CloseObject *self, AiotLoop *loop)
{
    PyObject *flights = list_flights_lock_held(self->cache);
    if (flights == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(flights); i++) {
        FlightObject *flight = (FlightObject *)PyList_GET_ITEM(flights, i);
        if (!self->wait) {
            aiot_lru_stop(flight);
        }
        if (flight->loop != loop && !ask_loop(flight->loop, loop->state->str_is_running, false)) {
            flight_leave_lock_held(flight);
        }
    }
    Py_DECREF(flights);
    return 0;
}

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
    if (close_flights_lock_held(self, loop) < 0) {
        return PYGEN_ERROR;
    }
    if (cache->n_flights == 0) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    if (self->waiter == NULL && (self->waiter = aiot_waiter_new(loop, AIOT_PENDING)) == NULL) {
        return PYGEN_ERROR;
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
    aiot_lru_unlink(&self->link);
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
    aiot_lru_unlink(&self->link);
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

static void
close_run_post(AiotLoop *Py_UNUSED(loop), PyObject *owner, aiot_post_outcome Py_UNUSED(outcome))
{
    CloseObject *self = (CloseObject *)owner;
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    self->posted = false;
    if (self->waiter != NULL) {
        aiot_waiter_wake_quietly(self->waiter);
    }
    Py_END_CRITICAL_SECTION();
}

PyObject *
aiot_lru_close(aiot_state *state, CacheObject *cache, bool wait)
{
    CloseObject *self = (CloseObject *)state->LruCloseType->tp_alloc(state->LruCloseType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, &close_ops);
    aiot_link_init(&self->link);
    self->post.owner = (PyObject *)self;
    self->post.run = close_run_post;
    self->cache = (CacheObject *)Py_NewRef((PyObject *)cache);
    self->wait = wait;
    return (PyObject *)self;
}

int
aiot_lrucache_flight_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->LruFlightType, &Flight_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCallType, &Call_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCloseType, &Close_spec, NULL, false) < 0)
    {
        return -1;
    }
    return 0;
}
