/* collect.c: a crew of tasks whose ends are collected in the order in which they come.
 *
 * States:     a crew takes children at any time, until close() was awaited or a race is decided. Its awaitables are wait()
 *             (until there is something to take, or nobody left), close() (cancel all, until nobody is left), results()
 *             (until nobody is left; then the results by index) and outcome() (the same; then that of the race).
 * Invariants: `finished` holds what ended and was not taken yet, oldest first: in a crew that keeps results it stays empty,
 *             and `results` has one item per index; in a race it stays empty, too. `winner` is the first that decides a race:
 *             the others are cancelled then, from its done callback, so that the host wakes once.
 * Cancelled:  wait() leaves the children alone. results() and outcome() cancel them, wait for all, and then raise; close()
 *             waits for all as well, however often it is cancelled.
 * Re-entry:   spawning and cancelling run foreign code; the lists are ours alone, and grow only at their ends.
 */

#include "collect.h"

#include "args.h"
#include "awaitable.h"
#include "shield.h"

typedef struct {
    AIOT_CHILDREN_HEAD
    AiotShield *origin;         /* where it is cancelled from */
    PyObject *finished;         /* list of (index, task) */
    PyObject *results;          /* list, or NULL when tasks are wanted */
    PyObject *base_error;       /* SystemExit or KeyboardInterrupt of a child, when results are kept */
    PyObject *winner;           /* task, or NULL */
    PyObject *errors;           /* of a race: list */
    Py_ssize_t n_spawned;
    uint8_t mode;
    bool spawning;              /* all of the race are to be started before it is decided */
    bool closed;
} CrewObject;

/* What Crew() is called with. */
typedef enum {
    COLLECT_TASKS,
    KEEP_RESULTS,
    RACE,
    RACE_FOR_SUCCESS,           /* failures don't decide */
} crew_mode;

typedef struct {
    AIOT_AWAITABLE_HEAD
    CrewObject *crew;
    PyObject *cancelled;
    aiot_joiner joiner;
} CrewWaitObject;

/* ---- ends --------------------------------------------------------------------------------------------------- */

/* The result, or the exception in its place. */
static PyObject *
result_of(CrewObject *self, PyObject *task)
{
    PyObject *result = PyObject_CallMethodNoArgs(task, self->loop->state->str_result);
    if (result == NULL) {
        result = PyErr_GetRaisedException();
        if (self->base_error == NULL && (PyErr_GivenExceptionMatches(result, PyExc_SystemExit)
                                         || PyErr_GivenExceptionMatches(result, PyExc_KeyboardInterrupt)))
        {
            self->base_error = Py_NewRef(result);
        }
    }
    return result;
}

static int
cancel_all(CrewObject *self, PyObject *msg)
{
    PyObject *tasks = aiot_children_tasks((AiotChildren *)self);
    if (tasks == NULL) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tasks); i++) {
        if (aiot_task_cancel_from(self->loop, PyList_GET_ITEM(tasks, i), self->origin, msg) < 0) {
            /* The others are to be cancelled all the same. */
            PyErr_WriteUnraisable(PyList_GET_ITEM(tasks, i));
        }
    }
    Py_DECREF(tasks);
    return 0;
}

/* Does this end decide the race? If not, it was a failure, and is kept. 1, 0 or -1. */
static int
decides(CrewObject *self, PyObject *task)
{
    aiot_state *state = self->loop->state;
    if (self->mode == RACE) {
        return 1;
    }
    /* A task gives its CancelledError away once: what outcome_of() raises must be the one with the arguments. */
    PyObject *cancelled = PyObject_CallMethodNoArgs(task, state->str_cancelled);
    int is_cancelled = cancelled == NULL ? -1 : PyObject_IsTrue(cancelled);
    Py_XDECREF(cancelled);
    if (is_cancelled != 0) {
        return is_cancelled;
    }
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == NULL) {
        return -1;
    }
    int answer = 1;
    if (PyErr_GivenExceptionMatches(exc, PyExc_Exception)) {
        answer = PyList_Append(self->errors, exc) < 0 ? -1 : 0;
    }
    Py_DECREF(exc);
    return answer;
}

