/* scope.c: TaskContext, TaskScope, ShieldScope, and the core of TaskGroup.
 *
 * States:     created -> entered -> exiting -> exited. A context is entered by its first child and exited by aclose().
 *             `aborting` may come at any time; it stays.
 * Invariants: the frame is open exactly from entry to the end of exit. `own` is the number of requests that this scope made
 *             to its host and has not taken back; at the end of exit it is 0. The alarm is set only while the frame is open.
 * Accounts:   at exit, the host's own count of requests is compared with that at entry, less what is our own: what is left
 *             came from outside and is passed on, whatever else the block ends with.
 * Re-entry:   cancel(), handlers, create_task and waits run foreign code. Everything that the rest of a function needs is
 *             read again after them.
 */

#include "scope.h"

#include "args.h"
#include "awaitable.h"
#include "cancel.h"

#include <math.h>
#include <string.h>

#define NO_TIMEOUT (-INFINITY)

static const char *
scope_name(AiotScope *self)
{
    const char *name = Py_TYPE(self)->tp_name;
    const char *dot = strrchr(name, '.');
    return dot == NULL ? name : dot + 1;
}

static bool
is_base_error(PyObject *exc)
{
    return PyErr_GivenExceptionMatches(exc, PyExc_SystemExit) || PyErr_GivenExceptionMatches(exc, PyExc_KeyboardInterrupt);
}

static bool
is_cancelled_error(AiotScope *self, PyObject *exc)
{
    return exc != NULL && PyErr_GivenExceptionMatches(exc, self->loop->state->CancelledError);
}

/* Raises exc; steals it. */
static void
raise_it(PyObject *exc)
{
    PyErr_SetObject((PyObject *)Py_TYPE(exc), exc);
    Py_DECREF(exc);
}

static int
check_initialized(AiotScope *self)
{
    if (self->mode == AIOT_UNINITIALIZED) {
        PyErr_Format(PyExc_RuntimeError, "%s.__init__() was not called", scope_name(self));
        return -1;
    }
    return 0;
}

/* ---- ending children ---------------------------------------------------------------------------------------- */

int
aiot_scope_abort(AiotScope *self, PyObject *msg)
{
    self->aborting = true;
    PyObject *tasks = aiot_children_tasks((AiotChildren *)self);
    if (tasks == NULL) {
        return -1;
    }
    PyObject *error = NULL;
    AiotShield *origin = (AiotShield *)Py_XNewRef((PyObject *)self->frame.token);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tasks); i++) {
        if (aiot_task_cancel_from(self->loop, PyList_GET_ITEM(tasks, i), origin, msg) < 0) {
            PyObject *exc = PyErr_GetRaisedException();
            if (error == NULL) {
                error = exc;
            }
            else {
                Py_DECREF(exc);
            }
        }
    }
    Py_XDECREF((PyObject *)origin);
    Py_DECREF(tasks);
    if (error != NULL) {
        PyErr_SetRaisedException(error);
        return -1;
    }
    return 0;
}

