/* awaitable.c: the base of all our awaitables, and those that are already done.
 *
 * States:     CREATED -> RUNNING -> SUSPENDED -> RUNNING ... -> FINISHED; close() and throw() may finish it in
 *             CREATED and SUSPENDED. RUNNING is left by whoever entered it.
 * Locking:    each step is a critical section of the object, and RUNNING shuts out re-entry.
 * Re-entry:   start, resume and throw may run any code; nothing is read from before them.
 */

#include "awaitable.h"

#include "freelist.h"

/* ---- results without a fresh exception ------------------------------------------------------------------- */

/* Up to 3.14, `await` takes the value of a C iterator from a StopIteration. A fresh one costs as much as all else
 * that a finished awaitable does; one that is kept for reuse must not keep its last value. So: a subclass
 * whose instances go to a free list, emptied. 3.15 asks am_send first and never comes here. */
static void
Stop_dealloc(PyObject *op)
{
    PyStopIterationObject *self = (PyStopIterationObject *)op;
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, Stop_dealloc)
    Py_CLEAR(self->dict);
    Py_CLEAR(self->args);
    Py_CLEAR(self->notes);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->context);
    Py_CLEAR(self->cause);
    Py_CLEAR(self->value);
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_stops, op);
    AIOT_TRASHCAN_END
}

static int
Stop_traverse(PyObject *op, visitproc visit, void *arg)
{
    PyStopIterationObject *self = (PyStopIterationObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->dict);
    Py_VISIT(self->args);
    Py_VISIT(self->notes);
    Py_VISIT(self->traceback);
    Py_VISIT(self->context);
    Py_VISIT(self->cause);
    Py_VISIT(self->value);
    return 0;
}

static int
Stop_clear(PyObject *op)
{
    PyStopIterationObject *self = (PyStopIterationObject *)op;
    Py_CLEAR(self->dict);
    Py_CLEAR(self->args);
    Py_CLEAR(self->notes);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->context);
    Py_CLEAR(self->cause);
    Py_CLEAR(self->value);
    return 0;
}

static PyType_Slot Stop_slots[] = {
    {Py_tp_doc, "StopIteration, as the awaitables of aiotools end with a value."},
    {Py_tp_dealloc, Stop_dealloc},
    {Py_tp_traverse, Stop_traverse},
    {Py_tp_clear, Stop_clear},
    {0, NULL},
};

