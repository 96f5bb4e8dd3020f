/* timer.h: create_timer and what it returns. timer.c says how it works. */
#ifndef AIOT_TIMER_H
#define AIOT_TIMER_H

#include "state.h"

int aiot_timer_add_types(PyObject *module);

#endif /* AIOT_TIMER_H */