/* Where no caller can be told of a child's broken cancel(). */
static void
abort_quietly(AiotScope *self, PyObject *msg)
{
    if (!self->aborting && aiot_scope_abort(self, msg) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
}

static bool
in_body(AiotScope *self)
{
    return self->frame.task != NULL && !self->exiting;
}

/* Interrupts the body with a request that is taken back at exit: through all shields, or past those only that are ours or
 * around us. 0 or -1. */
static int
interrupt_body(AiotScope *self, PyObject *msg, bool through_all)
{
    PyObject *host = Py_NewRef(self->frame.task);
    AiotShield *origin = (AiotShield *)Py_XNewRef((PyObject *)self->frame.token);
    int answer = through_all ? aiot_task_interrupt(self->loop, host, msg)
                             : aiot_task_cancel_from(self->loop, host, origin, msg);
    Py_XDECREF((PyObject *)origin);
    Py_DECREF(host);
    if (answer > 0) {
        self->own++;
    }
    return answer < 0 ? -1 : 0;
}

static int
Scope_fire(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    AiotScope *self = (AiotScope *)owner;
    if (self->frame.task == NULL) {
        return 0;
    }
    self->expired = true;
    PyObject *msg = self->loop->state->str_timeout;
    if (!self->aborting && aiot_scope_abort(self, msg) < 0) {
        PyErr_WriteUnraisable(owner);
    }
    return in_body(self) ? interrupt_body(self, msg, true) : 0;
}

/* ---- children ----------------------------------------------------------------------------------------------- */

static PyObject *
error_dict(AiotScope *self, PyObject *task, PyObject *exc)
{
    aiot_state *state = self->loop->state;
    PyObject *message;
    if (self->host != NULL) {
        message = PyUnicode_FromFormat("Task %R failed; it is a child of %R", task, self->host);
    }
    else {
        message = PyUnicode_FromFormat("Task %R failed", task);
    }
    PyObject *dict = message == NULL ? NULL : PyDict_New();
    if (dict != NULL && (PyDict_SetItem(dict, state->str_message, message) < 0
                         || PyDict_SetItem(dict, state->str_exception, exc) < 0
                         || PyDict_SetItem(dict, state->str_task, task) < 0))
    {
        Py_CLEAR(dict);
    }
    Py_XDECREF(message);
    return dict;
}

/* To the handler; what that raises goes to the loop. */
static int
report_failure(AiotScope *self, PyObject *task, PyObject *exc)
{
    aiot_state *state = self->loop->state;
    PyObject *handler = self->handler;
    if (handler == Py_None || self->loop->loop == NULL) {
        return 0;
    }
    if (handler != state->loop_token && !PyCallable_Check(handler)) {
        PyErr_Format(PyExc_RuntimeError, "exception_handler must be a callable or None, not '%.200s'",
                     Py_TYPE(handler)->tp_name);
        return -1;
    }
    PyObject *dict = error_dict(self, task, exc);
    if (dict == NULL) {
        return -1;
    }
    PyObject *result;
    if (handler == state->loop_token) {
        result = PyObject_CallMethodOneArg(self->loop->loop, state->str_call_exception_handler, dict);
    }
    else {
        Py_INCREF(handler);
        result = PyObject_CallOneArg(handler, dict);
        Py_DECREF(handler);
    }
    Py_DECREF(dict);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* The failure of a group's child. */
static int
group_child_failed(AiotScope *self, PyObject *task, PyObject *exc)
{
    if (self->frame.task == NULL) {
        /* Left without waiting, as the coroutine was closed: nobody else will tell. */
        self->handler = self->handler != NULL ? self->handler : Py_NewRef(self->loop->state->loop_token);
        return report_failure(self, task, exc);
    }
    if (self->errors == NULL && (self->errors = PyList_New(0)) == NULL) {
        return -1;
    }
    if (PyList_Append(self->errors, exc) < 0) {
        return -1;
    }
    if (self->aborting) {
        return 0;
    }
    int failed = aiot_scope_abort(self, NULL);
    if (in_body(self) && self->own == 0) {
        PyObject *error = failed ? PyErr_GetRaisedException() : NULL;
        failed = interrupt_body(self, NULL, false);
        if (error != NULL) {
            if (failed) {
                PyErr_WriteUnraisable((PyObject *)self);
            }
            PyErr_SetRaisedException(error);
            failed = -1;
        }
    }
    return failed;
}

static int
Scope_child_ended(AiotChildren *op, Py_ssize_t Py_UNUSED(index), PyObject *task)
{
    AiotScope *self = (AiotScope *)op;
    aiot_state *state = self->loop->state;
    self->n_done++;
    if (self->aborting) {
        PyObject *cancelled = PyObject_CallMethodNoArgs(task, state->str_cancelled);
        if (cancelled == NULL) {
            return -1;
        }
        int truth = PyObject_IsTrue(cancelled);
        Py_DECREF(cancelled);
        if (truth != 0) {
            return truth < 0 ? -1 : 0;
        }
    }
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == Py_None) {
        Py_DECREF(exc);
        return 0;
    }
    if (exc == NULL) {
        if (PyErr_ExceptionMatches(state->CancelledError)) {
            PyErr_Clear();
            return 0;
        }
        return -1;
    }
    self->n_failed++;
    int failed;
    if (is_base_error(exc) && self->mode != AIOT_TASK_CONTEXT && self->frame.task != NULL) {
        if (self->base_error == NULL) {
            self->base_error = Py_NewRef(exc);
        }
        failed = self->mode == AIOT_TASK_GROUP ? group_child_failed(self, task, exc) : 0;
    }
    else if (self->mode == AIOT_TASK_GROUP) {
        failed = group_child_failed(self, task, exc);
    }
    else {
        failed = report_failure(self, task, exc);
    }
    Py_DECREF(exc);
    return failed;
}

/* A child that hops twice is found before it gets a node, also when it was not started at the first look. */
#define LOOKS 3

static const aiot_children_ops scope_ops = {.ended = Scope_child_ended, .looks = LOOKS};

/* asyncio's groups never handle an end from inside create_task(): the host would be cancelled too early. */
static const aiot_children_ops group_ops = {.ended = Scope_child_ended, .later = true, .looks = LOOKS};

/* May it take a child now? 0, or -1 with RuntimeError. */
static int
check_takes_children(AiotScope *self)
{
    if (check_initialized(self) < 0) {
        return -1;
    }
    const char *problem = NULL;
    if (self->sync) {
        problem = "was entered by a plain `with`, which cannot wait for children";
    }
    else if (self->exited || (self->exiting && self->n_children == 0)) {
        problem = "is finished";
    }
    else if (self->mode == AIOT_TASK_CONTEXT) {
        problem = self->aborting ? "is shutting down" : NULL;
    }
    else if (!self->entered) {
        problem = "has not been entered";
    }
    else if (self->aborting) {
        problem = "is shutting down";
    }
    if (problem != NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s %R %s", scope_name(self), self, problem);
        return -1;
    }
    return 0;
}

/* A context belongs to the task that uses it first. */
static int
check_owner(AiotScope *self)
{
    if (self->loop->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        return -1;
    }
    PyObject *task = PyObject_CallOneArg(self->loop->state->current_task, self->loop->loop);
    if (task == NULL) {
        return -1;
    }
    int failed = 0;
    if (task == Py_None) {
        PyErr_Format(PyExc_AssertionError, "%s.create_task() must be called within a task", scope_name(self));
        failed = -1;
    }
    else if (self->host == NULL) {
        self->host = Py_NewRef(task);
        self->entered = true;
    }
    else if (self->host != task) {
        PyErr_Format(PyExc_RuntimeError, "%s %R belongs to another task", scope_name(self), self);
        failed = -1;
    }
    Py_DECREF(task);
    return failed;
}

static PyObject *
call_policies(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    PyObject *module = PyImport_ImportModule("aiotools._policies");
    PyObject *callable = module == NULL ? NULL : PyObject_GetAttrString(module, function);
    Py_XDECREF(module);
    PyObject *result = callable == NULL ? NULL : PyObject_Vectorcall(callable, args, (size_t)nargs, kwnames);
    Py_XDECREF(callable);
    return result;
}

static PyObject *
scope_spawn(AiotScope *self, PyObject *coro, PyObject *name, PyObject *context, aiot_spawn_options *options)
{
    if (check_takes_children(self) < 0 || (self->mode == AIOT_TASK_CONTEXT && check_owner(self) < 0)) {
        aiot_close_coroutine(aiot_state_of_type(Py_TYPE(self)), coro);
        return NULL;
    }
    PyObject *gated = NULL;
    if (self->gate != NULL) {
        if ((gated = PyObject_CallOneArg(self->gate, coro)) == NULL) {
            aiot_close_coroutine(self->loop->state, coro);
            return NULL;
        }
        coro = gated;
    }
    if (context == NULL) {
        context = self->context;
    }
    aiot_spawn_options eager = {.eager = true};
    if (options == NULL && self->eager) {
        options = &eager;
    }
    Py_XINCREF(context);
    PyObject *task = aiot_children_spawn((AiotChildren *)self, coro, name, context, options);
    Py_XDECREF(context);
    Py_XDECREF(gated);
    if (task != NULL && self->aborting) {
        /* An eager child aborted us before it was linked. Done ones don't mind. */
        AiotShield *origin = (AiotShield *)Py_XNewRef((PyObject *)self->frame.token);
        if (aiot_task_cancel_from(self->loop, task, origin, NULL) < 0) {
            Py_CLEAR(task);
        }
        Py_XDECREF((PyObject *)origin);
    }
    return task;
}

PyObject *
aiot_scope_spawn(AiotScope *self, PyObject *coro, PyObject *name, PyObject *context)
{
    return scope_spawn(self, coro, name, context, NULL);
}

PyDoc_STRVAR(create_task_doc,
"create_task($self, /, coro, *, name=None, context=None, **kwargs)\n--\n\n"
"Start a coroutine as a child task, by the loop's create_task(); return the task.\n\n"
"name, context: of the task; without a context, that of the scope if it has one.\n"
"eager_start=True: run it at once up to its first suspension, where the\n"
"interpreter and the loop allow it (3.12+), else start it as usual.\n"
"timeout=, retry=Retry(...), restart=Retry(...): how long one attempt may take,\n"
"and what happens when it fails; then the first argument is a callable that\n"
"returns a new coroutine for each attempt.\n"
"Further keywords go to the loop's create_task().\n\n"
"Raises RuntimeError when this takes no children: not entered yet, being\n"
"cancelled, finished. The coroutine is closed then.");

static PyObject *
Scope_create_task(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    AiotScope *self = (AiotScope *)op;
    if (AIOT_LIKELY(nargs == 1 && kwnames == NULL)) {
        return scope_spawn(self, args[0], NULL, NULL, NULL);
    }
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    PyObject *coro = nargs == 1 ? args[0] : NULL, *name = NULL, *context = NULL, *eager = NULL;
    PyObject *made = NULL, *extra_names = NULL, *task = NULL;
    PyObject *extra[AIOT_MAX_PARAMS];
    Py_ssize_t n_extra = 0;
    bool policies = false;
    if (nargs > 1 || nkw > AIOT_MAX_PARAMS) {
        PyErr_Format(PyExc_TypeError, "create_task() takes 1 positional argument (%zd given)", nargs);
        return NULL;
    }
    PyObject *keys = PyList_New(0);
    if (keys == NULL) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nkw; i++) {
        PyObject *key = PyTuple_GET_ITEM(kwnames, i);
        PyObject *value = args[nargs + i];
        if (PyUnicode_Compare(key, state->str_name) == 0) {
            name = value == Py_None ? NULL : value;
        }
        else if (PyUnicode_Compare(key, state->str_context) == 0) {
            context = value == Py_None ? NULL : value;
        }
        else if (PyUnicode_Compare(key, state->str_eager_start) == 0) {
            eager = value;
        }
        else if (PyUnicode_Compare(key, state->str_coro) == 0 && coro == NULL) {
            coro = value;
        }
        else {
            policies = policies || PyUnicode_CompareWithASCIIString(key, "retry") == 0
                       || PyUnicode_CompareWithASCIIString(key, "restart") == 0
                       || PyUnicode_CompareWithASCIIString(key, "timeout") == 0;
            if (PyList_Append(keys, key) < 0) {
                goto done;
            }
            extra[n_extra++] = value;
        }
    }
    if (coro == NULL) {
        PyErr_SetString(PyExc_TypeError, "create_task() missing required argument 'coro' (pos 1)");
        goto done;
    }
    if (policies) {
        /* (scope, factory, **all that is left) -> the coroutine that keeps to them; it takes no other keyword. */
        PyObject *call[AIOT_MAX_PARAMS + 2] = {op, coro};
        for (Py_ssize_t i = 0; i < n_extra; i++) {
            call[2 + i] = extra[i];
        }
        PyObject *names = PyList_AsTuple(keys);
        if (check_takes_children(self) < 0 || names == NULL
            || (made = call_policies("child", call, 2, names)) == NULL)
        {
            Py_XDECREF(names);
            goto done;
        }
        Py_DECREF(names);
        coro = made;
        n_extra = 0;
    }
    if (n_extra > 0 && (extra_names = PyList_AsTuple(keys)) == NULL) {
        goto done;
    }
    aiot_spawn_options options = {.values = extra, .names = extra_names, .eager = self->eager};
    if (eager != NULL && eager != Py_None) {
        int truth = PyObject_IsTrue(eager);
        if (truth < 0) {
            goto done;
        }
        options.eager = truth;
        options.not_eager = !truth;
    }
    task = scope_spawn(self, coro, name, context, &options);
done:
    Py_DECREF(keys);
    Py_XDECREF(made);
    Py_XDECREF(extra_names);
    return task;
}

