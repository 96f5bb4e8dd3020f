/* barrier.c: Barrier. N tasks meet in wait(), then all go on together.
 *
 * States:     FILLING -> DRAINING -> FILLING, as asyncio.Barrier has them; with an action FILLING -> ACTING -> DRAINING.
 *             abort(), a timeout and a failed action lead to BROKEN; reset() to FILLING, by way of RESETTING while
 *             anybody is inside. Who comes while it is ACTING, DRAINING or RESETTING waits in `blocked` and arrives later.
 * Invariants: count is the number of waits inside: linked in `waiting`, running the action, or woken and not
 *             yet resumed. `waiting` is empty unless FILLING or ACTING. loop and thread are those of who is inside.
 * Ownership:  the lists own references to the waits in them, as asyncio's barrier refers to its futures: a barrier that
 *             somebody holds keeps the tasks that wait in it. A wait owns the loop that its alarm is set in.
 * Locking:    all fields, and those of its waits, belong to the barrier's critical section.
 * Re-entry:   waking may call the loop, and the action runs anything: the state is changed before, lists are
 *             emptied one by one, and the state is read again after.
 * Cancelled:  who is cancelled leaves; the others go on waiting. Who is cancelled when all have arrived leaves as well, the
 *             generation is complete without it; but who runs the action breaks the barrier.
 */

#include "barrier.h"

#include "args.h"
#include "awaitable.h"
#include "drive.h"
#include "freelist.h"
#include "waiter.h"

#include <math.h>

typedef enum {
    FILLING,
    ACTING,             /* all have arrived; the action is being run */
    DRAINING,
    RESETTING,
    BROKEN,
} barrier_state;

typedef struct {
    PyObject_HEAD
    PyObject *dict;
    PyObject *weakrefs;
    PyObject *action;           /* or NULL */
    PyObject *cause;            /* of BROKEN, or NULL */
    AiotLoop *loop;             /* of who came last */
    unsigned long thread;
    double timeout;             /* infinity: none */
    Py_ssize_t parties;
    Py_ssize_t count;
    Py_ssize_t n_blocked;
    uint64_t generation;
    aiot_link waiting;
    aiot_link blocked;
    uint8_t state;
    bool initialized;
} BarrierObject;

typedef enum {
    OUTSIDE,
    IN_BLOCKED,         /* linked, or woken to try again */
    IN_WAITING,         /* linked, or woken to leave */
    IN_ACTION,          /* runs it */
    TO_ACT,             /* woken to run it: the last to arrive, when leave() made it so */
} wait_place;

typedef struct {
    AIOT_AWAITABLE_HEAD
    uint8_t place;
    bool timed_out;             /* while blocked */
    BarrierObject *barrier;
    AiotLoop *loop;             /* once it was suspended */
    AiotWaiter *waiter;
    PyObject *inner;            /* of an action that is awaited */
    aiot_link link;
    aiot_alarm alarm;
    double timeout;
    Py_ssize_t index;
} WaitObject;

static WaitObject *
wait_of(aiot_link *link)
{
    return AIOT_CONTAINER_OF(link, WaitObject, link);
}

/* ---- lists --------------------------------------------------------------------------------------------------- */

static void
wait_append_lock_held(aiot_link *list, WaitObject *wait)
{
    aiot_link_append(list, &wait->link);
    Py_INCREF(wait);
}

/* Drops the list's reference: the caller has one. */
static void
wait_unlink_lock_held(WaitObject *wait)
{
    if (!aiot_link_is_out(&wait->link)) {
        aiot_link_remove(&wait->link);
        Py_DECREF(wait);
    }
}

static void
wait_stop_alarm(WaitObject *wait)
{
    if (aiot_alarm_is_set(&wait->alarm)) {
        aiot_alarm_cancel(wait->loop, &wait->alarm);
    }
}

/* Takes the first out and wakes it. The alarm stays set in `blocked`: the time counts on. */
static void
wake_first_lock_held(aiot_link *list)
{
    WaitObject *wait = wait_of(aiot_link_first(list));
    aiot_link_remove(&wait->link);
    if (wait->place != IN_BLOCKED) {
        wait_stop_alarm(wait);
    }
    if (wait->waiter != NULL) {
        aiot_waiter_wake_quietly(wait->waiter);
    }
    Py_DECREF(wait);
}

static void
wake_all_lock_held(aiot_link *list)
{
    while (!aiot_link_is_empty(list)) {
        wake_first_lock_held(list);
    }
}

/* The first wake-up of a batch is the one that can fail (the loop is closed, no memory). 0 or -1, nothing changed. */
static int
try_to_wake_lock_held(BarrierObject *self)
{
    aiot_link *first = aiot_link_first(&self->waiting);
    return first == NULL ? 0 : aiot_waiter_wake(wait_of(first)->waiter);
}

