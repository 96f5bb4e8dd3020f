/* timer.c: Timer: a task that starts other tasks, its ticks, at fixed times.
 *
 * Parts:      Timer, a subclass of asyncio.Task that only adds methods; TimerRun, its coroutine, which has all the state; TimerTick,
 *             the record of a tick that did not end in its first step.
 * Stages:     NEW -> TICKING -> LAST -> ENDING -> JOINING -> OVER, some of them skipped. NEW until the task's first
 *             step. TICKING: the task is suspended on `waiter` all the time; ticks are started by the alarm (and by turns), not by
 *             the task. LAST: `limit` is reached, the last ticks still run. ENDING: the task was woken, or has to be, to
 *             end with `error` (NULL: normally). JOINING: the ticks were cancelled and are waited for.
 * Invariants: the alarm is set exactly while TICKING, at infinity when paused, waiting for a cancelled tick, or ticking in
 *             each turn: so the loop keeps a timer that nobody else does. Running ticks are in `ticks`, the newest one is
 *             in `fresh` until its first step is over: most need no record and no done callback. Tick k is due at base + k *
 *             interval; `planned` is that plus the jitter.
 * Context:    cb, jitter and on_error are called in the task's one context, with the task as the current one, by way of
 *             asyncio._enter_task, which is there for this.
 * Locking:    all fields belong to the critical section of the TimerRun, and to the thread of its loop.
 * Re-entry:   cb, jitter, on_error, a task factory, Task.cancel() of a tick and the loop's exception handler run any code; that may
 *             cancel, reschedule, pause or trigger this timer. After each of them the stage is looked at again; `changes` tells
 *             whether the schedule was replaced.
 */

#include "timer.h"

#include "args.h"
#include "awaitable.h"
#include "waiter.h"

#include <math.h>
#include <string.h>

typedef enum {
    TIMER_NEW,
    TIMER_TICKING,
    TIMER_LAST,
    TIMER_ENDING,
    TIMER_JOINING,
    TIMER_OVER,
} timer_stage;

typedef enum {
    OVERLAP_AT_MOST,        /* `most` of them; more are skipped */
    OVERLAP_CANCEL,         /* the previous one is cancelled and awaited first */
    OVERLAP_QUEUE,          /* one waits for the running one to end */
} timer_overlap;

typedef enum {
    ON_ERROR_REPORT,
    ON_ERROR_STOP,
    ON_ERROR_BACKOFF,
    ON_ERROR_CALL,
} timer_on_error;

typedef enum {
    EAGER_NO,
    EAGER_BY_LOOP,          /* loop.create_task(eager_start=True) */
    EAGER_BY_TASK,          /* Task(eager_start=True), where nobody replaced how the loop makes tasks */
} timer_eager;

typedef struct {
    AIOT_AWAITABLE_HEAD
    uint8_t stage;              /* timer_stage */
    uint8_t overlap;            /* timer_overlap */
    uint8_t on_error;           /* timer_on_error */
    uint8_t eager;              /* timer_eager */
    bool catch_up;              /* missed ticks are all run, one in each turn */
    bool has_missed;            /* `missed` or `grace` was given: needs an interval */
    bool paused;
    bool blocked;               /* waits for the end of ticks that it cancelled */
    bool queued;                /* a tick waits for the running one */
    bool entered;               /* in its context, and the current task */
    AiotLoop *loop;
    PyObject *task;             /* from the first step to the end */
    AiotWaiter *waiter;         /* what the task is suspended on */
    PyObject *cb;
    PyObject *interval_obj;     /* as given; cb's argument */
    PyObject *context;
    PyObject *jitter;           /* callable or NULL */
    PyObject *handler;          /* on_error's callable or NULL */
    PyObject *task_kwargs;      /* {"loop": loop, "eager_start": True}, once needed */
    PyObject *error;            /* what the task will raise */
    double interval;            /* 0: a tick in each turn of the loop */
    double first;
    double jitter_scale;        /* for random(); 0: the callable gives seconds */
    double grace;
    double tick_timeout;        /* infinity: none */
    double backoff_cap;
    uint64_t limit;             /* 0: none */
    uint64_t most;
    /* schedule */
    aiot_alarm alarm;
    aiot_turn turn;
    double base;
    double k;                   /* of the next tick; whole */
    double planned;
    double last_k;              /* of the last tick that was run */
    double queued_due;
    double shift;               /* the loop's clock_shift that these times go by */
    uint32_t changes;
    uint32_t fails;             /* in a row */
    uint64_t triggers;
    /* ticks */
    PyObject *fresh;            /* task */
    double fresh_at;
    aiot_link ticks;            /* TimerTick: owns a reference each */
    size_t n_ticks;
    /* statistics */
    uint64_t started;
    uint64_t skipped;
    uint64_t errors;
    double late_max;
    double late_sum;
    PyObject *last_error;
} RunObject;

typedef struct {
    PyObject_HEAD
    RunObject *run;             /* NULL when nobody waits for it any more */
    PyObject *task;
    aiot_link link;
    aiot_alarm alarm;           /* tick_timeout */
    bool timed_out;
    bool dropped;               /* cancelled to make room for the next one */
} TickObject;

/* Shorter than this no clock can tell two ticks apart. */
static const double shortest_interval = 1e-9;

/* `planned` of a timer that ticks in each turn of the loop. */
static const double every_turn = -INFINITY;

static int run_pump(RunObject *self);
static int run_after_tick(RunObject *self);
static int run_end(RunObject *self, PyObject *error);

static inline aiot_state *
run_state(RunObject *self)
{
    return self->loop->state;
}

static inline bool
run_is_live(RunObject *self)
{
    return self->fresh != NULL || self->n_ticks > 0;
}

/* May ticks start? Not after cancel(), which the waiter gets to know at once. */
static inline bool
run_may_tick(RunObject *self)
{
    return self->stage == TIMER_TICKING && (self->waiter == NULL || !aiot_waiter_is_done(self->waiter));
}

static inline double
run_due_time(RunObject *self, double k)
{
    return self->base + k * self->interval;
}

/* Another clock was put into the loop since the last look: the schedule goes on in its time. First thing on each way in. */
static inline void
run_follow_clock(RunObject *self)
{
    double delta = self->loop->clock_shift - self->shift;
    if (AIOT_LIKELY(delta == 0.0)) {
        return;
    }
    self->shift = self->loop->clock_shift;
    self->base += delta;
    self->planned += delta;
    self->queued_due += delta;
    self->fresh_at += delta;
}

/* n ticks, a whole number, will not be run. A virtual clock can leap further than a counter counts, and so far that the numbers
 * of ticks have no neighbours any more, or are infinite. */
static void
run_skip(RunObject *self, double n)
{
    double room = (double)(UINT64_MAX - self->skipped);
    if (n > 0) {
        self->skipped = n < room ? self->skipped + (uint64_t)n : UINT64_MAX;
    }
}

/* ---- context ------------------------------------------------------------------------------------------------ */

/* 1: entered, leave it again; 0: was inside already; -1. */
static int
run_enter(RunObject *self)
{
    if (self->entered) {
        return 0;
    }
    if (self->task == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the timer has ended");
        return -1;
    }
    PyObject *loop = aiot_loop_object(self->loop);
    if (loop == NULL) {
        return -1;
    }
    if (PyContext_Enter(self->context) < 0) {
        Py_DECREF(loop);
        return -1;
    }
    PyObject *args[] = {NULL, loop, self->task};
    PyObject *result = PyObject_Vectorcall(run_state(self)->enter_task, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                           NULL);
    Py_DECREF(loop);
    if (result == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        if (PyContext_Exit(self->context) < 0) {
            PyErr_WriteUnraisable((PyObject *)self);
        }
        PyErr_SetRaisedException(exc);
        return -1;
    }
    Py_DECREF(result);
    self->entered = true;
    return 1;
}

