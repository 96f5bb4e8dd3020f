/* cancel.h: cancel tasks and wait for their ends. */
#ifndef AIOT_CANCEL_H
#define AIOT_CANCEL_H

#include "children.h"

/* Told by the awaitable when it is first sent to: closes owner, and returns a new list of the tasks to cancel. */
typedef PyObject *(*aiot_close_fn)(PyObject *owner);

/* An awaitable that calls close(owner), cancels the tasks and waits for them. quiet: whatever the tasks
 * end with is none of the caller's business, and a cancellation of the caller isn't forwarded to them. seconds: raise
 * aiotools.cancel.UnfinishedTasksError after that time; infinity: wait for ever. */
PyObject *aiot_cancel_wait_new(aiot_state *state, PyObject *owner, aiot_close_fn close, bool quiet,
                               double seconds);

/* The message of a CancelledError: borrowed, or NULL. */
PyObject *aiot_cancel_message(PyObject *exc);

int aiot_cancel_add_types(PyObject *module);

#endif /* AIOT_CANCEL_H */