/* ---- states -------------------------------------------------------------------------------------------------- */

#ifdef AIOT_DEBUG
static bool
barrier_is_right(BarrierObject *self)
{
    return self->count >= 0 && self->parties >= 0 && self->n_blocked >= 0
           && (self->state == FILLING || self->state == ACTING || aiot_link_is_empty(&self->waiting))
           && (self->state != FILLING || self->count == 0 || self->count < self->parties);
}
#endif

/* One that was inside is out. */
static void
barrier_exit_lock_held(BarrierObject *self)
{
    if (--self->count > 0) {
        return;
    }
    if (self->state == DRAINING || self->state == RESETTING) {
        self->state = FILLING;
    }
    wake_all_lock_held(&self->blocked);
    AIOT_CHECK(barrier_is_right(self));
}

/* For all who are inside or come. cause may be NULL. */
static void
barrier_break_lock_held(BarrierObject *self, PyObject *cause)
{
    self->state = BROKEN;
    PyObject *old = self->cause;
    self->cause = Py_XNewRef(cause);
    wake_all_lock_held(&self->waiting);
    wake_all_lock_held(&self->blocked);
    AIOT_CHECK(barrier_is_right(self));
    Py_XDECREF(old);
}

/* Everybody is there: who gets which index. */
static void
barrier_count_off_lock_held(BarrierObject *self)
{
    Py_ssize_t index = 0;
    for (aiot_link *link = self->waiting.next; link != &self->waiting; link = link->next) {
        wait_of(link)->index = index++;
    }
}

static void
barrier_release_lock_held(BarrierObject *self)
{
    self->state = DRAINING;
    self->generation++;
    wake_all_lock_held(&self->waiting);
    AIOT_CHECK(barrier_is_right(self));
}

/* BrokenBarrierError(message), from cause if there is one. Returns PYGEN_ERROR. */
static PySendResult
raise_broken(aiot_state *state, const char *message, PyObject *cause)
{
    /* The barrier may let go of it meanwhile. */
    Py_XINCREF(cause);
    PyObject *exc = PyObject_CallFunction(state->BrokenBarrierError, "s", message);
    if (exc != NULL) {
        if (cause != NULL) {
            PyException_SetCause(exc, Py_NewRef(cause));
        }
        PyErr_SetObject(state->BrokenBarrierError, exc);
        Py_DECREF(exc);
    }
    Py_XDECREF(cause);
    return PYGEN_ERROR;
}

/* ---- the action ---------------------------------------------------------------------------------------------- */

static PySendResult
return_index(WaitObject *self, PyObject **result)
{
    *result = PyLong_FromSsize_t(self->index);
    return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
}

/* The end of a wait that was inside. */
static PySendResult
wait_leave_lock_held(WaitObject *self, PyObject **result)
{
    BarrierObject *barrier = self->barrier;
    bool broken = barrier->state == BROKEN || barrier->state == RESETTING;
    PyObject *cause = barrier->state == BROKEN ? Py_XNewRef(barrier->cause) : NULL;
    self->place = OUTSIDE;
    wait_stop_alarm(self);
    barrier_exit_lock_held(barrier);
    if (broken) {
        raise_broken(aiot_state_of_exact_type(Py_TYPE(self)), "Abort or reset of barrier", cause);
        Py_XDECREF(cause);
        return PYGEN_ERROR;
    }
    return return_index(self, result);
}

/* With the exception of the action set. */
static PySendResult
action_failed_lock_held(WaitObject *self)
{
    BarrierObject *barrier = self->barrier;
    PyObject *exc = PyErr_GetRaisedException();
    Py_CLEAR(self->inner);
    if (barrier->state == ACTING) {
        barrier_break_lock_held(barrier, exc);
    }
    self->place = OUTSIDE;
    wait_stop_alarm(self);
    barrier_exit_lock_held(barrier);
    if (PyObject_TypeCheck(exc, (PyTypeObject *)PyExc_Exception)) {
        raise_broken(aiot_state_of_exact_type(Py_TYPE(self)), "the action of the barrier failed", exc);
        Py_DECREF(exc);
    }
    else {
        /* A cancellation, or what ends the program, is nobody's to change. */
        PyErr_SetRaisedException(exc);
    }
    return PYGEN_ERROR;
}

static PySendResult
action_done_lock_held(WaitObject *self, PyObject **result)
{
    BarrierObject *barrier = self->barrier;
    Py_CLEAR(self->inner);
    if (barrier->state == ACTING) {
        if (try_to_wake_lock_held(barrier) < 0) {
            return action_failed_lock_held(self);
        }
        if (barrier->state == ACTING) {
            barrier_release_lock_held(barrier);
        }
    }
    return wait_leave_lock_held(self, result);
}

