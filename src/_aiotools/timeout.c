/* timeout.c: timeout, timeout_at and Timeout: asyncio's, understanding exception groups.
 *
 * States:     CREATED -> ACTIVE -> FINISHED, or ACTIVE -> EXPIRING -> EXPIRED. Entering and leaving are steps of the
 *             awaitables that __aenter__ and __aexit__ return; nothing happens before these are awaited.
 * Invariants: the alarm is set only while ACTIVE; task is owned from entry to exit. What was requested of the task
 *             before entry, and was delivered, is `before`: only a request above it makes the expiry not ours alone.
 * Due at once: a deadline that is past already gets a call_soon of its own, since an alarm would run after what is
 *             ready, as all timers do, and let a body end that awaits something short.
 * Locking:    fields belong to the critical section of the object.
 * Re-entry:   Task methods may be anybody's; the state is settled before each of them is called, and looked at again
 *             after it.
 */

#include "timeout.h"

#include "args.h"
#include "awaitable.h"
#include "freelist.h"
#include "loopstate.h"
#include "shield.h"

#include <math.h>
#include <string.h>

typedef enum {
    CREATED,
    ACTIVE,
    EXPIRING,
    EXPIRED,
    FINISHED,
} timeout_status;

enum { NO_STEP, ENTER, EXIT };

static const char *const status_names[] = {"created", "active", "expiring", "expired", "finished"};

typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    AiotLoop *loop;             /* the one of timeout(), then the one that it was entered in */
    PyObject *task;             /* while ACTIVE or EXPIRING */
    AiotShield *shield;         /* the innermost shield at entry: the expiry passes it, but none opened inside */
    double when;                /* meaningful if has_when */
    double shift;               /* the clock_shift of the loop that when goes by, while there is a loop */
    aiot_alarm alarm;
    Py_ssize_t before;          /* Task.cancelling() at entry, without a request that was still to be delivered */
    uint32_t soon;              /* call_soons under way; the last one counts */
    uint8_t status;
    bool has_when;
    bool due;                   /* that last call_soon is wanted */
    bool is_ahead;              /* when comes from the monotonic clock and lies ahead of its reading then */
    bool by_message;            /* the task can't say whether a request is pending: go by the message */
    uint8_t step;               /* what `async with` is about to await: NO_STEP, ENTER or EXIT */
    PyObject *exc;              /* what the body raised, for EXIT */
    vectorcallfunc call;
} TimeoutObject;

/* What __aenter__() and __aexit__() return when they are called by hand. `async with` gets by without: see below. */
typedef struct {
    AIOT_AWAITABLE_HEAD
    TimeoutObject *timeout;
    PyObject *exc;              /* what the body raised, for __aexit__ */
} StepObject;

/* ---- making and freeing ------------------------------------------------------------------------------------- */

static int Timeout_fire(AiotLoop *loop, PyObject *owner);
static PyObject *Timeout_call(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames);

/* when NaN: none. */
static TimeoutObject *
timeout_new(aiot_state *state, AiotLoop *loop, double when)
{
    TimeoutObject *self = (TimeoutObject *)aiot_free_list_alloc(&state->free_timeouts, state->TimeoutType);
    if (self == NULL) {
        return NULL;
    }
    aiot_alarm_init(&self->alarm, (PyObject *)self, Timeout_fire);
    self->call = Timeout_call;
    self->loop = (AiotLoop *)Py_XNewRef((PyObject *)loop);
    self->has_when = !isnan(when);
    self->when = when;
    self->shift = loop == NULL ? 0.0 : loop->clock_shift;
    return self;
}

/* Another clock was put into the loop: the remaining delay is kept. */
static inline void
follow_clock(TimeoutObject *self)
{
    if (self->loop != NULL && AIOT_UNLIKELY(self->shift != self->loop->clock_shift)) {
        self->when += self->loop->clock_shift - self->shift;
        self->shift = self->loop->clock_shift;
        self->is_ahead = false;
    }
}

/* ---- expiry ------------------------------------------------------------------------------------------------- */

static int
expire(TimeoutObject *self)
{
    if (self->status != ACTIVE || self->task == NULL) {
        return 0;
    }
    /* Settled before the call, as an exit from inside of it must take the request back. */
    self->status = EXPIRING;
    AiotLoop *loop = self->loop;
    PyObject *task = Py_NewRef(self->task);
    AiotShield *shield = (AiotShield *)Py_XNewRef((PyObject *)self->shield);
    int answer = aiot_task_cancel_from(loop, task, shield, loop->state->timeout_message);
    Py_XDECREF((PyObject *)shield);
    Py_DECREF(task);
    if (answer < 0 && self->status == EXPIRING) {
        self->status = ACTIVE;
    }
    return answer < 0 ? -1 : 0;
}

static int
Timeout_fire(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(owner);
    failed = expire((TimeoutObject *)owner);
    Py_END_CRITICAL_SECTION();
    return failed;
}

