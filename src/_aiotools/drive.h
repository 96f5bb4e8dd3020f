/* drive.h: what an `await` expression does, in pieces, for awaitables of ours that await others in turn.
 *
 * The steps themselves are PyIter_Send(); these are the pieces around it for which there is no public function.
 */
#ifndef AIOT_DRIVE_H
#define AIOT_DRIVE_H

#include "state.h"

/* The iterator behind an awaitable, as `await` finds it. New reference; NULL with TypeError when it cannot be
 * awaited, or RuntimeError when it is a coroutine that somebody else awaits already. */
PyObject *aiot_await_iter(aiot_state *state, PyObject *awaitable);

/* Throws exc (borrowed) into it: PYGEN_NEXT with what it yields, PYGEN_RETURN with its value, or PYGEN_ERROR. An
 * iterator without throw() is left as it is, and exc raised. GeneratorExit closes the iterator and is raised. */
PySendResult aiot_iter_throw(aiot_state *state, PyObject *iter, PyObject *exc, PyObject **result);

/* For the end of an iterator: PYGEN_RETURN with the value of the pending StopIteration (none pending: None), or
 * PYGEN_ERROR with any other exception left pending. */
PySendResult aiot_fetch_return(PyObject **result);

#endif /* AIOT_DRIVE_H */
