/* ctxmgr.c: AsyncContextManager, which drives an asynchronous generator as contextlib's does.
 *
 * States:     of a manager: CREATED -> ENTERED. Nothing else is remembered; the generator knows the rest.
 * Steps:      what __aenter__ and __aexit__ return is an awaitable of ours (awaitable.h) that passes on what the
 *             awaitables of the generator (__anext__, asend, athrow, aclose) yield, and judges how they end.
 * Locking:    the fields of a manager belong to its critical section, those of a step to its own.
 * Re-entry:   every step runs the user's generator. A manager's fields are fetched as new references before that and
 *             not looked at after it.
 */

#include "ctxmgr.h"

#include "args.h"
#include "awaitable.h"
#include "drive.h"
#include "freelist.h"

typedef struct {
    PyObject_HEAD
    PyObject *gen;
    PyObject *func;             /* func, args and kwds are hidden from Python once it was entered */
    PyObject *args;
    PyObject *kwds;             /* NULL: none */
    PyObject *dict;
    PyObject *weakrefs;
    bool entered;
    bool is_exact;              /* made by ctxmgr_new, and not of a subclass */
    bool sends;                 /* the clean exit sends self.yield_return, and func, args, kwds stay */
} CtxMgrObject;

typedef enum {
    STEP_ENTER,                 /* __anext__: has to yield */
    STEP_EXIT,                  /* __anext__ or asend: has to end */
    STEP_THROW,                 /* athrow: has to end, or to raise */
    STEP_CLOSE,                 /* aclose after the generator yielded when it had to end; `error` is raised then */
} ctx_step;

typedef struct {
    AIOT_AWAITABLE_HEAD
    uint8_t step;
    PyObject *manager;
    PyObject *inner;            /* the iterator that is being driven */
    PyObject *type;             /* STEP_THROW: the arguments of __aexit__ */
    PyObject *value;
    PyObject *traceback;
    PyObject *error;            /* STEP_CLOSE */
} CtxStepObject;

/* ---- reuse of memory -------------------------------------------------------------------------------------- */

/* An `async with` of an actxmgr makes a manager and two steps. Keeping their memory saves it a tenth of its time,
 * and the collector some of its runs. */
#define STEP_ALLOC(state) aiot_free_list_alloc(&(state)->free_ctx_steps, (state)->CtxStepType)
#define MANAGER_ALLOC(state) aiot_free_list_alloc(&(state)->free_ctx_managers, (state)->CtxMgrType)

/* ---- the manager's fields --------------------------------------------------------------------------------- */

static PyObject *
ctxmgr_get(CtxMgrObject *self, PyObject **field)
{
    PyObject *value;
    Py_BEGIN_CRITICAL_SECTION(self);
    value = Py_XNewRef(*field);
    Py_END_CRITICAL_SECTION();
    return value;
}

static PyObject *
ctxmgr_get_gen(CtxMgrObject *self)
{
    PyObject *gen = ctxmgr_get(self, &self->gen);
    if (gen == NULL) {
        PyErr_Format(PyExc_AttributeError, "'%.200s' object has no attribute 'gen'", Py_TYPE(self)->tp_name);
    }
    return gen;
}

/* Marks it as entered and drops what only a copy of it would need. 0, or -1 when it was entered before. */
static int
ctxmgr_use_up(CtxMgrObject *self)
{
    PyObject *args = NULL, *kwds = NULL;
    bool used;
    Py_BEGIN_CRITICAL_SECTION(self);
    used = self->entered;
    self->entered = true;
    if (!self->sends) {
        args = self->args;
        kwds = self->kwds;
        self->args = self->kwds = NULL;
    }
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(args);
    Py_XDECREF(kwds);
    if (used) {
        PyErr_Format(PyExc_AttributeError,
                     "'%.200s' object can be entered only once, and was entered already; call its function again",
                     Py_TYPE(self)->tp_name);
        return -1;
    }
    return 0;
}

/* ---- steps ------------------------------------------------------------------------------------------------ */

static inline aiot_state *
step_state(CtxStepObject *self)
{
    return aiot_state_of_exact_type(Py_TYPE(self));
}

/* Begins to drive awaitable, which is stolen and may be NULL (an exception is pending then). */
static PySendResult
step_drive(CtxStepObject *self, PyObject *awaitable, PyObject **result)
{
    if (awaitable == NULL) {
        return PYGEN_ERROR;
    }
    PyObject *iter = aiot_await_iter(step_state(self), awaitable);
    Py_DECREF(awaitable);
    if (iter == NULL) {
        return PYGEN_ERROR;
    }
    Py_XSETREF(self->inner, iter);
    return PyIter_Send(iter, Py_None, result);
}

static PyObject *
gen_anext(PyObject *gen)
{
    PyAsyncMethods *methods = Py_TYPE(gen)->tp_as_async;
    if (methods == NULL || methods->am_anext == NULL) {
        PyErr_Format(PyExc_TypeError, "'%.200s' object is not an async iterator", Py_TYPE(gen)->tp_name);
        return NULL;
    }
    return methods->am_anext(gen);
}

static PySendResult
return_bool(int value, PyObject **result)
{
    *result = PyBool_FromLong(value);
    return PYGEN_RETURN;
}

/* A new RuntimeError as `raise` makes it, with the exception that is being handled as its context. */
static PyObject *
new_runtime_error(const char *text)
{
    PyErr_SetString(PyExc_RuntimeError, text);
    return PyErr_GetRaisedException();
}

