/* loopstate.c: what belongs to one event loop: its timer queue, its batch of wake-ups, its clock.
 *
 * Ownership:  the loop refers to its state (an attribute; where it takes none, the armed handles and all that is
 *             suspended do), the state only weakly to its loop: a closed loop goes when the last user lets go of it.
 *             Every set alarm, every turn, every ready waiter and every post is a reference from the state, as a
 *             TimerHandle is one from the loop: a suspended task isn't collected in mid-sleep.
 * Invariants: at most one handle is armed for the alarms, never later than the earliest of them, except while a tick
 *             runs, which re-arms at its end. It isn't disarmed when deadlines only move later: one early
 *             wake-up costs less than a re-arm each time.
 * Locking:    fields belong to the thread of the loop, and to the object's critical section (so that use from a wrong
 *             thread can't corrupt memory on free-threaded builds); the posts have a lock of their own.
 * Re-entry:   each method of the loop may be patched, so each call of one may run any code. What is ready
 *             or due is popped one by one from the state and never held by who runs it.
 * Fork:       the per-thread cache needs no care: in a child the running loop is another one, or the same copy.
 */

#include "loopstate.h"

#include "clockwatch.h"

#include "waiter.h"

#include <math.h>
#include <string.h>
#if defined(__linux__)
#  include <time.h>
#endif

/* What was found last: a loop and its state, borrowed. Void when the epoch of the module moved on. One for each thread; under
 * the GIL one for the interpreter will do, as threads take turns of milliseconds. */
#ifdef Py_GIL_DISABLED
static AIOT_THREAD_LOCAL struct {
    aiot_loop_cache cache;
    aiot_state *state;
} last_loop;
#endif

static inline aiot_loop_cache *
loop_cache(aiot_state *state)
{
#ifdef Py_GIL_DISABLED
    if (last_loop.state != state) {
        last_loop.state = state;
        last_loop.cache.loop = NULL;
    }
    return &last_loop.cache;
#else
    return &state->last_loop;
#endif
}

static void *
raw_realloc(void *p, size_t n)
{
    return PyMem_RawRealloc(p, n);
}

/* ---- calling the loop --------------------------------------------------------------------------------------- */

int
aiot_loop_is_debug(AiotLoop *self)
{
    PyObject *answer = PyObject_CallMethodNoArgs(self->loop, self->state->str_get_debug);
    if (answer == NULL) {
        return -1;
    }
    int debug = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return debug;
}

/* loop.NAME(first[, second], context=context): new reference. context NULL: a fresh empty one, so that what runs there is
 * neither tied to a stranger's context nor kept from entering one that is entered already. */
static PyObject *
loop_schedule(AiotLoop *self, PyObject *name, PyObject *first, PyObject *second, PyObject *context)
{
    PyObject *fresh = NULL;
    if (self->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        return NULL;
    }
    if (context == NULL) {
        context = fresh = PyContext_New();
        if (fresh == NULL) {
            return NULL;
        }
    }
    PyObject *args[4] = {self->loop, first, second, context};
    size_t nargs = 3;
    if (second == NULL) {
        args[2] = context;
        nargs = 2;
    }
    PyObject *handle = PyObject_VectorcallMethod(name, args, nargs | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                                 self->state->kw_context);
    Py_XDECREF(fresh);
    return handle;
}

int
aiot_loop_call_soon(AiotLoop *self, PyObject *callback, PyObject *arg, PyObject *context)
{
    PyObject *handle = loop_schedule(self, self->state->str_call_soon, callback, arg, context);
    Py_XDECREF(handle);
    return handle == NULL ? -1 : 0;
}

void
aiot_write_unraisable(PyObject *where)
{
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        PyErr_Clear();
        PyErr_SetInterrupt();
        return;
    }
    PyErr_WriteUnraisable(where);
}

static void
handle_cancel(AiotLoop *self, PyObject *handle)
{
    PyObject *result = PyObject_CallMethodNoArgs(handle, self->state->str_cancel);
    if (result == NULL) {
        aiot_write_unraisable(handle);
    }
    Py_XDECREF(result);
    Py_DECREF(handle);
}

int
aiot_loop_report(AiotLoop *self, const char *message, PyObject *key, PyObject *value)
{
    aiot_state *state = self->state;
    if (PyErr_ExceptionMatches(PyExc_SystemExit) || PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        return -1;
    }
    if (self->loop == NULL) {
        PyErr_WriteUnraisable((PyObject *)self);
        return 0;
    }
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *text = PyUnicode_FromString(message);
    PyObject *context = PyDict_New();
    PyObject *result = NULL;
    if (text != NULL && context != NULL && PyDict_SetItem(context, state->str_message, text) == 0
        && PyDict_SetItem(context, state->str_exception, exc) == 0
        && (key == NULL || PyDict_SetItem(context, key, value) == 0))
    {
        result = PyObject_CallMethodOneArg(self->loop, state->str_call_exception_handler, context);
    }
    Py_XDECREF(text);
    Py_XDECREF(context);
    int status = 0;
    if (result == NULL) {
        if (PyErr_ExceptionMatches(PyExc_SystemExit) || PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
            status = -1;
        }
        else {
            /* The handler is broken: neither its error nor the one that it was told may be lost. */
            PyErr_WriteUnraisable(self->loop);
            PyErr_SetRaisedException(Py_NewRef(exc));
            PyErr_WriteUnraisable(self->loop);
        }
    }
    Py_XDECREF(result);
    Py_DECREF(exc);
    return status;
}

