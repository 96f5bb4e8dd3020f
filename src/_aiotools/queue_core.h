/* queue_core.h: what Queue, SyncQueue and AsyncQueue share: the items, who waits, and the rules of handing over.
 *
 * Queue, its two faces and everything suspended on them refer to one QueueCore; the core refers to none of them
 * (but to a Queue whose class has hooks of its own). So a queue that nobody uses goes at once, items and all.
 */
#ifndef AIOT_QUEUE_CORE_H
#define AIOT_QUEUE_CORE_H

#include "state.h"

#include "chunks.h"
#include "forks.h"
#include "link.h"
#include "loopstate.h"

/* What one can wait for: an item, room for one, the end of all tasks. */
typedef enum {
    AIOT_Q_GET,
    AIOT_Q_PUT,
    AIOT_Q_JOIN,
    AIOT_Q_SIDES,
} aiot_q_side;

typedef enum {
    AIOT_Q_OUT,             /* in no line */
    AIOT_Q_WAITING,         /* in the line of its side */
    AIOT_Q_TICKET,          /* woken, has not come back yet */
} aiot_q_place;

/* One who waits: part of an awaitable, or made for a blocked thread. All fields but the constant ones belong to the lock
 * of the core. While WAITING, the line owns a reference to owner. */
typedef struct aiot_q_entry {
    aiot_link link;
    struct aiot_q_entry *next_woken;
    uint64_t order;                 /* place in the line, for those who come back to it; 0: never been there */
    uint64_t forks;                 /* aiot_fork_count when it was put into the line */
    PyThread_type_lock wake_lock;   /* of a thread: released to wake it. NULL: an awaitable */
    PyObject *owner;                /* the awaitable, NULL for a thread */
    uint8_t place;
    uint8_t side;
} aiot_q_entry;

typedef struct {
    aiot_link waiting;
    Py_ssize_t tickets;
    Py_ssize_t n;                   /* waiting ones and tickets */
} aiot_q_line;

typedef enum {
    AIOT_Q_FIFO,
    AIOT_Q_LIFO,
    AIOT_Q_HEAP,
} aiot_q_order;

/* The hooks that the class of a Queue may override. */
enum {
    AIOT_HOOK_INIT = 1,
    AIOT_HOOK_QSIZE = 2,
    AIOT_HOOK_PUT = 4,
    AIOT_HOOK_GET = 8,
    AIOT_HOOK_PEEK = 16,
};

typedef struct {
    PyObject_HEAD
    aiot_state *state;
    PyObject *module;               /* keeps state alive */
    aiot_mutex lock;                /* held for a few instructions: no Python, no allocation, no decref */
    uint64_t forks;                 /* aiot_fork_count that the lines are valid for */
    aiot_q_line lines[AIOT_Q_SIDES];
    uint64_t last_order;
    Py_ssize_t maxsize;             /* 0 or less: no bound */
    Py_ssize_t count;               /* items in it; with hooks: as of the last one that ran */
    Py_ssize_t unfinished;
    Py_ssize_t most;                /* the highest count so far */
    uint64_t n_put, n_got;
    aiot_chunks items;              /* FIFO and LIFO */
    bool shut;
    bool rehoming, rehome_again;
    bool lost_in_fork;              /* another thread was in a hook when this process was forked off */
    uint8_t order;
    /* What can run Python code: under a second mutex, so that `lock` need not be held meanwhile. */
    bool guarded;
    uint8_t overridden;             /* AIOT_HOOK_* bits */
    PyThread_type_lock guard;
    uint64_t guard_owner;           /* the thread that holds it, else 0 */
    PyObject *hooks;                /* the Queue, if its class overrides any */
    PyObject **heap;
    size_t heap_len, heap_room;     /* changed with both locks held */
    bool comparing;                 /* an operation of the heap is under way: no other one may come */
} QueueCore;

/* Those that got a ticket while the lock was held, to be woken after. Threads are woken at once and are not in it. */
typedef struct {
    aiot_q_entry *first, *last;
} aiot_q_woken;

typedef enum {
    AIOT_REQ_GET,
    AIOT_REQ_GET_MANY,
    AIOT_REQ_PUT,
    AIOT_REQ_PUT_MANY,
    AIOT_REQ_JOIN,
    AIOT_REQ_CLOSE,
    AIOT_REQ_WAIT_CLOSED,
} aiot_q_kind;

