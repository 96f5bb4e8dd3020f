/* forks.c: how often the process that this is has been forked off. */
#include "forks.h"

uint64_t aiot_fork_count = 0;

#if defined(_WIN32)

int
aiot_forks_init(void)
{
    return 0;
}

#else

#include <pthread.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int failed = 0;

static void
after_fork_in_child(void)
{
    aiot_fork_count++;
}

static void
install(void)
{
    failed = pthread_atfork(NULL, NULL, after_fork_in_child);
}

int
aiot_forks_init(void)
{
    return pthread_once(&once, install) != 0 || failed != 0 ? -1 : 0;
}

#endif