static PyObject *
Timeout_fire_soon(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    TimeoutObject *self = (TimeoutObject *)op;
    int failed = 0;
    Py_BEGIN_CRITICAL_SECTION(op);
    self->soon--;
    if (self->soon == 0 && self->due) {
        self->due = false;
        failed = expire(self);
    }
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef fire_soon_def = {"aiotools_timeout", Timeout_fire_soon, METH_NOARGS,
                                    "Expire a timeout that is due."};

static int
fire_soon(TimeoutObject *self, AiotLoop *loop)
{
    if (loop->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        return -1;
    }
    PyObject *callback = PyCFunction_New(&fire_soon_def, (PyObject *)self);
    if (callback == NULL) {
        return -1;
    }
    int failed = aiot_loop_call_soon(loop, callback, NULL, NULL);
    Py_DECREF(callback);
    if (!failed) {
        self->soon++;
        self->due = true;
    }
    return failed;
}

/* Sets what will expire it, or moves it, to when. 0, or -1 with nothing changed. */
static int
arm(TimeoutObject *self, AiotLoop *loop, double when, bool is_ahead)
{
    if (!is_ahead) {
        double now;
        if (aiot_loop_time(loop, &now) < 0) {
            return -1;
        }
        if (when <= now) {
            if (fire_soon(self, loop) < 0) {
                return -1;
            }
            aiot_alarm_cancel(loop, &self->alarm);
            return 0;
        }
    }
    if (isinf(when)) {
        aiot_alarm_cancel(loop, &self->alarm);
    }
    else if (aiot_alarm_set(loop, &self->alarm, when) < 0) {
        return -1;
    }
    self->due = false;
    return 0;
}

/* ---- entering ----------------------------------------------------------------------------------------------- */

/* The task that enters, and its loop: both new references. */
static int
find_task(aiot_state *state, TimeoutObject *self, AiotLoop **loop, PyObject **task)
{
    if (self->loop != NULL && aiot_loop_ran_here(self->loop)) {
        /* Only a loop that runs has a current task: no need to ask which one does. */
        *task = PyObject_CallOneArg(state->current_task, self->loop->loop);
        if (*task == NULL) {
            return -1;
        }
        if (*task != Py_None) {
            *loop = (AiotLoop *)Py_NewRef((PyObject *)self->loop);
            return 0;
        }
        Py_DECREF(*task);
    }
    *loop = aiot_loop_get_running(state);
    if (*loop == NULL) {
        return -1;
    }
    *task = PyObject_CallOneArg(state->current_task, (*loop)->loop);
    if (*task != NULL && *task != Py_None) {
        return 0;
    }
    if (*task != NULL) {
        Py_DECREF(*task);
        PyErr_SetString(PyExc_RuntimeError, "Timeout should be used inside a task");
    }
    Py_DECREF(*loop);
    return -1;
}

/* The requests that were made of the task and delivered to it; not those that a shield around us keeps. */
static int
count_requests(aiot_state *state, AiotLoop *loop, PyObject *task, AiotShield *shield, Py_ssize_t *before,
               bool *by_message)
{
    if (shield != NULL) {
        *before = aiot_task_requests(loop, task);
    }
    else {
        /* The look-up is most of what the call costs, and the type of all common tasks cannot be changed. */
        PyObject *count = (PyObject *)Py_TYPE(task) == state->asyncio_Task
                              ? PyObject_CallOneArg(state->task_cancelling, task)
                              : PyObject_CallMethodNoArgs(task, state->str_cancelling);
        if (count == NULL) {
            return -1;
        }
        *before = PyLong_AsSsize_t(count);
        Py_DECREF(count);
    }
    if (*before == -1 && PyErr_Occurred()) {
        return -1;
    }
    *by_message = false;
    if (*before == 0) {
        return 0;
    }
    PyObject *flag;
    if (PyObject_GetOptionalAttr(task, state->str__must_cancel, &flag) < 0) {
        return -1;
    }
    if (flag == NULL) {
        *by_message = true;
        return 0;
    }
    int pending = PyObject_IsTrue(flag);
    Py_DECREF(flag);
    if (pending < 0) {
        return -1;
    }
    *before -= pending;
    return 0;
}

static int
enter_lock_held(aiot_state *state, TimeoutObject *self)
{
    if (self->status != CREATED) {
        PyErr_SetString(PyExc_RuntimeError, "Timeout has already been entered");
        return -1;
    }
    AiotLoop *loop;
    PyObject *task;
    if (find_task(state, self, &loop, &task) < 0) {
        return -1;
    }
    AiotShield *shield = aiot_task_shield(loop, task);
    int failed = count_requests(state, loop, task, shield, &self->before, &self->by_message);
    if (!failed && self->status != CREATED) {
        PyErr_SetString(PyExc_RuntimeError, "Timeout has already been entered");
        failed = -1;
    }
    if (!failed) {
        follow_clock(self);
        /* A deadline that this loop computed a moment ago need not be compared with the clock again. */
        bool is_ahead = self->is_ahead && loop == self->loop && aiot_clock_is_before(self->when);
        /* Active before arming: the loop's methods may run any code. */
        self->status = ACTIVE;
        self->task = task;
        self->shield = shield;
        Py_XSETREF(self->loop, loop);
        self->shift = loop->clock_shift;
        if (self->has_when && arm(self, loop, self->when, is_ahead) < 0) {
            self->status = CREATED;
            Py_CLEAR(self->task);
            Py_CLEAR(self->shield);
            return -1;
        }
        return 0;
    }
    Py_XDECREF((PyObject *)shield);
    Py_DECREF(task);
    Py_DECREF(loop);
    return failed;
}

/* ---- leaving ------------------------------------------------------------------------------------------------ */

/* TimeoutError from exc. Always returns -1. */
static int
raise_timeout(PyObject *exc)
{
    PyObject *error = PyObject_CallNoArgs(PyExc_TimeoutError);
    if (error != NULL) {
        PyException_SetCause(error, Py_NewRef(exc));
        PyErr_SetObject(PyExc_TimeoutError, error);
        Py_DECREF(error);
    }
    return -1;
}

/* The first cancellation in the chain of contexts of exc becomes the cause of a TimeoutError in its place, as asyncio
 * does it from 3.13 on. */
static int
insert_timeout(aiot_state *state, PyObject *exc)
{
    PyObject *at = Py_NewRef(exc);
    PyObject *slow = Py_NewRef(exc);    /* goes half as fast: a ring of contexts must not hang us */
    int failed = 0;
    for (unsigned steps = 1;; steps++) {
        PyObject *context = PyException_GetContext(at);
        if (context == NULL || context == slow) {
            Py_XDECREF(context);
            break;
        }
        if (PyErr_GivenExceptionMatches(context, state->CancelledError)) {
            PyObject *error = PyObject_CallNoArgs(PyExc_TimeoutError);
            if (error == NULL) {
                failed = -1;
            }
            else {
                PyException_SetContext(error, Py_NewRef(context));
                PyException_SetCause(error, Py_NewRef(context));
                PyException_SetContext(at, error);
            }
            Py_DECREF(context);
            break;
        }
        Py_SETREF(at, context);
        if (steps % 2 == 0) {
            PyObject *next = PyException_GetContext(slow);
            if (next != NULL) {
                Py_SETREF(slow, next);
            }
        }
    }
    Py_DECREF(at);
    Py_DECREF(slow);
    return failed;
}

static int
insert_timeouts(aiot_state *state, PyObject *exc, bool is_group)
{
    if (insert_timeout(state, exc) < 0) {
        return -1;
    }
    if (!is_group || !PyErr_GivenExceptionMatches(exc, PyExc_Exception)) {
        return 0;
    }
    PyObject *members = PyObject_GetAttr(exc, state->str_exceptions);
    if (members == NULL) {
        return -1;
    }
    int failed = 0;
    for (Py_ssize_t i = 0; !failed && PyTuple_Check(members) && i < PyTuple_GET_SIZE(members); i++) {
        failed = insert_timeout(state, PyTuple_GET_ITEM(members, i));
    }
    Py_DECREF(members);
    return failed;
}

/* Nothing but cancellations: TimeoutError from the group. Others as well: a group of TimeoutError and these. */
static int
convert_group(aiot_state *state, PyObject *exc)
{
    PyObject *parts = PyObject_CallMethodOneArg(exc, state->str_split, state->CancelledError);
    if (parts == NULL) {
        return -1;
    }
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) < 2) {
        PyErr_Format(PyExc_TypeError, "%.200s.split must return a 2-tuple, not %R", Py_TYPE(exc)->tp_name, parts);
        Py_DECREF(parts);
        return -1;
    }
    PyObject *cancellations = PyTuple_GET_ITEM(parts, 0);
    PyObject *rest = PyTuple_GET_ITEM(parts, 1);
    int failed;
    if (cancellations == Py_None) {
        failed = insert_timeouts(state, exc, true);
    }
    else if (rest == Py_None) {
        failed = raise_timeout(exc);
    }
    else {
        failed = -1;
        PyObject *error = PyObject_CallNoArgs(PyExc_TimeoutError);
        PyObject *group = error == NULL ? NULL
            : PyObject_CallFunction(PyExc_BaseExceptionGroup, "s[OO]",
                                    "timeout with collected inner exceptions", error, rest);
        Py_XDECREF(error);
        if (group != NULL) {
            PyErr_SetObject((PyObject *)Py_TYPE(group), group);
            Py_DECREF(group);
        }
    }
    Py_DECREF(parts);
    return failed;
}

