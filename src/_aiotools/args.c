/* args.c: binding of arguments for vectorcall functions. */

#include "args.h"

#include <math.h>

static PyObject *
param_name(aiot_state *state, const aiot_params *params, int i)
{
    return *(PyObject **)((char *)state + params->names[i]);
}

/* The place of the parameter called key, or -1 when there is none, or -2 with an exception. */
static int
find_param(aiot_state *state, const aiot_params *params, PyObject *key)
{
    for (int i = 0; i < params->total; i++) {
        if (param_name(state, params, i) == key) {
            return i;
        }
    }
    /* Keywords written in a call are interned; those of f(**mapping) need not be. */
    for (int i = 0; i < params->total; i++) {
        int same = PyUnicode_Compare(param_name(state, params, i), key);
        if (same == 0) {
            return i;
        }
        if (same == -1 && PyErr_Occurred()) {
            return -2;
        }
    }
    return -1;
}

static int
bind_positional(const aiot_params *params, Py_ssize_t nargs)
{
    if (nargs <= params->positional) {
        return 0;
    }
    if (params->positional == 0) {
        PyErr_Format(PyExc_TypeError, "%s() takes no positional arguments (%zd given)", params->function, nargs);
    }
    else {
        PyErr_Format(PyExc_TypeError, "%s() takes %s %d positional argument%s (%zd given)", params->function,
                     params->required == params->positional ? "exactly" : "at most", (int)params->positional,
                     params->positional == 1 ? "" : "s", nargs);
    }
    return -1;
}

static int
bind_keyword(aiot_state *state, const aiot_params *params, PyObject *key, PyObject *value, PyObject **out)
{
    if (!PyUnicode_Check(key)) {
        PyErr_Format(PyExc_TypeError, "%s() keywords must be strings", params->function);
        return -1;
    }
    int i = find_param(state, params, key);
    if (i == -2) {
        return -1;
    }
    if (i == -1) {
        PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", params->function, key);
        return -1;
    }
    if (out[i] != NULL) {
        PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", params->function, key);
        return -1;
    }
    out[i] = value;
    return 0;
}

static int
bind_required(aiot_state *state, const aiot_params *params, PyObject **out)
{
    for (int i = 0; i < params->required; i++) {
        if (out[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%U' (pos %d)", params->function,
                         param_name(state, params, i), i + 1);
            return -1;
        }
    }
    return 0;
}

AIOT_NOINLINE int
aiot_bind_slow(aiot_state *state, const aiot_params *params, PyObject *const *args, Py_ssize_t nargs,
               PyObject *kwnames, PyObject **out)
{
    memset(out, 0, params->total * sizeof(PyObject *));
    if (bind_positional(params, nargs) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        out[i] = args[i];
    }
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    for (Py_ssize_t i = 0; i < nkw; i++) {
        if (bind_keyword(state, params, PyTuple_GET_ITEM(kwnames, i), args[nargs + i], out) < 0) {
            return -1;
        }
    }
    return bind_required(state, params, out);
}

int
aiot_bind_tuple(aiot_state *state, const aiot_params *params, PyObject *args, PyObject *kwargs, PyObject **out)
{
    Py_ssize_t nargs = PyTuple_GET_SIZE(args);
    memset(out, 0, params->total * sizeof(PyObject *));
    if (bind_positional(params, nargs) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        out[i] = PyTuple_GET_ITEM(args, i);
    }
    if (kwargs != NULL) {
        PyObject *key, *value;
        Py_ssize_t pos = 0;
        while (PyDict_Next(kwargs, &pos, &key, &value)) {
            if (bind_keyword(state, params, key, value, out) < 0) {
                return -1;
            }
        }
    }
    return bind_required(state, params, out);
}

/* PyFloat_AsDouble() would make a float object of it. */
static bool
as_small_int(PyObject *obj, double *out)
{
    int overflow;
    long value = PyLong_AsLongAndOverflow(obj, &overflow);
    *out = (double)value;
    return !overflow;
}

int
aiot_as_seconds(PyObject *obj, const char *name, double *out)
{
    double value;
    if (PyFloat_CheckExact(obj)) {
        value = PyFloat_AS_DOUBLE(obj);
    }
    else if (!PyLong_CheckExact(obj) || !as_small_int(obj, &value)) {
        value = PyFloat_AsDouble(obj);
        if (value == -1.0 && PyErr_Occurred()) {
            if (PyErr_ExceptionMatches(PyExc_TypeError)) {
                PyErr_Format(PyExc_TypeError, "%s must be a number of seconds, not '%.200s'", name,
                             Py_TYPE(obj)->tp_name);
            }
            else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
                PyErr_Format(PyExc_OverflowError, "%s is too large for a number of seconds", name);
            }
            return -1;
        }
    }
    if (isnan(value)) {
        PyErr_Format(PyExc_ValueError, "%s must be a number of seconds, not NaN", name);
        return -1;
    }
    *out = value;
    return 0;
}