static int
race_ended(CrewObject *self, PyObject *task)
{
    if (self->winner != NULL || self->closed) {
        return 0;
    }
    int decided = decides(self, task);
    if (decided <= 0) {
        return decided;
    }
    self->winner = Py_NewRef(task);
    if (self->spawning) {
        return 0;
    }
    self->closed = true;
    return cancel_all(self, NULL);
}

static int
Crew_ended(AiotChildren *op, Py_ssize_t index, PyObject *task)
{
    CrewObject *self = (CrewObject *)op;
    if (self->results != NULL) {
        return PyList_SetItem(self->results, index, result_of(self, task));
    }
    if (self->mode >= RACE) {
        return race_ended(self, task);
    }
    if (self->closed || self->finished == NULL) {
        return 0;
    }
    PyObject *pair = Py_BuildValue("nO", index, task);
    int failed = pair == NULL ? -1 : PyList_Append(self->finished, pair);
    Py_XDECREF(pair);
    if (!failed && !aiot_link_is_empty(&self->joiners)) {
        failed = aiot_children_wake(op);
    }
    return failed;
}

/* One look: those that end in their first step are found in the order in which they ended. */
static const aiot_children_ops Crew_ops = {.ended = Crew_ended, .indexed = true, .looks = 1};
static const aiot_children_ops gathering_ops = {.ended = Crew_ended, .indexed = true, .lazy = true};

/* ---- waiting ------------------------------------------------------------------------------------------------ */

static PySendResult
crew_answer(CrewWaitObject *self, PySendResult answer)
{
    if (answer != PYGEN_NEXT) {
        aiot_joiner_leave(&self->joiner);
        Py_CLEAR(self->crew);
        Py_CLEAR(self->cancelled);
    }
    return answer;
}

static PySendResult
none_answer(CrewWaitObject *self, PyObject **result)
{
    *result = Py_NewRef(Py_None);
    return crew_answer(self, PYGEN_RETURN);
}

static PySendResult
wait_step(CrewWaitObject *self, PyObject **result)
{
    CrewObject *crew = self->crew;
    if (crew->n_children == 0 || (crew->finished != NULL && PyList_GET_SIZE(crew->finished) > 0)) {
        return none_answer(self, result);
    }
    return crew_answer(self, aiot_join((AiotChildren *)crew, &self->joiner, result));
}

/* (result, errors), or the list of errors when nobody has won. What it refers to is handed over. */
static PyObject *
outcome_of(CrewObject *crew)
{
    PyObject *winner = crew->winner;
    PyObject *errors = crew->errors;
    crew->winner = NULL;
    crew->errors = NULL;
    if (winner == NULL) {
        return errors;
    }
    PyObject *outcome = NULL;
    PyObject *result = PyObject_CallMethodNoArgs(winner, crew->loop->state->str_result);
    if (result != NULL) {
        outcome = PyTuple_Pack(2, result, errors);
        Py_DECREF(result);
    }
    Py_DECREF(winner);
    Py_XDECREF(errors);
    return outcome;
}

static const aiot_awaitable_ops Outcome_ops;

/* For close(), results() and outcome(): until nobody is left. */
static PySendResult
end_step(CrewWaitObject *self, PyObject **result)
{
    CrewObject *crew = self->crew;
    if (crew->n_children > 0) {
        return crew_answer(self, aiot_join((AiotChildren *)crew, &self->joiner, result));
    }
    PyObject *error = self->cancelled != NULL ? self->cancelled : crew->base_error;
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_CLEAR(crew->base_error);
        Py_CLEAR(crew->results);
        Py_CLEAR(crew->winner);
        Py_CLEAR(crew->errors);
        return crew_answer(self, PYGEN_ERROR);
    }
    if (((aiot_awaitable *)self)->ops == &Outcome_ops) {
        *result = outcome_of(crew);
        return crew_answer(self, *result == NULL ? PYGEN_ERROR : PYGEN_RETURN);
    }
    if (crew->results == NULL) {
        return none_answer(self, result);
    }
    *result = crew->results;
    crew->results = NULL;
    return crew_answer(self, PYGEN_RETURN);
}

static PySendResult
Wait_start(aiot_awaitable *op, PyObject **result)
{
    return wait_step((CrewWaitObject *)op, result);
}