/* The generator yielded when it had to end: close it, then raise. Drops what it yielded. */
static PySendResult
step_did_not_stop(CtxStepObject *self, const char *text, PyObject **result)
{
    Py_CLEAR(*result);
    PyObject *error = new_runtime_error(text);
    if (error == NULL) {
        return PYGEN_ERROR;
    }
    self->step = STEP_CLOSE;
    Py_XSETREF(self->error, error);
    PyObject *gen = ctxmgr_get_gen((CtxMgrObject *)self->manager);
    if (gen == NULL) {
        return PYGEN_ERROR;
    }
    PyObject *awaitable = PyObject_CallMethodNoArgs(gen, step_state(self)->str_aclose);
    Py_DECREF(gen);
    return step_drive(self, awaitable, result);
}

/* STEP_CLOSE failed: what is pending was raised while `error` was being handled, which the interpreter did not know.
 * (What the generator raised in a handler of its own has another context, and keeps it.) */
static void
chain_close_failure(PyObject *error)
{
    PyObject *failure = PyErr_GetRaisedException();
    PyObject *context = PyException_GetContext(failure);
    PyObject *handled = PyException_GetContext(error);
    if (context == handled && failure != error) {
        PyException_SetContext(failure, Py_NewRef(error));
    }
    Py_XDECREF(context);
    Py_XDECREF(handled);
    PyErr_SetRaisedException(failure);
}

static PySendResult
step_enter_ended(void)
{
    if (!PyErr_ExceptionMatches(PyExc_StopAsyncIteration)) {
        return PYGEN_ERROR;
    }
    /* raise RuntimeError(...) from None, in the handler of the StopAsyncIteration */
    PyObject *stop = PyErr_GetRaisedException();
    PyObject *error = new_runtime_error("generator didn't yield");
    if (error == NULL) {
        Py_DECREF(stop);
        return PYGEN_ERROR;
    }
    PyException_SetContext(error, stop);
    PyException_SetCause(error, NULL);
    PyErr_SetRaisedException(error);
    return PYGEN_ERROR;
}

static int
is_stop(PyObject *exc)
{
    return PyErr_GivenExceptionMatches(exc, PyExc_StopIteration)
           || PyErr_GivenExceptionMatches(exc, PyExc_StopAsyncIteration);
}

/* The exception of the body has left the generator as it is: not suppressed, and not this method's failure. */
static PySendResult
step_not_suppressed(CtxStepObject *self, PyObject **result)
{
    if (PyException_SetTraceback(self->value, self->traceback) < 0) {
        return PYGEN_ERROR;
    }
    return return_bool(0, result);
}

/* athrow raised. Whether that is the exception of the body once more decides. */
static PySendResult
step_throw_ended(CtxStepObject *self, PyObject **result)
{
    PyObject *exc = PyErr_GetRaisedException();
    PySendResult answer;
    if (PyErr_GivenExceptionMatches(exc, PyExc_StopAsyncIteration)) {
        /* The end of the generator, unless the body raised it. */
        answer = return_bool(exc != self->value, result);
    }
    else if (exc == self->value) {
        answer = step_not_suppressed(self, result);
    }
    else {
        /* A Stop(Async)Iteration that leaves a generator is wrapped by a RuntimeError on its way. */
        PyObject *cause = NULL;
        if (PyErr_GivenExceptionMatches(exc, PyExc_RuntimeError) && is_stop(self->value)) {
            cause = PyException_GetCause(exc);
        }
        if (cause != NULL && cause == self->value) {
            answer = step_not_suppressed(self, result);
        }
        else {
            PyErr_SetRaisedException(Py_NewRef(exc));
            answer = PYGEN_ERROR;
        }
        Py_XDECREF(cause);
    }
    Py_DECREF(exc);
    return answer;
}

/* What the generator's awaitable answered, as an answer of ours. */
static PySendResult
step_judge(CtxStepObject *self, PySendResult answer, PyObject **result)
{
    if (answer == PYGEN_NEXT) {
        return answer;
    }
    switch ((ctx_step)self->step) {
    case STEP_ENTER:
        return answer == PYGEN_RETURN ? answer : step_enter_ended();
    case STEP_EXIT:
        if (answer == PYGEN_ERROR) {
            if (!PyErr_ExceptionMatches(PyExc_StopAsyncIteration)) {
                return answer;
            }
            PyErr_Clear();
            return return_bool(0, result);
        }
        answer = step_did_not_stop(self, "generator didn't stop", result);
        break;
    case STEP_THROW:
        if (answer == PYGEN_ERROR) {
            return step_throw_ended(self, result);
        }
        answer = step_did_not_stop(self, "generator didn't stop after athrow()", result);
        break;
    case STEP_CLOSE:
        break;
    }
    /* STEP_CLOSE, just begun or going on. */
    if (self->error == NULL) {
        return answer;
    }
    if (answer == PYGEN_RETURN) {
        Py_CLEAR(*result);
        PyErr_SetRaisedException(Py_NewRef(self->error));
        answer = PYGEN_ERROR;
    }
    else if (answer == PYGEN_ERROR) {
        chain_close_failure(self->error);
    }
    return answer;
}

static void
step_clear(CtxStepObject *self)
{
    Py_CLEAR(self->inner);
    Py_CLEAR(self->manager);
    Py_CLEAR(self->type);
    Py_CLEAR(self->value);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->error);
}

