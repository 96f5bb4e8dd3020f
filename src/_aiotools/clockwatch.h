/* clockwatch.h: has anybody patched what tells a loop the time?
 *
 * time.monotonic and the type of a loop may be patched at any moment, and a patch must be believed at once. To look both up
 * for each deadline costs as much as to set it; so they are watched (3.12+), and what a look-up found holds until
 * aiot_clock_changes changes. Where there are no watchers (3.11, builds without the GIL, all of an interpreter's eight in
 * use), they are looked up each time. A loop's own attributes always are: not all versions tell of changes to these.
 */
#ifndef AIOT_CLOCKWATCH_H
#define AIOT_CLOCKWATCH_H

#include "state.h"

#if PY_VERSION_HEX >= 0x030C0000 && !defined(Py_GIL_DISABLED) && !defined(AIOT_NO_WATCHERS)
#  define AIOT_WATCHERS 1
#else
#  define AIOT_WATCHERS 0
#endif

/* Of all interpreters, as a watcher's callback is told neither its interpreter nor its module. Never 0. */
extern uint32_t aiot_clock_changes;

static inline uint32_t
aiot_clock_epoch(void)
{
#if defined(_MSC_VER)
    return *(volatile uint32_t *)&aiot_clock_changes;
#else
    return __atomic_load_n(&aiot_clock_changes, __ATOMIC_RELAXED);
#endif
}

/* Asks for watchers. Goes without when there are none; leaves no exception. */
void aiot_clock_watch_init(aiot_state *state);

/* The module goes. */
void aiot_clock_watch_fini(aiot_state *state);

/* Watches a loop's type. Returns whether each later change is told: a type that was changed very often has no version any
 * more, and its changes are not. Leaves no exception. */
bool aiot_clock_watch_type(aiot_state *state, PyTypeObject *type);

#endif /* AIOT_CLOCKWATCH_H */
