/* lrucache.h: the cache behind lru_cache(). */
#ifndef AIOT_LRUCACHE_H
#define AIOT_LRUCACHE_H

#include "state.h"

int aiot_lrucache_add_types(PyObject *module);

#endif /* AIOT_LRUCACHE_H */