static PySendResult
action_step_lock_held(WaitObject *self, PySendResult answer, PyObject **result)
{
    if (answer == PYGEN_NEXT) {
        return answer;
    }
    if (answer == PYGEN_ERROR) {
        return action_failed_lock_held(self);
    }
    Py_CLEAR(*result);
    return action_done_lock_held(self, result);
}

/* All have arrived, this one last. */
static PySendResult
action_run_lock_held(WaitObject *self, PyObject **result)
{
    self->place = IN_ACTION;
    self->barrier->state = ACTING;
    PyObject *action = Py_NewRef(self->barrier->action);
    PyObject *answer = PyObject_CallNoArgs(action);
    Py_DECREF(action);
    if (answer == NULL) {
        return action_failed_lock_held(self);
    }
    PyAsyncMethods *async = Py_TYPE(answer)->tp_as_async;
    if (async == NULL || async->am_await == NULL) {
        Py_DECREF(answer);
        return action_done_lock_held(self, result);
    }
    self->inner = aiot_await_iter(aiot_state_of_exact_type(Py_TYPE(self)), answer);
    Py_DECREF(answer);
    if (self->inner == NULL) {
        return action_failed_lock_held(self);
    }
    return action_step_lock_held(self, PyIter_Send(self->inner, Py_None, result), result);
}

/* All have arrived without anybody being there to run the action: the last one who came is woken to do so. */
static void
appoint_actor_lock_held(BarrierObject *self)
{
    if (aiot_link_is_empty(&self->waiting)) {
        /* It was the only one, and left; its exit opens the barrier. */
        self->state = DRAINING;
        return;
    }
    WaitObject *last = wait_of(self->waiting.prev);
    aiot_link_remove(&last->link);
    self->state = ACTING;
    last->place = TO_ACT;
    aiot_waiter_wake_quietly(last->waiter);
    Py_DECREF(last);
}

/* ---- wait() -------------------------------------------------------------------------------------------------- */

static int
Wait_fire(AiotLoop *Py_UNUSED(loop), PyObject *owner)
{
    WaitObject *self = (WaitObject *)owner;
    BarrierObject *barrier = self->barrier;
    int failed = 0;
    Py_BEGIN_CRITICAL_SECTION(barrier);
    if (self->place == OUTSIDE) {
        ;
    }
    else if (barrier->state == FILLING || barrier->state == ACTING) {
        PyObject *cause = PyObject_CallFunction(PyExc_TimeoutError, "s", "the barrier's timeout is over");
        /* Without memory it breaks all the same, and that is reported. */
        PyObject *exc = cause == NULL ? PyErr_GetRaisedException() : NULL;
        barrier_break_lock_held(barrier, cause);
        Py_XDECREF(cause);
        if (exc != NULL) {
            PyErr_SetRaisedException(exc);
            failed = -1;
        }
    }
    else {
        /* Those who are on their way out do not deserve it. It breaks on arrival. */
        self->timed_out = true;
    }
    Py_END_CRITICAL_SECTION();
    return failed;
}

static void wait_abandon_lock_held(WaitObject *self);

/* Suspends in one of the lists. It is inside before the alarm is set, which calls the loop: whatever happens to the barrier
 * there happens to this wait as well. */
static PySendResult
wait_suspend_lock_held(WaitObject *self, aiot_link *list, uint8_t place, PyObject **result)
{
    BarrierObject *barrier = self->barrier;
    if (self->loop == NULL) {
        self->loop = (AiotLoop *)Py_NewRef((PyObject *)barrier->loop);
    }
    self->waiter = aiot_waiter_new(self->loop, AIOT_PENDING);
    if (self->waiter == NULL) {
        return PYGEN_ERROR;
    }
    wait_append_lock_held(list, self);
    self->place = place;
    *(place == IN_BLOCKED ? &barrier->n_blocked : &barrier->count) += 1;
    AIOT_CHECK(barrier_is_right(barrier));
    if (!isinf(self->timeout) && !aiot_alarm_is_set(&self->alarm) && !self->timed_out) {
        double when;
        if (aiot_loop_deadline(self->loop, self->timeout, &when) < 0
            || aiot_alarm_set(self->loop, &self->alarm, when) < 0)
        {
            PyObject *exc = PyErr_GetRaisedException();
            wait_abandon_lock_held(self);
            PyErr_SetRaisedException(exc);
            return PYGEN_ERROR;
        }
    }
    *result = aiot_waiter_yield(self->waiter);
    return PYGEN_NEXT;
}

static PySendResult wait_arrive_lock_held(WaitObject *self, PyObject **result);

