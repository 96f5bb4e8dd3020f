/* queue_sync.c: the side of a queue for threads. Waiting blocks the thread, with the GIL released.
 *
 * Who gives a blocked thread a ticket releases the lock that the thread sleeps on while holding the core's, so once the
 * thread has looked at its entry under the core's lock nobody touches either of them any more.
 *
 * The entry is not on the thread's stack: up to 3.13 a daemon thread that wakes up while the interpreter goes down ends
 * there and then, with its stack, but its entry stays in the line.
 */

#include "queue_core.h"

#include "args.h"

#include <math.h>

/* ---- blocking ------------------------------------------------------------------------------------------------ */

typedef struct {
    bool block;
    bool limited;
    double deadline;            /* on the monotonic clock, if limited */
} patience;

static int
monotonic(aiot_state *state, double *now)
{
    PyObject *reading = PyObject_CallNoArgs(state->time_monotonic);
    if (reading == NULL) {
        return -1;
    }
    *now = PyFloat_AsDouble(reading);
    Py_DECREF(reading);
    return *now == -1.0 && PyErr_Occurred() ? -1 : 0;
}

static int
patience_from(aiot_state *state, PyObject *block, PyObject *timeout, patience *p)
{
    p->limited = false;
    p->block = true;
    if (block != NULL) {
        int truth = PyObject_IsTrue(block);
        if (truth < 0) {
            return -1;
        }
        p->block = truth;
    }
    if (timeout == NULL || timeout == Py_None || !p->block) {
        return 0;
    }
    double seconds, now;
    if (aiot_as_seconds(timeout, "timeout", &seconds) < 0) {
        return -1;
    }
    if (seconds < 0) {
        PyErr_SetString(PyExc_ValueError, "'timeout' must be a non-negative number");
        return -1;
    }
    if (isinf(seconds)) {
        return 0;
    }
    if (monotonic(state, &now) < 0) {
        return -1;
    }
    p->limited = true;
    p->deadline = now + seconds;
    return 0;
}

/* Until the lock is released: 1. The time is up: 0. A signal handler raised: -1. Also 1 when the process was forked by a
 * signal handler, as nobody knows this thread there. */
static int
sleep_on(aiot_state *state, PyThread_type_lock lock, const patience *p, uint64_t forks)
{
    for (;;) {
        PY_TIMEOUT_T microseconds = -1;
        if (p->limited) {
            double now;
            if (monotonic(state, &now) < 0) {
                return -1;
            }
            double left = ceil((p->deadline - now) * 1e6);
            if (left <= 0) {
                return 0;
            }
            microseconds = left < (double)PY_TIMEOUT_MAX ? (PY_TIMEOUT_T)left : PY_TIMEOUT_MAX;
        }
        PyLockStatus status;
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(lock, microseconds, 1);
        Py_END_ALLOW_THREADS
        if (status == PY_LOCK_ACQUIRED) {
            return 1;
        }
        if (status == PY_LOCK_INTR) {
            if (Py_MakePendingCalls() < 0) {
                return -1;
            }
            if (forks != aiot_fork_count) {
                return 1;
            }
        }
    }
}

static aiot_q_outcome
wait_for_it(QueueCore *core, aiot_q_request *request, const patience *p)
{
    PyThread_type_lock lock = PyThread_allocate_lock();
    if (lock == NULL) {
        PyErr_NoMemory();
        return AIOT_Q_ERROR;
    }
    aiot_q_entry *entry = PyMem_RawMalloc(sizeof(*entry));
    if (entry == NULL) {
        PyThread_free_lock(lock);
        PyErr_NoMemory();
        return AIOT_Q_ERROR;
    }
    PyThread_acquire_lock(lock, NOWAIT_LOCK);
    aiot_q_entry_init(entry, aiot_q_side_of(request), NULL, lock);
    aiot_q_outcome outcome;
    while ((outcome = aiot_q_try(core, request, AIOT_Q_BLOCK, entry, true)) == AIOT_Q_LINKED) {
        int woken = sleep_on(core->state, lock, p, entry->forks);
        if (woken == 0) {
            /* A ticket that came with the last moment is good. */
            outcome = aiot_q_try(core, request, AIOT_Q_BLOCK, entry, false);
            break;
        }
        if (woken < 0) {
            outcome = AIOT_Q_ERROR;
            break;
        }
    }
    if (outcome == AIOT_Q_ERROR) {
        PyObject *exc = PyErr_GetRaisedException();
        aiot_q_leave(core, entry);
        PyErr_SetRaisedException(exc);
    }
    assert(entry->place == AIOT_Q_OUT);
    PyMem_RawFree(entry);
    PyThread_free_lock(lock);
    return outcome;
}