PyObject *
aiot_loop_current_task(AiotLoop *self, const char *what)
{
    if (self->loop == NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s needs its event loop, which is gone", what);
        return NULL;
    }
    PyObject *task = PyObject_CallOneArg(self->state->current_task, self->loop);
    if (task == Py_None) {
        Py_DECREF(task);
        PyErr_Format(PyExc_RuntimeError, "%s must be used within a task", what);
        return NULL;
    }
    return task;
}

/* ---- clock -------------------------------------------------------------------------------------------------- */

/* The reading of time.monotonic(), bit for bit. */
static int
monotonic_time(aiot_state *state, double *now)
{
#if PY_VERSION_HEX >= 0x030D0000 || defined(__linux__)
    int64_t ns;
#  if PY_VERSION_HEX >= 0x030D0000
    PyTime_t t;
    if (PyTime_MonotonicRaw(&t) < 0) {
        return -1;
    }
    ns = t;
#  else
    struct timespec ts;
    if (clock_gettime(CLOCK_MONOTONIC, &ts) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    ns = (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
#  endif
    if (ns % 1000000000 == 0) {
        *now = (double)(ns / 1000000000);
    }
    else {
        *now = (double)ns / 1e9;
    }
    (void)state;
    return 0;
#else
    PyObject *reading = PyObject_CallNoArgs(state->time_monotonic);
    if (reading == NULL) {
        return -1;
    }
    *now = PyFloat_AsDouble(reading);
    Py_DECREF(reading);
    return *now == -1.0 && PyErr_Occurred() ? -1 : 0;
#endif
}

/* The reading of somebody's own clock, which it takes the reference of. A deadline that is counted from infinity or NaN would
 * be NaN, which the queue can't order. 0 or -1. */
static int
foreign_time(PyObject *reading, double *now)
{
    if (reading == NULL) {
        return -1;
    }
    *now = PyFloat_AsDouble(reading);
    int failed = *now == -1.0 && PyErr_Occurred() ? -1 : 0;
    if (!failed && !isfinite(*now)) {
        PyErr_Format(PyExc_ValueError, "the time() of the event loop must be finite, not %R", reading);
        failed = -1;
    }
    Py_DECREF(reading);
    return failed;
}

static bool
is_monotonic_plain(aiot_state *state)
{
    if (!PyCFunction_Check(state->time_monotonic)) {
        return false;
    }
    PyObject *monotonic;
    int found = PyDict_GetItemRef(state->time_module_dict, state->str_monotonic, &monotonic);
    if (found <= 0) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(monotonic);
    return monotonic == state->time_monotonic;
}

/* Is it the default loop's own time(), on the real clock? Both may be patched at any moment. */
static bool
is_plain_time(AiotLoop *self, PyObject *time)
{
    aiot_state *state = self->state;
    return PyMethod_Check(time) && PyMethod_GET_FUNCTION(time) == state->base_loop_time && is_monotonic_plain(state);
}

/* Has somebody put a time() on the instance? When we can't see its attributes: maybe. */
static int
has_own_time(AiotLoop *self)
{
    return self->dict == NULL ? 1 : PyDict_Contains(self->dict, self->state->str_time);
}

/* Is its type's time() the default loop's own, and on the real clock? Asked of the type and of the instance apart, which
 * costs a bound method less, and what holds for the type is remembered. 1, 0 when in doubt, or -1. */
static int
type_has_plain_time(AiotLoop *self)
{
    PyTypeObject *type = Py_TYPE(self->loop);
    uint32_t epoch = aiot_clock_epoch();
    if (AIOT_LIKELY(self->plain_seen == epoch && self->plain_type == type)) {
        return 1;
    }
    bool watched = aiot_clock_watch_type(self->state, type);
    if (type->tp_getattro != PyObject_GenericGetAttr) {
        return 0;
    }
    PyObject *time = PyObject_GetAttr((PyObject *)type, self->state->str_time);
    if (time == NULL) {
        return -1;
    }
    Py_DECREF(time);
    if (time != self->state->base_loop_time || !is_monotonic_plain(self->state)) {
        return 0;
    }
    self->plain_type = type;
    self->plain_seen = watched ? epoch : 0;
    return 1;
}

static int
loop_time(AiotLoop *self, double *now, bool *monotonic)
{
    int plain = type_has_plain_time(self);
    int own = plain > 0 ? has_own_time(self) : 0;
    if (plain < 0 || own < 0) {
        return -1;
    }
    *monotonic = plain && !own;
    if (*monotonic) {
        return monotonic_time(self->state, now);
    }
    PyObject *time = PyObject_GetAttr(self->loop, self->state->str_time);
    if (time == NULL) {
        return -1;
    }
    *monotonic = is_plain_time(self, time);
    if (*monotonic) {
        Py_DECREF(time);
        return monotonic_time(self->state, now);
    }
    PyObject *reading = PyObject_CallNoArgs(time);
    Py_DECREF(time);
    return foreign_time(reading, now);
}

int
aiot_loop_time(AiotLoop *self, double *now)
{
    bool monotonic;
    return loop_time(self, now, &monotonic);
}

int
aiot_loop_deadline_on(AiotLoop *self, double delay, double *when, bool *monotonic)
{
    double now;
    int patched = self->coarse ? has_own_time(self) : 1;
    if (patched < 0) {
        return -1;
    }
    if (patched) {
        if (loop_time(self, &now, monotonic) < 0) {
            return -1;
        }
    }
    else {
        if (monotonic_time(self->state, &now) < 0) {
            return -1;
        }
        *monotonic = true;
    }
    *when = now + delay;
    return 0;
}

int
aiot_loop_deadline(AiotLoop *self, double delay, double *when)
{
    bool monotonic;
    return aiot_loop_deadline_on(self, delay, when, &monotonic);
}

bool
aiot_clock_is_before(double when)
{
#if defined(__linux__)
    /* The coarse clock lags by a tick of the kernel at most, which is 10 ms; 8 ns to read instead of 47. */
    struct timespec ts;
    if (clock_gettime(CLOCK_MONOTONIC_COARSE, &ts) == 0) {
        return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9 + 0.05 < when;
    }
#else
    (void)when;
#endif
    return false;
}

/* ---- alarms ------------------------------------------------------------------------------------------------- */

static PyObject *LoopState_tick(PyObject *op, PyObject *ignored);
static PyObject *LoopState_drain(PyObject *op, PyObject *ignored);
static PyObject *LoopState_run_turns(PyObject *op, PyObject *ignored);
static PyObject *LoopState_get_loop(PyObject *op, PyObject *ignored);
static PyObject *LoopState_loop_died(PyObject *op, PyObject *ref);

static PyMethodDef tick_def = {"aiotools_tick", LoopState_tick, METH_NOARGS, "Fire what is due."};
static PyMethodDef drain_def = {"aiotools_drain", LoopState_drain, METH_NOARGS, "Run the wake-ups that are ready."};
static PyMethodDef turns_def = {"aiotools_run_turns", LoopState_run_turns, METH_NOARGS, "Run what asked for a turn."};
static PyMethodDef loop_died_def = {"aiotools_loop_died", LoopState_loop_died, METH_O, "The event loop is gone."};
static PyMethodDef get_loop_def = {"get_loop", LoopState_get_loop, METH_NOARGS, "The loop that this belongs to."};

/* Sees to it that a handle is armed for when, or for earlier. */
static int
arm_tick_lock_held(AiotLoop *self, double when)
{
    if (isinf(when) && when > 0) {
        return 0;
    }
    if (self->tick_handle != NULL && self->tick_at <= when) {
        return 0;
    }
    double at = when;
    if (self->coarse) {
        /* uvloop rounds to the nearest millisecond; half of the deadlines would come early. */
        at = ceil(at * 1000.0) / 1000.0;
    }
    PyObject *callback = PyCFunction_New(&tick_def, (PyObject *)self);
    PyObject *number = PyFloat_FromDouble(at);
    PyObject *handle = NULL;
    if (callback != NULL && number != NULL) {
        handle = loop_schedule(self, self->state->str_call_at, number, callback, NULL);
    }
    Py_XDECREF(callback);
    Py_XDECREF(number);
    if (handle == NULL) {
        return -1;
    }
    if (self->tick_handle != NULL && self->tick_at <= when) {
        /* A patched call_at set an earlier alarm. */
        handle_cancel(self, handle);
        return 0;
    }
    PyObject *old = self->tick_handle;
    self->tick_handle = handle;
    self->tick_at = when;
    if (old != NULL) {
        handle_cancel(self, old);
    }
    return 0;
}

static int
alarm_set_lock_held(AiotLoop *self, aiot_alarm *alarm, double when)
{
    /* Set by what fires in a tick for a time that is past: due at the next tick, after what is due in this one. */
    double key = self->ticking > 0 && when < self->tick_now ? self->tick_now : when;
    bool was_set = aiot_alarm_is_set(alarm);
    double before = alarm->node.when;
    if (was_set) {
        aiot_heap_move(&self->alarms, &alarm->node, key);
    }
    else {
        if (aiot_heap_push(&self->alarms, &alarm->node, key) < 0) {
            PyErr_NoMemory();
            return -1;
        }
        Py_INCREF(alarm->owner);
    }
    if (self->ticking == 0 && arm_tick_lock_held(self, key) < 0) {
        if (was_set && aiot_alarm_is_set(alarm)) {
            aiot_heap_move(&self->alarms, &alarm->node, before);
        }
        else if (aiot_alarm_is_set(alarm)) {
            aiot_heap_remove(&self->alarms, &alarm->node);
            Py_DECREF(alarm->owner);
        }
        return -1;
    }
    AIOT_CHECK(aiot_heap_check(&self->alarms));
    return 0;
}

int
aiot_alarm_set(AiotLoop *self, aiot_alarm *alarm, double when)
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = alarm_set_lock_held(self, alarm, when);
    Py_END_CRITICAL_SECTION();
    return failed;
}

void
aiot_alarm_cancel(AiotLoop *self, aiot_alarm *alarm)
{
    PyObject *owner = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (aiot_alarm_is_set(alarm)) {
        aiot_heap_remove(&self->alarms, &alarm->node);
        owner = alarm->owner;
        AIOT_CHECK(aiot_heap_check(&self->alarms));
    }
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(owner);
}

double
aiot_loop_next_deadline(AiotLoop *self)
{
    double when = INFINITY;
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_heap_node *first = aiot_heap_first(&self->alarms);
    if (first != NULL) {
        when = first->when;
    }
    Py_END_CRITICAL_SECTION();
    return when;
}

/* The next alarm that is due in this tick, taken off the queue with its reference to the owner; else NULL. */
static aiot_alarm *
pop_due(AiotLoop *self, double now, uint64_t limit)
{
    aiot_alarm *alarm = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_heap_node *first = aiot_heap_first(&self->alarms);
    if (first != NULL && first->when <= now && first->order < limit) {
        aiot_heap_remove(&self->alarms, first);
        alarm = AIOT_CONTAINER_OF(first, aiot_alarm, node);
    }
    Py_END_CRITICAL_SECTION();
    return alarm;
}

/* The end of a tick: arms the handle for what is the earliest now. */
static int
rearm_tick(AiotLoop *self, double early_until)
{
    int failed = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_heap_node *first = aiot_heap_first(&self->alarms);
    if (first != NULL) {
        failed = arm_tick_lock_held(self, first->when < early_until ? early_until : first->when);
    }
    Py_END_CRITICAL_SECTION();
    return failed;
}

/* Sees to it that what asked for a turn gets one. */
static int
arm_turns(AiotLoop *self)
{
    if (self->turns_first == NULL || self->turns_armed) {
        return 0;
    }
    PyObject *callback = PyCFunction_New(&turns_def, (PyObject *)self);
    if (callback == NULL) {
        return -1;
    }
    int failed = aiot_loop_call_soon(self, callback, NULL, NULL);
    Py_DECREF(callback);
    if (!failed) {
        self->turns_armed = true;
    }
    return failed;
}

int
aiot_loop_arm_tick(AiotLoop *self)
{
    return rearm_tick(self, -INFINITY);
}

int
aiot_loop_shift(AiotLoop *self, double delta)
{
    PyObject *handle;
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_heap_shift(&self->alarms, delta);
    AIOT_CHECK(aiot_heap_check(&self->alarms));
    self->tick_now += delta;
    self->clock_shift += delta;
    handle = self->tick_handle;
    self->tick_handle = NULL;
    Py_END_CRITICAL_SECTION();
    if (handle != NULL) {
        handle_cancel(self, handle);
    }
    if (self->loop == NULL || (self->ticking > 0 && handle == NULL)) {
        return 0;
    }
    return aiot_loop_arm_tick(self);
}

static int
fire_due(AiotLoop *self, double now, uint64_t limit)
{
    aiot_alarm *alarm;
    double shift = self->clock_shift;
    /* After a change of clock, now means nothing: the rest waits for the next tick. */
    while (self->clock_shift == shift && (alarm = pop_due(self, now, limit)) != NULL) {
        PyObject *owner = alarm->owner;
        int failed = alarm->fire(self, owner);
        if (failed < 0) {
            failed = aiot_loop_report(self, "Exception in a deadline of aiotools", NULL, NULL);
        }
        Py_DECREF(owner);
        if (failed < 0) {
            return -1;
        }
    }
    return 0;
}

static PyObject *
LoopState_tick(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    AiotLoop *self = (AiotLoop *)op;
    if (self->loop == NULL) {
        Py_RETURN_NONE;
    }
    double armed_for = self->tick_at;
    Py_CLEAR(self->tick_handle);
    double now;
    if (aiot_loop_time(self, &now) < 0) {
        /* Without a clock nothing can fire; keep the deadlines, and say so. */
        PyObject *exc = PyErr_GetRaisedException();
        if (rearm_tick(self, armed_for) < 0) {
            PyErr_WriteUnraisable(op);
        }
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    self->ticking++;
    self->tick_now = now;
    double shift = self->clock_shift;
    int failed = fire_due(self, now, self->alarms.next_order);
    self->ticking--;
    /* Called before its time: by less than the loop's clock can tell. Wait for the next millisecond. */
    double early_until = armed_for > now ? now + 0.001 : now;
    if (self->clock_shift != shift) {
        early_until = -INFINITY;
    }
    PyObject *exc = failed ? PyErr_GetRaisedException() : NULL;
    int not_armed = arm_turns(self);
    if (not_armed) {
        /* Whatever is wrong there, the deadlines are looked after. */
        PyErr_WriteUnraisable(op);
    }
    not_armed = rearm_tick(self, early_until);
    if (exc != NULL) {
        if (not_armed) {
            PyErr_WriteUnraisable(op);
        }
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    if (not_armed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- turns -------------------------------------------------------------------------------------------------- */

int
aiot_turn_ask(AiotLoop *self, aiot_turn *turn)
{
    if (turn->queued) {
        return 0;
    }
    if (self->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        return -1;
    }
    turn->queued = true;
    Py_INCREF(turn->owner);
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_turn *last = self->turns_last;
    turn->next = NULL;
    if (last == NULL) {
        self->turns_first = turn;
    }
    else {
        last->next = turn;
    }
    self->turns_last = turn;
    self->turns_asked++;
    Py_END_CRITICAL_SECTION();
    if (self->ticking > 0 || self->turning > 0 || arm_turns(self) == 0) {
        return 0;
    }
    /* Take it back. Others may have come behind it meanwhile. */
    bool taken = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    aiot_turn **place = &self->turns_first, *before = NULL;
    while (*place != NULL && *place != turn) {
        before = *place;
        place = &before->next;
    }
    if (*place == turn) {
        *place = turn->next;
        if (self->turns_last == turn) {
            self->turns_last = before;
        }
        turn->queued = false;
        self->turns_asked--;
        taken = true;
    }
    Py_END_CRITICAL_SECTION();
    if (taken) {
        Py_DECREF(turn->owner);
    }
    return -1;
}

static aiot_turn *
pop_turn(AiotLoop *self)
{
    aiot_turn *turn;
    Py_BEGIN_CRITICAL_SECTION(self);
    turn = self->turns_first;
    if (turn != NULL) {
        self->turns_first = turn->next;
        if (turn->next == NULL) {
            self->turns_last = NULL;
        }
        turn->next = NULL;
        turn->queued = false;
        self->turns_popped++;
    }
    Py_END_CRITICAL_SECTION();
    return turn;
}

static PyObject *
LoopState_run_turns(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    AiotLoop *self = (AiotLoop *)op;
    self->turns_armed = false;
    if (self->loop == NULL) {
        Py_RETURN_NONE;
    }
    /* What asks for a turn from now on gets the next one. */
    uint64_t limit = self->turns_asked;
    aiot_turn *turn;
    int failed = 0;
    self->turning++;
    while (self->turns_popped < limit && !failed && (turn = pop_turn(self)) != NULL) {
        PyObject *owner = turn->owner;
        if (turn->run(self, owner) < 0) {
            failed = aiot_loop_report(self, "Exception in a turn of aiotools", NULL, NULL);
        }
        Py_DECREF(owner);
    }
    self->turning--;
    PyObject *exc = failed ? PyErr_GetRaisedException() : NULL;
    int not_armed = arm_turns(self);
    if (exc != NULL) {
        if (not_armed) {
            PyErr_WriteUnraisable(op);
        }
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    if (not_armed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- wake-ups ----------------------------------------------------------------------------------------------- */

static PyObject *
LoopState_drain(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    AiotLoop *self = (AiotLoop *)op;
    self->drain_armed = false;
    if (aiot_loop_drain(self) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

int
aiot_loop_arm_drain(AiotLoop *self)
{
    PyObject *callback = PyCFunction_New(&drain_def, (PyObject *)self);
    if (callback == NULL) {
        return -1;
    }
    int failed = aiot_loop_call_soon(self, callback, NULL, NULL);
    Py_DECREF(callback);
    if (!failed) {
        self->drain_armed = true;
    }
    return failed;
}

/* ---- posts -------------------------------------------------------------------------------------------------- */

static aiot_post *
detach_posts(AiotLoop *self)
{
    aiot_mutex_lock(&self->posts_lock);
    aiot_post *first = self->posts_first;
    self->posts_first = self->posts_last = NULL;
    self->posts_armed = false;
    aiot_mutex_unlock(&self->posts_lock);
    return first;
}

static void
run_posts(AiotLoop *self, aiot_post *post, aiot_post_outcome outcome)
{
    while (post != NULL) {
        aiot_post *next = post->next;
        PyObject *owner = post->owner;
        post->next = NULL;
        post->run(self, owner, outcome);
        Py_DECREF(owner);
        post = next;
    }
}

/* What the loop is asked to call. One that goes without having been called was thrown away when the loop was closed; then the
 * posts that relied on it are not delivered. (Without the GIL the thread that made it may have to run first.) */
typedef struct {
    PyObject_HEAD
    AiotLoop *loop;
    bool spent;                 /* called, or given up by who made it */
} PostCallObject;

static PyObject *
PostCall_call(PyObject *op, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    PostCallObject *call = (PostCallObject *)op;
    AiotLoop *self = call->loop;
    call->spent = true;
    if (self->loop == NULL) {
        run_posts(self, detach_posts(self), AIOT_POST_CLOSED);
        Py_RETURN_NONE;
    }
    /* An error there (Ctrl-C, most likely) must not cost the posts: they are run as in debug mode, and it is raised after. */
    int debug = aiot_loop_is_debug(self);
    PyObject *exc = debug < 0 ? PyErr_GetRaisedException() : NULL;
    /* What is woken here runs at the end of this handle, which is one of its own: no need for another one. */
    bool armed = self->drain_armed;
    if (debug == 0) {
        self->drain_armed = true;
    }
    run_posts(self, detach_posts(self), AIOT_POST_DELIVERED);
    if (debug == 0) {
        self->drain_armed = armed;
        if (aiot_loop_drain(self) < 0) {
            return NULL;
        }
    }
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    Py_RETURN_NONE;
}

static int
PostCall_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((PostCallObject *)op)->loop);
    return 0;
}

static void
PostCall_dealloc(PyObject *op)
{
    PostCallObject *call = (PostCallObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    AiotLoop *self = call->loop;
    if (!call->spent) {
        PyObject *pending = PyErr_GetRaisedException();
        run_posts(self, detach_posts(self), AIOT_POST_CLOSED);
        if (pending != NULL) {
            PyErr_SetRaisedException(pending);
        }
    }
    type->tp_free(op);
    Py_DECREF(type);
    Py_DECREF(self);
}

/* No tp_clear: whatever refers to one is of the loop, and is cleared. */
static PyType_Slot PostCall_slots[] = {
    {Py_tp_doc, "Runs what other threads handed over."},
    {Py_tp_call, PostCall_call},
    {Py_tp_traverse, PostCall_traverse},
    {Py_tp_dealloc, PostCall_dealloc},
    {0, NULL},
};

static PyType_Spec PostCall_spec = {
    .name = "aiotools._aiotools.PostCall",
    .basicsize = sizeof(PostCallObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = PostCall_slots,
};

PyObject *
aiot_loop_object_anywhere(AiotLoop *self)
{
    PyObject *loop = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->loop_ref == NULL) {
        loop = Py_XNewRef(self->loop);
    }
    else if (PyWeakref_GetRef(self->loop_ref, &loop) < 0) {
        PyErr_Clear();
    }
    Py_END_CRITICAL_SECTION();
    return loop;
}

/* One more time is_closed(), as the loop may be closed between the look that call_soon_threadsafe takes and what it does: then
 * nothing would ever happen to the handle. */
static bool
loop_was_closed(AiotLoop *self, PyObject *loop)
{
    PyObject *answer = PyObject_CallMethodNoArgs(loop, self->state->str_is_closed);
    int closed = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (closed < 0) {
        aiot_write_unraisable((PyObject *)self);
    }
    return closed > 0;
}

bool
aiot_loop_error_is_closed(void)
{
    return PyErr_ExceptionMatches(PyExc_RuntimeError) && !PyErr_ExceptionMatches(PyExc_RecursionError);
}

/* Has the loop run the posts: DELIVERED says that it will. Leaves no exception set. */
static aiot_post_outcome
schedule_posts(AiotLoop *self)
{
    PyObject *loop = aiot_loop_object_anywhere(self);
    if (loop == NULL) {
        return AIOT_POST_CLOSED;
    }
    PyTypeObject *type = self->state->PostCallType;
    PostCallObject *call = (PostCallObject *)type->tp_alloc(type, 0);
    bool closed = false;
    PyObject *handle = NULL;
    if (call == NULL) {
        aiot_write_unraisable((PyObject *)self);
    }
    else {
        call->loop = (AiotLoop *)Py_NewRef((PyObject *)self);
    }
    /* Twice, as Ctrl-C may strike inside the call; to be run once too often does no harm. */
    for (int i = 0; i < 2 && call != NULL && handle == NULL; i++) {
        handle = loop_schedule(self, self->state->str_call_soon_threadsafe, (PyObject *)call, NULL, NULL);
        if (handle != NULL) {
            break;
        }
        bool interrupted = PyErr_ExceptionMatches(PyExc_KeyboardInterrupt);
        closed = aiot_loop_error_is_closed();
        if (closed) {
            PyErr_Clear();
        }
        else {
            aiot_write_unraisable((PyObject *)self);
        }
        if (!interrupted) {
            break;
        }
    }
    closed = closed || (handle != NULL && loop_was_closed(self, loop));
    if ((closed || handle == NULL) && call != NULL) {
        call->spent = true;
    }
    Py_XDECREF((PyObject *)call);
    Py_DECREF(loop);
    aiot_post_outcome outcome = closed ? AIOT_POST_CLOSED : handle == NULL ? AIOT_POST_NOT_NOW : AIOT_POST_DELIVERED;
    Py_XDECREF(handle);
    return outcome;
}

void
aiot_loop_post(AiotLoop *self, aiot_post *post)
{
    PyObject *pending = PyErr_GetRaisedException();
    Py_INCREF(post->owner);
    post->next = NULL;
    aiot_mutex_lock(&self->posts_lock);
    if (self->posts_last == NULL) {
        self->posts_first = post;
    }
    else {
        self->posts_last->next = post;
    }
    self->posts_last = post;
    bool arm = !self->posts_armed;
    self->posts_armed = true;
    aiot_mutex_unlock(&self->posts_lock);

    aiot_post_outcome outcome = arm ? schedule_posts(self) : AIOT_POST_DELIVERED;
    if (outcome != AIOT_POST_DELIVERED) {
        /* What others added meanwhile can't be delivered either. */
        run_posts(self, detach_posts(self), outcome);
    }
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* ---- finding the state of a loop ---------------------------------------------------------------------------- */

/* Is it a type of a loop that counts milliseconds? 1, 0 or -1. */
static int
is_coarse_type(aiot_state *state, PyObject *type)
{
    PyObject *module = PyObject_GetAttr(type, state->str___module__);
    if (module == NULL) {
        return -1;
    }
    int coarse = 0;
    if (PyUnicode_Check(module)) {
        const char *name = PyUnicode_AsUTF8(module);
        coarse = name == NULL ? -1 : strncmp(name, "uvloop", 6) == 0 || strncmp(name, "winloop", 7) == 0;
    }
    Py_DECREF(module);
    return coarse;
}

static int
has_coarse_clock(aiot_state *state, PyObject *loop)
{
    /* Metaclasses answer, and may give the type another one meanwhile. */
    PyObject *mro = Py_XNewRef(Py_TYPE(loop)->tp_mro);
    int coarse = 0;
    for (Py_ssize_t i = 0; mro != NULL && coarse == 0 && i < PyTuple_GET_SIZE(mro); i++) {
        coarse = is_coarse_type(state, PyTuple_GET_ITEM(mro, i));
    }
    Py_XDECREF(mro);
    return coarse;
}

static AiotLoop *
loopstate_new(aiot_state *state, PyObject *loop)
{
    int coarse = has_coarse_clock(state, loop);
    if (coarse < 0) {
        return NULL;
    }
    AiotLoop *self = (AiotLoop *)state->LoopStateType->tp_alloc(state->LoopStateType, 0);
    if (self == NULL) {
        return NULL;
    }
    self->state = state;
    self->module = Py_NewRef(PyType_GetModule(state->LoopStateType));
    aiot_heap_init(&self->alarms, raw_realloc, PyMem_RawFree);
    PyObject *callback = PyCFunction_New(&loop_died_def, (PyObject *)self);
    if (callback == NULL) {
        goto error;
    }
    self->loop_ref = PyWeakref_NewRef(loop, callback);
    Py_DECREF(callback);
    if (self->loop_ref == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) {
            goto error;
        }
        /* A loop that can't be referred to weakly: a cycle with it, which the garbage collector frees. */
        PyErr_Clear();
        Py_INCREF(loop);
    }
    self->loop = loop;
    self->coarse = coarse;
    if (PyObject_GetOptionalAttr(loop, state->str___dict__, &self->dict) < 0) {
        goto error;
    }
    if (self->dict != NULL && !PyDict_Check(self->dict)) {
        Py_CLEAR(self->dict);
    }
    if ((self->get_loop = PyCFunction_New(&get_loop_def, (PyObject *)self)) == NULL) {
        goto error;
    }
    return self;
error:
    Py_DECREF(self);
    return NULL;
}

/* Loops that take no attribute: a weak table. The state lives as long as something of it is armed or suspended. */
static AiotLoop *
find_in_table(aiot_state *state, PyObject *loop)
{
    PyObject *key = PyLong_FromVoidPtr(loop);
    if (key == NULL) {
        return NULL;
    }
    PyObject *ref = NULL, *found = NULL;
    if (PyDict_GetItemRef(state->loops, key, &ref) > 0) {
        PyWeakref_GetRef(ref, &found);
        Py_DECREF(ref);
    }
    Py_DECREF(key);
    return (AiotLoop *)found;
}

static int
add_to_table(aiot_state *state, PyObject *loop, AiotLoop *self)
{
    PyObject *key = PyLong_FromVoidPtr(loop);
    PyObject *ref = PyWeakref_NewRef((PyObject *)self, NULL);
    int failed = key == NULL || ref == NULL || PyDict_SetItem(state->loops, key, ref) < 0;
    Py_XDECREF(ref);
    if (failed) {
        Py_XDECREF(key);
        return -1;
    }
    self->table_key = key;
    return 0;
}

/* The end of a state that was in the table. By now another loop may have the address of its loop. */
static void
forget_in_table(AiotLoop *self)
{
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *loops = Py_XNewRef(self->state->loops);
    PyObject *ref = NULL, *other = NULL;
    if (loops != NULL && PyDict_GetItemRef(loops, self->table_key, &ref) > 0 && PyWeakref_GetRef(ref, &other) == 0
        && PyDict_DelItem(loops, self->table_key) < 0)
    {
        PyErr_Clear();
    }
    Py_XDECREF(loops);
    Py_XDECREF(ref);
    Py_XDECREF(other);
    Py_CLEAR(self->table_key);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

static AiotLoop *
loopstate_find_or_make(aiot_state *state, PyObject *loop)
{
    PyObject *found;
    if (PyObject_GetOptionalAttr(loop, state->str__aiotools_loopstate, &found) < 0) {
        return NULL;
    }
    if (found != NULL) {
        if (Py_IS_TYPE(found, state->LoopStateType) && ((AiotLoop *)found)->loop == loop) {
            return (AiotLoop *)found;
        }
        Py_DECREF(found);
    }
    AiotLoop *self = find_in_table(state, loop);
    if (self != NULL && self->loop == loop) {
        return self;
    }
    Py_XDECREF(self);
    if (PyErr_Occurred()) {
        return NULL;
    }
    self = loopstate_new(state, loop);
    if (self == NULL) {
        return NULL;
    }
    if (PyObject_SetAttr(loop, state->str__aiotools_loopstate, (PyObject *)self) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError) && !PyErr_ExceptionMatches(PyExc_TypeError)) {
            Py_DECREF(self);
            return NULL;
        }
        PyErr_Clear();
        if (add_to_table(state, loop, self) < 0) {
            Py_DECREF(self);
            return NULL;
        }
    }
    return self;
}

AiotLoop *
aiot_loop_get(aiot_state *state, PyObject *loop)
{
    aiot_loop_cache *cache = loop_cache(state);
    uint64_t epoch = aiot_atomic_load(&state->loops_epoch);
    if (AIOT_LIKELY(cache->loop == loop && cache->epoch == epoch)) {
        return (AiotLoop *)Py_NewRef(cache->found);
    }
    AiotLoop *self = loopstate_find_or_make(state, loop);
    if (self != NULL) {
        cache->loop = loop;
        cache->found = (PyObject *)self;
        cache->epoch = epoch;
    }
    return self;
}

bool
aiot_loop_ran_here(AiotLoop *self)
{
    return self->loop != NULL && self->thread == PyThread_get_thread_ident();
}

AiotLoop *
aiot_loop_get_running(aiot_state *state)
{
    PyObject *loop = aiot_call_noargs(state->get_running_loop);
    if (loop == NULL) {
        return NULL;
    }
    AiotLoop *self = aiot_loop_get(state, loop);
    Py_DECREF(loop);
    if (self != NULL) {
        self->thread = PyThread_get_thread_ident();
    }
    return self;
}

/* ---- the type ----------------------------------------------------------------------------------------------- */

PyObject *
aiot_loop_object(AiotLoop *self)
{
    if (self->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the event loop is gone");
        return NULL;
    }
    return Py_NewRef(self->loop);
}

static PyObject *
LoopState_loop_died(PyObject *op, PyObject *Py_UNUSED(ref))
{
    AiotLoop *self = (AiotLoop *)op;
    self->loop = NULL;
    aiot_atomic_increment(&self->state->loops_epoch);
    /* These refer back to us. */
    Py_CLEAR(self->get_loop);
    Py_CLEAR(self->dict);
    Py_CLEAR(self->loop_ref);
    Py_RETURN_NONE;
}

static PyObject *
LoopState_get_loop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_loop_object((AiotLoop *)op);
}

static int
LoopState_traverse(PyObject *op, visitproc visit, void *arg)
{
    AiotLoop *self = (AiotLoop *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->module);
    if (self->loop_ref == NULL) {
        Py_VISIT(self->loop);
    }
    Py_VISIT(self->loop_ref);
    Py_VISIT(self->dict);
    Py_VISIT(self->get_loop);
    Py_VISIT(self->done_future);
    Py_VISIT(self->tick_handle);
    for (AiotWaiter *waiter = self->ready_first; waiter != NULL; waiter = waiter->next) {
        Py_VISIT(waiter);
    }
    for (size_t i = 0; i < aiot_heap_len(&self->alarms); i++) {
        Py_VISIT(AIOT_CONTAINER_OF(aiot_heap_at(&self->alarms, i), aiot_alarm, node)->owner);
    }
    for (aiot_turn *turn = self->turns_first; turn != NULL; turn = turn->next) {
        Py_VISIT(turn->owner);
    }
    for (aiot_post *post = self->posts_first; post != NULL; post = post->next) {
        Py_VISIT(post->owner);
    }
    return 0;
}

static int
LoopState_clear(PyObject *op)
{
    AiotLoop *self = (AiotLoop *)op;
    /* First: whoever asks from now on hears that the loop is gone. It may be freed before we are. */
    PyObject *owned = self->loop_ref == NULL ? self->loop : NULL;
    self->loop = NULL;
    aiot_atomic_increment(&self->state->loops_epoch);
    Py_CLEAR(self->tick_handle);
    Py_CLEAR(self->get_loop);
    Py_CLEAR(self->done_future);
    aiot_heap_node *first;
    while ((first = aiot_heap_first(&self->alarms)) != NULL) {
        aiot_heap_remove(&self->alarms, first);
        Py_DECREF(AIOT_CONTAINER_OF(first, aiot_alarm, node)->owner);
    }
    aiot_turn *turn;
    while ((turn = pop_turn(self)) != NULL) {
        Py_DECREF(turn->owner);
    }
    while (self->ready_first != NULL) {
        AiotWaiter *waiter = self->ready_first;
        self->ready_first = waiter->next;
        if (waiter->next == NULL) {
            self->ready_last = NULL;
        }
        waiter->next = NULL;
        waiter->linked = false;
        Py_DECREF(waiter);
    }
    run_posts(self, detach_posts(self), AIOT_POST_CLOSED);
    Py_CLEAR(self->dict);
    Py_CLEAR(self->loop_ref);
    Py_XDECREF(owned);
    return 0;
}

static void
LoopState_dealloc(PyObject *op)
{
    AiotLoop *self = (AiotLoop *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    /* Before anybody's weakref callback asks for us. */
    aiot_atomic_increment(&self->state->loops_epoch);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    if (self->table_key != NULL) {
        forget_in_table(self);
    }
    LoopState_clear(op);
    aiot_heap_fini(&self->alarms);
    aiot_ptrmap_fini(&self->frames, PyMem_RawFree);
    PyObject *module = self->module;
    type->tp_free(op);
    Py_DECREF(type);
    Py_DECREF(module);
}

static PyMemberDef LoopState_members[] = {
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(AiotLoop, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot LoopState_slots[] = {
    {Py_tp_doc, "What aiotools keeps for one event loop: its timer queue and its batch of wake-ups."},
    {Py_tp_members, LoopState_members},
    {Py_tp_traverse, LoopState_traverse},
    {Py_tp_clear, LoopState_clear},
    {Py_tp_dealloc, LoopState_dealloc},
    {0, NULL},
};

static PyType_Spec LoopState_spec = {
    .name = "aiotools._aiotools.LoopState",
    .basicsize = sizeof(AiotLoop),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = LoopState_slots,
};

int
aiot_loopstate_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->loops = PyDict_New()) == NULL) {
        return -1;
    }
    if (aiot_add_type(module, &state->PostCallType, &PostCall_spec, NULL, false) < 0) {
        return -1;
    }
    /* What a thread remembers from an interpreter that is gone, whose state had the same address, is void. */
    double now;
    if (monotonic_time(state, &now) < 0) {
        return -1;
    }
    state->loops_epoch = (uint64_t)(now * 1e9);
    return aiot_add_type(module, &state->LoopStateType, &LoopState_spec, NULL, false);
}