static PySendResult
wait_last_lock_held(WaitObject *self, PyObject **result)
{
    BarrierObject *barrier = self->barrier;
    if (barrier->action == NULL && try_to_wake_lock_held(barrier) < 0) {
        return PYGEN_ERROR;
    }
    if (barrier->state != FILLING) {
        /* The loop's call_soon is somebody's who used the barrier. */
        return wait_arrive_lock_held(self, result);
    }
    barrier_count_off_lock_held(barrier);
    self->index = barrier->count++;
    self->place = IN_WAITING;
    if (barrier->action != NULL) {
        return action_run_lock_held(self, result);
    }
    barrier_release_lock_held(barrier);
    return wait_leave_lock_held(self, result);
}

static PySendResult
wait_arrive_lock_held(WaitObject *self, PyObject **result)
{
    BarrierObject *barrier = self->barrier;
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    switch ((barrier_state)barrier->state) {
    case ACTING:
    case DRAINING:
    case RESETTING:
        return wait_suspend_lock_held(self, &barrier->blocked, IN_BLOCKED, result);
    case BROKEN:
        return raise_broken(state, "Barrier aborted", barrier->cause);
    case FILLING:
    default:
        break;
    }
    if (barrier->parties == 0) {
        PyErr_SetString(PyExc_RuntimeError, barrier->initialized
                                                ? "all parties have left the barrier; add_party() comes first"
                                                : "Barrier.__init__() was not called");
        return PYGEN_ERROR;
    }
    if (self->timed_out) {
        PyObject *cause = PyObject_CallFunction(PyExc_TimeoutError, "s", "the barrier's timeout is over");
        if (cause != NULL) {
            barrier_break_lock_held(barrier, cause);
            raise_broken(state, "Abort or reset of barrier", cause);
            Py_DECREF(cause);
        }
        return PYGEN_ERROR;
    }
    if (barrier->count + 1 >= barrier->parties) {
        return wait_last_lock_held(self, result);
    }
    return wait_suspend_lock_held(self, &barrier->waiting, IN_WAITING, result);
}

/* The loop of who is inside; of the first to come when there is nobody. 0, or -1 with RuntimeError. */
static int
barrier_bind_lock_held(BarrierObject *self, AiotLoop *loop)
{
    if (self->loop == loop) {
        return 0;
    }
    if (self->count > 0 || self->n_blocked > 0) {
        PyErr_Format(PyExc_RuntimeError, "%R is bound to a different event loop", self);
        return -1;
    }
    Py_XSETREF(self->loop, (AiotLoop *)Py_NewRef((PyObject *)loop));
    self->thread = PyThread_get_thread_ident();
    return 0;
}

static PySendResult
Wait_start(aiot_awaitable *op, PyObject **result)
{
    WaitObject *self = (WaitObject *)op;
    AiotLoop *loop = aiot_loop_get_running(aiot_state_of_exact_type(Py_TYPE(op)));
    if (loop == NULL) {
        return PYGEN_ERROR;
    }
    PySendResult answer = PYGEN_ERROR;
    Py_BEGIN_CRITICAL_SECTION(self->barrier);
    if (barrier_bind_lock_held(self->barrier, loop) == 0) {
        answer = wait_arrive_lock_held(self, result);
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(loop);
    return answer;
}

static void
wait_abandon_lock_held(WaitObject *self)
{
    BarrierObject *barrier = self->barrier;
    uint8_t place = self->place;
    self->place = OUTSIDE;
    wait_stop_alarm(self);
    wait_unlink_lock_held(self);
    Py_CLEAR(self->waiter);
    switch ((wait_place)place) {
    case IN_BLOCKED:
        barrier->n_blocked--;
        break;
    case TO_ACT:
        if (barrier->state == ACTING) {
            appoint_actor_lock_held(barrier);
        }
        barrier_exit_lock_held(barrier);
        break;
    case IN_WAITING:
    case IN_ACTION:
        barrier_exit_lock_held(barrier);
        break;
    case OUTSIDE:
    default:
        break;
    }
}

static PySendResult
wait_resume_lock_held(WaitObject *self, PyObject *value, PyObject **result)
{
    if (self->place == IN_ACTION) {
        return action_step_lock_held(self, PyIter_Send(self->inner, value, result), result);
    }
    if (aiot_waiter_check_resumed(self->waiter) < 0) {
        PyObject *exc = PyErr_GetRaisedException();
        wait_abandon_lock_held(self);
        PyErr_SetRaisedException(exc);
        return PYGEN_ERROR;
    }
    Py_CLEAR(self->waiter);
    if (self->place == IN_BLOCKED) {
        self->place = OUTSIDE;
        self->barrier->n_blocked--;
        PySendResult answer = wait_arrive_lock_held(self, result);
        if (answer == PYGEN_ERROR && self->place == OUTSIDE && aiot_alarm_is_set(&self->alarm)) {
            PyObject *exc = PyErr_GetRaisedException();
            wait_stop_alarm(self);
            PyErr_SetRaisedException(exc);
        }
        return answer;
    }
    if (self->place == TO_ACT && self->barrier->state == ACTING) {
        return action_run_lock_held(self, result);
    }
    return wait_leave_lock_held(self, result);
}

static PySendResult
Wait_resume(aiot_awaitable *op, PyObject *value, PyObject **result)
{
    WaitObject *self = (WaitObject *)op;
    PySendResult answer;
    Py_BEGIN_CRITICAL_SECTION(self->barrier);
    answer = wait_resume_lock_held(self, value, result);
    Py_END_CRITICAL_SECTION();
    return answer;
}

static PySendResult
Wait_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    WaitObject *self = (WaitObject *)op;
    PySendResult answer;
    Py_BEGIN_CRITICAL_SECTION(self->barrier);
    if (self->place == IN_ACTION) {
        answer = aiot_iter_throw(aiot_state_of_exact_type(Py_TYPE(op)), self->inner, exc, result);
        answer = action_step_lock_held(self, answer, result);
    }
    else {
        wait_abandon_lock_held(self);
        PyErr_SetRaisedException(Py_NewRef(exc));
        answer = PYGEN_ERROR;
    }
    Py_END_CRITICAL_SECTION();
    return answer;
}

