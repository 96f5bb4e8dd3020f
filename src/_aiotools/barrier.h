/* barrier.h: Barrier: tasks that wait for each other. */
#ifndef AIOT_BARRIER_H
#define AIOT_BARRIER_H

#include "state.h"

int aiot_barrier_add_types(PyObject *module);

#endif /* AIOT_BARRIER_H */
