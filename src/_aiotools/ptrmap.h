/* ptrmap.h: a hash table from address to address. Pure C: no Python header.
 *
 * It owns neither keys nor values. Lookups and removals cannot fail; only adding may need memory.
 *
 * Invariants: the number of slots is a power of two, or 0 before the first entry; at most 2/3 are taken; a key is found
 *             by walking from its home slot to the first empty one.
 */
#ifndef AIOT_PTRMAP_H
#define AIOT_PTRMAP_H

#include <stddef.h>

typedef struct aiot_ptrmap_slot {
    const void *key;        /* NULL: empty */
    void *value;
} aiot_ptrmap_slot;

typedef struct aiot_ptrmap {
    aiot_ptrmap_slot *slots;
    size_t room;
    size_t len;
} aiot_ptrmap;

typedef void *(*aiot_ptrmap_alloc)(size_t count, size_t size);
typedef void (*aiot_ptrmap_free)(void *p);

/* The value of key, NULL when there is none. */
void *aiot_ptrmap_get(const aiot_ptrmap *m, const void *key);

/* Adds or replaces; neither key nor value is NULL. 0, or -1 without memory, and then nothing has changed. The functions
 * are used as calloc() and free() are. */
int aiot_ptrmap_set(aiot_ptrmap *m, const void *key, void *value, aiot_ptrmap_alloc alloc, aiot_ptrmap_free release);

/* Forgets key, if it is there. */
void aiot_ptrmap_remove(aiot_ptrmap *m, const void *key);

void aiot_ptrmap_fini(aiot_ptrmap *m, aiot_ptrmap_free release);

#endif
