/* watchdog.h: the part of LoopWatchdog that must go on while nothing else does: a thread that needs no GIL. */
#ifndef AIOT_WATCHDOG_H
#define AIOT_WATCHDOG_H

#include "state.h"

int aiot_watchdog_add_types(PyObject *module);

#endif /* AIOT_WATCHDOG_H */