/* An awaitable that is done lets go of all that it held, as a finished coroutine does. */
static PySendResult
step_answer(CtxStepObject *self, PySendResult answer, PyObject **result)
{
    answer = step_judge(self, answer, result);
    if (answer == PYGEN_RETURN) {
        step_clear(self);
    }
    else if (answer == PYGEN_ERROR) {
        PyObject *exc = PyErr_GetRaisedException();
        step_clear(self);
        PyErr_SetRaisedException(exc);
    }
    return answer;
}

static PySendResult
Step_start_enter(aiot_awaitable *op, PyObject **result)
{
    CtxStepObject *self = (CtxStepObject *)op;
    CtxMgrObject *manager = (CtxMgrObject *)self->manager;
    PySendResult answer = PYGEN_ERROR;
    PyObject *gen = NULL;
    if (ctxmgr_use_up(manager) == 0 && (gen = ctxmgr_get_gen(manager)) != NULL) {
        answer = step_drive(self, gen_anext(gen), result);
        Py_DECREF(gen);
    }
    return step_answer(self, answer, result);
}

static PyObject *
send_yield_return(aiot_state *state, PyObject *manager, PyObject *gen)
{
    PyObject *value = PyObject_GetAttr(manager, state->str_yield_return);
    if (value == NULL) {
        return NULL;
    }
    PyObject *awaitable = PyObject_CallMethodOneArg(gen, state->str_asend, value);
    Py_DECREF(value);
    return awaitable;
}

static PyObject *
throw_value(CtxStepObject *self, PyObject *gen)
{
    if (self->value == Py_None) {
        /* It has to be an instance, or it could not be told from another when it comes back. */
        PyObject *value = PyObject_CallNoArgs(self->type);
        if (value == NULL) {
            return NULL;
        }
        Py_SETREF(self->value, value);
    }
    PyObject *athrow = step_state(self)->str_athrow;
#if PY_VERSION_HEX >= 0x030C0000
    return PyObject_CallMethodOneArg(gen, athrow, self->value);
#else
    return PyObject_CallMethodObjArgs(gen, athrow, self->type, self->value, self->traceback, NULL);
#endif
}

static PySendResult
Step_start_exit(aiot_awaitable *op, PyObject **result)
{
    CtxStepObject *self = (CtxStepObject *)op;
    CtxMgrObject *manager = (CtxMgrObject *)self->manager;
    PySendResult answer = PYGEN_ERROR;
    PyObject *gen = ctxmgr_get_gen(manager);
    if (gen != NULL) {
        PyObject *awaitable;
        if (self->step == STEP_THROW) {
            awaitable = throw_value(self, gen);
        }
        else if (manager->sends) {
            awaitable = send_yield_return(step_state(self), self->manager, gen);
        }
        else {
            awaitable = gen_anext(gen);
        }
        if (awaitable == NULL) {
            /* Not what the generator raised: nothing to judge. */
            Py_DECREF(gen);
            PyObject *exc = PyErr_GetRaisedException();
            step_clear(self);
            PyErr_SetRaisedException(exc);
            return PYGEN_ERROR;
        }
        answer = step_drive(self, awaitable, result);
        Py_DECREF(gen);
    }
    return step_answer(self, answer, result);
}

static PySendResult
Step_resume(aiot_awaitable *op, PyObject *value, PyObject **result)
{
    CtxStepObject *self = (CtxStepObject *)op;
    PyObject *inner = Py_NewRef(self->inner);
    PySendResult answer = PyIter_Send(inner, value, result);
    Py_DECREF(inner);
    return step_answer(self, answer, result);
}

static PySendResult
Step_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    CtxStepObject *self = (CtxStepObject *)op;
    PyObject *inner = Py_NewRef(self->inner);
    PySendResult answer = aiot_iter_throw(step_state(self), inner, exc, result);
    Py_DECREF(inner);
    return step_answer(self, answer, result);
}

/* The short way for the first step of an __aenter__ or a clean __aexit__ with a genuine generator, whose awaitables are
 * their own iterators. Most generators neither suspend there nor fail: the whole step is done then, and the
 * StopIteration in which the generator's awaitable hands over what was yielded is passed on rather than made again.
 * gen is stolen. Returns as tp_iternext does. */
static PyObject *
step_short_lock_held(CtxStepObject *self, PyObject *gen)
{
    PyObject *result = NULL;
    self->phase = AIOT_RUNNING;
    if (self->step == STEP_ENTER && ctxmgr_use_up((CtxMgrObject *)self->manager) < 0) {
        Py_DECREF(gen);
        self->phase = AIOT_FINISHED;
        return NULL;
    }
    PyObject *inner = Py_TYPE(gen)->tp_as_async->am_anext(gen);
    Py_DECREF(gen);
    if (inner != NULL) {
        result = Py_TYPE(inner)->tp_iternext(inner);
        if (result != NULL) {
            self->inner = inner;
            self->phase = AIOT_SUSPENDED;
            return result;
        }
        Py_DECREF(inner);
    }
    if (self->step == STEP_ENTER && (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_StopIteration))) {
        self->phase = AIOT_FINISHED;
        return NULL;
    }
    if (self->step == STEP_EXIT && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_StopAsyncIteration)) {
        PyErr_Clear();
        self->phase = AIOT_FINISHED;
        Py_CLEAR(self->manager);
        return aiot_stop_iteration(step_state(self), Py_NewRef(Py_False));
    }
    PySendResult answer = step_answer(self, aiot_fetch_return(&result), &result);
    self->phase = answer == PYGEN_NEXT ? AIOT_SUSPENDED : AIOT_FINISHED;
    AIOT_CHECK(answer != PYGEN_RETURN);
    return result;
}