static PyType_Spec Stop_spec = {
    .name = "aiotools._aiotools.StopIteration",
    .basicsize = sizeof(PyStopIterationObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Stop_slots,
};

#if AIOT_FREELISTS
/* Nobody else has it, and nobody left anything in it. */
static bool
stop_is_fresh(PyObject *op)
{
    PyStopIterationObject *stop = (PyStopIterationObject *)op;
    return Py_REFCNT(op) == 1 && stop->dict == NULL && stop->notes == NULL && stop->traceback == NULL
           && stop->context == NULL && stop->cause == NULL && !stop->suppress_context
           && PyTuple_GET_SIZE(stop->args) == 0;
}

/* False is the most frequent value of all (what __aexit__ returns). It cannot be kept alive for too long, so one
 * exception serves for all of them as long as nobody catches and keeps it. */
static int
stop_with_false(aiot_state *state)
{
    PyObject *stop = state->stop_false;
    if (stop == NULL || !stop_is_fresh(stop)) {
        return 0;
    }
    PyErr_SetRaisedException(Py_NewRef(stop));
    return 1;
}
#endif

PyObject *
aiot_stop_iteration(aiot_state *state, PyObject *value)
{
    if (value == Py_None) {
        Py_DECREF(value);
        return NULL;
    }
#if AIOT_FREELISTS
    if (value == Py_False && stop_with_false(state)) {
        Py_DECREF(value);
        return NULL;
    }
#endif
    PyStopIterationObject *stop =
        (PyStopIterationObject *)aiot_free_list_alloc(&state->free_stops, state->StopIterationType);
    if (stop == NULL) {
        Py_DECREF(value);
        return NULL;
    }
    if ((stop->args = PyTuple_New(0)) == NULL) {
        Py_DECREF(value);
        Py_DECREF(stop);
        return NULL;
    }
    stop->value = value;
#if AIOT_FREELISTS
    if (value == Py_False) {
        Py_XSETREF(state->stop_false, Py_NewRef((PyObject *)stop));
    }
#endif
    PyErr_SetRaisedException((PyObject *)stop);
    return NULL;
}

PyObject *
aiot_stop_iteration_lent(aiot_state *state, PyObject *value)
{
#if AIOT_FREELISTS
    PyObject *stop = state->stop_lent;
    if (stop != NULL && value != Py_None) {
        if (AIOT_LIKELY(stop_is_fresh(stop))) {
            PyObject *old = ((PyStopIterationObject *)stop)->value;
            ((PyStopIterationObject *)stop)->value = value;
            PyErr_SetRaisedException(Py_NewRef(stop));
            /* What drops this may well raise and catch, and finds the exception in use. */
            if (AIOT_UNLIKELY(old != NULL)) {
                PyObject *pending = PyErr_GetRaisedException();
                Py_DECREF(old);
                PyErr_SetRaisedException(pending);
            }
            return NULL;
        }
        Py_CLEAR(state->stop_lent);
    }
    if (value != Py_None && state->stop_lent == NULL) {
        /* For the next time. A plain one, which is told from others without a walk through its bases. */
        state->stop_lent = PyObject_CallNoArgs(PyExc_StopIteration);
        if (state->stop_lent == NULL) {
            Py_DECREF(value);
            return NULL;
        }
        Py_CLEAR(((PyStopIterationObject *)state->stop_lent)->value);
    }
#endif
    return aiot_stop_iteration(state, value);
}

/* ---- the protocol ------------------------------------------------------------------------------------------ */

static const char *
awaitable_name(aiot_awaitable *self)
{
    return self->ops->name != NULL ? self->ops->name : Py_TYPE(self)->tp_name;
}

static int
awaitable_not_usable(aiot_awaitable *self)
{
    if (self->phase == AIOT_RUNNING) {
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
        return 1;
    }
    if (self->phase == AIOT_FINISHED) {
        PyErr_Format(PyExc_RuntimeError, "cannot reuse already awaited %s()", awaitable_name(self));
        return 1;
    }
    return 0;
}

/* As PEP 479 rules for coroutines: a StopIteration that leaves one would be taken for its result. */
static void
awaitable_replace_stop_iteration(aiot_awaitable *self)
{
    PyObject *stop = PyErr_GetRaisedException();
    PyErr_Format(PyExc_RuntimeError, "%s() raised StopIteration", awaitable_name(self));
    PyObject *exc = PyErr_GetRaisedException();
    PyException_SetContext(exc, Py_NewRef(stop));
    PyException_SetCause(exc, stop);
    PyErr_SetRaisedException(exc);
}

/* After a step. */
static inline void
awaitable_settle(aiot_awaitable *self, PySendResult answer)
{
    self->phase = answer == PYGEN_NEXT ? AIOT_SUSPENDED : AIOT_FINISHED;
    if (AIOT_UNLIKELY(answer == PYGEN_ERROR) && PyErr_ExceptionMatches(PyExc_StopIteration)) {
        awaitable_replace_stop_iteration(self);
    }
}

static PySendResult
awaitable_send_lock_held(aiot_awaitable *self, PyObject *value, PyObject **result)
{
    PySendResult answer;
    *result = NULL;
    if (self->phase == AIOT_SUSPENDED) {
        self->phase = AIOT_RUNNING;
        answer = self->ops->resume(self, value, result);
    }
    else {
        if (awaitable_not_usable(self)) {
            return PYGEN_ERROR;
        }
        if (value != Py_None) {
            PyErr_Format(PyExc_TypeError, "can't send non-None value to a just-started coroutine");
            return PYGEN_ERROR;
        }
        self->phase = AIOT_RUNNING;
        answer = self->ops->start(self, result);
    }
    awaitable_settle(self, answer);
    return answer;
}

PySendResult
aiot_awaitable_send(PyObject *op, PyObject *value, PyObject **result)
{
    PySendResult answer;
    Py_BEGIN_CRITICAL_SECTION(op);
    answer = awaitable_send_lock_held((aiot_awaitable *)op, value == NULL ? Py_None : value, result);
    Py_END_CRITICAL_SECTION();
    return answer;
}

PyObject *
aiot_awaitable_await(PyObject *op)
{
    aiot_awaitable *self = (aiot_awaitable *)op;
    if (self->phase == AIOT_FINISHED) {
        awaitable_not_usable(self);
        return NULL;
    }
    return Py_NewRef(op);
}

PyObject *
aiot_awaitable_iternext(PyObject *op)
{
    PyObject *result;
    switch (aiot_awaitable_send(op, Py_None, &result)) {
    case PYGEN_NEXT:
        return result;
    case PYGEN_RETURN:
        if (result == Py_None) {
            Py_DECREF(result);
            return NULL;
        }
        return aiot_stop_iteration(aiot_state_of_exact_type(Py_TYPE(op)), result);
    case PYGEN_ERROR:
    default:
        return NULL;
    }
}

/* What a Python-level call of send or throw gives for an answer: a method must raise, also for None. */
static PyObject *
awaitable_answer(PySendResult answer, PyObject *result)
{
    if (answer == PYGEN_NEXT) {
        return result;
    }
    if (answer == PYGEN_RETURN) {
        /* Not PyErr_SetObject(StopIteration, result): it would take a tuple or an exception apart. */
        PyObject *stop = result == Py_None ? PyObject_CallNoArgs(PyExc_StopIteration)
                                           : PyObject_CallOneArg(PyExc_StopIteration, result);
        Py_DECREF(result);
        if (stop != NULL) {
            PyErr_SetObject(PyExc_StopIteration, stop);
            Py_DECREF(stop);
        }
    }
    return NULL;
}

static PyObject *
awaitable_send_method(PyObject *op, PyObject *value)
{
    PyObject *result;
    PySendResult answer = aiot_awaitable_send(op, value, &result);
    return awaitable_answer(answer, result);
}

PyObject *
aiot_throw_argument(PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 3) {
        PyErr_Format(PyExc_TypeError, "throw() takes from 1 to 3 arguments (%zd given)", nargs);
        return NULL;
    }
    PyObject *type = args[0];
    PyObject *value = nargs > 1 ? args[1] : Py_None;
    PyObject *tb = nargs > 2 ? args[2] : Py_None;
    if (tb != Py_None && !PyTraceBack_Check(tb)) {
        PyErr_SetString(PyExc_TypeError, "throw() third argument must be a traceback object");
        return NULL;
    }
    PyObject *exc;
    if (PyExceptionInstance_Check(type)) {
        if (value != Py_None) {
            PyErr_SetString(PyExc_TypeError, "instance exception may not have a separate value");
            return NULL;
        }
        exc = Py_NewRef(type);
    }
    else if (PyExceptionClass_Check(type)) {
        int is_instance = PyObject_IsInstance(value, type);
        if (is_instance < 0) {
            return NULL;
        }
        if (is_instance) {
            exc = Py_NewRef(value);
        }
        else if (value == Py_None) {
            exc = PyObject_CallNoArgs(type);
        }
        else if (PyTuple_Check(value)) {
            exc = PyObject_CallObject(type, value);
        }
        else {
            exc = PyObject_CallOneArg(type, value);
        }
        if (exc == NULL) {
            return NULL;
        }
        if (!PyExceptionInstance_Check(exc)) {
            PyErr_Format(PyExc_TypeError, "calling %R should have returned an exception, not '%.200s'", type,
                         Py_TYPE(exc)->tp_name);
            Py_DECREF(exc);
            return NULL;
        }
    }
    else {
        PyErr_Format(PyExc_TypeError,
                     "exceptions must be classes or instances deriving from BaseException, not '%.200s'",
                     Py_TYPE(type)->tp_name);
        return NULL;
    }
    if (tb != Py_None && PyException_SetTraceback(exc, tb) < 0) {
        Py_DECREF(exc);
        return NULL;
    }
    return exc;
}

