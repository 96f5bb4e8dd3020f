/* children.c: what every owner of tasks is built on.
 *
 * States:     a node is LIVE (linked, parent and task set) or ENDED (neither). A young child is running, found done (by a
 *             sweep; the next one tells its parent, after the done callbacks that its end has scheduled), or told.
 * Invariants: n_children is the length of the list plus the young ones that were not told; a joiner is linked only while its
 *             waiter is pending. While there are young ones, a sweep is under way or running.
 * Ownership:  the parent owns the nodes in its list, a node its task and its parent, the task's callback list the node: cycles
 *             that the end of the task breaks, or the collector when nothing else refers to the parent or the task.
 * Locking:    all belongs to the thread of the loop.
 * Re-entry:   create_task, ended(), and the last reference to anything run foreign code: the list is never walked
 *             while they run.
 */

#include "children.h"

#include <string.h>

#define MAX_KEYWORDS 24

/* ---- a child ------------------------------------------------------------------------------------------------ */

static int
discard_awaited_by(AiotChildren *self, PyObject *task)
{
    aiot_state *state = self->loop->state;
    if (state->discard_from_awaited_by == NULL || self->host == NULL) {
        return 0;
    }
    PyObject *args[] = {task, self->host};
    PyObject *result = PyObject_Vectorcall(state->discard_from_awaited_by, args, 2, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

int
aiot_children_wake(AiotChildren *self)
{
    int failed = 0;
    aiot_link *first;
    while ((first = aiot_link_first(&self->joiners)) != NULL) {
        aiot_joiner *joiner = AIOT_CONTAINER_OF(first, aiot_joiner, link);
        aiot_link_remove(first);
        AiotWaiter *waiter = (AiotWaiter *)Py_NewRef((PyObject *)joiner->waiter);
        if (aiot_waiter_wake(waiter) < 0) {
            failed = -1;
        }
        Py_DECREF(waiter);
        if (failed) {
            break;
        }
    }
    return failed;
}

/* Tells the parent, then those who wait. Both references are stolen. */
static int
tell_parent(AiotChildren *parent, Py_ssize_t index, PyObject *task)
{
    int failed = discard_awaited_by(parent, task);
    if (!failed) {
        failed = parent->ops->ended(parent, index, task);
    }
    if (parent->n_children == 0 && !aiot_link_is_empty(&parent->joiners)) {
        PyObject *exc = failed ? PyErr_GetRaisedException() : NULL;
        int not_woken = aiot_children_wake(parent);
        if (exc != NULL) {
            if (not_woken) {
                PyErr_WriteUnraisable((PyObject *)parent);
            }
            PyErr_SetRaisedException(exc);
        }
        failed = failed || not_woken ? -1 : 0;
    }
    Py_DECREF(task);
    Py_DECREF(parent);
    return failed;
}

static int
child_end(AiotChild *child)
{
    AiotChildren *parent = child->parent;
    PyObject *task = child->task;
    if (parent == NULL) {
        return 0;
    }
    child->parent = NULL;
    child->task = NULL;
    aiot_link_remove(&child->link);
    parent->n_children--;
    parent->burst = 0;
    int failed = tell_parent(parent, parent->ops->indexed ? ((AiotIndexedChild *)child)->index : 0, task);
    Py_DECREF(child);       /* the list's */
    return failed;
}

/* No vectorcall: its pointer would cost each child more memory than a call that happens once costs time. */
static PyObject *
Child_call(PyObject *op, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    if (child_end((AiotChild *)op) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static int
Child_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((AiotChild *)op)->parent);
    Py_VISIT(((AiotChild *)op)->task);
    return 0;
}

/* After n_children became 0 without an end, or when nobody will look for ends: who waits looks again. */
static void
wake_quietly(AiotChildren *parent)
{
    PyObject *pending = PyErr_GetRaisedException();
    aiot_link *first;
    while ((first = aiot_link_first(&parent->joiners)) != NULL) {
        aiot_link_remove(first);
        aiot_waiter_wake_quietly(AIOT_CONTAINER_OF(first, aiot_joiner, link)->waiter);
    }
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* Leaves its parent without having ended: garbage, or never linked properly. */
static int
Child_clear(PyObject *op)
{
    AiotChild *child = (AiotChild *)op;
    AiotChildren *parent = child->parent;
    PyObject *task = child->task;
    if (parent != NULL) {
        child->parent = NULL;
        child->task = NULL;
        aiot_link_remove(&child->link);
        parent->n_children--;
        if (parent->n_children == 0) {
            wake_quietly(parent);
        }
        Py_DECREF(task);
        Py_DECREF(parent);
        Py_DECREF(op);      /* the list's */
    }
    return 0;
}

static void
Child_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(((AiotChild *)op)->parent == NULL);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Child_slots[] = {
    {Py_tp_doc, "The done callback of a child task."},
    {Py_tp_call, Child_call},
    {Py_tp_traverse, Child_traverse},
    {Py_tp_clear, Child_clear},
    {Py_tp_dealloc, Child_dealloc},
    {0, NULL},
};

static PyType_Spec Child_spec = {
    .name = "aiotools._aiotools.Child",
    .basicsize = sizeof(AiotChild),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Child_slots,
};

static PyType_Spec IndexedChild_spec = {
    .name = "aiotools._aiotools.IndexedChild",
    .basicsize = sizeof(AiotIndexedChild),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Child_slots,
};

/* ---- the parent --------------------------------------------------------------------------------------------- */

void
aiot_children_init(void *op, const aiot_children_ops *ops)
{
    AiotChildren *self = (AiotChildren *)op;
    self->ops = ops;
    aiot_link_init(&self->children);
    aiot_link_init(&self->joiners);
}

int
aiot_children_traverse(void *op, visitproc visit, void *arg)
{
    AiotChildren *self = (AiotChildren *)op;
    Py_VISIT(self->loop);
    Py_VISIT(self->host);
    Py_VISIT(self->callback_context);
    for (aiot_link *l = self->children.next; l != NULL && l != &self->children; l = l->next) {
        Py_VISIT((PyObject *)AIOT_CONTAINER_OF(l, AiotChild, link));
    }
    for (Py_ssize_t i = 0; i < self->n_young; i++) {
        Py_VISIT(self->young[i].task);
    }
    return 0;
}

/* The loop state stays for what still runs. */
void
aiot_children_clear(void *op)
{
    AiotChildren *self = (AiotChildren *)op;
    aiot_link *first;
    while (self->children.next != NULL && (first = aiot_link_first(&self->children)) != NULL) {
        PyObject *child = Py_NewRef((PyObject *)AIOT_CONTAINER_OF(first, AiotChild, link));
        Child_clear(child);
        Py_DECREF(child);
    }
    aiot_young *young = self->young;
    Py_ssize_t n_young = self->n_young;
    self->young = NULL;
    self->n_young = self->young_room = 0;
    for (Py_ssize_t i = 0; i < n_young; i++) {
        if (young[i].task != NULL) {
            self->n_children--;
            Py_DECREF(young[i].task);
        }
    }
    PyMem_Free(young);
    if (n_young > 0 && self->n_children == 0) {
        wake_quietly(self);
    }
    Py_CLEAR(self->host);
    Py_CLEAR(self->callback_context);
}

PyObject *
aiot_children_tasks(AiotChildren *self)
{
    PyObject *tasks = PyList_New(self->n_children);
    if (tasks == NULL) {
        return NULL;
    }
    Py_ssize_t i = 0;
    for (aiot_link *l = self->children.next; l != &self->children && i < PyList_GET_SIZE(tasks); l = l->next) {
        PyList_SET_ITEM(tasks, i++, Py_NewRef(AIOT_CONTAINER_OF(l, AiotChild, link)->task));
    }
    for (Py_ssize_t j = 0; j < self->n_young && i < PyList_GET_SIZE(tasks); j++) {
        if (self->young[j].task != NULL) {
            PyList_SET_ITEM(tasks, i++, Py_NewRef(self->young[j].task));
        }
    }
    assert(i == PyList_GET_SIZE(tasks));
    return tasks;
}

void
aiot_close_coroutine(aiot_state *state, PyObject *coro)
{
    PyObject *pending = PyErr_GetRaisedException();
    PyObject *close;
    if (PyObject_GetOptionalAttr(coro, state->str_close, &close) > 0) {
        PyObject *result = PyObject_CallNoArgs(close);
        Py_DECREF(close);
        if (result == NULL) {
            PyErr_WriteUnraisable(coro);
        }
        Py_XDECREF(result);
    }
    PyErr_Clear();
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

/* What ended() runs in, whoever makes the children. */
static int
capture_context(AiotChildren *self)
{
    return self->callback_context == NULL && (self->callback_context = PyContext_CopyCurrent()) == NULL ? -1 : 0;
}

/* 1, 0 or -1. */
static int
is_done(aiot_state *state, PyObject *task)
{
    PyObject *answer = PyObject_CallMethodNoArgs(task, state->str_done);
    if (AIOT_LIKELY(answer == Py_False || answer == Py_True)) {
        Py_DECREF(answer);
        return answer == Py_True;
    }
    if (answer == NULL) {
        return -1;
    }
    int done = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return done;
}

static int
add_awaited_by(AiotChildren *self, PyObject *task)
{
    aiot_state *state = self->loop->state;
    if (state->add_to_awaited_by == NULL || self->host == NULL) {
        return 0;
    }
    PyObject *both[] = {task, self->host};
    PyObject *result = PyObject_Vectorcall(state->add_to_awaited_by, both, 2, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* A node for a task, whether or not it is counted already. */
static int
node_add(AiotChildren *self, PyObject *task, Py_ssize_t index)
{
    aiot_state *state = self->loop->state;
    PyTypeObject *type = self->ops->indexed ? state->IndexedChildType : state->ChildType;
    AiotChild *child = (AiotChild *)type->tp_alloc(type, 0);
    if (child == NULL) {
        return -1;
    }
    if (self->ops->indexed) {
        ((AiotIndexedChild *)child)->index = index;
    }
    child->parent = (AiotChildren *)Py_NewRef((PyObject *)self);
    child->task = Py_NewRef(task);
    aiot_link_init(&child->link);
    aiot_link_append(&self->children, &child->link);
    Py_INCREF(child);
    self->n_children++;
    PyObject *args[] = {task, (PyObject *)child, self->callback_context};
    PyObject *result = PyObject_VectorcallMethod(state->str_add_done_callback, args,
                                                 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, state->kw_context);
    if (result == NULL) {
        PyObject *exc = PyErr_GetRaisedException();
        Child_clear((PyObject *)child);
        PyErr_SetRaisedException(exc);
    }
    Py_XDECREF(result);
    Py_DECREF(child);
    return result == NULL ? -1 : 0;
}

/* ---- young children ----------------------------------------------------------------------------------------- */

/* The first ones of a burst get nodes at once: a few children are not worth a sweep, and each is told in the turn and
 * in the order in which asyncio would tell. */
#define BURST_BEGINS 8

typedef struct {
    PyObject_HEAD
    AiotChildren *parent;       /* owned */
} SweepObject;

static PyObject *
sweep_new(AiotChildren *self)
{
    aiot_state *state = self->loop->state;
    SweepObject *sweep = (SweepObject *)state->SweepType->tp_alloc(state->SweepType, 0);
    if (sweep != NULL) {
        sweep->parent = (AiotChildren *)Py_NewRef((PyObject *)self);
    }
    return (PyObject *)sweep;
}

static int
ask_for_sweep(AiotChildren *self)
{
    PyObject *sweep = sweep_new(self);
    if (sweep == NULL) {
        return -1;
    }
    int failed = aiot_loop_call_soon(self->loop, sweep, NULL, self->callback_context);
    Py_DECREF(sweep);
    if (!failed) {
        self->sweeps_asked++;
        self->sweep_is_last = true;
    }
    return failed;
}

/* Room for one more. */
static int
young_reserve(AiotChildren *self)
{
    if (self->n_young < self->young_room) {
        return 0;
    }
    Py_ssize_t room = self->young_room == 0 ? 16 : self->young_room + self->young_room / 2;
    aiot_young *young = NULL;
    if ((size_t)room <= PY_SSIZE_T_MAX / sizeof(aiot_young)) {
        /* Not PyMem_Resize(), which forgets what there was when there is no memory. */
        young = PyMem_Realloc(self->young, (size_t)room * sizeof(aiot_young));
    }
    if (young == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    self->young = young;
    self->young_room = room;
    return 0;
}

/* Is the next child to be a young one? 1, 0 or -1. */
static int
begins_young(AiotChildren *self)
{
    if (self->ops->looks == 0 || (self->burst < BURST_BEGINS && self->sweeps_asked == 0)) {
        return 0;
    }
    if (self->sweeps_asked == 0) {
        /* In debug mode everything has a handle that names it, as with asyncio. */
        int debug = aiot_loop_is_debug(self->loop);
        if (debug != 0) {
            return debug < 0 ? -1 : 0;
        }
    }
    return 1;
}

static int
young_add(AiotChildren *self, PyObject *task, Py_ssize_t index)
{
    if (young_reserve(self) < 0) {
        return -1;
    }
    self->young[self->n_young++] = (aiot_young){.task = Py_NewRef(task), .index = index};
    self->n_children++;
    self->sweep_is_last = false;
    return 0;
}

/* Of one that was just added, after the loop was called: others may have come or gone meanwhile. */
static void
young_forget(AiotChildren *self, PyObject *task)
{
    for (Py_ssize_t i = self->n_young - 1; i >= 0; i--) {
        if (self->young[i].task == task) {
            self->n_young--;
            self->n_children--;
            memmove(&self->young[i], &self->young[i + 1], (size_t)(self->n_young - i) * sizeof(aiot_young));
            Py_DECREF(task);
            return;
        }
    }
}

/* An end that was found. What ended() raises is reported here, as the loop would. 0, or -1 with SystemExit or
 * KeyboardInterrupt. */
static int
tell_young(AiotChildren *self, Py_ssize_t i)
{
    PyObject *task = self->young[i].task;
    self->young[i].task = NULL;
    self->n_children--;
    Py_INCREF(task);
    int failed = tell_parent((AiotChildren *)Py_NewRef((PyObject *)self), self->young[i].index, task);
    if (failed) {
        failed = aiot_loop_report(self->loop, "Exception in the handling of the end of a child",
                                  self->loop->state->str_task, task);
    }
    Py_DECREF(task);
    return failed;
}

/* Found running, or done. As above. */
static int
look_at_young(AiotChildren *self, Py_ssize_t i)
{
    PyObject *task = Py_NewRef(self->young[i].task);
    int failed = 0;
    int done = is_done(self->loop->state, task);
    if (done > 0) {
        self->young[i].looks = AIOT_FOUND_DONE;
    }
    else if (done == 0 && ++self->young[i].looks < self->ops->looks) {
    }
    else if (done == 0 && node_add(self, task, self->young[i].index) == 0) {
        self->n_children--;
        Py_CLEAR(self->young[i].task);
    }
    else {
        /* It stays for the next sweep. */
        failed = aiot_loop_report(self->loop, "A child could not be looked at", self->loop->state->str_task, task);
    }
    Py_DECREF(task);
    return failed;
}

static int
sweep_young(AiotChildren *self)
{
    self->sweeps_asked--;
    if (self->sweeps_asked > 0 || self->n_young == 0) {
        /* The later one sees what this one would, and more. */
        return 0;
    }
    self->burst = 0;
    if (self->sweeping) {
        /* The loop is run from inside a handler; that sweep goes on when the handler returns. */
        return 0;
    }
    self->sweeping = true;
    int failed = 0;
    Py_ssize_t n = self->n_young;
    for (Py_ssize_t i = 0; i < n && i < self->n_young && !failed; i++) {
        if (self->young[i].task != NULL) {
            failed = self->young[i].looks == AIOT_FOUND_DONE ? tell_young(self, i) : look_at_young(self, i);
        }
    }
    self->sweeping = false;
    Py_ssize_t kept = 0;
    for (Py_ssize_t i = 0; i < self->n_young; i++) {
        if (self->young[i].task != NULL) {
            self->young[kept++] = self->young[i];
        }
    }
    self->n_young = kept;
    if (kept == 0) {
        PyMem_Free(self->young);
        self->young = NULL;
        self->young_room = 0;
    }
    if (kept > 0 && self->sweeps_asked == 0) {
        PyObject *exc = PyErr_GetRaisedException();
        int not_asked = ask_for_sweep(self);
        if (not_asked) {
            /* Who waits asks again, or is told that it can't be. */
            wake_quietly(self);
        }
        if (exc != NULL) {
            if (not_asked) {
                PyErr_WriteUnraisable((PyObject *)self);
            }
            PyErr_SetRaisedException(exc);
        }
        failed = failed || not_asked ? -1 : 0;
    }
    return failed;
}

/* Of a lazy parent: the done callback of its youngest child. */
static int
watch_youngest(AiotChildren *self)
{
    PyObject *sweep = sweep_new(self);
    if (sweep == NULL) {
        return -1;
    }
    aiot_state *state = self->loop->state;
    PyObject *task = Py_NewRef(self->young[self->n_young - 1].task);
    PyObject *args[] = {task, sweep, self->callback_context};
    PyObject *result = PyObject_VectorcallMethod(state->str_add_done_callback, args,
                                                 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, state->kw_context);
    Py_DECREF(task);
    Py_DECREF(sweep);
    Py_XDECREF(result);
    if (result == NULL) {
        return -1;
    }
    self->sweeps_asked++;
    return 0;
}

/* Takes a young child out and tells of its end; those behind it move up. */
static int
settle_one(AiotChildren *self, Py_ssize_t i)
{
    aiot_young ended = self->young[i];
    self->n_young--;
    self->n_children--;
    memmove(&self->young[i], &self->young[i + 1], (size_t)(self->n_young - i) * sizeof(aiot_young));
    PyObject *task = Py_NewRef(ended.task);
    int failed = tell_parent((AiotChildren *)Py_NewRef((PyObject *)self), ended.index, ended.task);
    if (failed) {
        failed = aiot_loop_report(self->loop, "Exception in the handling of the end of a child",
                                  self->loop->state->str_task, task);
    }
    Py_DECREF(task);
    return failed;
}

/* Is that one there still, and done? A done() of a user's may have settled it meanwhile. 1, 0 or -1. */
static int
young_is_done(AiotChildren *self, Py_ssize_t i)
{
    PyObject *task = Py_NewRef(self->young[i].task);
    int done = is_done(self->loop->state, task);
    if (done > 0 && (i >= self->n_young || self->young[i].task != task)) {
        done = 0;
    }
    Py_DECREF(task);
    return done;
}

int
aiot_children_settle(AiotChildren *self)
{
    for (Py_ssize_t i = self->n_young - 1; i >= 0; i--) {
        int done = i < self->n_young ? young_is_done(self, i) : 0;
        if (done < 0 || (done > 0 && settle_one(self, i) < 0)) {
            return -1;
        }
    }
    return 0;
}

/* The youngest one has ended, and perhaps others before it. */
static int
settle_youngest(AiotChildren *self)
{
    self->sweeps_asked--;
    PyObject *error = NULL;
    while (self->n_young > 0) {
        int done = young_is_done(self, self->n_young - 1);
        if (done > 0 && self->n_young > 0) {
            done = settle_one(self, self->n_young - 1) < 0 ? -1 : 1;
        }
        else if (done == 0 && self->n_young > 0 && self->sweeps_asked == 0) {
            done = watch_youngest(self);
        }
        if (done < 0) {
            Py_XSETREF(error, PyErr_GetRaisedException());
        }
        if (done <= 0) {
            break;
        }
    }
    if (error != NULL) {
        if (self->n_young > 0 && self->sweeps_asked == 0 && watch_youngest(self) < 0) {
            PyErr_WriteUnraisable((PyObject *)self);
            wake_quietly(self);
        }
        PyErr_SetRaisedException(error);
        return -1;
    }
    return 0;
}

static PyObject *
Sweep_call(PyObject *op, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    AiotChildren *parent = ((SweepObject *)op)->parent;
    ((SweepObject *)op)->parent = NULL;
    if (parent != NULL) {
        int failed = parent->ops->lazy ? settle_youngest(parent) : sweep_young(parent);
        Py_DECREF(parent);
        if (failed) {
            return NULL;
        }
    }
    Py_RETURN_NONE;
}

static int
Sweep_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((SweepObject *)op)->parent);
    return 0;
}

static int
Sweep_clear(PyObject *op)
{
    Py_CLEAR(((SweepObject *)op)->parent);
    return 0;
}

static void
Sweep_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Sweep_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot Sweep_slots[] = {
    {Py_tp_doc, "Looks which young children of a parent have ended."},
    {Py_tp_call, Sweep_call},
    {Py_tp_traverse, Sweep_traverse},
    {Py_tp_clear, Sweep_clear},
    {Py_tp_dealloc, Sweep_dealloc},
    {0, NULL},
};

static PyType_Spec Sweep_spec = {
    .name = "aiotools._aiotools.Sweep",
    .basicsize = sizeof(SweepObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Sweep_slots,
};

/* ---- spawning ----------------------------------------------------------------------------------------------- */

/* Done when create_task returned. What ended() raises is reported here, as the loop would. */
static int
end_at_once(AiotChildren *self, Py_ssize_t index, PyObject *task)
{
    if (self->ops->ended(self, index, task) < 0) {
        return aiot_loop_report(self->loop, "Exception in the handling of a child that ended at once",
                                self->loop->state->str_task, task);
    }
    return 0;
}

/* Takes a new task in. 0 or -1. */
static int
child_link(AiotChildren *self, PyObject *task, Py_ssize_t index)
{
    if (!self->ops->later) {
        int done = is_done(self->loop->state, task);
        if (done != 0) {
            return done < 0 ? -1 : end_at_once(self, index, task);
        }
    }
    int young = self->ops->lazy ? 1 : begins_young(self);
    if (young < 0 || add_awaited_by(self, task) < 0) {
        return -1;
    }
    if (young) {
        if (young_add(self, task, index) == 0) {
            if (self->ops->lazy || self->sweeps_asked > 0 || ask_for_sweep(self) == 0) {
                return 0;
            }
            young_forget(self, task);
        }
    }
    else if (node_add(self, task, index) == 0) {
        self->burst++;
        return 0;
    }
    PyObject *exc = PyErr_GetRaisedException();
    if (discard_awaited_by(self, task) < 0) {
        PyErr_Clear();
    }
    PyErr_SetRaisedException(exc);
    return -1;
}

int
aiot_children_adopt(AiotChildren *self, PyObject *task, Py_ssize_t index)
{
    return capture_context(self) < 0 ? -1 : child_link(self, task, index);
}

typedef enum {
    START_LATER,            /* as loop.create_task(coro) does */
    START_DIRECTLY,         /* Task(coro, loop=loop, eager_start=True) can stand in for it */
    START_BY_KEYWORD,       /* the loop's create_task() takes eager_start= */
    START_FAILED,           /* an exception is set */
} start_way;

#if PY_VERSION_HEX >= 0x030C0000

/* Has the loop the create_task() of asyncio or of uvloop, neither overridden nor patched? What was found for its type holds
 * until that changes, so that only the instance is looked at each time. 1, 0 or -1. */
static int
has_plain_create_task(AiotLoop *loop)
{
    aiot_state *state = loop->state;
    unsigned int version = 0;
#ifndef Py_GIL_DISABLED
    version = Py_TYPE(loop->loop)->tp_version_tag;
#endif
    int own = loop->dict == NULL ? 1 : PyDict_Contains(loop->dict, state->str_create_task);
    if (own < 0 || (own == 0 && version != 0 && version == loop->spawn_version)) {
        return own < 0 ? -1 : 1;
    }
    PyObject *method = PyObject_GetAttr(loop->loop, state->str_create_task);
    if (method == NULL) {
        return -1;
    }
    PyObject *function = PyMethod_Check(method) ? PyMethod_GET_FUNCTION(method) : method;
    /* uvloop's is compiled; what overrides it in a subclass is not. */
    bool plain = function == state->base_loop_create_task || (loop->coarse && own == 0 && !PyFunction_Check(function));
    Py_DECREF(method);
    if (plain && own == 0) {
        loop->spawn_version = version;
    }
    return plain;
}

#endif

/* A task made directly is the same as one by create_task only where that is asyncio's or uvloop's own and there is no task
 * factory. An eager start in a context that is entered raises, and hangs asyncio.run() on 3.12 and 3.13. */
static start_way
way_to_start_eagerly(AiotLoop *loop, PyObject *context)
{
#if PY_VERSION_HEX < 0x030C0000
    (void)loop;
    (void)context;
    return START_LATER;
#else
    aiot_state *state = loop->state;
    /* The step would run inside whatever is running now: only where this loop is. */
    PyObject *running = PyObject_CallNoArgs(state->maybe_running_loop);
    if (running == NULL) {
        return START_FAILED;
    }
    Py_DECREF(running);
    if (running != loop->loop) {
        return START_LATER;
    }
    if (context != NULL && PyContext_CheckExact(context)) {
        if (PyContext_Enter(context) < 0) {
            PyErr_Clear();
            return START_LATER;
        }
        if (PyContext_Exit(context) < 0) {
            return START_FAILED;
        }
    }
    int plain = has_plain_create_task(loop);
    if (plain <= 0) {
        return plain < 0 ? START_FAILED : START_LATER;
    }
    PyObject *factory = PyObject_CallMethodNoArgs(loop->loop, state->str_get_task_factory);
    if (factory == NULL) {
        return START_FAILED;
    }
    Py_DECREF(factory);
    if (factory == Py_None) {
        return START_DIRECTLY;
    }
    return !loop->coarse && PY_VERSION_HEX >= 0x030E0000 ? START_BY_KEYWORD : START_LATER;
#endif
}

/* The call that makes the task; NULL with an exception. */
static PyObject *
make_task(AiotChildren *self, PyObject *coro, PyObject *name, PyObject *context, const aiot_spawn_options *options)
{
    AiotLoop *loop = self->loop;
    aiot_state *state = loop->state;
    if (loop->loop == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Event loop is closed");
        return NULL;
    }
    Py_ssize_t n_extra = options != NULL && options->names != NULL ? PyTuple_GET_SIZE(options->names) : 0;
    start_way way = START_LATER;
    if (options != NULL && options->eager && (way = way_to_start_eagerly(loop, context)) == START_FAILED) {
        return NULL;
    }
    PyObject *eager_start = way != START_LATER ? Py_True : NULL;
#if PY_VERSION_HEX >= 0x030E0000
    if (options != NULL && options->not_eager && !loop->coarse) {
        eager_start = Py_False;
    }
#endif
    if (AIOT_LIKELY(n_extra == 0 && eager_start == NULL && (name == NULL || context == NULL))) {
        PyObject *args[] = {loop->loop, coro, name != NULL ? name : context};
        PyObject *names = name != NULL ? state->kw_name : context != NULL ? state->kw_context : NULL;
        return PyObject_VectorcallMethod(state->str_create_task, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, names);
    }
    if (n_extra == 0 && way == START_DIRECTLY && name == NULL && context == NULL) {
        PyObject *args[] = {NULL, coro, loop->loop, Py_True};
        return PyObject_Vectorcall(state->asyncio_Task, args + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                   state->kw_loop_eager_start);
    }
    if (n_extra > MAX_KEYWORDS) {
        PyErr_SetString(PyExc_TypeError, "too many keyword arguments for create_task()");
        return NULL;
    }
    PyObject *values[MAX_KEYWORDS + 6] = {loop->loop, coro};
    PyObject *keys[MAX_KEYWORDS + 4];
    Py_ssize_t n = 0;
    if (way == START_DIRECTLY) {
        keys[n] = state->str_loop;
        values[2 + n++] = loop->loop;
    }
    if (eager_start != NULL) {
        keys[n] = state->str_eager_start;
        values[2 + n++] = eager_start;
    }
    if (name != NULL) {
        keys[n] = state->str_name;
        values[2 + n++] = name;
    }
    if (context != NULL) {
        keys[n] = state->str_context;
        values[2 + n++] = context;
    }
    for (Py_ssize_t i = 0; i < n_extra; i++) {
        keys[n] = PyTuple_GET_ITEM(options->names, i);
        values[2 + n++] = options->values[i];
    }
    PyObject *names = PyTuple_New(n);
    if (names == NULL) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyTuple_SET_ITEM(names, i, Py_NewRef(keys[i]));
    }
    PyObject *task;
    if (way == START_DIRECTLY) {
        task = PyObject_Vectorcall(state->asyncio_Task, values + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, names);
    }
    else {
        task = PyObject_VectorcallMethod(state->str_create_task, values, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, names);
    }
    Py_DECREF(names);
    return task;
}

PyObject *
aiot_children_spawn(AiotChildren *self, PyObject *coro, PyObject *name, PyObject *context,
                    const aiot_spawn_options *options)
{
    PyObject *task = capture_context(self) < 0 ? NULL : make_task(self, coro, name, context, options);
    if (task == NULL) {
        aiot_close_coroutine(self->loop->state, coro);
        return NULL;
    }
    if (child_link(self, task, options != NULL ? options->index : 0) < 0) {
        /* Nobody would notice its end. */
        PyObject *exc = PyErr_GetRaisedException();
        PyObject *result = PyObject_CallMethodNoArgs(task, self->loop->state->str_cancel);
        if (result == NULL) {
            PyErr_WriteUnraisable(task);
        }
        Py_XDECREF(result);
        Py_DECREF(task);
        PyErr_SetRaisedException(exc);
        return NULL;
    }
    return task;
}

/* ---- waiting ------------------------------------------------------------------------------------------------ */

PySendResult
aiot_join(AiotChildren *self, aiot_joiner *joiner, PyObject **result)
{
    assert(aiot_link_is_out(&joiner->link));
    if (self->ops->lazy) {
        if (self->n_young > 0 && self->sweeps_asked == 0 && watch_youngest(self) < 0) {
            return PYGEN_ERROR;
        }
    }
    else if (self->n_young > 0 && (!self->sweep_is_last || self->sweeps_asked == 0) && ask_for_sweep(self) < 0) {
        return PYGEN_ERROR;
    }
    AiotWaiter *waiter = aiot_waiter_new(self->loop, AIOT_PENDING);
    if (waiter == NULL) {
        return PYGEN_ERROR;
    }
    Py_XSETREF(joiner->waiter, waiter);
    aiot_link_append(&self->joiners, &joiner->link);
    *result = aiot_waiter_yield(waiter);
    return PYGEN_NEXT;
}

PySendResult
aiot_join_checkpoint(AiotLoop *loop, aiot_joiner *joiner, PyObject **result)
{
    AiotWaiter *waiter = aiot_waiter_new(loop, AIOT_WOKEN);
    if (waiter == NULL) {
        return PYGEN_ERROR;
    }
    Py_XSETREF(joiner->waiter, waiter);
    *result = aiot_waiter_yield(waiter);
    return PYGEN_NEXT;
}

int
aiot_joiner_resumed(aiot_joiner *joiner)
{
    int failed = aiot_waiter_check_resumed(joiner->waiter);
    aiot_joiner_leave(joiner);
    return failed;
}

void
aiot_joiner_leave(aiot_joiner *joiner)
{
    if (joiner->link.next != NULL) {
        aiot_link_remove(&joiner->link);
    }
    AiotWaiter *waiter = joiner->waiter;
    joiner->waiter = NULL;
    Py_XDECREF(waiter);
}

/* ---- the types ---------------------------------------------------------------------------------------------- */

static int
optional_import(const char *name, PyObject **field)
{
    PyObject *asyncio = PyImport_ImportModule("asyncio");
    PyObject *key = PyUnicode_FromString(name);
    int found = asyncio == NULL || key == NULL ? -1 : PyObject_GetOptionalAttr(asyncio, key, field);
    Py_XDECREF(asyncio);
    Py_XDECREF(key);
    return found < 0 ? -1 : 0;
}

int
aiot_children_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->kw_name = PyTuple_Pack(1, state->str_name)) == NULL
        || (state->kw_loop_eager_start = PyTuple_Pack(2, state->str_loop, state->str_eager_start)) == NULL
        || optional_import("future_add_to_awaited_by", &state->add_to_awaited_by) < 0
        || optional_import("future_discard_from_awaited_by", &state->discard_from_awaited_by) < 0
        || aiot_add_type(module, &state->ChildType, &Child_spec, NULL, false) < 0
        || aiot_add_type(module, &state->IndexedChildType, &IndexedChild_spec, NULL, false) < 0
        || aiot_add_type(module, &state->SweepType, &Sweep_spec, NULL, false) < 0)
    {
        return -1;
    }
    return 0;
}