static void
Wait_abandon(aiot_awaitable *op)
{
    WaitObject *self = (WaitObject *)op;
    Py_BEGIN_CRITICAL_SECTION(self->barrier);
    wait_abandon_lock_held(self);
    Py_END_CRITICAL_SECTION();
}

static const aiot_awaitable_ops wait_ops = {
    .name = "Barrier.wait",
    .start = Wait_start,
    .resume = Wait_resume,
    .throw = Wait_throw,
    .abandon = Wait_abandon,
};

static PyObject *
wait_new(BarrierObject *barrier, double timeout)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(barrier));
    if (state == NULL) {
        return NULL;
    }
    WaitObject *self = (WaitObject *)aiot_free_list_alloc(&state->free_barrier_waits, state->BarrierWaitType);
    if (self == NULL) {
        return NULL;
    }
    aiot_awaitable_init(self, &wait_ops);
    aiot_alarm_init(&self->alarm, (PyObject *)self, Wait_fire);
    aiot_link_init(&self->link);
    self->barrier = (BarrierObject *)Py_NewRef((PyObject *)barrier);
    self->timeout = timeout;
    return (PyObject *)self;
}

static int
Wait_traverse(PyObject *op, visitproc visit, void *arg)
{
    WaitObject *self = (WaitObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->barrier);
    Py_VISIT(self->loop);
    Py_VISIT(self->waiter);
    Py_VISIT(self->inner);
    return 0;
}

/* Not the barrier and the loop, which the lists and the alarm need: they let go of us. */
static int
Wait_clear(PyObject *op)
{
    WaitObject *self = (WaitObject *)op;
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->inner);
    return 0;
}