/* What somebody wants of the queue. */
typedef struct {
    uint8_t kind;
    PyObject *in;           /* put: the item, which the queue takes; put_many: a list of our own. Owned */
    Py_ssize_t max;         /* get_many: how many at most */
    Py_ssize_t n;           /* put and put_many: how many have been put */
    PyObject *out;          /* what get returns. Owned by the caller once DONE */
} aiot_q_request;

/* How patient: NOWAIT overtakes everybody. BLOCK leaves to the tickets what is theirs. IN_LINE queues behind
 * them even so, since who got them would otherwise see its item given to a later comer of the same loop. */
typedef enum {
    AIOT_Q_NOWAIT,
    AIOT_Q_BLOCK,
    AIOT_Q_IN_LINE,
} aiot_q_manner;

typedef enum {
    AIOT_Q_DONE,
    AIOT_Q_LINKED,          /* must wait, and is in the line now */
    AIOT_Q_MUST_WAIT,       /* must wait, and is not in the line */
    AIOT_Q_SHUT_DOWN,
    AIOT_Q_ERROR,           /* an exception is set */
} aiot_q_outcome;

/* Tries once, after taking entry (may be NULL) out of its line or taking back its ticket, which counts. If it must wait,
 * entry goes (back) to its place in the line if link is true. */
aiot_q_outcome aiot_q_try(QueueCore *core, aiot_q_request *request, aiot_q_manner manner, aiot_q_entry *entry, bool link);

/* Gives up: out of the line, or the ticket goes to the next one. Any time, any number of times. */
void aiot_q_leave(QueueCore *core, aiot_q_entry *entry);

static inline void
aiot_q_entry_init(aiot_q_entry *entry, aiot_q_side side, PyObject *owner, PyThread_type_lock wake_lock)
{
    aiot_link_init(&entry->link);
    entry->next_woken = NULL;
    entry->order = 0;
    entry->forks = 0;
    entry->wake_lock = wake_lock;
    entry->owner = owner;
    entry->place = AIOT_Q_OUT;
    entry->side = side;
}

static inline aiot_q_side
aiot_q_side_of(const aiot_q_request *request)
{
    return request->kind <= AIOT_REQ_GET_MANY ? AIOT_Q_GET : request->kind <= AIOT_REQ_PUT_MANY ? AIOT_Q_PUT : AIOT_Q_JOIN;
}

/* A woken entry that could not be told: back into the line, at its place. Whoever uses the queue next wakes it. */
void aiot_q_unwake(QueueCore *core, aiot_q_entry *entry);

/* A woken entry whose loop is closed: its ticket goes to the next one. Bounded in depth, however many are closed. */
void aiot_q_rehome(QueueCore *core, aiot_q_entry *entry);

QueueCore *aiot_q_core_new(aiot_state *state, aiot_q_order order, int overridden, PyObject *hooks);

/* The number of items, or -1 with the exception of a hook. */
Py_ssize_t aiot_q_qsize(QueueCore *core);

/* The item that the next get would return: new reference; NULL with an exception; NULL without one when empty. */
PyObject *aiot_q_peek(QueueCore *core);

/* 0, or -1 with ValueError. */
int aiot_q_task_done(QueueCore *core);

/* 0, or -1 with the exception of a hook. */
int aiot_q_shutdown(QueueCore *core, bool immediate);

bool aiot_q_is_shut(QueueCore *core);

/* A QueueStatistics. */
PyObject *aiot_q_statistics(QueueCore *core);

/* ---- the lock and the lines (queue_core.c), for queue_hooks.c ------------------------------------------------ */

void aiot_q_after_fork(QueueCore *core);

static inline void
aiot_q_lock(QueueCore *core)
{
    aiot_mutex_lock(&core->lock);
    if (AIOT_UNLIKELY(core->forks != aiot_fork_count)) {
        aiot_q_after_fork(core);
    }
}

static inline void
aiot_q_unlock(QueueCore *core)
{
    aiot_mutex_unlock(&core->lock);
}

/* ---- hooks and the heap (queue_hooks.c) ---------------------------------------------------------------------- */

/* The second mutex, with the GIL released while waiting for it. 0, or -1 with RuntimeError: this thread holds it, or
 * what another thread did is lost. */
int aiot_q_guard_enter(QueueCore *core);
void aiot_q_guard_exit(QueueCore *core);
void aiot_q_guard_after_fork(QueueCore *core);

static inline bool
aiot_q_guard_is_mine(QueueCore *core)
{
    return aiot_atomic_load(&core->guard_owner) == (uint64_t)PyThread_get_thread_ident();
}