PyDoc_STRVAR(start_task_doc,
"start_task($self, /, coro, *, name=None, context=None, **kwargs)\n--\n\n"
"Wait for room under the scope's limit, then start the child; await it.\n\n"
"Takes what create_task() takes, and returns the task. Without a limit it doesn't\n"
"wait. Raises RuntimeError when the scope takes no children, also while it waits;\n"
"the coroutine is closed then, and when the wait is cancelled.");

static PyObject *
Scope_start_task(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    PyObject *call[AIOT_MAX_PARAMS + 2] = {op};
    if (nargs + nkw > AIOT_MAX_PARAMS) {
        PyErr_SetString(PyExc_TypeError, "too many arguments for start_task()");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nargs + nkw; i++) {
        call[1 + i] = args[i];
    }
    return call_policies("start_task", call, nargs + 1, kwnames);
}

/* ---- ending a scope ----------------------------------------------------------------------------------------- */

PyDoc_STRVAR(abort_doc,
"abort($self, /, msg=None)\n--\n\n"
"Cancel all children, once; take no more of them.\n\n"
"msg: goes to the children's cancel(). The body of the block goes on, and the\n"
"block ends normally. Calling it again does nothing.");

static const aiot_params msg_params = {"abort", 1, 0, 1, {AIOT_NAME(msg)}};