static void
Wait_dealloc(PyObject *op)
{
    WaitObject *self = (WaitObject *)op;
    if (self->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    assert(aiot_link_is_out(&self->link) && !aiot_alarm_is_set(&self->alarm));
    Wait_clear(op);
    Py_CLEAR(self->loop);
    Py_CLEAR(self->barrier);
    aiot_state *state = aiot_state_for_dealloc(Py_TYPE(op));
    aiot_free_list_free(state, state == NULL ? NULL : &state->free_barrier_waits, op);
}

static PyType_Slot Wait_slots[] = {
    {Py_tp_doc, "What Barrier.wait() returns: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, Wait_traverse},
    {Py_tp_clear, Wait_clear},
    {Py_tp_dealloc, Wait_dealloc},
    {0, NULL},
};

static PyType_Spec Wait_spec = {
    .name = "aiotools._aiotools.BarrierWait",
    .basicsize = sizeof(WaitObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Wait_slots,
};

/* ---- methods ------------------------------------------------------------------------------------------------- */

/* What changes others from a foreign thread: an error in debug mode. 0 or -1. */
static int
check_thread_lock_held(BarrierObject *self)
{
    if (self->loop == NULL || self->loop->loop == NULL || (self->count == 0 && self->n_blocked == 0)
        || self->thread == PyThread_get_thread_ident())
    {
        return 0;
    }
    int debug = aiot_loop_is_debug(self->loop);
    if (debug > 0) {
        PyErr_Format(PyExc_RuntimeError, "%R was used in a thread other than that of its event loop", self);
    }
    return debug == 0 ? 0 : -1;
}

/* None: the default of the barrier. */
static int
as_timeout(PyObject *obj, double otherwise, double *timeout)
{
    if (obj == NULL || obj == Py_None) {
        *timeout = otherwise;
        return 0;
    }
    if (aiot_as_seconds(obj, "timeout", timeout) < 0) {
        return -1;
    }
    if (*timeout < 0) {
        *timeout = 0;       /* infinity stands for none, also a negative one */
    }
    return 0;
}

PyDoc_STRVAR(wait_doc,
"wait($self, /, timeout=None)\n--\n\n"
"Wait until all parties have arrived; await it.\n\n"
"Returns an index from 0 to parties - 1, another one for each party of this\n"
"generation; the last to arrive, which has the highest, does not wait but for\n"
"the action. timeout is in seconds, None for the default of the barrier; zero\n"
"or less is over as soon as the loop has turned.\n\n"
"Raises asyncio.BrokenBarrierError when the barrier is broken, or becomes so\n"
"meanwhile: by abort(), by reset(), by a timeout (of anybody; the cause is a\n"
"TimeoutError), or because the action failed (its exception is the cause).\n"
"TypeError and ValueError (NaN) for a wrong timeout come at the call. Cancelled,\n"
"it leaves, and the others go on waiting; an asyncio.timeout() around it leaves\n"
"likewise. RuntimeError when others wait in another event loop.\n\n"
"As threading.Barrier.wait() and asyncio.Barrier.wait() do.");

static PyObject *
Barrier_wait(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"wait", 1, 0, 1, {AIOT_NAME(timeout)}};
    BarrierObject *self = (BarrierObject *)op;
    double timeout = self->timeout;
    if (nargs != 0 || kwnames != NULL) {
        aiot_state *state = aiot_state_of_type(Py_TYPE(op));
        PyObject *given[1];
        if (state == NULL || aiot_bind(state, &params, args, nargs, kwnames, given) < 0
            || as_timeout(given[0], self->timeout, &timeout) < 0)
        {
            return NULL;
        }
    }
    return wait_new(self, timeout);
}

static PyObject *
Barrier_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return wait_new((BarrierObject *)op, ((BarrierObject *)op)->timeout);
}

static PyObject *
done_none_of(PyObject *op)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    return state == NULL ? NULL : aiot_done_none(state);
}

static PyObject *
Barrier_aexit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return done_none_of(op);
}

PyDoc_STRVAR(abort_doc,
"abort($self, /)\n--\n\n"
"Break the barrier: who waits, and who comes, gets asyncio.BrokenBarrierError.\n\n"
"Until reset(). It acts at the call; the result may be awaited, as that of\n"
"asyncio.Barrier.abort() must be.");

