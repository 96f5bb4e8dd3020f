/* shield.c: where a cancellation comes from, and which open scope of a task holds it off.
 *
 * Invariants: loop->frames maps each task that has open frames to its innermost one. A task has a patch exactly while it has
 *             a shielded frame. Tokens form a tree by creation; a token's parent was open when the token was made.
 * Ownership:  the map owns nothing: a frame leaves it when it is closed, at the latest when its scope dies.
 * Locking:    frames belong to the thread of the loop. Tokens never change but for `open`, a hint.
 * Who calls:  the replaced methods answer for the place that the call comes from. Elsewhere than in the task itself the
 *             context variable tells. In the task itself a call counts as one from outside, as it always did, unless it
 *             is made by asyncio's own timeouts and task groups, which count the requests that they made themselves.
 */

#include "shield.h"

#include "ptrmap.h"
#include "waiter.h"

struct AiotShield {
    PyObject_HEAD
    AiotShield *parent;         /* the innermost open shield around, also of another task; owned */
    bool open;
};

enum { CANCEL, CANCELLING, UNCANCEL, N_METHODS };

typedef struct {
    PyObject_HEAD
    AiotLoop *loop;
    PyObject *task;
    PyObject *before[N_METHODS];    /* what the instance had: owned, or NULL */
    PyObject *mine[N_METHODS];
    Py_ssize_t users;               /* shielded frames */
    Py_ssize_t sync_users;          /* those that can't suspend when they are left */
    Py_ssize_t counted;             /* kept requests that the task counts already */
    Py_ssize_t uncounted;           /* the others */
    bool retrying;                  /* a callback of the loop will try to count the others */
} PatchObject;

/* ---- tokens ------------------------------------------------------------------------------------------------- */

static void
Shield_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    /* A chain can be long: one step of recursion per token would overflow the stack. */
    AiotShield *parent = ((AiotShield *)op)->parent;
    type->tp_free(op);
    Py_DECREF(type);
    while (parent != NULL && Py_REFCNT(parent) == 1) {
        AiotShield *next = parent->parent;
        parent->parent = NULL;
        Py_DECREF(parent);
        parent = next;
    }
    Py_XDECREF(parent);
}

static PyType_Slot Shield_slots[] = {
    {Py_tp_doc, "Names an open shield in the contexts of what is started inside it."},
    {Py_tp_dealloc, Shield_dealloc},
    {0, NULL},
};

static PyType_Spec Shield_spec = {
    .name = "aiotools._aiotools.Shield",
    .basicsize = sizeof(AiotShield),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Shield_slots,
};

/* The token in the current context: *out is a new reference or NULL. 0 or -1. */
static int
current_token(aiot_state *state, AiotShield **out)
{
    PyObject *value;
    *out = NULL;
    if (PyContextVar_Get(state->shield_var, NULL, &value) < 0) {
        return -1;
    }
    if (value != NULL && Py_IS_TYPE(value, state->ShieldType)) {
        *out = (AiotShield *)value;
    }
    else {
        Py_XDECREF(value);
    }
    return 0;
}

static int
set_current_token(aiot_state *state, AiotShield *token)
{
    PyObject *reset = PyContextVar_Set(state->shield_var, token == NULL ? Py_None : (PyObject *)token);
    Py_XDECREF(reset);
    return reset == NULL ? -1 : 0;
}

static AiotShield *
token_new(aiot_state *state)
{
    AiotShield *around;
    if (current_token(state, &around) < 0) {
        return NULL;
    }
    /* Nothing new starts inside a shield that was left. */
    while (around != NULL && !around->open) {
        AiotShield *next = (AiotShield *)Py_XNewRef((PyObject *)around->parent);
        Py_DECREF(around);
        around = next;
    }
    AiotShield *token = (AiotShield *)state->ShieldType->tp_alloc(state->ShieldType, 0);
    if (token == NULL) {
        Py_XDECREF(around);
        return NULL;
    }
    token->parent = around;
    token->open = true;
    return token;
}

static bool
is_inside(const AiotShield *shield, const AiotShield *origin)
{
    for (; origin != NULL; origin = origin->parent) {
        if (origin == shield) {
            return true;
        }
    }
    return false;
}

/* ---- the task's own methods --------------------------------------------------------------------------------- */

static PyObject *
method_name(aiot_state *state, int which)
{
    return which == CANCEL ? state->str_cancel : which == CANCELLING ? state->str_cancelling : state->str_uncancel;
}