static PyObject *
Scope_abort(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *msg;
    if (check_initialized(self) < 0
        || aiot_bind(aiot_state_of_type(Py_TYPE(op)), &msg_params, args, nargs, kwnames, &msg) < 0
        || (!self->aborting && aiot_scope_abort(self, msg) < 0))
    {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(cancel_doc,
"cancel($self, /, msg=None)\n--\n\n"
"End the block early and without an error: cancel the children and the body.\n\n"
"msg: of the cancellation. May be called from anywhere in the thread of the loop,\n"
"repeatedly, before entry (the body is then interrupted at its first suspension)\n"
"and after exit. A shield that was opened inside the block holds it off until that\n"
"is left; one around it, or of this scope itself, does not. A cancellation\n"
"from outside still propagates. Raises RuntimeError in a plain `with`.\n\n"
"The semantics of asyncio.TaskGroup.cancel() of Python 3.15.");

static const aiot_params cancel_params = {"cancel", 1, 0, 1, {AIOT_NAME(msg)}};

static int
scope_cancel(AiotScope *self, PyObject *msg)
{
    if (self->exited || (self->exiting && self->n_children == 0)) {
        return 0;
    }
    bool first = !self->cancel_called;
    self->cancel_called = true;
    if (!self->entered) {
        Py_XSETREF(self->cancel_msg, Py_XNewRef(msg));
        return 0;
    }
    int failed = !self->aborting ? aiot_scope_abort(self, msg) : 0;
    if (first && in_body(self) && self->own == 0) {
        PyObject *error = failed ? PyErr_GetRaisedException() : NULL;
        failed = interrupt_body(self, msg, false);
        if (error != NULL) {
            PyErr_Clear();
            PyErr_SetRaisedException(error);
            failed = -1;
        }
    }
    return failed;
}

static PyObject *
Scope_cancel(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *msg;
    if (check_initialized(self) < 0
        || aiot_bind(aiot_state_of_type(Py_TYPE(op)), &cancel_params, args, nargs, kwnames, &msg) < 0)
    {
        return NULL;
    }
    if (self->sync) {
        PyErr_SetString(PyExc_RuntimeError, "a scope entered by a plain `with` cannot be cancelled");
        return NULL;
    }
    if (scope_cancel(self, msg == Py_None ? NULL : msg) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* What aclose() does before it waits. */
static PyObject *
context_close(PyObject *owner)
{
    AiotScope *self = (AiotScope *)owner;
    self->aborting = true;
    self->exited = true;
    return aiot_children_tasks((AiotChildren *)self);
}

static PyObject *
scope_close(PyObject *owner)
{
    AiotScope *self = (AiotScope *)owner;
    if (!self->aborting && aiot_scope_abort(self, NULL) < 0) {
        return NULL;
    }
    if (self->frame.task != NULL) {
        PyObject *host = Py_NewRef(self->frame.task);
        PyObject *current = self->loop->loop == NULL
                                ? NULL : PyObject_CallOneArg(self->loop->state->current_task, self->loop->loop);
        int answer = current == NULL ? -1 : 0;
        if (current == host) {
            self->closed_by_host = true;
        }
        else if (current != NULL) {
            answer = aiot_task_interrupt(self->loop, host, NULL);
        }
        Py_XDECREF(current);
        Py_DECREF(host);
        if (answer < 0) {
            return NULL;
        }
    }
    return aiot_children_tasks((AiotChildren *)self);
}

PyDoc_STRVAR(aclose_doc,
"aclose($self, /, *, timeout=None)\n--\n\n"
"Close it: cancel all children, and wait until they are gone; await it.\n\n"
"In a block, the host is cancelled as well: called from elsewhere, its body is\n"
"interrupted; called by the host itself, CancelledError is raised at the end of\n"
"the block. A shield of the scope doesn't hold that off.\n"
"timeout: seconds after which the wait is given up with UnfinishedTasksError,\n"
"which lists the tasks that go on and where each one stands.\n\n"
"May be called from any task, and repeatedly. Returns None. Without a block, it\n"
"raises what cancel_and_wait() of all children raises.");

static const aiot_params aclose_params = {"aclose", 0, 0, 1, {AIOT_NAME(timeout)}};

static PyObject *
Scope_aclose(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *timeout;
    double seconds = INFINITY;
    if (check_initialized(self) < 0
        || aiot_bind(self->loop->state, &aclose_params, args, nargs, kwnames, &timeout) < 0
        || (timeout != NULL && timeout != Py_None && aiot_as_seconds(timeout, "timeout", &seconds) < 0))
    {
        return NULL;
    }
    bool in_block = self->mode != AIOT_TASK_CONTEXT;
    return aiot_cancel_wait_new(self->loop->state, op, in_block ? scope_close : context_close, in_block, seconds);
}

/* ---- entering ----------------------------------------------------------------------------------------------- */

typedef struct {
    AIOT_AWAITABLE_HEAD
    AiotScope *scope;
} EnterObject;

static int
enter_group(AiotScope *self)
{
    self->var_reset = PyContextVar_Set(self->loop->state->current_taskgroup, (PyObject *)self);
    return self->var_reset == NULL ? -1 : 0;
}

static void
leave_group(AiotScope *self)
{
    if (self->var_reset != NULL) {
        /* Left in another context than it was entered in: that one never saw the group. */
        if (PyContextVar_Reset(self->loop->state->current_taskgroup, self->var_reset) < 0) {
            PyErr_Clear();
        }
        Py_CLEAR(self->var_reset);
    }
}

static int
scope_enter(AiotScope *self, bool sync)
{
    if (check_initialized(self) < 0) {
        return -1;
    }
    if (self->entered) {
        PyErr_Format(PyExc_RuntimeError, "%s %R has already been entered", scope_name(self), self);
        return -1;
    }
    AiotLoop *running = aiot_loop_get_running(aiot_state_of_type(Py_TYPE(self)));
    if (running == NULL) {
        return -1;
    }
    if (self->mode == AIOT_TASK_GROUP) {
        Py_XSETREF(self->loop, running);
    }
    else {
        Py_DECREF(running);
        if (running != self->loop) {
            PyErr_Format(PyExc_RuntimeError, "%s %R belongs to another event loop", scope_name(self), self);
            return -1;
        }
    }
    /* As asyncio's group says it. */
    PyObject *host = aiot_loop_current_task(self->loop, self->mode == AIOT_TASK_GROUP
                                                            ? "TaskGroup cannot determine the parent task: it" : scope_name(self));
    if (host == NULL) {
        return -1;
    }
    double when = 0;
    if (self->timeout != NO_TIMEOUT && aiot_loop_deadline(self->loop, self->timeout, &when) < 0) {
        Py_DECREF(host);
        return -1;
    }
    int failed = aiot_frame_push(self->loop, &self->frame, host, self->shielded, sync);
    if (failed) {
        Py_DECREF(host);
        return -1;
    }
    self->host = host;
    self->entered = true;
    self->sync = sync;
    if (self->timeout != NO_TIMEOUT) {
        failed = aiot_alarm_set(self->loop, &self->alarm, when);
    }
    if (!failed && self->mode == AIOT_TASK_GROUP) {
        failed = enter_group(self);
    }
    if (!failed && self->cancel_called) {
        self->aborting = true;
        failed = interrupt_body(self, self->cancel_msg, false);
    }
    if (failed) {
        PyObject *exc = PyErr_GetRaisedException();
        aiot_alarm_cancel(self->loop, &self->alarm);
        leave_group(self);
        aiot_frame_pop(self->loop, &self->frame);
        self->exiting = self->exited = true;
        PyErr_SetRaisedException(exc);
    }
    return failed;
}

static PySendResult
Enter_start(aiot_awaitable *op, PyObject **result)
{
    AiotScope *scope = ((EnterObject *)op)->scope;
    if (scope_enter(scope, false) < 0) {
        return PYGEN_ERROR;
    }
    *result = Py_NewRef((PyObject *)scope);
    return PYGEN_RETURN;
}

static const aiot_awaitable_ops Enter_ops = {.name = "__aenter__", .start = Enter_start};

/* ---- leaving ------------------------------------------------------------------------------------------------ */

typedef enum {
    JOINING,        /* children are left */
    FLUSHING,       /* none is; a request that is pending is being delivered to us, so that it isn't twice */
    DELIVERING,     /* the same, after the frame was closed: what a shield kept */
} exit_stage;

typedef struct {
    AIOT_AWAITABLE_HEAD
    uint8_t stage;
    bool only_own;              /* `cancelled` is what we asked for ourselves */
    AiotScope *scope;
    PyObject *exc;              /* of the body, or NULL */
    PyObject *cancelled;        /* the CancelledError that came while waiting, or NULL */
    aiot_joiner joiner;
} ExitObject;

typedef enum {
    PASS,           /* the body's own exception, if any, goes on */
    SWALLOW,
    RAISE,          /* an exception is set */
    DELIVER,        /* as the two before, with a CancelledError; what the task would throw next is the same one */
} ending;

/* Is it right to leave now? 0, or -1 with RuntimeError. */
static int
check_leaves(AiotScope *self, bool sync)
{
    if (check_initialized(self) < 0) {
        return -1;
    }
    if (!self->entered || self->exiting || self->sync != sync) {
        PyErr_Format(PyExc_RuntimeError, "%s %R %s", scope_name(self), self,
                     !self->entered ? "has not been entered" : "is not to be left here");
        return -1;
    }
    if (self->mode == AIOT_TASK_GROUP || self->loop->loop == NULL) {
        return 0;
    }
    PyObject *current = PyObject_CallOneArg(self->loop->state->current_task, self->loop->loop);
    if (current == NULL) {
        return -1;
    }
    Py_DECREF(current);
    if (current != self->frame.task) {
        PyErr_Format(PyExc_RuntimeError, "%s %R must be left by the task that entered it", scope_name(self), self);
        return -1;
    }
    /* Groups may be left in any order, as asyncio's. */
    for (aiot_frame *frame = aiot_frame_of_task(self->loop, current); frame != &self->frame; frame = frame->outer) {
        if (frame == NULL || AIOT_CONTAINER_OF(frame, AiotScope, frame)->mode != AIOT_TASK_GROUP) {
            PyErr_Format(PyExc_RuntimeError, "%s %R must be left after those that were entered inside it",
                         scope_name(self), self);
            return -1;
        }
    }
    return 0;
}

static void
leave_frame(AiotScope *self)
{
    PyObject *pending = PyErr_GetRaisedException();
    self->exiting = self->exited = true;
    if (self->timeout != NO_TIMEOUT) {
        aiot_alarm_cancel(self->loop, &self->alarm);
    }
    leave_group(self);
    aiot_frame_pop(self->loop, &self->frame);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* A request from outside that was delivered but is not what the block ends with: let it be delivered once more. */
static int
deliver_again(AiotScope *self, PyObject *host, PyObject *msg)
{
    return aiot_task_take_back(self->loop, host) < 0 || aiot_task_interrupt(self->loop, host, msg) < 0 ? -1 : 0;
}

static ending
raise_group(AiotScope *self, PyObject *errors)
{
    PyObject *group = PyObject_CallMethod((PyObject *)self, "_make_error", "O", errors);
    if (group != NULL) {
        PyException_SetCause(group, NULL);      /* "from None" */
        raise_it(group);
    }
    return RAISE;
}

/* How a group ends. exc: of the body. cancelled: what came while waiting. */
static ending
end_group(AiotScope *self, PyObject *host, PyObject *exc, PyObject *cancelled, bool had_own, bool outside)
{
    bool body_cancelled = is_cancelled_error(self, exc);
    PyObject *errors = self->errors;
    self->errors = NULL;
    if (self->base_error != NULL) {
        Py_XDECREF(errors);
        raise_it(Py_NewRef(self->base_error));
        return RAISE;
    }
    ending end = SWALLOW;
    if (exc != NULL && !body_cancelled) {
        if ((errors == NULL && (errors = PyList_New(0)) == NULL) || PyList_Append(errors, exc) < 0) {
            Py_XDECREF(errors);
            return RAISE;
        }
    }
    if (errors != NULL) {
        if (outside && deliver_again(self, host, NULL) < 0) {
            end = RAISE;
        }
        else if (PyList_GET_SIZE(errors) == 1 && exc != NULL && !body_cancelled
                 && PyErr_GivenExceptionMatches(exc, PyExc_GeneratorExit))
        {
            end = PASS;
        }
        else {
            end = raise_group(self, errors);
        }
        Py_DECREF(errors);
    }
    else if (had_own && !outside) {
        end = SWALLOW;
    }
    else if (cancelled != NULL) {
        raise_it(Py_NewRef(cancelled));
        end = RAISE;
    }
    else if (exc != NULL) {
        end = PASS;
    }
    return end;
}

/* A new CancelledError; it tells who cancelled the host when that is traced. */
static PyObject *
cancelled_error(AiotScope *self, PyObject *host)
{
    aiot_state *state = self->loop->state;
    PyObject *exc = PyObject_CallNoArgs(state->CancelledError);
    PyObject *requests = NULL;
    if (exc != NULL && PyObject_GetOptionalAttr(host, state->str__aiotools_cancel_requests, &requests) > 0) {
        PyObject *module = PyImport_ImportModule("aiotools._trace");
        PyObject *told = module == NULL ? NULL : PyObject_CallMethod(module, "_tell", "OO", exc, requests);
        Py_XDECREF(module);
        Py_XDECREF(told);
        Py_DECREF(requests);
    }
    if (PyErr_Occurred()) {
        Py_CLEAR(exc);
    }
    return exc;
}

/* How a scope ends, base errors and what its shield kept left aside. */
static ending
choose_end(AiotScope *self, PyObject *host, PyObject *exc, PyObject *cancelled, bool had_own, bool outside, bool in_shield,
           bool delivered)
{
    bool body_cancelled = is_cancelled_error(self, exc);
    PyObject *scheduled = NULL;
    if (cancelled != NULL && (outside || !had_own)) {
        scheduled = Py_NewRef(cancelled);
    }
    else if (exc == NULL && (outside || delivered || self->closed_by_host || (self->expired && had_own))) {
        if ((scheduled = cancelled_error(self, host)) == NULL) {
            return RAISE;
        }
    }
    ending end = PASS;
    if (self->expired) {
        PyObject *error = PyObject_CallNoArgs(PyExc_TimeoutError);
        if (error != NULL && outside && deliver_again(self, host, NULL) < 0) {
            Py_CLEAR(error);
        }
        if (error != NULL) {
            PyObject *cause = scheduled != NULL ? scheduled : cancelled != NULL ? cancelled : body_cancelled ? exc : NULL;
            PyException_SetCause(error, Py_XNewRef(cause));
            raise_it(error);
        }
        end = RAISE;
    }
    else if (scheduled != NULL) {
        if (in_shield && !outside && !delivered && !self->closed_by_host) {
            end = exc == NULL || body_cancelled ? SWALLOW : PASS;
        }
        else {
            raise_it(Py_NewRef(scheduled));
            end = RAISE;
        }
    }
    else if (body_cancelled && !outside && !delivered && (had_own || in_shield)) {
        end = SWALLOW;
    }
    Py_XDECREF(scheduled);
    return end;
}

/* How a scope ends, having handed over so many requests that its shield kept. */
static ending
end_delivered(AiotScope *self, PyObject *host, PyObject *exc, ending end, Py_ssize_t pending, PyObject *msg)
{
    bool with_cancellation = end == RAISE ? PyErr_ExceptionMatches(self->loop->state->CancelledError) != 0
                                          : end == PASS && is_cancelled_error(self, exc);
    if (with_cancellation) {
        return pending > 0 ? DELIVER : end;
    }
    if (pending == 0) {
        /* What the block ends with wins; the request stays pending. */
        PyObject *raised = PyErr_GetRaisedException();
        if (deliver_again(self, host, msg) < 0) {
            Py_XDECREF(raised);
            return RAISE;
        }
        if (raised != NULL) {
            PyErr_SetRaisedException(raised);
        }
    }
    return end;
}

/* How a scope ends; its frame is closed. */
static ending
end_scope(AiotScope *self, PyObject *host, PyObject *exc, PyObject *cancelled, bool had_own, bool outside, bool in_shield)
{
    Py_ssize_t pending;
    PyObject *kept = Py_XNewRef(self->frame.deferred);
    Py_ssize_t delivered = aiot_frame_hand_over(self->loop, &self->frame, host, &pending);
    if (delivered < 0) {
        Py_XDECREF(kept);
        return RAISE;
    }
    ending end = RAISE;
    if (self->base_error != NULL) {
        raise_it(Py_NewRef(self->base_error));
    }
    else {
        end = choose_end(self, host, exc, cancelled, had_own, outside, in_shield, delivered > 0);
    }
    if (delivered > 0) {
        /* The message of the latest one. */
        PyObject *msg = PyTuple_GET_ITEM(PyList_GET_ITEM(kept, PyList_GET_SIZE(kept) - 1), 0);
        end = end_delivered(self, host, exc, end, pending, msg);
    }
    Py_XDECREF(kept);
    return end;
}

/* The end of the block: no child is left. */
static ending
scope_leave(AiotScope *self, PyObject *exc, PyObject *cancelled)
{
    PyObject *host = Py_NewRef(self->frame.task);
    aiot_frame *outer = self->frame.outer;
    bool in_shield = outer != NULL && outer->shield != NULL;
    Py_ssize_t at_entry = self->frame.requests;
    Py_ssize_t requests = aiot_task_requests(self->loop, host);
    bool had_own = self->own > 0;
    for (; requests >= 0 && self->own > 0; self->own--) {
        if (requests > at_entry) {
            requests = aiot_task_take_back(self->loop, host);
        }
    }
    ending end = RAISE;
    leave_frame(self);
    if (requests >= 0) {
        bool outside = requests > at_entry;
        end = self->mode == AIOT_TASK_GROUP ? end_group(self, host, exc, cancelled, had_own, outside)
                                            : end_scope(self, host, exc, cancelled, had_own, outside, in_shield);
    }
    Py_DECREF(host);
    /* What was raised refers to frames that refer to us, and the host may end with it. */
    Py_CLEAR(self->host);
    Py_CLEAR(self->base_error);
    Py_CLEAR(self->errors);
    return end;
}

/* The body is over. */
static void
scope_begin_exit(AiotScope *self, PyObject *exc)
{
    self->exiting = true;
    if (exc != NULL) {
        if (is_base_error(exc) && self->base_error == NULL) {
            self->base_error = Py_NewRef(exc);
        }
        abort_quietly(self, NULL);
    }
}

/* A request may have been made and not delivered yet: the body ended before its next suspension. 1, 0, -1. */
static int
must_flush(AiotScope *self, PyObject *exc)
{
    if (exc != NULL && self->own == 0) {
        return 0;
    }
    if (self->own == 0) {
        if (self->mode == AIOT_TASK_GROUP) {
            return 0;
        }
        Py_ssize_t requests = aiot_task_requests(self->loop, self->frame.task);
        if (requests < 0 || requests <= self->frame.requests) {
            return requests < 0 ? -1 : 0;
        }
    }
    return aiot_task_must_cancel(self->loop, self->frame.task);
}

static PySendResult
exit_answer(ExitObject *self, ending end, PyObject **result)
{
    switch (end) {
    case PASS:
        *result = Py_NewRef(Py_False);
        break;
    case SWALLOW:
        *result = Py_NewRef(Py_True);
        break;
    case DELIVER:
        self->stage = DELIVERING;
        Py_XSETREF(self->cancelled, PyErr_GetRaisedException());
        return aiot_join_checkpoint(self->scope->loop, &self->joiner, result);
    case RAISE:
    default:
        break;
    }
    Py_CLEAR(self->exc);
    Py_CLEAR(self->cancelled);
    return end == RAISE ? PYGEN_ERROR : PYGEN_RETURN;
}

/* What a shield kept was delivered, or nobody could deliver it: the block ends with it all the same. */
static PySendResult
exit_delivered(ExitObject *self, PyObject **result)
{
    if (self->cancelled == NULL) {
        return exit_answer(self, PASS, result);
    }
    raise_it(Py_NewRef(self->cancelled));
    return exit_answer(self, RAISE, result);
}

/* Left at once, as it can't be waited any longer: an exception is set. */
static PySendResult
exit_give_up(ExitObject *self)
{
    PyObject *exc = PyErr_GetRaisedException();
    aiot_joiner_leave(&self->joiner);
    if (self->stage != DELIVERING) {
        abort_quietly(self->scope, NULL);
        leave_frame(self->scope);
        self->scope->own = 0;
    }
    PyErr_SetRaisedException(exc);
    return PYGEN_ERROR;
}

static PySendResult
exit_step(ExitObject *self, PyObject **result)
{
    AiotScope *scope = self->scope;
    if (scope->n_children > 0) {
        PySendResult answer = aiot_join((AiotChildren *)scope, &self->joiner, result);
        return answer == PYGEN_ERROR ? exit_give_up(self) : answer;
    }
    if (self->stage == JOINING) {
        int flush = must_flush(scope, self->exc);
        if (flush != 0) {
            self->stage = FLUSHING;
            if (flush < 0 || aiot_join_checkpoint(scope->loop, &self->joiner, result) == PYGEN_ERROR) {
                return exit_give_up(self);
            }
            return PYGEN_NEXT;
        }
    }
    return exit_answer(self, scope_leave(scope, self->exc, self->cancelled), result);
}

static PySendResult
Exit_start(aiot_awaitable *op, PyObject **result)
{
    ExitObject *self = (ExitObject *)op;
    if (check_leaves(self->scope, false) < 0) {
        return PYGEN_ERROR;
    }
    scope_begin_exit(self->scope, self->exc);
    return exit_step(self, result);
}

static PySendResult
Exit_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    ExitObject *self = (ExitObject *)op;
    if (aiot_joiner_resumed(&self->joiner) < 0) {
        return exit_give_up(self);
    }
    return self->stage == DELIVERING ? exit_delivered(self, result) : exit_step(self, result);
}

static PySendResult
Exit_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    ExitObject *self = (ExitObject *)op;
    aiot_joiner_leave(&self->joiner);
    if (!is_cancelled_error(self->scope, exc)) {
        PyErr_SetRaisedException(Py_NewRef(exc));
        return exit_give_up(self);
    }
    if (self->stage == DELIVERING) {
        return exit_delivered(self, result);
    }
    /* Further ones don't cut the wait short. The first one from outside is what the block may end with. */
    if (self->cancelled == NULL || self->only_own) {
        AiotScope *scope = self->scope;
        Py_ssize_t requests = scope->own == 0 ? -1 : aiot_task_requests(scope->loop, scope->frame.task);
        if (requests < 0) {
            PyErr_Clear();
        }
        self->only_own = requests >= 0 && requests <= scope->frame.requests + scope->own;
        if (self->cancelled == NULL || !self->only_own) {
            Py_XSETREF(self->cancelled, Py_NewRef(exc));
        }
    }
    PyObject *msg = Py_XNewRef(aiot_cancel_message(exc));
    abort_quietly(self->scope, msg);
    Py_XDECREF(msg);
    return exit_step(self, result);
}

static void
Exit_abandon(aiot_awaitable *op)
{
    ExitObject *self = (ExitObject *)op;
    PyErr_SetNone(PyExc_GeneratorExit);
    (void)exit_give_up(self);
    PyErr_Clear();
}

static const aiot_awaitable_ops Exit_ops = {
    .name = "__aexit__",
    .start = Exit_start,
    .resume = Exit_resume,
    .throw = Exit_throw,
    .abandon = Exit_abandon,
};

PyDoc_STRVAR(aenter_doc, "__aenter__($self, /)\n--\n\nOpen the block; the result is the scope.");
PyDoc_STRVAR(aexit_doc,
"__aexit__($self, exc_type, exc, tb, /)\n--\n\nWait for the children, then leave the block.");

static PyObject *
Scope_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    EnterObject *self = (EnterObject *)state->ScopeEnterType->tp_alloc(state->ScopeEnterType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, &Enter_ops);
        self->scope = (AiotScope *)Py_NewRef(op);
    }
    return (PyObject *)self;
}

static int
check_exit_arguments(PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_Format(PyExc_TypeError, "__aexit__() takes exactly 3 arguments (%zd given)", nargs);
        return -1;
    }
    if (args[1] != Py_None && !PyExceptionInstance_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "the second argument of __aexit__() must be an exception or None");
        return -1;
    }
    return 0;
}