/* NULL with one of the exceptions of this side. */
static PyObject *
answer(QueueCore *core, aiot_q_request *request, aiot_q_outcome outcome)
{
    aiot_state *state = core->state;
    switch (outcome) {
    case AIOT_Q_DONE:
        return request->out != NULL ? request->out : Py_NewRef(Py_None);
    case AIOT_Q_SHUT_DOWN:
        aiot_q_set_error(core, state->QueueShutDown, request);
        return NULL;
    case AIOT_Q_ERROR:
        aiot_q_set_error(core, NULL, request);
        return NULL;
    default:
        break;
    }
    if (request->kind == AIOT_REQ_JOIN) {
        PyErr_SetString(PyExc_TimeoutError, "join() timed out");
    }
    else {
        bool getting = aiot_q_side_of(request) == AIOT_Q_GET;
        aiot_q_set_error(core, getting ? state->SyncQueueEmpty : state->SyncQueueFull, request);
    }
    return NULL;
}

static PyObject *
do_it(PyObject *op, aiot_q_request *request, PyObject *block, PyObject *timeout)
{
    QueueCore *core = aiot_q_core_of(op);
    patience p;
    if (patience_from(core->state, block, timeout, &p) < 0) {
        return NULL;
    }
    aiot_q_outcome outcome = aiot_q_try(core, request, p.block ? AIOT_Q_BLOCK : AIOT_Q_NOWAIT, NULL, false);
    if (outcome == AIOT_Q_MUST_WAIT && p.block) {
        outcome = wait_for_it(core, request, &p);
    }
    return answer(core, request, outcome);
}

