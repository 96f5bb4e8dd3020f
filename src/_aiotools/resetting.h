/* resetting.h: a context variable that has a value for the time of a block. */
#ifndef AIOT_RESETTING_H
#define AIOT_RESETTING_H

#include "state.h"

int aiot_resetting_add_types(PyObject *module);

#endif /* AIOT_RESETTING_H */
