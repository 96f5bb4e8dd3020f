/* ring.h: a growable ring of pointers, open at both ends. Pure C: no Python header.
 *
 * Pushing and popping is O(1) at either end, amortised over the growth. The ring owns its array and nothing
 * that the pointers point to.
 */
#ifndef AIOT_RING_H
#define AIOT_RING_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct aiot_ring {
    void **items;
    size_t head;        /* index of the first item */
    size_t len;
    size_t room;        /* 0 or a power of two */
    void *(*realloc_fn)(void *, size_t);
    void (*free_fn)(void *);
} aiot_ring;

/* The functions are used as realloc() and free() are; the ring allocates nothing before the first push. */
void aiot_ring_init(aiot_ring *r, void *(*realloc_fn)(void *, size_t), void (*free_fn)(void *));

/* Frees the array. The items are forgotten; the ring is empty and may be used again. */
void aiot_ring_fini(aiot_ring *r);

/* Makes room for n more items: the next n pushes cannot fail, unless there is a pop before them (which may
 * make the array smaller). Returns 0, or -1 if there is no memory; then nothing has changed. */
int aiot_ring_reserve(aiot_ring *r, size_t n);

/* Room for one more when the array is full, and a smaller array when it is nearly empty: the cold halves of
 * push and pop. */
int aiot_ring_grow(aiot_ring *r);
void aiot_ring_shrink(aiot_ring *r);

/* 1 if all invariants hold, else 0. O(n); for tests and debug builds. */
int aiot_ring_check(const aiot_ring *r);

#define AIOT_RING_MIN_ROOM ((size_t)16)

static inline size_t
aiot_ring_len(const aiot_ring *r)
{
    return r->len;
}

/* Item i, counted from the front. */
static inline void *
aiot_ring_at(const aiot_ring *r, size_t i)
{
    assert(i < r->len);
    return r->items[(r->head + i) & (r->room - 1)];
}

/* 0; -1 if there is no memory, then nothing has changed. The item is not NULL. */
static inline int
aiot_ring_push_back(aiot_ring *r, void *item)
{
    assert(item != NULL);
    if (r->len == r->room && aiot_ring_grow(r) < 0) {
        return -1;
    }
    r->items[(r->head + r->len) & (r->room - 1)] = item;
    r->len++;
    return 0;
}

static inline int
aiot_ring_push_front(aiot_ring *r, void *item)
{
    assert(item != NULL);
    if (r->len == r->room && aiot_ring_grow(r) < 0) {
        return -1;
    }
    r->head = (r->head + r->room - 1) & (r->room - 1);
    r->items[r->head] = item;
    r->len++;
    return 0;
}

/* NULL if the ring is empty. */
static inline void *
aiot_ring_pop_front(aiot_ring *r)
{
    if (r->len == 0) {
        return NULL;
    }
    void *item = r->items[r->head];
    r->head = (r->head + 1) & (r->room - 1);
    r->len--;
    if (r->len <= r->room / 8 && r->room > AIOT_RING_MIN_ROOM) {
        aiot_ring_shrink(r);
    }
    return item;
}

static inline void *
aiot_ring_pop_back(aiot_ring *r)
{
    if (r->len == 0) {
        return NULL;
    }
    r->len--;
    void *item = r->items[(r->head + r->len) & (r->room - 1)];
    if (r->len <= r->room / 8 && r->room > AIOT_RING_MIN_ROOM) {
        aiot_ring_shrink(r);
    }
    return item;
}

#endif
