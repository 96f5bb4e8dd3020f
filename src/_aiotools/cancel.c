/* cancel.c: cancel_and_wait, and what aclose() of scopes is made of.
 *
 * States:     those of an awaitable. Everything happens when it is first sent to.
 * Invariants: `outcomes` has one item per task, in input order: None while it runs or when nothing is to be said,
 *             else the exception that it stands for.
 * Cancelled:  each request to the waiting task is forwarded to the tasks that still run, as asyncio does with the one
 *             task that is awaited; the wait goes on, and ends with CancelledError.
 * Re-entry:   cancel() of a task may run any code, so the tasks are walked by index in a list that is ours alone.
 */

#include "cancel.h"

#include "args.h"
#include "awaitable.h"
#include "shield.h"

#include <math.h>

/* The parent of the tasks' nodes: what their callbacks refer to, so that the awaitable itself may die early. */
typedef struct {
    AIOT_CHILDREN_HEAD
    PyObject *outcomes;         /* list */
    Py_ssize_t *limits;         /* by index: the count of requests that is explained by ours */
    Py_ssize_t n;
    bool quiet;
} CancellerObject;

typedef struct {
    AIOT_AWAITABLE_HEAD
    bool single;
    bool quiet;
    bool timed_out;
    double seconds;
    PyObject *tasks;            /* what was given: a task or a list of them; NULL when close() tells */
    PyObject *msg;
    PyObject *owner;
    aiot_close_fn close;
    CancellerObject *canceller;
    PyObject *cancelled;        /* the CancelledError that the caller got */
    aiot_joiner joiner;
    aiot_alarm alarm;
} CancelWaitObject;

/* ---- outcomes ----------------------------------------------------------------------------------------------- */

static PyObject *
make_exception(PyObject *type, const char *message)
{
    return message == NULL ? PyObject_CallNoArgs(type) : PyObject_CallFunction(type, "s", message);
}

static int
is_true_method(PyObject *task, PyObject *name)
{
    PyObject *answer = PyObject_CallMethodNoArgs(task, name);
    if (answer == NULL) {
        return -1;
    }
    int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

/* What the end of a task means to who cancelled it: a new reference to an exception or None. */
static PyObject *
outcome_of(CancellerObject *self, Py_ssize_t index, PyObject *task)
{
    aiot_state *state = self->loop->state;
    int cancelled = is_true_method(task, state->str_cancelled);
    if (cancelled < 0) {
        return NULL;
    }
    Py_ssize_t requests = aiot_task_all_requests(self->loop, task);
    if (requests < 0) {
        return NULL;
    }
    if (cancelled) {
        /* More requests than explained: somebody else asked for it, too. */
        return requests > self->limits[index] ? PyObject_CallNoArgs(state->CancelledError) : Py_NewRef(Py_None);
    }
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == NULL || exc != Py_None) {
        return exc;
    }
    if (requests > 0) {
        Py_DECREF(exc);
        return make_exception(state->InvalidStateError, "the task swallowed its cancellation and returned a result");
    }
    return exc;
}

static int
Canceller_ended(AiotChildren *op, Py_ssize_t index, PyObject *task)
{
    CancellerObject *self = (CancellerObject *)op;
    if (self->quiet) {
        return 0;
    }
    PyObject *outcome = outcome_of(self, index, task);
    if (outcome == NULL) {
        outcome = PyErr_GetRaisedException();
    }
    return PyList_SetItem(self->outcomes, index, outcome);
}

static const aiot_children_ops Canceller_ops = {
    .ended = Canceller_ended,
    .indexed = true,
    .later = true,
    .lazy = true,
};

static int
Canceller_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((CancellerObject *)op)->outcomes);
    return aiot_children_traverse(op, visit, arg);
}

static int
Canceller_clear(PyObject *op)
{
    Py_CLEAR(((CancellerObject *)op)->outcomes);
    aiot_children_clear(op);
    return 0;
}

