/* heap.c: a 4-ary min-heap of deadlines.
 *
 * Entry i has the children 4i+1 .. 4i+4. Against a binary heap it is half as deep, and the four children that
 * a step down compares lie side by side.
 *
 *                        0
 *          1         2         3         4
 *      5 6 7 8   9 10 11 12   ...
 *
 * States:     a node is OUT (place == AIOT_HEAP_OUT) -> IN (push) -> OUT (remove, fini).
 * Invariants: len <= room; entries[i].node->place == i; entries[i].when == entries[i].node->when and is no
 *             NaN; no entry comes before its parent, by (when, order); orders are unique and below next_order.
 * Locking:    none. The heap and the nodes in it belong to whoever owns the heap.
 * Re-entry:   nothing here runs foreign code, except the two memory functions.
 *
 * Both sifts move a hole instead of swapping: each entry passed is written once, and the node's place with it.
 */
#include "heap.h"

#include <math.h>

#define ARITY 4
#define MIN_ROOM 16

#ifdef AIOT_DEBUG
/* A full check after each change would make a large heap quadratic; there, the touched entry's surroundings
 * are looked at. */
#define FULL_CHECK_LEN 128
#endif

static inline bool
entry_before(const aiot_heap_entry *a, const aiot_heap_entry *b)
{
    return a->when < b->when || (a->when == b->when && a->node->order < b->node->order);
}

static inline void
put(aiot_heap *h, size_t i, aiot_heap_entry e)
{
    h->entries[i] = e;
    e.node->place = i;
}

static bool
entry_is_right(const aiot_heap *h, size_t i)
{
    const aiot_heap_entry *e = &h->entries[i];
    return e->node != NULL && e->node->place == i && e->node->when == e->when && !isnan(e->when)
           && e->node->order < h->next_order
           && (i == 0 || entry_before(&h->entries[(i - 1) / ARITY], e));
}

int
aiot_heap_check(const aiot_heap *h)
{
    if (h->len > h->room || (h->entries == NULL) != (h->room == 0)) {
        return 0;
    }
    for (size_t i = 0; i < h->len; i++) {
        if (!entry_is_right(h, i)) {
            return 0;
        }
    }
    return 1;
}

#ifdef AIOT_DEBUG
static void
check_around(const aiot_heap *h, size_t i)
{
    if (h->len <= FULL_CHECK_LEN) {
        assert(aiot_heap_check(h));
        return;
    }
    assert(h->len <= h->room);
    if (i < h->len) {
        assert(entry_is_right(h, i));
    }
    for (size_t child = ARITY * i + 1; child <= ARITY * i + ARITY && child < h->len; child++) {
        assert(entry_is_right(h, child));
    }
}
#define CHECK_AROUND(h, i) check_around(h, i)
#else
#define CHECK_AROUND(h, i) ((void)0)
#endif

/* Puts e at the hole i or, as long as e comes before the parent, above it. Returns where it went. */
static size_t
sift_up(aiot_heap *h, size_t i, aiot_heap_entry e)
{
    while (i > 0) {
        size_t parent = (i - 1) / ARITY;
        if (!entry_before(&e, &h->entries[parent])) {
            break;
        }
        put(h, i, h->entries[parent]);
        i = parent;
    }
    put(h, i, e);
    return i;
}

/* Puts e at the hole i or, as long as a child comes before e, below it. Returns where it went. */
static size_t
sift_down(aiot_heap *h, size_t i, aiot_heap_entry e)
{
    /* i <= (len - 2) / ARITY says that i has a child, without overflow. */
    while (h->len > 1 && i <= (h->len - 2) / ARITY) {
        size_t child = ARITY * i + 1;
        size_t end = h->len - child < ARITY ? h->len : child + ARITY;
        size_t best = child;
        while (++child < end) {
            if (entry_before(&h->entries[child], &h->entries[best])) {
                best = child;
            }
        }
        if (!entry_before(&h->entries[best], &e)) {
            break;
        }
        put(h, i, h->entries[best]);
        i = best;
    }
    put(h, i, e);
    return i;
}

/* Puts e at the hole i, or where it belongs from there. */
static size_t
sift(aiot_heap *h, size_t i, aiot_heap_entry e)
{
    size_t place = sift_up(h, i, e);
    return place == i ? sift_down(h, i, e) : place;
}

static int
resize(aiot_heap *h, size_t room)
{
    if (room > SIZE_MAX / sizeof(aiot_heap_entry)) {
        return -1;
    }
    aiot_heap_entry *entries = h->realloc_fn(h->entries, room * sizeof(aiot_heap_entry));
    if (entries == NULL) {
        return -1;
    }
    h->entries = entries;
    h->room = room;
    return 0;
}

void
aiot_heap_init(aiot_heap *h, void *(*realloc_fn)(void *, size_t), void (*free_fn)(void *))
{
    h->entries = NULL;
    h->len = 0;
    h->room = 0;
    h->next_order = 0;
    h->realloc_fn = realloc_fn;
    h->free_fn = free_fn;
}

void
aiot_heap_fini(aiot_heap *h)
{
    for (size_t i = 0; i < h->len; i++) {
        h->entries[i].node->place = AIOT_HEAP_OUT;
    }
    if (h->entries != NULL) {
        h->free_fn(h->entries);
    }
    h->entries = NULL;
    h->len = 0;
    h->room = 0;
}

int
aiot_heap_push(aiot_heap *h, aiot_heap_node *n, double when)
{
    assert(!aiot_heap_has(n));
    assert(!isnan(when));
    if (h->len == h->room) {
        if (h->room > SIZE_MAX / 2 || resize(h, h->room ? h->room * 2 : MIN_ROOM) < 0) {
            return -1;
        }
    }
    n->when = when;
    n->order = h->next_order++;
    size_t place = sift_up(h, h->len++, (aiot_heap_entry){when, n});
    (void)place;
    CHECK_AROUND(h, place);
    return 0;
}

void
aiot_heap_move(aiot_heap *h, aiot_heap_node *n, double when)
{
    assert(n->place < h->len && h->entries[n->place].node == n);
    assert(!isnan(when));
    n->when = when;
    n->order = h->next_order++;
    size_t place = sift(h, n->place, (aiot_heap_entry){when, n});
    (void)place;
    CHECK_AROUND(h, place);
}

void
aiot_heap_remove(aiot_heap *h, aiot_heap_node *n)
{
    assert(n->place < h->len && h->entries[n->place].node == n);
    size_t hole = n->place;
    n->place = AIOT_HEAP_OUT;
    aiot_heap_entry last = h->entries[--h->len];
    if (hole < h->len) {
        hole = sift(h, hole, last);
    }
    /* Half of the room that is a quarter full: after it, a quarter of the room must go or come before the next
     * change of size. */
    if (h->room > MIN_ROOM && h->len <= h->room / 4) {
        (void)resize(h, h->room / 2);
    }
    CHECK_AROUND(h, hole);
}

void
aiot_heap_shift(aiot_heap *h, double delta)
{
    assert(isfinite(delta));
    for (size_t i = 0; i < h->len; i++) {
        h->entries[i].when += delta;
        h->entries[i].node->when = h->entries[i].when;
    }
    /* Only ties that are new can be out of order: by when, a parent still comes before its children. */
    for (size_t i = h->len > 1 ? (h->len - 2) / ARITY + 1 : 0; i-- > 0;) {
        sift_down(h, i, h->entries[i]);
    }
    CHECK_AROUND(h, 0);
}
