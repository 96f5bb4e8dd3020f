/* sleep.c: sleep, sleep_until and checkpoint.
 *
 * States:     those of an awaitable. The clock starts when it is first sent to, as with asyncio.sleep.
 * Invariants: while SUSPENDED there is a waiter; the alarm is set unless nothing was left to wait for.
 * Ownership:  the timer queue owns the sleep while the alarm is set, the sleep its waiter, the waiter the task's wake-up.
 * Cancelled:  the alarm is taken off the queue when the task throws CancelledError in; nothing else is touched.
 */

#include "sleep.h"

#include "args.h"
#include "awaitable.h"
#include "freelist.h"
#include "waiter.h"

typedef struct {
    AIOT_AWAITABLE_HEAD
    AiotLoop *loop;         /* once started, when there is something to wait for */
    AiotWaiter *waiter;
    PyObject *result;
    double seconds;         /* the delay, or when */
    aiot_alarm alarm;
} SleepObject;

static int
Sleep_fire(AiotLoop *loop, PyObject *owner)
{
    SleepObject *self = (SleepObject *)owner;
    if (aiot_waiter_wake(self->waiter) == 0) {
        return 0;
    }
    /* No memory, most likely. The error is reported; the sleeper is tried again, not forgotten. */
    PyObject *exc = PyErr_GetRaisedException();
    if (aiot_alarm_set(loop, &self->alarm, self->alarm.node.when) < 0) {
        aiot_write_unraisable(owner);
    }
    PyErr_SetRaisedException(exc);
    return -1;
}

