/* scope.h: TaskContext, TaskScope, ShieldScope, and the core of TaskGroup.
 *
 * What other types build on: an entered scope takes children (aiot_scope_spawn), can cancel them (aiot_scope_abort), and
 * its n_children and aiot_join() tell when none is left.
 */
#ifndef AIOT_SCOPE_H
#define AIOT_SCOPE_H

#include "children.h"
#include "shield.h"

typedef enum {
    AIOT_UNINITIALIZED,
    AIOT_TASK_CONTEXT,      /* no block: closed by aclose() */
    AIOT_TASK_SCOPE,        /* a block; failures go to a handler */
    AIOT_TASK_GROUP,        /* a block; the first failure ends it */
} aiot_scope_mode;

typedef struct {
    AIOT_CHILDREN_HEAD
    aiot_frame frame;           /* open while the block is */
    aiot_alarm alarm;           /* for timeout */
    double timeout;             /* seconds, negative infinity for none */
    PyObject *handler;          /* None, a callable, or the token for the loop's handler */
    PyObject *context;          /* for the children, or NULL */
    PyObject *gate;             /* what limits how many run, or NULL */
    PyObject *cancel_msg;       /* of cancel() before entry */
    PyObject *base_error;       /* SystemExit or KeyboardInterrupt of a child or the body */
    PyObject *errors;           /* of a group's children: list, or NULL */
    PyObject *var_reset;        /* contextvars.Token of current_taskgroup */
    PyObject *origin;           /* the code that made a TaskContext, or NULL */
    int origin_line;
    PyObject *weakrefs;
    Py_ssize_t n_done;          /* children that have ended, however */
    Py_ssize_t n_failed;        /* those of them that ended with an exception */
    int own;                    /* requests that we made to our host, and have to take back */
    uint8_t mode;
    bool shielded;
    bool eager;                 /* children start at once */
    bool sync;                  /* entered by a plain `with` */
    bool entered;
    bool exiting;               /* the body is over */
    bool exited;
    bool aborting;              /* the children were cancelled; no more are taken */
    bool closed_by_host;        /* the host called aclose() in its own block */
    bool cancel_called;
    bool expired;               /* the timeout fired */
} AiotScope;

/* A child of an entered scope, as create_task() makes one. New reference; NULL with RuntimeError when it takes none. */
PyObject *aiot_scope_spawn(AiotScope *self, PyObject *coro, PyObject *name, PyObject *context);

/* Cancels all children, from where the scope is; no more are taken. 0, or -1 with the first exception of a cancel(), all
 * others having been tried. */
int aiot_scope_abort(AiotScope *self, PyObject *msg);

int aiot_scope_add_types(PyObject *module);

#endif /* AIOT_SCOPE_H */