/* 3.15 asks am_send first, where no StopIteration is needed. */
static PySendResult
step_short_send_lock_held(CtxStepObject *self, PyObject *gen, PyObject **result)
{
    PySendResult answer = PYGEN_ERROR;
    self->phase = AIOT_RUNNING;
    if (self->step == STEP_ENTER && ctxmgr_use_up((CtxMgrObject *)self->manager) < 0) {
        Py_DECREF(gen);
        self->phase = AIOT_FINISHED;
        return PYGEN_ERROR;
    }
    PyObject *inner = Py_TYPE(gen)->tp_as_async->am_anext(gen);
    Py_DECREF(gen);
    if (inner != NULL) {
        answer = PyIter_Send(inner, Py_None, result);
        if (answer == PYGEN_NEXT) {
            self->inner = inner;
            self->phase = AIOT_SUSPENDED;
            return answer;
        }
        Py_DECREF(inner);
    }
    if (self->step == STEP_ENTER && answer == PYGEN_RETURN) {
        self->phase = AIOT_FINISHED;
        return answer;
    }
    if (self->step == STEP_EXIT && answer == PYGEN_ERROR && PyErr_ExceptionMatches(PyExc_StopAsyncIteration)) {
        PyErr_Clear();
        self->phase = AIOT_FINISHED;
        Py_CLEAR(self->manager);
        return return_bool(0, result);
    }
    answer = step_answer(self, answer, result);
    self->phase = answer == PYGEN_NEXT ? AIOT_SUSPENDED : AIOT_FINISHED;
    return answer;
}

/* The generator, if the next step is the first and can go the short way. New reference or NULL; no exception. */
static PyObject *
step_get_short_lock_held(CtxStepObject *self)
{
    CtxMgrObject *manager = (CtxMgrObject *)self->manager;
    if (self->phase != AIOT_CREATED || self->step > STEP_EXIT || manager->sends) {
        return NULL;
    }
    PyObject *gen = ctxmgr_get(manager, &manager->gen);
    if (gen != NULL && !PyAsyncGen_CheckExact(gen)) {
        Py_CLEAR(gen);
    }
    return gen;
}

static PyObject *
Step_iternext(PyObject *op)
{
    CtxStepObject *self = (CtxStepObject *)op;
    PyObject *result = NULL;
    bool is_short = false;
    Py_BEGIN_CRITICAL_SECTION(op);
    PyObject *gen = step_get_short_lock_held(self);
    if (gen != NULL) {
        is_short = true;
        result = step_short_lock_held(self, gen);
    }
    Py_END_CRITICAL_SECTION();
    return is_short ? result : aiot_awaitable_iternext(op);
}

static PySendResult
Step_send(PyObject *op, PyObject *value, PyObject **result)
{
    CtxStepObject *self = (CtxStepObject *)op;
    PySendResult answer = PYGEN_ERROR;
    bool is_short = false;
    Py_BEGIN_CRITICAL_SECTION(op);
    PyObject *gen = value == Py_None ? step_get_short_lock_held(self) : NULL;
    if (gen != NULL) {
        is_short = true;
        *result = NULL;
        answer = step_short_send_lock_held(self, gen, result);
    }
    Py_END_CRITICAL_SECTION();
    return is_short ? answer : aiot_awaitable_send(op, value, result);
}

static const aiot_awaitable_ops enter_ops = {
    .name = "AsyncContextManager.__aenter__",
    .start = Step_start_enter,
    .resume = Step_resume,
    .throw = Step_throw,
};

static const aiot_awaitable_ops exit_ops = {
    .name = "AsyncContextManager.__aexit__",
    .start = Step_start_exit,
    .resume = Step_resume,
    .throw = Step_throw,
};

static CtxStepObject *
step_new(aiot_state *state, const aiot_awaitable_ops *ops, ctx_step step, CtxMgrObject *manager)
{
    CtxStepObject *self = (CtxStepObject *)STEP_ALLOC(state);
    if (self != NULL) {
        aiot_awaitable_init(self, ops);
        self->step = step;
        self->manager = Py_NewRef((PyObject *)manager);
    }
    return self;
}

static int
Step_traverse(PyObject *op, visitproc visit, void *arg)
{
    CtxStepObject *self = (CtxStepObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->manager);
    Py_VISIT(self->inner);
    Py_VISIT(self->type);
    Py_VISIT(self->value);
    Py_VISIT(self->traceback);
    Py_VISIT(self->error);
    return 0;
}

static int
Step_clear(PyObject *op)
{
    step_clear((CtxStepObject *)op);
    return 0;
}

static void
Step_dealloc(PyObject *op)
{
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    step_clear((CtxStepObject *)op);
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_ctx_steps, op);
}

/* Introspection goes on to the frame of the generator, which contextlib's coroutine would hide. */
static PyObject *
step_ask_generator(PyObject *op, PyObject *name)
{
    PyObject *manager;
    Py_BEGIN_CRITICAL_SECTION(op);
    manager = Py_XNewRef(((CtxStepObject *)op)->manager);
    Py_END_CRITICAL_SECTION();
    PyObject *gen = manager == NULL ? NULL : ctxmgr_get((CtxMgrObject *)manager, &((CtxMgrObject *)manager)->gen);
    Py_XDECREF(manager);
    PyObject *answer = NULL;
    if (gen != NULL && PyObject_GetOptionalAttr(gen, name, &answer) == 0) {
        answer = Py_NewRef(Py_None);
    }
    if (gen == NULL) {
        answer = Py_NewRef(Py_None);
    }
    Py_XDECREF(gen);
    return answer;
}

