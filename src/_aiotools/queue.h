/* queue.h: Queue, LifoQueue and PriorityQueue, between any number of threads and loops. */
#ifndef AIOT_QUEUE_H
#define AIOT_QUEUE_H

#include "state.h"

int aiot_queue_add_types(PyObject *module);

#endif /* AIOT_QUEUE_H */