/* Does this cancellation carry our request? */
static bool
has_our_message(aiot_state *state, PyObject *exc)
{
    PyObject *args = ((PyBaseExceptionObject *)exc)->args;
    return args != NULL && PyTuple_GET_SIZE(args) == 1 && PyTuple_GET_ITEM(args, 0) == state->timeout_message;
}

static int
convert(aiot_state *state, TimeoutObject *self, PyObject *exc)
{
    if (PyExceptionClass_Check(exc)) {
        /* By hand, with a type only. */
        if (PyErr_GivenExceptionMatches(exc, state->CancelledError)) {
            PyErr_SetNone(PyExc_TimeoutError);
            return -1;
        }
        return 0;
    }
    if (PyErr_GivenExceptionMatches(exc, state->CancelledError)) {
        if (self->by_message && !has_our_message(state, exc)) {
            return 0;
        }
        return raise_timeout(exc);
    }
    if (PyErr_GivenExceptionMatches(exc, PyExc_BaseExceptionGroup)) {
        return convert_group(state, exc);
    }
    return insert_timeouts(state, exc, false);
}

/* Somebody else's step leaves what this task's request has interrupted: the exception went elsewhere. */
static int
check_own_task(aiot_state *state, PyObject *task, PyObject *exc)
{
    if (exc != NULL && PyErr_GivenExceptionMatches(exc, PyExc_GeneratorExit)) {
        return 0;       /* collected, or closed by its loop */
    }
    PyObject *current = PyObject_CallNoArgs(state->current_task);
    if (current == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) {
            return -1;
        }
        PyErr_Clear();
    }
    Py_XDECREF(current);
    if (current == task) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, "Timeout has expired in another task than the one that leaves it");
    return -1;
}