static void
Canceller_dealloc(PyObject *op)
{
    CancellerObject *self = (CancellerObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Canceller_clear(op);
    Py_CLEAR(self->loop);
    PyMem_Free(self->limits);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Canceller_slots[] = {
    {Py_tp_doc, "Notices the ends of tasks that were cancelled."},
    {Py_tp_traverse, Canceller_traverse},
    {Py_tp_clear, Canceller_clear},
    {Py_tp_dealloc, Canceller_dealloc},
    {0, NULL},
};

static PyType_Spec Canceller_spec = {
    .name = "aiotools._aiotools.Canceller",
    .basicsize = sizeof(CancellerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Canceller_slots,
};

/* ---- the awaitable ------------------------------------------------------------------------------------------ */

static CancellerObject *
canceller_new(AiotLoop *loop, PyObject *tasks, bool quiet)
{
    aiot_state *state = loop->state;
    CancellerObject *self = (CancellerObject *)state->CancellerType->tp_alloc(state->CancellerType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_children_init(self, &Canceller_ops);
    self->loop = (AiotLoop *)Py_NewRef((PyObject *)loop);
    self->n = PyList_GET_SIZE(tasks);
    self->quiet = quiet;
    self->limits = PyMem_New(Py_ssize_t, self->n + 1);
    self->outcomes = PyList_New(self->n);
    if (self->limits == NULL || self->outcomes == NULL) {
        if (self->limits == NULL) {
            PyErr_NoMemory();
        }
        Py_DECREF(self);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < self->n; i++) {
        PyList_SET_ITEM(self->outcomes, i, Py_NewRef(Py_None));
        self->limits[i] = 0;
    }
    self->host = PyObject_CallOneArg(state->current_task, loop->loop);
    if (self->host == Py_None) {
        Py_CLEAR(self->host);
    }
    if (self->host == NULL && PyErr_Occurred()) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}

/* task.cancel(msg) as anybody would call it: shields hold. */
static int
cancel_task(aiot_state *state, PyObject *task, PyObject *msg)
{
    PyObject *args[] = {task, msg};
    PyObject *result = PyObject_VectorcallMethod(state->str_cancel, args,
                                                 (msg == NULL ? 1 : 2) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static int
begin_one(CancellerObject *self, PyObject *task, Py_ssize_t index, PyObject *msg)
{
    aiot_state *state = self->loop->state;
    int done = is_true_method(task, state->str_done);
    if (done != 0) {
        return done < 0 ? -1 : 0;
    }
    Py_ssize_t requests = aiot_task_all_requests(self->loop, task);
    if (requests < 0) {
        return -1;
    }
    self->limits[index] = requests + 1;
    if (cancel_task(state, task, msg) < 0) {
        return -1;
    }
    return aiot_children_adopt((AiotChildren *)self, task, index);
}

static int
CancelWait_fire(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    CancelWaitObject *self = (CancelWaitObject *)owner;
    self->timed_out = true;
    AiotWaiter *waiter = self->joiner.waiter;
    if (waiter == NULL) {
        return 0;
    }
    Py_INCREF(waiter);
    aiot_link_remove(&self->joiner.link);
    int failed = aiot_waiter_wake(waiter);
    Py_DECREF(waiter);
    return failed;
}

static void
CancelWait_leave(CancelWaitObject *self)
{
    if (self->canceller != NULL) {
        aiot_alarm_cancel(self->canceller->loop, &self->alarm);
    }
    aiot_joiner_leave(&self->joiner);
}

/* Raises what the collection form raises. */
static void
raise_collected(CancelWaitObject *self)
{
    aiot_state *state = self->canceller->loop->state;
    PyObject *outcomes = self->canceller->outcomes;
    PyObject *errors = PyList_New(0);
    if (errors == NULL) {
        return;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(outcomes); i++) {
        PyObject *outcome = PyList_GET_ITEM(outcomes, i);
        if (outcome == Py_None) {
            continue;
        }
        if (self->single) {
            PyErr_SetObject((PyObject *)Py_TYPE(outcome), outcome);
            break;
        }
        int cancelled = PyObject_IsInstance(outcome, state->CancelledError);
        if (cancelled > 0) {
            PyErr_SetNone(state->CancelledError);
        }
        if (cancelled != 0 || PyList_Append(errors, outcome) < 0) {
            break;
        }
    }
    if (!PyErr_Occurred() && PyList_GET_SIZE(errors) > 0) {
        PyObject *group = PyObject_CallFunction(PyExc_BaseExceptionGroup, "sO",
                                                "Unhandled exceptions during grouped cancellation", errors);
        if (group != NULL) {
            PyErr_SetObject((PyObject *)Py_TYPE(group), group);
            Py_DECREF(group);
        }
    }
    Py_DECREF(errors);
}

static PySendResult
CancelWait_finish(CancelWaitObject *self, PyObject **result)
{
    CancelWait_leave(self);
    if (!self->quiet) {
        raise_collected(self);
    }
    /* The caller's own cancellation is never lost to what the tasks ended with, which becomes its context; and it keeps
       its message, which theirs has no part in. */
    if (self->cancelled != NULL) {
        PyObject *error = PyErr_GetRaisedException();
        PyObject *cancelled = self->cancelled;
        self->cancelled = NULL;
        if (error != NULL && !PyErr_GivenExceptionMatches(error, self->canceller->loop->state->CancelledError)) {
            PyException_SetContext(cancelled, Py_NewRef(error));
        }
        Py_XDECREF(error);
        PyErr_SetRaisedException(cancelled);
    }
    /* No cycle through the traceback of what is raised. */
    Py_CLEAR(self->canceller);
    Py_CLEAR(self->cancelled);
    if (PyErr_Occurred()) {
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static PySendResult
raise_unfinished(CancelWaitObject *self)
{
    PyObject *tasks = aiot_children_tasks((AiotChildren *)self->canceller);
    CancelWait_leave(self);
    Py_CLEAR(self->canceller);
    if (tasks == NULL) {
        return PYGEN_ERROR;
    }
    PyObject *module = PyImport_ImportModule("aiotools.cancel");
    PyObject *exc = module == NULL ? NULL : PyObject_CallMethod(module, "_unfinished", "Od", tasks, self->seconds);
    Py_XDECREF(module);
    Py_DECREF(tasks);
    if (exc != NULL) {
        if (self->cancelled != NULL) {
            PyException_SetContext(self->cancelled, exc);
            exc = self->cancelled;
            self->cancelled = NULL;
        }
        PyErr_SetRaisedException(exc);
    }
    return PYGEN_ERROR;
}

static PySendResult
CancelWait_step(CancelWaitObject *self, PyObject **result)
{
    if (self->timed_out && aiot_children_settle((AiotChildren *)self->canceller) < 0) {
        CancelWait_leave(self);
        return PYGEN_ERROR;
    }
    if (self->canceller->n_children == 0) {
        return CancelWait_finish(self, result);
    }
    if (self->timed_out) {
        return raise_unfinished(self);
    }
    PySendResult answer = aiot_join((AiotChildren *)self->canceller, &self->joiner, result);
    if (answer == PYGEN_ERROR) {
        CancelWait_leave(self);
    }
    return answer;
}

/* The list of tasks, from whatever was given. */
static PyObject *
tasks_to_cancel(CancelWaitObject *self)
{
    if (self->close != NULL) {
        return self->close(self->owner);
    }
    if (!self->single) {
        return PySequence_List(self->tasks);
    }
    PyObject *tasks = PyList_New(1);
    if (tasks != NULL) {
        PyList_SET_ITEM(tasks, 0, Py_NewRef(self->tasks));
    }
    return tasks;
}

static int
CancelWait_begin(CancelWaitObject *self, AiotLoop *loop)
{
    PyObject *tasks = tasks_to_cancel(self);
    if (tasks == NULL) {
        return -1;
    }
    self->canceller = canceller_new(loop, tasks, self->quiet);
    int failed = self->canceller == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; !failed && !self->quiet && i < PyList_GET_SIZE(tasks); i++) {
        if (PyList_GET_ITEM(tasks, i) == self->canceller->host) {
            PyErr_SetString(PyExc_RuntimeError, "a task cannot cancel itself and wait for its own end");
            failed = -1;
        }
    }
    for (Py_ssize_t i = 0; !failed && i < PyList_GET_SIZE(tasks); i++) {
        PyObject *task = Py_NewRef(PyList_GET_ITEM(tasks, i));
        failed = begin_one(self->canceller, task, i, self->msg);
        Py_DECREF(task);
    }
    Py_DECREF(tasks);
    return failed;
}

static PySendResult
CancelWait_start(aiot_awaitable *op, PyObject **result)
{
    CancelWaitObject *self = (CancelWaitObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    int failed = CancelWait_begin(self, loop);
    double when;
    if (!failed && !isinf(self->seconds) && self->canceller->n_children > 0) {
        failed = aiot_loop_deadline(loop, self->seconds, &when) < 0 || aiot_alarm_set(loop, &self->alarm, when) < 0;
    }
    Py_DECREF(loop);
    if (failed) {
        return PYGEN_ERROR;
    }
    return CancelWait_step(self, result);
}

static PySendResult
CancelWait_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    CancelWaitObject *self = (CancelWaitObject *)op;
    if (aiot_joiner_resumed(&self->joiner) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        CancelWait_leave(self);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    return CancelWait_step(self, result);
}

PyObject *
aiot_cancel_message(PyObject *exc)
{
    PyObject *args = ((PyBaseExceptionObject *)exc)->args;
    PyObject *msg = args != NULL && PyTuple_GET_SIZE(args) == 1 ? PyTuple_GET_ITEM(args, 0) : NULL;
    return msg == Py_None ? NULL : msg;
}

static PySendResult
CancelWait_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    CancelWaitObject *self = (CancelWaitObject *)op;
    aiot_joiner_leave(&self->joiner);
    if (!PyErr_GivenExceptionMatches(exc, self->canceller->loop->state->CancelledError)) {
        CancelWait_leave(self);
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    Py_XSETREF(self->cancelled, Py_NewRef(exc));
    if (!self->quiet) {
        PyObject *tasks = aiot_children_tasks((AiotChildren *)self->canceller);
        if (tasks == NULL) {
            CancelWait_leave(self);
            return PYGEN_ERROR;
        }
        PyObject *msg = Py_XNewRef(aiot_cancel_message(exc));
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tasks); i++) {
            if (cancel_task(self->canceller->loop->state, PyList_GET_ITEM(tasks, i), msg) < 0) {
                PyErr_WriteUnraisable(PyList_GET_ITEM(tasks, i));
            }
        }
        Py_XDECREF(msg);
        Py_DECREF(tasks);
    }
    return CancelWait_step(self, result);
}

static void
CancelWait_abandon(aiot_awaitable *op)
{
    CancelWait_leave((CancelWaitObject *)op);
}

static const aiot_awaitable_ops cancel_and_wait_ops = {
    .name = "cancel_and_wait",
    .start = CancelWait_start,
    .resume = CancelWait_resume,
    .throw = CancelWait_throw,
    .abandon = CancelWait_abandon,
};

static const aiot_awaitable_ops aclose_ops = {
    .name = "aclose",
    .start = CancelWait_start,
    .resume = CancelWait_resume,
    .throw = CancelWait_throw,
    .abandon = CancelWait_abandon,
};

static CancelWaitObject *
cancel_wait_new(aiot_state *state, const aiot_awaitable_ops *ops, double seconds)
{
    CancelWaitObject *self = (CancelWaitObject *)state->CancelWaitType->tp_alloc(state->CancelWaitType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, ops);
        aiot_joiner_init(&self->joiner);
        aiot_alarm_init(&self->alarm, (PyObject *)self, CancelWait_fire);
        self->seconds = seconds;
    }
    return self;
}

PyObject *
aiot_cancel_wait_new(aiot_state *state, PyObject *owner, aiot_close_fn close, bool quiet, double seconds)
{
    CancelWaitObject *self = cancel_wait_new(state, &aclose_ops, seconds);
    if (self != NULL) {
        self->owner = Py_NewRef(owner);
        self->close = close;
        self->quiet = quiet;
    }
    return (PyObject *)self;
}

/* ---- the function ------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(cancel_and_wait_doc,
"cancel_and_wait($module, tasks, /, msg=None, *, timeout=None)\n--\n\n"
"Cancel a task, or a collection of tasks at once, and wait for their ends.\n\n"
"tasks: a task, or a collection of them (all are cancelled and awaited together).\n"
"msg: goes to cancel() of a single task.\n"
"timeout: seconds after which the wait is given up with UnfinishedTasksError,\n"
"which lists the tasks that go on and where each one stands; None waits for ever.\n\n"
"Returns None; at once for what is done already. What a task raises in its\n"
"clean-up comes through, for a collection in one exception group. Raises\n"
"InvalidStateError when a task swallowed the cancellation and returned a result,\n"
"and CancelledError when somebody else cancelled it as well, or the caller: that\n"
"request is forwarded to the tasks, and their ends are still awaited.\n\n"
"Since aiotools 2.0; timeout since 3.0.");

static const aiot_params cancel_and_wait_params = {
    "cancel_and_wait", 2, 1, 3, {AIOT_NAME(tasks), AIOT_NAME(msg), AIOT_NAME(timeout)},
};

/* 1 or 0: has it what is asked of a task? -1. */
static int
is_task(aiot_state *state, PyObject *obj)
{
    if (PyObject_TypeCheck(obj, (PyTypeObject *)state->asyncio_Task)) {
        return 1;
    }
    PyObject *found;
    int has = PyObject_GetOptionalAttr(obj, state->str_cancelling, &found);
    Py_XDECREF(found);
    return has;
}

static int
check_tasks(aiot_state *state, PyObject *tasks)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tasks); i++) {
        int good = is_task(state, PyList_GET_ITEM(tasks, i));
        if (good <= 0) {
            if (good == 0) {
                PyErr_Format(PyExc_TypeError, "cancel_and_wait() takes tasks; item %zd is a '%.200s'", i,
                             Py_TYPE(PyList_GET_ITEM(tasks, i))->tp_name);
            }
            return -1;
        }
    }
    return 0;
}

static PyObject *
aiot_cancel_and_wait(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    aiot_state *state = aiot_state_of_module(module);
    PyObject *given[3];
    double seconds = INFINITY;
    if (aiot_bind(state, &cancel_and_wait_params, args, nargs, kwnames, given) < 0
        || (given[2] != NULL && given[2] != Py_None && aiot_as_seconds(given[2], "timeout", &seconds) < 0))
    {
        return NULL;
    }
    int single = is_task(state, given[0]);
    if (single < 0) {
        return NULL;
    }
    PyObject *tasks;
    if (single) {
        tasks = Py_NewRef(given[0]);
    }
    else {
        int is_collection = PyObject_IsInstance(given[0], state->Collection);
        if (is_collection <= 0) {
            if (is_collection == 0) {
                PyErr_Format(PyExc_TypeError, "cancel_and_wait() takes a task or a collection of tasks, not '%.200s'",
                             Py_TYPE(given[0])->tp_name);
            }
            return NULL;
        }
        tasks = PySequence_List(given[0]);
        if (tasks == NULL || check_tasks(state, tasks) < 0) {
            Py_XDECREF(tasks);
            return NULL;
        }
    }
    CancelWaitObject *self = cancel_wait_new(state, &cancel_and_wait_ops, seconds);
    if (self == NULL) {
        Py_DECREF(tasks);
        return NULL;
    }
    self->tasks = tasks;
    self->single = single;
    if (single && given[1] != NULL && given[1] != Py_None) {
        self->msg = Py_NewRef(given[1]);
    }
    return (PyObject *)self;
}

/* ---- the types ---------------------------------------------------------------------------------------------- */

static int
CancelWait_traverse(PyObject *op, visitproc visit, void *arg)
{
    CancelWaitObject *self = (CancelWaitObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->tasks);
    Py_VISIT(self->msg);
    Py_VISIT(self->owner);
    Py_VISIT(self->canceller);
    Py_VISIT(self->cancelled);
    Py_VISIT(self->joiner.waiter);
    return 0;
}

static int
CancelWait_clear(PyObject *op)
{
    CancelWaitObject *self = (CancelWaitObject *)op;
    aiot_joiner_leave(&self->joiner);
    Py_CLEAR(self->tasks);
    Py_CLEAR(self->msg);
    Py_CLEAR(self->owner);
    Py_CLEAR(self->canceller);
    Py_CLEAR(self->cancelled);
    return 0;
}

static void
CancelWait_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    CancelWait_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot CancelWait_slots[] = {
    {Py_tp_doc, "What cancel_and_wait() and aclose() return: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, CancelWait_traverse},
    {Py_tp_clear, CancelWait_clear},
    {Py_tp_dealloc, CancelWait_dealloc},
    {0, NULL},
};

static PyType_Spec CancelWait_spec = {
    .name = "aiotools._aiotools.CancelWait",
    .basicsize = sizeof(CancelWaitObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = CancelWait_slots,
};

static PyMethodDef cancel_functions[] = {
    {"cancel_and_wait", (PyCFunction)(void (*)(void))aiot_cancel_and_wait, METH_FASTCALL | METH_KEYWORDS,
     cancel_and_wait_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_cancel_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->CancellerType, &Canceller_spec, NULL, false) < 0
        || aiot_add_type(module, &state->CancelWaitType, &CancelWait_spec, NULL, false) < 0)
    {
        return -1;
    }
    return PyModule_AddFunctions(module, cancel_functions);
}