static PySendResult
Close_start(aiot_awaitable *op, PyObject **result)
{
    CrewWaitObject *self = (CrewWaitObject *)op;
    self->crew->closed = true;
    Py_CLEAR(self->crew->results);
    if (self->crew->finished != NULL && PyList_SetSlice(self->crew->finished, 0, PY_SSIZE_T_MAX, NULL) < 0) {
        return crew_answer(self, PYGEN_ERROR);
    }
    if (cancel_all(self->crew, NULL) < 0) {
        return crew_answer(self, PYGEN_ERROR);
    }
    return end_step(self, result);
}

static PySendResult
Results_start(aiot_awaitable *op, PyObject **result)
{
    return end_step((CrewWaitObject *)op, result);
}

static int
crew_resumed(CrewWaitObject *self)
{
    if (aiot_joiner_resumed(&self->joiner) < 0) {
        Py_CLEAR(self->crew);
        return -1;
    }
    return 0;
}

static PySendResult
Wait_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    return crew_resumed((CrewWaitObject *)op) < 0 ? PYGEN_ERROR : wait_step((CrewWaitObject *)op, result);
}

static PySendResult
End_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    return crew_resumed((CrewWaitObject *)op) < 0 ? PYGEN_ERROR : end_step((CrewWaitObject *)op, result);
}

static PyObject *
message_of(PyObject *exc)
{
    PyObject *args = ((PyBaseExceptionObject *)exc)->args;
    return args != NULL && PyTuple_GET_SIZE(args) == 1 ? PyTuple_GET_ITEM(args, 0) : NULL;
}

static PySendResult
End_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    CrewWaitObject *self = (CrewWaitObject *)op;
    aiot_joiner_leave(&self->joiner);
    bool cancelled = PyErr_GivenExceptionMatches(exc, self->crew->loop->state->CancelledError);
    /* Once is enough: a second request would interrupt their clean-up. */
    if (!self->crew->closed) {
        self->crew->closed = true;
        PyObject *msg = cancelled ? Py_XNewRef(message_of(exc)) : NULL;
        int failed = cancel_all(self->crew, msg);
        Py_XDECREF(msg);
        if (failed) {
            return crew_answer(self, PYGEN_ERROR);
        }
    }
    if (!cancelled) {
        /* The coroutine is being closed: it can't wait any longer. */
        PyErr_SetRaisedException(Py_NewRef(exc));
        return crew_answer(self, PYGEN_ERROR);
    }
    if (self->cancelled == NULL) {
        self->cancelled = Py_NewRef(exc);
    }
    return end_step(self, result);
}

static void
CrewWait_abandon(aiot_awaitable *op)
{
    aiot_joiner_leave(&((CrewWaitObject *)op)->joiner);
}

static const aiot_awaitable_ops Wait_ops = {
    .name = "wait", .start = Wait_start, .resume = Wait_resume, .abandon = CrewWait_abandon,
};
static const aiot_awaitable_ops Close_ops = {
    .name = "close", .start = Close_start, .resume = End_resume, .throw = End_throw, .abandon = CrewWait_abandon,
};
static const aiot_awaitable_ops Results_ops = {
    .name = "results", .start = Results_start, .resume = End_resume, .throw = End_throw, .abandon = CrewWait_abandon,
};

static const aiot_awaitable_ops Outcome_ops = {
    .name = "outcome", .start = Results_start, .resume = End_resume, .throw = End_throw, .abandon = CrewWait_abandon,
};

static PyObject *
crew_wait_new(PyObject *crew, const aiot_awaitable_ops *ops)
{
    aiot_state *state = ((CrewObject *)crew)->loop->state;
    CrewWaitObject *self = (CrewWaitObject *)state->CrewWaitType->tp_alloc(state->CrewWaitType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, ops);
        aiot_joiner_init(&self->joiner);
        self->crew = (CrewObject *)Py_NewRef(crew);
    }
    return (PyObject *)self;
}

/* ---- the crew ----------------------------------------------------------------------------------------------- */

static PyObject *
crew_spawn(CrewObject *self, PyObject *coro, PyObject *context)
{
    aiot_spawn_options options = {.index = self->n_spawned++};
    if (self->closed) {
        aiot_close_coroutine(self->loop->state, coro);
        PyErr_SetString(PyExc_RuntimeError, "the crew is closed");
        return NULL;
    }
    if (self->results != NULL && PyList_Append(self->results, Py_None) < 0) {
        aiot_close_coroutine(self->loop->state, coro);
        return NULL;
    }
    return aiot_children_spawn((AiotChildren *)self, coro, NULL, context == Py_None ? NULL : context, &options);
}

