/* clock.c: virtual time: the reading of a clock, and the driver that makes a loop live by it.
 *
 * Clock      holds vtime; base of VirtualClock.
 * Driver     one per patched loop. Its methods stand in for those of the loop (time, call_at, call_later and, by the
 *            way of driving, select or call_soon); what would be armed in the loop is a Handle in the driver's own
 *            heap, so that equal deadlines come in the order of setting, the same on each loop.
 * Handle     what call_at and call_later return while a driver is active.
 *
 * Two ways of driving. A loop with a selector (the default one) calls select() when nothing is ready: the driver polls
 * and, if that finds nothing, jumps. Any other loop is probed: a callback goes round through call_soon, and when it met
 * nothing else between two of its turns, with a poll in between, the loop is idle. It goes round only
 * while there is something to jump to.
 *
 * States:     a driver is active while it has a clock. Inactive, its methods pass everything on to the loop's own.
 * Invariants: a handle is in the heap while it is pending, and the heap owns a reference to it. vtime moves only when
 *             the loop is idle, or by who owns the clock.
 * Deadlines:  our timer queue arms its handle through call_at as well. The driver knows that handle and asks the queue
 *             for its earliest deadline, as the handle is left armed for deadlines that went away.
 * Locking:    all belongs to the thread of the loop; others may only call call_soon_threadsafe. call_at and cancel refuse
 *             foreign threads.
 * Re-entry:   whatever is fired may run any code: patch, leave, cancel handles. Handles are popped one by one, and the
 *             generation tells whether the clock was changed meanwhile.
 */

#include "loopstate.h"

#include "args.h"
#include "clock.h"

#include <math.h>

/* With nothing but the loop's own wake-up pipe registered, every so many jumps look for signals at it. */
#define POLL_EVERY 32

typedef struct DriverObject DriverObject;

typedef struct {
    PyObject_HEAD
    double vtime;
    DriverObject *driver;       /* of the loop that it is patched into, or NULL */
} ClockObject;

typedef enum {
    IO_POLL,            /* what is ready goes first; what is merely registered doesn't hold time */
    IO_HOLD,            /* what is registered holds time */
    IO_IGNORE,          /* time jumps without looking */
} io_mode;

struct DriverObject {
    PyObject_HEAD
    AiotLoop *loop;
    ClockObject *clock;         /* NULL: inactive */
    PyObject *stack;            /* what _clock.py keeps here */
    PyObject *loop_time;        /* the methods of the loop that ours stand in for */
    PyObject *loop_call_at;
    PyObject *loop_call_later;
    PyObject *loop_call_soon;
    PyObject *loop_call_soon_threadsafe;
    PyObject *loop_select;      /* NULL: drive by probing */
    PyObject *ready;            /* the loop's queue of what is ready, or NULL */
    PyObject *registered;       /* what the selector watches, or NULL */
    PyObject *on_stuck;         /* called when nothing can wake the loop; true: it made something ready */
    aiot_heap handles;
    aiot_heap targets;          /* of advance(): handles whose `future` is to be completed */
    uint64_t generation;        /* changes with each change of clock */
    unsigned long thread;
    Py_ssize_t own_registered;  /* the loop's own in `registered` */
    Py_ssize_t holds;           /* executor jobs and the like under way */
    unsigned int jumps;
    uint8_t io;
    bool manual;
    bool hold_for_executor;
    /* probing */
    bool probing;
    int quiet_rounds;
    int quiet_needed;
    Py_ssize_t in_flight;       /* calls of call_soon_threadsafe that are under way */
    uint64_t activity, seen;    /* calls of call_soon, counted since ever */
};

typedef struct {
    PyObject_HEAD
    aiot_heap_node node;
    DriverObject *driver;
    PyObject *callback;         /* NULL once cancelled or run */
    PyObject *args;             /* tuple */
    PyObject *context;
    PyObject *inner;            /* the loop's own handle, once there is one */
    PyObject *future;           /* of advance(), for a target */
    double when;
    bool cancelled;
    bool is_tick;               /* armed by our timer queue */
} HandleObject;

static HandleObject *
handle_of(aiot_heap_node *node)
{
    return AIOT_CONTAINER_OF(node, HandleObject, node);
}

static void *
raw_realloc(void *p, size_t n)
{
    return PyMem_RawRealloc(p, n);
}

static bool
is_active(DriverObject *self)
{
    return self->clock != NULL;
}

/* ---- handles ------------------------------------------------------------------------------------------------ */

