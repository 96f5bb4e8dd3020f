/* timeout.h: timeout(), timeout_at() and Timeout. */
#ifndef AIOT_TIMEOUT_H
#define AIOT_TIMEOUT_H

#include "state.h"

int aiot_timeout_add_types(PyObject *module);

#endif /* AIOT_TIMEOUT_H */