PyDoc_STRVAR(spawn_doc, "spawn($self, coro, context=None, /)\n--\n\nStart a child; return its task.");

static PyObject *
Crew_spawn(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2) {
        PyErr_Format(PyExc_TypeError, "spawn() takes 1 or 2 arguments (%zd given)", nargs);
        return NULL;
    }
    return crew_spawn((CrewObject *)op, args[0], nargs == 2 ? args[1] : NULL);
}

PyDoc_STRVAR(spawn_all_doc,
"spawn_all($self, coros, context=None, /)\n--\n\nStart a child for each coroutine of an iterator.");

static PyObject *
Crew_spawn_all(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2 || !PyIter_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "spawn_all() takes an iterator, and a context");
        return NULL;
    }
    CrewObject *self = (CrewObject *)op;
    PyObject *coro;
    self->spawning = true;
    while ((coro = PyIter_Next(args[0])) != NULL) {
        PyObject *task = crew_spawn(self, coro, nargs == 2 ? args[1] : NULL);
        Py_DECREF(coro);
        if (task == NULL) {
            break;
        }
        Py_DECREF(task);
    }
    self->spawning = false;
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (self->winner != NULL && !self->closed) {
        self->closed = true;
        if (cancel_all(self, NULL) < 0) {
            return NULL;
        }
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(take_doc, "take($self, /)\n--\n\nWhat ended and was not taken yet: a list of (index, task).");

static PyObject *
Crew_take(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    CrewObject *self = (CrewObject *)op;
    PyObject *empty = PyList_New(0);
    if (empty == NULL) {
        return NULL;
    }
    PyObject *finished = self->finished;
    if (finished == NULL) {
        return empty;
    }
    self->finished = empty;
    return finished;
}

static PyObject *
Crew_wait(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return crew_wait_new(op, &Wait_ops);
}

static PyObject *
Crew_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return crew_wait_new(op, &Close_ops);
}

static PyObject *
Crew_results(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (((CrewObject *)op)->results == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this crew keeps no results");
        return NULL;
    }
    return crew_wait_new(op, &Results_ops);
}

static PyObject *
Crew_outcome(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (((CrewObject *)op)->mode < RACE) {
        PyErr_SetString(PyExc_RuntimeError, "this crew runs no race");
        return NULL;
    }
    return crew_wait_new(op, &Outcome_ops);
}

static Py_ssize_t
Crew_length(PyObject *op)
{
    return ((AiotChildren *)op)->n_children;
}

static PyObject *
Crew_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int mode = COLLECT_TASKS;
    if (!PyArg_ParseTuple(args, "|i:Crew", &mode)) {
        return NULL;
    }
    if (mode < COLLECT_TASKS || mode > RACE_FOR_SUCCESS) {
        PyErr_Format(PyExc_ValueError, "there is no mode %d of Crew()", mode);
        return NULL;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Crew() takes no keyword arguments");
        return NULL;
    }
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_type(type));
    if (loop == NULL) {
        return NULL;
    }
    CrewObject *self = (CrewObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(loop);
        return NULL;
    }
    bool keep = mode == KEEP_RESULTS;
    aiot_children_init(self, keep ? &gathering_ops : &Crew_ops);
    self->loop = loop;
    self->mode = (uint8_t)mode;
    self->finished = mode == COLLECT_TASKS ? PyList_New(0) : NULL;
    self->results = keep ? PyList_New(0) : NULL;
    self->errors = mode >= RACE ? PyList_New(0) : NULL;
    self->host = aiot_loop_current_task(loop, "what collects tasks");
    if (self->host == NULL || (self->finished == NULL && self->results == NULL && self->errors == NULL)) {
        Py_DECREF(self);
        return NULL;
    }
    self->origin = aiot_task_shield(loop, self->host);
    return (PyObject *)self;
}

static PyObject *
Crew_get_spawned(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(((CrewObject *)op)->n_spawned);
}

static PyObject *
Crew_get_pending(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *finished = ((CrewObject *)op)->finished;
    return PyLong_FromSsize_t(finished == NULL ? 0 : PyList_GET_SIZE(finished));
}

