/* args.h: binding of arguments for vectorcall functions.
 *
 * The positional case costs two comparisons and a copy; keywords go to a cold function that compares interned
 * names. A parameter table is static and names its parameters by the place of the interned string in the
 * module state, so that it can be shared by all interpreters.
 */
#ifndef AIOT_ARGS_H
#define AIOT_ARGS_H

#include "state.h"

#include <string.h>

#define AIOT_MAX_PARAMS 20

typedef struct {
    const char *function;                   /* "sleep", as messages name it */
    uint8_t positional;                     /* how many may be given by position */
    uint8_t required;                       /* the first so many must be given */
    uint8_t total;
    uint16_t names[AIOT_MAX_PARAMS];        /* AIOT_NAME(x) each */
} aiot_params;

#define AIOT_NAME(name) ((uint16_t)offsetof(aiot_state, str_##name))

/* The cold half of aiot_bind. */
int aiot_bind_slow(aiot_state *state, const aiot_params *params, PyObject *const *args, Py_ssize_t nargs,
                   PyObject *kwnames, PyObject **out);

/* Fills out[0..total) with borrowed references, NULL where nothing was given. 0, or -1 with TypeError. */
static inline int
aiot_bind(aiot_state *state, const aiot_params *params, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
          PyObject **out)
{
    if (AIOT_LIKELY(kwnames == NULL && nargs >= params->required && nargs <= params->positional)) {
        Py_ssize_t i = 0;
        for (; i < nargs; i++) {
            out[i] = args[i];
        }
        for (; i < params->total; i++) {
            out[i] = NULL;
        }
        return 0;
    }
    return aiot_bind_slow(state, params, args, nargs, kwnames, out);
}

/* The same for tp_new and tp_init. The references are borrowed from the tuple and the dict. */
int aiot_bind_tuple(aiot_state *state, const aiot_params *params, PyObject *args, PyObject *kwargs, PyObject **out);

/* A number of seconds. TypeError says which parameter was wrong, ValueError that it was NaN. 0 or -1. */
int aiot_as_seconds(PyObject *obj, const char *name, double *out);

#endif /* AIOT_ARGS_H */
