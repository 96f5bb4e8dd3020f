/* forks.h: how often the process that this is has been forked off. Pure C: no Python header.
 *
 * What waits, or holds a lock, in a thread that the child does not have is found out by comparing the count.
 */
#ifndef AIOT_FORKS_H
#define AIOT_FORKS_H

#include <stdint.h>

/* Written in a child only, while it has one thread: whoever reads it needs no lock. It belongs to the process, which
 * all its interpreters share. */
extern uint64_t aiot_fork_count;

/* From here on the count is kept. 0, or -1 when the system refuses. May be called more than once. */
int aiot_forks_init(void);

#endif