static PyObject *
Scope_aexit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (check_exit_arguments(args, nargs) < 0) {
        return NULL;
    }
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    ExitObject *self = (ExitObject *)state->ScopeExitType->tp_alloc(state->ScopeExitType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, &Exit_ops);
        aiot_joiner_init(&self->joiner);
        self->scope = (AiotScope *)Py_NewRef(op);
        self->exc = args[1] == Py_None ? NULL : Py_NewRef(args[1]);
    }
    return (PyObject *)self;
}

/* ---- plain `with ShieldScope()` ----------------------------------------------------------------------------- */

PyDoc_STRVAR(enter_doc, "__enter__($self, /)\n--\n\nOpen the shield, without children; the result is None.");
PyDoc_STRVAR(exit_doc,
"__exit__($self, exc_type, exc, tb, /)\n--\n\nLeave the shield; raises CancelledError if one was held off.");

static PyObject *
ShieldScope_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (scope_enter((AiotScope *)op, true) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
ShieldScope_exit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    AiotScope *self = (AiotScope *)op;
    if (check_exit_arguments(args, nargs) < 0 || check_leaves(self, true) < 0) {
        return NULL;
    }
    PyObject *exc = args[1] == Py_None ? NULL : args[1];
    scope_begin_exit(self, exc);
    switch (scope_leave(self, exc, NULL)) {
    case PASS:
        Py_RETURN_FALSE;
    case SWALLOW:
        Py_RETURN_TRUE;
    case DELIVER:
        if (!PyErr_Occurred()) {
            Py_RETURN_FALSE;
        }
        return NULL;
    case RAISE:
    default:
        return NULL;
    }
}