static PyObject *
Barrier_abort(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    BarrierObject *self = (BarrierObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(op);
    failed = check_thread_lock_held(self);
    if (!failed) {
        barrier_break_lock_held(self, NULL);
    }
    Py_END_CRITICAL_SECTION();
    return failed ? NULL : done_none_of(op);
}

PyDoc_STRVAR(reset_doc,
"reset($self, /)\n--\n\n"
"Bring the barrier back to its first state, empty and not broken.\n\n"
"Who waits gets asyncio.BrokenBarrierError. It acts at the call; the result may\n"
"be awaited, as that of asyncio.Barrier.reset() must be.");

static PyObject *
Barrier_reset(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    BarrierObject *self = (BarrierObject *)op;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(op);
    failed = check_thread_lock_held(self);
    if (!failed) {
        PyObject *cause = self->cause;
        self->cause = NULL;
        if (self->count > 0) {
            self->state = RESETTING;
            wake_all_lock_held(&self->waiting);
        }
        else {
            self->state = FILLING;
            wake_all_lock_held(&self->blocked);
        }
        AIOT_CHECK(barrier_is_right(self));
        Py_XDECREF(cause);
    }
    Py_END_CRITICAL_SECTION();
    return failed ? NULL : done_none_of(op);
}

PyDoc_STRVAR(add_party_doc,
"add_party($self, /)\n--\n\n"
"From now on one party more is waited for; returns how many they are.\n\n"
"The generation that is waiting already is meant as well. As register() of a\n"
"Phaser in Java.");

static PyObject *
Barrier_add_party(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    BarrierObject *self = (BarrierObject *)op;
    Py_ssize_t parties = -1;
    Py_BEGIN_CRITICAL_SECTION(op);
    if (check_thread_lock_held(self) == 0) {
        if (self->parties == PY_SSIZE_T_MAX) {
            PyErr_SetString(PyExc_OverflowError, "too many parties");
        }
        else {
            parties = ++self->parties;
        }
    }
    Py_END_CRITICAL_SECTION();
    return parties < 0 ? NULL : PyLong_FromSsize_t(parties);
}

static Py_ssize_t
barrier_leave_lock_held(BarrierObject *self)
{
    if (check_thread_lock_held(self) < 0) {
        return -1;
    }
    if (self->parties == 0) {
        PyErr_SetString(PyExc_RuntimeError, "all parties have left the barrier already");
        return -1;
    }
    if (self->state != FILLING || self->count == 0 || self->count < self->parties - 1) {
        return --self->parties;
    }
    if (self->action == NULL && try_to_wake_lock_held(self) < 0) {
        return -1;
    }
    Py_ssize_t parties = --self->parties;
    barrier_count_off_lock_held(self);
    if (self->action == NULL) {
        barrier_release_lock_held(self);
    }
    else {
        appoint_actor_lock_held(self);
    }
    return parties;
}

PyDoc_STRVAR(leave_doc,
"leave($self, /)\n--\n\n"
"From now on one party less is waited for; returns how many they are.\n\n"
"If the others are all there already, they go on; the action is then run by who\n"
"arrived last. When all have left, wait() raises RuntimeError until add_party(),\n"
"and so does leave(). As arriveAndDeregister() of a Phaser in Java.");

static PyObject *
Barrier_leave(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Py_ssize_t parties;
    Py_BEGIN_CRITICAL_SECTION(op);
    parties = barrier_leave_lock_held((BarrierObject *)op);
    Py_END_CRITICAL_SECTION();
    return parties < 0 ? NULL : PyLong_FromSsize_t(parties);
}

static PyMethodDef Barrier_methods[] = {
    {"wait", (PyCFunction)(void (*)(void))Barrier_wait, METH_FASTCALL | METH_KEYWORDS, wait_doc},
    {"abort", Barrier_abort, METH_NOARGS, abort_doc},
    {"reset", Barrier_reset, METH_NOARGS, reset_doc},
    {"add_party", Barrier_add_party, METH_NOARGS, add_party_doc},
    {"leave", Barrier_leave, METH_NOARGS, leave_doc},
    {"__aenter__", Barrier_aenter, METH_NOARGS, "__aenter__($self, /)\n--\n\nwait()."},
    {"__aexit__", (PyCFunction)(void (*)(void))Barrier_aexit, METH_FASTCALL,
     "__aexit__($self, /, *args)\n--\n\nDoes nothing."},
    {NULL, NULL, 0, NULL},
};

static PyObject *
Barrier_get_n_waiting(PyObject *op, void *Py_UNUSED(closure))
{
    BarrierObject *self = (BarrierObject *)op;
    return PyLong_FromSsize_t(self->state == FILLING ? self->count : 0);
}

static PyObject *
Barrier_get_broken(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((BarrierObject *)op)->state == BROKEN);
}

static PyObject *
Barrier_get_generation(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((BarrierObject *)op)->generation);
}

static PyObject *
Barrier_get_parties(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(((BarrierObject *)op)->parties);
}

static PyGetSetDef Barrier_getset[] = {
    {"parties", Barrier_get_parties, NULL, "How many are waited for.", NULL},
    {"n_waiting", Barrier_get_n_waiting, NULL, "How many are waiting now.", NULL},
    {"broken", Barrier_get_broken, NULL, "Whether the barrier is broken.", NULL},
    {"generation", Barrier_get_generation, NULL, "How many times all parties have met.", NULL},
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- the type ------------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(Barrier_doc,
"Barrier(parties, *, action=None, timeout=None)\n--\n\n"
"A point where so many tasks wait for each other, again and again.\n\n"
"parties is their number, at least 1. action is called without arguments, once\n"
"per generation, by the last to arrive, before the others go on; what it returns\n"
"is awaited if that can be. If it raises, or is cancelled, the barrier is broken\n"
"for all, with its exception as the cause. timeout is how many seconds wait()\n"
"waits at most, None for ever; then the barrier is broken for all.\n\n"
"`async with barrier:` waits at the beginning of the block. A barrier belongs to\n"
"the event loop of those who wait in it, and to its thread.\n\n"
"Raises TypeError for a wrong type, ValueError for parties < 1 and for NaN.\n\n"
"A superset of asyncio.Barrier; action and timeout are those of\n"
"threading.Barrier.");

/* Everything else is up to __init__(), as in asyncio.Barrier: subclasses have arguments of their own. */
static PyObject *
Barrier_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    BarrierObject *self = (BarrierObject *)type->tp_alloc(type, 0);
    if (self != NULL) {
        aiot_link_init(&self->waiting);
        aiot_link_init(&self->blocked);
        self->timeout = INFINITY;
    }
    return (PyObject *)self;
}

