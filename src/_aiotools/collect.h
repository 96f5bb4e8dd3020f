/* collect.h: what gather_safe, as_completed_safe, race and map_safe are made of. */
#ifndef AIOT_COLLECT_H
#define AIOT_COLLECT_H

#include "children.h"

int aiot_collect_add_types(PyObject *module);

#endif /* AIOT_COLLECT_H */