/* ---- construction ------------------------------------------------------------------------------------------- */

/* Calling __init__ again on what is in use would lose children. */
static int
scope_init(AiotScope *self, aiot_scope_mode mode)
{
    if (self->mode != AIOT_UNINITIALIZED && (self->entered || self->exited || self->n_children > 0)) {
        PyErr_Format(PyExc_RuntimeError, "%s %R is in use", scope_name(self), self);
        return -1;
    }
    aiot_state *state = aiot_state_of_type(Py_TYPE(self));
    if (state == NULL) {
        return -1;
    }
    if (mode != AIOT_TASK_GROUP) {
        AiotLoop *loop = aiot_loop_get_running(state);
        if (loop == NULL) {
            return -1;
        }
        Py_XSETREF(self->loop, loop);
    }
    self->mode = mode;
    self->ops = mode == AIOT_TASK_GROUP ? &group_ops : &scope_ops;
    return 0;
}

static PyObject *
Scope_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    AiotScope *self = (AiotScope *)type->tp_alloc(type, 0);
    if (self != NULL) {
        aiot_children_init(self, &scope_ops);
        aiot_alarm_init(&self->alarm, (PyObject *)self, Scope_fire);
        self->timeout = NO_TIMEOUT;
    }
    return (PyObject *)self;
}

/* Ellipsis stands for the default in signatures. */
static int
set_handler_and_context(AiotScope *self, PyObject *handler, PyObject *context)
{
    aiot_state *state = self->loop->state;
    if (context != NULL && context != Py_None && !PyContext_CheckExact(context)) {
        PyErr_Format(PyExc_TypeError, "context must be a contextvars.Context or None, not '%.200s'",
                     Py_TYPE(context)->tp_name);
        return -1;
    }
    Py_XSETREF(self->handler, Py_NewRef(handler == NULL || handler == Py_Ellipsis ? state->loop_token : handler));
    Py_XSETREF(self->context, context == NULL || context == Py_None ? NULL : Py_NewRef(context));
    return 0;
}

static const aiot_params context_params = {
    "TaskContext", 0, 0, 2, {AIOT_NAME(exception_handler), AIOT_NAME(context)},
};

static int
TaskContext_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *given[2];
    if (scope_init(self, AIOT_TASK_CONTEXT) < 0
        || aiot_bind_tuple(self->loop->state, &context_params, args, kwargs, given) < 0)
    {
        return -1;
    }
    PyFrameObject *frame = PyEval_GetFrame();
    if (frame != NULL) {
        Py_XSETREF(self->origin, (PyObject *)PyFrame_GetCode(frame));
        self->origin_line = PyFrame_GetLineNumber(frame);
    }
    return set_handler_and_context(self, given[0], given[1]);
}

static const aiot_params scope_params = {
    "TaskScope", 0, 0, 6,
    {AIOT_NAME(shield), AIOT_NAME(timeout), AIOT_NAME(exception_handler), AIOT_NAME(context), AIOT_NAME(limit),
     AIOT_NAME(eager_start)},
};

static const aiot_params shield_params = {"ShieldScope", 1, 0, 1, {AIOT_NAME(timeout)}};

static int
set_timeout(AiotScope *self, PyObject *timeout)
{
    self->timeout = NO_TIMEOUT;
    if (timeout != NULL && timeout != Py_None) {
        if (aiot_as_seconds(timeout, "timeout", &self->timeout) < 0) {
            return -1;
        }
        if (self->timeout < 0) {
            self->timeout = 0;
        }
    }
    return 0;
}

static int
set_flag(PyObject *value, bool *flag)
{
    int truth = value == NULL ? 0 : PyObject_IsTrue(value);
    *flag = truth > 0;
    return truth < 0 ? -1 : 0;
}

static int
TaskScope_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *given[6];
    if (scope_init(self, AIOT_TASK_SCOPE) < 0
        || aiot_bind_tuple(self->loop->state, &scope_params, args, kwargs, given) < 0
        || set_flag(given[0], &self->shielded) < 0
        || set_timeout(self, given[1]) < 0
        || set_handler_and_context(self, given[2], given[3]) < 0
        || set_flag(given[5], &self->eager) < 0)
    {
        return -1;
    }
    Py_CLEAR(self->gate);
    if (given[4] != NULL && given[4] != Py_None) {
        self->gate = call_policies("Gate", &given[4], 1, NULL);
        return self->gate == NULL ? -1 : 0;
    }
    return 0;
}