static HandleObject *
handle_new(DriverObject *driver, PyObject *callback, PyObject *args, PyObject *context, double when)
{
    aiot_state *state = driver->loop->state;
    HandleObject *self = (HandleObject *)state->ClockHandleType->tp_alloc(state->ClockHandleType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_heap_node_init(&self->node);
    self->driver = (DriverObject *)Py_NewRef((PyObject *)driver);
    self->callback = Py_XNewRef(callback);
    self->args = Py_XNewRef(args);
    self->context = Py_XNewRef(context);
    self->when = when;
    return self;
}

static int
handle_push(aiot_heap *heap, HandleObject *self, double when)
{
    if (aiot_heap_push(heap, &self->node, when) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    self->when = when;
    Py_INCREF(self);
    return 0;
}

/* Takes it out of its heap, with the reference that the heap had. */
static HandleObject *
handle_take(aiot_heap *heap, HandleObject *self)
{
    self->when = self->node.when;
    aiot_heap_remove(heap, &self->node);
    return self;
}

static int
check_thread(DriverObject *self)
{
    if (AIOT_LIKELY(PyThread_get_thread_ident() == self->thread)) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError,
                    "Non-thread-safe operation invoked on an event loop other than the current one");
    return -1;
}

static PyObject *
Handle_cancel(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    HandleObject *self = (HandleObject *)op;
    if (self->cancelled) {
        Py_RETURN_NONE;
    }
    if (aiot_heap_has(&self->node) && check_thread(self->driver) < 0) {
        return NULL;
    }
    self->cancelled = true;
    if (aiot_heap_has(&self->node)) {
        Py_DECREF(handle_take(&self->driver->handles, self));
    }
    Py_CLEAR(self->callback);
    Py_CLEAR(self->args);
    PyObject *inner = self->inner;
    self->inner = NULL;
    if (inner != NULL) {
        PyObject *result = PyObject_CallMethodNoArgs(inner, self->driver->loop->state->str_cancel);
        Py_DECREF(inner);
        return result;
    }
    Py_RETURN_NONE;
}

static PyObject *
Handle_cancelled(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(((HandleObject *)op)->cancelled);
}

static PyObject *
Handle_when(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    HandleObject *self = (HandleObject *)op;
    return PyFloat_FromDouble(aiot_heap_has(&self->node) ? self->node.when : self->when);
}

static PyObject *
Handle_get_context(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    HandleObject *self = (HandleObject *)op;
    return Py_NewRef(self->context != NULL ? self->context : Py_None);
}

static PyObject *
Handle_repr(PyObject *op)
{
    HandleObject *self = (HandleObject *)op;
    if (self->cancelled) {
        return PyUnicode_FromString("<virtual timer handle cancelled>");
    }
    PyObject *when = Handle_when(op, NULL);
    if (when == NULL) {
        return NULL;
    }
    PyObject *text = PyUnicode_FromFormat("<virtual timer handle when=%R %R>", when,
                                          self->callback != NULL ? self->callback : Py_None);
    Py_DECREF(when);
    return text;
}

/* loop.call_soon(callback, *args, context=context), or another method of this form that takes `first` before them. */
static PyObject *
call_with_args(aiot_state *state, PyObject *function, PyObject *first, PyObject *callback, PyObject *args,
               PyObject *context)
{
    Py_ssize_t n = args == NULL ? 0 : PyTuple_GET_SIZE(args);
    PyObject *small[8];
    PyObject **stack = small;
    if (n + 4 > (Py_ssize_t)Py_ARRAY_LENGTH(small)) {
        stack = PyMem_New(PyObject *, n + 4);
        if (stack == NULL) {
            return PyErr_NoMemory();
        }
    }
    Py_ssize_t used = 1;
    if (first != NULL) {
        stack[used++] = first;
    }
    stack[used++] = callback;
    for (Py_ssize_t i = 0; i < n; i++) {
        stack[used++] = PyTuple_GET_ITEM(args, i);
    }
    stack[used] = context;
    PyObject *result = PyObject_Vectorcall(function, stack + 1, (size_t)(used - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                           context != NULL ? state->kw_context : NULL);
    if (stack != small) {
        PyMem_Free(stack);
    }
    return result;
}

/* Hands the callback over to the loop: it runs in its next turn. */
static int
handle_call_soon(HandleObject *self)
{
    DriverObject *driver = self->driver;
    aiot_state *state = driver->loop->state;
    PyObject *loop = aiot_loop_object(driver->loop);
    if (loop == NULL) {
        return -1;
    }
    PyObject *inner = NULL;
    PyObject *callback = Py_NewRef(self->callback);
    PyObject *args = Py_XNewRef(self->args);
    PyObject *context = Py_XNewRef(self->context);
    PyObject *call_soon = PyObject_GetAttr(loop, state->str_call_soon);
    if (call_soon != NULL) {
        inner = call_with_args(state, call_soon, NULL, callback, args, context);
    }
    Py_XDECREF(call_soon);
    Py_DECREF(callback);
    Py_XDECREF(args);
    Py_XDECREF(context);
    Py_DECREF(loop);
    if (inner == NULL) {
        return -1;
    }
    Py_XSETREF(self->inner, inner);
    return 0;
}

/* The tick of our timer queue, in place: it saves a turn of the loop. 0 or -1. */
static int
handle_run_tick(HandleObject *self)
{
    AiotLoop *loop = self->driver->loop;
    PyObject *callback = self->callback;
    self->callback = NULL;
    if (PyContext_Enter(self->context) < 0) {
        Py_DECREF(callback);
        return -1;
    }
    PyObject *result = PyObject_CallNoArgs(callback);
    if (PyContext_Exit(self->context) < 0) {
        Py_CLEAR(result);
    }
    int failed = result == NULL ? aiot_loop_report(loop, "Exception in a tick of aiotools", NULL, NULL) : 0;
    Py_XDECREF(result);
    Py_DECREF(callback);
    return failed;
}

/* ---- firing and jumping --------------------------------------------------------------------------------------- */

/* Is what a handle or future of somebody else's stands for over? 1, 0 or -1. */
static int
is_over(PyObject *obj, const char *question)
{
    PyObject *answer = PyObject_CallMethod(obj, question, NULL);
    if (answer == NULL) {
        return -1;
    }
    int over = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return over;
}

/* The earliest deadline that still means something; infinity when there is none. 0 or -1. */
static int
next_deadline(DriverObject *self, double *when)
{
    aiot_heap_node *node;
    while ((node = aiot_heap_first(&self->handles)) != NULL) {
        HandleObject *handle = handle_of(node);
        if (handle->is_tick && aiot_loop_next_deadline(self->loop) > node->when) {
            /* Left armed for a deadline that went away. */
            Py_INCREF(handle);
            int failed = aiot_loop_shift(self->loop, 0.0);
            if (!failed && aiot_heap_has(&handle->node)) {
                Py_DECREF(handle_take(&self->handles, handle));
            }
            Py_DECREF(handle);
            if (failed) {
                return -1;
            }
            continue;
        }
        break;
    }
    node = aiot_heap_first(&self->handles);
    *when = node == NULL ? INFINITY : node->when;
    return 0;
}

/* The same for what advance() waits for. */
static int
next_target(DriverObject *self, double *when)
{
    aiot_heap_node *node;
    while ((node = aiot_heap_first(&self->targets)) != NULL) {
        HandleObject *handle = handle_of(node);
        Py_INCREF(handle);
        int over = is_over(handle->future, "done");
        if (over > 0 && aiot_heap_has(&handle->node)) {
            Py_DECREF(handle_take(&self->targets, handle));
        }
        Py_DECREF(handle);
        if (over < 0) {
            return -1;
        }
        if (!over) {
            break;
        }
    }
    node = aiot_heap_first(&self->targets);
    *when = node == NULL ? INFINITY : node->when;
    return 0;
}

/* Fires what is due, in order, except what is set meanwhile. 0 or -1. */
static int
fire_due(DriverObject *self)
{
    uint64_t limit = self->handles.next_order;
    uint64_t generation = self->generation;
    double now = self->clock->vtime;
    bool is_first = true;
    aiot_heap_node *node;
    while (self->generation == generation && (node = aiot_heap_first(&self->handles)) != NULL && node->when <= now
           && node->order < limit)
    {
        HandleObject *handle = handle_take(&self->handles, handle_of(node));
        int failed;
        if (handle->is_tick && is_first) {
            failed = handle_run_tick(handle);
        }
        else {
            failed = handle_call_soon(handle);
            if (failed && !handle->cancelled && !aiot_heap_has(&handle->node)) {
                PyObject *exc = PyErr_GetRaisedException();
                if (handle_push(&self->handles, handle, handle->when) < 0) {
                    PyErr_Clear();
                }
                PyErr_SetRaisedException(exc);
            }
        }
        is_first = false;
        Py_DECREF(handle);
        if (failed) {
            return -1;
        }
    }
    return 0;
}

static int
reach_target(DriverObject *self, double target)
{
    if (self->clock->vtime < target) {
        self->clock->vtime = target;
    }
    HandleObject *handle = handle_take(&self->targets, handle_of(aiot_heap_first(&self->targets)));
    PyObject *result = PyObject_CallMethodOneArg(handle->future, self->loop->state->str_set_result, Py_None);
    Py_DECREF(handle);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* The loop is idle. 1: time was moved and something is ready now. 0: nothing to move to. -1: exception. */
static int
step_when_idle(DriverObject *self)
{
    double next, target;
    if (next_deadline(self, &next) < 0 || next_target(self, &target) < 0) {
        return -1;
    }
    if (!is_active(self)) {
        return 1;
    }
    if (next <= self->clock->vtime) {
        return fire_due(self) < 0 ? -1 : 1;
    }
    if ((self->holds > 0 && self->hold_for_executor) || (isinf(target) && (self->manual || isinf(next)))) {
        return 0;
    }
    if (next <= target) {
        self->clock->vtime = next;
        return fire_due(self) < 0 ? -1 : 1;
    }
    return reach_target(self, target) < 0 ? -1 : 1;
}

/* Nothing moves any more. 1: something is ready after all. 0: wait for what comes from outside. -1: exception. */
static int
step_when_stuck(DriverObject *self)
{
    if (self->holds > 0 || self->on_stuck == NULL || self->on_stuck == Py_None) {
        return 0;
    }
    PyObject *on_stuck = Py_NewRef(self->on_stuck);
    PyObject *answer = PyObject_CallNoArgs(on_stuck);
    Py_DECREF(on_stuck);
    if (answer == NULL) {
        return -1;
    }
    int made_ready = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return made_ready;
}

/* ---- driving by select ------------------------------------------------------------------------------------------ */

static Py_ssize_t
count_ready(DriverObject *self)
{
    return self->ready == NULL ? 0 : PyObject_Size(self->ready);
}

/* How many the loop watches beside its own wake-up pipe; 1 when that can't be known. */
static Py_ssize_t
count_registered(DriverObject *self)
{
    if (self->registered == NULL) {
        return 1;
    }
    Py_ssize_t n = PyObject_Size(self->registered);
    return n < 0 ? -1 : n <= self->own_registered ? 0 : n - self->own_registered;
}

static PyObject *
really_select(DriverObject *self, PyObject *timeout)
{
    return PyObject_CallOneArg(self->loop_select, timeout);
}

/* A poll without waiting. out: the events, NULL when there are none. 0 or -1. */
static int
poll_now(DriverObject *self, PyObject **out)
{
    *out = NULL;
    PyObject *events = really_select(self, self->loop->state->zero);
    if (events == NULL) {
        return -1;
    }
    Py_ssize_t n = PyObject_Size(events);
    if (n > 0) {
        *out = events;
        return 0;
    }
    Py_DECREF(events);
    return n < 0 ? -1 : 0;
}

PyDoc_STRVAR(select_doc,
"select($self, timeout=None, /)\n--\n\n"
"Stands in for the select() of the loop's selector.");

static PyObject *
Driver_select(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    DriverObject *self = (DriverObject *)op;
    if (nargs > 1) {
        PyErr_Format(PyExc_TypeError, "select() takes at most 1 argument (%zd given)", nargs);
        return NULL;
    }
    PyObject *timeout = nargs == 1 ? args[0] : Py_None;
    if (!is_active(self)) {
        return really_select(self, timeout);
    }
    double next;
    if (next_deadline(self, &next) < 0) {
        return NULL;
    }
    bool due = is_active(self) && next <= self->clock->vtime;
    bool may_block = !due;
    if (may_block && timeout != Py_None) {
        double seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred()) {
            return NULL;
        }
        may_block = seconds > 0;
    }
    Py_ssize_t ready = may_block ? count_ready(self) : 0;
    if (ready < 0) {
        return NULL;
    }
    if (!may_block || ready > 0) {
        PyObject *events = really_select(self, self->loop->state->zero);
        if (events != NULL && due && is_active(self) && fire_due(self) < 0) {
            Py_CLEAR(events);
        }
        return events;
    }
    Py_ssize_t registered = count_registered(self);
    if (registered < 0) {
        return NULL;
    }
    if (self->io != IO_IGNORE && (registered > 0 || ++self->jumps % POLL_EVERY == 0)) {
        PyObject *events;
        if (poll_now(self, &events) < 0 || events != NULL) {
            return events;
        }
        if ((ready = count_ready(self)) != 0) {
            return ready < 0 ? NULL : PyList_New(0);
        }
    }
    if (self->io == IO_HOLD && registered > 0) {
        return really_select(self, timeout);
    }
    int step = step_when_idle(self);
    if (step == 0 && registered == 0 && timeout == Py_None) {
        step = step_when_stuck(self);
    }
    if (step < 0) {
        return NULL;
    }
    return step > 0 ? PyList_New(0) : really_select(self, timeout);
}

/* ---- driving by a probe ------------------------------------------------------------------------------------------ */

static PyObject *Driver_probe(PyObject *op, PyObject *ignored);
static PyMethodDef probe_def = {"aiotools_probe", Driver_probe, METH_NOARGS, "Look whether the loop is idle."};

/* 0 or -1. */
static int
ensure_probe(DriverObject *self)
{
    if (self->loop_select != NULL || self->probing || !is_active(self)) {
        return 0;
    }
    PyObject *probe = PyCFunction_New(&probe_def, (PyObject *)self);
    PyObject *context = PyContext_New();
    PyObject *handle = NULL;
    self->probing = true;
    if (probe != NULL && context != NULL) {
        handle = call_with_args(self->loop->state, self->loop_call_soon, NULL, probe, NULL, context);
    }
    Py_XDECREF(probe);
    Py_XDECREF(context);
    if (handle == NULL) {
        self->probing = false;
        return -1;
    }
    Py_DECREF(handle);
    self->seen = self->activity;
    return 0;
}

/* 1: nothing else had anything to do since the last turn, and a poll found nothing. 0, or -1. */
static int
is_quiet(DriverObject *self)
{
    Py_ssize_t ready = count_ready(self);
    if (ready < 0) {
        return -1;
    }
    bool quiet;
    Py_BEGIN_CRITICAL_SECTION(self);
    quiet = ready == 0 && self->in_flight == 0 && self->activity == self->seen;
    Py_END_CRITICAL_SECTION();
    if (!quiet) {
        self->quiet_rounds = 0;
        return 0;
    }
    return self->quiet_rounds++ >= self->quiet_needed;
}

static int
probe_step(DriverObject *self)
{
    double next;
    if (next_deadline(self, &next) < 0) {
        return -1;
    }
    if (!is_active(self)) {
        return 0;
    }
    if (next <= self->clock->vtime) {
        self->quiet_rounds = 0;
        return fire_due(self) < 0 ? -1 : ensure_probe(self);
    }
    int quiet = is_quiet(self);
    if (quiet <= 0) {
        return quiet < 0 ? -1 : ensure_probe(self);
    }
    self->quiet_rounds = 0;
    int step = step_when_idle(self);
    if (step == 0) {
        step = step_when_stuck(self);
    }
    if (step < 0) {
        return -1;
    }
    /* Without a jump it stops here, and the loop waits; what makes a jump possible starts it again. */
    return step > 0 ? ensure_probe(self) : 0;
}

static PyObject *
Driver_probe(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    DriverObject *self = (DriverObject *)op;
    self->probing = false;
    if (!is_active(self)) {
        Py_RETURN_NONE;
    }
    if (probe_step(self) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        if (ensure_probe(self) < 0) {
            PyErr_WriteUnraisable(op);
        }
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(call_soon_doc,
"call_soon($self, callback, /, *args, context=None)\n--\n\n"
"Stands in for the method of the loop.");

static PyObject *
Driver_call_soon(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    DriverObject *self = (DriverObject *)op;
    PyObject *handle = PyObject_Vectorcall(self->loop_call_soon, args, (size_t)nargs, kwnames);
    if (handle != NULL && is_active(self)) {
        Py_BEGIN_CRITICAL_SECTION(self);
        self->activity++;
        Py_END_CRITICAL_SECTION();
        if (ensure_probe(self) < 0) {
            Py_CLEAR(handle);
        }
    }
    return handle;
}

PyDoc_STRVAR(call_soon_threadsafe_doc,
"call_soon_threadsafe($self, callback, /, *args, context=None)\n--\n\n"
"Stands in for the method of the loop. From any thread.");

static PyObject *
Driver_call_soon_threadsafe(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    DriverObject *self = (DriverObject *)op;
    Py_BEGIN_CRITICAL_SECTION(self);
    self->in_flight++;
    Py_END_CRITICAL_SECTION();
    PyObject *handle = PyObject_Vectorcall(self->loop_call_soon_threadsafe, args, (size_t)nargs, kwnames);
    Py_BEGIN_CRITICAL_SECTION(self);
    self->activity++;
    self->in_flight--;
    Py_END_CRITICAL_SECTION();
    return handle;
}

/* ---- the clock of the loop -------------------------------------------------------------------------------------- */

PyDoc_STRVAR(time_doc,
"time($self, /)\n--\n\n"
"Stands in for the method of the loop: virtual time, in seconds.");

static PyObject *
Driver_time(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    DriverObject *self = (DriverObject *)op;
    if (!is_active(self)) {
        return PyObject_CallNoArgs(self->loop_time);
    }
    return PyFloat_FromDouble(self->clock->vtime);
}

/* Only `context` may be given by keyword. Borrowed, NULL when there is none. */
static int
context_argument(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **context)
{
    *context = NULL;
    Py_ssize_t n = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, i);
        if (!PyUnicode_EqualToUTF8(name, "context")) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", function, name);
            return -1;
        }
        *context = args[nargs + i];
    }
    if (nargs < 2) {
        PyErr_Format(PyExc_TypeError, "%s() takes a time and a callback (%zd arguments given)", function, nargs);
        return -1;
    }
    if (*context == Py_None) {
        *context = NULL;
    }
    if (*context != NULL && !PyContext_CheckExact(*context)) {
        PyErr_Format(PyExc_TypeError, "context must be a contextvars.Context, not '%.200s'",
                     Py_TYPE(*context)->tp_name);
        return -1;
    }
    return 0;
}

static int
check_usable(DriverObject *self)
{
    if (check_thread(self) < 0) {
        return -1;
    }
    PyObject *loop = aiot_loop_object(self->loop);
    if (loop == NULL) {
        return -1;
    }
    PyObject *answer = PyObject_CallMethodNoArgs(loop, self->loop->state->str_is_closed);
    Py_DECREF(loop);
    int closed = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (closed > 0) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
    }
    return closed == 0 ? 0 : -1;
}

