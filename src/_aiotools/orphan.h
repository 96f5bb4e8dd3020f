/* orphan.h: the end of a process that nobody waits for any more, whatever its code is at. */
#ifndef AIOT_ORPHAN_H
#define AIOT_ORPHAN_H

#include "state.h"

int aiot_orphan_add_functions(PyObject *module);

#endif /* AIOT_ORPHAN_H */
