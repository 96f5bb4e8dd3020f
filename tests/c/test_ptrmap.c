#include "ptrmap.h"

#include "check.h"

#include <stdint.h>

enum { KEYS = 3000 };

/* Their addresses are the keys: 16 bytes apart, as those of objects are. */
static struct { char bytes[16]; } things[KEYS];
static char values[KEYS];

static void *
check_calloc(size_t count, size_t size)
{
    void *block = check_realloc(NULL, count * size);
    for (size_t i = 0; block != NULL && i < count * size; i++) {
        ((char *)block)[i] = 0;
    }
    return block;
}

static int
set(aiot_ptrmap *m, size_t key, size_t value)
{
    return aiot_ptrmap_set(m, &things[key], &values[value], check_calloc, check_free);
}

/* What the header promises of the table itself. */
static int
is_sound(const aiot_ptrmap *m)
{
    if (m->room == 0) {
        return m->slots == NULL && m->len == 0;
    }
    size_t taken = 0;
    for (size_t i = 0; i < m->room; i++) {
        if (m->slots[i].key == NULL) {
            if (m->slots[i].value != NULL) {
                return 0;
            }
            continue;
        }
        taken++;
        if (aiot_ptrmap_get(m, m->slots[i].key) != m->slots[i].value) {
            return 0;
        }
    }
    return taken == m->len && m->len * 3 <= m->room * 2 && (m->room & (m->room - 1)) == 0;
}

static void
an_empty_map_holds_nothing_and_allocates_nothing(void)
{
    aiot_ptrmap m = {0};
    CHECK(aiot_ptrmap_get(&m, &things[0]) == NULL);
    aiot_ptrmap_remove(&m, &things[0]);
    CHECK(m.len == 0 && live_blocks == 0 && is_sound(&m));
    aiot_ptrmap_fini(&m, check_free);
    CHECK(live_blocks == 0);
}

static void
a_key_that_is_there_gets_another_value_without_memory(void)
{
    aiot_ptrmap m = {0};
    CHECK(set(&m, 1, 1) == 0);
    refuse_from = 0;
    CHECK(set(&m, 1, 2) == 0);
    refuse_from = -1;
    CHECK(m.len == 1 && aiot_ptrmap_get(&m, &things[1]) == &values[2]);
    aiot_ptrmap_remove(&m, &things[1]);
    CHECK(m.len == 0 && aiot_ptrmap_get(&m, &things[1]) == NULL && is_sound(&m));
    /* What is not there can be removed. */
    aiot_ptrmap_remove(&m, &things[1]);
    aiot_ptrmap_remove(&m, &things[2]);
    CHECK(m.len == 0);
    aiot_ptrmap_fini(&m, check_free);
}

static void
without_memory_nothing_changes(void)
{
    aiot_ptrmap m = {0};
    refuse_from = 0;
    CHECK(set(&m, 0, 0) == -1 && m.len == 0 && is_sound(&m));
    refuse_from = -1;
    size_t n = 0;
    CHECK(set(&m, n, n) == 0);
    /* As many as there is room for; then one more. */
    refuse_from = 0;
    for (n = 1; set(&m, n, n) == 0; n++) {
        CHECK(n < KEYS - 1);
    }
    CHECK(n > 1 && m.len == n && is_sound(&m));
    CHECK(aiot_ptrmap_get(&m, &things[n]) == NULL);
    for (size_t i = 0; i < n; i++) {
        CHECK(aiot_ptrmap_get(&m, &things[i]) == &values[i]);
    }
    /* Removing needs none, and makes room. */
    aiot_ptrmap_remove(&m, &things[0]);
    CHECK(set(&m, n, n) == 0 && m.len == n && is_sound(&m));
    refuse_from = -1;
    aiot_ptrmap_fini(&m, check_free);
    CHECK(live_blocks == 0);
}

static void
random_operations_agree_with_a_plain_array(void)
{
    enum { STEPS = 300000 };
    static void *model[KEYS];
    size_t len = 0;
    aiot_ptrmap m = {0};
    for (int step = 0; step < STEPS; step++) {
        /* Long phases of growing and of shrinking; in some, few keys, so that each is removed and added often. */
        int growing = (step / 10000) % 2 == 0;
        size_t key = random_below((step / 50000) % 2 == 0 ? KEYS : 12);
        if (random_below(10) < (growing ? 7u : 2u)) {
            size_t value = random_below(KEYS);
            CHECK(set(&m, key, value) == 0);
            len += model[key] == NULL;
            model[key] = &values[value];
        }
        else {
            aiot_ptrmap_remove(&m, &things[key]);
            len -= model[key] != NULL;
            model[key] = NULL;
        }
        CHECK(m.len == len && aiot_ptrmap_get(&m, &things[key]) == model[key]);
        if (step % 1000 == 0) {
            CHECK(is_sound(&m));
            for (size_t i = 0; i < KEYS; i++) {
                CHECK(aiot_ptrmap_get(&m, &things[i]) == model[i]);
            }
        }
    }
    aiot_ptrmap_fini(&m, check_free);
    CHECK(m.room == 0 && m.len == 0 && live_blocks == 0);
}

/* Keys that all have the same home, next to the end of the table: chains wrap round, and removals must move them back. */
static void
chains_that_wrap_round_survive_removals_in_any_order(void)
{
    enum { CHAIN = 5 };
    const void *chain[CHAIN];
    size_t found = 0;
    /* The table starts with 8 slots: where a key goes alone is its home. */
    for (size_t i = 0; i < KEYS && found < CHAIN; i++) {
        aiot_ptrmap probe = {0};
        CHECK(aiot_ptrmap_set(&probe, &things[i], values, check_calloc, check_free) == 0);
        if (probe.slots[6].key != NULL) {
            chain[found++] = &things[i];
        }
        aiot_ptrmap_fini(&probe, check_free);
    }
    CHECK(found == CHAIN);
    for (size_t first = 0; first < CHAIN; first++) {
        for (size_t second = 0; second < CHAIN; second++) {
            aiot_ptrmap m = {0};
            for (size_t i = 0; i < CHAIN; i++) {
                CHECK(aiot_ptrmap_set(&m, chain[i], &values[i], check_calloc, check_free) == 0);
            }
            CHECK(m.room == 8);
            aiot_ptrmap_remove(&m, chain[first]);
            aiot_ptrmap_remove(&m, chain[second]);
            for (size_t i = 0; i < CHAIN; i++) {
                void *expected = i == first || i == second ? NULL : (void *)&values[i];
                CHECK(aiot_ptrmap_get(&m, chain[i]) == expected);
            }
            CHECK(is_sound(&m));
            aiot_ptrmap_fini(&m, check_free);
        }
    }
}

int
main(void)
{
    an_empty_map_holds_nothing_and_allocates_nothing();
    a_key_that_is_there_gets_another_value_without_memory();
    without_memory_nothing_changes();
    random_operations_agree_with_a_plain_array();
    chains_that_wrap_round_survive_removals_in_any_order();
    CHECK(live_blocks == 0);
    printf("test_ptrmap: %d checks passed\n", check_count);
    return 0;
}