static PyObject *
schedule(DriverObject *self, double when, PyObject *const *args, Py_ssize_t nargs, PyObject *context)
{
    PyObject *callback = args[1];
    if (check_usable(self) < 0) {
        return NULL;
    }
    if (!PyCallable_Check(callback)) {
        PyErr_Format(PyExc_TypeError, "a callable object was expected, got %R", callback);
        return NULL;
    }
    bool is_tick = PyCFunction_Check(callback) && PyCFunction_GET_SELF(callback) == (PyObject *)self->loop;
    if (is_tick) {
        /* The queue rounds for a loop that counts milliseconds; here it need not. */
        double exact = aiot_loop_next_deadline(self->loop);
        when = isinf(exact) ? when : exact;
    }
    PyObject *rest = NULL;
    HandleObject *handle = NULL;
    context = context == NULL ? PyContext_CopyCurrent() : Py_NewRef(context);
    if (context == NULL) {
        return NULL;
    }
    if (nargs > 2) {
        rest = PyTuple_New(nargs - 2);
        if (rest == NULL) {
            goto done;
        }
        for (Py_ssize_t i = 2; i < nargs; i++) {
            PyTuple_SET_ITEM(rest, i - 2, Py_NewRef(args[i]));
        }
    }
    handle = handle_new(self, callback, rest, context, when);
    if (handle == NULL) {
        goto done;
    }
    handle->is_tick = is_tick;
    int failed;
    if (!is_active(self)) {
        /* By what was asked on the way: a subclass of float, is_closed(). */
        PyErr_SetString(PyExc_RuntimeError, "the clock was taken from the loop meanwhile");
        failed = -1;
    }
    else if (when <= self->clock->vtime) {
        failed = handle_call_soon(handle);
    }
    else {
        failed = handle_push(&self->handles, handle, when);
        if (!failed && (failed = ensure_probe(self)) < 0) {
            Py_DECREF(handle_take(&self->handles, handle));
        }
    }
    if (failed) {
        Py_CLEAR(handle);
    }
done:
    Py_XDECREF(rest);
    Py_DECREF(context);
    return (PyObject *)handle;
}

