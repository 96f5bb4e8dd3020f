/* queue.c: Queue, LifoQueue, PriorityQueue, and what they share with their two sides.
 *
 * A Queue owns its core and its two sides, which own the core: no cycle, nothing to close. Only the core of a Queue
 * whose class overrides hooks refers back to it; such a cycle is the garbage collector's.
 */

#include "queue.h"

#include "args.h"
#include "queue_core.h"

#include <string.h>

typedef struct {
    QueueFace face;
    PyObject *sync_q;
    PyObject *async_q;
    bool initialized;
} QueueObject;

/* ---- shared by Queue, SyncQueue and AsyncQueue --------------------------------------------------------------- */

void
aiot_q_set_error(QueueCore *core, PyObject *exc_type, const aiot_q_request *request)
{
    if (request->kind != AIOT_REQ_PUT_MANY) {
        if (exc_type != NULL) {
            PyErr_SetNone(exc_type);
        }
        return;
    }
    PyObject *exc = exc_type == NULL ? PyErr_GetRaisedException() : PyObject_CallNoArgs(exc_type);
    if (exc == NULL) {
        return;
    }
    PyObject *n = PyLong_FromSsize_t(request->n);
    if (n == NULL || PyObject_SetAttr(exc, core->state->str_items_put, n) < 0) {
        /* No memory, or an exception of a hook that takes no attributes: its own error matters more. */
        PyErr_Clear();
    }
    Py_XDECREF(n);
    PyErr_SetRaisedException(exc);
}

int
aiot_q_set_items(aiot_q_request *request, PyObject *iterable)
{
    request->in = PySequence_List(iterable);
    return request->in == NULL ? -1 : 0;
}

int
aiot_q_set_max(aiot_q_request *request, PyObject *max)
{
    request->max = PY_SSIZE_T_MAX;
    if (max == NULL || max == Py_None) {
        return 0;
    }
    if (!PyIndex_Check(max)) {
        PyErr_Format(PyExc_TypeError, "max must be an integer or None, not '%.200s'", Py_TYPE(max)->tp_name);
        return -1;
    }
    request->max = PyNumber_AsSsize_t(max, NULL);
    if (request->max < 1) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "max must be at least 1, not %zd", request->max);
        }
        return -1;
    }
    return 0;
}

PyObject *
aiot_q_do_nowait(QueueCore *core, aiot_q_request *request, PyObject *empty, PyObject *full)
{
    switch (aiot_q_try(core, request, AIOT_Q_NOWAIT, NULL, false)) {
    case AIOT_Q_DONE:
        return request->out != NULL ? request->out : Py_NewRef(Py_None);
    case AIOT_Q_SHUT_DOWN:
        aiot_q_set_error(core, core->state->QueueShutDown, request);
        return NULL;
    case AIOT_Q_ERROR:
        aiot_q_set_error(core, NULL, request);
        return NULL;
    default:
        aiot_q_set_error(core, aiot_q_side_of(request) == AIOT_Q_GET ? empty : full, request);
        return NULL;
    }
}

PyObject *
aiot_q_peek_or_raise(PyObject *op, PyObject *empty)
{
    PyObject *item = aiot_q_peek(aiot_q_core_of(op));
    if (item == NULL && !PyErr_Occurred()) {
        PyErr_SetNone(empty);
    }
    return item;
}

const char aiot_q_qsize_doc[] =
    "qsize($self, /)\n--\n\n"
    "The number of items in the queue. Elsewhere it may change at any moment.";

PyObject *
aiot_q_method_qsize(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Py_ssize_t n = aiot_q_qsize(aiot_q_core_of(op));
    return n < 0 ? NULL : PyLong_FromSsize_t(n);
}

const char aiot_q_empty_doc[] =
    "empty($self, /)\n--\n\n"
    "Whether there is no item in the queue. Elsewhere this may change at any moment.";

PyObject *
aiot_q_method_empty(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Py_ssize_t n = aiot_q_qsize(aiot_q_core_of(op));
    return n < 0 ? NULL : PyBool_FromLong(n == 0);
}

const char aiot_q_full_doc[] =
    "full($self, /)\n--\n\n"
    "Whether there are maxsize items in the queue; never if it has no bound.";

