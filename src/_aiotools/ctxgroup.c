/* ctxgroup.c: runs one method of many objects at once, each in a context of its own, in as few tasks as will do.
 *
 * Jobs:       job i is `targets[i].method(*args)`, awaited. Its value or exception goes to results[i], and statuses[i]
 *             tells which: 0 not run, 1 returned, 2 raised. Ordinary exceptions and CancelledError of a job stay there.
 * Tasks:      a worker runs jobs one after the other as long as they do not suspend. One that suspends keeps its
 *             worker until it ends, which ends the worker. So jobs that do not suspend cost no task, and each that suspends
 *             one. Where tasks can start eagerly (3.12 on, no task factory) workers do: they are made one after the other
 *             and spare the loop a handle each, and a run in which nothing suspends the loop's turn. Elsewhere new
 *             workers are made when one suspends: as many as have suspended before, so that n of them have started
 *             after log n turns of the loop.
 * Invariants: next <= n; n_active counts the workers whose end was not seen yet, n_fresh those of them that have not
 *             run; `workers` holds the active ones, and each knows its place. The host is woken when there is nothing
 *             under way and nothing to start any more.
 * Ending:     a worker that has begun sees its own end and is counted off there; the host's wake-up comes later than the
 *             task's last step. Only before it has begun (it may be closed, or cancelled), or when a task factory put
 *             another coroutine round it, it takes a done callback of its task, which costs the loop a handle.
 * Cancelled:  the request is passed on to the jobs under way; those not started are dropped, or, with `finish`, run
 *             nevertheless, and cancelled where they first suspend. The host waits for all that runs and is cancelled
 *             after that. With `shield` nothing is passed on.
 * Locking:    run and workers belong to the thread of their loop; each step holds the critical section of the run.
 * Re-entry:   jobs, task factories and task.cancel() may run anything; counters are set before, read again after.
 */

#include "ctxgroup.h"

#include "args.h"
#include "awaitable.h"
#include "drive.h"
#include "freelist.h"
#include "waiter.h"

#include <string.h>

typedef struct GroupWorkerObject GroupWorkerObject;

typedef struct {
    AIOT_AWAITABLE_HEAD
    AiotLoop *loop;
    AiotWaiter *waiter;         /* the host's, while it waits */
    PyObject *host;             /* its task */
    PyObject *context;          /* its context: each job runs in a copy */
    PyObject *targets;          /* list */
    PyObject *method;           /* str */
    PyObject *args;             /* tuple */
    PyObject *results;          /* list of the same length */
    PyObject *statuses;         /* bytearray of the same length */
    PyObject *cancelled;        /* the CancelledError that the host gets in the end, or NULL */
    PyObject *abort_msg;        /* what they are cancelled with when `aborted`, or NULL */
    PyObject *eager_options;    /* dict: keyword arguments of asyncio.Task; made when needed */
    PyObject *error;            /* why workers could not be started, or a base error, or NULL */
    GroupWorkerObject **workers;
    Py_ssize_t room;            /* of workers */
    Py_ssize_t n, next, limit;
    Py_ssize_t n_active, n_fresh, n_suspended;
    bool finish;                /* cancellation does not keep jobs from being started */
    bool shield;
    bool fail_fast;             /* the first failure aborts the rest */
    bool stopped;               /* no more jobs are started */
    bool aborted;               /* those that are started all the same are cancelled when they suspend */
    bool spawning;
} GroupRunObject;

struct GroupWorkerObject {
    AIOT_AWAITABLE_HEAD
    GroupRunObject *run;        /* NULL once it was counted off */
    PyObject *task;             /* known once it was made, or has begun; NULL once it was counted off */
    PyObject *eager_task;       /* that ended with a base error before it was made */
    PyObject *callback;         /* the done callback of the task, while it has one */
    PyObject *inner;            /* the iterator of the job that suspended */
    PyObject *context;          /* and its context; NULL: the task's */
    Py_ssize_t job;
    Py_ssize_t place;           /* in run->workers */
    bool fresh;
    bool made;                  /* its task was returned to run_spawn_one() */
    bool owns_context;          /* the task's context is a copy made for this, and no job ran in it yet */
    bool fatal;                 /* ended with SystemExit or KeyboardInterrupt */
};

enum { NOT_RUN, RETURNED, RAISED };

#define RUN(op) ((GroupRunObject *)(op))
#define WORKER(op) ((GroupWorkerObject *)(op))

static int run_spawn(GroupRunObject *run);
static int worker_watch_task(GroupWorkerObject *worker, PyObject *task);
static void worker_unwatch_task(GroupWorkerObject *worker);

/* ---- keeping count ---------------------------------------------------------------------------------------- */

static inline bool
run_has_jobs(const GroupRunObject *run)
{
    return !run->stopped && run->next < run->n;
}

static void
run_wake_if_over(GroupRunObject *run)
{
    if (run->n_active == 0 && !run_has_jobs(run) && run->waiter != NULL) {
        aiot_waiter_wake_quietly(run->waiter);
    }
}

