/* waiter.h: the future-like that all our types suspend on.
 *
 * asyncio.Task takes any object that speaks the protocol of futures; ours need not cost a loop handle per wake-up.
 * Users never get one: what they await is an aiot_awaitable (awaitable.h) that yields a Waiter to the task.
 */
#ifndef AIOT_WAITER_H
#define AIOT_WAITER_H

#include "loopstate.h"

typedef enum {
    AIOT_PENDING,
    AIOT_WOKEN,
    AIOT_CANCELLED,
} aiot_waiter_status;

struct AiotWaiter {
    PyObject_HEAD
    vectorcallfunc call;        /* add_done_callback: see Waiter_getattro */
    AiotLoop *loop;             /* owned */
    PyObject *callback;         /* the first one, or NULL */
    PyObject *context;          /* its context */
    PyObject *more;             /* list of (callback, context), or NULL: a task adds one callback only */
    PyObject *cancel_msg;
    AiotWaiter *next;           /* in the loop's batch, which owns a reference while linked is true */
    uint8_t status;
    bool blocking;              /* _asyncio_future_blocking: yielded, and not yet taken by the task */
    bool linked;
    bool wakes_task;            /* callback is the wake-up of an asyncio.Task in C */
    bool deaf;                  /* cancel() answers True and does nothing: see shield.c */
};

/* A pending one, or one that is woken already (yielding it lets everything else that is ready run once). */
AiotWaiter *aiot_waiter_new(AiotLoop *loop, aiot_waiter_status status);

static inline bool
aiot_waiter_is_done(const AiotWaiter *self)
{
    return self->status != AIOT_PENDING;
}

/* What an awaitable yields: a new reference, marked as awaited properly. */
static inline PyObject *
aiot_waiter_yield(AiotWaiter *self)
{
    self->blocking = true;
    return Py_NewRef((PyObject *)self);
}

/* Completes it; its callbacks run in the loop's next batch. Done already: does nothing. 0, or -1 with an
 * exception (the loop is closed, no memory) and nothing changed. Thread of the loop only: others post. */
int aiot_waiter_wake(AiotWaiter *self);

/* The same, for finalizers and close(): completes it whatever happens, sets no exception. */
void aiot_waiter_wake_quietly(AiotWaiter *self);

/* For the first line of a resume: 0 when the waiter was woken; else -1 with RuntimeError, as somebody drives the
 * awaitable by hand without waiting. (A cancelled one never gets there: the task throws CancelledError.) */
int aiot_waiter_check_resumed(AiotWaiter *self);

/* Runs the callbacks of what is ready, up to what was ready when it began. 0 or -1. */
int aiot_loop_drain(AiotLoop *loop);

int aiot_waiter_add_types(PyObject *module);

#endif /* AIOT_WAITER_H */