/* exc is borrowed. */
static PySendResult
awaitable_throw_lock_held(aiot_awaitable *self, PyObject *exc, PyObject **result)
{
    *result = NULL;
    if (awaitable_not_usable(self)) {
        return PYGEN_ERROR;
    }
    PySendResult answer = PYGEN_ERROR;
    bool suspended = self->phase == AIOT_SUSPENDED;
    self->phase = AIOT_RUNNING;
    if (suspended && self->ops->throw != NULL) {
        answer = self->ops->throw(self, exc, result);
    }
    else {
        if (suspended) {
            self->ops->abandon(self);
        }
        PyErr_SetRaisedException(Py_NewRef(exc));
    }
    awaitable_settle(self, answer);
    return answer;
}

static PyObject *
awaitable_throw(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *exc = aiot_throw_argument(args, nargs);
    if (exc == NULL) {
        return NULL;
    }
    PySendResult answer;
    PyObject *result;
    Py_BEGIN_CRITICAL_SECTION(op);
    answer = awaitable_throw_lock_held((aiot_awaitable *)op, exc, &result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(exc);
    return awaitable_answer(answer, result);
}

static int
awaitable_close_lock_held(aiot_awaitable *self)
{
    if (self->phase == AIOT_CREATED || self->phase == AIOT_FINISHED) {
        self->phase = AIOT_FINISHED;
        return 0;
    }
    if (awaitable_not_usable(self)) {
        return -1;
    }
    if (self->ops->throw == NULL) {
        self->phase = AIOT_RUNNING;
        self->ops->abandon(self);
        self->phase = AIOT_FINISHED;
        return 0;
    }
    PyObject *exit = PyObject_CallNoArgs(PyExc_GeneratorExit);
    if (exit == NULL) {
        return -1;
    }
    PyObject *result;
    PySendResult answer = awaitable_throw_lock_held(self, exit, &result);
    Py_DECREF(exit);
    if (answer == PYGEN_NEXT) {
        Py_DECREF(result);
        PyErr_SetString(PyExc_RuntimeError, "coroutine ignored GeneratorExit");
        return -1;
    }
    if (answer == PYGEN_RETURN) {
        Py_DECREF(result);
        return 0;
    }
    if (PyErr_ExceptionMatches(PyExc_GeneratorExit) || PyErr_ExceptionMatches(PyExc_StopIteration)) {
        PyErr_Clear();
        return 0;
    }
    return -1;
}

static PyObject *
awaitable_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(op);
    failed = awaitable_close_lock_held((aiot_awaitable *)op);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

void
aiot_awaitable_finalize(PyObject *op)
{
    aiot_awaitable *self = (aiot_awaitable *)op;
    if (self->phase == AIOT_FINISHED || (self->phase == AIOT_CREATED && (self->ops == NULL || self->ops->name == NULL))) {
        return;
    }
    PyObject *exc = PyErr_GetRaisedException();
    if (self->phase == AIOT_CREATED) {
        self->phase = AIOT_FINISHED;
        if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s' was never awaited", self->ops->name) < 0) {
            PyErr_WriteUnraisable(op);
        }
    }
    else if (awaitable_close_lock_held(self) < 0) {
        PyErr_WriteUnraisable(op);
    }
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
}

