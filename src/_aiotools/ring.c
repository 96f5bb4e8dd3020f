/* ring.c: a growable ring of pointers; the parts that change the size of the array.
 *
 *      room = 8, head = 6, len = 4:     [ c  d  .  .  .  .  a  b ]
 *                                                           ^ head
 *
 * Invariants: room is 0 (and items NULL) or a power of two >= AIOT_RING_MIN_ROOM, so that an index wraps by a
 *             mask; head < room unless room is 0; len <= room; no item in it is NULL.
 * Locking:    none; the ring belongs to one owner.
 * Re-entry:   nothing here runs foreign code, except the two memory functions.
 */
#include "ring.h"

#include <stdint.h>
#include <string.h>

int
aiot_ring_check(const aiot_ring *r)
{
    if ((r->items == NULL) != (r->room == 0) || r->len > r->room) {
        return 0;
    }
    if (r->room == 0) {
        return r->head == 0;
    }
    if ((r->room & (r->room - 1)) != 0 || r->room < AIOT_RING_MIN_ROOM || r->head >= r->room) {
        return 0;
    }
    for (size_t i = 0; i < r->len; i++) {
        if (aiot_ring_at(r, i) == NULL) {
            return 0;
        }
    }
    return 1;
}

void
aiot_ring_init(aiot_ring *r, void *(*realloc_fn)(void *, size_t), void (*free_fn)(void *))
{
    r->items = NULL;
    r->head = r->len = r->room = 0;
    r->realloc_fn = realloc_fn;
    r->free_fn = free_fn;
}

void
aiot_ring_fini(aiot_ring *r)
{
    if (r->items != NULL) {
        r->free_fn(r->items);
    }
    aiot_ring_init(r, r->realloc_fn, r->free_fn);
}

/* Moves the items to the front of another array: growing in place would have to unwrap them anyway. */
static int
resize(aiot_ring *r, size_t room)
{
    assert(room >= r->len && (room & (room - 1)) == 0);
    if (room > SIZE_MAX / sizeof(void *)) {
        return -1;
    }
    void **items = r->realloc_fn(NULL, room * sizeof(void *));
    if (items == NULL) {
        return -1;
    }
    if (r->items != NULL) {
        size_t to_end = r->room - r->head;
        size_t first = r->len < to_end ? r->len : to_end;
        memcpy(items, r->items + r->head, first * sizeof(void *));
        memcpy(items + first, r->items, (r->len - first) * sizeof(void *));
        r->free_fn(r->items);
    }
    r->items = items;
    r->head = 0;
    r->room = room;
    assert(aiot_ring_check(r));
    return 0;
}

int
aiot_ring_reserve(aiot_ring *r, size_t n)
{
    if (n > SIZE_MAX - r->len) {
        return -1;
    }
    size_t wanted = r->len + n, room = r->room ? r->room : AIOT_RING_MIN_ROOM;
    while (room < wanted) {
        if (room > SIZE_MAX / 2) {
            return -1;
        }
        room *= 2;
    }
    return room == r->room ? 0 : resize(r, room);
}

int
aiot_ring_grow(aiot_ring *r)
{
    return aiot_ring_reserve(r, 1);
}

void
aiot_ring_shrink(aiot_ring *r)
{
    /* To a quarter of the room that is an eighth full: half full afterwards. A failure keeps the array. */
    size_t room = r->room / 4 < AIOT_RING_MIN_ROOM ? AIOT_RING_MIN_ROOM : r->room / 4;
    if (room < r->room) {
        (void)resize(r, room);
    }
}
