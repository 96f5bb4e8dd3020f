/* closing.c: closing_async, which awaits the close() of a thing at the end of a block.
 *
 * States:     none: `thing` may be entered, left and replaced at any time.
 * Locking:    `thing` belongs to the object's critical section, the fields of the awaitable to its own.
 * Re-entry:   close() and what it returns are the user's; nothing is read from before them.
 */

#include "closing.h"

#include "args.h"
#include "awaitable.h"
#include "drive.h"

typedef struct {
    PyObject_HEAD
    PyObject *thing;
    PyObject *weakrefs;
} ClosingObject;

/* What __aexit__ returns. */
typedef struct {
    AIOT_AWAITABLE_HEAD
    ClosingObject *owner;
    PyObject *inner;            /* the iterator of what close() returned */
} ClosingExitObject;

static PyObject *
closing_get_thing(ClosingObject *self)
{
    PyObject *thing;
    Py_BEGIN_CRITICAL_SECTION(self);
    thing = Py_XNewRef(self->thing);
    Py_END_CRITICAL_SECTION();
    if (thing == NULL) {
        PyErr_Format(PyExc_AttributeError, "'%.200s' object has no attribute 'thing'", Py_TYPE(self)->tp_name);
    }
    return thing;
}

/* ---- the awaitable ---------------------------------------------------------------------------------------- */

/* What close() gives is of no interest, and nothing is suppressed. */
static PySendResult
exit_answer(ClosingExitObject *self, PySendResult answer, PyObject **result)
{
    if (answer == PYGEN_RETURN) {
        Py_SETREF(*result, Py_NewRef(Py_None));
    }
    if (answer != PYGEN_NEXT) {
        PyObject *exc = PyErr_GetRaisedException();
        Py_CLEAR(self->inner);
        Py_CLEAR(self->owner);
        if (exc != NULL) {
            PyErr_SetRaisedException(exc);
        }
    }
    return answer;
}

static PySendResult
ClosingExit_start(aiot_awaitable *op, PyObject **result)
{
    ClosingExitObject *self = (ClosingExitObject *)op;
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    PySendResult answer = PYGEN_ERROR;
    PyObject *thing = NULL, *awaitable = NULL;
    if ((thing = closing_get_thing(self->owner)) != NULL
        && (awaitable = PyObject_CallMethodNoArgs(thing, state->str_close)) != NULL
        && (self->inner = aiot_await_iter(state, awaitable)) != NULL)
    {
        answer = PyIter_Send(self->inner, Py_None, result);
    }
    Py_XDECREF(thing);
    Py_XDECREF(awaitable);
    return exit_answer(self, answer, result);
}

static PySendResult
ClosingExit_resume(aiot_awaitable *op, PyObject *value, PyObject **result)
{
    ClosingExitObject *self = (ClosingExitObject *)op;
    return exit_answer(self, PyIter_Send(self->inner, value, result), result);
}

static PySendResult
ClosingExit_throw(aiot_awaitable *op, PyObject *exc, PyObject **result)
{
    ClosingExitObject *self = (ClosingExitObject *)op;
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    return exit_answer(self, aiot_iter_throw(state, self->inner, exc, result), result);
}

static const aiot_awaitable_ops exit_ops = {
    .name = "closing_async.__aexit__",
    .start = ClosingExit_start,
    .resume = ClosingExit_resume,
    .throw = ClosingExit_throw,
};

static int
ClosingExit_traverse(PyObject *op, visitproc visit, void *arg)
{
    ClosingExitObject *self = (ClosingExitObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->owner);
    Py_VISIT(self->inner);
    return 0;
}

static int
ClosingExit_clear(PyObject *op)
{
    ClosingExitObject *self = (ClosingExitObject *)op;
    Py_CLEAR(self->owner);
    Py_CLEAR(self->inner);
    return 0;
}

static void
ClosingExit_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, ClosingExit_dealloc)
    ClosingExit_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
    AIOT_TRASHCAN_END
}