/* It expired: takes its request back and makes of exc (NULL: none) what the caller sees. Steals task. */
static int
leave_expired(aiot_state *state, TimeoutObject *self, PyObject *task, PyObject *exc)
{
    int failed = -1;
    Py_ssize_t left = aiot_task_take_back(self->loop, task);
    if (left >= 0) {
        failed = check_own_task(state, task, exc);
        if (!failed && left <= self->before && exc != NULL) {
            failed = convert(state, self, exc);
        }
    }
    Py_DECREF(task);
    return failed;
}

static int
exit_lock_held(aiot_state *state, TimeoutObject *self, PyObject *exc)
{
    if (AIOT_UNLIKELY(self->status != ACTIVE && self->status != EXPIRING)) {
        PyErr_SetString(PyExc_RuntimeError, self->status == CREATED ? "Timeout has not been entered"
                                                                    : "Timeout has already been left");
        return -1;
    }
    PyObject *task = self->task;
    self->task = NULL;
    Py_CLEAR(self->shield);
    self->due = false;
    if (AIOT_LIKELY(self->status == ACTIVE)) {
        self->status = FINISHED;
        aiot_alarm_cancel(self->loop, &self->alarm);
        Py_XDECREF(task);
        return 0;
    }
    self->status = EXPIRED;
    return leave_expired(state, self, task, exc);
}

/* The exception among the arguments of __aexit__, borrowed: the type when that is all there is. NULL: none. */
static PyObject *
exception_of(PyObject *const *args)
{
    if (AIOT_LIKELY(args[0] == Py_None)) {
        return NULL;
    }
    if (PyExceptionInstance_Check(args[1])) {
        return args[1];
    }
    return PyExceptionClass_Check(args[0]) ? args[0] : NULL;
}

/* ---- steps by hand ------------------------------------------------------------------------------------------ */

static PySendResult
Enter_start(aiot_awaitable *op, PyObject **result)
{
    StepObject *step = (StepObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(step->timeout);
    failed = enter_lock_held(aiot_state_of_exact_type(Py_TYPE(step)), step->timeout);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return PYGEN_ERROR;
    }
    *result = Py_NewRef((PyObject *)step->timeout);
    return PYGEN_RETURN;
}

