/* module.c: start-up of aiotools._aiotools, and nothing else. Multi-phase, one state per interpreter. */

#include "awaitable.h"
#include "barrier.h"
#include "cancel.h"
#include "children.h"
#include "clock.h"
#include "clockwatch.h"
#include "closing.h"
#include "collect.h"
#include "ctxgroup.h"
#include "ctxmgr.h"
#include "freelist.h"
#include "loopstate.h"
#include "lrucache.h"
#include "orphan.h"
#include "page.h"
#include "queue.h"
#include "resetting.h"
#include "scope.h"
#include "shield.h"
#include "sleep.h"
#include "timer.h"
#include "timeout.h"
#include "waiter.h"
#include "watchdog.h"

#include <string.h>

int
aiot_add_type(PyObject *module, PyTypeObject **field, PyType_Spec *spec, PyObject *bases, bool is_public)
{
    *field = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, bases);
    if (*field == NULL) {
        return -1;
    }
    return is_public ? PyModule_AddType(module, *field) : 0;
}

/* "a.b" of a module, by attribute. */
static PyObject *
import_attribute(const char *module_name, const char *path)
{
    PyObject *obj = PyImport_ImportModule(module_name);
    while (obj != NULL && path != NULL) {
        const char *dot = strchr(path, '.');
        PyObject *name = dot == NULL ? PyUnicode_FromString(path) : PyUnicode_FromStringAndSize(path, dot - path);
        PyObject *next = name == NULL ? NULL : PyObject_GetAttr(obj, name);
        Py_XDECREF(name);
        Py_DECREF(obj);
        obj = next;
        path = dot == NULL ? NULL : dot + 1;
    }
    return obj;
}

static int
fill_state(aiot_state *state)
{
#define V(name)                                                             \
    if ((state->str_##name = PyUnicode_InternFromString(#name)) == NULL) {  \
        return -1;                                                          \
    }
    AIOT_STRINGS(V)
#undef V
#define V(name, module, attribute)                                          \
    if ((state->name = import_attribute(module, attribute)) == NULL) {      \
        return -1;                                                          \
    }
    AIOT_IMPORTS(V)
#undef V
    if ((state->kw_context = PyTuple_Pack(1, state->str_context)) == NULL) {
        return -1;
    }
    /* All that a future asks its loop for is whether it is in debug mode. */
    PyObject *kwnames = PyTuple_Pack(1, state->str_get_debug);
    if (kwnames == NULL) {
        return -1;
    }
    PyObject *args[] = {(PyObject *)&PyBool_Type};
    state->no_loop = PyObject_Vectorcall(state->SimpleNamespace, args, 0, kwnames);
    Py_DECREF(kwnames);
    if (state->no_loop == NULL) {
        return -1;
    }
    aiot_clock_watch_init(state);
    return 0;
}

PyDoc_STRVAR(loop_counts_doc,
"_loop_counts($module, loop, /)\n--\n\n"
"(deadlines that are set, wake-ups that have not run) on a loop; for tests.");

static PyObject *
module_loop_counts(PyObject *module, PyObject *loop)
{
    AiotLoop *found = aiot_loop_get(aiot_state_of_module(module), loop);
    if (found == NULL) {
        return NULL;
    }
    PyObject *counts = Py_BuildValue("nK", (Py_ssize_t)aiot_heap_len(&found->alarms),
                                     (unsigned long long)(found->ready_pushed - found->ready_popped));
    Py_DECREF(found);
    return counts;
}

static PyMethodDef module_functions[] = {
    {"_loop_counts", module_loop_counts, METH_O, loop_counts_doc},
    {NULL, NULL, 0, NULL},
};

static int
module_exec(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (fill_state(state) < 0
        || aiot_awaitable_add_types(module) < 0
        || aiot_loopstate_add_types(module) < 0
        || aiot_barrier_add_types(module) < 0
        || aiot_clock_add_types(module) < 0
        || aiot_waiter_add_types(module) < 0
        || aiot_sleep_add_types(module) < 0
        || aiot_timeout_add_types(module) < 0
        || aiot_ctxmgr_add_types(module) < 0
        || aiot_ctxgroup_add_types(module) < 0
        || aiot_resetting_add_types(module) < 0
        || aiot_closing_add_types(module) < 0
        || aiot_orphan_add_functions(module) < 0
        || aiot_page_add_functions(module) < 0
        || aiot_watchdog_add_types(module) < 0
        || aiot_shield_add_types(module) < 0
        || aiot_children_add_types(module) < 0
        || aiot_cancel_add_types(module) < 0
        || aiot_scope_add_types(module) < 0
        || aiot_queue_add_types(module) < 0
        || aiot_timer_add_types(module) < 0
        || aiot_collect_add_types(module) < 0
        || aiot_lrucache_add_types(module) < 0)
    {
        return -1;
    }
    return 0;
}

static void
empty_free_lists(aiot_state *state)
{
    state->no_free_lists = true;
#define V(name) aiot_free_list_clear(&state->free_##name);
    AIOT_FREE_LISTS(V)
#undef V
}

/* Strings and imports are no part of any cycle with us; they stay until the module is freed, so that what the
 * collector finalizes after module_clear still finds them. */
static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    aiot_state *state = aiot_state_of_module(module);
#define V(name) Py_VISIT(state->name);
    AIOT_TYPES(V)
    AIOT_OBJECTS(V)
#undef V
    return 0;
}

static int
module_clear(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    empty_free_lists(state);
#define V(name) Py_CLEAR(state->name);
    AIOT_TYPES(V)
    AIOT_OBJECTS(V)
#undef V
    return 0;
}

static void
module_free(void *module)
{
    aiot_state *state = aiot_state_of_module((PyObject *)module);
    module_clear((PyObject *)module);
    if (state->has_watchers) {
        aiot_clock_watch_fini(state);
    }
#define V(name, module, attribute) Py_CLEAR(state->name);
    AIOT_IMPORTS(V)
#undef V
#define V(name) Py_CLEAR(state->str_##name);
    AIOT_STRINGS(V)
#undef V
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

struct PyModuleDef aiot_module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "aiotools._aiotools",
    .m_doc = "The core of aiotools. Use the names that the package `aiotools` exports.",
    .m_size = sizeof(aiot_state),
    .m_methods = module_functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__aiotools(void)
{
    return PyModuleDef_Init(&aiot_module_def);
}
