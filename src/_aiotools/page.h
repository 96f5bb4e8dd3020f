/* page.h: words and records in memory that several processes map.
 *
 * A word is 8 bytes, aligned: one store, one load, never torn. A record is any number of words behind a counter
 * (a sequence lock): odd while its one writer is at work, so that a reader notices what it read in the middle of it.
 */
#ifndef AIOT_PAGE_H
#define AIOT_PAGE_H

#include "state.h"

#if defined(_MSC_VER)
#  include <intrin.h>
#endif

static inline uint64_t
aiot_word_load(const uint64_t *p)
{
#if defined(_MSC_VER)
    return (uint64_t)_InterlockedCompareExchange64((volatile __int64 *)(uintptr_t)p, 0, 0);
#else
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

static inline void
aiot_word_store(uint64_t *p, uint64_t value)
{
#if defined(_MSC_VER)
    (void)_InterlockedExchange64((volatile __int64 *)p, (__int64)value);
#else
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
#endif
}

/* Replaces expected by value, if that is what is there. */
static inline bool
aiot_word_swap(uint64_t *p, uint64_t expected, uint64_t value)
{
#if defined(_MSC_VER)
    return (uint64_t)_InterlockedCompareExchange64((volatile __int64 *)p, (__int64)value, (__int64)expected) == expected;
#else
    return __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
#endif
}

/* What was loaded before is loaded before what is loaded after; the same for stores. */
static inline void
aiot_word_fence(void)
{
#if defined(_MSC_VER)
    volatile __int64 anything = 0;
    (void)_InterlockedExchange64(&anything, 1);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Exports the words of a writable buffer that is aligned and holds at least n of them. 0, or -1 with an exception
 * and no buffer taken. */
int aiot_get_words(PyObject *obj, Py_ssize_t n, Py_buffer *view, uint64_t **words);

int aiot_page_add_functions(PyObject *module);

#endif /* AIOT_PAGE_H */
