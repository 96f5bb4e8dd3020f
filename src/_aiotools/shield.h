/* shield.h: where a cancellation comes from, and which open scope of a task holds it off.
 *
 * The open scopes of a task form a stack of frames. A shielded frame has a token; whatever is started inside it (callbacks,
 * tasks) finds that token, or one whose ancestor it is, in a context variable. A cancel() call from inside passes the
 * shield, one from elsewhere is kept by the innermost shielded frame until that is left.
 *
 * While a task has a shielded frame, its cancel(), cancelling() and uncancel() are replaced on the instance. The last
 * shielded frame to leave puts them back.
 */
#ifndef AIOT_SHIELD_H
#define AIOT_SHIELD_H

#include "loopstate.h"

typedef struct AiotShield AiotShield;       /* a token */

typedef struct aiot_frame aiot_frame;

/* Embedded in a scope. */
struct aiot_frame {
    PyObject *task;             /* owned while open, NULL otherwise */
    aiot_frame *outer;          /* the enclosing frame of the same task */
    aiot_frame *shield;         /* the innermost shielded one, this included, or NULL; valid while open */
    AiotShield *token;          /* of a shielded frame: its own. Else the innermost around it, or NULL. Owned. */
    PyObject *patch;            /* of a shielded frame: what replaces the methods. Owned */
    PyObject *deferred;         /* of a shielded frame: list of (message, origin or None, counted), or NULL. Owned */
    Py_ssize_t requests;        /* the task's own count of requests at entry */
    bool sync;                  /* of a shielded frame: it can't suspend when it is left */
};

/* Opens a frame of the task that is running. 0, or -1 with an exception (RuntimeError when shielded and the task takes no
 * attributes), and then nothing has changed. */
int aiot_frame_push(AiotLoop *loop, aiot_frame *frame, PyObject *task, bool shielded, bool sync);

/* Closes it, wherever in the stack it is. What it deferred stays in it. Runs no code of a user except the last reference to
 * its task; sets no exception. */
void aiot_frame_pop(AiotLoop *loop, aiot_frame *frame);

int aiot_frame_traverse(aiot_frame *frame, visitproc visit, void *arg);

/* The innermost open frame of a task, or NULL. */
aiot_frame *aiot_frame_of_task(AiotLoop *loop, PyObject *task);

/* Hands what a closed frame deferred to what is around it: kept there, or delivered. How many were delivered to the task
 * itself, or -1; *pending of these are made anew, so the task throws CancelledError at its next suspension; the others
 * are counted only, and it is for the caller to raise it. */
Py_ssize_t aiot_frame_hand_over(AiotLoop *loop, aiot_frame *frame, PyObject *task, Py_ssize_t *pending);

/* How many requests a frame holds. */
Py_ssize_t aiot_frame_deferred(const aiot_frame *frame);

/* ---- for all that cancels tasks ----------------------------------------------------------------------------- */

/* The token of the innermost shield of a task: a new reference, NULL without an exception when there is none. Timeouts and
 * scopes remember it at entry. */
AiotShield *aiot_task_shield(AiotLoop *loop, PyObject *task);

/* Cancels a task from inside the given shield (NULL: from outside all): kept by any shield opened further inside. msg may
 * be NULL. 1 when it took effect or was kept, 0 when the task is done, -1 with an exception. */
int aiot_task_cancel_from(AiotLoop *loop, PyObject *task, AiotShield *origin, PyObject *msg);

/* Cancels it through all shields. The same answers. */
int aiot_task_interrupt(AiotLoop *loop, PyObject *task, PyObject *msg);

/* The task's own count of requests, shields left aside. -1 with an exception. */
Py_ssize_t aiot_task_requests(AiotLoop *loop, PyObject *task);

/* Takes one request of that count back. How many are left, or -1. */
Py_ssize_t aiot_task_take_back(AiotLoop *loop, PyObject *task);

/* All requests that a task has pending, kept ones included. -1 with an exception. */
Py_ssize_t aiot_task_all_requests(AiotLoop *loop, PyObject *task);

/* Is a request waiting to be delivered when the task suspends next? 1, 0, or -1 with an exception. Where the task doesn't
 * tell: 1. */
int aiot_task_must_cancel(AiotLoop *loop, PyObject *task);

int aiot_shield_add_types(PyObject *module);

#endif /* AIOT_SHIELD_H */
