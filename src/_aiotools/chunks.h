/* chunks.h: a sequence of pointers in chunks: pushed at the back, popped at either end. Pure C: no Python header.
 *
 * For use under a lock that must be held shortly: every operation is O(1) in the worst case, moves nothing and
 * allocates nothing. Whoever pushes gives a chunk first when aiot_chunks_must_grow() says so; what a pop makes needless is
 * kept as the spare, a second one is handed to the caller, who frees it after the lock was released.
 */
#ifndef AIOT_CHUNKS_H
#define AIOT_CHUNKS_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>

#define AIOT_CHUNK_ITEMS 62             /* with the two links half a kilobyte */

typedef struct aiot_chunk {
    struct aiot_chunk *prev, *next;
    void *items[AIOT_CHUNK_ITEMS];
} aiot_chunk;

typedef struct {
    aiot_chunk *first, *last;           /* both NULL before the first push */
    aiot_chunk *spare;
    unsigned head;                      /* index in first of the front item */
    unsigned tail;                      /* index in last behind the back item */
    size_t len;
} aiot_chunks;

static inline void
aiot_chunks_init(aiot_chunks *c)
{
    c->first = c->last = c->spare = NULL;
    c->head = c->tail = 0;
    c->len = 0;
}

/* Does the next push need a chunk that is not there? */
static inline bool
aiot_chunks_must_grow(const aiot_chunks *c)
{
    return (c->last == NULL || c->tail == AIOT_CHUNK_ITEMS) && c->spare == NULL;
}

/* Takes a chunk for the pushes to come, whatever is in it; false when there is a spare one already. */
static inline bool
aiot_chunks_give(aiot_chunks *c, aiot_chunk *chunk)
{
    if (c->spare != NULL) {
        return false;
    }
    c->spare = chunk;
    return true;
}

/* Only after aiot_chunks_must_grow() was false. */
static inline void
aiot_chunks_push_back(aiot_chunks *c, void *item)
{
    assert(!aiot_chunks_must_grow(c));
    if (c->last == NULL || c->tail == AIOT_CHUNK_ITEMS) {
        aiot_chunk *chunk = c->spare;
        c->spare = NULL;
        chunk->prev = c->last;
        chunk->next = NULL;
        if (c->last == NULL) {
            c->first = chunk;
            c->head = 0;
        }
        else {
            c->last->next = chunk;
        }
        c->last = chunk;
        c->tail = 0;
    }
    c->last->items[c->tail++] = item;
    c->len++;
}

/* Keeps a chunk that is not needed as the spare, or returns it. */
static inline aiot_chunk *
aiot_chunks_retire(aiot_chunks *c, aiot_chunk *chunk)
{
    if (c->spare == NULL) {
        c->spare = chunk;
        return NULL;
    }
    return chunk;
}

/* len is not 0. *needless becomes a chunk for the caller to free, or NULL. */
static inline void *
aiot_chunks_pop_front(aiot_chunks *c, aiot_chunk **needless)
{
    assert(c->len > 0);
    void *item = c->first->items[c->head++];
    *needless = NULL;
    c->len--;
    if (c->len == 0) {
        assert(c->first == c->last);
        c->head = c->tail = 0;
    }
    else if (c->head == AIOT_CHUNK_ITEMS) {
        aiot_chunk *empty = c->first;
        c->first = empty->next;
        c->first->prev = NULL;
        c->head = 0;
        *needless = aiot_chunks_retire(c, empty);
    }
    return item;
}

static inline void *
aiot_chunks_pop_back(aiot_chunks *c, aiot_chunk **needless)
{
    assert(c->len > 0);
    void *item = c->last->items[--c->tail];
    *needless = NULL;
    c->len--;
    if (c->len == 0) {
        assert(c->first == c->last);
        c->head = c->tail = 0;
    }
    else if (c->tail == 0) {
        aiot_chunk *empty = c->last;
        c->last = empty->prev;
        c->last->next = NULL;
        c->tail = AIOT_CHUNK_ITEMS;
        *needless = aiot_chunks_retire(c, empty);
    }
    return item;
}

static inline void *
aiot_chunks_front(const aiot_chunks *c)
{
    assert(c->len > 0);
    return c->first->items[c->head];
}

static inline void *
aiot_chunks_back(const aiot_chunks *c)
{
    assert(c->len > 0);
    return c->last->items[c->tail - 1];
}

/* Calls visit for each item, front to back, until it returns something else than 0, and returns that. */
int aiot_chunks_visit(const aiot_chunks *c, int (*visit)(void *item, void *arg), void *arg);

/* Moves everything out, in O(1): c is empty afterwards, taken holds the items and all chunks. */
void aiot_chunks_take_all(aiot_chunks *c, aiot_chunks *taken);

/* Frees all chunks; the items are forgotten. */
void aiot_chunks_fini(aiot_chunks *c, void (*free_fn)(void *));

/* 1 if all invariants hold, else 0; for tests and debug builds. */
int aiot_chunks_check(const aiot_chunks *c);

#endif
