/* link.h: an intrusive doubly linked list. Pure C: no Python header.
 *
 * The link is embedded in its owner; the head of a list is a link too. All operations are O(1), allocate
 * nothing and cannot fail.
 *
 * Invariants: every link is in exactly one circle, l->next->prev == l == l->prev->next; a link that is in no
 *             list, and the head of an empty list, is alone in its circle.
 * Locking:    none; a circle and all links in it belong to one owner.
 */
#ifndef AIOT_LINK_H
#define AIOT_LINK_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct aiot_link {
    struct aiot_link *prev, *next;
} aiot_link;

/* From a pointer to a member to the struct around it. */
#define AIOT_CONTAINER_OF(ptr, type, member) ((type *)(void *)((char *)(ptr) - offsetof(type, member)))

static inline void
aiot_link_init(aiot_link *l)
{
    l->prev = l->next = l;
}

static inline bool
aiot_link_is_empty(const aiot_link *head)
{
    return head->next == head;
}

static inline bool
aiot_link_is_out(const aiot_link *l)
{
    return l->next == l;
}

static inline void
aiot_link_insert_between(aiot_link *prev, aiot_link *l, aiot_link *next)
{
    assert(aiot_link_is_out(l));
    assert(prev->next == next && next->prev == prev);
    l->prev = prev;
    l->next = next;
    prev->next = l;
    next->prev = l;
}

static inline void
aiot_link_append(aiot_link *head, aiot_link *l)
{
    aiot_link_insert_between(head->prev, l, head);
}

static inline void
aiot_link_prepend(aiot_link *head, aiot_link *l)
{
    aiot_link_insert_between(head, l, head->next);
}

/* Takes the link out of its list, if it is in one. */
static inline void
aiot_link_remove(aiot_link *l)
{
    assert(l->prev->next == l && l->next->prev == l);
    l->prev->next = l->next;
    l->next->prev = l->prev;
    aiot_link_init(l);
}

/* NULL if the list is empty. */
static inline aiot_link *
aiot_link_first(const aiot_link *head)
{
    return head->next == head ? NULL : head->next;
}

/* Moves all links of one list, in order, to the end of another; leaves the first one empty. */
static inline void
aiot_link_splice(aiot_link *to_head, aiot_link *from_head)
{
    assert(to_head != from_head);
    if (aiot_link_is_empty(from_head)) {
        return;
    }
    aiot_link *first = from_head->next, *last = from_head->prev;
    first->prev = to_head->prev;
    to_head->prev->next = first;
    last->next = to_head;
    to_head->prev = last;
    aiot_link_init(from_head);
}

#endif
