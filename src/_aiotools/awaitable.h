/* awaitable.h: the base of all our awaitables, and those that are already done.
 *
 * An awaitable of ours is a coroutine to everybody who looks (collections.abc.Coroutine: send, throw, close,
 * __await__), so that create_task, gather, wait_for and run take it. It is lazy until first sent to and can be
 * used once. Its own iterator is the object itself. What it yields to the task is a Waiter (waiter.h).
 *
 * A type of awaitable gives its behaviour in an aiot_awaitable_ops, embeds AIOT_AWAITABLE_HEAD as its first
 * member, and puts AIOT_AWAITABLE_SLOTS into its spec.
 */
#ifndef AIOT_AWAITABLE_H
#define AIOT_AWAITABLE_H

#include "state.h"

typedef struct aiot_awaitable aiot_awaitable;

typedef struct {
    /* As messages and task reprs name it: "sleep". NULL: dropping one that was never awaited is fine. */
    const char *name;
    /* The first step. PYGEN_NEXT with what to yield, PYGEN_RETURN with the result, or PYGEN_ERROR. */
    PySendResult (*start)(aiot_awaitable *self, PyObject **result);
    /* Each further step. value is borrowed. */
    PySendResult (*resume)(aiot_awaitable *self, PyObject *value, PyObject **result);
    /* An exception thrown in while suspended; exc is borrowed. NULL: abandon, and raise it. */
    PySendResult (*throw)(aiot_awaitable *self, PyObject *exc, PyObject **result);
    /* Leave what is being waited for: what `finally` would do. Called with no exception set, must not fail. */
    void (*abandon)(aiot_awaitable *self);
} aiot_awaitable_ops;

typedef enum {
    AIOT_CREATED,       /* never sent to */
    AIOT_SUSPENDED,     /* yielded something */
    AIOT_RUNNING,       /* one of the ops is being run */
    AIOT_FINISHED,      /* returned, raised or closed */
} aiot_phase;

#define AIOT_AWAITABLE_HEAD             \
    PyObject_HEAD                       \
    const aiot_awaitable_ops *ops;      \
    uint8_t phase;

struct aiot_awaitable {
    AIOT_AWAITABLE_HEAD
};

static inline void
aiot_awaitable_init(void *self, const aiot_awaitable_ops *ops)
{
    ((aiot_awaitable *)self)->ops = ops;
    ((aiot_awaitable *)self)->phase = AIOT_CREATED;
}

PyObject *aiot_awaitable_await(PyObject *self);
PySendResult aiot_awaitable_send(PyObject *self, PyObject *value, PyObject **result);
PyObject *aiot_awaitable_iternext(PyObject *self);
void aiot_awaitable_finalize(PyObject *self);
extern PyMethodDef aiot_awaitable_methods[];
extern PyGetSetDef aiot_awaitable_getset[];

#define AIOT_AWAITABLE_SLOTS                            \
    {Py_am_await, aiot_awaitable_await},                \
    {Py_am_send, aiot_awaitable_send},                  \
    {Py_tp_iter, PyObject_SelfIter},                    \
    {Py_tp_iternext, aiot_awaitable_iternext},          \
    {Py_tp_methods, aiot_awaitable_methods},            \
    {Py_tp_getset, aiot_awaitable_getset},              \
    {Py_tp_finalize, aiot_awaitable_finalize}

/* How a C iterator ends with a value: steals value, always returns NULL. None needs no exception at all. */
PyObject *aiot_stop_iteration(aiot_state *state, PyObject *value);

/* The same, quicker, for awaitables that call aiot_stop_forget() when they are freed. */
PyObject *aiot_stop_iteration_lent(aiot_state *state, PyObject *value);

/* One plain StopIteration serves all of them: it must not keep the value longer than the awaitable that had it lives, and
 * belongs to whoever caught it. */
static inline void
aiot_stop_forget(aiot_state *state)
{
#if AIOT_FREELISTS
    PyStopIterationObject *stop = (PyStopIterationObject *)state->stop_lent;
    if (stop == NULL || stop->value == NULL) {
        return;
    }
    if (Py_REFCNT(stop) == 1) {
        Py_CLEAR(stop->value);
    }
    else {
        Py_CLEAR(state->stop_lent);
    }
#else
    (void)state;
#endif
}

/* A new awaitable that completes at once with value. */
PyObject *aiot_done_new(aiot_state *state, PyObject *value);

/* The shared one whose result is None. New reference. */
static inline PyObject *
aiot_done_none(aiot_state *state)
{
    return Py_NewRef(state->done_none);
}

/* What (type[, value[, traceback]]) of a throw() means, as one new exception object. NULL with TypeError. */
PyObject *aiot_throw_argument(PyObject *const *args, Py_ssize_t nargs);

int aiot_awaitable_add_types(PyObject *module);

#endif /* AIOT_AWAITABLE_H */