static PyGetSetDef Crew_getset[] = {
    {"spawned", Crew_get_spawned, NULL, "How many were started so far: the index of the next one.", NULL},
    {"pending", Crew_get_pending, NULL, "How many ended and were not taken yet.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef Crew_methods[] = {
    {"spawn", (PyCFunction)(void (*)(void))Crew_spawn, METH_FASTCALL, spawn_doc},
    {"spawn_all", (PyCFunction)(void (*)(void))Crew_spawn_all, METH_FASTCALL, spawn_all_doc},
    {"take", Crew_take, METH_NOARGS, take_doc},
    {"wait", Crew_wait, METH_NOARGS, "wait($self, /)\n--\n\nUntil there is something to take, or nobody left."},
    {"close", Crew_close, METH_NOARGS, "close($self, /)\n--\n\nCancel all that are left, and wait for them."},
    {"results", Crew_results, METH_NOARGS,
     "results($self, /)\n--\n\nWait for all; the results, exceptions in their places. Cancelled, cancel all."},
    {"outcome", Crew_outcome, METH_NOARGS,
     "outcome($self, /)\n--\n\nWait for all of a race: (result, errors), or the errors alone. Cancelled, cancel all."},
    {NULL, NULL, 0, NULL},
};

static int
Crew_traverse(PyObject *op, visitproc visit, void *arg)
{
    CrewObject *self = (CrewObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->finished);
    Py_VISIT(self->results);
    Py_VISIT(self->base_error);
    Py_VISIT(self->winner);
    Py_VISIT(self->errors);
    return aiot_children_traverse(op, visit, arg);
}

static int
Crew_clear(PyObject *op)
{
    CrewObject *self = (CrewObject *)op;
    Py_CLEAR(self->finished);
    Py_CLEAR(self->results);
    Py_CLEAR(self->base_error);
    Py_CLEAR(self->winner);
    Py_CLEAR(self->errors);
    aiot_children_clear(op);
    return 0;
}

static void
Crew_dealloc(PyObject *op)
{
    CrewObject *self = (CrewObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Crew_clear(op);
    PyObject *origin = (PyObject *)self->origin;
    self->origin = NULL;
    Py_XDECREF(origin);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Crew_slots[] = {
    {Py_tp_doc, "Crew(mode=0, /)\n--\n\nTasks whose ends are collected in the order in which they come."},
    {Py_tp_new, Crew_new},
    {Py_tp_methods, Crew_methods},
    {Py_tp_getset, Crew_getset},
    {Py_sq_length, Crew_length},
    {Py_tp_traverse, Crew_traverse},
    {Py_tp_clear, Crew_clear},
    {Py_tp_dealloc, Crew_dealloc},
    {0, NULL},
};

static PyType_Spec Crew_spec = {
    .name = "aiotools._aiotools.Crew",
    .basicsize = sizeof(CrewObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Crew_slots,
};

static int
CrewWait_traverse(PyObject *op, visitproc visit, void *arg)
{
    CrewWaitObject *self = (CrewWaitObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->crew);
    Py_VISIT(self->cancelled);
    Py_VISIT(self->joiner.waiter);
    return 0;
}

static int
CrewWait_clear(PyObject *op)
{
    CrewWaitObject *self = (CrewWaitObject *)op;
    aiot_joiner_leave(&self->joiner);
    Py_CLEAR(self->crew);
    Py_CLEAR(self->cancelled);
    return 0;
}

static void
CrewWait_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    CrewWait_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot CrewWait_slots[] = {
    {Py_tp_doc, "What wait(), close() and results() of a crew return."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, CrewWait_traverse},
    {Py_tp_clear, CrewWait_clear},
    {Py_tp_dealloc, CrewWait_dealloc},
    {0, NULL},
};

static PyType_Spec CrewWait_spec = {
    .name = "aiotools._aiotools.CrewWait",
    .basicsize = sizeof(CrewWaitObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = CrewWait_slots,
};

int
aiot_collect_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->CrewType, &Crew_spec, NULL, false) < 0
        || PyObject_SetAttrString(module, "_Crew", (PyObject *)state->CrewType) < 0
        || aiot_add_type(module, &state->CrewWaitType, &CrewWait_spec, NULL, false) < 0)
    {
        return -1;
    }
    return 0;
}
