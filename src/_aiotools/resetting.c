/* resetting.c: a context variable that has a value for the time of a block.
 *
 * States:     left (token is NULL) -> entered (token) -> left; it may be entered again after that.
 * Locking:    token belongs to the object's critical section; ctxvar and value never change.
 * Re-entry:   the last reference to the token or to an old value may run anything; fields are set before.
 */

#include "resetting.h"

#include "args.h"
#include "awaitable.h"

typedef struct {
    PyObject_HEAD
    PyObject *ctxvar;
    PyObject *value;
    PyObject *token;
    PyObject *weakrefs;
} ResettingObject;

/* What __aenter__ and __aexit__ return: nothing happens before it is awaited, as with a coroutine. */
typedef struct {
    AIOT_AWAITABLE_HEAD
    ResettingObject *owner;
} ResettingStepObject;

static int
resetting_enter(ResettingObject *self)
{
    if (self->ctxvar == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "resetting() is not initialized");
        return -1;
    }
    PyObject *token = PyContextVar_Set(self->ctxvar, self->value);
    if (token == NULL) {
        return -1;
    }
    bool entered;
    Py_BEGIN_CRITICAL_SECTION(self);
    entered = self->token != NULL;
    if (!entered) {
        self->token = token;
    }
    Py_END_CRITICAL_SECTION();
    if (!entered) {
        return 0;
    }
    int failed = PyContextVar_Reset(self->ctxvar, token);
    Py_DECREF(token);
    if (!failed) {
        PyErr_SetString(PyExc_RuntimeError, "resetting() was entered and not left yet; it cannot be nested in itself");
    }
    return -1;
}

static int
resetting_exit(ResettingObject *self)
{
    PyObject *token;
    Py_BEGIN_CRITICAL_SECTION(self);
    token = self->token;
    self->token = NULL;
    Py_END_CRITICAL_SECTION();
    if (token == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "resetting() was not entered");
        return -1;
    }
    int failed = PyContextVar_Reset(self->ctxvar, token);
    if (failed) {
        /* Another context: it can still be left in the right one. */
        PyObject *exc = PyErr_GetRaisedException();
        Py_BEGIN_CRITICAL_SECTION(self);
        if (self->token == NULL) {
            self->token = token;
            token = NULL;
        }
        Py_END_CRITICAL_SECTION();
        Py_XDECREF(token);
        PyErr_SetRaisedException(exc);
        return -1;
    }
    Py_DECREF(token);
    return 0;
}

/* ---- the awaitable ---------------------------------------------------------------------------------------- */

static PySendResult
step_done(ResettingStepObject *self, int failed, PyObject **result)
{
    if (failed) {
        return PYGEN_ERROR;
    }
    Py_CLEAR(self->owner);
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static PySendResult
ResettingStep_enter(aiot_awaitable *op, PyObject **result)
{
    ResettingStepObject *self = (ResettingStepObject *)op;
    return step_done(self, resetting_enter(self->owner), result);
}

static PySendResult
ResettingStep_exit(aiot_awaitable *op, PyObject **result)
{
    ResettingStepObject *self = (ResettingStepObject *)op;
    return step_done(self, resetting_exit(self->owner), result);
}

static const aiot_awaitable_ops enter_ops = {.name = "resetting.__aenter__", .start = ResettingStep_enter};
static const aiot_awaitable_ops exit_ops = {.name = "resetting.__aexit__", .start = ResettingStep_exit};

static PyObject *
step_new(PyObject *owner, const aiot_awaitable_ops *ops)
{
    aiot_state *state = aiot_state_of_type(Py_TYPE(owner));
    if (state == NULL) {
        return NULL;
    }
    ResettingStepObject *self = (ResettingStepObject *)state->ResettingStepType->tp_alloc(state->ResettingStepType, 0);
    if (self != NULL) {
        aiot_awaitable_init(self, ops);
        self->owner = (ResettingObject *)Py_NewRef(owner);
    }
    return (PyObject *)self;
}

static int
ResettingStep_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((ResettingStepObject *)op)->owner);
    return 0;
}

static int
ResettingStep_clear(PyObject *op)
{
    Py_CLEAR(((ResettingStepObject *)op)->owner);
    return 0;
}

static void
ResettingStep_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    if (((aiot_awaitable *)op)->phase != AIOT_FINISHED && PyObject_CallFinalizerFromDealloc(op) < 0) {
        return;
    }
    PyObject_GC_UnTrack(op);
    ResettingStep_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot ResettingStep_slots[] = {
    {Py_tp_doc, "What __aenter__() and __aexit__() of resetting return: await it, once."},
    AIOT_AWAITABLE_SLOTS,
    {Py_tp_traverse, ResettingStep_traverse},
    {Py_tp_clear, ResettingStep_clear},
    {Py_tp_dealloc, ResettingStep_dealloc},
    {0, NULL},
};

