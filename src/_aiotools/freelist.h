/* freelist.h: memory of garbage-collected objects of one type, kept for reuse.
 *
 * Each use says what it gains; see AIOT_FREELISTS in compat.h for when there are none. Only for exact types of fixed
 * size. The lists belong to the module state (AIOT_FREE_LISTS in state.h) and are emptied when the module goes.
 */
#ifndef AIOT_FREELIST_H
#define AIOT_FREELIST_H

#include "state.h"

#include <string.h>

/* A new zeroed object, tracked by the collector; NULL with MemoryError. */
static inline PyObject *
aiot_free_list_alloc(aiot_free_list *list, PyTypeObject *type)
{
#if AIOT_FREELISTS
    if (list->n > 0) {
        PyObject *op = list->kept[--list->n];
        memset((char *)op + sizeof(PyObject), 0, (size_t)type->tp_basicsize - sizeof(PyObject));
        Py_SET_REFCNT(op, 1);       /* its type is in place */
        Py_INCREF(type);
        PyObject_GC_Track(op);
        return op;
    }
#else
    (void)list;
#endif
    return type->tp_alloc(type, 0);
}

/* The end of a dealloc: frees op, which is untracked and cleared, and its reference to the type. state is NULL once the
 * collector took the type apart. What was finalized is not kept: it would not be finalized again. */
static inline void
aiot_free_list_free(aiot_state *state, aiot_free_list *list, PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
#if AIOT_FREELISTS
    if (state != NULL && !state->no_free_lists && list->n < (int)Py_ARRAY_LENGTH(list->kept)
        && (type->tp_finalize == NULL || !PyObject_GC_IsFinalized(op)))
    {
        list->kept[list->n++] = op;
        Py_DECREF(type);
        return;
    }
#else
    (void)state;
    (void)list;
#endif
    type->tp_free(op);
    Py_DECREF(type);
}

static inline void
aiot_free_list_clear(aiot_free_list *list)
{
#if AIOT_FREELISTS
    while (list->n > 0) {
        PyObject_GC_Del(list->kept[--list->n]);
    }
#else
    (void)list;
#endif
}

/* For tp_dealloc: the state of an exact type, NULL once the collector took the type apart. Keeps the exception that may
 * be on its way. */
static inline aiot_state *
aiot_state_for_dealloc(PyTypeObject *type)
{
    PyObject *exc = AIOT_UNLIKELY(PyErr_Occurred() != NULL) ? PyErr_GetRaisedException() : NULL;
    aiot_state *state = (aiot_state *)PyType_GetModuleState(type);
    if (AIOT_UNLIKELY(state == NULL)) {
        PyErr_Clear();
    }
    if (AIOT_UNLIKELY(exc != NULL)) {
        PyErr_SetRaisedException(exc);
    }
    return state;
}

#endif /* AIOT_FREELIST_H */