static PyObject *
Step_get_frame(PyObject *op, void *Py_UNUSED(closure))
{
    return step_ask_generator(op, step_state((CtxStepObject *)op)->str_ag_frame);
}

static PyObject *
Step_get_await(PyObject *op, void *Py_UNUSED(closure))
{
    return step_ask_generator(op, step_state((CtxStepObject *)op)->str_ag_await);
}

static PyObject *
Step_get_name(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(((aiot_awaitable *)op)->ops->name);
}

static PyObject *
Step_get_running(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((aiot_awaitable *)op)->phase == AIOT_RUNNING);
}

static PyGetSetDef Step_getset[] = {
    {"__name__", Step_get_name, NULL, "The name of the method that made this.", NULL},
    {"__qualname__", Step_get_name, NULL, "The name of the method that made this.", NULL},
    {"cr_running", Step_get_running, NULL, "Whether it is being run right now.", NULL},
    {"cr_frame", Step_get_frame, NULL, "The frame of the generator, or None.", NULL},
    {"cr_await", Step_get_await, NULL, "What the generator is awaiting, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Step_slots[] = {
    {Py_tp_doc, "What __aenter__() and __aexit__() of an AsyncContextManager return: await it, once."},
    {Py_am_await, aiot_awaitable_await},
    {Py_am_send, Step_send},
    {Py_tp_iternext, Step_iternext},
    {Py_tp_methods, aiot_awaitable_methods},
    {Py_tp_finalize, aiot_awaitable_finalize},
    {Py_tp_getset, Step_getset},
    {Py_tp_traverse, Step_traverse},
    {Py_tp_clear, Step_clear},
    {Py_tp_dealloc, Step_dealloc},
    {0, NULL},
};

static PyType_Spec Step_spec = {
    .name = "aiotools._aiotools.AsyncContextManagerStep",
    .basicsize = sizeof(CtxStepObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Step_slots,
};

/* ---- AsyncContextManager ---------------------------------------------------------------------------------- */

PyDoc_STRVAR(CtxMgr_aenter_doc,
"__aenter__($self, /)\n--\n\n"
"Run the generator to its yield; await it for what it yields.\n\n"
"Raises AttributeError when this was done before, RuntimeError when the\n"
"generator ends without a yield, and what the generator raises.");

static PyObject *
CtxMgr_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    if (state == NULL) {
        return NULL;
    }
    return (PyObject *)step_new(state, &enter_ops, STEP_ENTER, (CtxMgrObject *)op);
}

PyDoc_STRVAR(CtxMgr_aexit_doc,
"__aexit__($self, typ, value, traceback, /)\n--\n\n"
"Run the generator to its end; await it for whether the exception is suppressed.\n\n"
"An exception of the body is raised at the yield. Raises what the generator\n"
"raises, unless that is the same exception, and RuntimeError when it yields\n"
"again; it is closed then.");

static PyObject *
CtxMgr_aexit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    if (state == NULL) {
        return NULL;
    }
    if (nargs != 3) {
        PyErr_Format(PyExc_TypeError, "__aexit__() takes exactly 3 arguments (%zd given)", nargs);
        return NULL;
    }
    ctx_step step = args[0] == Py_None ? STEP_EXIT : STEP_THROW;
    CtxStepObject *exit = step_new(state, &exit_ops, step, (CtxMgrObject *)op);
    if (exit != NULL && step == STEP_THROW) {
        exit->type = Py_NewRef(args[0]);
        exit->value = Py_NewRef(args[1]);
        exit->traceback = Py_NewRef(args[2]);
    }
    return (PyObject *)exit;
}

/* An attribute that goes when the manager is entered. New reference. */
static PyObject *
ctxmgr_unused_part(CtxMgrObject *self, const char *name)
{
    PyObject *value = NULL;
    bool missing = false;
    Py_BEGIN_CRITICAL_SECTION(self);
    if ((self->entered && !self->sends) || self->func == NULL) {
        missing = true;
    }
    else {
        PyObject **field = name[0] == 'f' ? &self->func : name[0] == 'a' ? &self->args : &self->kwds;
        if (*field == NULL) {
            *field = PyDict_New();
        }
        value = Py_XNewRef(*field);
    }
    Py_END_CRITICAL_SECTION();
    if (missing) {
        PyErr_Format(PyExc_AttributeError, "'%.200s' object has no attribute '%s'%s", Py_TYPE(self)->tp_name, name,
                     self->entered ? ": it was entered" : "");
    }
    return value;
}

static PyObject *
CtxMgr_get_part(PyObject *op, void *name)
{
    return ctxmgr_unused_part((CtxMgrObject *)op, (const char *)name);
}

PyDoc_STRVAR(CtxMgr_recreate_doc,
"_recreate_cm($self, /)\n--\n\n"
"A new manager of the same function and arguments; the decorator makes one per call.");