static PyType_Spec ResettingStep_spec = {
    .name = "aiotools._aiotools.ResettingStep",
    .basicsize = sizeof(ResettingStepObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ResettingStep_slots,
};

/* ---- resetting -------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(Resetting_enter_doc,
"__enter__($self, /)\n--\n\n"
"Set the variable. Raises RuntimeError when this was entered and not left.");

static PyObject *
Resetting_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return resetting_enter((ResettingObject *)op) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(Resetting_exit_doc,
"__exit__($self, /, *exc_info)\n--\n\n"
"Give the variable the value that it had, or none.\n\n"
"Raises RuntimeError when this was not entered, ValueError in another context.");

static PyObject *
Resetting_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return resetting_exit((ResettingObject *)op) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(Resetting_aenter_doc, "__aenter__($self, /)\n--\n\nAs __enter__; await it.");

static PyObject *
Resetting_aenter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return step_new(op, &enter_ops);
}

PyDoc_STRVAR(Resetting_aexit_doc, "__aexit__($self, /, *exc_info)\n--\n\nAs __exit__; await it.");

static PyObject *
Resetting_aexit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return step_new(op, &exit_ops);
}

static int
Resetting_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {"resetting", 2, 2, 2, {AIOT_NAME(ctxvar), AIOT_NAME(value)}};
    ResettingObject *self = (ResettingObject *)op;
    aiot_state *state = aiot_state_of_type(Py_TYPE(op));
    PyObject *given[2];
    if (state == NULL || aiot_bind_tuple(state, &params, args, kwargs, given) < 0) {
        return -1;
    }
    if (!PyContextVar_CheckExact(given[0])) {
        PyErr_Format(PyExc_TypeError, "resetting() needs a ContextVar, not '%.200s'", Py_TYPE(given[0])->tp_name);
        return -1;
    }
    if (self->ctxvar != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "resetting() is initialized already");
        return -1;
    }
    self->value = Py_NewRef(given[1]);
    self->ctxvar = Py_NewRef(given[0]);
    return 0;
}

static int
Resetting_traverse(PyObject *op, visitproc visit, void *arg)
{
    ResettingObject *self = (ResettingObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->ctxvar);
    Py_VISIT(self->value);
    Py_VISIT(self->token);
    return 0;
}

static int
Resetting_clear(PyObject *op)
{
    ResettingObject *self = (ResettingObject *)op;
    Py_CLEAR(self->ctxvar);
    Py_CLEAR(self->value);
    Py_CLEAR(self->token);
    return 0;
}

static void
Resetting_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    AIOT_TRASHCAN_BEGIN(op, Resetting_dealloc)
    if (((ResettingObject *)op)->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Resetting_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
    AIOT_TRASHCAN_END
}

static PyMethodDef Resetting_methods[] = {
    {"__enter__", Resetting_enter, METH_NOARGS, Resetting_enter_doc},
    {"__exit__", (PyCFunction)(void (*)(void))Resetting_exit, METH_FASTCALL, Resetting_exit_doc},
    {"__aenter__", Resetting_aenter, METH_NOARGS, Resetting_aenter_doc},
    {"__aexit__", (PyCFunction)(void (*)(void))Resetting_aexit, METH_FASTCALL, Resetting_aexit_doc},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "resetting[T]: of a T, for annotations."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Resetting_members[] = {
    {"ctxvar", Py_T_OBJECT_EX, offsetof(ResettingObject, ctxvar), Py_READONLY, "The context variable."},
    {"value", Py_T_OBJECT_EX, offsetof(ResettingObject, value), Py_READONLY, "The value that it has in the block."},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(ResettingObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(Resetting_doc,
"resetting(ctxvar, value)\n--\n\n"
"Set a context variable for the time of a `with` or `async with` block.\n\n"
"ctxvar is a contextvars.ContextVar, value what it is set to. The block gets\n"
"None. At its end the variable has the value that it had before, or none.\n"
"Exceptions are never suppressed. An object may be used again after the block,\n"
"but not inside it, and has to be left in the contextvars.Context in which it was\n"
"entered.\n\n"
"Raises TypeError when ctxvar is no ContextVar. From Python 3.14 on the token of\n"
"ContextVar.set() can be used in the same way.");

static PyType_Slot Resetting_slots[] = {
    {Py_tp_doc, (void *)Resetting_doc},
    {Py_tp_init, Resetting_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_methods, Resetting_methods},
    {Py_tp_members, Resetting_members},
    {Py_tp_traverse, Resetting_traverse},
    {Py_tp_clear, Resetting_clear},
    {Py_tp_dealloc, Resetting_dealloc},
    {0, NULL},
};

static PyType_Spec Resetting_spec = {
    .name = "aiotools.context.resetting",
    .basicsize = sizeof(ResettingObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    .slots = Resetting_slots,
};

int
aiot_resetting_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_add_type(module, &state->ResettingStepType, &ResettingStep_spec, NULL, false) < 0
        || aiot_add_type(module, &state->ResettingType, &Resetting_spec, NULL, true) < 0)
    {
        return -1;
    }
    return 0;
}