static int
ShieldScope_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    AiotScope *self = (AiotScope *)op;
    PyObject *timeout;
    if (scope_init(self, AIOT_TASK_SCOPE) < 0
        || aiot_bind_tuple(self->loop->state, &shield_params, args, kwargs, &timeout) < 0
        || set_timeout(self, timeout) < 0
        || set_handler_and_context(self, NULL, NULL) < 0)
    {
        return -1;
    }
    self->shielded = true;
    return 0;
}

static int
TaskGroupCore_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) > 0 || (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0)) {
        PyErr_SetString(PyExc_TypeError, "TaskGroupCore() takes no arguments");
        return -1;
    }
    return scope_init((AiotScope *)op, AIOT_TASK_GROUP);
}

/* ---- the types ---------------------------------------------------------------------------------------------- */

static PyObject *
Scope_repr(PyObject *op)
{
    AiotScope *self = (AiotScope *)op;
    const char *state = self->aborting ? "cancelling" : self->entered ? "entered" : "";
    const char *gap = self->mode == AIOT_TASK_GROUP ? (self->n_children > 0 || *state ? " " : "") : "  ";
    if (self->mode != AIOT_TASK_GROUP && self->n_children == 0 && *state == '\0') {
        gap = " ";
    }
    if (self->n_children > 0) {
        return PyUnicode_FromFormat("<%s%stasks=%zd%s%s>", scope_name(self), gap, self->n_children,
                                    *state ? " " : "", state);
    }
    return PyUnicode_FromFormat("<%s%s%s>", scope_name(self), gap, state);
}

static PyObject *
Scope_get_tasks(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *tasks = aiot_children_tasks((AiotChildren *)op);
    PyObject *set = tasks == NULL ? NULL : PySet_New(tasks);
    Py_XDECREF(tasks);
    return set;
}

static PyGetSetDef Scope_getset[] = {
    {"_tasks", Scope_get_tasks, NULL, "The live children: a new set.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Scope_members[] = {
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(AiotScope, weakrefs), Py_READONLY, NULL},
    {"_aborting", Py_T_BOOL, offsetof(AiotScope, aborting), Py_READONLY, "Whether the children were cancelled."},
    {"_entered", Py_T_BOOL, offsetof(AiotScope, entered), Py_READONLY, "Whether it was ever entered."},
    {"_exiting", Py_T_BOOL, offsetof(AiotScope, exiting), Py_READONLY, "Whether the body is over."},
    {"_expired", Py_T_BOOL, offsetof(AiotScope, expired), Py_READONLY, "Whether its timeout fired."},
    {"_n_done", Py_T_PYSSIZET, offsetof(AiotScope, n_done), Py_READONLY, "How many children have ended, however."},
    {"_n_failed", Py_T_PYSSIZET, offsetof(AiotScope, n_failed), Py_READONLY, "How many of them failed."},
    {"_gate", Py_T_OBJECT_EX, offsetof(AiotScope, gate), Py_READONLY, "What limits how many children run."},
    {NULL, 0, 0, 0, NULL},
};