static PyObject *
CtxMgr_recreate(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    CtxMgrObject *self = (CtxMgrObject *)op;
    PyObject *func = NULL, *args = NULL, *kwds = NULL, *copy = NULL;
    if ((func = ctxmgr_unused_part(self, "func")) != NULL
        && (args = ctxmgr_unused_part(self, "args")) != NULL
        && (kwds = ctxmgr_unused_part(self, "kwds")) != NULL)
    {
        copy = PyObject_CallFunctionObjArgs((PyObject *)Py_TYPE(op), func, args, kwds, NULL);
    }
    Py_XDECREF(func);
    Py_XDECREF(args);
    Py_XDECREF(kwds);
    return copy;
}

PyDoc_STRVAR(CtxMgr_copy_doc,
"__copy__($self, /)\n--\n\n"
"A manager of the same generator, as copy.copy() makes one.");

/* Objects of Python are copied by their dict. What is here in C has to be copied as well. */
static PyObject *
CtxMgr_copy(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    CtxMgrObject *self = (CtxMgrObject *)op;
    CtxMgrObject *copy = (CtxMgrObject *)Py_TYPE(op)->tp_alloc(Py_TYPE(op), 0);
    if (copy == NULL) {
        return NULL;
    }
    PyObject *dict;
    Py_BEGIN_CRITICAL_SECTION(self);
    copy->gen = Py_XNewRef(self->gen);
    copy->func = Py_XNewRef(self->func);
    copy->args = Py_XNewRef(self->args);
    copy->kwds = Py_XNewRef(self->kwds);
    copy->entered = self->entered;
    copy->sends = self->sends;
    dict = Py_XNewRef(self->dict);
    Py_END_CRITICAL_SECTION();
    if (dict != NULL) {
        copy->dict = PyDict_Copy(dict);
        Py_DECREF(dict);
        if (copy->dict == NULL) {
            Py_CLEAR(copy);
        }
    }
    return (PyObject *)copy;
}

/* The decorator is contextlib's, which knows what kinds of functions this Python can decorate. */
static PyObject *
CtxMgr_call(PyObject *op, PyObject *args, PyObject *kwargs)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    if (state == NULL) {
        return NULL;
    }
    Py_ssize_t n = PyTuple_GET_SIZE(args);
    PyObject *all = PyTuple_New(n + 1);
    if (all == NULL) {
        return NULL;
    }
    PyTuple_SET_ITEM(all, 0, Py_NewRef(op));
    for (Py_ssize_t i = 0; i < n; i++) {
        PyTuple_SET_ITEM(all, i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
    }
    PyObject *decorated = PyObject_Call(state->decorator_call, all, kwargs);
    Py_DECREF(all);
    return decorated;
}

/* Instances have the docstring of their function, as contextlib's have. A getset would hide the type's own. */
static PyObject *
ctxmgr_get_doc(CtxMgrObject *self, PyObject *name)
{
    PyObject *dict = ctxmgr_get(self, &self->dict);
    PyObject *doc = NULL;
    if (dict != NULL) {
        int found = PyDict_GetItemRef(dict, name, &doc);
        Py_DECREF(dict);
        if (found != 0) {
            return doc;
        }
    }
    PyObject *func = ctxmgr_get(self, &self->func);
    if (func != NULL) {
        int found = PyObject_GetOptionalAttr(func, name, &doc);
        Py_DECREF(func);
        if (found < 0 || (found > 0 && doc != Py_None)) {
            return doc;
        }
        Py_XDECREF(doc);
    }
    return PyObject_GenericGetAttr((PyObject *)self, name);
}

static PyObject *
CtxMgr_getattro(PyObject *op, PyObject *name)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    if (state == NULL) {
        return NULL;
    }
    /* Attribute names in code are interned. */
    if (name == state->str___doc__) {
        return ctxmgr_get_doc((CtxMgrObject *)op, name);
    }
    return PyObject_GenericGetAttr(op, name);
}

/* Steals nothing; fills in a manager of which no other thread knows. 0 or -1. */
static void
ctxmgr_fill(CtxMgrObject *self, PyObject *gen, PyObject *func, PyObject *args, PyObject *kwds)
{
    PyObject *old[4] = {NULL};
    Py_BEGIN_CRITICAL_SECTION(self);
    old[0] = self->gen;
    old[1] = self->func;
    old[2] = self->args;
    old[3] = self->kwds;
    self->gen = gen;
    self->func = Py_NewRef(func);
    self->args = args;
    self->kwds = kwds;
    self->entered = false;
    Py_END_CRITICAL_SECTION();
    for (int i = 0; i < 4; i++) {
        Py_XDECREF(old[i]);
    }
}

static PyObject *
mapping_as_dict(PyObject *mapping)
{
    PyObject *dict = PyDict_New();
    if (dict != NULL && PyDict_Update(dict, mapping) < 0) {
        Py_CLEAR(dict);
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Format(PyExc_TypeError, "kwds must be a mapping, not '%.200s'", Py_TYPE(mapping)->tp_name);
        }
    }
    return dict;
}

static int
CtxMgr_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {
        "AsyncContextManager", 3, 3, 3, {AIOT_NAME(func), AIOT_NAME(args), AIOT_NAME(kwds)}};
    CtxMgrObject *self = (CtxMgrObject *)op;
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    PyObject *given[3];
    if (state == NULL || aiot_bind_tuple(state, &params, args, kwargs, given) < 0) {
        return -1;
    }
    PyObject *call_args = NULL, *call_kwds = NULL, *gen = NULL;
    if ((call_args = PySequence_Tuple(given[1])) == NULL
        || (call_kwds = mapping_as_dict(given[2])) == NULL
        || (gen = PyObject_Call(given[0], call_args, call_kwds)) == NULL)
    {
        Py_XDECREF(call_args);
        Py_XDECREF(call_kwds);
        return -1;
    }
    self->sends = PyType_IsSubtype(Py_TYPE(op), state->SendingCtxMgrType);
    ctxmgr_fill(self, gen, given[0], call_args, call_kwds);
    return 0;
}

