/* heap.h: a 4-ary min-heap of deadlines. Pure C: no Python header.
 *
 * The node is embedded in its owner and knows its place, so a deadline is set, moved and cancelled in
 * O(log n), and a cancelled one leaves nothing behind. Equal deadlines come out in the order in which they
 * were set or last moved.
 */
#ifndef AIOT_HEAP_H
#define AIOT_HEAP_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AIOT_HEAP_OUT SIZE_MAX

typedef struct aiot_heap_node {
    double when;        /* the deadline; meaningful while in a heap */
    uint64_t order;     /* breaks ties: the smaller one was set earlier */
    size_t place;       /* index in the heap, AIOT_HEAP_OUT when in none */
} aiot_heap_node;

/* The deadline is repeated beside the pointer: comparing two entries follows no pointer unless they tie, and
 * the four children of an entry are 64 adjacent bytes. */
typedef struct aiot_heap_entry {
    double when;
    aiot_heap_node *node;
} aiot_heap_entry;

typedef struct aiot_heap {
    aiot_heap_entry *entries;
    size_t len;
    size_t room;
    uint64_t next_order;
    void *(*realloc_fn)(void *, size_t);
    void (*free_fn)(void *);
} aiot_heap;

/* The functions are used as realloc() and free() are; the heap allocates nothing before the first push. */
void aiot_heap_init(aiot_heap *h, void *(*realloc_fn)(void *, size_t), void (*free_fn)(void *));

/* Frees the array. Nodes that are still in the heap must be alive; they are out afterwards. */
void aiot_heap_fini(aiot_heap *h);

/* Adds a node that is in no heap. `when` may be infinite, never NaN. Returns 0, or -1 if there is no memory;
 * then nothing has changed. O(log n). */
int aiot_heap_push(aiot_heap *h, aiot_heap_node *n, double when);

/* Gives a node of this heap another deadline. Among equals it counts as set now, also if `when` is the
 * deadline that it has. O(log n), cannot fail. */
void aiot_heap_move(aiot_heap *h, aiot_heap_node *n, double when);

/* Takes a node of this heap out, wherever it stands. O(log n), cannot fail: the array is made smaller now and
 * then, and kept as it is if that fails. */
void aiot_heap_remove(aiot_heap *h, aiot_heap_node *n);

/* Adds delta, which is finite, to all deadlines: a clock was set. Those that rounding makes equal keep the order in
 * which they were set. O(n), cannot fail. */
void aiot_heap_shift(aiot_heap *h, double delta);

/* 1 if all invariants hold, else 0. O(n); for tests and debug builds. */
int aiot_heap_check(const aiot_heap *h);

static inline void
aiot_heap_node_init(aiot_heap_node *n)
{
    n->when = 0.0;
    n->order = 0;
    n->place = AIOT_HEAP_OUT;
}

/* Is the node in a heap? */
static inline bool
aiot_heap_has(const aiot_heap_node *n)
{
    return n->place != AIOT_HEAP_OUT;
}

/* The node with the earliest deadline; NULL if the heap is empty. */
static inline aiot_heap_node *
aiot_heap_first(const aiot_heap *h)
{
    return h->len ? h->entries[0].node : NULL;
}

static inline size_t
aiot_heap_len(const aiot_heap *h)
{
    return h->len;
}

/* The nodes 0 .. len-1 in no particular order, for visiting them all. The heap must not change meanwhile. */
static inline aiot_heap_node *
aiot_heap_at(const aiot_heap *h, size_t i)
{
    assert(i < h->len);
    return h->entries[i].node;
}

#endif
