/* clockwatch.c: watchers of dictionaries and types.
 *
 * Locking:    the counter is atomic; all else belongs to the interpreter.
 * Re-entry:   the callbacks run in the middle of somebody's assignment, perhaps with an exception set: they only count.
 */
#include "clockwatch.h"

#if defined(_MSC_VER)
#  include <intrin.h>
#endif

uint32_t aiot_clock_changes = 1;

#if AIOT_WATCHERS

static void
count_change(void)
{
    /* After four billion of them 0 comes round, which nobody may have seen. */
    do {
#if defined(_MSC_VER)
        _InterlockedIncrement((volatile long *)&aiot_clock_changes);
#else
        __atomic_add_fetch(&aiot_clock_changes, 1, __ATOMIC_RELAXED);
#endif
    } while (aiot_clock_epoch() == 0);
}

static int
dict_changed(PyDict_WatchEvent event, PyObject *Py_UNUSED(dict), PyObject *key, PyObject *Py_UNUSED(value))
{
    if (event != PyDict_EVENT_DEALLOCATED
        && (key == NULL || !PyUnicode_Check(key) || PyUnicode_CompareWithASCIIString(key, "monotonic") == 0))
    {
        count_change();
    }
    return 0;
}

static int
type_changed(PyTypeObject *Py_UNUSED(type))
{
    count_change();
    return 0;
}

void
aiot_clock_watch_init(aiot_state *state)
{
    state->dict_watcher = PyDict_AddWatcher(dict_changed);
    state->type_watcher = state->dict_watcher < 0 ? -1 : PyType_AddWatcher(type_changed);
    if (state->type_watcher < 0 || PyDict_Watch(state->dict_watcher, state->time_module_dict) < 0) {
        PyErr_Clear();
        aiot_clock_watch_fini(state);
    }
    state->has_watchers = state->type_watcher >= 0;
}

void
aiot_clock_watch_fini(aiot_state *state)
{
    if (state->dict_watcher >= 0) {
        if ((state->has_watchers && PyDict_Unwatch(state->dict_watcher, state->time_module_dict) < 0)
            || PyDict_ClearWatcher(state->dict_watcher) < 0)
        {
            PyErr_Clear();
        }
    }
    if (state->type_watcher >= 0 && PyType_ClearWatcher(state->type_watcher) < 0) {
        PyErr_Clear();
    }
    state->dict_watcher = state->type_watcher = -1;
    state->has_watchers = false;
}

bool
aiot_clock_watch_type(aiot_state *state, PyTypeObject *type)
{
    if (!state->has_watchers) {
        return false;
    }
    if (PyType_Watch(state->type_watcher, (PyObject *)type) < 0) {
        PyErr_Clear();
        return false;
    }
    return PyUnstable_Type_AssignVersionTag(type) != 0;
}

#else

void
aiot_clock_watch_init(aiot_state *Py_UNUSED(state))
{
}

void
aiot_clock_watch_fini(aiot_state *Py_UNUSED(state))
{
}

bool
aiot_clock_watch_type(aiot_state *Py_UNUSED(state), PyTypeObject *Py_UNUSED(type))
{
    return false;
}

#endif