PyDoc_STRVAR(call_at_doc,
"call_at($self, when, callback, /, *args, context=None)\n--\n\n"
"Stands in for the method of the loop.");

static PyObject *
Driver_call_at(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    DriverObject *self = (DriverObject *)op;
    PyObject *context;
    double when;
    if (!is_active(self)) {
        return PyObject_Vectorcall(self->loop_call_at, args, (size_t)nargs, kwnames);
    }
    if (context_argument("call_at", args, nargs, kwnames, &context) < 0
        || aiot_as_seconds(args[0], "when", &when) < 0)
    {
        return NULL;
    }
    return schedule(self, when, args, nargs, context);
}

PyDoc_STRVAR(call_later_doc,
"call_later($self, delay, callback, /, *args, context=None)\n--\n\n"
"Stands in for the method of the loop.");

static PyObject *
Driver_call_later(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    DriverObject *self = (DriverObject *)op;
    PyObject *context;
    double delay;
    if (!is_active(self)) {
        return PyObject_Vectorcall(self->loop_call_later, args, (size_t)nargs, kwnames);
    }
    if (context_argument("call_later", args, nargs, kwnames, &context) < 0
        || aiot_as_seconds(args[0], "delay", &delay) < 0)
    {
        return NULL;
    }
    if (!is_active(self)) {
        /* To make a float of the delay may have run anything. */
        return PyObject_Vectorcall(self->loop_call_later, args, (size_t)nargs, kwnames);
    }
    return schedule(self, self->clock->vtime + delay, args, nargs, context);
}