/* What the instance had before the patch, or what its type has. */
static PyObject *
call_before(PatchObject *patch, int which, PyObject *arg)
{
    PyObject *args[] = {NULL, patch->task, arg};
    size_t nargs = arg == NULL ? 1 : 2;
    if (patch->before[which] != NULL) {
        PyObject *method = Py_NewRef(patch->before[which]);
        PyObject *result = PyObject_Vectorcall(method, args + 2, nargs - 1, NULL);
        Py_DECREF(method);
        return result;
    }
    PyObject *method = PyObject_GetAttr((PyObject *)Py_TYPE(patch->task), method_name(patch->loop->state, which));
    if (method == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_Vectorcall(method, args + 1, nargs | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_DECREF(method);
    return result;
}

aiot_frame *
aiot_frame_of_task(AiotLoop *loop, PyObject *task)
{
    return (aiot_frame *)aiot_ptrmap_get(&loop->frames, task);
}

static aiot_frame *
shield_of_task(AiotLoop *loop, PyObject *task)
{
    aiot_frame *frame = aiot_frame_of_task(loop, task);
    return frame == NULL ? NULL : frame->shield;
}

/* A method of the task itself, shields left aside. */
static PyObject *
call_task(AiotLoop *loop, PyObject *task, int which, PyObject *arg)
{
    aiot_frame *shield = shield_of_task(loop, task);
    if (shield != NULL) {
        PatchObject *patch = (PatchObject *)Py_NewRef(shield->patch);
        PyObject *result = call_before(patch, which, arg);
        Py_DECREF(patch);
        return result;
    }
    PyObject *args[] = {task, arg};
    return PyObject_VectorcallMethod(method_name(loop->state, which), args,
                                     (arg == NULL ? 1 : 2) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

static Py_ssize_t
as_count(PyObject *number)
{
    if (number == NULL) {
        return -1;
    }
    Py_ssize_t count = PyLong_AsSsize_t(number);
    Py_DECREF(number);
    if (count < 0 && !PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "a task counts fewer than no requests");
    }
    return count < 0 ? -1 : count;
}

static int
as_answer(PyObject *answer)
{
    if (answer == NULL) {
        return -1;
    }
    int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

/* The kept requests that the task counts: not yet made, for all who ask. */
static Py_ssize_t
counted_of_task(AiotLoop *loop, PyObject *task)
{
    aiot_frame *shield = shield_of_task(loop, task);
    return shield == NULL ? 0 : ((PatchObject *)shield->patch)->counted;
}

static int forget_pending(AiotLoop *loop, PyObject *task);

Py_ssize_t
aiot_task_requests(AiotLoop *loop, PyObject *task)
{
    Py_ssize_t all = as_count(call_task(loop, task, CANCELLING, NULL));
    if (all < 0) {
        return -1;
    }
    Py_ssize_t counted = counted_of_task(loop, task);
    return all > counted ? all - counted : 0;
}

Py_ssize_t
aiot_task_take_back(AiotLoop *loop, PyObject *task)
{
    if (counted_of_task(loop, task) > 0) {
        Py_ssize_t requests = aiot_task_requests(loop, task);
        if (requests <= 0) {
            return requests;
        }
    }
    Py_ssize_t left = as_count(call_task(loop, task, UNCANCEL, NULL));
    if (left < 0) {
        return -1;
    }
    Py_ssize_t counted = counted_of_task(loop, task);
    if (counted > 0 && left <= counted && forget_pending(loop, task) < 0) {
        return -1;
    }
    return left > counted ? left - counted : 0;
}

int
aiot_task_interrupt(AiotLoop *loop, PyObject *task, PyObject *msg)
{
    return as_answer(call_task(loop, task, CANCEL, msg == Py_None ? NULL : msg));
}

int
aiot_task_must_cancel(AiotLoop *loop, PyObject *task)
{
    PyObject *flag;
    int found = PyObject_GetOptionalAttr(task, loop->state->str__must_cancel, &flag);
    return found <= 0 ? (found < 0 ? -1 : 1) : as_answer(flag);
}

/* ---- what a shield keeps ------------------------------------------------------------------------------------ */

Py_ssize_t
aiot_frame_deferred(const aiot_frame *frame)
{
    return frame->deferred == NULL ? 0 : PyList_GET_SIZE(frame->deferred);
}

/* A plain `with` cannot suspend when it is left. To raise CancelledError there and to make the request anew as well would
 * deliver it twice: the task throws another one at its next suspension. So the task is made to count the request as soon as
 * it is suspended: it passes cancel() on to what it waits for, which is told to answer True and to go on. Where that can't
 * be done (the block is left before the task ever suspends, or it waits for something that takes no attributes), the
 * request is made at the end of the block, and 3.11 and 3.12 deliver it once more, later ones unless uncancel() is called. */
static PyObject *
stay(PyObject *Py_UNUSED(self), PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs), PyObject *Py_UNUSED(kwnames))
{
    Py_RETURN_TRUE;
}

static PyMethodDef stay_def = {
    "cancel", (PyCFunction)(void (*)(void))stay, METH_FASTCALL | METH_KEYWORDS,
    "cancel($self, /, msg=None)\n--\n\nAnswer True, and do nothing.",
};

/* Runs the task's own cancel() while what it waits for stays. 1 when that is possible, else 0, or -1. */
static int
cancel_and_stay(PatchObject *patch, PyObject *msg, PyObject *awaited)
{
    aiot_state *state = patch->loop->state;
    if (Py_IS_TYPE(awaited, state->WaiterType)) {
        AiotWaiter *waiter = (AiotWaiter *)awaited;
        waiter->deaf = true;
        int answer = as_answer(call_before(patch, CANCEL, msg));
        waiter->deaf = false;
        return answer;
    }
    PyObject *dict = PyObject_GenericGetDict(awaited, NULL);
    if (dict == NULL) {
        PyErr_Clear();
        return 0;
    }
    PyObject *before = NULL;
    PyObject *deaf = PyCFunction_New(&stay_def, NULL);
    int answer = -1;
    if (deaf != NULL && PyDict_GetItemRef(dict, state->str_cancel, &before) >= 0
        && PyDict_SetItem(dict, state->str_cancel, deaf) == 0)
    {
        answer = as_answer(call_before(patch, CANCEL, msg));
        PyObject *exc = PyErr_GetRaisedException();
        if ((before != NULL ? PyDict_SetItem(dict, state->str_cancel, before)
                            : PyDict_DelItem(dict, state->str_cancel)) < 0)
        {
            PyErr_WriteUnraisable(awaited);
        }
        if (exc != NULL) {
            PyErr_SetRaisedException(exc);
        }
    }
    Py_XDECREF(before);
    Py_XDECREF(deaf);
    Py_DECREF(dict);
    return answer;
}

/* What the task waits for: a new reference, or NULL when it does not wait or does not tell. 0 or -1. */
static int
find_awaited(PatchObject *patch, PyObject **awaited)
{
    if (PyObject_GetOptionalAttr(patch->task, patch->loop->state->str__fut_waiter, awaited) < 0) {
        return -1;
    }
    if (*awaited == Py_None) {
        Py_CLEAR(*awaited);
    }
    return 0;
}

static PyObject *
pack_request(PyObject *msg, PyObject *origin, bool counted)
{
    return PyTuple_Pack(3, msg == NULL ? Py_None : msg, origin == NULL ? Py_None : origin, counted ? Py_True : Py_False);
}

static bool
is_counted(PyObject *request)
{
    return PyTuple_GET_ITEM(request, 2) == Py_True;
}

static int retry_soon(PatchObject *patch);

/* The youngest kept request that is not counted: the list that it is in (borrowed), and its index there. */
static PyObject *
find_uncounted(PatchObject *patch, Py_ssize_t *index)
{
    aiot_frame *shield = patch->uncounted == 0 ? NULL : shield_of_task(patch->loop, patch->task);
    for (; shield != NULL; shield = shield->outer == NULL ? NULL : shield->outer->shield) {
        for (Py_ssize_t i = aiot_frame_deferred(shield) - 1; i >= 0; i--) {
            if (!is_counted(PyList_GET_ITEM(shield->deferred, i))) {
                *index = i;
                return shield->deferred;
            }
        }
    }
    return NULL;
}

/* Counts one. 1 when that could be done, else 0, or -1. */
static int
count_one(PatchObject *patch, PyObject *kept, Py_ssize_t index, PyObject *awaited)
{
    PyObject *old = PyList_GET_ITEM(kept, index);
    PyObject *msg = PyTuple_GET_ITEM(old, 0);
    PyObject *request = pack_request(msg, PyTuple_GET_ITEM(old, 1), true);
    if (request == NULL) {
        return -1;
    }
    Py_INCREF(kept);
    Py_INCREF(old);
    int answer = cancel_and_stay(patch, msg == Py_None ? NULL : msg, awaited);
    if (answer > 0) {
        /* A task type of somebody else's may have a cancel() that does anything. */
        if (index < PyList_GET_SIZE(kept) && PyList_GET_ITEM(kept, index) == old) {
            patch->counted++;
            patch->uncounted--;
            answer = PyList_SetItem(kept, index, Py_NewRef(request)) < 0 ? -1 : 1;
        }
        else {
            PyObject *left = call_before(patch, UNCANCEL, NULL);
            answer = left == NULL ? -1 : 1;
            Py_XDECREF(left);
        }
    }
    Py_DECREF(old);
    Py_DECREF(kept);
    Py_DECREF(request);
    return answer;
}

/* Lets the task count what its shields keep, or tries it again as soon as it is suspended. 0 or -1. */
static int
count_kept(PatchObject *patch)
{
    PyObject *kept;
    Py_ssize_t index;
    int answer = 1;
    while (answer > 0 && patch->sync_users > 0 && (kept = find_uncounted(patch, &index)) != NULL) {
        PyObject *awaited;
        if (find_awaited(patch, &awaited) < 0) {
            return -1;
        }
        if (awaited == NULL) {
            return retry_soon(patch);
        }
        answer = count_one(patch, kept, index, awaited);
        Py_DECREF(awaited);
    }
    return answer < 0 ? -1 : 0;
}

static PyObject *
patched_retry(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PatchObject *patch = (PatchObject *)op;
    patch->retrying = false;
    if (count_kept(patch) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef retry_def = {
    "count_kept", patched_retry, METH_NOARGS, "Let the task count what its shields keep.",
};

static int
retry_soon(PatchObject *patch)
{
    AiotLoop *loop = patch->loop;
    if (patch->retrying || loop->loop == NULL) {
        return 0;
    }
    PyObject *callback = PyCFunction_New(&retry_def, (PyObject *)patch);
    PyObject *context = callback == NULL ? NULL : PyContext_New();
    PyObject *names = context == NULL ? NULL : PyTuple_Pack(1, loop->state->str_context);
    PyObject *handle = NULL;
    if (names != NULL) {
        PyObject *args[] = {loop->loop, callback, context};
        handle = PyObject_VectorcallMethod(loop->state->str_call_soon, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, names);
    }
    patch->retrying = handle != NULL;
    Py_XDECREF(handle);
    Py_XDECREF(names);
    Py_XDECREF(context);
    Py_XDECREF(callback);
    return patch->retrying ? 0 : -1;
}

/* No request is left but those that are counted and kept. From 3.13 on a task then doesn't throw CancelledError any more if
 * it was about to, but only when the count is 0: let it be 0, and count them again when the task is suspended. 0 or -1. */
static int
forget_pending(AiotLoop *loop, PyObject *task)
{
    int pending = PY_VERSION_HEX < 0x030D0000 ? 0 : aiot_task_must_cancel(loop, task);
    if (pending <= 0) {
        return pending;
    }
    int failed = 0;
    PatchObject *patch = (PatchObject *)Py_NewRef(shield_of_task(loop, task)->patch);
    for (aiot_frame *shield = shield_of_task(loop, task); !failed && shield != NULL;
         shield = shield->outer == NULL ? NULL : shield->outer->shield)
    {
        for (Py_ssize_t i = 0; !failed && i < aiot_frame_deferred(shield); i++) {
            PyObject *old = PyList_GET_ITEM(shield->deferred, i);
            if (!is_counted(old)) {
                continue;
            }
            PyObject *request = pack_request(PyTuple_GET_ITEM(old, 0), PyTuple_GET_ITEM(old, 1), false);
            if (request == NULL) {
                failed = -1;
                break;
            }
            failed = PyList_SetItem(shield->deferred, i, request);
            patch->counted--;
            patch->uncounted++;
        }
    }
    /* The lists are right before anything foreign is called. */
    Py_ssize_t left = failed ? 0 : as_count(call_before(patch, CANCELLING, NULL));
    while (left > patch->counted) {
        left = as_count(call_before(patch, UNCANCEL, NULL));
    }
    if (left < 0 || failed || retry_soon(patch) < 0) {
        failed = -1;
    }
    Py_DECREF(patch);
    return failed;
}

static aiot_state *
shield_state(const aiot_frame *shield)
{
    return ((PatchObject *)shield->patch)->loop->state;
}

static int
keep(aiot_frame *shield, AiotShield *origin, PyObject *msg)
{
    if (shield->deferred == NULL && (shield->deferred = PyList_New(0)) == NULL) {
        return -1;
    }
    /* Whoever traces requests notes this one now, not when it is delivered. */
    PyObject *before = ((PatchObject *)shield->patch)->before[CANCEL];
    PyObject *noted = NULL;
    if (before != NULL) {
        PyObject *note;
        if (PyObject_GetOptionalAttr(before, shield_state(shield)->str__aiotools_note, &note) < 0) {
            return -1;
        }
        if (note != NULL) {
            noted = PyObject_CallOneArg(note, msg == NULL ? Py_None : msg);
            Py_DECREF(note);
            if (noted == NULL) {
                return -1;
            }
        }
    }
    PyObject *request = pack_request(noted != NULL ? noted : msg, (PyObject *)origin, false);
    Py_XDECREF(noted);
    int failed = request == NULL ? -1 : PyList_Append(shield->deferred, request);
    Py_XDECREF(request);
    if (failed) {
        return -1;
    }
    PatchObject *patch = (PatchObject *)Py_NewRef(shield->patch);
    patch->uncounted++;
    failed = count_kept(patch);
    Py_DECREF(patch);
    return failed;
}

/* 1, 0 or -1. */
static int
task_is_done(AiotLoop *loop, PyObject *task)
{
    return as_answer(PyObject_CallMethodNoArgs(task, loop->state->str_done));
}

int
aiot_task_cancel_from(AiotLoop *loop, PyObject *task, AiotShield *origin, PyObject *msg)
{
    aiot_frame *shield = shield_of_task(loop, task);
    if (shield == NULL || is_inside(shield->token, origin)) {
        return aiot_task_interrupt(loop, task, msg);
    }
    int done = task_is_done(loop, task);
    if (done != 0) {
        return done < 0 ? -1 : 0;
    }
    /* done() may be anybody's: look again. */
    shield = shield_of_task(loop, task);
    if (shield == NULL || is_inside(shield->token, origin)) {
        return aiot_task_interrupt(loop, task, msg);
    }
    return keep(shield, origin, msg) < 0 ? -1 : 1;
}

/* Which the task counts: kept by the next shield, or delivered. */
static int
hand_over_counted(aiot_frame *shield, PyObject *request)
{
    if (shield == NULL) {
        return 0;
    }
    if (shield->deferred == NULL && (shield->deferred = PyList_New(0)) == NULL) {
        return -1;
    }
    if (PyList_Append(shield->deferred, request) < 0) {
        return -1;
    }
    ((PatchObject *)shield->patch)->counted++;
    return 0;
}

Py_ssize_t
aiot_frame_hand_over(AiotLoop *loop, aiot_frame *frame, PyObject *task, Py_ssize_t *pending)
{
    PyObject *requests = frame->deferred;
    frame->deferred = NULL;
    *pending = 0;
    if (requests == NULL) {
        return 0;
    }
    Py_ssize_t delivered = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(requests); i++) {
        PyObject *request = PyList_GET_ITEM(requests, i);
        PyObject *origin = PyTuple_GET_ITEM(request, 1);
        AiotShield *from = origin == Py_None ? NULL : (AiotShield *)origin;
        aiot_frame *shield = shield_of_task(loop, task);
        bool counted = is_counted(request);
        if (shield == NULL || is_inside(shield->token, from)) {
            shield = NULL;
            delivered++;
            *pending += !counted;
        }
        if ((counted ? hand_over_counted(shield, request)
                     : aiot_task_cancel_from(loop, task, from, PyTuple_GET_ITEM(request, 0))) < 0)
        {
            delivered = -1;
            break;
        }
    }
    Py_DECREF(requests);
    return delivered;
}

AiotShield *
aiot_task_shield(AiotLoop *loop, PyObject *task)
{
    aiot_frame *shield = shield_of_task(loop, task);
    return shield == NULL ? NULL : (AiotShield *)Py_NewRef((PyObject *)shield->token);
}

Py_ssize_t
aiot_task_all_requests(AiotLoop *loop, PyObject *task)
{
    Py_ssize_t count = aiot_task_requests(loop, task);
    if (count < 0) {
        return -1;
    }
    for (aiot_frame *frame = aiot_frame_of_task(loop, task); frame != NULL; frame = frame->outer) {
        count += aiot_frame_deferred(frame);
    }
    return count;
}

/* ---- the methods that replace the task's -------------------------------------------------------------------- */

typedef enum {
    FROM_OUTSIDE,       /* the shield holds */
    FROM_INSIDE,        /* it doesn't */
    FROM_HOST,          /* the task itself: the shield holds, but what came from inside is seen */
    NO_SHIELD,
    UNKNOWN,            /* an exception is set */
} place;

static bool
is_called_by_asyncio(aiot_state *state)
{
    PyObject *globals = PyEval_GetGlobals();
    return globals != NULL && (globals == state->asyncio_timeouts_dict || globals == state->asyncio_taskgroups_dict);
}

/* Where the running call comes from, seen from the innermost shield of the task. *origin is a new reference or NULL. */
static place
place_of_call(PatchObject *patch, AiotShield **origin)
{
    AiotLoop *loop = patch->loop;
    *origin = NULL;
    if (shield_of_task(loop, patch->task) == NULL) {
        return NO_SHIELD;
    }
    if (loop->loop != NULL) {
        PyObject *current = PyObject_CallOneArg(loop->state->current_task, loop->loop);
        if (current == NULL) {
            return UNKNOWN;
        }
        Py_DECREF(current);
        if (current == patch->task && !is_called_by_asyncio(loop->state)) {
            return FROM_HOST;
        }
    }
    if (current_token(loop->state, origin) < 0) {
        return UNKNOWN;
    }
    aiot_frame *shield = shield_of_task(loop, patch->task);
    return shield == NULL ? NO_SHIELD : is_inside(shield->token, *origin) ? FROM_INSIDE : FROM_OUTSIDE;
}

static PyObject *
patched_cancel(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    PatchObject *patch = (PatchObject *)op;
    PyObject *msg = NULL;
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    if (nargs + nkw > 1
        || (nkw == 1 && PyUnicode_Compare(PyTuple_GET_ITEM(kwnames, 0), patch->loop->state->str_msg) != 0))
    {
        PyErr_SetString(PyExc_TypeError, "cancel() takes at most one argument, msg");
        return NULL;
    }
    if (nargs + nkw == 1 && args[0] != Py_None) {
        msg = args[0];
    }
    AiotShield *origin;
    place from = place_of_call(patch, &origin);
    PyObject *answer = NULL;
    if (from == NO_SHIELD || from == FROM_INSIDE) {
        answer = call_before(patch, CANCEL, msg);
    }
    else if (from != UNKNOWN) {
        int done = task_is_done(patch->loop, patch->task);
        aiot_frame *shield = shield_of_task(patch->loop, patch->task);
        if (done == 0 && shield != NULL) {
            answer = keep(shield, origin, msg) < 0 ? NULL : Py_NewRef(Py_True);
        }
        else if (done >= 0) {
            answer = call_before(patch, CANCEL, msg);
        }
    }
    Py_XDECREF(origin);
    return answer;
}

/* Requests that came from inside the innermost shield and took effect. */
static Py_ssize_t
requests_from_inside(PatchObject *patch, aiot_frame *shield)
{
    Py_ssize_t at_entry = shield->requests;
    Py_ssize_t now = aiot_task_requests(patch->loop, patch->task);
    return now < 0 ? -1 : now > at_entry ? now - at_entry : 0;
}

static PyObject *
as_number(Py_ssize_t count)
{
    return count < 0 ? NULL : PyLong_FromSsize_t(count);
}

static PyObject *
patched_cancelling(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PatchObject *patch = (PatchObject *)op;
    AiotShield *origin;
    place from = place_of_call(patch, &origin);
    Py_XDECREF(origin);
    if (from == UNKNOWN) {
        return NULL;
    }
    aiot_frame *shield = shield_of_task(patch->loop, patch->task);
    if (from == NO_SHIELD || shield == NULL) {
        return call_before(patch, CANCELLING, NULL);
    }
    if (from == FROM_INSIDE) {
        return as_number(aiot_task_requests(patch->loop, patch->task));
    }
    Py_ssize_t inside = from == FROM_HOST ? requests_from_inside(patch, shield) : 0;
    if (inside < 0) {
        return NULL;
    }
    shield = shield_of_task(patch->loop, patch->task);
    return PyLong_FromSsize_t(inside + (shield == NULL ? 0 : aiot_frame_deferred(shield)));
}

/* In the task itself: what came from inside is taken back first, and then the answer counts only those. Code that makes
 * requests and takes them back compares it with a count from before, to which the shield may have added since. */
static PyObject *
patched_uncancel(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PatchObject *patch = (PatchObject *)op;
    AiotShield *origin;
    place from = place_of_call(patch, &origin);
    Py_XDECREF(origin);
    if (from == UNKNOWN) {
        return NULL;
    }
    aiot_frame *shield = shield_of_task(patch->loop, patch->task);
    if (from == NO_SHIELD || shield == NULL) {
        return call_before(patch, UNCANCEL, NULL);
    }
    if (from == FROM_INSIDE) {
        return as_number(aiot_task_take_back(patch->loop, patch->task));
    }
    if (from == FROM_HOST) {
        Py_ssize_t inside = requests_from_inside(patch, shield);
        if (inside < 0) {
            return NULL;
        }
        if (inside > 0) {
            if (aiot_task_take_back(patch->loop, patch->task) < 0) {
                return NULL;
            }
            return PyLong_FromSsize_t(inside - 1);
        }
        shield = shield_of_task(patch->loop, patch->task);
    }
    Py_ssize_t kept = shield == NULL ? 0 : aiot_frame_deferred(shield);
    if (kept > 0) {
        bool counted = is_counted(PyList_GET_ITEM(shield->deferred, kept - 1));
        if (PyList_SetSlice(shield->deferred, kept - 1, kept, NULL) < 0) {
            return NULL;
        }
        *(counted ? &patch->counted : &patch->uncounted) -= 1;
        if (counted) {
            PyObject *left = call_before(patch, UNCANCEL, NULL);
            if (left == NULL) {
                return NULL;
            }
            Py_DECREF(left);
        }
    }
    return PyLong_FromSsize_t(kept > 0 ? kept - 1 : 0);
}

static PyMethodDef patched_methods[N_METHODS] = {
    {"cancel", (PyCFunction)(void (*)(void))patched_cancel, METH_FASTCALL | METH_KEYWORDS,
     "cancel($self, /, msg=None)\n--\n\nCancel the task, unless it is in a shield and this call comes from outside."},
    {"cancelling", patched_cancelling, METH_NOARGS,
     "cancelling($self, /)\n--\n\nThe number of requests that the innermost shield keeps."},
    {"uncancel", patched_uncancel, METH_NOARGS,
     "uncancel($self, /)\n--\n\nTake the latest request back; return how many the innermost shield still keeps."},
};

/* ---- the patch ---------------------------------------------------------------------------------------------- */

/* The instance's dictionary: new reference; NULL with RuntimeError when it has none. asyncio.Task has one, but doesn't show
 * it as __dict__. */
static PyObject *
dict_of_task(PyObject *task)
{
    PyObject *dict = PyObject_GenericGetDict(task, NULL);
    if (dict == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Format(PyExc_RuntimeError, "cannot shield this task: '%.200s' objects take no attributes",
                     Py_TYPE(task)->tp_name);
    }
    return dict;
}

/* Puts back what was there; what somebody else put on top of it stays, and finds our methods without a shield. */
static void
patch_remove(PatchObject *patch)
{
    aiot_state *state = patch->loop->state;
    PyObject *dict = dict_of_task(patch->task);
    if (dict == NULL) {
        PyErr_WriteUnraisable(patch->task);
        return;
    }
    for (int i = 0; i < N_METHODS; i++) {
        PyObject *name = method_name(state, i);
        PyObject *now;
        int found = PyDict_GetItemRef(dict, name, &now);
        if (found < 0) {
            PyErr_WriteUnraisable(patch->task);
        }
        else if (found > 0) {
            if (now == patch->mine[i]
                && (patch->before[i] != NULL ? PyDict_SetItem(dict, name, patch->before[i])
                                             : PyDict_DelItem(dict, name)) < 0)
            {
                PyErr_WriteUnraisable(patch->task);
            }
            Py_DECREF(now);
        }
        Py_CLEAR(patch->mine[i]);
    }
    Py_DECREF(dict);
}

static PatchObject *
patch_new(AiotLoop *loop, PyObject *task)
{
    aiot_state *state = loop->state;
    PyObject *dict = dict_of_task(task);
    if (dict == NULL) {
        return NULL;
    }
    PatchObject *patch = (PatchObject *)state->PatchType->tp_alloc(state->PatchType, 0);
    if (patch == NULL) {
        Py_DECREF(dict);
        return NULL;
    }
    patch->loop = (AiotLoop *)Py_NewRef((PyObject *)loop);
    patch->task = Py_NewRef(task);
    for (int i = 0; i < N_METHODS; i++) {
        PyObject *name = method_name(state, i);
        if (PyDict_GetItemRef(dict, name, &patch->before[i]) < 0
            || (patch->mine[i] = PyCFunction_New(&patched_methods[i], (PyObject *)patch)) == NULL
            || PyDict_SetItem(dict, name, patch->mine[i]) < 0)
        {
            PyObject *exc = PyErr_GetRaisedException();
            patch_remove(patch);
            Py_DECREF(patch);
            Py_DECREF(dict);
            PyErr_SetRaisedException(exc);
            return NULL;
        }
    }
    Py_DECREF(dict);
    return patch;
}

static int
Patch_traverse(PyObject *op, visitproc visit, void *arg)
{
    PatchObject *self = (PatchObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->loop);
    Py_VISIT(self->task);
    for (int i = 0; i < N_METHODS; i++) {
        Py_VISIT(self->before[i]);
        Py_VISIT(self->mine[i]);
    }
    return 0;
}

/* Not the loop and the task: the methods need them as long as anybody can call them. The cycle is broken here. */
static int
Patch_clear(PyObject *op)
{
    PatchObject *self = (PatchObject *)op;
    for (int i = 0; i < N_METHODS; i++) {
        Py_CLEAR(self->mine[i]);
        Py_CLEAR(self->before[i]);
    }
    return 0;
}

static void
Patch_dealloc(PyObject *op)
{
    PatchObject *self = (PatchObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Patch_clear(op);
    Py_CLEAR(self->task);
    Py_CLEAR(self->loop);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *
Patch_get_beneath(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *before = ((PatchObject *)op)->before[CANCEL];
    return Py_NewRef(before == NULL ? Py_None : before);
}

static int
Patch_set_beneath(PyObject *op, PyObject *value, void *Py_UNUSED(closure))
{
    PyObject *before = value == NULL || value == Py_None ? NULL : Py_NewRef(value);
    Py_XSETREF(((PatchObject *)op)->before[CANCEL], before);
    return 0;
}

static PyGetSetDef Patch_getset[] = {
    {"_beneath", Patch_get_beneath, Patch_set_beneath,
     "The task's own `cancel` attribute, which comes back when the shield is left; None: it has none.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Patch_slots[] = {
    {Py_tp_doc, "Stands behind the methods of a task that is in a shield."},
    {Py_tp_getset, Patch_getset},
    {Py_tp_traverse, Patch_traverse},
    {Py_tp_clear, Patch_clear},
    {Py_tp_dealloc, Patch_dealloc},
    {0, NULL},
};

static PyType_Spec Patch_spec = {
    .name = "aiotools._aiotools.ShieldPatch",
    .basicsize = sizeof(PatchObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Patch_slots,
};

/* ---- frames ------------------------------------------------------------------------------------------------- */

static void
free_slots(void *p)
{
    PyMem_RawFree(p);
}

static void *
alloc_slots(size_t count, size_t size)
{
    return PyMem_RawCalloc(count, size);
}

static int
frame_shield(AiotLoop *loop, aiot_frame *frame, aiot_frame *outer)
{
    PatchObject *patch;
    if (outer != NULL && outer->shield != NULL) {
        patch = (PatchObject *)Py_NewRef(outer->shield->patch);
    }
    else {
        patch = patch_new(loop, frame->task);
        if (patch == NULL) {
            return -1;
        }
    }
    patch->users++;
    patch->sync_users += frame->sync;
    frame->patch = (PyObject *)patch;
    frame->token = token_new(loop->state);
    if (frame->token == NULL || set_current_token(loop->state, frame->token) < 0) {
        return -1;
    }
    return 0;
}

/* Undoes frame_shield, as far as it got. */
static void
frame_unshield(AiotLoop *loop, aiot_frame *frame)
{
    if (frame->token != NULL) {
        frame->token->open = false;
        AiotShield *now;
        int failed = current_token(loop->state, &now);
        if (!failed && now == frame->token) {
            failed = set_current_token(loop->state, frame->token->parent);
        }
        if (failed) {
            PyErr_WriteUnraisable(frame->task);
        }
        Py_XDECREF((PyObject *)now);
    }
    PatchObject *patch = (PatchObject *)frame->patch;
    frame->patch = NULL;
    if (patch != NULL) {
        patch->sync_users -= frame->sync;
        for (Py_ssize_t i = 0; i < aiot_frame_deferred(frame); i++) {
            *(is_counted(PyList_GET_ITEM(frame->deferred, i)) ? &patch->counted : &patch->uncounted) -= 1;
        }
        if (--patch->users == 0) {
            patch_remove(patch);
        }
        Py_DECREF(patch);
    }
}

int
aiot_frame_push(AiotLoop *loop, aiot_frame *frame, PyObject *task, bool shielded, bool sync)
{
    assert(frame->task == NULL && frame->deferred == NULL && frame->token == NULL);
    frame->requests = aiot_task_requests(loop, task);
    if (frame->requests < 0) {
        return -1;
    }
    aiot_frame *outer = aiot_frame_of_task(loop, task);
    frame->task = Py_NewRef(task);
    frame->outer = outer;
    frame->sync = shielded && sync;
    if (shielded) {
        if (frame_shield(loop, frame, outer) < 0) {
            goto error;
        }
        frame->shield = frame;
    }
    else {
        frame->shield = outer == NULL ? NULL : outer->shield;
        frame->token = frame->shield == NULL ? NULL : (AiotShield *)Py_NewRef((PyObject *)frame->shield->token);
    }
    if (aiot_ptrmap_set(&loop->frames, task, frame, alloc_slots, free_slots) < 0) {
        PyErr_NoMemory();
        goto error;
    }
    return 0;
error:;
    PyObject *exc = PyErr_GetRaisedException();
    frame_unshield(loop, frame);
    Py_CLEAR(frame->token);
    Py_CLEAR(frame->task);
    frame->outer = frame->shield = NULL;
    PyErr_SetRaisedException(exc);
    return -1;
}

void
aiot_frame_pop(AiotLoop *loop, aiot_frame *frame)
{
    PyObject *task = frame->task;
    if (task == NULL) {
        return;
    }
    PyObject *pending = PyErr_GetRaisedException();
    aiot_frame *innermost = aiot_frame_of_task(loop, task);
    if (innermost == frame) {
        if (frame->outer == NULL) {
            aiot_ptrmap_remove(&loop->frames, task);
        }
        else {
            /* Replaces the value of a key that is there: can't fail. */
            (void)aiot_ptrmap_set(&loop->frames, task, frame->outer, alloc_slots, free_slots);
        }
    }
    else {
        /* Out of order: its scope died. Those inside it are shielded by what is around it from now on. */
        for (aiot_frame *f = innermost; f != NULL; f = f->outer) {
            if (f->shield == frame) {
                f->shield = frame->outer == NULL ? NULL : frame->outer->shield;
            }
            if (f->outer == frame) {
                f->outer = frame->outer;
                break;
            }
        }
    }
    if (frame->shield == frame) {
        frame_unshield(loop, frame);
    }
    frame->outer = frame->shield = NULL;
    frame->task = NULL;
    Py_CLEAR(frame->token);
    Py_DECREF(task);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

int
aiot_frame_traverse(aiot_frame *frame, visitproc visit, void *arg)
{
    Py_VISIT(frame->task);
    Py_VISIT(frame->patch);
    Py_VISIT(frame->deferred);
    return 0;
}

int
aiot_shield_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->shield_var = PyContextVar_New("aiotools_shield", NULL)) == NULL
        || aiot_add_type(module, &state->ShieldType, &Shield_spec, NULL, false) < 0
        || aiot_add_type(module, &state->PatchType, &Patch_spec, NULL, false) < 0)
    {
        return -1;
    }
    return 0;
}