static PyObject *
awaitable_get_name(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(awaitable_name((aiot_awaitable *)op));
}

static PyObject *
awaitable_get_running(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((aiot_awaitable *)op)->phase == AIOT_RUNNING);
}

PyDoc_STRVAR(send_doc,
"send($self, value, /)\n--\n\n"
"Take one step: start, or go on after what was yielded is done.\n\n"
"Raises StopIteration with the result when finished. See PEP 492.");

PyDoc_STRVAR(throw_doc,
"throw($self, type, value=None, traceback=None, /)\n--\n\n"
"Raise an exception at the point of suspension, as Task.cancel() does.\n\n"
"What was being waited for is left first. See PEP 492.");

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"Leave what is being waited for and finish; never used, it finishes without a warning.");

PyMethodDef aiot_awaitable_methods[] = {
    {"send", awaitable_send_method, METH_O, send_doc},
    {"throw", (PyCFunction)(void (*)(void))awaitable_throw, METH_FASTCALL, throw_doc},
    {"close", awaitable_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

PyGetSetDef aiot_awaitable_getset[] = {
    {"__name__", awaitable_get_name, NULL, "The name of the function that made this.", NULL},
    {"__qualname__", awaitable_get_name, NULL, "The name of the function that made this.", NULL},
    {"cr_running", awaitable_get_running, NULL, "Whether it is being run right now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- awaitables that are done ----------------------------------------------------------------------------- */

typedef struct {
    AIOT_AWAITABLE_HEAD
    PyObject *value;
} DoneObject;

static PySendResult
Done_start(aiot_awaitable *op, PyObject **result)
{
    DoneObject *self = (DoneObject *)op;
    *result = self->value;
    self->value = NULL;
    return PYGEN_RETURN;
}

static const aiot_awaitable_ops Done_ops = {
    .name = NULL,
    .start = Done_start,
};

/* The shared one answers for ever. */
static PySendResult
Done_send(PyObject *op, PyObject *value, PyObject **result)
{
    if (((DoneObject *)op)->value == Py_None) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    return aiot_awaitable_send(op, value, result);
}

static PyObject *
Done_iternext(PyObject *op)
{
    DoneObject *self = (DoneObject *)op;
    if (self->value == Py_None) {
        return NULL;
    }
#ifndef Py_GIL_DISABLED
    /* What aiot_awaitable_iternext() does, for the one thing that it does nearly always. */
    if (AIOT_LIKELY(self->phase == AIOT_CREATED)) {
        PyObject *value = self->value;
        self->value = NULL;
        self->phase = AIOT_FINISHED;
        return aiot_stop_iteration_lent(aiot_state_of_exact_type(Py_TYPE(op)), value);
    }
#endif
    return aiot_awaitable_iternext(op);
}

static PyObject *
Done_send_method(PyObject *op, PyObject *value)
{
    PyObject *result;
    PySendResult answer = Done_send(op, value, &result);
    return awaitable_answer(answer, result);
}

/* It never suspends, so an exception can only be thrown in before it ran. */
static PyObject *
Done_throw(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (((DoneObject *)op)->value != Py_None) {
        return awaitable_throw(op, args, nargs);
    }
    PyObject *exc = aiot_throw_argument(args, nargs);
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
    return NULL;
}

static PyObject *
Done_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (((DoneObject *)op)->value != Py_None) {
        return awaitable_close(op, NULL);
    }
    Py_RETURN_NONE;
}

static PyMethodDef Done_methods[] = {
    {"send", Done_send_method, METH_O, send_doc},
    {"throw", (PyCFunction)(void (*)(void))Done_throw, METH_FASTCALL, throw_doc},
    {"close", Done_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static int
Done_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((DoneObject *)op)->value);
    return 0;
}

static int
Done_clear(PyObject *op)
{
    Py_CLEAR(((DoneObject *)op)->value);
    return 0;
}

static void
Done_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, Done_dealloc)
    Py_CLEAR(((DoneObject *)op)->value);
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    if (state != NULL) {
        aiot_stop_forget(state);
    }
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_dones, op);
    AIOT_TRASHCAN_END
}