static PySendResult
Exit_start(aiot_awaitable *op, PyObject **result)
{
    StepObject *step = (StepObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(step->timeout);
    failed = exit_lock_held(aiot_state_of_exact_type(Py_TYPE(step)), step->timeout, step->exc);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static const aiot_awaitable_ops enter_ops = {
    .name = "Timeout.__aenter__",
    .start = Enter_start,
};

static const aiot_awaitable_ops exit_ops = {
    .name = "Timeout.__aexit__",
    .start = Exit_start,
};

static PyObject *
step_new(PyObject *timeout, const aiot_awaitable_ops *ops, PyObject *exc)
{
    PyTypeObject *type = aiot_state_of_exact_type(Py_TYPE(timeout))->TimeoutStepType;
    StepObject *self = (StepObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, ops);
    self->timeout = (TimeoutObject *)Py_NewRef(timeout);
    self->exc = Py_XNewRef(exc);
    return (PyObject *)self;
}

static int
Step_traverse(PyObject *op, visitproc visit, void *arg)
{
    StepObject *self = (StepObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->timeout);
    Py_VISIT(self->exc);
    return 0;
}

/* Not the timeout: a step that was never taken still needs it. A timeout refers to no step. */
static int
Step_clear(PyObject *op)
{
    Py_CLEAR(((StepObject *)op)->exc);
    return 0;
}

static void
Step_dealloc(PyObject *op)
{
    StepObject *self = (StepObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    Py_CLEAR(self->exc);
    Py_CLEAR(self->timeout);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Step_slots[] = {
    {Py_tp_doc, "What __aenter__ and __aexit__ of a Timeout return."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Step_traverse},
    {Py_tp_clear, Step_clear},
    {Py_tp_dealloc, Step_dealloc},
    {0, NULL},
};

static PyType_Spec Step_spec = {
    .name = "aiotools._aiotools.TimeoutStep",
    .basicsize = sizeof(StepObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Step_slots,
};

PyDoc_STRVAR(aenter_doc,
"__aenter__($self, /)\n--\n\n"
"Start the clock for the current task; returns the Timeout.\n\n"
"Raises RuntimeError outside of a task and when entered before.");

static PyObject *
Timeout_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return step_new(op, &enter_ops, NULL);
}

PyDoc_STRVAR(aexit_doc,
"__aexit__($self, exc_type, exc_value, traceback, /)\n--\n\n"
"Stop the clock; turn the cancellation that expiry caused into TimeoutError.");

static PyObject *
Timeout_aexit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_Format(PyExc_TypeError, "Timeout.__aexit__() takes exactly 3 arguments (%zd given)", nargs);
        return NULL;
    }
    return step_new(op, &exit_ops, exception_of(args));
}

static PyMethodDef aenter_def = {"__aenter__", Timeout_aenter, METH_NOARGS, aenter_doc};
static PyMethodDef aexit_def = {"__aexit__", (PyCFunction)(void (*)(void))Timeout_aexit, METH_FASTCALL, aexit_doc};

/* ---- steps of `async with` ---------------------------------------------------------------------------------- */

/* Two bound methods and two awaitables would be a third of what an `async with` costs. So the interpreter, which looks the
 * methods up in the type, gets the Timeout itself from StepMethod: as the method, and when it calls that, as
 * what it then awaits. Whoever writes cm.__aenter__ gets a plain method that returns a coroutine. */

static PyObject *
Timeout_call(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    TimeoutObject *self = (TimeoutObject *)op;
    Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
    if ((nargs != 0 && nargs != 3) || (kwnames != NULL && PyTuple_GET_SIZE(kwnames) > 0)) {
        PyErr_SetString(PyExc_TypeError, "'Timeout' object is not callable");
        return NULL;
    }
    PyObject *old;
    Py_BEGIN_CRITICAL_SECTION(op);
    self->step = nargs == 0 ? ENTER : EXIT;
    old = self->exc;
    self->exc = nargs == 0 ? NULL : Py_XNewRef(exception_of(args));
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(old);
    return Py_NewRef(op);
}

static PyObject *
Timeout_await(PyObject *op)
{
    if (((TimeoutObject *)op)->step == NO_STEP) {
        PyErr_SetString(PyExc_TypeError, "object Timeout can't be used in 'await' expression");
        return NULL;
    }
    return Py_NewRef(op);
}

static PySendResult
take_step_lock_held(aiot_state *state, TimeoutObject *self, PyObject **result)
{
    int step = self->step;
    self->step = NO_STEP;
    if (step == ENTER) {
        if (enter_lock_held(state, self) < 0) {
            return PYGEN_ERROR;
        }
        *result = Py_NewRef((PyObject *)self);
        return PYGEN_RETURN;
    }
    if (step == NO_STEP) {
        PyErr_SetString(PyExc_TypeError, "'Timeout' object is not an iterator");
        return PYGEN_ERROR;
    }
    PyObject *exc = self->exc;
    self->exc = NULL;
    int failed = exit_lock_held(state, self, exc);
    Py_XDECREF(exc);
    if (failed) {
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

/* The loop keeps the module state alive as the type does, and knows it without a call. */
static inline aiot_state *
timeout_state(TimeoutObject *self)
{
    return self->loop != NULL ? self->loop->state : aiot_state_of_exact_type(Py_TYPE(self));
}

static PySendResult
Timeout_send(PyObject *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    PySendResult answer;
    *result = NULL;
    Py_BEGIN_CRITICAL_SECTION(op);
    answer = take_step_lock_held(timeout_state((TimeoutObject *)op), (TimeoutObject *)op, result);
    Py_END_CRITICAL_SECTION();
    return answer;
}

static PyObject *
Timeout_next(PyObject *op)
{
    PyObject *result;
    if (Timeout_send(op, Py_None, &result) == PYGEN_ERROR) {
        return NULL;
    }
    if (result == Py_None) {
        Py_DECREF(result);
        return NULL;
    }
    return aiot_stop_iteration(timeout_state((TimeoutObject *)op), result);
}

/* Stands in the type in the place of a method descriptor, and behaves like one to those who look. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyTypeObject *owner;            /* Timeout */
    const PyMethodDef *def;
    bool is_exit;
} StepMethodObject;

static PyObject *
StepMethod_descr_get(PyObject *op, PyObject *obj, PyObject *Py_UNUSED(type))
{
    if (obj == NULL || obj == Py_None) {
        return Py_NewRef(op);
    }
    if (AIOT_UNLIKELY(!Py_IS_TYPE(obj, ((StepMethodObject *)op)->owner))) {
        PyErr_Format(PyExc_TypeError, "descriptor '%s' for 'Timeout' objects doesn't apply to a '%.200s' object",
                     ((StepMethodObject *)op)->def->ml_name, Py_TYPE(obj)->tp_name);
        return NULL;
    }
    return Py_NewRef(obj);
}

static PyObject *
StepMethod_call(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
    StepMethodObject *self = (StepMethodObject *)op;
    if (nargs < 1 || !Py_IS_TYPE(args[0], self->owner)) {
        PyErr_Format(PyExc_TypeError, "unbound method Timeout.%s() needs a Timeout as its first argument",
                     self->def->ml_name);
        return NULL;
    }
    if ((kwnames != NULL && PyTuple_GET_SIZE(kwnames) > 0) || (!self->is_exit && nargs != 1)) {
        PyErr_Format(PyExc_TypeError, "Timeout.%s() takes no %s arguments", self->def->ml_name,
                     self->is_exit ? "keyword" : "more");
        return NULL;
    }
    return self->is_exit ? Timeout_aexit(args[0], args + 1, nargs - 1) : Timeout_aenter(args[0], NULL);
}

static PyObject *
StepMethod_repr(PyObject *op)
{
    return PyUnicode_FromFormat("<method '%s' of 'Timeout' objects>", ((StepMethodObject *)op)->def->ml_name);
}

static PyObject *
StepMethod_get_name(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(((StepMethodObject *)op)->def->ml_name);
}

/* The two halves of a docstring: "name(signature)\n--\n\ntext". */
static PyObject *
StepMethod_get_doc(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(strstr(((StepMethodObject *)op)->def->ml_doc, "--\n\n") + 4);
}

static PyObject *
StepMethod_get_signature(PyObject *op, void *Py_UNUSED(closure))
{
    const char *signature = strchr(((StepMethodObject *)op)->def->ml_doc, '(');
    return PyUnicode_FromStringAndSize(signature, strstr(signature, "\n--") - signature);
}

static PyGetSetDef StepMethod_getset[] = {
    {"__name__", StepMethod_get_name, NULL, NULL, NULL},
    {"__doc__", StepMethod_get_doc, NULL, NULL, NULL},
    {"__text_signature__", StepMethod_get_signature, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static int
StepMethod_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((StepMethodObject *)op)->owner);
    return 0;
}

static int
StepMethod_clear(PyObject *op)
{
    Py_CLEAR(((StepMethodObject *)op)->owner);
    return 0;
}

static void
StepMethod_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    StepMethod_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef StepMethod_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(StepMethodObject, call), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot StepMethod_slots[] = {
    {Py_tp_members, StepMethod_members},
    {Py_tp_getset, StepMethod_getset},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, StepMethod_descr_get},
    {Py_tp_repr, StepMethod_repr},
    {Py_tp_traverse, StepMethod_traverse},
    {Py_tp_clear, StepMethod_clear},
    {Py_tp_dealloc, StepMethod_dealloc},
    {0, NULL},
};

static PyType_Spec StepMethod_spec = {
    .name = "aiotools._aiotools.TimeoutMethod",
    .basicsize = sizeof(StepMethodObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION
             | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = StepMethod_slots,
};

static int
add_step_method(aiot_state *state, const PyMethodDef *def, bool is_exit)
{
    PyTypeObject *type = state->TimeoutMethodType;
    StepMethodObject *method = (StepMethodObject *)type->tp_alloc(type, 0);
    if (method == NULL) {
        return -1;
    }
    method->call = StepMethod_call;
    method->owner = (PyTypeObject *)Py_NewRef((PyObject *)state->TimeoutType);
    method->def = def;
    method->is_exit = is_exit;
    int failed = PyObject_SetAttrString((PyObject *)state->TimeoutType, def->ml_name, (PyObject *)method);
    Py_DECREF(method);
    return failed;
}

/* ---- methods ------------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(when_doc,
"when($self, /)\n--\n\n"
"The deadline in seconds of loop.time(), None if there is none.");

static PyObject *
Timeout_when(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    TimeoutObject *self = (TimeoutObject *)op;
    if (!self->has_when) {
        Py_RETURN_NONE;
    }
    double when;
    Py_BEGIN_CRITICAL_SECTION(op);
    follow_clock(self);
    when = self->when;
    Py_END_CRITICAL_SECTION();
    return PyFloat_FromDouble(when);
}

PyDoc_STRVAR(expired_doc,
"expired($self, /)\n--\n\n"
"Whether the deadline came while the body ran.");

static PyObject *
Timeout_expired(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    TimeoutObject *self = (TimeoutObject *)op;
    return PyBool_FromLong(self->status == EXPIRING || self->status == EXPIRED);
}

/* A deadline or None (NaN). */
static int
as_deadline(PyObject *obj, const char *name, double *out)
{
    if (obj == Py_None) {
        *out = NAN;
        return 0;
    }
    return aiot_as_seconds(obj, name, out);
}

PyDoc_STRVAR(reschedule_doc,
"reschedule($self, /, when)\n--\n\n"
"Give an active timeout another deadline.\n\n"
"when is in seconds of loop.time(); None and infinity are no deadline, and one\n"
"that is past expires at the next iteration of the loop.\n\n"
"Raises RuntimeError unless the timeout is active and, except for None, called in\n"
"its loop; TypeError or ValueError (NaN) for a bad when.");

static int
reschedule_lock_held(TimeoutObject *self, double when)
{
    if (self->status == CREATED) {
        PyErr_SetString(PyExc_RuntimeError, "Timeout has not been entered");
        return -1;
    }
    if (self->status != ACTIVE) {
        PyErr_Format(PyExc_RuntimeError, "Cannot change state of %s Timeout", status_names[self->status]);
        return -1;
    }
    AiotLoop *own = self->loop;
    if (isnan(when)) {
        self->due = false;
        self->has_when = false;
        aiot_alarm_cancel(own, &self->alarm);
        return 0;
    }
    AiotLoop *loop = aiot_loop_get_running(own->state);
    if (loop == NULL) {
        return -1;
    }
    int failed = -1;
    if (loop != own) {
        PyErr_SetString(PyExc_RuntimeError, "Timeout was entered in a different event loop");
    }
    else {
        failed = arm(self, loop, when, false);
    }
    Py_DECREF(loop);
    if (!failed) {
        self->when = when;
        self->has_when = true;
        self->shift = own->clock_shift;
    }
    return failed;
}

static PyObject *
Timeout_reschedule(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"reschedule", 1, 1, 1, {AIOT_NAME(when)}};
    PyObject *given;
    double when;
    if (aiot_bind(aiot_state_of_exact_type(Py_TYPE(op)), &params, args, nargs, kwnames, &given) < 0
        || as_deadline(given, "when", &when) < 0)
    {
        return NULL;
    }
    int failed;
    Py_BEGIN_CRITICAL_SECTION(op);
    failed = reschedule_lock_held((TimeoutObject *)op, when);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
Timeout_repr(PyObject *op)
{
    TimeoutObject *self = (TimeoutObject *)op;
    if (self->status != ACTIVE) {
        return PyUnicode_FromFormat("<Timeout [%s]>", status_names[self->status]);
    }
    if (!self->has_when) {
        return PyUnicode_FromString("<Timeout [active] when=None>");
    }
    PyObject *when = Timeout_when(op, NULL);
    PyObject *rounded = when == NULL ? NULL : PyObject_CallMethod(when, "__round__", "i", 3);
    Py_XDECREF(when);
    PyObject *text = rounded == NULL ? NULL : PyUnicode_FromFormat("<Timeout [active] when=%R>", rounded);
    Py_XDECREF(rounded);
    return text;
}

static PyMethodDef Timeout_methods[] = {
    {"when", Timeout_when, METH_NOARGS, when_doc},
    {"expired", Timeout_expired, METH_NOARGS, expired_doc},
    {"reschedule", (PyCFunction)(void (*)(void))Timeout_reschedule, METH_FASTCALL | METH_KEYWORDS, reschedule_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- the type ----------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(Timeout_doc,
"Timeout(when)\n--\n\n"
"Asynchronous context manager that ends its body at a deadline.\n\n"
"when is in seconds of loop.time(); None and infinity are no deadline. Made by\n"
"timeout() and timeout_at(). It can be entered once, in a task.\n\n"
"At the deadline the task is cancelled, with the message \"timeout\". At the end of\n"
"the block this cancellation becomes TimeoutError, in exception groups too, unless\n"
"somebody else asked for cancellation as well; that request then goes on, and the\n"
"task's count of requests is what it would be without the timeout.\n\n"
"A variant of asyncio.Timeout.");

static PyObject *
Timeout_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {"Timeout", 1, 1, 1, {AIOT_NAME(when)}};
    aiot_state *state = aiot_state_of_exact_type(type);
    PyObject *given;
    double when;
    if (aiot_bind_tuple(state, &params, args, kwargs, &given) < 0 || as_deadline(given, "when", &when) < 0) {
        return NULL;
    }
    return (PyObject *)timeout_new(state, NULL, when);
}

static int
Timeout_traverse(PyObject *op, visitproc visit, void *arg)
{
    TimeoutObject *self = (TimeoutObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->loop);
    Py_VISIT(self->task);
    Py_VISIT(self->shield);
    Py_VISIT(self->exc);
    return 0;
}

/* Not the loop: its queue may hold the alarm as long as we live. */
static int
Timeout_clear(PyObject *op)
{
    Py_CLEAR(((TimeoutObject *)op)->task);
    Py_CLEAR(((TimeoutObject *)op)->shield);
    Py_CLEAR(((TimeoutObject *)op)->exc);
    return 0;
}

static void
Timeout_dealloc(PyObject *op)
{
    TimeoutObject *self = (TimeoutObject *)op;
    PyObject_GC_UnTrack(op);
    assert(!aiot_alarm_is_set(&self->alarm));
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    Py_CLEAR(self->task);
    Py_CLEAR(self->shield);
    Py_CLEAR(self->exc);
    Py_CLEAR(self->loop);
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_timeouts, op);
}

static PyObject *
Timeout_getattro(PyObject *op, PyObject *name)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    /* Names of attributes in code are interned. */
    if (name == state->str___aenter__) {
        return PyCFunction_New(&aenter_def, op);
    }
    if (name == state->str___aexit__) {
        return PyCFunction_New(&aexit_def, op);
    }
    return PyObject_GenericGetAttr(op, name);
}

static PyMemberDef Timeout_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(TimeoutObject, call), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(TimeoutObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Timeout_slots[] = {
    {Py_tp_doc, (void *)Timeout_doc},
    {Py_tp_new, Timeout_new},
    {Py_tp_methods, Timeout_methods},
    {Py_tp_members, Timeout_members},
    {Py_tp_repr, Timeout_repr},
    {Py_tp_getattro, Timeout_getattro},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_traverse, Timeout_traverse},
    {Py_tp_clear, Timeout_clear},
    {Py_tp_dealloc, Timeout_dealloc},
    {0, NULL},
};

static PyType_Spec Timeout_spec = {
    .name = "aiotools._aiotools.Timeout",
    .basicsize = sizeof(TimeoutObject),
    /* Frozen by complete_type(). */
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = Timeout_slots,
};

/* ---- functions ---------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(timeout_doc,
"timeout($module, /, delay)\n--\n\n"
"End the body of an `async with` block after delay seconds.\n\n"
"The time is counted from this call, on the clock of the running loop, and it never\n"
"ends early. Zero or less expires at the next iteration of the loop; None and\n"
"infinity never do.\n\n"
"Returns a Timeout. Raises TypeError, ValueError (NaN) or OverflowError (an int that\n"
"is no float) for a bad delay, and RuntimeError without a running loop. The block\n"
"raises TimeoutError when the time is over.\n\n"
"A drop-in for asyncio.timeout() that understands exception groups.");

static PyObject *
aiot_timeout(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"timeout", 1, 1, 1, {AIOT_NAME(delay)}};
    aiot_state *state = aiot_state_of_module(module);
    PyObject *given;
    double delay;
    if (aiot_bind(state, &params, args, nargs, kwnames, &given) < 0 || as_deadline(given, "delay", &delay) < 0) {
        return NULL;
    }
    AiotLoop *loop = aiot_loop_get_running(state);
    if (loop == NULL) {
        return NULL;
    }
    TimeoutObject *self = NULL;
    double when = NAN;
    bool monotonic = false;
    int failed = 0;
    if (delay > 0) {
        failed = aiot_loop_deadline_on(loop, delay, &when, &monotonic);
    }
    else if (delay <= 0) {
        /* On the clock that it will be compared with, so that it is found due. */
        failed = aiot_loop_time(loop, &when);
        when += delay;
    }
    if (!failed && (self = timeout_new(state, loop, when)) != NULL) {
        self->is_ahead = monotonic;
    }
    Py_DECREF(loop);
    return (PyObject *)self;
}