/* All of these run with the guard held. -1 or NULL with an exception. */
int aiot_q_hook_init(QueueCore *core);
Py_ssize_t aiot_q_hook_qsize(QueueCore *core);
int aiot_q_hook_put(QueueCore *core, PyObject *item);
PyObject *aiot_q_hook_get(QueueCore *core);
PyObject *aiot_q_hook_peek(QueueCore *core);

/* What the hooks do unless they are overridden; the guard is held. put takes a reference of its own. */
Py_ssize_t aiot_q_store_len(QueueCore *core);
int aiot_q_store_put(QueueCore *core, PyObject *item);
PyObject *aiot_q_store_get(QueueCore *core);
PyObject *aiot_q_store_peek(QueueCore *core);

/* ---- awaitables (queue_async.c) ------------------------------------------------------------------------------ */

/* Tells an awaitable that it got a ticket. here: the state of the loop that runs in this thread, or NULL. */
void aiot_q_wake_awaitable(PyObject *op, AiotLoop *here);

/* What Queue.aclose() (kind CLOSE) and Queue.wait_closed() (kind WAIT_CLOSED) return. */
PyObject *aiot_q_close_awaitable(PyObject *queue, aiot_q_kind kind);

int aiot_queue_core_add_types(PyObject *module);
int aiot_queue_async_add_types(PyObject *module);
int aiot_queue_sync_add_types(PyObject *module);

/* What the three public types begin with, and the methods that they share (queue.c). */
typedef struct {
    PyObject_HEAD
    QueueCore *core;
    PyObject *weakrefs;
} QueueFace;

static inline QueueCore *
aiot_q_core_of(PyObject *op)
{
    return ((QueueFace *)op)->core;
}

PyObject *aiot_q_face_new(PyTypeObject *type, QueueCore *core);
int aiot_q_face_traverse(PyObject *op, visitproc visit, void *arg);
void aiot_q_face_dealloc(PyObject *op);
PyObject *aiot_q_face_repr(PyObject *op);
extern PyGetSetDef aiot_q_face_getset[];
extern PyMemberDef aiot_q_face_members[];

PyObject *aiot_q_method_qsize(PyObject *op, PyObject *ignored);
PyObject *aiot_q_method_empty(PyObject *op, PyObject *ignored);
PyObject *aiot_q_method_full(PyObject *op, PyObject *ignored);
PyObject *aiot_q_method_task_done(PyObject *op, PyObject *ignored);
PyObject *aiot_q_method_shutdown(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames);
PyObject *aiot_q_method_statistics(PyObject *op, PyObject *ignored);
extern const char aiot_q_qsize_doc[], aiot_q_empty_doc[], aiot_q_full_doc[], aiot_q_task_done_doc[];
extern const char aiot_q_shutdown_doc[], aiot_q_statistics_doc[], aiot_q_class_getitem_doc[];

/* For the tables of the three types. */
#define AIOT_Q_SHARED_METHODS                                                                                       \
    {"qsize", aiot_q_method_qsize, METH_NOARGS, aiot_q_qsize_doc},                                                  \
    {"empty", aiot_q_method_empty, METH_NOARGS, aiot_q_empty_doc},                                                  \
    {"full", aiot_q_method_full, METH_NOARGS, aiot_q_full_doc},                                                     \
    {"task_done", aiot_q_method_task_done, METH_NOARGS, aiot_q_task_done_doc},                                      \
    {"shutdown", (PyCFunction)(void (*)(void))aiot_q_method_shutdown, METH_FASTCALL | METH_KEYWORDS,                \
     aiot_q_shutdown_doc},                                                                                          \
    {"statistics", aiot_q_method_statistics, METH_NOARGS, aiot_q_statistics_doc},                                   \
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, aiot_q_class_getitem_doc}

/* Of each side, and of the Queue, which raises what the asynchronous side does. */
PyObject *aiot_q_peek_or_raise(PyObject *op, PyObject *empty);

/* What does not wait, for both sides. NULL with the exceptions of that side. */
PyObject *aiot_q_do_nowait(QueueCore *core, aiot_q_request *request, PyObject *empty, PyObject *full);

/* For a request that takes many: the list that put_many needs, a copy of its own, or max, None being no limit.
 * 0, or -1 with TypeError or ValueError. */
int aiot_q_set_items(aiot_q_request *request, PyObject *iterable);
int aiot_q_set_max(aiot_q_request *request, PyObject *max);

/* Raises exc_type, or adds to the pending exception when that is NULL: one of a put_many has an attribute items_put. */
void aiot_q_set_error(QueueCore *core, PyObject *exc_type, const aiot_q_request *request);

#endif /* AIOT_QUEUE_CORE_H */