/* Goes to the end of what is ready. */
static PySendResult
sleep_yield(SleepObject *self, AiotLoop *loop, PyObject **result)
{
    self->waiter = aiot_waiter_new(loop, AIOT_WOKEN);
    if (self->waiter == NULL) {
        return PYGEN_ERROR;
    }
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

static PySendResult
sleep_wait(SleepObject *self, AiotLoop *loop, double when, PyObject **result)
{
    self->waiter = aiot_waiter_new(loop, AIOT_PENDING);
    if (self->waiter == NULL) {
        return PYGEN_ERROR;
    }
    aiot_alarm_init(&self->alarm, (PyObject *)self, Sleep_fire);
    if (aiot_alarm_set(loop, &self->alarm, when) < 0) {
        return PYGEN_ERROR;
    }
    self->loop = (AiotLoop *)Py_NewRef((PyObject *)loop);
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

static PySendResult
Sleep_start_for(aiot_awaitable *op, PyObject **result)
{
    SleepObject *self = (SleepObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    PySendResult answer = PYGEN_ERROR;
    double when;
    if (self->seconds <= 0) {
        answer = sleep_yield(self, loop, result);
    }
    else if (aiot_loop_deadline(loop, self->seconds, &when) == 0) {
        answer = sleep_wait(self, loop, when, result);
    }
    Py_DECREF(loop);
    return answer;
}

static PySendResult
Sleep_start_until(aiot_awaitable *op, PyObject **result)
{
    SleepObject *self = (SleepObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    PySendResult answer = PYGEN_ERROR;
    double now;
    if (aiot_loop_time(loop, &now) == 0) {
        answer = self->seconds <= now ? sleep_yield(self, loop, result)
                                      : sleep_wait(self, loop, self->seconds, result);
    }
    Py_DECREF(loop);
    return answer;
}

static void
Sleep_abandon(aiot_awaitable *op)
{
    SleepObject *self = (SleepObject *)op;
    if (self->loop != NULL) {
        aiot_alarm_cancel(self->loop, &self->alarm);
    }
    Py_CLEAR(self->waiter);
}

static PySendResult
Sleep_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    SleepObject *self = (SleepObject *)op;
    if (aiot_waiter_check_resumed(self->waiter) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        Sleep_abandon(op);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    Py_CLEAR(self->waiter);
    *result = Py_NewRef(self->result != NULL ? self->result : Py_None);
    return PYGEN_RETURN;
}

static const aiot_awaitable_ops sleep_ops = {
    .name = "sleep",
    .start = Sleep_start_for,
    .resume = Sleep_resume,
    .abandon = Sleep_abandon,
};

static const aiot_awaitable_ops sleep_until_ops = {
    .name = "sleep_until",
    .start = Sleep_start_until,
    .resume = Sleep_resume,
    .abandon = Sleep_abandon,
};

static const aiot_awaitable_ops checkpoint_ops = {
    .name = "checkpoint",
    .start = Sleep_start_for,
    .resume = Sleep_resume,
    .abandon = Sleep_abandon,
};

/* ---- functions ---------------------------------------------------------------------------------------------- */

static PyObject *
sleep_new(aiot_state *state, const aiot_awaitable_ops *ops, double seconds, PyObject *result)
{
    SleepObject *self = (SleepObject *)aiot_free_list_alloc(&state->free_sleeps, state->SleepType);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, ops);
    aiot_alarm_init(&self->alarm, (PyObject *)self, Sleep_fire);
    self->seconds = seconds;
    self->result = Py_XNewRef(result);
    return (PyObject *)self;
}

/* Two arguments: seconds, under this name, and the result. */
static inline PyObject *
sleep_from_args(PyObject *module, const aiot_awaitable_ops *ops, const aiot_params *params, const char *name,
                PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    aiot_state *state = aiot_state_of_module(module);
    PyObject *given[2];
    double seconds;
    if (aiot_bind(state, params, args, nargs, kwnames, given) < 0 || aiot_as_seconds(given[0], name, &seconds) < 0) {
        return NULL;
    }
    return sleep_new(state, ops, seconds, given[1]);
}

PyDoc_STRVAR(sleep_doc,
"sleep($module, /, delay, result=None)\n--\n\n"
"Suspend the current task for delay seconds; await it.\n\n"
"Zero or less lets everything else that is ready run once, infinity waits until\n"
"cancelled. The time is counted from when it is awaited, on the clock of the\n"
"running loop, and it never ends early.\n\n"
"Returns result. Raises TypeError, ValueError (NaN) or OverflowError (an int that is\n"
"no float) at the call, RuntimeError when awaited without a running loop,\n"
"CancelledError when cancelled.\n\n"
"A drop-in for asyncio.sleep() that costs no loop handle per sleeper.");

static PyObject *
aiot_sleep(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"sleep", 2, 1, 2, {AIOT_NAME(delay), AIOT_NAME(result)}};
    return sleep_from_args(module, &sleep_ops, &params, "delay", args, nargs, kwnames);
}

PyDoc_STRVAR(sleep_until_doc,
"sleep_until($module, /, when, result=None)\n--\n\n"
"Suspend the current task until loop.time() reaches when; await it.\n\n"
"when is in seconds on the clock of the running loop. A time that is past lets\n"
"everything else that is ready run once, infinity waits until cancelled.\n\n"
"Returns result. Raises TypeError, ValueError (NaN) or OverflowError (an int that is\n"
"no float) at the call, RuntimeError when awaited without a running loop,\n"
"CancelledError when cancelled.\n\n"
"The absolute twin of sleep(), as loop.call_at() is of loop.call_later().");

static PyObject *
aiot_sleep_until(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"sleep_until", 2, 1, 2, {AIOT_NAME(when), AIOT_NAME(result)}};
    return sleep_from_args(module, &sleep_until_ops, &params, "when", args, nargs, kwnames);
}

PyDoc_STRVAR(checkpoint_doc,
"checkpoint($module, /)\n--\n\n"
"Let everything else that is ready run once; await it.\n\n"
"A pending cancellation is delivered here. Returns None. Raises RuntimeError\n"
"when awaited without a running loop, CancelledError when cancelled.\n\n"
"What asyncio.sleep(0) is used for; the name is Trio's.");

static PyObject *
aiot_checkpoint(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return sleep_new(aiot_state_of_module(module), &checkpoint_ops, 0.0, NULL);
}

/* ---- the type ----------------------------------------------------------------------------------------------- */

static int
Sleep_traverse(PyObject *op, visitproc visit, void *arg)
{
    SleepObject *self = (SleepObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->loop);
    Py_VISIT(self->waiter);
    Py_VISIT(self->result);
    return 0;
}

static int
Sleep_clear(PyObject *op)
{
    SleepObject *self = (SleepObject *)op;
    /* The queue owns us while the alarm is set, so when we are garbage it is garbage too, and drops the alarm. */
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->result);
    return 0;
}

static void
Sleep_dealloc(PyObject *op)
{
    SleepObject *self = (SleepObject *)op;
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, Sleep_dealloc)
    assert(!aiot_alarm_is_set(&self->alarm));
    Sleep_clear(op);
    Py_CLEAR(self->loop);
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_sleeps, op);
    AIOT_TRASHCAN_END
}

static PyType_Slot Sleep_slots[] = {
    {Py_tp_doc, "What sleep(), sleep_until() and checkpoint() return: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Sleep_traverse},
    {Py_tp_clear, Sleep_clear},
    {Py_tp_dealloc, Sleep_dealloc},
    {0, NULL},
};

static PyType_Spec Sleep_spec = {
    .name = "aiotools._aiotools.Sleep",
    .basicsize = sizeof(SleepObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Sleep_slots,
};

static PyMethodDef sleep_functions[] = {
    {"sleep", (PyCFunction)(void (*)(void))aiot_sleep, METH_FASTCALL | METH_KEYWORDS, sleep_doc},
    {"sleep_until", (PyCFunction)(void (*)(void))aiot_sleep_until, METH_FASTCALL | METH_KEYWORDS, sleep_until_doc},
    {"checkpoint", aiot_checkpoint, METH_NOARGS, checkpoint_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_sleep_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->SleepType, &Sleep_spec, NULL, false) < 0) {
        return -1;
    }
    return PyModule_AddFunctions(module, sleep_functions);
}
