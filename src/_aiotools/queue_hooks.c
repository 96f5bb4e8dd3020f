/* queue_hooks.c: what of a queue can run Python code: hooks that a subclass overrides, and the heap of PriorityQueue.
 *
 * Locking:    all of it runs under the guard, a mutex that is waited for with the GIL released and that knows its owner:
 *             coming back from inside a hook or a comparison is a RuntimeError, not a deadlock. The fields that
 *             others read are changed under the core's lock, for a few instructions.
 * Errors:     a hook or a comparison that raises leaves the heap as it was: where an item goes is found out before
 *             anything is moved.
 * Re-entry:   the heap keeps its items while they are compared, and only the guard's owner changes it; a comparison that
 *             calls the default hooks itself gets a RuntimeError.
 */

#include "queue_core.h"

/* ---- the guard ----------------------------------------------------------------------------------------------- */

void
aiot_q_guard_after_fork(QueueCore *core)
{
    if (core->guard == NULL || core->guard_owner == (uint64_t)PyThread_get_thread_ident()) {
        return;
    }
    if (core->guard_owner != 0) {
        /* A thread that this process doesn't have was in a hook: nobody knows how far it got. */
        core->lost_in_fork = true;
    }
    else if (PyThread_acquire_lock(core->guard, NOWAIT_LOCK)) {
        PyThread_release_lock(core->guard);
    }
    else if ((core->guard = PyThread_allocate_lock()) == NULL) {
        /* It was held by a thread that had not begun yet, and there's no memory for another one. */
        core->lost_in_fork = true;
    }
}

int
aiot_q_guard_enter(QueueCore *core)
{
    uint64_t me = (uint64_t)PyThread_get_thread_ident();
    if (aiot_atomic_load(&core->guard_owner) == me) {
        PyErr_SetString(PyExc_RuntimeError, "the queue is being used from one of its own hooks or comparisons");
        return -1;
    }
    aiot_q_lock(core);
    bool lost = core->lost_in_fork;
    aiot_q_unlock(core);
    if (lost) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the queue was in use by another thread when this process was forked; it cannot be used here");
        return -1;
    }
    if (!PyThread_acquire_lock(core->guard, NOWAIT_LOCK)) {
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock(core->guard, WAIT_LOCK);
        Py_END_ALLOW_THREADS
    }
    aiot_atomic_store(&core->guard_owner, me);
    return 0;
}

void
aiot_q_guard_exit(QueueCore *core)
{
    assert(aiot_q_guard_is_mine(core));
    aiot_atomic_store(&core->guard_owner, 0);
    PyThread_release_lock(core->guard);
}

/* ---- the heap ------------------------------------------------------------------------------------------------ */

static int
heap_enter(QueueCore *core)
{
    if (core->comparing) {
        PyErr_SetString(PyExc_RuntimeError, "the queue is being used from one of its own comparisons");
        return -1;
    }
    core->comparing = true;
    return 0;
}

static int
is_less(PyObject *a, PyObject *b)
{
    Py_INCREF(a);
    Py_INCREF(b);
    int less = PyObject_RichCompareBool(a, b, Py_LT);
    Py_DECREF(a);
    Py_DECREF(b);
    return less;
}