/* A context that had children and was never closed: its owner forgot them. */
static void
Scope_finalize(PyObject *op)
{
    AiotScope *self = (AiotScope *)op;
    if (self->mode != AIOT_TASK_CONTEXT || !self->entered || self->exited) {
        return;
    }
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *file = self->origin == NULL
                         ? NULL : PyObject_GetAttr(self->origin, aiot_state_of_type(Py_TYPE(op))->str_co_filename);
    int failed;
    if (file != NULL) {
        failed = PyErr_ResourceWarning(op, 1, "%s %R, created at %S:%d, was never closed: use `await ....aclose()`",
                                       scope_name(self), op, file, self->origin_line);
        Py_DECREF(file);
    }
    else {
        PyErr_Clear();
        failed = PyErr_ResourceWarning(op, 1, "%s %R was never closed: use `await ....aclose()`", scope_name(self), op);
    }
    if (failed) {
        PyErr_WriteUnraisable(op);
    }
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

static int
Scope_traverse(PyObject *op, visitproc visit, void *arg)
{
    AiotScope *self = (AiotScope *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->handler);
    Py_VISIT(self->context);
    Py_VISIT(self->gate);
    Py_VISIT(self->cancel_msg);
    Py_VISIT(self->base_error);
    Py_VISIT(self->errors);
    Py_VISIT(self->var_reset);
    Py_VISIT(self->origin);
    int stop = aiot_frame_traverse(&self->frame, visit, arg);
    return stop ? stop : aiot_children_traverse(op, visit, arg);
}

static int
Scope_clear(PyObject *op)
{
    AiotScope *self = (AiotScope *)op;
    if (self->loop != NULL) {
        aiot_frame_pop(self->loop, &self->frame);
    }
    Py_CLEAR(self->frame.deferred);
    Py_CLEAR(self->handler);
    Py_CLEAR(self->context);
    Py_CLEAR(self->gate);
    Py_CLEAR(self->cancel_msg);
    Py_CLEAR(self->base_error);
    Py_CLEAR(self->errors);
    Py_CLEAR(self->var_reset);
    Py_CLEAR(self->origin);
    aiot_children_clear(op);
    return 0;
}

static void
Scope_dealloc(PyObject *op)
{
    AiotScope *self = (AiotScope *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->mode == AIOT_TASK_CONTEXT && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    assert(self->n_children == 0 && aiot_link_is_empty(&self->joiners) && !aiot_alarm_is_set(&self->alarm));
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Scope_clear(op);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

#define METHOD(name, function, flags, doc) {name, (PyCFunction)(void (*)(void))function, flags, doc}
#define CHILD_METHODS                                                                                   \
    METHOD("create_task", Scope_create_task, METH_FASTCALL | METH_KEYWORDS, create_task_doc)
#define BLOCK_METHODS                                                                                   \
    METHOD("start_task", Scope_start_task, METH_FASTCALL | METH_KEYWORDS, start_task_doc),              \
    METHOD("cancel", Scope_cancel, METH_FASTCALL | METH_KEYWORDS, cancel_doc),                          \
    METHOD("__aenter__", Scope_aenter, METH_NOARGS, aenter_doc),                                        \
    METHOD("__aexit__", Scope_aexit, METH_FASTCALL, aexit_doc)

static PyMethodDef TaskContext_methods[] = {
    CHILD_METHODS,
    METHOD("aclose", Scope_aclose, METH_FASTCALL | METH_KEYWORDS, aclose_doc),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef TaskScope_methods[] = {
    BLOCK_METHODS,
    METHOD("abort", Scope_abort, METH_FASTCALL | METH_KEYWORDS, abort_doc),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef ShieldScope_methods[] = {
    METHOD("__enter__", ShieldScope_enter, METH_NOARGS, enter_doc),
    METHOD("__exit__", ShieldScope_exit, METH_FASTCALL, exit_doc),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef TaskGroupCore_methods[] = {
    CHILD_METHODS,
    METHOD("cancel", Scope_cancel, METH_FASTCALL | METH_KEYWORDS, cancel_doc),
    METHOD("__aenter__", Scope_aenter, METH_NOARGS, aenter_doc),
    METHOD("__aexit__", Scope_aexit, METH_FASTCALL, aexit_doc),
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(TaskContext_doc,
"TaskContext(*, exception_handler=..., context=None)\n--\n\n"
"Owns child tasks for as long as an object lives: close it with aclose().\n\n"
"exception_handler: None drops the failures of children, a callable gets each as\n"
"an ErrorArg dict; by default they go to the loop's exception handler.\n"
"context: the contextvars.Context of all children; by default a copy each.\n\n"
"Not a context manager: see TaskScope. Raises RuntimeError without a running loop.\n"
"The task that calls create_task() first is the owner, and no other may.\n"
"Since aiotools 2.0.");

PyDoc_STRVAR(TaskScope_doc,
"TaskScope(*, shield=False, timeout=None, exception_handler=..., context=None, limit=None, eager_start=False)\n--\n\n"
"A block that waits for its child tasks: `async with TaskScope() as ts`.\n\n"
"A child that fails is reported at once and disturbs neither its siblings nor the\n"
"body; nothing of it is kept.\n\n"
"shield: hold off cancellations from outside until the block is left.\n"
"timeout: seconds from entry after which children and body are cancelled and the\n"
"block raises TimeoutError; it pierces shields.\n"
"exception_handler, context: as for TaskContext.\n"
"limit: how many children run at once; the others wait for their turn.\n"
"eager_start: children run at once up to their first suspension (3.12+).\n\n"
"Raises RuntimeError when constructed without a running loop, entered twice or\n"
"outside a task, left by another task or out of order. The idea is Trio's nursery.\n"
"Since aiotools 2.0; shield and timeout 2.1; limit, eager_start and cancel() 3.0.");

PyDoc_STRVAR(ShieldScope_doc,
"ShieldScope(timeout=None)\n--\n\n"
"TaskScope(shield=True, timeout=timeout), also for a plain `with`.\n\n"
"Cancellations that come from outside are held off until the block is left, which\n"
"then raises CancelledError; what is opened inside works as everywhere.\n"
"In a plain `with` there are no children, and the target is None.\n"
"Since aiotools 2.1.");

PyDoc_STRVAR(TaskGroupCore_doc,
"TaskGroupCore()\n--\n\nWhat aiotools.TaskGroup is made of; use that.");

static PyType_Slot TaskContext_slots[] = {
    {Py_tp_doc, (void *)TaskContext_doc},
    {Py_tp_new, Scope_new},
    {Py_tp_init, TaskContext_init},
    {Py_tp_methods, TaskContext_methods},
    {Py_tp_members, Scope_members},
    {Py_tp_getset, Scope_getset},
    {Py_tp_repr, Scope_repr},
    {Py_tp_finalize, Scope_finalize},
    {Py_tp_traverse, Scope_traverse},
    {Py_tp_clear, Scope_clear},
    {Py_tp_dealloc, Scope_dealloc},
    {0, NULL},
};

static PyType_Slot TaskScope_slots[] = {
    {Py_tp_doc, (void *)TaskScope_doc},
    {Py_tp_init, TaskScope_init},
    {Py_tp_methods, TaskScope_methods},
    {Py_tp_traverse, Scope_traverse},
    {Py_tp_clear, Scope_clear},
    {Py_tp_dealloc, Scope_dealloc},
    {0, NULL},
};

static PyType_Slot ShieldScope_slots[] = {
    {Py_tp_doc, (void *)ShieldScope_doc},
    {Py_tp_init, ShieldScope_init},
    {Py_tp_methods, ShieldScope_methods},
    {Py_tp_traverse, Scope_traverse},
    {Py_tp_clear, Scope_clear},
    {Py_tp_dealloc, Scope_dealloc},
    {0, NULL},
};

static PyType_Slot TaskGroupCore_slots[] = {
    {Py_tp_doc, (void *)TaskGroupCore_doc},
    {Py_tp_new, Scope_new},
    {Py_tp_init, TaskGroupCore_init},
    {Py_tp_methods, TaskGroupCore_methods},
    {Py_tp_members, Scope_members},
    {Py_tp_getset, Scope_getset},
    {Py_tp_repr, Scope_repr},
    {Py_tp_traverse, Scope_traverse},
    {Py_tp_clear, Scope_clear},
    {Py_tp_dealloc, Scope_dealloc},
    {0, NULL},
};

#define SCOPE_SPEC(NAME)                                                            \
    static PyType_Spec NAME##_spec = {                                              \
        .name = "aiotools._aiotools." #NAME,                                        \
        .basicsize = sizeof(AiotScope),                                             \
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,     \
        .slots = NAME##_slots,                                                      \
    }

SCOPE_SPEC(TaskContext);
SCOPE_SPEC(TaskScope);
SCOPE_SPEC(ShieldScope);
SCOPE_SPEC(TaskGroupCore);

static int
Enter_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((EnterObject *)op)->scope);
    return 0;
}

static int
Enter_clear(PyObject *op)
{
    Py_CLEAR(((EnterObject *)op)->scope);
    return 0;
}

static void
Enter_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    Enter_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static int
Exit_traverse(PyObject *op, visitproc visit, void *arg)
{
    ExitObject *self = (ExitObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->scope);
    Py_VISIT(self->exc);
    Py_VISIT(self->cancelled);
    Py_VISIT(self->joiner.waiter);
    return 0;
}

static int
Exit_clear(PyObject *op)
{
    ExitObject *self = (ExitObject *)op;
    aiot_joiner_leave(&self->joiner);
    Py_CLEAR(self->scope);
    Py_CLEAR(self->exc);
    Py_CLEAR(self->cancelled);
    return 0;
}

static void
Exit_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    Exit_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Enter_slots[] = {
    {Py_tp_doc, "What __aenter__() of a scope returns."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Enter_traverse},
    {Py_tp_clear, Enter_clear},
    {Py_tp_dealloc, Enter_dealloc},
    {0, NULL},
};

static PyType_Slot Exit_slots[] = {
    {Py_tp_doc, "What __aexit__() of a scope returns."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Exit_traverse},
    {Py_tp_clear, Exit_clear},
    {Py_tp_dealloc, Exit_dealloc},
    {0, NULL},
};

#define STEP_FLAGS \
    (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION)

static PyType_Spec Enter_spec = {
    .name = "aiotools._aiotools.ScopeEnter",
    .basicsize = sizeof(EnterObject),
    .flags = STEP_FLAGS,
    .slots = Enter_slots,
};

static PyType_Spec Exit_spec = {
    .name = "aiotools._aiotools.ScopeExit",
    .basicsize = sizeof(ExitObject),
    .flags = STEP_FLAGS,
    .slots = Exit_slots,
};

/* class LoopExceptionHandler(enum.Enum): TOKEN = ... */
static int
add_loop_token(PyObject *module, aiot_state *state)
{
    PyObject *enum_module = PyImport_ImportModule("enum");
    PyObject *make = enum_module == NULL ? NULL : PyObject_GetAttrString(enum_module, "Enum");
    PyObject *args = Py_BuildValue("(s{si})", "LoopExceptionHandler", "TOKEN", 0);
    PyObject *kwargs = Py_BuildValue("{ss}", "module", "aiotools.taskcontext");
    PyObject *type = make == NULL || args == NULL || kwargs == NULL ? NULL : PyObject_Call(make, args, kwargs);
    int failed = -1;
    if (type != NULL && (state->loop_token = PyObject_GetAttrString(type, "TOKEN")) != NULL) {
        failed = PyObject_SetAttrString(module, "_LoopExceptionHandler", type);
    }
    Py_XDECREF(enum_module);
    Py_XDECREF(make);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(type);
    return failed;
}

int
aiot_scope_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (add_loop_token(module, state) < 0
        || (state->current_taskgroup = PyContextVar_New("current_taskgroup", NULL)) == NULL
        || PyObject_SetAttrString(module, "_current_taskgroup", state->current_taskgroup) < 0
        || aiot_add_type(module, &state->TaskContextType, &TaskContext_spec, NULL, true) < 0
        || aiot_add_type(module, &state->TaskScopeType, &TaskScope_spec, (PyObject *)state->TaskContextType, true) < 0
        || aiot_add_type(module, &state->ShieldScopeType, &ShieldScope_spec, (PyObject *)state->TaskScopeType, true) < 0
        || aiot_add_type(module, &state->TaskGroupCoreType, &TaskGroupCore_spec, NULL, false) < 0
        || PyObject_SetAttrString(module, "_TaskGroupCore", (PyObject *)state->TaskGroupCoreType) < 0
        || aiot_add_type(module, &state->ScopeEnterType, &Enter_spec, NULL, false) < 0
        || aiot_add_type(module, &state->ScopeExitType, &Exit_spec, NULL, false) < 0)
    {
        return -1;
    }
    return 0;
}
