/* compat.h: what differs between the CPython versions and compilers that we build for.
 *
 * Each entry names the version from which it is needless.
 */
#ifndef AIOT_COMPAT_H
#define AIOT_COMPAT_H

#ifndef PY_SSIZE_T_CLEAN
#  define PY_SSIZE_T_CLEAN
#endif
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if PY_VERSION_HEX < 0x030B0000
#  error "aiotools needs CPython 3.11 or newer"
#endif

#if defined(_MSC_VER)
#  define AIOT_THREAD_LOCAL __declspec(thread)
#  define AIOT_NOINLINE __declspec(noinline)
#  define AIOT_LIKELY(x) (x)
#  define AIOT_UNLIKELY(x) (x)
#else
#  define AIOT_THREAD_LOCAL _Thread_local
#  define AIOT_NOINLINE __attribute__((noinline))
#  define AIOT_LIKELY(x) __builtin_expect(!!(x), 1)
#  define AIOT_UNLIKELY(x) __builtin_expect(!!(x), 0)
#endif

/* Debug builds of the extension check invariants after each change of state. */
#ifdef AIOT_DEBUG
#  undef NDEBUG
#  include <assert.h>
#  define AIOT_CHECK(expr) assert(expr)
#else
#  include <assert.h>
#  define AIOT_CHECK(expr) ((void)0)
#endif

/* Free lists save a third of a small allocation; they hide memory errors from the sanitizers, and without
 * the GIL they would need a lock that costs what they save. */
#if !defined(Py_GIL_DISABLED) && !defined(AIOT_NO_FREELISTS) && !defined(Py_DEBUG)
#  define AIOT_FREELISTS 1
#else
#  define AIOT_FREELISTS 0
#endif

/* 3.13: critical sections and mutexes are public; with the GIL both are no-ops for us, since nothing that we
 * do while we hold them gives the GIL away. */
#if PY_VERSION_HEX < 0x030D0000
#  define Py_BEGIN_CRITICAL_SECTION(op) {
#  define Py_END_CRITICAL_SECTION() }
#  define Py_BEGIN_CRITICAL_SECTION2(a, b) {
#  define Py_END_CRITICAL_SECTION2() }
#endif

typedef struct {
#ifdef Py_GIL_DISABLED
    PyMutex mutex;
#else
    char unused;
#endif
} aiot_mutex;

static inline void
aiot_mutex_lock(aiot_mutex *m)
{
#ifdef Py_GIL_DISABLED
    PyMutex_Lock(&m->mutex);
#else
    (void)m;
#endif
}

static inline void
aiot_mutex_unlock(aiot_mutex *m)
{
#ifdef Py_GIL_DISABLED
    PyMutex_Unlock(&m->mutex);
#else
    (void)m;
#endif
}

/* A counter that several threads may bump; with the GIL a plain one will do. */
static inline uint64_t
aiot_atomic_load(const uint64_t *p)
{
#if defined(Py_GIL_DISABLED) && !defined(_MSC_VER)
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
    return *(const volatile uint64_t *)p;
#endif
}

static inline void
aiot_atomic_store(uint64_t *p, uint64_t value)
{
#if defined(Py_GIL_DISABLED) && !defined(_MSC_VER)
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
#else
    *(volatile uint64_t *)p = value;
#endif
}

static inline void
aiot_atomic_increment(uint64_t *p)
{
#if defined(Py_GIL_DISABLED) && !defined(_MSC_VER)
    __atomic_add_fetch(p, 1, __ATOMIC_ACQ_REL);
#else
    *(volatile uint64_t *)p = *p + 1;
#endif
}

/* 3.14: all objects of the collector are freed without deep recursion. Before, the dealloc of what holds objects of a user
 * sees to it itself, after untracking. */
#if PY_VERSION_HEX < 0x030E0000
#  define AIOT_TRASHCAN_BEGIN(op, dealloc) Py_TRASHCAN_BEGIN(op, dealloc)
#  define AIOT_TRASHCAN_END Py_TRASHCAN_END
#else
#  define AIOT_TRASHCAN_BEGIN(op, dealloc)
#  define AIOT_TRASHCAN_END
#endif

/* f(), where f is most likely a C function that takes no arguments: called as what it is, it takes half as long as through the
 * protocol of calls. asyncio.get_running_loop() was a tenth of a hop through a queue. */
static inline PyObject *
aiot_call_noargs(PyObject *f)
{
    if (AIOT_LIKELY(PyCFunction_CheckExact(f) && PyCFunction_GET_FLAGS(f) == METH_NOARGS)) {
        return PyCFunction_GET_FUNCTION(f)(PyCFunction_GET_SELF(f), NULL);
    }
    return PyObject_CallNoArgs(f);
}

/* 3.12: exceptions are one object. */
#if PY_VERSION_HEX < 0x030C0000
static inline PyObject *
PyErr_GetRaisedException(void)
{
    PyObject *type, *value, *tb;
    PyErr_Fetch(&type, &value, &tb);
    if (type == NULL) {
        return NULL;
    }
    PyErr_NormalizeException(&type, &value, &tb);
    if (tb != NULL) {
        PyException_SetTraceback(value, tb);
    }
    Py_DECREF(type);
    Py_XDECREF(tb);
    return value;
}

/* Steals the reference to exc. */
static inline void
PyErr_SetRaisedException(PyObject *exc)
{
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(exc)), exc, PyException_GetTraceback(exc));
}
#endif

/* 3.12: the names of member types have a prefix, and need no header of their own. */
#if PY_VERSION_HEX < 0x030C0000
#  include <structmember.h>
#  define Py_T_PYSSIZET T_PYSSIZET
#  define Py_T_OBJECT_EX T_OBJECT_EX
#  define Py_T_DOUBLE T_DOUBLE
#  define Py_T_BOOL T_BOOL
#  define Py_READONLY READONLY
#endif

/* 3.13: PyObject_GetOptionalAttr. 1 found, 0 not there (no exception), -1 error. */
#if PY_VERSION_HEX < 0x030D0000
static inline int
PyObject_GetOptionalAttr(PyObject *obj, PyObject *name, PyObject **result)
{
    *result = PyObject_GetAttr(obj, name);
    if (*result != NULL) {
        return 1;
    }
    if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return 0;
    }
    return -1;
}

static inline int
PyUnicode_EqualToUTF8(PyObject *unicode, const char *str)
{
    return PyUnicode_CompareWithASCIIString(unicode, str) == 0;
}

static inline int
PyDict_GetItemRef(PyObject *dict, PyObject *key, PyObject **result)
{
    *result = Py_XNewRef(PyDict_GetItemWithError(dict, key));
    if (*result != NULL) {
        return 1;
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* 1 alive, 0 dead, -1 error. */
static inline int
PyWeakref_GetRef(PyObject *ref, PyObject **result)
{
    PyObject *obj = PyWeakref_GetObject(ref);
    if (obj == NULL) {
        *result = NULL;
        return -1;
    }
    *result = obj == Py_None ? NULL : Py_NewRef(obj);
    return *result != NULL;
}
#endif

#endif /* AIOT_COMPAT_H */