static int
heap_reserve(QueueCore *core)
{
    if (core->heap_len < core->heap_room) {
        return 0;
    }
    size_t room = core->heap_room == 0 ? 16 : core->heap_room * 2;
    PyObject **heap = room > PY_SSIZE_T_MAX / sizeof(PyObject *) ? NULL : PyMem_Malloc(room * sizeof(PyObject *));
    if (heap == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject **old = core->heap;
    aiot_q_lock(core);
    for (size_t i = 0; i < core->heap_len; i++) {
        heap[i] = old[i];
    }
    core->heap = heap;
    core->heap_room = room;
    aiot_q_unlock(core);
    PyMem_Free(old);
    return 0;
}

/* Compares as heapq.heappush() does. */
static int
heap_put_entered(QueueCore *core, PyObject *item)
{
    if (heap_reserve(core) < 0) {
        return -1;
    }
    size_t place = core->heap_len;
    while (place > 0) {
        size_t parent = (place - 1) / 2;
        int less = is_less(item, core->heap[parent]);
        if (less < 0) {
            return -1;
        }
        if (!less) {
            break;
        }
        place = parent;
    }
    aiot_q_lock(core);
    size_t hole = core->heap_len++;
    for (; hole != place; hole = (hole - 1) / 2) {
        core->heap[hole] = core->heap[(hole - 1) / 2];
    }
    core->heap[place] = Py_NewRef(item);
    aiot_q_unlock(core);
    return 0;
}

static int
heap_put(QueueCore *core, PyObject *item)
{
    if (heap_enter(core) < 0) {
        return -1;
    }
    int failed = heap_put_entered(core, item);
    core->comparing = false;
    return failed;
}

/* Compares as heapq.heappop() does: down to a leaf, then up again with the last item. */
static PyObject *
heap_get_entered(QueueCore *core)
{
    size_t path[sizeof(size_t) * 8];        /* the places whose items move up by one */
    size_t depth = 0;
    size_t end = core->heap_len - 1;        /* where the item is that gets a new place */
    PyObject **heap = core->heap;
    for (size_t place = 0; place < end / 2;) {
        size_t child = 2 * place + 1;
        if (child + 1 < end) {
            int less = is_less(heap[child], heap[child + 1]);
            if (less < 0) {
                return NULL;
            }
            child += !less;
        }
        path[depth++] = child;
        place = child;
    }
    while (depth > 0) {
        int less = is_less(heap[end], heap[path[depth - 1]]);
        if (less < 0) {
            return NULL;
        }
        if (!less) {
            break;
        }
        depth--;
    }
    aiot_q_lock(core);
    PyObject *item = heap[0];
    size_t hole = 0;
    for (size_t i = 0; i < depth; i++) {
        heap[hole] = heap[path[i]];
        hole = path[i];
    }
    heap[hole] = heap[end];
    core->heap_len = end;
    aiot_q_unlock(core);
    return item;
}

static PyObject *
heap_get(QueueCore *core)
{
    if (heap_enter(core) < 0) {
        return NULL;
    }
    PyObject *item = heap_get_entered(core);
    core->comparing = false;
    return item;
}

/* ---- what the hooks do unless they are overridden ----------------------------------------------------------- */

/* For callers that hold the guard or the lock. */
Py_ssize_t
aiot_q_store_len(QueueCore *core)
{
    return (Py_ssize_t)(core->order == AIOT_Q_HEAP ? core->heap_len : core->items.len);
}

int
aiot_q_store_put(QueueCore *core, PyObject *item)
{
    if (core->order == AIOT_Q_HEAP) {
        return heap_put(core, item);
    }
    if (aiot_chunks_must_grow(&core->items)) {
        aiot_chunk *chunk = PyMem_RawMalloc(sizeof(aiot_chunk));
        if (chunk == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        aiot_q_lock(core);
        bool given = aiot_chunks_give(&core->items, chunk);
        aiot_q_unlock(core);
        if (!given) {
            PyMem_RawFree(chunk);
        }
    }
    Py_INCREF(item);
    aiot_q_lock(core);
    aiot_chunks_push_back(&core->items, item);
    aiot_q_unlock(core);
    return 0;
}

static PyObject *
set_empty(void)
{
    PyErr_SetString(PyExc_IndexError, "_get() from an empty queue");
    return NULL;
}

PyObject *
aiot_q_store_get(QueueCore *core)
{
    if (aiot_q_store_len(core) == 0) {
        return set_empty();
    }
    if (core->order == AIOT_Q_HEAP) {
        return heap_get(core);
    }
    aiot_chunk *needless;
    aiot_q_lock(core);
    PyObject *item = core->order == AIOT_Q_FIFO ? aiot_chunks_pop_front(&core->items, &needless)
                                                : aiot_chunks_pop_back(&core->items, &needless);
    aiot_q_unlock(core);
    if (needless != NULL) {
        PyMem_RawFree(needless);
    }
    return item;
}

PyObject *
aiot_q_store_peek(QueueCore *core)
{
    if (aiot_q_store_len(core) == 0) {
        return set_empty();
    }
    if (core->order == AIOT_Q_HEAP) {
        return Py_NewRef(core->heap[0]);
    }
    return Py_NewRef(core->order == AIOT_Q_FIFO ? aiot_chunks_front(&core->items) : aiot_chunks_back(&core->items));
}

/* ---- hooks --------------------------------------------------------------------------------------------------- */

/* The Queue whose class has the hooks: new reference. Only the collector can have taken it away. */
static PyObject *
hooks_owner(QueueCore *core)
{
    if (core->hooks == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the queue is being destroyed");
        return NULL;
    }
    return Py_NewRef(core->hooks);
}

/* The reference to the Queue can't be the last one: that is the core's. */
static PyObject *
call_hook(QueueCore *core, PyObject *name, PyObject *arg)
{
    PyObject *owner = hooks_owner(core);
    if (owner == NULL) {
        return NULL;
    }
    PyObject *answer = arg == NULL ? PyObject_CallMethodNoArgs(owner, name) : PyObject_CallMethodOneArg(owner, name, arg);
    Py_DECREF(owner);
    return answer;
}

int
aiot_q_hook_init(QueueCore *core)
{
    if (!(core->overridden & AIOT_HOOK_INIT)) {
        return 0;
    }
    PyObject *maxsize = PyLong_FromSsize_t(core->maxsize);
    if (maxsize == NULL) {
        return -1;
    }
    PyObject *answer = call_hook(core, core->state->str__init, maxsize);
    Py_DECREF(maxsize);
    Py_XDECREF(answer);
    return answer == NULL ? -1 : 0;
}

Py_ssize_t
aiot_q_hook_qsize(QueueCore *core)
{
    if (!(core->overridden & AIOT_HOOK_QSIZE)) {
        return aiot_q_store_len(core);
    }
    PyObject *answer = call_hook(core, core->state->str__qsize, NULL);
    if (answer == NULL) {
        return -1;
    }
    Py_ssize_t n = PyNumber_AsSsize_t(answer, PyExc_OverflowError);
    Py_DECREF(answer);
    if (n < 0 && !PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "_qsize() must return a number >= 0, not %zd", n);
    }
    return n < 0 ? -1 : n;
}

int
aiot_q_hook_put(QueueCore *core, PyObject *item)
{
    if (!(core->overridden & AIOT_HOOK_PUT)) {
        return aiot_q_store_put(core, item);
    }
    PyObject *answer = call_hook(core, core->state->str__put, item);
    Py_XDECREF(answer);
    return answer == NULL ? -1 : 0;
}

PyObject *
aiot_q_hook_get(QueueCore *core)
{
    return core->overridden & AIOT_HOOK_GET ? call_hook(core, core->state->str__get, NULL) : aiot_q_store_get(core);
}

PyObject *
aiot_q_hook_peek(QueueCore *core)
{
    if (core->overridden & AIOT_HOOK_PEEK) {
        return call_hook(core, core->state->str__peek, NULL);
    }
    if (core->overridden & AIOT_HOOK_GET) {
        PyErr_Format(PyExc_NotImplementedError, "%.200s overrides _get(): peek() needs a _peek() as well",
                     core->hooks == NULL ? "the class" : Py_TYPE(core->hooks)->tp_name);
        return NULL;
    }
    return aiot_q_store_peek(core);
}
