/* children.h: what every owner of tasks is built on: spawn them, notice their ends, wait until none is left, cancel all.
 *
 * Children are real asyncio tasks, made by loop.create_task, with nothing wrapped round their coroutines. A child that ends
 * leaves at once, and nothing of it is kept. Its end is noticed in one of two ways:
 *
 *   a node     its done callback, which is a link in the parent's list as well: one handle of the loop per child
 *   a look     children of a burst are young: sweeps, which the parent has the loop run once a turn, look which of them are
 *              done. Who is still running after a few looks gets a node. That costs one handle per turn and not per child.
 *
 * Parents that need no end but the last are lazy: while somebody waits, the youngest child that runs has a done callback, and
 * when it has ended, those before it are looked at.
 */
#ifndef AIOT_CHILDREN_H
#define AIOT_CHILDREN_H

#include "waiter.h"

typedef struct AiotChildren AiotChildren;

typedef struct {
    PyObject_HEAD
    aiot_link link;             /* in the parent's list, which owns the node, as the task's callbacks do */
    AiotChildren *parent;       /* owned until it ended, then NULL */
    PyObject *task;             /* the same */
} AiotChild;

/* For parents that must know which one it was. */
typedef struct {
    AiotChild base;
    Py_ssize_t index;
} AiotIndexedChild;

/* A child without a node. */
typedef struct {
    PyObject *task;             /* owned; NULL once its end was told, until the sweep is over */
    Py_ssize_t index;
    int looks;                  /* how often it was found running, or AIOT_FOUND_DONE */
} aiot_young;

#define AIOT_FOUND_DONE (-1)

typedef struct {
    /* A child ended; it is out of the list, and its parent's count is lower. 0, or -1 with an exception, which the loop
     * reports. Runs in the loop, in the context that was current when the first child was made. index: as it was spawned or
     * adopted with, in parents that are indexed. */
    int (*ended)(AiotChildren *self, Py_ssize_t index, PyObject *task);
    bool indexed;               /* nodes are AiotIndexedChild */
    bool later;                 /* ended() of a child that is done when create_task returns runs in the loop, too */
    bool lazy;                  /* ended() may come late: when the children are waited for, and younger ones have ended */
    int looks;                  /* how often to look at a young child; 0: all children get nodes */
} aiot_children_ops;

#define AIOT_CHILDREN_HEAD                                                                      \
    PyObject_HEAD                                                                               \
    const aiot_children_ops *ops;                                                               \
    AiotLoop *loop;                 /* owned */                                                 \
    PyObject *host;                 /* the task that waits for the children, or NULL; owned */  \
    PyObject *callback_context;     /* what ended() runs in; owned */                           \
    aiot_link children;             /* the nodes, oldest first */                               \
    Py_ssize_t n_children;          /* nodes and young ones */                                  \
    aiot_link joiners;                                                                          \
    aiot_young *young;              /* those without a node, oldest first; newer than all nodes of their burst */ \
    Py_ssize_t n_young;                                                                         \
    Py_ssize_t young_room;                                                                      \
    int burst;                      /* children made since the last end that was noticed */     \
    int sweeps_asked;               /* handles under way */                                     \
    bool sweep_is_last;             /* the last one was asked for after the youngest child was made */ \
    bool sweeping;

/* Embedded as the first member in garbage-collected objects. */
struct AiotChildren {
    AIOT_CHILDREN_HEAD
};

/* Right after tp_alloc. The loop is filled in before the first child is added. */
void aiot_children_init(void *self, const aiot_children_ops *ops);
int aiot_children_traverse(void *self, visitproc visit, void *arg);
/* For tp_clear and dealloc. */
void aiot_children_clear(void *self);

/* Further keyword arguments of create_task, as a vectorcall has them. */
typedef struct {
    PyObject *const *values;
    PyObject *names;            /* tuple or NULL */
    bool eager;                 /* run it at once up to its first suspension, where that is possible */
    bool not_eager;             /* the caller said eager_start=False, which may overrule a task factory */
    Py_ssize_t index;           /* for indexed parents */
} aiot_spawn_options;

/* loop.create_task(coro, name=, context=, ...) as a child; name, context and options may be NULL. New reference to the task.
 * On failure coro is closed if no task took it. */
PyObject *aiot_children_spawn(AiotChildren *self, PyObject *coro, PyObject *name, PyObject *context,
                              const aiot_spawn_options *options);

/* A task that is there already; done ones are fine. 0 or -1. */
int aiot_children_adopt(AiotChildren *self, PyObject *task, Py_ssize_t index);

/* In lazy parents: ended() for all that are done by now. 0, or -1 with SystemExit or KeyboardInterrupt. */
int aiot_children_settle(AiotChildren *self);

/* Closes what will not be run, without a warning: any object with close(). No exception is set or lost. */
void aiot_close_coroutine(aiot_state *state, PyObject *coro);

/* The live ones, oldest first. New list. */
PyObject *aiot_children_tasks(AiotChildren *self);

/* ---- waiting ------------------------------------------------------------------------------------------------ */

/* Embedded in an awaitable that waits until no child is left. */
typedef struct {
    aiot_link link;
    AiotWaiter *waiter;
} aiot_joiner;

static inline void
aiot_joiner_init(aiot_joiner *joiner)
{
    aiot_link_init(&joiner->link);
}

/* Suspends until woken: PYGEN_NEXT or PYGEN_ERROR. Look at n_children again when resumed. */
PySendResult aiot_join(AiotChildren *self, aiot_joiner *joiner, PyObject **result);

/* Suspends for one turn of the loop, in which a cancellation that is pending is delivered. */
PySendResult aiot_join_checkpoint(AiotLoop *loop, aiot_joiner *joiner, PyObject **result);

/* The first line of a resume: 0, or -1 with an exception. Leaves either way. */
int aiot_joiner_resumed(aiot_joiner *joiner);

/* Stops waiting, if it does. */
void aiot_joiner_leave(aiot_joiner *joiner);

/* Wakes those who wait. 0 or -1. */
int aiot_children_wake(AiotChildren *self);

int aiot_children_add_types(PyObject *module);

#endif /* AIOT_CHILDREN_H */