PyDoc_STRVAR(timeout_at_doc,
"timeout_at($module, /, when)\n--\n\n"
"End the body of an `async with` block when loop.time() reaches when.\n\n"
"A time that is past expires at the next iteration of the loop; None and infinity\n"
"never expire.\n\n"
"Returns a Timeout. Raises TypeError, ValueError (NaN) or OverflowError (an int that\n"
"is no float) for a bad when. The block raises TimeoutError when the time is over.\n\n"
"A drop-in for asyncio.timeout_at() that understands exception groups.");

static PyObject *
aiot_timeout_at(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"timeout_at", 1, 1, 1, {AIOT_NAME(when)}};
    aiot_state *state = aiot_state_of_module(module);
    PyObject *given;
    double when;
    if (aiot_bind(state, &params, args, nargs, kwnames, &given) < 0 || as_deadline(given, "when", &when) < 0) {
        return NULL;
    }
    return (PyObject *)timeout_new(state, NULL, when);
}

static PyMethodDef timeout_functions[] = {
    {"timeout", (PyCFunction)(void (*)(void))aiot_timeout, METH_FASTCALL | METH_KEYWORDS, timeout_doc},
    {"timeout_at", (PyCFunction)(void (*)(void))aiot_timeout_at, METH_FASTCALL | METH_KEYWORDS, timeout_at_doc},
    {NULL, NULL, 0, NULL},
};