static int
Barrier_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {
        "Barrier", 1, 1, 3, {AIOT_NAME(parties), AIOT_NAME(action), AIOT_NAME(timeout)}};
    BarrierObject *self = (BarrierObject *)op;
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    PyObject *given[3];
    double timeout;
    if (state == NULL || aiot_bind_tuple(state, &params, args, kwargs, given) < 0
        || as_timeout(given[2], INFINITY, &timeout) < 0)
    {
        return -1;
    }
    Py_ssize_t parties = PyNumber_AsSsize_t(given[0], PyExc_OverflowError);
    if (parties == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "parties must be an integer, not '%.200s'", Py_TYPE(given[0])->tp_name);
        }
        return -1;
    }
    if (parties < 1) {
        PyErr_Format(PyExc_ValueError, "parties must be > 0, not %zd", parties);
        return -1;
    }
    PyObject *action = given[1] == Py_None ? NULL : given[1];
    if (action != NULL && !PyCallable_Check(action)) {
        PyErr_Format(PyExc_TypeError, "action must be callable, not '%.200s'", Py_TYPE(action)->tp_name);
        return -1;
    }
    bool first;
    Py_BEGIN_CRITICAL_SECTION(op);
    first = !self->initialized;
    if (first) {
        self->initialized = true;
        self->parties = parties;
        self->action = Py_XNewRef(action);
        self->timeout = timeout;
    }
    Py_END_CRITICAL_SECTION();
    if (!first) {
        PyErr_SetString(PyExc_RuntimeError, "a barrier can be initialized only once");
        return -1;
    }
    return 0;
}

static PyObject *
Barrier_repr(PyObject *op)
{
    static const char *const names[] = {"filling", "acting", "draining", "resetting", "broken"};
    BarrierObject *self = (BarrierObject *)op;
    if (self->state == BROKEN) {
        return PyUnicode_FromFormat("<%s object at %p [broken]>", Py_TYPE(op)->tp_name, op);
    }
    return PyUnicode_FromFormat("<%s object at %p [%s, waiters:%zd/%zd]>", Py_TYPE(op)->tp_name, op,
                                names[self->state], self->state == FILLING ? self->count : 0, self->parties);
}

static int
visit_list(aiot_link *list, visitproc visit, void *arg)
{
    for (aiot_link *link = list->next; link != NULL && link != list; link = link->next) {
        Py_VISIT(wait_of(link));
    }
    return 0;
}

static int
Barrier_traverse(PyObject *op, visitproc visit, void *arg)
{
    BarrierObject *self = (BarrierObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->dict);
    Py_VISIT(self->action);
    Py_VISIT(self->cause);
    Py_VISIT(self->loop);
    int answer = visit_list(&self->waiting, visit, arg);
    return answer != 0 ? answer : visit_list(&self->blocked, visit, arg);
}

static void
drop_list(aiot_link *list)
{
    aiot_link *first;
    while (list->next != NULL && (first = aiot_link_first(list)) != NULL) {
        aiot_link_remove(first);
        Py_DECREF(wait_of(first));
    }
}

/* Not the loop: waits that are closed later stop their alarms in it. */
static int
Barrier_clear(PyObject *op)
{
    BarrierObject *self = (BarrierObject *)op;
    drop_list(&self->waiting);
    drop_list(&self->blocked);
    Py_CLEAR(self->dict);
    Py_CLEAR(self->action);
    Py_CLEAR(self->cause);
    return 0;
}

static void
Barrier_dealloc(PyObject *op)
{
    BarrierObject *self = (BarrierObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Barrier_clear(op);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef Barrier_members[] = {
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(BarrierObject, weakrefs), Py_READONLY, NULL},
    {"__dictoffset__", Py_T_PYSSIZET, offsetof(BarrierObject, dict), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Barrier_slots[] = {
    {Py_tp_doc, (void *)Barrier_doc},
    {Py_tp_new, Barrier_new},
    {Py_tp_init, Barrier_init},
    {Py_tp_repr, Barrier_repr},
    {Py_tp_methods, Barrier_methods},
    {Py_tp_getset, Barrier_getset},
    {Py_tp_members, Barrier_members},
    {Py_tp_traverse, Barrier_traverse},
    {Py_tp_clear, Barrier_clear},
    {Py_tp_dealloc, Barrier_dealloc},
    {0, NULL},
};

static PyType_Spec Barrier_spec = {
    .name = "aiotools._aiotools.Barrier",
    .basicsize = sizeof(BarrierObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Barrier_slots,
};

int
aiot_barrier_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    return aiot_add_type(module, &state->BarrierType, &Barrier_spec, NULL, true) < 0
                   || aiot_add_type(module, &state->BarrierWaitType, &Wait_spec, NULL, false) < 0
               ? -1
               : 0;
}
