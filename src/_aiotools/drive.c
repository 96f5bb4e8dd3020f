/* drive.c: what an `await` expression does, in pieces. No state of its own. */

#include "drive.h"

/* A generator that types.coroutine() made. 1, 0 or -1. */
static int
is_generator_coroutine(aiot_state *state, PyObject *obj)
{
    if (!PyGen_CheckExact(obj)) {
        return 0;
    }
    PyObject *code = PyObject_GetAttr(obj, state->str_gi_code);
    if (code == NULL) {
        return -1;
    }
    int answer = PyCode_Check(code) && (((PyCodeObject *)code)->co_flags & CO_ITERABLE_COROUTINE) != 0;
    Py_DECREF(code);
    return answer;
}

static int
check_not_awaited(aiot_state *state, PyObject *coro)
{
    PyObject *awaits = PyObject_GetAttr(coro, state->str_cr_await);
    if (awaits == NULL) {
        return -1;
    }
    Py_DECREF(awaits);
    if (awaits != Py_None) {
        PyErr_SetString(PyExc_RuntimeError, "coroutine is being awaited already");
        return -1;
    }
    return 0;
}

PyObject *
aiot_await_iter(aiot_state *state, PyObject *awaitable)
{
    if (PyCoro_CheckExact(awaitable)) {
        return check_not_awaited(state, awaitable) < 0 ? NULL : Py_NewRef(awaitable);
    }
    PyAsyncMethods *methods = Py_TYPE(awaitable)->tp_as_async;
    if (methods == NULL || methods->am_await == NULL) {
        int is_coroutine = is_generator_coroutine(state, awaitable);
        if (is_coroutine == 0) {
            PyErr_Format(PyExc_TypeError, "object %.200s can't be used in 'await' expression",
                         Py_TYPE(awaitable)->tp_name);
        }
        return is_coroutine > 0 ? Py_NewRef(awaitable) : NULL;
    }
    PyObject *iter = methods->am_await(awaitable);
    if (iter == NULL) {
        return NULL;
    }
    int is_coroutine = PyCoro_CheckExact(iter) ? 1 : is_generator_coroutine(state, iter);
    if (is_coroutine != 0) {
        if (is_coroutine > 0) {
            PyErr_SetString(PyExc_TypeError, "__await__() returned a coroutine");
        }
        Py_DECREF(iter);
        return NULL;
    }
    if (!PyIter_Check(iter)) {
        PyErr_Format(PyExc_TypeError, "__await__() returned non-iterator of type '%.100s'", Py_TYPE(iter)->tp_name);
        Py_DECREF(iter);
        return NULL;
    }
    return iter;
}

PySendResult
aiot_fetch_return(PyObject **result)
{
    if (!PyErr_Occurred()) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    if (!PyErr_ExceptionMatches(PyExc_StopIteration)) {
        return PYGEN_ERROR;
    }
    PyObject *stop = PyErr_GetRaisedException();
    if (!PyObject_TypeCheck(stop, (PyTypeObject *)PyExc_StopIteration)) {
        /* Up to 3.11 to make an object of it may fail: that is another exception then. */
        PyErr_SetRaisedException(stop);
        return PYGEN_ERROR;
    }
    PyObject *value = ((PyStopIterationObject *)stop)->value;
    *result = Py_NewRef(value != NULL ? value : Py_None);
    Py_DECREF(stop);
    return PYGEN_RETURN;
}

static int
iter_close(aiot_state *state, PyObject *iter)
{
    PyObject *close;
    int found = PyObject_GetOptionalAttr(iter, state->str_close, &close);
    if (found <= 0) {
        return found;
    }
    PyObject *res = PyObject_CallNoArgs(close);
    Py_DECREF(close);
    Py_XDECREF(res);
    return res == NULL ? -1 : 0;
}

PySendResult
aiot_iter_throw(aiot_state *state, PyObject *iter, PyObject *exc, PyObject **result)
{
    *result = NULL;
    if (PyErr_GivenExceptionMatches(exc, PyExc_GeneratorExit)) {
        if (iter_close(state, iter) == 0) {
            PyErr_SetRaisedException(Py_NewRef(exc));
        }
        return PYGEN_ERROR;
    }
    PyObject *method;
    int found = PyObject_GetOptionalAttr(iter, state->str_throw, &method);
    if (found < 0) {
        return PYGEN_ERROR;
    }
    if (!found) {
        PyErr_SetRaisedException(Py_NewRef(exc));
        return PYGEN_ERROR;
    }
    PyObject *yielded = PyObject_CallOneArg(method, exc);
    Py_DECREF(method);
    if (yielded != NULL) {
        *result = yielded;
        return PYGEN_NEXT;
    }
    return aiot_fetch_return(result);
}