/* ---- SyncQueue ----------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(get_doc,
"get($self, /, block=True, timeout=None)\n--\n\n"
"Remove and return an item.\n\n"
"If block is true, waits until there is one, at most timeout seconds (None: without\n"
"limit); the GIL is released meanwhile. Those who wait, tasks and threads alike, are\n"
"served in the order they came.\n\n"
"Raises queue.Empty when there is none (in time), QueueShutDown when the queue is shut\n"
"down and empty, ValueError if timeout is negative.\n\n"
"As queue.Queue.get().");

static PyObject *
SyncQueue_get(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"get", 2, 0, 2, {AIOT_NAME(block), AIOT_NAME(timeout)}};
    PyObject *given[2];
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    aiot_q_request request = {.kind = AIOT_REQ_GET};
    return do_it(op, &request, given[0], given[1]);
}

PyDoc_STRVAR(put_doc,
"put($self, /, item, block=True, timeout=None)\n--\n\n"
"Put an item into the queue.\n\n"
"If block is true, waits until there is room, at most timeout seconds (None: without\n"
"limit); the GIL is released meanwhile. Those who wait, tasks and threads alike, are\n"
"served in the order they came.\n\n"
"Raises queue.Full when there is no room (in time), QueueShutDown when the queue is\n"
"shut down, ValueError if timeout is negative.\n\n"
"As queue.Queue.put().");

static PyObject *
SyncQueue_put(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"put", 3, 1, 3, {AIOT_NAME(item), AIOT_NAME(block), AIOT_NAME(timeout)}};
    PyObject *given[3];
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    aiot_q_request request = {.kind = AIOT_REQ_PUT, .in = given[0]};
    return do_it(op, &request, given[1], given[2]);
}

PyDoc_STRVAR(get_many_doc,
"get_many($self, /, max=None, block=True, timeout=None)\n--\n\n"
"Remove several items, return them as a list.\n\n"
"Waits for one as get() does, then takes what is there, up to max items (None: without\n"
"limit). What those who wait have been promised is left to them.\n\n"
"Raises what get() does, and ValueError if max is less than 1.");

static PyObject *
SyncQueue_get_many(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"get_many", 3, 0, 3, {AIOT_NAME(max), AIOT_NAME(block), AIOT_NAME(timeout)}};
    PyObject *given[3];
    aiot_q_request request = {.kind = AIOT_REQ_GET_MANY};
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, given) < 0
        || aiot_q_set_max(&request, given[0]) < 0)
    {
        return NULL;
    }
    return do_it(op, &request, given[1], given[2]);
}

PyDoc_STRVAR(put_many_doc,
"put_many($self, /, items, block=True, timeout=None)\n--\n\n"
"Put all items of an iterable into the queue, in order.\n\n"
"If block is true, waits for room whenever the queue is full, at most timeout seconds\n"
"in all; items of others may come in between then. If it ends before it is through, the\n"
"items already put stay in the queue, and the attribute items_put of the exception is\n"
"their number.\n\n"
"Raises what put() does, and TypeError if items is not iterable.");

static PyObject *
SyncQueue_put_many(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"put_many", 3, 1, 3, {AIOT_NAME(items), AIOT_NAME(block), AIOT_NAME(timeout)}};
    PyObject *given[3];
    aiot_q_request request = {.kind = AIOT_REQ_PUT_MANY};
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, given) < 0
        || aiot_q_set_items(&request, given[0]) < 0)
    {
        return NULL;
    }
    PyObject *result = do_it(op, &request, given[1], given[2]);
    Py_DECREF(request.in);
    return result;
}

PyDoc_STRVAR(get_nowait_doc,
"get_nowait($self, /)\n--\n\n"
"Remove and return an item if there is one, else raise queue.Empty.\n\n"
"Does not queue behind those who wait. Raises QueueShutDown when the queue is shut down\n"
"and empty.");

static PyObject *
SyncQueue_get_nowait(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    aiot_q_request request = {.kind = AIOT_REQ_GET};
    return do_it(op, &request, Py_False, NULL);
}

PyDoc_STRVAR(put_nowait_doc,
"put_nowait($self, /, item)\n--\n\n"
"Put an item into the queue if there is room, else raise queue.Full.\n\n"
"Does not queue behind those who wait. Raises QueueShutDown when the queue is shut down.");

static PyObject *
SyncQueue_put_nowait(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"put_nowait", 1, 1, 1, {AIOT_NAME(item)}};
    aiot_q_request request = {.kind = AIOT_REQ_PUT};
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, &request.in) < 0) {
        return NULL;
    }
    return do_it(op, &request, Py_False, NULL);
}

PyDoc_STRVAR(join_doc,
"join($self, /, timeout=None)\n--\n\n"
"Block until task_done() was called for every item that was put.\n\n"
"Waits at most timeout seconds (None: without limit), with the GIL released; raises\n"
"TimeoutError when they are over.\n\n"
"As queue.Queue.join(), which has no timeout.");

static PyObject *
SyncQueue_join(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"join", 1, 0, 1, {AIOT_NAME(timeout)}};
    PyObject *timeout;
    aiot_q_request request = {.kind = AIOT_REQ_JOIN};
    if (aiot_bind(aiot_q_core_of(op)->state, &params, args, nargs, kwnames, &timeout) < 0) {
        return NULL;
    }
    return do_it(op, &request, NULL, timeout);
}

PyDoc_STRVAR(peek_doc,
"peek($self, /)\n--\n\n"
"The item that the next get would return; it stays in the queue.\n\n"
"Does not wait: raises queue.Empty when there is none. Raises NotImplementedError if the\n"
"class overrides _get() and has no _peek().");

static PyObject *
SyncQueue_peek(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_q_peek_or_raise(op, aiot_q_core_of(op)->state->SyncQueueEmpty);
}

static PyObject *
SyncQueue_iternext(PyObject *op)
{
    aiot_q_request request = {.kind = AIOT_REQ_GET};
    PyObject *item = do_it(op, &request, NULL, NULL);
    if (item == NULL && PyErr_ExceptionMatches(aiot_q_core_of(op)->state->QueueShutDown)) {
        PyErr_Clear();
    }
    return item;
}

static PyMethodDef SyncQueue_methods[] = {
    {"get", (PyCFunction)(void (*)(void))SyncQueue_get, METH_FASTCALL | METH_KEYWORDS, get_doc},
    {"put", (PyCFunction)(void (*)(void))SyncQueue_put, METH_FASTCALL | METH_KEYWORDS, put_doc},
    {"get_many", (PyCFunction)(void (*)(void))SyncQueue_get_many, METH_FASTCALL | METH_KEYWORDS, get_many_doc},
    {"put_many", (PyCFunction)(void (*)(void))SyncQueue_put_many, METH_FASTCALL | METH_KEYWORDS, put_many_doc},
    {"get_nowait", SyncQueue_get_nowait, METH_NOARGS, get_nowait_doc},
    {"put_nowait", (PyCFunction)(void (*)(void))SyncQueue_put_nowait, METH_FASTCALL | METH_KEYWORDS, put_nowait_doc},
    {"join", (PyCFunction)(void (*)(void))SyncQueue_join, METH_FASTCALL | METH_KEYWORDS, join_doc},
    {"peek", SyncQueue_peek, METH_NOARGS, peek_doc},
    AIOT_Q_SHARED_METHODS,
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(SyncQueue_doc,
"The side of a queue for threads: Queue(...).sync_q.\n\n"
"Has all that queue.Queue has, and can be iterated: `for` ends when the queue is shut\n"
"down and empty. What blocks, blocks the thread: in an event loop use async_q.");

static PyType_Slot SyncQueue_slots[] = {
    {Py_tp_doc, (void *)SyncQueue_doc},
    {Py_tp_methods, SyncQueue_methods},
    {Py_tp_getset, aiot_q_face_getset},
    {Py_tp_members, aiot_q_face_members},
    {Py_tp_repr, aiot_q_face_repr},
    {Py_tp_traverse, aiot_q_face_traverse},
    {Py_tp_dealloc, aiot_q_face_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, SyncQueue_iternext},
    {0, NULL},
};

static PyType_Spec SyncQueue_spec = {
    .name = "aiotools._aiotools.SyncQueue",
    .basicsize = sizeof(QueueFace),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = SyncQueue_slots,
};

int
aiot_queue_sync_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    return aiot_add_type(module, &state->SyncQueueType, &SyncQueue_spec, NULL, true);
}