/* ---- patching --------------------------------------------------------------------------------------------------- */

/* Moves all deadlines to the clock that the loop has from now on. 0 or -1. */
static int
shift_all(DriverObject *self, double delta)
{
    self->generation++;
    aiot_heap_shift(&self->handles, delta);
    aiot_heap_shift(&self->targets, delta);
    return aiot_loop_shift(self->loop, delta);
}

PyDoc_STRVAR(enter_doc,
"enter($self, clock, delta, manual, hold_for_executor, io, on_stuck, /)\n--\n\n"
"Make the loop live by a clock whose reading is delta more than what it lived by.");

static PyObject *
Driver_enter(PyObject *op, PyObject *args)
{
    DriverObject *self = (DriverObject *)op;
    aiot_state *state = self->loop->state;
    PyObject *clock, *on_stuck;
    double delta;
    int manual, hold, io;
    if (!PyArg_ParseTuple(args, "O!dppiO:enter", state->ClockType, &clock, &delta, &manual, &hold, &io, &on_stuck)) {
        return NULL;
    }
    ClockObject *old = self->clock;
    self->clock = (ClockObject *)Py_NewRef(clock);
    Py_XSETREF(self->clock->driver, (DriverObject *)Py_NewRef(op));
    Py_XDECREF(old);
    Py_XSETREF(self->on_stuck, Py_NewRef(on_stuck));
    self->manual = manual;
    self->hold_for_executor = hold;
    self->io = (uint8_t)io;
    self->thread = PyThread_get_thread_ident();
    self->quiet_rounds = 0;
    if (shift_all(self, delta) < 0 || ensure_probe(self) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* One of the handles that are pending when the last clock leaves. 0 or -1. */
static int
give_back(DriverObject *self, HandleObject *handle)
{
    PyObject *when = PyFloat_FromDouble(handle->when);
    if (when == NULL) {
        return -1;
    }
    PyObject *callback = Py_NewRef(handle->callback), *args = Py_XNewRef(handle->args);
    PyObject *inner = call_with_args(self->loop->state, self->loop_call_at, when, callback, args, handle->context);
    Py_XDECREF(args);
    Py_DECREF(callback);
    Py_DECREF(when);
    if (inner == NULL) {
        return -1;
    }
    Py_XSETREF(handle->inner, inner);
    return 0;
}

PyDoc_STRVAR(leave_doc,
"leave($self, delta, is_closed, /)\n--\n\n"
"Give the loop its own clock back, whose reading is delta more; all that is pending keeps its remaining delay.");

static PyObject *
Driver_leave(PyObject *op, PyObject *args)
{
    DriverObject *self = (DriverObject *)op;
    double delta;
    int is_closed;
    if (!PyArg_ParseTuple(args, "dp:leave", &delta, &is_closed)) {
        return NULL;
    }
    Py_CLEAR(self->clock);
    Py_CLEAR(self->on_stuck);
    int failed = is_closed ? 0 : shift_all(self, delta);
    PyObject *exc = failed ? PyErr_GetRaisedException() : NULL;
    self->generation++;
    aiot_heap_node *node;
    while ((node = aiot_heap_first(&self->handles)) != NULL) {
        HandleObject *handle = handle_take(&self->handles, handle_of(node));
        /* All of them, whatever happens to one. */
        if (!is_closed && give_back(self, handle) < 0) {
            PyObject *other = PyErr_GetRaisedException();
            if (exc == NULL) {
                exc = other;
            }
            else {
                Py_DECREF(other);
            }
        }
        Py_DECREF(handle);
    }
    while ((node = aiot_heap_first(&self->targets)) != NULL) {
        HandleObject *handle = handle_take(&self->targets, handle_of(node));
        PyObject *result = PyObject_CallMethodNoArgs(handle->future, self->loop->state->str_cancel);
        if (result == NULL) {
            PyErr_Clear();
        }
        Py_XDECREF(result);
        Py_DECREF(handle);
    }
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(advance_doc,
"advance($self, seconds, future, /)\n--\n\n"
"Let time go on by so much; complete the future when it has, and the loop is idle again.");

static PyObject *
Driver_advance(PyObject *op, PyObject *args)
{
    DriverObject *self = (DriverObject *)op;
    double seconds;
    PyObject *future;
    if (!PyArg_ParseTuple(args, "dO:advance", &seconds, &future)) {
        return NULL;
    }
    if (!is_active(self)) {
        PyErr_SetString(PyExc_RuntimeError, "the clock is not patched into a loop");
        return NULL;
    }
    HandleObject *handle = handle_new(self, NULL, NULL, NULL, 0.0);
    if (handle == NULL) {
        return NULL;
    }
    handle->future = Py_NewRef(future);
    int failed = handle_push(&self->targets, handle, self->clock->vtime + seconds);
    Py_DECREF(handle);
    if (failed || ensure_probe(self) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
Driver_hold(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    ((DriverObject *)op)->holds++;
    Py_RETURN_NONE;
}

static PyObject *
Driver_release(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    DriverObject *self = (DriverObject *)op;
    self->holds--;
    if (ensure_probe(self) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef Driver_methods[] = {
    {"time", Driver_time, METH_NOARGS, time_doc},
    {"call_at", (PyCFunction)(void (*)(void))Driver_call_at, METH_FASTCALL | METH_KEYWORDS, call_at_doc},
    {"call_later", (PyCFunction)(void (*)(void))Driver_call_later, METH_FASTCALL | METH_KEYWORDS, call_later_doc},
    {"call_soon", (PyCFunction)(void (*)(void))Driver_call_soon, METH_FASTCALL | METH_KEYWORDS, call_soon_doc},
    {"call_soon_threadsafe", (PyCFunction)(void (*)(void))Driver_call_soon_threadsafe, METH_FASTCALL | METH_KEYWORDS,
     call_soon_threadsafe_doc},
    {"select", (PyCFunction)(void (*)(void))Driver_select, METH_FASTCALL, select_doc},
    {"enter", Driver_enter, METH_VARARGS, enter_doc},
    {"leave", Driver_leave, METH_VARARGS, leave_doc},
    {"advance", Driver_advance, METH_VARARGS, advance_doc},
    {"hold", Driver_hold, METH_NOARGS, "hold($self, /)\n--\n\nWork from outside is under way: time stands still."},
    {"release", Driver_release, METH_NOARGS, "release($self, /)\n--\n\nThe opposite of hold()."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Driver_members[] = {
    {"stack", Py_T_OBJECT_EX, offsetof(DriverObject, stack), 0, "What _clock.py keeps here."},
    {"holds", Py_T_PYSSIZET, offsetof(DriverObject, holds), Py_READONLY, "How much work from outside is under way."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(Driver_doc,
"_ClockDriver(loop, select, ready, registered, own_registered, quiet_needed, /)\n--\n\n"
"Makes a loop live by virtual time; see clock.c.");

/* A bound method of the loop. */
static int
loop_method(PyObject *loop, const char *name, PyObject **out)
{
    *out = PyObject_GetAttrString(loop, name);
    return *out == NULL ? -1 : 0;
}

static PyObject *
none_is_null(PyObject *obj)
{
    return obj == Py_None ? NULL : Py_NewRef(obj);
}

static PyObject *
Driver_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    aiot_state *state = aiot_state_of_type(type);
    PyObject *loop, *select, *ready, *registered;
    Py_ssize_t own_registered;
    int quiet_needed;
    if (state == NULL) {
        return NULL;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "_ClockDriver() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOOOni:_ClockDriver", &loop, &select, &ready, &registered, &own_registered,
                          &quiet_needed))
    {
        return NULL;
    }
    DriverObject *self = (DriverObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_heap_init(&self->handles, raw_realloc, PyMem_RawFree);
    aiot_heap_init(&self->targets, raw_realloc, PyMem_RawFree);
    self->own_registered = own_registered;
    self->quiet_needed = quiet_needed;
    self->loop_select = none_is_null(select);
    self->ready = none_is_null(ready);
    self->registered = none_is_null(registered);
    if ((self->loop = aiot_loop_get(state, loop)) == NULL
        || loop_method(loop, "time", &self->loop_time) < 0
        || loop_method(loop, "call_at", &self->loop_call_at) < 0
        || loop_method(loop, "call_later", &self->loop_call_later) < 0
        || loop_method(loop, "call_soon", &self->loop_call_soon) < 0
        || loop_method(loop, "call_soon_threadsafe", &self->loop_call_soon_threadsafe) < 0)
    {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int
Driver_traverse(PyObject *op, visitproc visit, void *arg)
{
    DriverObject *self = (DriverObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->loop);
    Py_VISIT(self->clock);
    Py_VISIT(self->stack);
    Py_VISIT(self->loop_time);
    Py_VISIT(self->loop_call_at);
    Py_VISIT(self->loop_call_later);
    Py_VISIT(self->loop_call_soon);
    Py_VISIT(self->loop_call_soon_threadsafe);
    Py_VISIT(self->loop_select);
    Py_VISIT(self->ready);
    Py_VISIT(self->registered);
    Py_VISIT(self->on_stuck);
    for (size_t i = 0; i < aiot_heap_len(&self->handles); i++) {
        Py_VISIT(handle_of(aiot_heap_at(&self->handles, i)));
    }
    for (size_t i = 0; i < aiot_heap_len(&self->targets); i++) {
        Py_VISIT(handle_of(aiot_heap_at(&self->targets, i)));
    }
    return 0;
}

/* Not the loop state: handles that are still held by somebody ask for it when they are cancelled. */
static int
Driver_clear(PyObject *op)
{
    DriverObject *self = (DriverObject *)op;
    Py_CLEAR(self->clock);
    Py_CLEAR(self->stack);
    Py_CLEAR(self->on_stuck);
    aiot_heap_node *node;
    while ((node = aiot_heap_first(&self->handles)) != NULL) {
        Py_DECREF(handle_take(&self->handles, handle_of(node)));
    }
    while ((node = aiot_heap_first(&self->targets)) != NULL) {
        Py_DECREF(handle_take(&self->targets, handle_of(node)));
    }
    return 0;
}

static void
Driver_dealloc(PyObject *op)
{
    DriverObject *self = (DriverObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Driver_clear(op);
    aiot_heap_fini(&self->handles);
    aiot_heap_fini(&self->targets);
    Py_CLEAR(self->loop_time);
    Py_CLEAR(self->loop_call_at);
    Py_CLEAR(self->loop_call_later);
    Py_CLEAR(self->loop_call_soon);
    Py_CLEAR(self->loop_call_soon_threadsafe);
    Py_CLEAR(self->loop_select);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->registered);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Driver_slots[] = {
    {Py_tp_doc, (void *)Driver_doc},
    {Py_tp_new, Driver_new},
    {Py_tp_methods, Driver_methods},
    {Py_tp_members, Driver_members},
    {Py_tp_traverse, Driver_traverse},
    {Py_tp_clear, Driver_clear},
    {Py_tp_dealloc, Driver_dealloc},
    {0, NULL},
};

static PyType_Spec Driver_spec = {
    .name = "aiotools._aiotools._ClockDriver",
    .basicsize = sizeof(DriverObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Driver_slots,
};

/* ---- type of handles ------------------------------------------------------------------------------------------- */

static int
Handle_traverse(PyObject *op, visitproc visit, void *arg)
{
    HandleObject *self = (HandleObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->driver);
    Py_VISIT(self->callback);
    Py_VISIT(self->args);
    Py_VISIT(self->context);
    Py_VISIT(self->inner);
    Py_VISIT(self->future);
    return 0;
}

/* Not the driver: cancel() needs it. */
static int
Handle_clear(PyObject *op)
{
    HandleObject *self = (HandleObject *)op;
    self->cancelled = true;
    Py_CLEAR(self->callback);
    Py_CLEAR(self->args);
    Py_CLEAR(self->context);
    Py_CLEAR(self->inner);
    Py_CLEAR(self->future);
    return 0;
}

static void
Handle_dealloc(PyObject *op)
{
    HandleObject *self = (HandleObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(!aiot_heap_has(&self->node));
    Handle_clear(op);
    Py_CLEAR(self->driver);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef Handle_methods[] = {
    {"cancel", Handle_cancel, METH_NOARGS, "cancel($self, /)\n--\n\nThe callback won't be called."},
    {"cancelled", Handle_cancelled, METH_NOARGS, "cancelled($self, /)\n--\n\nWhether it was cancelled."},
    {"when", Handle_when, METH_NOARGS, "when($self, /)\n--\n\nThe deadline, in seconds of loop.time()."},
    {"get_context", Handle_get_context, METH_NOARGS,
     "get_context($self, /)\n--\n\nThe context that the callback runs in."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Handle_slots[] = {
    {Py_tp_doc, "What call_at() and call_later() of a loop on virtual time return; see asyncio.TimerHandle."},
    {Py_tp_methods, Handle_methods},
    {Py_tp_repr, Handle_repr},
    {Py_tp_traverse, Handle_traverse},
    {Py_tp_clear, Handle_clear},
    {Py_tp_dealloc, Handle_dealloc},
    {0, NULL},
};

static PyType_Spec Handle_spec = {
    .name = "aiotools._aiotools.VirtualTimerHandle",
    .basicsize = sizeof(HandleObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Handle_slots,
};

/* ---- type of clocks -------------------------------------------------------------------------------------------- */

static PyObject *
Clock_get_vtime(PyObject *op, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble(((ClockObject *)op)->vtime);
}

static int
Clock_set_vtime(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    ClockObject *self = (ClockObject *)op;
    double vtime;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "cannot delete vtime");
        return -1;
    }
    if (aiot_as_seconds(value, "vtime", &vtime) < 0) {
        return -1;
    }
    if (isinf(vtime)) {
        PyErr_SetString(PyExc_ValueError, "vtime must be finite");
        return -1;
    }
    self->vtime = vtime;
    return self->driver == NULL ? 0 : ensure_probe(self->driver);
}

static PyObject *
Clock_get_driver(PyObject *op, void *Py_UNUSED(closure))
{
    ClockObject *self = (ClockObject *)op;
    return Py_NewRef(self->driver != NULL ? (PyObject *)self->driver : Py_None);
}

static int
Clock_set_driver(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    if (value != Py_None) {
        PyErr_SetString(PyExc_TypeError, "a driver is set by itself, and cleared with None");
        return -1;
    }
    Py_CLEAR(((ClockObject *)op)->driver);
    return 0;
}

static PyGetSetDef Clock_getset[] = {
    {"vtime", Clock_get_vtime, Clock_set_vtime, "Virtual time in seconds, a float; it may be set.", NULL},
    {"_driver", Clock_get_driver, Clock_set_driver, "What drives the loop that this is patched into, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static int
Clock_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((ClockObject *)op)->driver);
    return 0;
}

static int
Clock_clear(PyObject *op)
{
    Py_CLEAR(((ClockObject *)op)->driver);
    return 0;
}

static void
Clock_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Clock_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Clock_slots[] = {
    {Py_tp_doc, "_Clock()\n--\n\nThe base of VirtualClock: its reading."},
    {Py_tp_getset, Clock_getset},
    {Py_tp_traverse, Clock_traverse},
    {Py_tp_clear, Clock_clear},
    {Py_tp_dealloc, Clock_dealloc},
    {0, NULL},
};

static PyType_Spec Clock_spec = {
    .name = "aiotools._aiotools._Clock",
    .basicsize = sizeof(ClockObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Clock_slots,
};

int
aiot_clock_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->zero = PyLong_FromLong(0)) == NULL) {
        return -1;
    }
    return aiot_add_type(module, &state->ClockType, &Clock_spec, NULL, true) < 0
                   || aiot_add_type(module, &state->ClockHandleType, &Handle_spec, NULL, false) < 0
                   || aiot_add_type(module, &state->ClockDriverType, &Driver_spec, NULL, true) < 0
               ? -1
               : 0;
}
