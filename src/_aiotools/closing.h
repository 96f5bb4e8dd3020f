/* closing.h: closing_async, which awaits the close() of a thing at the end of a block. */
#ifndef AIOT_CLOSING_H
#define AIOT_CLOSING_H

#include "state.h"

int aiot_closing_add_types(PyObject *module);

#endif /* AIOT_CLOSING_H */
