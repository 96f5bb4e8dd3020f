/* ctxgroup.h: runs one method of many objects at once, as AsyncContextGroup does with __aenter__ and __aexit__.
 *
 * GroupRun    what the host awaits: the jobs, how they ended, and the workers under way
 * GroupWorker the coroutine of a task; it runs jobs one after the other, until one suspends, which it then stays with
 */
#ifndef AIOT_CTXGROUP_H
#define AIOT_CTXGROUP_H

#include "state.h"

int aiot_ctxgroup_add_types(PyObject *module);

#endif /* AIOT_CTXGROUP_H */