static int
run_add_worker(GroupRunObject *run, GroupWorkerObject *worker)
{
    if (run->n_active == run->room) {
        Py_ssize_t room = run->room == 0 ? 4 : 2 * run->room;
        GroupWorkerObject **workers = NULL;
        if ((size_t)room <= PY_SSIZE_T_MAX / sizeof(*workers)) {
            /* Not PyMem_Resize(), which forgets what there was when there is no memory. */
            workers = PyMem_Realloc(run->workers, (size_t)room * sizeof(*workers));
        }
        if (workers == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        run->workers = workers;
        run->room = room;
    }
    worker->place = run->n_active;
    worker->fresh = true;
    run->workers[run->n_active++] = (GroupWorkerObject *)Py_NewRef((PyObject *)worker);
    run->n_fresh++;
    return 0;
}

static void
worker_has_run(GroupWorkerObject *worker)
{
    if (worker->fresh) {
        worker->fresh = false;
        worker->run->n_fresh--;
    }
}

/* Takes it off the run. Leaves a pending exception alone. */
static void
worker_count_off(GroupWorkerObject *worker)
{
    GroupRunObject *run = worker->run;
    if (run == NULL) {
        return;
    }
    worker_has_run(worker);
    worker->run = NULL;
    GroupWorkerObject *last = run->workers[--run->n_active];
    run->workers[worker->place] = last;
    last->place = worker->place;
    PyObject *exc = PyErr_GetRaisedException();
    PyObject *task = worker->task;
    worker->task = NULL;
    if (run->loop->state->discard_from_awaited_by != NULL && task != NULL) {
        PyObject *args[] = {task, run->host};
        PyObject *res = PyObject_Vectorcall(run->loop->state->discard_from_awaited_by, args, 2, NULL);
        if (res == NULL) {
            PyErr_WriteUnraisable(task);
        }
        Py_XDECREF(res);
    }
    run_wake_if_over(run);
    Py_XDECREF(task);
    Py_DECREF(worker);
    Py_DECREF(run);
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
}

/* ---- jobs ------------------------------------------------------------------------------------------------- */

static void
run_store(GroupRunObject *run, Py_ssize_t job, int status, PyObject *value)
{
    /* Both belong to the caller, who may have changed them. */
    if (job < PyByteArray_GET_SIZE(run->statuses)) {
        PyByteArray_AS_STRING(run->statuses)[job] = (char)status;
    }
    if (job >= PyList_GET_SIZE(run->results) || PyList_SetItem(run->results, job, Py_NewRef(value)) < 0) {
        PyErr_Clear();
    }
}

static void run_abort(GroupRunObject *run, GroupWorkerObject *except, PyObject *msg);

/* Stores the pending exception. SystemExit and KeyboardInterrupt remain pending: -1; else 0. */
static int
run_store_failure(GroupRunObject *run, GroupWorkerObject *worker, Py_ssize_t job)
{
    PyObject *exc = PyErr_GetRaisedException();
    run_store(run, job, RAISED, exc);
    int fatal = PyErr_GivenExceptionMatches(exc, PyExc_SystemExit)
                || PyErr_GivenExceptionMatches(exc, PyExc_KeyboardInterrupt);
    if (fatal && run->error == NULL) {
        run->error = Py_NewRef(exc);
    }
    if (run->fail_fast && !run->stopped) {
        run->stopped = true;
        run_abort(run, worker, NULL);
    }
    if (fatal) {
        run->stopped = run->stopped || !run->finish;
        PyErr_SetRaisedException(exc);
        return -1;
    }
    Py_DECREF(exc);
    return 0;
}

/* What `await target.method(*args)` drives. */
static PyObject *
run_begin_job(GroupRunObject *run, Py_ssize_t job)
{
    if (job >= PyList_GET_SIZE(run->targets)) {
        PyErr_SetString(PyExc_RuntimeError, "the list of context managers was changed");
        return NULL;
    }
    PyObject *stack[8];
    Py_ssize_t nargs = PyTuple_GET_SIZE(run->args);
    assert(nargs < (Py_ssize_t)Py_ARRAY_LENGTH(stack));
    PyObject *target = Py_NewRef(PyList_GET_ITEM(run->targets, job));
    stack[0] = target;
    for (Py_ssize_t i = 0; i < nargs; i++) {
        stack[i + 1] = PyTuple_GET_ITEM(run->args, i);
    }
    PyObject *awaitable = PyObject_VectorcallMethod(run->method, stack, (size_t)nargs + 1, NULL);
    Py_DECREF(target);
    if (awaitable == NULL) {
        return NULL;
    }
    PyObject *iter = aiot_await_iter(run->loop->state, awaitable);
    Py_DECREF(awaitable);
    return iter;
}

typedef enum {
    JOB_SUSPENDED,              /* the worker has to yield *result */
    JOB_ENDED,                  /* and was stored */
    JOB_FATAL,                  /* stored too; the exception is pending for the loop */
} job_outcome;

/* After a step of a job that was made in `context`, which is still entered, or NULL for the task's. */
static job_outcome
worker_after_step(GroupWorkerObject *worker, Py_ssize_t job, PyObject *context, PySendResult answer, PyObject **result)
{
    GroupRunObject *run = worker->run;
    if (context != NULL && PyContext_Exit(context) < 0 && answer != PYGEN_ERROR) {
        Py_CLEAR(*result);
        answer = PYGEN_ERROR;
    }
    switch (answer) {
    case PYGEN_NEXT:
        return JOB_SUSPENDED;
    case PYGEN_RETURN:
        run_store(run, job, RETURNED, *result);
        Py_CLEAR(*result);
        return JOB_ENDED;
    case PYGEN_ERROR:
    default:
        return run_store_failure(run, worker, job) < 0 ? JOB_FATAL : JOB_ENDED;
    }
}

/* Starts a job in a context of its own. */
static job_outcome
worker_start_job(GroupWorkerObject *worker, PyObject **result)
{
    GroupRunObject *run = worker->run;
    Py_ssize_t job = run->next++;
    PyObject *context = NULL;
    if (worker->owns_context) {
        worker->owns_context = false;
    }
    else if ((context = PyContext_Copy(run->context)) == NULL || PyContext_Enter(context) < 0) {
        Py_XDECREF(context);
        return run_store_failure(run, worker, job) < 0 ? JOB_FATAL : JOB_ENDED;
    }
    PySendResult answer = PYGEN_ERROR;
    PyObject *iter = run_begin_job(run, job);
    if (iter != NULL) {
        answer = PyIter_Send(iter, Py_None, result);
    }
    job_outcome outcome = worker_after_step(worker, job, context, answer, result);
    if (outcome == JOB_SUSPENDED) {
        worker->job = job;
        worker->inner = iter;
        worker->context = context;
        return outcome;
    }
    PyObject *exc = PyErr_GetRaisedException();
    Py_XDECREF(iter);
    Py_XDECREF(context);
    if (exc != NULL) {
        PyErr_SetRaisedException(exc);
    }
    return outcome;
}

/* ---- the worker ------------------------------------------------------------------------------------------- */

/* The task ends. */
static PySendResult
worker_end(GroupWorkerObject *worker, PySendResult answer, PyObject **result)
{
    GroupRunObject *run = (GroupRunObject *)Py_NewRef((PyObject *)worker->run);
    if (!worker->fatal) {
        worker_unwatch_task(worker);
    }
    worker_count_off(worker);
    if (run_has_jobs(run)) {
        PyObject *exc = PyErr_GetRaisedException();
        run_spawn(run);
        if (exc != NULL) {
            PyErr_SetRaisedException(exc);
        }
    }
    Py_DECREF(run);
    if (answer == PYGEN_RETURN) {
        *result = Py_NewRef(Py_None);
    }
    return answer;
}

static void
task_cancel(GroupRunObject *run, PyObject *task, PyObject *msg)
{
    PyObject *res = msg == NULL ? PyObject_CallMethodNoArgs(task, run->loop->state->str_cancel)
                                : PyObject_CallMethodOneArg(task, run->loop->state->str_cancel, msg);
    if (res == NULL) {
        PyErr_WriteUnraisable(task);
    }
    Py_XDECREF(res);
}

/* A task that is cancelled in its own step is cancelled at the suspension with which that ends. */
static void
worker_cancel_if_aborted(GroupWorkerObject *worker)
{
    if (worker->run->aborted && worker->task != NULL) {
        PyObject *task = Py_NewRef(worker->task);
        PyObject *msg = Py_XNewRef(worker->run->abort_msg);
        task_cancel(worker->run, task, msg);
        Py_XDECREF(msg);
        Py_DECREF(task);
    }
}

/* The pending exception will go out of the loop, and, if the task starts eagerly, out of create_task(), which does not
 * return the task then. */
static void
worker_note_fatal(GroupWorkerObject *worker)
{
    worker->fatal = true;
    PyObject *exc = PyErr_GetRaisedException();
    if (!worker->made) {
        worker->eager_task = Py_XNewRef(worker->task);
    }
    else if (worker->callback == NULL && worker->task != NULL) {
        worker_watch_task(worker, worker->task);
    }
    if (PyErr_Occurred()) {
        PyErr_WriteUnraisable((PyObject *)worker);
    }
    PyErr_SetRaisedException(exc);
}

static PySendResult
worker_run_jobs(GroupWorkerObject *worker, PyObject **result)
{
    while (run_has_jobs(worker->run)) {
        switch (worker_start_job(worker, result)) {
        case JOB_SUSPENDED:
            worker->run->n_suspended++;
            worker_unwatch_task(worker);
            worker_cancel_if_aborted(worker);
            run_spawn(worker->run);
            return PYGEN_NEXT;
        case JOB_FATAL:
            worker_note_fatal(worker);
            return worker_end(worker, PYGEN_ERROR, result);
        case JOB_ENDED:
            break;
        }
    }
    return worker_end(worker, PYGEN_RETURN, result);
}

/* The task shows in the call graph as awaited by the host. */
static void
worker_set_task(GroupWorkerObject *worker, PyObject *task)
{
    GroupRunObject *run = worker->run;
    PyObject *add = run->loop->state->add_to_awaited_by;
    worker->task = Py_NewRef(task);
    if (add != NULL) {
        PyObject *args[] = {task, run->host};
        PyObject *res = PyObject_Vectorcall(add, args, 2, NULL);
        if (res == NULL) {
            /* For introspection only: a task of a foreign loop may not take part. */
            PyErr_Clear();
        }
        Py_XDECREF(res);
    }
}

/* One that starts eagerly was not returned by anybody yet. */
static void
worker_find_task(GroupWorkerObject *worker)
{
    PyObject *task = aiot_loop_current_task(worker->run->loop, "AsyncContextGroup");
    if (task != NULL) {
        worker_set_task(worker, task);
        Py_DECREF(task);
    }
    else {
        PyErr_Clear();
    }
}

static PySendResult
Worker_start(aiot_awaitable *op, PyObject **result)
{
    GroupWorkerObject *worker = WORKER(op);
    if (worker->run == NULL) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    PySendResult answer;
    PyObject *run = Py_NewRef((PyObject *)worker->run);
    Py_BEGIN_CRITICAL_SECTION(run);
    worker_has_run(worker);
    if (worker->task == NULL) {
        worker_find_task(worker);
    }
    answer = worker_run_jobs(worker, result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    return answer;
}

/* A further step of the job that suspended: value is sent, or exc thrown in. */
static PySendResult
worker_step(GroupWorkerObject *worker, PyObject *value, PyObject *exc, PyObject **result)
{
    GroupRunObject *run = worker->run;
    job_outcome outcome;
    if (worker->context != NULL && PyContext_Enter(worker->context) < 0) {
        outcome = run_store_failure(run, worker, worker->job) < 0 ? JOB_FATAL : JOB_ENDED;
    }
    else {
        PySendResult answer = exc == NULL ? PyIter_Send(worker->inner, value, result)
                                          : aiot_iter_throw(run->loop->state, worker->inner, exc, result);
        outcome = worker_after_step(worker, worker->job, worker->context, answer, result);
    }
    if (outcome == JOB_SUSPENDED) {
        return PYGEN_NEXT;
    }
    PyObject *fatal = PyErr_GetRaisedException();
    Py_CLEAR(worker->inner);
    Py_CLEAR(worker->context);
    if (fatal != NULL) {
        PyErr_SetRaisedException(fatal);
        worker_note_fatal(worker);
        return worker_end(worker, PYGEN_ERROR, result);
    }
    /* The job may have been cancelled, or have left something behind that belongs to its task. */
    return worker_end(worker, PYGEN_RETURN, result);
}

/* Its task ended while the job was suspended, which no task of asyncio does. The job is dropped. */
static PySendResult
worker_orphaned(GroupWorkerObject *worker, PyObject *exc, PyObject **result)
{
    Py_CLEAR(worker->inner);
    Py_CLEAR(worker->context);
    if (exc != NULL) {
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static PySendResult
Worker_resume(aiot_awaitable *op, PyObject *value, PyObject **result)
{
    if (WORKER(op)->run == NULL) {
        return worker_orphaned(WORKER(op), NULL, result);
    }
    PySendResult answer;
    PyObject *run = Py_NewRef((PyObject *)WORKER(op)->run);
    Py_BEGIN_CRITICAL_SECTION(run);
    answer = worker_step(WORKER(op), value, NULL, result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    return answer;
}

static PySendResult
Worker_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    if (WORKER(op)->run == NULL) {
        return worker_orphaned(WORKER(op), exc, result);
    }
    PySendResult answer;
    PyObject *run = Py_NewRef((PyObject *)WORKER(op)->run);
    bool closing = PyErr_GivenExceptionMatches(exc, PyExc_GeneratorExit);
    Py_BEGIN_CRITICAL_SECTION(run);
    if (closing) {
        /* The loop is gone or the task is garbage: nothing more can be awaited. */
        RUN(run)->stopped = true;
    }
    answer = worker_step(WORKER(op), NULL, exc, result);
    Py_END_CRITICAL_SECTION();
    Py_DECREF(run);
    return answer;
}

static const aiot_awaitable_ops worker_ops = {
    .name = "AsyncContextGroup",
    .start = Worker_start,
    .resume = Worker_resume,
    .throw = Worker_throw,
};

/* The host raises its exception. */
static void
task_mark_retrieved(aiot_state *state, PyObject *task)
{
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *exc = PyObject_CallMethodNoArgs(task, state->str_exception);
    if (exc == NULL) {
        PyErr_Clear();
    }
    Py_XDECREF(exc);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* The done callback of the task: for one that never got to its end by itself, and for one whose exception went out of
 * the loop and to the host, so that asyncio need not report it a third time. */
static PyObject *
worker_task_done(PyObject *op, PyObject *task)
{
    GroupWorkerObject *worker = WORKER(op);
    Py_CLEAR(worker->callback);     /* the caller's argument keeps op */
    if (worker->fatal) {
        task_mark_retrieved(aiot_state_of_exact_type(Py_TYPE(op)), task);
    }
    if (worker->run != NULL) {
        GroupRunObject *run = (GroupRunObject *)Py_NewRef((PyObject *)worker->run);
        Py_BEGIN_CRITICAL_SECTION(run);
        worker_count_off(worker);
        if (!run->finish) {
            run->stopped = true;
        }
        if (run_has_jobs(run)) {
            run_spawn(run);
        }
        run_wake_if_over(run);
        Py_END_CRITICAL_SECTION();
        Py_DECREF(run);
    }
    Py_RETURN_NONE;
}

static PyMethodDef worker_task_done_def = {"_worker_done", worker_task_done, METH_O, NULL};

static void
worker_clear(GroupWorkerObject *worker)
{
    Py_CLEAR(worker->run);
    Py_CLEAR(worker->task);
    Py_CLEAR(worker->eager_task);
    Py_CLEAR(worker->callback);
    Py_CLEAR(worker->inner);
    Py_CLEAR(worker->context);
}

static int
Worker_traverse(PyObject *op, visitproc visit, void *arg)
{
    GroupWorkerObject *worker = WORKER(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(worker->run);
    Py_VISIT(worker->task);
    Py_VISIT(worker->eager_task);
    Py_VISIT(worker->callback);
    Py_VISIT(worker->inner);
    Py_VISIT(worker->context);
    return 0;
}

static int
Worker_clear(PyObject *op)
{
    worker_clear(WORKER(op));
    return 0;
}

static void
Worker_dealloc(PyObject *op)
{
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    worker_clear(WORKER(op));
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_group_workers, op);
}

/* Introspection goes on to the job. */
static PyObject *
worker_ask_job(PyObject *op, PyObject *name)
{
    PyObject *inner, *answer = NULL;
    Py_BEGIN_CRITICAL_SECTION(op);
    inner = Py_XNewRef(WORKER(op)->inner);
    Py_END_CRITICAL_SECTION();
    if (inner == NULL || PyObject_GetOptionalAttr(inner, name, &answer) == 0) {
        answer = Py_NewRef(Py_None);
    }
    Py_XDECREF(inner);
    return answer;
}

static PyObject *
Worker_get_frame(PyObject *op, void *Py_UNUSED(closure))
{
    return worker_ask_job(op, aiot_state_of_exact_type(Py_TYPE(op))->str_cr_frame);
}

static PyObject *
Worker_get_await(PyObject *op, void *Py_UNUSED(closure))
{
    return worker_ask_job(op, aiot_state_of_exact_type(Py_TYPE(op))->str_cr_await);
}

static PyObject *
Worker_get_name(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(worker_ops.name);
}

static PyObject *
Worker_get_running(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((aiot_awaitable *)op)->phase == AIOT_RUNNING);
}

static PyGetSetDef Worker_getset[] = {
    {"__name__", Worker_get_name, NULL, "The name of the type that made this.", NULL},
    {"__qualname__", Worker_get_name, NULL, "The name of the type that made this.", NULL},
    {"cr_running", Worker_get_running, NULL, "Whether it is being run right now.", NULL},
    {"cr_frame", Worker_get_frame, NULL, "The frame of what the manager runs, or None.", NULL},
    {"cr_await", Worker_get_await, NULL, "What the manager is awaiting, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Worker_slots[] = {
    {Py_tp_doc, "The coroutine of a task in which context managers of a group are entered or left."},
    {Py_am_await, aiot_awaitable_await},
    {Py_am_send, aiot_awaitable_send},
    {Py_tp_iternext, aiot_awaitable_iternext},
    {Py_tp_methods, aiot_awaitable_methods},
    {Py_tp_finalize, aiot_awaitable_finalize},
    {Py_tp_getset, Worker_getset},
    {Py_tp_traverse, Worker_traverse},
    {Py_tp_clear, Worker_clear},
    {Py_tp_dealloc, Worker_dealloc},
    {0, NULL},
};

static PyType_Spec Worker_spec = {
    .name = "aiotools._aiotools.GroupWorker",
    .basicsize = sizeof(GroupWorkerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Worker_slots,
};

/* ---- starting workers ------------------------------------------------------------------------------------- */

/* May workers start eagerly, that is, be made by calling asyncio.Task? Only where the loop's create_task() is its own and
 * would do no more. Asked before each burst: both can be replaced at any time. 1, 0 or -1. */
static int
run_may_start_eagerly(GroupRunObject *run)
{
#if PY_VERSION_HEX >= 0x030C0000
    aiot_state *state = run->loop->state;
    PyObject *loop = aiot_loop_object(run->loop);
    PyObject *method = NULL, *module = NULL, *factory = NULL;
    int answer = -1;
    if (loop == NULL || (method = PyObject_GetAttr(loop, state->str_create_task)) == NULL) {
        goto done;
    }
    answer = PyMethod_Check(method) ? PyMethod_GET_FUNCTION(method) == state->base_loop_create_task : 0;
    if (answer == 0 && run->loop->coarse && PyMethod_Check(method)) {
        answer = PyObject_GetOptionalAttr(PyMethod_GET_FUNCTION(method), state->str___module__, &module);
        if (answer > 0) {
            const char *name = PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : "";
            answer = name == NULL ? -1 : strncmp(name, "uvloop.", 7) == 0 || strncmp(name, "winloop.", 8) == 0;
        }
    }
    if (answer > 0) {
        factory = PyObject_CallMethodNoArgs(loop, state->str_get_task_factory);
        answer = factory == NULL ? -1 : factory == Py_None;
    }
done:
    Py_XDECREF(loop);
    Py_XDECREF(method);
    Py_XDECREF(module);
    Py_XDECREF(factory);
    return answer;
#else
    (void)run;
    return 0;
#endif
}

/* Has the worker told when the task ends other than by the worker's own end. 0 or -1. */
static int
worker_watch_task(GroupWorkerObject *worker, PyObject *task)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(worker));
    PyObject *callback = PyCFunction_New(&worker_task_done_def, (PyObject *)worker);
    PyObject *res = callback == NULL ? NULL : PyObject_CallMethodOneArg(task, state->str_add_done_callback, callback);
    if (res == NULL) {
        Py_XDECREF(callback);
        return -1;
    }
    Py_DECREF(res);
    Py_XSETREF(worker->callback, callback);
    return 0;
}

/* Is the worker's end the end of the task? Not if a task factory put another coroutine round it. */
static bool
worker_is_whole_task(GroupWorkerObject *worker, PyObject *task)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(worker));
    if (!Py_IS_TYPE(task, (PyTypeObject *)state->asyncio_Task)) {
        return false;
    }
    PyObject *coro = PyObject_CallMethodNoArgs(task, state->str_get_coro);
    if (coro == NULL) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(coro);
    return coro == (PyObject *)worker;
}

/* The worker has begun, so it will see its own end; the callback would cost the loop a handle. */
static void
worker_unwatch_task(GroupWorkerObject *worker)
{
    if (worker->callback == NULL || worker->task == NULL) {
        return;
    }
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *task = Py_NewRef(worker->task);
    if (worker_is_whole_task(worker, task)) {
        PyObject *callback = worker->callback;
        worker->callback = NULL;
        PyObject *name = aiot_state_of_exact_type(Py_TYPE(worker))->str_remove_done_callback;
        PyObject *res = PyObject_CallMethodOneArg(task, name, callback);
        if (res == NULL) {
            /* It will find nothing to do. */
            PyErr_Clear();
        }
        Py_XDECREF(res);
        Py_DECREF(callback);
    }
    Py_DECREF(task);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* Task(worker, loop=loop, eager_start=True, context=a copy). The context is made here also because the current one may be
 * that of another worker. A type without vectorcall makes a dict of keywords for each call; this is one for all. Nothing
 * else uses it meanwhile: run_spawn() is not entered twice. */
static PyObject *
run_make_eager_task(GroupRunObject *run, GroupWorkerObject *worker, PyObject *loop)
{
    aiot_state *state = run->loop->state;
    PyObject *context = NULL, *args = NULL, *task = NULL;
    PyObject *options = run->eager_options;
    if (options == NULL) {
        if ((options = PyDict_New()) == NULL) {
            return NULL;
        }
        run->eager_options = options;
        if (PyDict_SetItem(options, state->str_loop, loop) < 0
            || PyDict_SetItem(options, state->str_eager_start, Py_True) < 0)
        {
            Py_CLEAR(run->eager_options);
            return NULL;
        }
    }
    if ((context = PyContext_Copy(run->context)) != NULL
        && PyDict_SetItem(options, state->str_context, context) == 0
        && (args = PyTuple_Pack(1, worker)) != NULL)
    {
        worker->owns_context = true;
        task = PyObject_Call(state->asyncio_Task, args, options);
    }
    Py_XDECREF(context);
    Py_XDECREF(args);
    return task;
}

static PyObject *
run_make_task(GroupRunObject *run, GroupWorkerObject *worker, bool eagerly)
{
    PyObject *loop = aiot_loop_object(run->loop);
    if (loop == NULL) {
        return NULL;
    }
    PyObject *task = eagerly ? run_make_eager_task(run, worker, loop)
                             : PyObject_CallMethodOneArg(loop, run->loop->state->str_create_task, (PyObject *)worker);
    Py_DECREF(loop);
    return task;
}

static PyObject *
run_create_task(GroupRunObject *run, GroupWorkerObject *worker, bool eagerly)
{
    PyObject *task = run_make_task(run, worker, eagerly);
    if (task == NULL || worker->run == NULL) {
        return task;
    }
    /* It is not done, and may not have begun. */
    bool is_seen = worker->inner != NULL && (eagerly || worker_is_whole_task(worker, task));
    if (!is_seen && worker_watch_task(worker, task) < 0) {
        Py_DECREF(task);
        return NULL;
    }
    if (worker->task == NULL) {
        worker_set_task(worker, task);
    }
    worker->made = true;
    return task;
}

static int
run_spawn_one(GroupRunObject *run, bool eagerly)
{
    aiot_state *state = run->loop->state;
    GroupWorkerObject *worker = (GroupWorkerObject *)aiot_free_list_alloc(&state->free_group_workers, state->GroupWorkerType);
    if (worker == NULL) {
        return -1;
    }
    aiot_awaitable_init(worker, &worker_ops);
    worker->run = (GroupRunObject *)Py_NewRef((PyObject *)run);
    if (run_add_worker(run, worker) < 0) {
        worker->phase = AIOT_FINISHED;
        Py_DECREF(worker);
        return -1;
    }
    PyObject *task = run_create_task(run, worker, eagerly);
    if (task == NULL) {
        if (worker->phase == AIOT_CREATED) {
            worker->phase = AIOT_FINISHED;
        }
        worker_count_off(worker);
        if (worker->eager_task != NULL) {
            task_mark_retrieved(state, worker->eager_task);
        }
        Py_DECREF(worker);
        return -1;
    }
    Py_DECREF(task);
    Py_DECREF(worker);
    return 0;
}

/* Starts workers as there is need. What fails is kept in run->error, and no more jobs are started then. */
static int
run_spawn(GroupRunObject *run)
{
    if (run->spawning) {
        return 0;
    }
    int failed = 0;
    run->spawning = true;
    int eagerly = run_has_jobs(run) && run->n_active < run->limit ? run_may_start_eagerly(run) : 0;
    while (run_has_jobs(run) && run->n_active < run->limit) {
        Py_ssize_t wanted = Py_MIN(run->n - run->next, Py_MAX(run->n_suspended, 1));
        if (run->n_fresh >= wanted) {
            break;
        }
        failed = eagerly < 0 ? -1 : run_spawn_one(run, eagerly);
        if (failed) {
            PyObject *exc = PyErr_GetRaisedException();
            if (exc == run->error && run->finish) {
                /* A base error of an eager job, stored already. */
                Py_DECREF(exc);
                failed = 0;
                continue;
            }
            run->stopped = true;
            if (run->error == NULL) {
                run->error = exc;
            }
            else {
                Py_DECREF(exc);
            }
            break;
        }
    }
    run->spawning = false;
    if (failed) {
        run_wake_if_over(run);
    }
    return failed;
}

/* ---- the run ---------------------------------------------------------------------------------------------- */

/* Cancels what is under way, apart from one worker. A task that has not begun is left alone: it would be
 * cancelled without having run, and with `finish` it has to run. It finds out by itself when there is nothing to do. */
static void
run_abort(GroupRunObject *run, GroupWorkerObject *except, PyObject *msg)
{
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *tasks = PyList_New(0);
    for (Py_ssize_t i = 0; tasks != NULL && i < run->n_active; i++) {
        GroupWorkerObject *worker = run->workers[i];
        if (worker != except && !worker->fresh && worker->task != NULL && PyList_Append(tasks, worker->task) < 0) {
            Py_CLEAR(tasks);
        }
    }
    for (Py_ssize_t i = 0; tasks != NULL && i < PyList_GET_SIZE(tasks); i++) {
        task_cancel(run, PyList_GET_ITEM(tasks, i), msg);
    }
    if (tasks == NULL) {
        PyErr_WriteUnraisable((PyObject *)run);
    }
    Py_XDECREF(tasks);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

static PySendResult
run_end(GroupRunObject *run, PyObject **result)
{
    Py_CLEAR(run->waiter);
    PyObject *exc = run->cancelled != NULL ? run->cancelled : run->error;
    if (exc != NULL) {
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static PySendResult
run_wait(GroupRunObject *run, PyObject **result)
{
    if (run->n_active == 0 && !run_has_jobs(run)) {
        return run_end(run, result);
    }
    AiotWaiter *waiter = aiot_waiter_new(run->loop, AIOT_PENDING);
    if (waiter == NULL) {
        return PYGEN_ERROR;
    }
    Py_XSETREF(run->waiter, waiter);
    *result = aiot_waiter_yield(waiter);
    return PYGEN_NEXT;
}

static PySendResult
Run_start_lock_held(GroupRunObject *run, PyObject **result)
{
    run->loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(run)));
    if (run->loop == NULL
        || (run->host = aiot_loop_current_task(run->loop, "AsyncContextGroup")) == NULL
        || (run->context = PyContext_CopyCurrent()) == NULL)
    {
        return PYGEN_ERROR;
    }
    run_spawn(run);
    return run_wait(run, result);
}

static PySendResult
Run_start(aiot_awaitable *op, PyObject **result)
{
    return Run_start_lock_held(RUN(op), result);
}

static PySendResult
Run_resume(aiot_awaitable *op, PyObject *Py_UNUSED(value), PyObject **result)
{
    GroupRunObject *run = RUN(op);
    if (aiot_waiter_check_resumed(run->waiter) < 0) {
        return PYGEN_ERROR;
    }
    return run_wait(run, result);
}

/* The argument of a CancelledError, to be passed on. New reference or NULL, no exception. */
static PyObject *
cancel_message(PyObject *exc)
{
    PyObject *args = ((PyBaseExceptionObject *)exc)->args;
    return args != NULL && PyTuple_Check(args) && PyTuple_GET_SIZE(args) > 0 ? Py_NewRef(PyTuple_GET_ITEM(args, 0))
                                                                             : NULL;
}

static PySendResult
Run_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    GroupRunObject *run = RUN(op);
    aiot_state *state = run->loop->state;
    if (!PyErr_GivenExceptionMatches(exc, state->CancelledError)) {
        /* GeneratorExit: the host is closed and can wait no more. Anything else comes from someone who plays the
         * task's part. Either way what is under way is told. */
        run->stopped = true;
        run_abort(run, NULL, NULL);
        Py_CLEAR(run->waiter);
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    Py_XSETREF(run->cancelled, Py_NewRef(exc));
    if (!run->shield) {
        if (!run->finish) {
            run->stopped = true;
        }
        PyObject *msg = cancel_message(exc);
        /* Also for those that are about to begin. */
        run->aborted = true;
        Py_XSETREF(run->abort_msg, Py_XNewRef(msg));
        run_abort(run, NULL, msg);
        Py_XDECREF(msg);
    }
    return run_wait(run, result);
}

static const aiot_awaitable_ops run_ops = {
    .name = "AsyncContextGroup",
    .start = Run_start,
    .resume = Run_resume,
    .throw = Run_throw,
};

static int
Run_traverse(PyObject *op, visitproc visit, void *arg)
{
    GroupRunObject *run = RUN(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(run->loop);
    Py_VISIT(run->waiter);
    Py_VISIT(run->host);
    Py_VISIT(run->context);
    Py_VISIT(run->targets);
    Py_VISIT(run->method);
    Py_VISIT(run->args);
    Py_VISIT(run->results);
    Py_VISIT(run->statuses);
    Py_VISIT(run->cancelled);
    Py_VISIT(run->abort_msg);
    Py_VISIT(run->eager_options);
    Py_VISIT(run->error);
    for (Py_ssize_t i = 0; i < run->n_active; i++) {
        Py_VISIT(run->workers[i]);
    }
    return 0;
}

/* Active workers and the run refer to each other; the tasks' loop refers to the workers. When all of that is garbage,
 * it is enough that the workers let go of the run. */
static int
Run_clear(PyObject *op)
{
    GroupRunObject *run = RUN(op);
    Py_CLEAR(run->waiter);
    Py_CLEAR(run->host);
    Py_CLEAR(run->cancelled);
    Py_CLEAR(run->abort_msg);
    Py_CLEAR(run->eager_options);
    Py_CLEAR(run->error);
    return 0;
}

static void
Run_dealloc(PyObject *op)
{
    GroupRunObject *run = RUN(op);
    PyTypeObject *type = Py_TYPE(op);
    if (run->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    Run_clear(op);
    for (Py_ssize_t i = 0; i < run->n_active; i++) {
        Py_DECREF(run->workers[i]);
    }
    PyMem_Free(run->workers);
    Py_CLEAR(run->loop);
    Py_CLEAR(run->context);
    Py_CLEAR(run->targets);
    Py_CLEAR(run->method);
    Py_CLEAR(run->args);
    Py_CLEAR(run->results);
    Py_CLEAR(run->statuses);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Run_slots[] = {
    {Py_tp_doc, "What _run_each() returns: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Run_traverse},
    {Py_tp_clear, Run_clear},
    {Py_tp_dealloc, Run_dealloc},
    {0, NULL},
};

static PyType_Spec Run_spec = {
    .name = "aiotools._aiotools.GroupRun",
    .basicsize = sizeof(GroupRunObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Run_slots,
};

PyDoc_STRVAR(run_each_doc,
"_run_each($module, targets, method, args, results, statuses, limit, finish, shield, fail_fast, /)\n--\n\n"
"Await target.method(*args) for all targets at once, each in a copy of the context.\n\n"
"Await it; it returns None. Values and exceptions are put into the list results,\n"
"and into the bytearray statuses: 0 not run, 1 returned, 2 raised. At most limit\n"
"of them are under way at a time. Cancelling the caller cancels those that have\n"
"begun, and the others are not begun, or, with finish, are begun nevertheless and\n"
"cancelled where they first suspend; the caller is cancelled when all have ended.\n"
"With shield they are not cancelled.\n"
"With fail_fast the first that fails has the same effect as cancelling the caller.\n"
"Raises CancelledError, a SystemExit or KeyboardInterrupt of a target, or why a\n"
"task could not be created.");

static PyObject *
ctxgroup_run_each(PyObject *module, PyObject *args)
{
    aiot_state *state = aiot_state_of_module(module);
    PyObject *targets, *method, *call_args, *results, *statuses;
    Py_ssize_t limit;
    int finish, shield, fail_fast;
    if (!PyArg_ParseTuple(args, "O!UO!O!O!nppp:_run_each", &PyList_Type, &targets, &method, &PyTuple_Type, &call_args,
                          &PyList_Type, &results, &PyByteArray_Type, &statuses, &limit, &finish, &shield, &fail_fast))
    {
        return NULL;
    }
    Py_ssize_t n = PyList_GET_SIZE(targets);
    if (PyList_GET_SIZE(results) != n || PyByteArray_GET_SIZE(statuses) != n || PyTuple_GET_SIZE(call_args) > 3
        || limit < 1)
    {
        PyErr_SetString(PyExc_ValueError, "_run_each() arguments do not fit together");
        return NULL;
    }
    GroupRunObject *run = (GroupRunObject *)state->GroupRunType->tp_alloc(state->GroupRunType, 0);
    if (run == NULL) {
        return NULL;
    }
    aiot_awaitable_init(run, &run_ops);
    run->targets = Py_NewRef(targets);
    run->method = Py_NewRef(method);
    run->args = Py_NewRef(call_args);
    run->results = Py_NewRef(results);
    run->statuses = Py_NewRef(statuses);
    run->n = n;
    run->limit = limit;
    run->finish = finish;
    run->shield = shield;
    run->fail_fast = fail_fast;
    return (PyObject *)run;
}

PyDoc_STRVAR(abort_run_doc,
"_abort_run($module, run, /)\n--\n\n"
"Cancel what is under way of a _run_each(), and what it begins later where that\n"
"first suspends.");

static PyObject *
ctxgroup_abort_run(PyObject *module, PyObject *run)
{
    if (!Py_IS_TYPE(run, aiot_state_of_module(module)->GroupRunType)) {
        PyErr_SetString(PyExc_TypeError, "_abort_run() needs what _run_each() returned");
        return NULL;
    }
    Py_BEGIN_CRITICAL_SECTION(run);
    RUN(run)->aborted = true;
    if (RUN(run)->loop != NULL) {
        run_abort(RUN(run), NULL, NULL);
    }
    Py_END_CRITICAL_SECTION();
    Py_RETURN_NONE;
}

static PyMethodDef ctxgroup_functions[] = {
    {"_run_each", ctxgroup_run_each, METH_VARARGS, run_each_doc},
    {"_abort_run", ctxgroup_abort_run, METH_O, abort_run_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_ctxgroup_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->GroupRunType, &Run_spec, NULL, false) < 0
        || aiot_add_type(module, &state->GroupWorkerType, &Worker_spec, NULL, false) < 0)
    {
        return -1;
    }
    return PyModule_AddFunctions(module, ctxgroup_functions);
}
