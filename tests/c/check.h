/* check.h: the little that the C unit tests need. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

static int check_count;

/* Like assert(), whatever NDEBUG says. */
#define CHECK(condition)                                                                        \
    do {                                                                                        \
        check_count++;                                                                          \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition); \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

/* An allocator that counts what is live and refuses when it is told to. */
static long live_blocks;
static long refuse_from = -1;    /* refuse when this many more allocations were granted; -1: never */

static inline void *
check_realloc(void *block, size_t size)
{
    if (refuse_from == 0) {
        return NULL;
    }
    if (refuse_from > 0) {
        refuse_from--;
    }
    void *made = realloc(block, size);
    if (made != NULL && block == NULL) {
        live_blocks++;
    }
    return made;
}

static inline void
check_free(void *block)
{
    if (block != NULL) {
        live_blocks--;
    }
    free(block);
}

/* xorshift: the same numbers on each run and machine. */
static unsigned long long random_state = 88172645463325252ULL;

static inline unsigned
random_below(unsigned n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 11) % n;
}

#endif