/* With or without an exception set; keeps it. */
static void
run_leave(RunObject *self, int entered, PyObject *task)
{
    if (entered <= 0) {
        return;
    }
    PyObject *exc = PyErr_GetRaisedException();
    self->entered = false;
    PyObject *loop = aiot_loop_object(self->loop);
    PyObject *result = NULL;
    if (loop != NULL) {
        PyObject *args[] = {NULL, loop, task};
        result = PyObject_Vectorcall(run_state(self)->leave_task, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        Py_DECREF(loop);
    }
    if (result == NULL) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    Py_XDECREF(result);
    if (PyContext_Exit(self->context) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
}

/* ---- schedule ----------------------------------------------------------------------------------------------- */

/* Seconds to add to the next due time. 0 or -1. */
static int
run_draw_jitter(RunObject *self, double *out)
{
    *out = 0.0;
    if (self->jitter == NULL) {
        return 0;
    }
    PyObject *jitter = Py_NewRef(self->jitter), *task = Py_XNewRef(self->task);
    PyObject *drawn = NULL;
    int entered = run_enter(self);
    if (entered >= 0) {
        drawn = PyObject_CallNoArgs(jitter);
        run_leave(self, entered, task);
    }
    Py_XDECREF(task);
    Py_DECREF(jitter);
    if (drawn == NULL) {
        return -1;
    }
    int failed = aiot_as_seconds(drawn, "what jitter returns", out);
    Py_DECREF(drawn);
    if (!failed && (*out < 0 || isinf(*out))) {
        PyErr_SetString(PyExc_ValueError, "what jitter returns must be finite and not negative");
        return -1;
    }
    if (self->jitter_scale > 0) {
        *out *= self->jitter_scale;
    }
    return failed;
}

/* Nothing is due by the clock; the loop goes on keeping the timer, unless that has ended. */
static int
run_park(RunObject *self)
{
    return self->stage == TIMER_TICKING ? aiot_alarm_set(self->loop, &self->alarm, INFINITY) : 0;
}

/* Sets the alarm, or asks for a turn, for the tick that is planned. */
static int
run_arm(RunObject *self)
{
    if (self->stage != TIMER_TICKING) {
        return 0;
    }
    if (self->paused || self->blocked) {
        return run_park(self);
    }
    return aiot_alarm_set(self->loop, &self->alarm, self->planned);
}

/* Plans tick k and arms for it. */
static int
run_plan(RunObject *self, double k)
{
    uint32_t changes = ++self->changes;
    self->k = k;
    self->planned = run_due_time(self, k);
    double jitter;
    if (run_draw_jitter(self, &jitter) < 0) {
        return -1;
    }
    if (changes != self->changes) {
        return 0;
    }
    self->planned += jitter;
    return run_arm(self);
}

/* The same, once a tick is about to start that may be the last one: then jitter isn't asked for more. */
static int
run_plan_next(RunObject *self, double k)
{
    if (self->limit == 0 || self->started + 1 < self->limit
        || (self->overlap == OVERLAP_QUEUE && run_is_live(self))
        || (self->overlap == OVERLAP_AT_MOST && self->n_ticks + (self->fresh != NULL) >= self->most))
    {
        return run_plan(self, k);
    }
    self->changes++;
    self->k = k;
    self->planned = run_due_time(self, k);
    return run_arm(self);
}

/* The first k, not before `from`, that is due at when or later. */
static double
run_first_k_at(RunObject *self, double from, double when)
{
    double k = ceil((when - self->base) / self->interval);
    /* The division rounds; the product is what counts. */
    if (run_due_time(self, k) < when) {
        k += 1;
    }
    else if (run_due_time(self, k - 1) >= when) {
        k -= 1;
    }
    return k > from ? k : from;
}

/* ---- the end of a tick --------------------------------------------------------------------------------------- */

static int
run_report(RunObject *self, PyObject *task, PyObject *exc, const char *message)
{
    if (self->loop->loop == NULL) {
        return 0;
    }
    PyErr_SetRaisedException(Py_NewRef(exc));
    return aiot_loop_report(self->loop, message, run_state(self)->str_task, task);
}

/* Reports the pending exception. Not under the name "task": the handler would be run in the context of the timer, which may be
 * entered just now. */
static int
run_report_own(RunObject *self, const char *message)
{
    return aiot_loop_report(self->loop, message, run_state(self)->str_timer, self->task != NULL ? self->task : Py_None);
}

static int
run_call_handler(RunObject *self, PyObject *exc)
{
    PyObject *handler = Py_NewRef(self->handler), *task = Py_XNewRef(self->task);
    PyObject *result = NULL;
    int entered = run_enter(self);
    if (entered >= 0) {
        PyObject *args[] = {NULL, task != NULL ? task : Py_None, exc};
        result = PyObject_Vectorcall(handler, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        run_leave(self, entered, task);
    }
    Py_DECREF(handler);
    Py_XDECREF(task);
    if (result == NULL) {
        PyObject *raised = PyErr_GetRaisedException();
        int failed = run_end(self, raised);
        Py_DECREF(raised);
        return failed;
    }
    Py_DECREF(result);
    return 0;
}

/* Leaves out the ticks that are due before 2 ** fails intervals are over. */
static int
run_back_off(RunObject *self)
{
    run_follow_clock(self);
    if (self->fails < 1000) {
        self->fails++;
    }
    double delay = ldexp(self->interval, (int)self->fails);
    if (delay > self->backoff_cap) {
        delay = self->backoff_cap;
    }
    if (self->stage != TIMER_TICKING || self->interval <= 0) {
        return 0;
    }
    /* A multiple of the interval must not become one more by rounding. */
    double k = self->last_k + ceil(delay / self->interval - 1e-9);
    if (k <= self->k) {
        return 0;
    }
    run_skip(self, k - self->k);
    return run_plan(self, k);
}

static int
run_tick_failed(RunObject *self, PyObject *task, PyObject *exc)
{
    static const char message[] = "A tick of a timer failed";
    self->errors++;
    Py_XSETREF(self->last_error, Py_NewRef(exc));
    if (!PyErr_GivenExceptionMatches(exc, PyExc_Exception)
        && !PyErr_GivenExceptionMatches(exc, run_state(self)->CancelledError))
    {
        /* SystemExit, KeyboardInterrupt: the task has stopped the loop with it already. */
        return 0;
    }
    switch ((timer_on_error)self->on_error) {
    case ON_ERROR_CALL:
        return run_call_handler(self, exc);
    case ON_ERROR_STOP:
        if (self->stage < TIMER_ENDING) {
            return run_end(self, exc);
        }
        break;
    case ON_ERROR_BACKOFF:
        if (run_back_off(self) < 0) {
            return -1;
        }
        break;
    case ON_ERROR_REPORT:
        break;
    }
    return run_report(self, task, exc, message);
}

/* task.done() or task.exception(), of all ticks: without the look-up, which is most of what that costs, where the type is the
 * one that most tasks have and that cannot be changed. */
static inline PyObject *
ask_task(aiot_state *state, PyObject *task, PyObject *function, PyObject *name)
{
    return (PyObject *)Py_TYPE(task) == state->asyncio_Task ? PyObject_CallOneArg(function, task)
                                                            : PyObject_CallMethodNoArgs(task, name);
}

/* task.cancelling() > 0; 0 for what has no such method. */
static int
is_being_cancelled(aiot_state *state, PyObject *task)
{
    PyObject *count = PyObject_CallMethodNoArgs(task, state->str_cancelling);
    if (count == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    int some = PyObject_IsTrue(count);
    Py_DECREF(count);
    return some;
}

/* What went wrong with a done tick: new reference in *error, NULL when nothing did. 0 or -1. */
static int
find_tick_error(RunObject *self, PyObject *task, TickObject *tick, bool *cancelled, PyObject **error)
{
    aiot_state *state = run_state(self);
    *error = NULL;
    *cancelled = false;
    PyObject *exc = ask_task(state, task, state->task_exception, state->str_exception);
    if (exc == NULL) {
        if (!PyErr_ExceptionMatches(state->CancelledError)) {
            return -1;
        }
        PyErr_Clear();
        *cancelled = true;
    }
    else if (exc != Py_None) {
        *error = exc;
        return 0;
    }
    else {
        Py_DECREF(exc);
    }
    if (tick == NULL) {
        return 0;
    }
    if (tick->timed_out) {
        PyObject *limit = PyFloat_FromDouble(self->tick_timeout);
        PyObject *text = limit == NULL ? NULL : PyUnicode_FromFormat("a tick took longer than %R seconds", limit);
        *error = text == NULL ? NULL : PyObject_CallOneArg(PyExc_TimeoutError, text);
        Py_XDECREF(limit);
        Py_XDECREF(text);
        return *error == NULL ? -1 : 0;
    }
    if (tick->dropped && !*cancelled && self->stage == TIMER_TICKING) {
        int swallowed = is_being_cancelled(state, task);
        if (swallowed <= 0) {
            return swallowed;
        }
        PyObject *text = PyUnicode_FromString("a tick swallowed the cancellation that was to make room for the next one");
        *error = text == NULL ? NULL : PyObject_CallOneArg(state->InvalidStateError, text);
        Py_XDECREF(text);
        return *error == NULL ? -1 : 0;
    }
    return 0;
}

/* A tick is done, and counted out. */
static int
run_tick_ended(RunObject *self, PyObject *task, TickObject *tick)
{
    PyObject *error;
    bool cancelled;
    if (find_tick_error(self, task, tick, &cancelled, &error) < 0) {
        return -1;
    }
    if (error == NULL) {
        if (!cancelled) {
            self->fails = 0;
        }
        return 0;
    }
    int failed = run_tick_failed(self, task, error);
    Py_DECREF(error);
    return failed;
}

/* ---- ticks with a record -------------------------------------------------------------------------------------- */

static void
tick_forget(TickObject *tick)
{
    RunObject *run = tick->run;
    if (run == NULL) {
        return;
    }
    aiot_link_remove(&tick->link);
    run->n_ticks--;
    tick->run = NULL;
    aiot_alarm_cancel(run->loop, &tick->alarm);
    Py_DECREF(run);
    Py_DECREF(tick);
}

static int
run_cancel_tick(RunObject *self, TickObject *tick)
{
    PyObject *result = PyObject_CallMethodNoArgs(tick->task, run_state(self)->str_cancel);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static int
Tick_fire(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    TickObject *tick = (TickObject *)owner;
    RunObject *run = tick->run;
    if (run == NULL) {
        return 0;
    }
    tick->timed_out = true;
    Py_INCREF(run);
    int failed = run_cancel_tick(run, tick);
    Py_DECREF(run);
    return failed;
}

/* Any exception of what a timer does by itself ends the timer with it. 0 or -1. */
static int
run_guard(RunObject *self, int failed)
{
    if (failed < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        failed = run_end(self, exc);
        Py_DECREF(exc);
    }
    return failed;
}

/* The done callback. */
static int
tick_done(TickObject *tick)
{
    RunObject *run = (RunObject *)Py_XNewRef((PyObject *)tick->run);
    if (run == NULL) {
        return 0;
    }
    int failed;
    Py_BEGIN_CRITICAL_SECTION(run);
    tick_forget(tick);
    failed = run_guard(run, run_tick_ended(run, tick->task, tick));
    if (!failed) {
        failed = run_guard(run, run_after_tick(run));
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    return failed;
}

static PyObject *
Tick_call(PyObject *op, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    if (tick_done((TickObject *)op) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
Tick_repr(PyObject *op)
{
    return PyUnicode_FromFormat("<%s>", ((TickObject *)op)->run == NULL ? "aiotools tick, done" : "aiotools tick");
}

/* Makes a record of a task that runs on, and has its end noticed. */
static int
run_watch(RunObject *self, PyObject *task, double started_at)
{
    aiot_state *state = run_state(self);
    TickObject *tick = (TickObject *)state->TimerTickType->tp_alloc(state->TimerTickType, 0);
    if (tick == NULL) {
        return -1;
    }
    aiot_link_init(&tick->link);
    aiot_alarm_init(&tick->alarm, (PyObject *)tick, Tick_fire);
    tick->task = Py_NewRef(task);
    tick->run = (RunObject *)Py_NewRef((PyObject *)self);
    aiot_link_append(&self->ticks, &tick->link);
    Py_INCREF(tick);
    self->n_ticks++;
    PyObject *result = PyObject_CallMethodOneArg(task, state->str_add_done_callback, (PyObject *)tick);
    if (result == NULL) {
        tick_forget(tick);
        Py_DECREF(tick);
        return -1;
    }
    Py_DECREF(result);
    int failed = 0;
    if (tick->run != NULL && !isinf(self->tick_timeout)) {
        failed = aiot_alarm_set(self->loop, &tick->alarm, started_at + self->tick_timeout);
    }
    Py_DECREF(tick);
    return failed;
}

static int
is_done(aiot_state *state, PyObject *task)
{
    PyObject *answer = ask_task(state, task, state->task_done, state->str_done);
    if (answer == NULL) {
        return -1;
    }
    int done = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return done;
}

/* The newest tick had its first step, or the next one wants its place: is it over, or does it need a record? */
static int
run_settle(RunObject *self)
{
    PyObject *task = self->fresh;
    if (task == NULL) {
        return 0;
    }
    self->fresh = NULL;
    int failed = is_done(run_state(self), task);
    if (failed == 0) {
        failed = run_watch(self, task, self->fresh_at);
    }
    else if (failed > 0) {
        failed = run_tick_ended(self, task, NULL);
    }
    Py_DECREF(task);
    return failed;
}

/* task.cancelling() of the timer; -1. */
static Py_ssize_t
run_count_requests(RunObject *self)
{
    if (self->task == NULL) {
        return 0;
    }
    PyObject *count = PyObject_CallMethodNoArgs(self->task, run_state(self)->str_cancelling);
    Py_ssize_t n = count == NULL ? -1 : PyLong_AsSsize_t(count);
    Py_XDECREF(count);
    return n < 0 && PyErr_Occurred() ? -1 : n;
}

/* Asks a tick to end, which the timer will wait for. One that awaits the timer passes the request on to it, and neither would
 * ever end: that one isn't waited for. */
static int
run_cancel_tick_to_join(RunObject *self, TickObject *tick)
{
    Py_ssize_t before = run_count_requests(self);
    if (before < 0 || run_cancel_tick(self, tick) < 0) {
        return -1;
    }
    Py_ssize_t after = run_count_requests(self);
    if (after > before) {
        tick_forget(tick);
    }
    return after < 0 ? -1 : 0;
}

/* Asks all running ticks to end. The ends are noticed later. */
static int
run_cancel_ticks(RunObject *self, bool dropped)
{
    if (run_settle(self) < 0) {
        return -1;
    }
    PyObject *ticks = PyList_New(0);
    if (ticks == NULL) {
        return -1;
    }
    int failed = 0;
    for (aiot_link *link = self->ticks.next; link != &self->ticks && !failed; link = link->next) {
        failed = PyList_Append(ticks, (PyObject *)AIOT_CONTAINER_OF(link, TickObject, link));
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(ticks) && !failed; i++) {
        TickObject *tick = (TickObject *)PyList_GET_ITEM(ticks, i);
        if (tick->run == self && !(dropped && tick->dropped)) {
            tick->dropped |= dropped;
            failed = dropped ? run_cancel_tick(self, tick) : run_cancel_tick_to_join(self, tick);
        }
    }
    Py_DECREF(ticks);
    return failed;
}

/* ---- starting ticks ------------------------------------------------------------------------------------------- */

/* Does nothing stand between the loop and asyncio.Task? 1, 0 or -1. */
static int
makes_plain_tasks(RunObject *self, PyObject *loop)
{
    aiot_state *state = run_state(self);
    PyObject *method = PyObject_GetAttr(loop, state->str_create_task);
    if (method == NULL) {
        return -1;
    }
    int plain = PyMethod_Check(method) && PyMethod_GET_FUNCTION(method) == state->base_loop_create_task;
    Py_DECREF(method);
    if (!plain && self->loop->dict != NULL) {
        plain = PyDict_Contains(self->loop->dict, state->str_create_task);
        plain = plain < 0 ? -1 : !plain;
    }
    if (plain <= 0) {
        return plain;
    }
    PyObject *factory = PyObject_CallMethodNoArgs(loop, state->str_get_task_factory);
    if (factory == NULL) {
        return -1;
    }
    plain = factory == Py_None;
    Py_DECREF(factory);
    return plain;
}

/* Task(coro, loop=loop, eager_start=True). The type takes its keywords as a dict; making one for each tick would be a tenth
 * of what an eager tick costs. */
static PyObject *
run_make_eager_task(RunObject *self, PyObject *loop, PyObject *coro)
{
    aiot_state *state = run_state(self);
    if (self->task_kwargs == NULL) {
        PyObject *kwargs = PyDict_New();
        if (kwargs == NULL || PyDict_SetItem(kwargs, state->str_loop, loop) < 0
            || PyDict_SetItem(kwargs, state->str_eager_start, Py_True) < 0)
        {
            Py_XDECREF(kwargs);
            return NULL;
        }
        self->task_kwargs = kwargs;
    }
    PyObject *kwargs = Py_NewRef(self->task_kwargs);
    PyObject *args = PyTuple_Pack(1, coro);
    PyObject *task = args == NULL ? NULL : PyObject_Call(state->asyncio_Task, args, kwargs);
    Py_XDECREF(args);
    Py_DECREF(kwargs);
    return task;
}

/* The task of a tick, started at once where that can be had. */
static PyObject *
run_make_task(RunObject *self, PyObject *loop, PyObject *coro)
{
    aiot_state *state = run_state(self);
    PyObject *args[] = {loop, coro, Py_True};
    bool by_task = self->loop->no_eager_start;
#if PY_VERSION_HEX < 0x030D0000
    /* uvloop's create_task() takes the argument on these versions, too, and does nothing with it. */
    by_task |= self->loop->coarse;
#endif
    if (self->eager == EAGER_BY_LOOP && by_task) {
        self->eager = EAGER_BY_TASK;
    }
    if (self->eager == EAGER_BY_LOOP) {
        PyObject *task = PyObject_VectorcallMethod(state->str_create_task, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                                   state->kw_eager_start);
        if (task != NULL || !PyErr_ExceptionMatches(PyExc_TypeError)) {
            return task;
        }
        /* A loop, or a task factory, that does not know the argument. */
        PyObject *exc = PyErr_GetRaisedException();
        int plain = makes_plain_tasks(self, loop);
        if (plain < 0) {
            Py_DECREF(exc);
            return NULL;
        }
        Py_DECREF(exc);
        self->eager = EAGER_BY_TASK;
        self->loop->no_eager_start |= plain;
    }
    if (self->eager == EAGER_BY_TASK) {
        int plain = makes_plain_tasks(self, loop);
        if (plain < 0) {
            return NULL;
        }
        if (plain) {
            PyObject *task = run_make_eager_task(self, loop, coro);
            if (task != NULL || !PyErr_ExceptionMatches(PyExc_TypeError)) {
                return task;
            }
            /* 3.11 */
            PyErr_Clear();
            self->eager = EAGER_NO;
        }
    }
    return PyObject_VectorcallMethod(state->str_create_task, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

static int
check_coroutine(aiot_state *state, PyObject *coro)
{
    if (AIOT_LIKELY(PyCoro_CheckExact(coro))) {
        return 0;
    }
    PyObject *answer = PyObject_CallOneArg(state->iscoroutine, coro);
    if (answer == NULL) {
        return -1;
    }
    int is_one = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (is_one == 0) {
        PyErr_Format(PyExc_TypeError, "a coroutine was expected from the callback of a timer, got %R", coro);
    }
    return is_one > 0 ? 0 : -1;
}

/* A coroutine that will not be run; keeps the exception that is set, if there is one. */
static void
close_coroutine(aiot_state *state, PyObject *coro)
{
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *result = PyObject_CallMethodNoArgs(coro, state->str_close);
    if (result == NULL) {
        PyErr_WriteUnraisable(coro);
    }
    Py_XDECREF(result);
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
}

/* Calls cb and makes the task of the tick. *task is NULL when the timer was cancelled meanwhile. 0 or -1. */
static int
run_call_cb(RunObject *self, PyObject **task)
{
    aiot_state *state = run_state(self);
    *task = NULL;
    PyObject *loop = aiot_loop_object(self->loop);
    if (loop == NULL) {
        return -1;
    }
    PyObject *cb = Py_NewRef(self->cb), *interval = Py_NewRef(self->interval_obj);
    PyObject *coro = PyObject_CallOneArg(cb, interval);
    Py_DECREF(interval);
    Py_DECREF(cb);
    int failed = -1;
    if (coro == NULL || check_coroutine(state, coro) < 0) {
        goto done;
    }
    bool goes_on = run_may_tick(self);
    if (goes_on && self->waiter == NULL) {
        /* In the task's own step. */
        int cancelled = is_being_cancelled(state, self->task);
        if (cancelled < 0) {
            goto done;
        }
        goes_on = !cancelled;
    }
    if (goes_on) {
        *task = run_make_task(self, loop, coro);
        failed = *task == NULL ? -1 : 0;
    }
    else {
        failed = 0;
    }
    if (*task == NULL) {
        close_coroutine(state, coro);
    }
done:
    Py_XDECREF(coro);
    Py_DECREF(loop);
    return failed;
}

/* Starts a tick that was due at due. */
static int
run_start_tick(RunObject *self, double now, double due)
{
    if (run_settle(self) < 0) {
        return -1;
    }
    if (!run_may_tick(self)) {
        return 0;
    }
    PyObject *own_task = Py_XNewRef(self->task), *task = NULL;
    int entered = run_enter(self);
    int failed = entered < 0 ? -1 : run_call_cb(self, &task);
    run_leave(self, entered, own_task);
    Py_XDECREF(own_task);
    if (task == NULL) {
        return failed;
    }
    self->started++;
    double late = now - due;
    if (late > 0) {
        self->late_sum += late;
        if (late > self->late_max) {
            self->late_max = late;
        }
    }
    if (self->limit != 0 && self->started >= self->limit && self->stage == TIMER_TICKING) {
        self->stage = TIMER_LAST;
        self->changes++;
        self->triggers = 0;
        self->queued = false;
        aiot_alarm_cancel(self->loop, &self->alarm);
    }
    if (self->fresh != NULL) {
        /* cb ran the timer from inside: a loop in the loop. */
        failed = run_watch(self, task, now);
        Py_DECREF(task);
        return failed;
    }
    int done = is_done(run_state(self), task);
    if (done == 0) {
        self->fresh = task;
        self->fresh_at = now;
        return aiot_turn_ask(self->loop, &self->turn);
    }
    failed = done < 0 ? -1 : run_tick_ended(self, task, NULL);
    Py_DECREF(task);
    return failed < 0 ? -1 : run_after_tick(self);
}

/* Starts a tick, if what is running leaves room for it. Not for OVERLAP_CANCEL with running ticks: see run_make_room. */
static int
run_tick(RunObject *self, double now, double due)
{
    if (self->overlap == OVERLAP_QUEUE && run_is_live(self)) {
        if (self->queued) {
            self->skipped++;
        }
        else {
            self->queued = true;
            self->queued_due = due;
        }
        return 0;
    }
    if (self->overlap == OVERLAP_AT_MOST && self->n_ticks + (self->fresh != NULL) >= self->most) {
        self->skipped++;
        return 0;
    }
    return run_start_tick(self, now, due);
}

/* Before a tick: 1 when it may start, 0 when it has to wait for running ticks that are cancelled now. */
static int
run_make_room(RunObject *self)
{
    if (self->overlap != OVERLAP_CANCEL || !run_is_live(self)) {
        return 1;
    }
    self->blocked = true;
    if (run_park(self) < 0 || run_cancel_ticks(self, true) < 0) {
        return -1;
    }
    if (run_is_live(self)) {
        return 0;
    }
    self->blocked = false;
    return 1;
}

/* The tick that is planned is due. */
static int
run_tick_due(RunObject *self, double now)
{
    double k = self->k, last = k;
    double planned = self->planned;
    if (run_due_time(self, k + 1) <= now) {
        last = floor((now - self->base) / self->interval);
        if (run_due_time(self, last) > now) {
            last -= 1;
        }
        else if (run_due_time(self, last + 1) <= now) {
            last += 1;
        }
        if (last < k) {
            last = k;
        }
    }
    /* Those that are late beyond grace are not run. */
    double run_k = k;
    if (now - planned > self->grace) {
        run_k = run_first_k_at(self, k + 1, now - self->grace);
    }
    bool any = run_k <= last;
    if (any) {
        int room = run_make_room(self);
        if (room <= 0) {
            return room;
        }
    }
    double due = run_k == k ? planned : run_due_time(self, run_k);
    double next = any && self->catch_up ? run_k + 1 : last + 1;
    run_skip(self, next - k - (any ? 1 : 0));
    if (any) {
        self->last_k = next - 1;
    }
    if ((any ? run_plan_next(self, next) : run_plan(self, next)) < 0) {
        return -1;
    }
    if (self->catch_up && self->planned <= now && !self->paused && self->stage == TIMER_TICKING) {
        /* Without the detour by the clock: it could be a millisecond for each. */
        if (run_park(self) < 0 || aiot_turn_ask(self->loop, &self->turn) < 0) {
            return -1;
        }
    }
    return any && run_may_tick(self) ? run_tick(self, now, due) : 0;
}

/* A tick in each turn. */
static int
run_spin(RunObject *self, double now)
{
    int room = run_make_room(self);
    if (room <= 0) {
        return room;
    }
    self->planned = every_turn;
    if (run_park(self) < 0 || run_tick(self, now, now) < 0) {
        return -1;
    }
    /* After the first step of this one. */
    return run_may_tick(self) && !self->paused && self->planned == every_turn ? aiot_turn_ask(self->loop, &self->turn) : 0;
}

/* Does what there is to do now: what was triggered, what is due. */
static int
run_pump(RunObject *self)
{
    if (run_settle(self) < 0) {
        return -1;
    }
    if (!run_may_tick(self) || self->blocked) {
        return 0;
    }
    double now;
    if (aiot_loop_time(self->loop, &now) < 0) {
        return -1;
    }
    if (self->triggers > 0) {
        int room = run_make_room(self);
        if (room <= 0) {
            return room;
        }
        self->triggers--;
        if (self->triggers > 0 && aiot_turn_ask(self->loop, &self->turn) < 0) {
            return -1;
        }
        if (run_tick(self, now, now) < 0) {
            return -1;
        }
        /* What is due by the clock as well gets its own turn. */
        return run_may_tick(self) && !self->blocked ? run_arm(self) : 0;
    }
    if (self->paused) {
        return 0;
    }
    if (self->planned > now) {
        return run_arm(self);
    }
    return self->interval > 0 ? run_tick_due(self, now) : run_spin(self, now);
}

/* After the end of a tick: what waited for that. */
static int
run_after_tick(RunObject *self)
{
    run_follow_clock(self);
    if (self->stage == TIMER_JOINING) {
        return run_is_live(self) || self->waiter == NULL ? 0 : aiot_waiter_wake(self->waiter);
    }
    if (run_is_live(self)) {
        return 0;
    }
    if (self->stage == TIMER_LAST) {
        return run_end(self, NULL);
    }
    if (self->blocked) {
        self->blocked = false;
        return run_pump(self);
    }
    if (self->queued && run_may_tick(self)) {
        double now;
        if (aiot_loop_time(self->loop, &now) < 0) {
            return -1;
        }
        self->queued = false;
        return run_start_tick(self, now, self->queued_due);
    }
    return 0;
}

static int
Run_fire(AiotLoop *loop, PyObject *owner)
{
    RunObject *self = (RunObject *)owner;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    run_follow_clock(self);
    failed = aiot_loop_arm_tick(loop);
    if (!failed) {
        /* The queue has let go of us; ticking is a reason to be kept. */
        failed = run_pump(self);
    }
    failed = run_guard(self, failed);
    Py_END_CRITICAL_SECTION();
    return failed;
}

static int
Run_turn(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    RunObject *self = (RunObject *)owner;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    run_follow_clock(self);
    bool had_fresh = self->fresh != NULL, was_blocked = self->blocked;
    failed = run_guard(self, run_settle(self));
    if (!failed && had_fresh) {
        failed = run_guard(self, run_after_tick(self));
    }
    if (!failed && !was_blocked && (self->triggers > 0 || self->planned == every_turn || self->catch_up)) {
        failed = run_guard(self, run_pump(self));
    }
    Py_END_CRITICAL_SECTION();
    return failed;
}

/* ---- the coroutine --------------------------------------------------------------------------------------------- */

/* Ends the timer: with error, or normally when that is NULL. Borrows it. 0, or -1 when the task can't be woken. */
static int
run_end(RunObject *self, PyObject *error)
{
    if (self->stage >= TIMER_ENDING) {
        if (error == NULL) {
            return 0;
        }
        PyErr_SetRaisedException(Py_NewRef(error));
        if (self->stage == TIMER_OVER || self->loop->loop == NULL) {
            return -1;
        }
        return run_report_own(self, "A timer failed while it was ending");
    }
    self->stage = TIMER_ENDING;
    self->changes++;
    self->error = Py_XNewRef(error);
    aiot_alarm_cancel(self->loop, &self->alarm);
    return self->waiter == NULL ? 0 : aiot_waiter_wake(self->waiter);
}

/* Nothing is left to do. What others may still ask for stays: the statistics. */
static void
run_release(RunObject *self)
{
    self->stage = TIMER_OVER;
    self->changes++;
    aiot_alarm_cancel(self->loop, &self->alarm);
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->task);
    Py_CLEAR(self->cb);
    Py_CLEAR(self->jitter);
    Py_CLEAR(self->handler);
    Py_CLEAR(self->task_kwargs);
    /* Not the context: a callback that closes us is still to leave it. */
}

static void
abandon_task(RunObject *self, PyObject *task, bool cancel)
{
    PyObject *result = cancel ? PyObject_CallMethodNoArgs(task, run_state(self)->str_cancel) : Py_NewRef(Py_None);
    if (result == NULL) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    Py_XDECREF(result);
}

/* There is no waiting for the ticks (close(), or no memory): they are asked to end, as far as there is a loop for them.
 * This may run at the very end, when the types of the module are gone. */
static void
run_abandon(RunObject *self)
{
    Py_CLEAR(self->error);
    self->stage = TIMER_JOINING;
    bool cancel = false;
    if (run_is_live(self) && self->loop->loop != NULL) {
        PyObject *loop = Py_NewRef(self->loop->loop);
        PyObject *closed = PyObject_CallMethodNoArgs(loop, run_state(self)->str_is_closed);
        if (closed == NULL) {
            PyErr_WriteUnraisable((PyObject *)self);
        }
        cancel = closed == Py_False;
        Py_XDECREF(closed);
        Py_DECREF(loop);
    }
    PyObject *fresh = self->fresh;
    if (fresh != NULL) {
        self->fresh = NULL;
        abandon_task(self, fresh, cancel);
        Py_DECREF(fresh);
    }
    aiot_link *link;
    while ((link = aiot_link_first(&self->ticks)) != NULL) {
        TickObject *tick = AIOT_CONTAINER_OF(link, TickObject, link);
        PyObject *task = Py_NewRef(tick->task);
        tick_forget(tick);
        abandon_task(self, task, cancel);
        Py_DECREF(task);
    }
    run_release(self);
}

/* Yields a waiter to the task. */
static PySendResult
run_suspend(RunObject *self, PyObject **result)
{
    self->waiter = aiot_waiter_new(self->loop, AIOT_PENDING);
    if (self->waiter == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        run_abandon(self);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

/* ENDING or JOINING, in the task's own step: goes on with the end. */
static PySendResult
run_conclude(RunObject *self, PyObject **result)
{
    if (self->stage == TIMER_ENDING) {
        self->stage = TIMER_JOINING;
        if (run_is_live(self) && run_cancel_ticks(self, false) < 0) {
            /* Without a way to ask them they are waited for all the same. */
            if (run_report_own(self, "A timer could not cancel its ticks") < 0) {
                return PYGEN_ERROR;
            }
        }
    }
    if (run_is_live(self)) {
        return run_suspend(self, result);
    }
    PyObject *error = self->error;
    self->error = NULL;
    run_release(self);
    if (error != NULL) {
        PyErr_SetRaisedException(error);
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static int
run_start(RunObject *self)
{
    double now;
    if (aiot_loop_deadline(self->loop, 0.0, &now) < 0) {
        return -1;
    }
    self->stage = TIMER_TICKING;
    self->base = now + self->first;
    if (self->triggers > 0 && aiot_turn_ask(self->loop, &self->turn) < 0) {
        return -1;
    }
    if (self->paused || self->first > 0 || self->jitter != NULL) {
        return run_plan(self, 0);
    }
    /* The first tick belongs to this step; setting the alarm for now would only cost a handle. */
    self->planned = now;
    return self->interval > 0 ? run_tick_due(self, now) : run_spin(self, now);
}

static PySendResult
Run_start(aiot_awaitable *op, PyObject **result)
{
    RunObject *self = (RunObject *)op;
    PyObject *task = aiot_loop_current_task(self->loop, "create_timer()");
    if (task == NULL) {
        return PYGEN_ERROR;
    }
    if (!Py_IS_TYPE(task, run_state(self)->TimerType)) {
        Py_DECREF(task);
        PyErr_SetString(PyExc_RuntimeError, "the coroutine of a timer runs in the timer only");
        return PYGEN_ERROR;
    }
    self->task = task;
    self->entered = true;
    run_follow_clock(self);
    int failed = run_start(self);
    self->entered = false;
    if (failed < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        failed = run_end(self, exc);
        Py_DECREF(exc);
        if (failed < 0) {
            PyErr_WriteUnraisable((PyObject *)op);
        }
    }
    return self->stage >= TIMER_ENDING ? run_conclude(self, result) : run_suspend(self, result);
}

static PySendResult
Run_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    RunObject *self = (RunObject *)op;
    if (self->waiter != NULL && aiot_waiter_check_resumed(self->waiter) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        run_end(self, exc);
        Py_DECREF(exc);
        PyErr_Clear();
    }
    Py_CLEAR(self->waiter);
    return self->stage >= TIMER_ENDING ? run_conclude(self, result) : run_suspend(self, result);
}

static PySendResult
Run_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    RunObject *self = (RunObject *)op;
    Py_CLEAR(self->waiter);
    if (PyErr_GivenExceptionMatches(exc, PyExc_GeneratorExit)) {
        run_abandon(self);
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    PyObject *before = self->error;
    self->error = Py_NewRef(exc);
    if (before != NULL && before != exc && self->stage != TIMER_OVER) {
        /* It was to end with another one, which the awaiter will not see. */
        if (!PyErr_GivenExceptionMatches(before, run_state(self)->CancelledError)) {
            PyErr_SetRaisedException(Py_NewRef(before));
            if (run_report_own(self, "A timer was cancelled while it failed") < 0) {
                PyErr_WriteUnraisable((PyObject *)op);
            }
        }
        PyObject *context = PyException_GetContext(exc);
        if (context == NULL) {
            PyException_SetContext(exc, before);
            before = NULL;
        }
        Py_XDECREF(context);
    }
    Py_XDECREF(before);
    self->stage = TIMER_ENDING;
    self->changes++;
    aiot_alarm_cancel(self->loop, &self->alarm);
    return run_conclude(self, result);
}

static const aiot_awaitable_ops run_ops = {
    .name = "create_timer",
    .start = Run_start,
    .resume = Run_resume,
    .throw = Run_throw,
};

static int
Run_traverse(PyObject *op, visitproc visit, void *arg)
{
    RunObject *self = (RunObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->loop);
    Py_VISIT(self->task);
    Py_VISIT(self->waiter);
    Py_VISIT(self->cb);
    Py_VISIT(self->interval_obj);
    Py_VISIT(self->context);
    Py_VISIT(self->jitter);
    Py_VISIT(self->handler);
    Py_VISIT(self->task_kwargs);
    Py_VISIT(self->error);
    Py_VISIT(self->last_error);
    Py_VISIT(self->fresh);
    if (self->ticks.next != NULL) {
        for (aiot_link *link = self->ticks.next; link != &self->ticks; link = link->next) {
            Py_VISIT(AIOT_CONTAINER_OF(link, TickObject, link));
        }
    }
    return 0;
}

static int
Run_clear(PyObject *op)
{
    RunObject *self = (RunObject *)op;
    Py_CLEAR(self->task);
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->cb);
    Py_CLEAR(self->interval_obj);
    Py_CLEAR(self->context);
    Py_CLEAR(self->jitter);
    Py_CLEAR(self->handler);
    Py_CLEAR(self->task_kwargs);
    Py_CLEAR(self->error);
    Py_CLEAR(self->last_error);
    Py_CLEAR(self->fresh);
    aiot_link *link;
    while (self->ticks.next != NULL && (link = aiot_link_first(&self->ticks)) != NULL) {
        tick_forget(AIOT_CONTAINER_OF(link, TickObject, link));
    }
    return 0;
}

static void
Run_dealloc(PyObject *op)
{
    RunObject *self = (RunObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    assert(!aiot_alarm_is_set(&self->alarm) && !self->turn.queued);
    Run_clear(op);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Run_slots[] = {
    {Py_tp_doc, "The coroutine of a Timer."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Run_traverse},
    {Py_tp_clear, Run_clear},
    {Py_tp_dealloc, Run_dealloc},
    {0, NULL},
};

static PyType_Spec Run_spec = {
    .name = "aiotools._aiotools.TimerRun",
    .basicsize = sizeof(RunObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Run_slots,
};

static int
Tick_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((TickObject *)op)->run);
    Py_VISIT(((TickObject *)op)->task);
    return 0;
}

static int
Tick_clear(PyObject *op)
{
    tick_forget((TickObject *)op);
    Py_CLEAR(((TickObject *)op)->task);
    return 0;
}

static void
Tick_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(((TickObject *)op)->run == NULL && !aiot_alarm_is_set(&((TickObject *)op)->alarm));
    Py_CLEAR(((TickObject *)op)->task);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Tick_slots[] = {
    {Py_tp_doc, "What notices the end of a tick."},
    {Py_tp_call, Tick_call},
    {Py_tp_repr, Tick_repr},
    {Py_tp_traverse, Tick_traverse},
    {Py_tp_clear, Tick_clear},
    {Py_tp_dealloc, Tick_dealloc},
    {0, NULL},
};

static PyType_Spec Tick_spec = {
    .name = "aiotools._aiotools.TimerTick",
    .basicsize = sizeof(TickObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Tick_slots,
};

/* ---- methods of Timer ------------------------------------------------------------------------------------------ */

/* New reference, or NULL with an exception. */
static RunObject *
timer_get_run(PyObject *op)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    PyObject *coro = PyObject_CallMethodNoArgs(op, state->str_get_coro);
    if (coro != NULL && !Py_IS_TYPE(coro, state->TimerRunType)) {
        PyErr_SetString(PyExc_RuntimeError, "the timer was given another coroutine");
        Py_CLEAR(coro);
    }
    return (RunObject *)coro;
}

/* loop.name() is true: 1; 0; -1. */
static int
ask_loop(PyObject *loop, PyObject *name)
{
    PyObject *answer = PyObject_CallMethodNoArgs(loop, name);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return yes;
}

/* Changing a timer on a closed loop would have no effect; in debug mode only the thread of the running loop may change it. */
static int
run_check_loop(RunObject *self)
{
    PyObject *loop = aiot_loop_object(self->loop);
    if (loop == NULL) {
        return -1;
    }
    int wrong = ask_loop(loop, run_state(self)->str_is_closed);
    if (wrong != 0) {
        if (wrong > 0) {
            PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        }
        Py_DECREF(loop);
        return -1;
    }
    wrong = aiot_loop_is_debug(self->loop);
    if (wrong > 0) {
        PyObject *running = PyObject_CallNoArgs(run_state(self)->get_running_loop);
        if (running == NULL) {
            PyErr_Clear();
        }
        wrong = running != loop;
        Py_XDECREF(running);
    }
    if (wrong > 0) {
        wrong = ask_loop(loop, run_state(self)->str_is_running);
        if (wrong > 0) {
            PyErr_SetString(PyExc_RuntimeError, "Non-thread-safe operation invoked on an event loop other than the current one");
        }
    }
    Py_DECREF(loop);
    return wrong == 0 ? 0 : -1;
}

/* Ticking, about to, or waiting for the last tick, which may well ask for something; else RuntimeError. */
static int
run_check_usable(RunObject *self)
{
    if (self->phase == AIOT_FINISHED
        || (self->stage != TIMER_NEW && self->stage != TIMER_LAST && !run_may_tick(self)))
    {
        PyErr_SetString(PyExc_RuntimeError, "the timer has ended");
        return -1;
    }
    return run_check_loop(self);
}

typedef int (*run_function)(RunObject *self, PyObject *arg);

/* run_plan() for methods: somebody else is the current task, so jitter is called as if by them. */
static int
run_plan_from_outside(RunObject *self, double k)
{
    bool entered = self->entered;
    self->entered = true;
    int failed = run_plan(self, k);
    self->entered = entered;
    return failed;
}

/* Runs a method under the lock. */
static PyObject *
timer_apply(PyObject *op, run_function function, PyObject *arg)
{
    RunObject *run = timer_get_run(op);
    if (run == NULL) {
        return NULL;
    }
    int failed;
    Py_BEGIN_CRITICAL_SECTION(run);
    run_follow_clock(run);
    failed = run_check_usable(run);
    if (!failed) {
        failed = function(run, arg);
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    if (failed < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* The interval of this timer: does it go with the other options? */
static int
run_check_interval(RunObject *self, double interval)
{
    const char *name = self->jitter != NULL                     ? "jitter"
                       : self->has_missed                       ? "missed (or grace)"
                       : self->on_error == ON_ERROR_BACKOFF     ? "on_error='backoff'"
                                                                : NULL;
    if (interval <= 0 && name != NULL) {
        PyErr_Format(PyExc_ValueError, "%s needs an interval greater than zero", name);
        return -1;
    }
    if (self->jitter_scale > 0 && self->jitter_scale >= interval) {
        PyErr_SetString(PyExc_ValueError, "jitter must be shorter than the interval");
        return -1;
    }
    if (self->on_error == ON_ERROR_BACKOFF && self->backoff_cap < interval) {
        PyErr_SetString(PyExc_ValueError, "backoff_cap must not be shorter than the interval");
        return -1;
    }
    return 0;
}

static int
parse_interval(PyObject *obj, double *interval)
{
    if (aiot_as_seconds(obj, "interval", interval) < 0) {
        return -1;
    }
    if (isinf(*interval)) {
        PyErr_SetString(PyExc_ValueError, "interval must be finite");
        return -1;
    }
    if (*interval < shortest_interval) {
        *interval = 0.0;
    }
    return 0;
}

static int
run_reschedule(RunObject *self, PyObject *arg)
{
    double interval, now;
    if (parse_interval(arg, &interval) < 0 || run_check_interval(self, interval) < 0
        || aiot_loop_deadline(self->loop, interval, &now) < 0)
    {
        return -1;
    }
    self->interval = interval;
    Py_XSETREF(self->interval_obj, Py_NewRef(arg));
    if (self->stage == TIMER_NEW) {
        self->first = interval;
        self->base = now;
        return 0;
    }
    self->base = now;
    self->last_k = -1;
    self->fails = 0;
    if (self->stage == TIMER_LAST) {
        return 0;
    }
    if (interval > 0) {
        return run_plan_from_outside(self, 0);
    }
    self->changes++;
    self->planned = every_turn;
    if (run_park(self) < 0) {
        return -1;
    }
    return self->paused ? 0 : aiot_turn_ask(self->loop, &self->turn);
}

PyDoc_STRVAR(reschedule_doc,
"reschedule($self, interval, /)\n--\n\n"
"Tick every interval seconds from now on; the next tick is due one interval from now.\n\n"
"That is the new phase: whatever was due before is not. A paused timer stays\n"
"paused. The callback gets the new interval. Raises TypeError or ValueError for\n"
"what create_timer() would not take, RuntimeError when the timer has ended.\n\n"
"Works like Reset() of a Ticker in Go.");

static PyObject *
Timer_reschedule(PyObject *op, PyObject *interval)
{
    return timer_apply(op, run_reschedule, interval);
}

static int
run_pause(RunObject *self, PyObject *Py_UNUSED(arg))
{
    self->paused = true;
    self->changes++;
    if (self->queued) {
        self->queued = false;
        self->skipped++;
    }
    return run_park(self);
}

PyDoc_STRVAR(pause_doc,
"pause($self, /)\n--\n\n"
"Start no tick until resume(), save those that trigger() asks for.\n\n"
"Ticks that are running go on. Pausing twice is pausing once. Raises\n"
"RuntimeError when the timer has ended.");

static PyObject *
Timer_pause(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return timer_apply(op, run_pause, NULL);
}

static int
run_unpause(RunObject *self, PyObject *Py_UNUSED(arg))
{
    if (!self->paused) {
        return 0;
    }
    self->paused = false;
    self->changes++;
    if (self->stage != TIMER_TICKING) {
        return 0;
    }
    double now;
    if (aiot_loop_deadline(self->loop, 0.0, &now) < 0) {
        return -1;
    }
    if (self->interval > 0) {
        return run_plan_from_outside(self, self->planned >= now ? self->k : run_first_k_at(self, self->k, now));
    }
    return self->planned > now ? run_arm(self) : aiot_turn_ask(self->loop, &self->turn);
}

PyDoc_STRVAR(resume_doc,
"resume($self, /)\n--\n\n"
"Go on after pause(), in the old phase.\n\n"
"What was due meanwhile is neither run nor counted as skipped. Does nothing when\n"
"the timer is not paused. Raises RuntimeError when it has ended.");

static PyObject *
Timer_resume(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return timer_apply(op, run_unpause, NULL);
}

static int
run_trigger(RunObject *self, PyObject *Py_UNUSED(arg))
{
    if (self->stage == TIMER_LAST) {
        return 0;
    }
    self->triggers++;
    if (self->stage == TIMER_NEW || aiot_turn_ask(self->loop, &self->turn) == 0) {
        return 0;
    }
    self->triggers--;
    return -1;
}

PyDoc_STRVAR(trigger_doc,
"trigger($self, /)\n--\n\n"
"Have one more tick started in the next iteration of the loop, out of the schedule.\n\n"
"The schedule is not changed by it; overlap and limit apply to it as to all\n"
"ticks; a paused timer can be triggered too. Each call asks for one tick; once\n"
"the last one of limit has started, it does nothing. Raises RuntimeError when\n"
"the timer has ended.");

static PyObject *
Timer_trigger(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return timer_apply(op, run_trigger, NULL);
}

static PyStructSequence_Field Stats_fields[] = {
    {"ticks", "ticks that were started"},
    {"running", "ticks that are running now"},
    {"skipped", "ticks that were due and not run: missed, or left out because of overlap or after errors"},
    {"errors", "ticks that failed"},
    {"last_error", "the exception of the last tick that failed, or None"},
    {"late_max", "the longest time, in seconds, that a tick started after it was due"},
    {"late_mean", "the mean of these times"},
    {NULL, NULL},
};

static PyStructSequence_Desc Stats_desc = {
    .name = "aiotools.timer.TimerStats",
    .doc = "TimerStats(sequence, /)\n--\n\nWhat Timer.stats() returns: a named tuple of counts and times, taken at the call.",
    .fields = Stats_fields,
    .n_in_sequence = 7,
};

PyDoc_STRVAR(stats_doc,
"stats($self, /)\n--\n\n"
"How the timer does: a TimerStats, a tuple with named fields.\n\n"
"ticks, running, skipped and errors are counts, late_max and late_mean are in\n"
"seconds, last_error is an exception or None. Also when the timer has ended.");

static PyObject *
Timer_stats(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    RunObject *run = timer_get_run(op);
    if (run == NULL) {
        return NULL;
    }
    PyObject *values[7] = {NULL};
    PyObject *stats = PyStructSequence_New(state->TimerStatsType);
    Py_BEGIN_CRITICAL_SECTION(run);
    values[0] = PyLong_FromUnsignedLongLong(run->started);
    values[1] = PyLong_FromSize_t(run->n_ticks + (run->fresh != NULL));
    values[2] = PyLong_FromUnsignedLongLong(run->skipped);
    values[3] = PyLong_FromUnsignedLongLong(run->errors);
    values[4] = Py_NewRef(run->last_error != NULL ? run->last_error : Py_None);
    values[5] = PyFloat_FromDouble(run->late_max);
    values[6] = PyFloat_FromDouble(run->started > 0 ? run->late_sum / (double)run->started : 0.0);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    bool complete = stats != NULL;
    for (int i = 0; i < 7; i++) {
        complete = complete && values[i] != NULL;
    }
    if (!complete) {
        for (int i = 0; i < 7; i++) {
            Py_XDECREF(values[i]);
        }
        Py_XDECREF(stats);
        return NULL;
    }
    for (int i = 0; i < 7; i++) {
        PyStructSequence_SetItem(stats, i, values[i]);
    }
    return stats;
}

static PyMethodDef Timer_methods[] = {
    {"reschedule", Timer_reschedule, METH_O, reschedule_doc},
    {"pause", Timer_pause, METH_NOARGS, pause_doc},
    {"resume", Timer_resume, METH_NOARGS, resume_doc},
    {"trigger", Timer_trigger, METH_NOARGS, trigger_doc},
    {"stats", Timer_stats, METH_NOARGS, stats_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *
Timer_get_next_due(PyObject *op, void *Py_UNUSED(closure))
{
    RunObject *run = timer_get_run(op);
    if (run == NULL) {
        return NULL;
    }
    double due = INFINITY;
    int failed = 0;
    Py_BEGIN_CRITICAL_SECTION(run);
    run_follow_clock(run);
    if (run->phase != AIOT_FINISHED && !run->paused && (run->stage == TIMER_NEW || run_may_tick(run))) {
        due = run->stage == TIMER_NEW ? run->base : run->planned;
        if (due == every_turn) {
            failed = aiot_loop_time(run->loop, &due);
        }
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    if (failed) {
        return NULL;
    }
    return isinf(due) ? Py_NewRef(Py_None) : PyFloat_FromDouble(due);
}

static PyGetSetDef Timer_getset[] = {
    {"next_due", Timer_get_next_due, NULL,
     "When the next tick is due, jitter included, in loop.time() seconds; None while paused and when there is none.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(Timer_doc,
"Timer()\n--\n\n"
"What create_timer() returns: an asyncio.Task that starts other tasks at fixed times.\n\n"
"All that is done with a task works: cancel it to stop it, await it, name it. It\n"
"can't be made directly. The methods belong to the thread of its loop.");

static PyType_Slot Timer_slots[] = {
    {Py_tp_doc, (void *)Timer_doc},
    {Py_tp_methods, Timer_methods},
    {Py_tp_getset, Timer_getset},
    {0, NULL},
};

static PyType_Spec Timer_spec = {
    .name = "aiotools.Timer",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Timer_slots,
};

/* ---- create_timer ---------------------------------------------------------------------------------------------- */

enum {
    ARG_CB,
    ARG_INTERVAL,
    ARG_FIRST,
    ARG_JITTER,
    ARG_LIMIT,
    ARG_OVERLAP,
    ARG_MISSED,
    ARG_GRACE,
    ARG_TICK_TIMEOUT,
    ARG_EAGER,
    ARG_ON_ERROR,
    ARG_BACKOFF_CAP,
    ARG_NAME,
    ARG_CONTEXT,
    N_ARGS,
};

/* None: *out stays as it is. 1 when it was given, 0, -1. */
static int
parse_seconds(PyObject *obj, const char *name, bool zero, bool infinite, double *out)
{
    if (obj == Py_None) {
        return 0;
    }
    double value;
    if (aiot_as_seconds(obj, name, &value) < 0) {
        return -1;
    }
    if (value < 0 || (value == 0 && !zero)) {
        PyErr_Format(PyExc_ValueError, "%s must %s", name, zero ? "not be negative" : "be greater than zero");
        return -1;
    }
    if (isinf(value) && !infinite) {
        PyErr_Format(PyExc_ValueError, "%s must be finite", name);
        return -1;
    }
    *out = value;
    return 1;
}

/* A count of at least one. */
static int
parse_count(PyObject *obj, const char *name, const char *expected, uint64_t *out)
{
    if (!PyIndex_Check(obj) || PyBool_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "%s must be %s, not %.200s", name, expected, Py_TYPE(obj)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(obj);
    if (number == NULL) {
        return -1;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow > 0) {
        value = INT64_MAX;
    }
    if (overflow < 0 || value < 1) {
        PyErr_Format(PyExc_ValueError, "%s must be at least 1, not %R", name, obj);
        return -1;
    }
    *out = (uint64_t)value;
    return 0;
}

/* The place of a string in a list that ends with NULL; -1 with ValueError or TypeError. */
static int
parse_choice(PyObject *obj, const char *name, const char *const *choices, const char *expected)
{
    if (!PyUnicode_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "%s must be %s, not %.200s", name, expected, Py_TYPE(obj)->tp_name);
        return -1;
    }
    for (int i = 0; choices[i] != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(obj, choices[i]) == 0) {
            return i;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s must be %s, not %R", name, expected, obj);
    return -1;
}

static int
parse_overlap(RunObject *self, PyObject *obj)
{
    static const char *const choices[] = {"allow", "skip", "cancel", "queue", NULL};
    static const char expected[] = "'allow', 'skip', 'cancel', 'queue' or a number of ticks";
    self->overlap = OVERLAP_AT_MOST;
    self->most = UINT64_MAX;
    if (obj == Py_None) {
        return 0;
    }
    if (PyIndex_Check(obj)) {
        return parse_count(obj, "overlap", expected, &self->most);
    }
    switch (parse_choice(obj, "overlap", choices, expected)) {
    case 0:
        return 0;
    case 1:
        self->most = 1;
        return 0;
    case 2:
        self->overlap = OVERLAP_CANCEL;
        return 0;
    case 3:
        self->overlap = OVERLAP_QUEUE;
        return 0;
    default:
        return -1;
    }
}

static int
parse_missed(RunObject *self, PyObject *missed, PyObject *grace)
{
    static const char *const choices[] = {"late", "skip", "catch-up", NULL};
    int choice = 0;
    if (missed != Py_None) {
        choice = parse_choice(missed, "missed", choices, "'late', 'skip' or 'catch-up'");
        if (choice < 0) {
            return -1;
        }
    }
    self->catch_up = choice == 2;
    if (self->catch_up && (self->overlap == OVERLAP_CANCEL || self->most == 1)) {
        PyErr_SetString(PyExc_ValueError, "missed='catch-up' needs an overlap that lets more than one tick run");
        return -1;
    }
    self->grace = choice == 1 ? self->interval / 2 : INFINITY;
    self->has_missed = missed != Py_None || grace != Py_None;
    return parse_seconds(grace, "grace", true, true, &self->grace) < 0 ? -1 : 0;
}

static int
parse_jitter(RunObject *self, PyObject *obj)
{
    if (obj == Py_None) {
        return 0;
    }
    if (PyCallable_Check(obj)) {
        self->jitter = Py_NewRef(obj);
        return 0;
    }
    if (!PyFloat_Check(obj) && !PyIndex_Check(obj) && !PyObject_HasAttrString(obj, "__float__")) {
        PyErr_Format(PyExc_TypeError, "jitter must be a number of seconds or a callable, not '%.200s'", Py_TYPE(obj)->tp_name);
        return -1;
    }
    if (parse_seconds(obj, "jitter", true, false, &self->jitter_scale) < 0) {
        return -1;
    }
    if (self->jitter_scale > 0) {
        PyObject *random = PyImport_ImportModule("random");
        self->jitter = random == NULL ? NULL : PyObject_GetAttrString(random, "random");
        Py_XDECREF(random);
        return self->jitter == NULL ? -1 : 0;
    }
    return 0;
}

static int
parse_on_error(RunObject *self, PyObject *obj, PyObject *cap)
{
    static const char *const choices[] = {"report", "stop", "backoff", NULL};
    if (PyCallable_Check(obj)) {
        self->on_error = ON_ERROR_CALL;
        self->handler = Py_NewRef(obj);
    }
    else {
        int choice = parse_choice(obj, "on_error", choices, "'report', 'stop', 'backoff' or a callable");
        if (choice < 0) {
            return -1;
        }
        self->on_error = (uint8_t)choice;
    }
    self->backoff_cap = self->interval > 60.0 ? self->interval : 60.0;
    int given = parse_seconds(cap, "backoff_cap", false, true, &self->backoff_cap);
    if (given > 0 && self->on_error != ON_ERROR_BACKOFF) {
        PyErr_SetString(PyExc_ValueError, "backoff_cap needs on_error='backoff'");
        return -1;
    }
    return given < 0 ? -1 : 0;
}

static int
run_parse(RunObject *self, PyObject *const *args)
{
    if (!PyCallable_Check(args[ARG_CB])) {
        PyErr_Format(PyExc_TypeError, "cb must be callable, not '%.200s'", Py_TYPE(args[ARG_CB])->tp_name);
        return -1;
    }
    self->cb = Py_NewRef(args[ARG_CB]);
    self->interval_obj = Py_NewRef(args[ARG_INTERVAL]);
    self->tick_timeout = INFINITY;
    if (parse_interval(args[ARG_INTERVAL], &self->interval) < 0
        || parse_seconds(args[ARG_FIRST], "first", true, false, &self->first) < 0
        || parse_jitter(self, args[ARG_JITTER]) < 0
        || (args[ARG_LIMIT] != Py_None
            && parse_count(args[ARG_LIMIT], "limit", "a number of ticks", &self->limit) < 0)
        || parse_overlap(self, args[ARG_OVERLAP]) < 0
        || parse_missed(self, args[ARG_MISSED], args[ARG_GRACE]) < 0
        || parse_seconds(args[ARG_TICK_TIMEOUT], "tick_timeout", false, true, &self->tick_timeout) < 0
        || parse_on_error(self, args[ARG_ON_ERROR], args[ARG_BACKOFF_CAP]) < 0
        || run_check_interval(self, self->interval) < 0)
    {
        return -1;
    }
    int eager = PyObject_IsTrue(args[ARG_EAGER]);
    if (eager < 0) {
        return -1;
    }
    self->eager = eager ? EAGER_BY_LOOP : EAGER_NO;
    if (args[ARG_NAME] != Py_None && !PyUnicode_Check(args[ARG_NAME])) {
        PyErr_Format(PyExc_TypeError, "name must be a string, not '%.200s'", Py_TYPE(args[ARG_NAME])->tp_name);
        return -1;
    }
    if (args[ARG_CONTEXT] != Py_None && !PyContext_CheckExact(args[ARG_CONTEXT])) {
        PyErr_Format(PyExc_TypeError, "context must be a contextvars.Context, not '%.200s'",
                     Py_TYPE(args[ARG_CONTEXT])->tp_name);
        return -1;
    }
    return 0;
}

static RunObject *
run_new(aiot_state *state, PyObject *const *args)
{
    RunObject *self = (RunObject *)state->TimerRunType->tp_alloc(state->TimerRunType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, &run_ops);
    /* Until the task has it, dropping it is nobody's mistake. */
    self->phase = AIOT_FINISHED;
    aiot_alarm_init(&self->alarm, (PyObject *)self, Run_fire);
    aiot_turn_init(&self->turn, (PyObject *)self, Run_turn);
    aiot_link_init(&self->ticks);
    self->last_k = -1;
    if (run_parse(self, args) < 0) {
        goto error;
    }
    if ((self->loop = aiot_loop_get_running(state)) == NULL) {
        goto error;
    }
    self->shift = self->loop->clock_shift;
    if (aiot_loop_deadline(self->loop, self->first, &self->base) < 0) {
        goto error;
    }
    self->context = args[ARG_CONTEXT] == Py_None ? PyContext_CopyCurrent() : Py_NewRef(args[ARG_CONTEXT]);
    if (self->context == NULL) {
        goto error;
    }
    return self;
error:
    Py_DECREF(self);
    return NULL;
}

/* Timer(coro, loop=..., name=..., context=...), which only we may do. */
static PyObject *
timer_new(aiot_state *state, RunObject *run, PyObject *name)
{
    PyTypeObject *base = (PyTypeObject *)state->asyncio_Task;
    PyObject *timer = NULL;
    PyObject *args = PyTuple_Pack(1, run);
    PyObject *kwargs = PyDict_New();
    PyObject *loop = aiot_loop_object(run->loop);
    if (args == NULL || kwargs == NULL || loop == NULL || PyDict_SetItem(kwargs, state->str_loop, loop) < 0
        || PyDict_SetItem(kwargs, state->str_name, name) < 0
        || PyDict_SetItem(kwargs, state->str_context, run->context) < 0)
    {
        goto done;
    }
    timer = base->tp_new(state->TimerType, args, kwargs);
    if (timer == NULL) {
        goto done;
    }
    run->phase = AIOT_CREATED;
    if (base->tp_init(timer, args, kwargs) < 0) {
        run->phase = AIOT_FINISHED;
        Py_CLEAR(timer);
    }
done:
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(loop);
    return timer;
}

PyDoc_STRVAR(create_timer_doc,
"_create_timer($module, cb, interval, first, jitter, limit, overlap, missed, grace,\n"
"              tick_timeout, eager, on_error, backoff_cap, name, context, /)\n--\n\n"
"aiotools.timer.create_timer() without the defaults.");

static PyObject *
aiot_create_timer(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    aiot_state *state = aiot_state_of_module(module);
    if (nargs != N_ARGS) {
        PyErr_Format(PyExc_TypeError, "_create_timer() takes exactly %d arguments (%zd given)", (int)N_ARGS, nargs);
        return NULL;
    }
    RunObject *run = run_new(state, args);
    if (run == NULL) {
        return NULL;
    }
    PyObject *timer = timer_new(state, run, args[ARG_NAME]);
    Py_DECREF(run);
    return timer;
}

static PyMethodDef timer_functions[] = {
    {"_create_timer", (PyCFunction)(void (*)(void))aiot_create_timer, METH_FASTCALL, create_timer_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_timer_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->TimerType, &Timer_spec, state->asyncio_Task, true) < 0
        || aiot_add_type(module, &state->TimerRunType, &Run_spec, NULL, false) < 0
        || aiot_add_type(module, &state->TimerTickType, &Tick_spec, NULL, false) < 0)
    {
        return -1;
    }
    if ((state->TimerStatsType = PyStructSequence_NewType(&Stats_desc)) == NULL
        || PyModule_AddObjectRef(module, "TimerStats", (PyObject *)state->TimerStatsType) < 0)
    {
        return -1;
    }
    if ((state->kw_eager_start = PyTuple_Pack(1, state->str_eager_start)) == NULL) {
        return -1;
    }
    return PyModule_AddFunctions(module, timer_functions);
}
