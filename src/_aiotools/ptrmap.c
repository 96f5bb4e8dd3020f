/* ptrmap.c: a hash table from address to address, with linear probing and no tombstones. */

#include "ptrmap.h"

#include <assert.h>
#include <stdint.h>

static size_t
home(const aiot_ptrmap *m, const void *key)
{
    /* The low bits of addresses are zeros; the multiplication spreads the others. */
    uint64_t h = (uint64_t)(uintptr_t)key * UINT64_C(0x9E3779B97F4A7C15);
    return (size_t)(h >> 32) & (m->room - 1);
}

/* The slot that holds key, or the empty one where it would go. */
static size_t
find(const aiot_ptrmap *m, const void *key)
{
    size_t i = home(m, key);
    while (m->slots[i].key != NULL && m->slots[i].key != key) {
        i = (i + 1) & (m->room - 1);
    }
    return i;
}

void *
aiot_ptrmap_get(const aiot_ptrmap *m, const void *key)
{
    if (m->len == 0) {
        return NULL;
    }
    return m->slots[find(m, key)].value;
}

static int
grow(aiot_ptrmap *m, aiot_ptrmap_alloc alloc, aiot_ptrmap_free release)
{
    aiot_ptrmap bigger = {NULL, m->room == 0 ? 8 : m->room * 2, m->len};
    bigger.slots = (aiot_ptrmap_slot *)alloc(bigger.room, sizeof(aiot_ptrmap_slot));
    if (bigger.slots == NULL) {
        return -1;
    }
    for (size_t i = 0; i < m->room; i++) {
        if (m->slots[i].key != NULL) {
            bigger.slots[find(&bigger, m->slots[i].key)] = m->slots[i];
        }
    }
    release(m->slots);
    *m = bigger;
    return 0;
}

int
aiot_ptrmap_set(aiot_ptrmap *m, const void *key, void *value, aiot_ptrmap_alloc alloc, aiot_ptrmap_free release)
{
    assert(key != NULL && value != NULL);
    if (m->len > 0) {
        aiot_ptrmap_slot *slot = &m->slots[find(m, key)];
        if (slot->key != NULL) {
            slot->value = value;
            return 0;
        }
    }
    if ((m->len + 1) * 3 > m->room * 2 && grow(m, alloc, release) < 0) {
        return -1;
    }
    aiot_ptrmap_slot *slot = &m->slots[find(m, key)];
    slot->key = key;
    slot->value = value;
    m->len++;
    return 0;
}

void
aiot_ptrmap_remove(aiot_ptrmap *m, const void *key)
{
    if (m->len == 0) {
        return;
    }
    size_t hole = find(m, key);
    if (m->slots[hole].key == NULL) {
        return;
    }
    m->len--;
    /* Whatever stands behind the hole and may not be separated from its home by it moves up. */
    size_t mask = m->room - 1;
    for (size_t i = (hole + 1) & mask; m->slots[i].key != NULL; i = (i + 1) & mask) {
        size_t from_home = (i - home(m, m->slots[i].key)) & mask;
        if (from_home >= ((i - hole) & mask)) {
            m->slots[hole] = m->slots[i];
            hole = i;
        }
    }
    m->slots[hole].key = NULL;
    m->slots[hole].value = NULL;
}

void
aiot_ptrmap_fini(aiot_ptrmap *m, aiot_ptrmap_free release)
{
    release(m->slots);
    m->slots = NULL;
    m->room = m->len = 0;
}