static PyType_Slot Done_slots[] = {
    {Py_tp_doc, "An awaitable that is already done."},
    {Py_am_await, aiot_awaitable_await},
    {Py_am_send, Done_send},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, Done_iternext},
    {Py_tp_methods, Done_methods},
    {Py_tp_getset, aiot_awaitable_getset},
    {Py_tp_traverse, Done_traverse},
    {Py_tp_clear, Done_clear},
    {Py_tp_dealloc, Done_dealloc},
    {0, NULL},
};

static PyType_Spec Done_spec = {
    .name = "aiotools._aiotools.Done",
    .basicsize = sizeof(DoneObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Done_slots,
};

PyObject *
aiot_done_new(aiot_state *state, PyObject *value)
{
    DoneObject *self = (DoneObject *)aiot_free_list_alloc(&state->free_dones, state->DoneType);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, &Done_ops);
    self->value = Py_NewRef(value);
    return (PyObject *)self;
}

int
aiot_awaitable_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->StopIterationType, &Stop_spec, PyExc_StopIteration, false) < 0
        || aiot_add_type(module, &state->DoneType, &Done_spec, NULL, false) < 0)
    {
        return -1;
    }
    state->done_none = aiot_done_new(state, Py_None);
    return state->done_none == NULL ? -1 : 0;
}
