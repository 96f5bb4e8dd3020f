/* ctxmgr.h: asynchronous context managers made of generators, and the two small ones: resetting, closing_async. */
#ifndef AIOT_CTXMGR_H
#define AIOT_CTXMGR_H

#include "state.h"

int aiot_ctxmgr_add_types(PyObject *module);

#endif /* AIOT_CTXMGR_H */