static int
CtxMgr_traverse(PyObject *op, visitproc visit, void *arg)
{
    CtxMgrObject *self = (CtxMgrObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->gen);
    Py_VISIT(self->func);
    Py_VISIT(self->args);
    Py_VISIT(self->kwds);
    Py_VISIT(self->dict);
    return 0;
}

static int
CtxMgr_clear(PyObject *op)
{
    CtxMgrObject *self = (CtxMgrObject *)op;
    Py_CLEAR(self->gen);
    Py_CLEAR(self->func);
    Py_CLEAR(self->args);
    Py_CLEAR(self->kwds);
    Py_CLEAR(self->dict);
    return 0;
}

static void
CtxMgr_dealloc(PyObject *op)
{
    CtxMgrObject *self = (CtxMgrObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    CtxMgr_clear(op);
    if (self->is_exact) {
        aiot_state *state = aiot_state_for_dealloc(type);
        aiot_free_list_free(state, state == NULL ? NULL : &state->free_ctx_managers, op);
        return;
    }
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef CtxMgr_methods[] = {
    {"__aenter__", CtxMgr_aenter, METH_NOARGS, CtxMgr_aenter_doc},
    {"__aexit__", (PyCFunction)(void (*)(void))CtxMgr_aexit, METH_FASTCALL, CtxMgr_aexit_doc},
    {"__copy__", CtxMgr_copy, METH_NOARGS, CtxMgr_copy_doc},
    {"_recreate_cm", CtxMgr_recreate, METH_NOARGS, CtxMgr_recreate_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "AsyncContextManager[T]: of a T, for annotations."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef CtxMgr_members[] = {
    {"gen", Py_T_OBJECT_EX, offsetof(CtxMgrObject, gen), 0, "The generator."},
    {"__dictoffset__", Py_T_PYSSIZET, offsetof(CtxMgrObject, dict), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(CtxMgrObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef CtxMgr_getset[] = {
    {"func", CtxMgr_get_part, NULL, "The generator function, until this is entered.", "func"},
    {"args", CtxMgr_get_part, NULL, "Its arguments, until this is entered.", "args"},
    {"kwds", CtxMgr_get_part, NULL, "Its keyword arguments, until this is entered.", "kwds"},
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(CtxMgr_doc,
"AsyncContextManager(func, args, kwds)\n--\n\n"
"An asynchronous context manager made of an asynchronous generator.\n\n"
"func is called with args and kwds and has to return an asynchronous generator\n"
"that yields once. What it yields is the value of `async with ... as value`; an\n"
"exception of the block is raised at the yield. A manager can be entered once.\n"
"Called with a coroutine function it decorates it.\n\n"
"Functions decorated with async_ctx_manager (actxmgr) return these. They do what\n"
"contextlib's do, without a coroutine of their own around the generator.");

static PyType_Slot CtxMgr_slots[] = {
    {Py_tp_doc, (void *)CtxMgr_doc},
    {Py_tp_init, CtxMgr_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_call, CtxMgr_call},
    {Py_tp_getattro, CtxMgr_getattro},
    {Py_tp_methods, CtxMgr_methods},
    {Py_tp_members, CtxMgr_members},
    {Py_tp_getset, CtxMgr_getset},
    {Py_tp_traverse, CtxMgr_traverse},
    {Py_tp_clear, CtxMgr_clear},
    {Py_tp_dealloc, CtxMgr_dealloc},
    {0, NULL},
};

static PyType_Spec CtxMgr_spec = {
    .name = "aiotools.context.AsyncContextManager",
    .basicsize = sizeof(CtxMgrObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = CtxMgr_slots,
};

PyDoc_STRVAR(Sending_doc,
"SendingContextManager(func, args, kwds)\n--\n\n"
"An AsyncContextManager whose attribute yield_return becomes the value of the\n"
"generator's yield when the block ended without an exception.\n\n"
"Subclasses give yield_return, on the class or on the instance. func, args and\n"
"kwds (also kwargs) stay after it was entered.");

static PyGetSetDef Sending_getset[] = {
    {"kwargs", CtxMgr_get_part, NULL, "The keyword arguments of the generator function.", "kwds"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Sending_slots[] = {
    {Py_tp_doc, (void *)Sending_doc},
    {Py_tp_getset, Sending_getset},
    {Py_tp_traverse, CtxMgr_traverse},
    {Py_tp_clear, CtxMgr_clear},
    {Py_tp_dealloc, CtxMgr_dealloc},
    {0, NULL},
};

static PyType_Spec Sending_spec = {
    .name = "aiotools._aiotools.SendingContextManager",
    .basicsize = sizeof(CtxMgrObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = Sending_slots,
};

/* ---- the function that a decorated name is ----------------------------------------------------------------- */

#if PY_VERSION_HEX >= 0x030C0000
static PyObject *
keywords_as_dict(PyObject *const *values, PyObject *kwnames)
{
    PyObject *dict = PyDict_New();
    for (Py_ssize_t i = 0; dict != NULL && i < PyTuple_GET_SIZE(kwnames); i++) {
        if (PyDict_SetItem(dict, PyTuple_GET_ITEM(kwnames, i), values[i]) < 0) {
            Py_CLEAR(dict);
        }
    }
    return dict;
}

static PyObject *
ctxmgr_new(aiot_state *state, PyObject *func, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
    PyObject *call_args = NULL, *call_kwds = NULL, *gen = NULL;
    CtxMgrObject *self = NULL;
    if ((call_args = PyTuple_New(nargs)) == NULL) {
        goto fail;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyTuple_SET_ITEM(call_args, i, Py_NewRef(args[i]));
    }
    if (kwnames != NULL && (call_kwds = keywords_as_dict(args + nargs, kwnames)) == NULL) {
        goto fail;
    }
    if ((gen = PyObject_Vectorcall(func, args, nargsf, kwnames)) == NULL
        || (self = (CtxMgrObject *)MANAGER_ALLOC(state)) == NULL)
    {
        goto fail;
    }
    self->gen = gen;
    self->func = Py_NewRef(func);
    self->args = call_args;
    self->kwds = call_kwds;
    self->is_exact = true;
    return (PyObject *)self;
fail:
    Py_XDECREF(call_args);
    Py_XDECREF(call_kwds);
    Py_XDECREF(gen);
    return NULL;
}

/* The helper's body is `return cls(func, args, kwds)`, with cls and func in its closure, in this order. */
static PyObject *
helper_vectorcall(PyObject *helper, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    PyObject *closure = PyFunction_GetClosure(helper);
    PyObject *cls = PyCell_Get(PyTuple_GET_ITEM(closure, 0));
    PyObject *func = PyCell_Get(PyTuple_GET_ITEM(closure, 1));
    PyObject *manager = NULL;
    aiot_state *state = cls != NULL && PyType_Check(cls) ? aiot_state_of_type((PyTypeObject *)cls) : NULL;
    if (state != NULL && cls == (PyObject *)state->CtxMgrType && func != NULL) {
        manager = ctxmgr_new(state, func, args, nargsf, kwnames);
    }
    else {
        /* The cells of a closure can be written to. */
        PyErr_SetString(PyExc_TypeError, "the closure of a function made by async_ctx_manager() was changed");
    }
    Py_XDECREF(cls);
    Py_XDECREF(func);
    return manager;
}
#endif

PyDoc_STRVAR(make_doc,
"_make_manager($module, func, args, kwds, /)\n--\n\n"
"AsyncContextManager(func, args, kwds), which takes over the tuple and the dict.");

static PyObject *
ctxmgr_make(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    aiot_state *state = aiot_state_of_module(module);
    if (nargs != 3 || !PyTuple_CheckExact(args[1]) || !PyDict_CheckExact(args[2])) {
        PyErr_SetString(PyExc_TypeError, "_make_manager() takes a callable, a tuple and a dict");
        return NULL;
    }
    PyObject *gen = PyObject_Call(args[0], args[1], args[2]);
    if (gen == NULL) {
        return NULL;
    }
    CtxMgrObject *self = (CtxMgrObject *)MANAGER_ALLOC(state);
    if (self == NULL) {
        Py_DECREF(gen);
        return NULL;
    }
    self->gen = gen;
    self->func = Py_NewRef(args[0]);
    self->args = Py_NewRef(args[1]);
    self->kwds = Py_NewRef(args[2]);
    self->is_exact = true;
    return (PyObject *)self;
}

PyDoc_STRVAR(quicken_doc,
"_quicken_helper($module, helper, /)\n--\n\n"
"Have calls of the function that async_ctx_manager() makes go straight to C.\n\n"
"Returns helper. Does nothing before Python 3.12.");

static PyObject *
ctxmgr_quicken(PyObject *module, PyObject *helper)
{
#if PY_VERSION_HEX >= 0x030C0000
    aiot_state *state = aiot_state_of_module(module);
    PyObject *closure = PyFunction_Check(helper) ? PyFunction_GetClosure(helper) : NULL;
    if (closure == NULL || PyTuple_GET_SIZE(closure) != 2) {
        PyErr_SetString(PyExc_TypeError, "a function with two variables in its closure was expected");
        return NULL;
    }
    PyObject *cls = PyCell_Get(PyTuple_GET_ITEM(closure, 0));
    Py_XDECREF(cls);
    if (cls != (PyObject *)state->CtxMgrType) {
        PyErr_SetString(PyExc_TypeError, "the first variable of the closure has to be AsyncContextManager");
        return NULL;
    }
    PyFunction_SetVectorcall((PyFunctionObject *)helper, helper_vectorcall);
#endif
    return Py_NewRef(helper);
}

static PyMethodDef ctxmgr_functions[] = {
    {"_quicken_helper", ctxmgr_quicken, METH_O, quicken_doc},
    {"_make_manager", (PyCFunction)(void (*)(void))ctxmgr_make, METH_FASTCALL, make_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_ctxmgr_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->CtxStepType, &Step_spec, NULL, false) < 0
        || aiot_add_type(module, &state->CtxMgrType, &CtxMgr_spec, NULL, true) < 0
        || aiot_add_type(module, &state->SendingCtxMgrType, &Sending_spec, (PyObject *)state->CtxMgrType, true) < 0)
    {
        return -1;
    }
    return PyModule_AddFunctions(module, ctxmgr_functions);
}