PyObject *
aiot_q_method_full(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    QueueCore *core = aiot_q_core_of(op);
    Py_ssize_t n = aiot_q_qsize(core);
    return n < 0 ? NULL : PyBool_FromLong(core->maxsize > 0 && n >= core->maxsize);
}

const char aiot_q_task_done_doc[] =
    "task_done($self, /)\n--\n\n"
    "Say that an item which was got has been dealt with.\n\n"
    "When this was called for every item that was put, those in join() go on. Raises\n"
    "ValueError when it is called more often than that.";

PyObject *
aiot_q_method_task_done(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (aiot_q_task_done(aiot_q_core_of(op)) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

const char aiot_q_shutdown_doc[] =
    "shutdown($self, /, immediate=False)\n--\n\n"
    "Shut the queue down, for both of its sides: puts raise QueueShutDown from now on, gets\n"
    "do so once it is empty. All who wait for that go on at once.\n\n"
    "If immediate is true the items are dropped, and count as done for join().\n\n"
    "As queue.Queue and asyncio.Queue have it from Python 3.13 on, on any Python.";

PyObject *
aiot_q_method_shutdown(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"shutdown", 1, 0, 1, {AIOT_NAME(immediate)}};
    QueueCore *core = aiot_q_core_of(op);
    PyObject *given;
    if (aiot_bind(core->state, &params, args, nargs, kwnames, &given) < 0) {
        return NULL;
    }
    int immediate = given == NULL ? 0 : PyObject_IsTrue(given);
    if (immediate < 0 || aiot_q_shutdown(core, immediate) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

const char aiot_q_statistics_doc[] =
    "statistics($self, /)\n--\n\n"
    "The numbers of this moment, as a QueueStatistics; for monitoring and debugging.";

PyObject *
aiot_q_method_statistics(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_q_statistics(aiot_q_core_of(op));
}

const char aiot_q_class_getitem_doc[] =
    "__class_getitem__($type, item, /)\n--\n\n"
    "The class as a generic: Queue[int].";

static PyObject *
face_get_maxsize(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(aiot_q_core_of(op)->maxsize);
}

static PyObject *
face_get_closed(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(aiot_q_is_shut(aiot_q_core_of(op)));
}

static PyObject *
face_get_unfinished_tasks(PyObject *op, void *Py_UNUSED(closure))
{
    QueueCore *core = aiot_q_core_of(op);
    aiot_q_lock(core);
    Py_ssize_t n = core->unfinished;
    aiot_q_unlock(core);
    return PyLong_FromSsize_t(n);
}

static const char maxsize_doc[] = "How many items fit into the queue; zero or less: any number.";
static const char closed_doc[] = "Whether the queue is shut down.";
static const char unfinished_tasks_doc[] = "How many items were put that task_done() was not called for.";

#define FACE_GETSET                                                                         \
    {"maxsize", face_get_maxsize, NULL, maxsize_doc, NULL},                                 \
    {"closed", face_get_closed, NULL, closed_doc, NULL},                                    \
    {"unfinished_tasks", face_get_unfinished_tasks, NULL, unfinished_tasks_doc, NULL}

PyGetSetDef aiot_q_face_getset[] = {
    FACE_GETSET,
    {NULL, NULL, NULL, NULL, NULL},
};

PyMemberDef aiot_q_face_members[] = {
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(QueueFace, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyObject *
aiot_q_face_repr(PyObject *op)
{
    QueueCore *core = aiot_q_core_of(op);
    const char *name = Py_TYPE(op)->tp_name;
    const char *dot = strrchr(name, '.');
    aiot_q_lock(core);
    /* No hooks from here: as of the last one that ran. */
    Py_ssize_t count = core->count, unfinished = core->unfinished;
    bool shut = core->shut;
    aiot_q_unlock(core);
    return PyUnicode_FromFormat("<%s at %p maxsize=%zd qsize=%zd unfinished_tasks=%zd%s>", dot == NULL ? name : dot + 1,
                                op, core->maxsize, count, unfinished, shut ? " shutdown" : "");
}

PyObject *
aiot_q_face_new(PyTypeObject *type, QueueCore *core)
{
    QueueFace *self = (QueueFace *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->core = (QueueCore *)Py_NewRef((PyObject *)core);
    }
    return (PyObject *)self;
}

int
aiot_q_face_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((QueueFace *)op)->core);
    return 0;
}

/* There is no tp_clear: methods need the core, and the core's own breaks the cycles. */
void
aiot_q_face_dealloc(PyObject *op)
{
    QueueFace *self = (QueueFace *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Py_CLEAR(self->core);
    type->tp_free(op);
    Py_DECREF(type);
}

/* ---- Queue: making one --------------------------------------------------------------------------------------- */

/* Which hooks the class overrides, as AIOT_HOOK_* bits; -1 with an exception. */
static int
find_overridden(aiot_state *state, PyTypeObject *type)
{
    if (type == state->QueueType || type == state->LifoQueueType || type == state->PriorityQueueType) {
        return 0;
    }
    PyObject *const names[] = {state->str__init, state->str__qsize, state->str__put, state->str__get, state->str__peek};
    static const int bits[] = {AIOT_HOOK_INIT, AIOT_HOOK_QSIZE, AIOT_HOOK_PUT, AIOT_HOOK_GET, AIOT_HOOK_PEEK};
    int overridden = 0;
    for (size_t i = 0; i < Py_ARRAY_LENGTH(names); i++) {
        PyObject *ours = PyObject_GetAttr((PyObject *)state->QueueType, names[i]);
        PyObject *theirs = ours == NULL ? NULL : PyObject_GetAttr((PyObject *)type, names[i]);
        if (theirs != ours) {
            overridden |= bits[i];
        }
        bool failed = theirs == NULL;
        Py_XDECREF(ours);
        Py_XDECREF(theirs);
        if (failed) {
            return -1;
        }
    }
    return overridden;
}

static PyObject *
Queue_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    aiot_state *state = aiot_state_of_type(type);
    if (state == NULL) {
        return NULL;
    }
    int overridden = find_overridden(state, type);
    if (overridden < 0) {
        return NULL;
    }
    QueueObject *self = (QueueObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_q_order order = PyType_IsSubtype(type, state->PriorityQueueType) ? AIOT_Q_HEAP
                         : PyType_IsSubtype(type, state->LifoQueueType)   ? AIOT_Q_LIFO
                                                                          : AIOT_Q_FIFO;
    if ((self->face.core = aiot_q_core_new(state, order, overridden, (PyObject *)self)) == NULL
        || (self->sync_q = aiot_q_face_new(state->SyncQueueType, self->face.core)) == NULL
        || (self->async_q = aiot_q_face_new(state->AsyncQueueType, self->face.core)) == NULL)
    {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int
queue_init(QueueObject *self, Py_ssize_t maxsize)
{
    QueueCore *core = self->face.core;
    if (self->initialized) {
        PyErr_SetString(PyExc_RuntimeError, "a queue can be initialized only once");
        return -1;
    }
    if (core->guarded && aiot_q_guard_enter(core) < 0) {
        return -1;
    }
    aiot_q_lock(core);
    core->maxsize = maxsize;
    aiot_q_unlock(core);
    int failed = aiot_q_hook_init(core);
    if (core->guarded) {
        aiot_q_guard_exit(core);
    }
    if (!failed) {
        self->initialized = true;
    }
    return failed;
}

static int
Queue_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {"Queue", 1, 0, 1, {AIOT_NAME(maxsize)}};
    PyObject *given;
    Py_ssize_t maxsize = 0;
    if (aiot_bind_tuple(aiot_q_core_of(op)->state, &params, args, kwargs, &given) < 0) {
        return -1;
    }
    if (given != NULL) {
        if (!PyIndex_Check(given)) {
            PyErr_Format(PyExc_TypeError, "maxsize must be an integer, not '%.200s'", Py_TYPE(given)->tp_name);
            return -1;
        }
        maxsize = PyNumber_AsSsize_t(given, PyExc_OverflowError);
        if (maxsize == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    return queue_init((QueueObject *)op, maxsize);
}

/* ---- Queue: methods ------------------------------------------------------------------------------------------ */

/* Hooks must not be called from outside: they would change the items behind the back of those who wait. */
static int
check_in_hook(QueueCore *core)
{
    if (core->guarded && aiot_q_guard_is_mine(core)) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, "to be called by a hook of a subclass only");
    return -1;
}

PyDoc_STRVAR(init_hook_doc,
"_init($self, maxsize, /)\n--\n\n"
"Hook: make the queue ready, called once. Override it together with the others.");

static PyObject *
Queue__init(PyObject *op, PyObject *Py_UNUSED(maxsize))
{
    if (check_in_hook(aiot_q_core_of(op)) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(qsize_hook_doc,
"_qsize($self, /)\n--\n\n"
"Hook: the number of items.");

static PyObject *
Queue__qsize(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    QueueCore *core = aiot_q_core_of(op);
    return check_in_hook(core) < 0 ? NULL : PyLong_FromSsize_t(aiot_q_store_len(core));
}

PyDoc_STRVAR(put_hook_doc,
"_put($self, item, /)\n--\n\n"
"Hook: put an item in. If it raises, nothing may have changed.");

static PyObject *
Queue__put(PyObject *op, PyObject *item)
{
    QueueCore *core = aiot_q_core_of(op);
    if (check_in_hook(core) < 0 || aiot_q_store_put(core, item) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_hook_doc,
"_get($self, /)\n--\n\n"
"Hook: take the next item out; there is one. If it raises, nothing may have changed.");

static PyObject *
Queue__get(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    QueueCore *core = aiot_q_core_of(op);
    return check_in_hook(core) < 0 ? NULL : aiot_q_store_get(core);
}

PyDoc_STRVAR(peek_hook_doc,
"_peek($self, /)\n--\n\n"
"Hook: the item that _get() would return; there is one.");

static PyObject *
Queue__peek(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    QueueCore *core = aiot_q_core_of(op);
    return check_in_hook(core) < 0 ? NULL : aiot_q_store_peek(core);
}

PyDoc_STRVAR(peek_doc,
"peek($self, /)\n--\n\n"
"The same as async_q.peek().");

static PyObject *
Queue_peek(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_q_peek_or_raise(op, aiot_q_core_of(op)->state->AsyncQueueEmpty);
}

PyDoc_STRVAR(close_doc,
"close($self, /)\n--\n\n"
"The same as shutdown(immediate=True). No queue needs it; janus' users know it.");

static PyObject *
Queue_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (aiot_q_shutdown(aiot_q_core_of(op), true) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(aclose_doc,
"aclose($self, /)\n--\n\n"
"The same as close(); await it. There is nothing that it waits for.");

static PyObject *
Queue_aclose(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_q_close_awaitable(op, AIOT_REQ_CLOSE);
}

PyDoc_STRVAR(wait_closed_doc,
"wait_closed($self, /)\n--\n\n"
"Nothing goes on in the background, so there is nothing to wait for; await it.\n\n"
"Raises RuntimeError if the queue is not shut down. janus' users know it.");

static PyObject *
Queue_wait_closed(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return aiot_q_close_awaitable(op, AIOT_REQ_WAIT_CLOSED);
}

static PyObject *
Queue_aiter(PyObject *op)
{
    return Py_NewRef(((QueueObject *)op)->async_q);
}

static PyMethodDef Queue_methods[] = {
    {"close", Queue_close, METH_NOARGS, close_doc},
    {"aclose", Queue_aclose, METH_NOARGS, aclose_doc},
    {"wait_closed", Queue_wait_closed, METH_NOARGS, wait_closed_doc},
    {"peek", Queue_peek, METH_NOARGS, peek_doc},
    {"_init", Queue__init, METH_O, init_hook_doc},
    {"_qsize", Queue__qsize, METH_NOARGS, qsize_hook_doc},
    {"_put", Queue__put, METH_O, put_hook_doc},
    {"_get", Queue__get, METH_NOARGS, get_hook_doc},
    {"_peek", Queue__peek, METH_NOARGS, peek_hook_doc},
    AIOT_Q_SHARED_METHODS,
    {NULL, NULL, 0, NULL},
};

static PyObject *
Queue_get_sync_q(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(((QueueObject *)op)->sync_q);
}

static PyObject *
Queue_get_async_q(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef(((QueueObject *)op)->async_q);
}

static PyGetSetDef Queue_getset[] = {
    {"sync_q", Queue_get_sync_q, NULL, "The side for threads: a SyncQueue.", NULL},
    {"async_q", Queue_get_async_q, NULL, "The side for event loops, any number of them: an AsyncQueue.", NULL},
    FACE_GETSET,
    {NULL, NULL, NULL, NULL, NULL},
};

static int
Queue_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(((QueueObject *)op)->sync_q);
    Py_VISIT(((QueueObject *)op)->async_q);
    return aiot_q_face_traverse(op, visit, arg);
}

static void
Queue_dealloc(PyObject *op)
{
    QueueObject *self = (QueueObject *)op;
    PyObject_GC_UnTrack(op);
    Py_CLEAR(self->sync_q);
    Py_CLEAR(self->async_q);
    aiot_q_face_dealloc(op);
}

PyDoc_STRVAR(Queue_doc,
"Queue(maxsize=0)\n--\n\n"
"A queue between any number of threads and event loops, first in, first out.\n\n"
"maxsize is how many items fit into it; zero or less: any number. Threads use sync_q,\n"
"which has the methods of queue.Queue; tasks use async_q, which has those of\n"
"asyncio.Queue. Within one loop it is a faster asyncio.Queue. `async for item in queue`\n"
"ends when the queue is shut down and empty.\n\n"
"Those who wait, tasks and threads alike, are served in the order they came; who does\n"
"not wait (get_nowait(), put_nowait()) may overtake them. An item stays in the queue until\n"
"its getter resumes, so none is lost when a getter is cancelled or its time is up. A task\n"
"that was told of an item keeps its claim until its loop runs; close a loop that is done\n"
"with, which gives such claims to the next in line: one that merely stopped may go on.\n"
"get_nowait() and put_nowait() never wait for a claim.\n\n"
"There is nothing to close, no helper task and no background thread. After fork() the\n"
"child has a queue of its own with the same items, and nobody waiting; if another thread\n"
"was in a hook at that moment, the child's queue raises RuntimeError.\n\n"
"Subclasses may override the hooks _init(maxsize), _qsize(), _put(item), _get() and\n"
"_peek(), as those of queue.Queue can. Hooks run under a mutex that every thread and loop\n"
"that uses the queue waits for, so they must be short; using the queue from inside one\n"
"raises RuntimeError. A hook that raises leaves the counters as they were.\n\n"
"Raises TypeError if maxsize is not an integer. Names and behaviour of the two sides are\n"
"those of janus.");

static PyType_Slot Queue_slots[] = {
    {Py_tp_doc, (void *)Queue_doc},
    {Py_tp_new, Queue_new},
    {Py_tp_init, Queue_init},
    {Py_tp_methods, Queue_methods},
    {Py_tp_getset, Queue_getset},
    {Py_tp_members, aiot_q_face_members},
    {Py_tp_repr, aiot_q_face_repr},
    {Py_tp_traverse, Queue_traverse},
    {Py_tp_dealloc, Queue_dealloc},
    {Py_am_aiter, Queue_aiter},
    {0, NULL},
};

#define QUEUE_FLAGS (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE)

static PyType_Spec Queue_spec = {
    .name = "aiotools._aiotools.Queue",
    .basicsize = sizeof(QueueObject),
    .flags = QUEUE_FLAGS,
    .slots = Queue_slots,
};

PyDoc_STRVAR(LifoQueue_doc,
"LifoQueue(maxsize=0)\n--\n\n"
"A Queue that returns the item put last first: a stack.");

static PyType_Slot LifoQueue_slots[] = {
    {Py_tp_doc, (void *)LifoQueue_doc},
    {Py_tp_traverse, Queue_traverse},
    {Py_tp_dealloc, Queue_dealloc},
    {0, NULL},
};

static PyType_Spec LifoQueue_spec = {
    .name = "aiotools._aiotools.LifoQueue",
    .basicsize = sizeof(QueueObject),
    .flags = QUEUE_FLAGS,
    .slots = LifoQueue_slots,
};

PyDoc_STRVAR(PriorityQueue_doc,
"PriorityQueue(maxsize=0)\n--\n\n"
"A Queue that returns the smallest item first; often items are tuples (priority, data).\n\n"
"Comparing items is one of the hooks that Queue tells of: if it raises, so does the put\n"
"or get, and the queue is as it was.");

static PyType_Slot PriorityQueue_slots[] = {
    {Py_tp_doc, (void *)PriorityQueue_doc},
    {Py_tp_traverse, Queue_traverse},
    {Py_tp_dealloc, Queue_dealloc},
    {0, NULL},
};

static PyType_Spec PriorityQueue_spec = {
    .name = "aiotools._aiotools.PriorityQueue",
    .basicsize = sizeof(QueueObject),
    .flags = QUEUE_FLAGS,
    .slots = PriorityQueue_slots,
};

/* ---- start-up ------------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(QueueShutDown_doc,
"Raised by a queue that was shut down.\n\n"
"Where Python has them (3.13), it is asyncio.QueueShutDown as well as queue.ShutDown.\n"
"items_put is how many items a put_many() had put before it.");

static PyObject *
optional_attribute(const char *module_name, const char *name)
{
    PyObject *module = PyImport_ImportModule(module_name);
    PyObject *found = module == NULL ? NULL : PyObject_GetAttrString(module, name);
    Py_XDECREF(module);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
    }
    return found;
}

static PyObject *
make_shutdown_exception(void)
{
    PyObject *bases = NULL, *made = NULL;
    PyObject *dict = Py_BuildValue("{si}", "items_put", 0);
    if (dict == NULL) {
        return NULL;
    }
    PyObject *of_asyncio = optional_attribute("asyncio", "QueueShutDown");
    PyObject *of_queue = PyErr_Occurred() ? NULL : optional_attribute("queue", "ShutDown");
    if (!PyErr_Occurred()) {
        if (of_asyncio != NULL && of_queue != NULL) {
            bases = PyTuple_Pack(2, of_asyncio, of_queue);
        }
        else {
            bases = PyTuple_Pack(1, PyExc_Exception);
        }
        if (bases != NULL) {
            made = PyErr_NewExceptionWithDoc("aiotools.queue.QueueShutDown", QueueShutDown_doc, bases, dict);
        }
    }
    Py_DECREF(dict);
    Py_XDECREF(of_asyncio);
    Py_XDECREF(of_queue);
    Py_XDECREF(bases);
    return made;
}

PyDoc_STRVAR(QueueStatistics_doc,
"What Queue.statistics() returns: the numbers of one moment.\n\n"
"maxsize, qsize, unfinished_tasks: as the attributes and methods of these names;\n"
"peak_qsize: the highest qsize so far; waiting_getters, waiting_putters, waiting_joiners:\n"
"how many tasks and threads wait; items_put, items_got: how many since ever; is_shutdown.");

static PyObject *
make_statistics(aiot_state *state)
{
    PyObject *made = NULL;
    PyObject *args = Py_BuildValue("(ss)", "QueueStatistics",
                                   "maxsize qsize peak_qsize unfinished_tasks waiting_getters waiting_putters "
                                   "waiting_joiners items_put items_got is_shutdown");
    PyObject *kwargs = Py_BuildValue("{ss}", "module", "aiotools.queue");
    PyObject *doc = PyUnicode_FromString(QueueStatistics_doc);
    if (args != NULL && kwargs != NULL && doc != NULL) {
        made = PyObject_Call(state->namedtuple, args, kwargs);
        if (made != NULL && PyObject_SetAttrString(made, "__doc__", doc) < 0) {
            Py_CLEAR(made);
        }
    }
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(doc);
    return made;
}

int
aiot_queue_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_queue_core_add_types(module) < 0 || aiot_queue_async_add_types(module) < 0
        || aiot_queue_sync_add_types(module) < 0
        || aiot_add_type(module, &state->QueueType, &Queue_spec, NULL, true) < 0
        || aiot_add_type(module, &state->LifoQueueType, &LifoQueue_spec, (PyObject *)state->QueueType, true) < 0
        || aiot_add_type(module, &state->PriorityQueueType, &PriorityQueue_spec, (PyObject *)state->QueueType, true) < 0
        || (state->QueueShutDown = make_shutdown_exception()) == NULL
        || (state->QueueStatistics = make_statistics(state)) == NULL)
    {
        return -1;
    }
    if (PyModule_AddObjectRef(module, "QueueShutDown", state->QueueShutDown) < 0) {
        return -1;
    }
    return PyModule_AddObjectRef(module, "QueueStatistics", state->QueueStatistics);
}
