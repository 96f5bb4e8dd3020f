/* sleep.h: sleep, sleep_until and checkpoint. */
#ifndef AIOT_SLEEP_H
#define AIOT_SLEEP_H

#include "state.h"

int aiot_sleep_add_types(PyObject *module);

#endif /* AIOT_SLEEP_H */
