/* clock.h: virtual time. The public class, and how it gets into and out of a loop, is aiotools/_clock.py. */
#ifndef AIOT_CLOCK_H
#define AIOT_CLOCK_H

#include "state.h"

int aiot_clock_add_types(PyObject *module);

#endif /* AIOT_CLOCK_H */