/* What a PyType_Spec can't say, before anybody has seen the type. */
static int
complete_type(aiot_state *state)
{
    PyTypeObject *type = state->TimeoutType;
    if (add_step_method(state, &aenter_def, false) < 0 || add_step_method(state, &aexit_def, true) < 0) {
        return -1;
    }
    /* These serve `async with` and are nobody else's business: set here they have no __await__ and no __next__, and a
     * Timeout is no Awaitable to those who look. */
    type->tp_as_async->am_await = Timeout_await;
    type->tp_as_async->am_send = Timeout_send;
    type->tp_iternext = Timeout_next;
#if PY_VERSION_HEX >= 0x030E0000
    return PyType_Freeze(type);
#else
    type->tp_flags |= Py_TPFLAGS_IMMUTABLETYPE;
    PyType_Modified(type);
    return 0;
#endif
}

int
aiot_timeout_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    /* Not interned: its identity tells our requests from those of others with the same text. */
    if ((state->timeout_message = PyUnicode_FromString("timeout")) == NULL
        || aiot_add_type(module, &state->TimeoutStepType, &Step_spec, NULL, false) < 0
        || aiot_add_type(module, &state->TimeoutType, &Timeout_spec, NULL, true) < 0)
    {
        return -1;
    }
    if (aiot_add_type(module, &state->TimeoutMethodType, &StepMethod_spec, NULL, false) < 0
        || complete_type(state) < 0)
    {
        return -1;
    }
    return PyModule_AddFunctions(module, timeout_functions);
}