static PyType_Slot ClosingExit_slots[] = {
    {Py_tp_doc, "What __aexit__() of closing_async returns: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, ClosingExit_traverse},
    {Py_tp_clear, ClosingExit_clear},
    {Py_tp_dealloc, ClosingExit_dealloc},
    {0, NULL},
};

static PyType_Spec ClosingExit_spec = {
    .name = "aiotools._aiotools.ClosingExit",
    .basicsize = sizeof(ClosingExitObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ClosingExit_slots,
};

/* ---- closing_async ---------------------------------------------------------------------------------------- */

PyDoc_STRVAR(Closing_aenter_doc, "__aenter__($self, /)\n--\n\nAwait it for the thing.");

static PyObject *
Closing_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    PyObject *thing = state == NULL ? NULL : closing_get_thing((ClosingObject *)op);
    if (thing == NULL) {
        return NULL;
    }
    PyObject *done = aiot_done_new(state, thing);
    Py_DECREF(thing);
    return done;
}

PyDoc_STRVAR(Closing_aexit_doc,
"__aexit__($self, /, *exc_info)\n--\n\n"
"Await thing.close(); await it. Raises what that raises, suppresses nothing.");

static PyObject *
Closing_aexit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    if (state == NULL) {
        return NULL;
    }
    ClosingExitObject *self = (ClosingExitObject *)state->ClosingExitType->tp_alloc(state->ClosingExitType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, &exit_ops);
        self->owner = (ClosingObject *)Py_NewRef(op);
    }
    return (PyObject *)self;
}

static int
Closing_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {"closing_async", 1, 1, 1, {AIOT_NAME(thing)}};
    ClosingObject *self = (ClosingObject *)op;
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    PyObject *thing, *old;
    if (state == NULL || aiot_bind_tuple(state, &params, args, kwargs, &thing) < 0) {
        return -1;
    }
    Py_BEGIN_CRITICAL_SECTION(op);
    old = self->thing;
    self->thing = Py_NewRef(thing);
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(old);
    return 0;
}

static int
Closing_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((ClosingObject *)op)->thing);
    return 0;
}

static int
Closing_clear(PyObject *op)
{
    Py_CLEAR(((ClosingObject *)op)->thing);
    return 0;
}

static void
Closing_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, Closing_dealloc)
    if (((ClosingObject *)op)->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Closing_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
    AIOT_TRASHCAN_END
}

static PyMethodDef Closing_methods[] = {
    {"__aenter__", Closing_aenter, METH_NOARGS, Closing_aenter_doc},
    {"__aexit__", (PyCFunction)(void (*)(void))Closing_aexit, METH_FASTCALL, Closing_aexit_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "closing_async[T]: of a T, for annotations."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Closing_members[] = {
    {"thing", Py_T_OBJECT_EX, offsetof(ClosingObject, thing), 0, "What will be closed."},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(ClosingObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(Closing_doc,
"closing_async(thing)\n--\n\n"
"Await thing.close() at the end of an `async with` block.\n\n"
"The block gets thing itself. close() is called and awaited whether or not the\n"
"block raised; what it raises is raised, and no exception is suppressed.\n\n"
"The twin of contextlib.closing and contextlib.aclosing for things with an\n"
"asynchronous close().");

static PyType_Slot Closing_slots[] = {
    {Py_tp_doc, (void *)Closing_doc},
    {Py_tp_init, Closing_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_methods, Closing_methods},
    {Py_tp_members, Closing_members},
    {Py_tp_traverse, Closing_traverse},
    {Py_tp_clear, Closing_clear},
    {Py_tp_dealloc, Closing_dealloc},
    {0, NULL},
};

static PyType_Spec Closing_spec = {
    .name = "aiotools.context.closing_async",
    .basicsize = sizeof(ClosingObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = Closing_slots,
};

int
aiot_closing_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->ClosingExitType, &ClosingExit_spec, NULL, false) < 0
        || aiot_add_type(module, &state->ClosingType, &Closing_spec, NULL, true) < 0)
    {
        return -1;
    }
    return 0;
}
