#include "ring.h"

#include "check.h"

#include <stdint.h>

static char things[5000];    /* their addresses are the items */

static void
an_empty_ring_gives_null_and_allocates_nothing(void)
{
    aiot_ring r;
    aiot_ring_init(&r, check_realloc, check_free);
    CHECK(aiot_ring_pop_front(&r) == NULL && aiot_ring_pop_back(&r) == NULL);
    CHECK(aiot_ring_len(&r) == 0 && live_blocks == 0 && aiot_ring_check(&r));
    aiot_ring_fini(&r);
}

static void
random_operations_agree_with_a_plain_array(void)
{
    enum { STEPS = 200000, MIDDLE = 100000 };
    static void *model[2 * MIDDLE + STEPS];
    size_t front = MIDDLE, back = MIDDLE;    /* model[front .. back) */
    aiot_ring r;
    aiot_ring_init(&r, check_realloc, check_free);
    for (int step = 0; step < STEPS; step++) {
        void *item = &things[random_below(sizeof things)];
        /* Long phases of growing and of shrinking. */
        int growing = (step / 5000) % 2 == 0;
        int push = random_below(10) < (growing ? 7u : 3u);
        int at_front = random_below(2) && front > 1 && front < 2 * MIDDLE;
        if (push && at_front) {
            CHECK(aiot_ring_push_front(&r, item) == 0);
            model[--front] = item;
        }
        else if (push) {
            CHECK(aiot_ring_push_back(&r, item) == 0);
            model[back++] = item;
        }
        else if (front == back) {
            CHECK(aiot_ring_pop_front(&r) == NULL && aiot_ring_pop_back(&r) == NULL);
        }
        else if (at_front) {
            CHECK(aiot_ring_pop_front(&r) == model[front++]);
        }
        else {
            CHECK(aiot_ring_pop_back(&r) == model[--back]);
        }
        CHECK(aiot_ring_len(&r) == back - front);
        if (step % 500 == 0) {
            CHECK(aiot_ring_check(&r));
            for (size_t i = front; i < back; i++) {
                CHECK(aiot_ring_at(&r, i - front) == model[i]);
            }
        }
    }
    aiot_ring_fini(&r);
}

static void
room_follows_the_number_of_items(void)
{
    aiot_ring r;
    aiot_ring_init(&r, check_realloc, check_free);
    for (size_t i = 0; i < sizeof things; i++) {
        CHECK(aiot_ring_push_back(&r, &things[i]) == 0);
    }
    CHECK(r.room == 8192);
    for (size_t i = 0; i < sizeof things; i++) {
        CHECK(aiot_ring_pop_front(&r) == &things[i]);
    }
    CHECK(r.room == AIOT_RING_MIN_ROOM);
    aiot_ring_fini(&r);
}

static void
without_memory_nothing_changes(void)
{
    aiot_ring r;
    aiot_ring_init(&r, check_realloc, check_free);
    refuse_from = 0;
    CHECK(aiot_ring_push_back(&r, things) == -1);
    CHECK(aiot_ring_push_front(&r, things) == -1);
    CHECK(aiot_ring_reserve(&r, 1) == -1);
    CHECK(aiot_ring_len(&r) == 0 && aiot_ring_check(&r));
    refuse_from = -1;
    for (int i = 0; i < 16; i++) {
        CHECK(aiot_ring_push_front(&r, &things[i]) == 0);
    }
    refuse_from = 0;
    CHECK(aiot_ring_push_back(&r, things) == -1);
    CHECK(aiot_ring_push_front(&r, things) == -1);
    CHECK(aiot_ring_len(&r) == 16 && aiot_ring_check(&r));
    refuse_from = -1;
    CHECK(aiot_ring_reserve(&r, 4000) == 0);
    refuse_from = 0;
    /* What was reserved needs no memory; a smaller array cannot be had, and is not needed. */
    for (int i = 16; i < 4016; i++) {
        CHECK(aiot_ring_push_front(&r, &things[i]) == 0);
    }
    for (int i = 0; i < 4016; i++) {
        CHECK(aiot_ring_pop_back(&r) == &things[i]);
    }
    CHECK(aiot_ring_len(&r) == 0 && aiot_ring_check(&r));
    refuse_from = -1;
    aiot_ring_fini(&r);
}

static void
impossible_reservations_are_refused(void)
{
    aiot_ring r;
    aiot_ring_init(&r, check_realloc, check_free);
    CHECK(aiot_ring_push_back(&r, things) == 0);
    CHECK(aiot_ring_reserve(&r, SIZE_MAX) == -1);
    CHECK(aiot_ring_reserve(&r, SIZE_MAX - 1) == -1);
    CHECK(aiot_ring_reserve(&r, SIZE_MAX / 2) == -1);
    CHECK(aiot_ring_len(&r) == 1 && aiot_ring_check(&r));
    CHECK(aiot_ring_reserve(&r, 0) == 0);
    aiot_ring_fini(&r);
}

int
main(void)
{
    an_empty_ring_gives_null_and_allocates_nothing();
    random_operations_agree_with_a_plain_array();
    room_follows_the_number_of_items();
    without_memory_nothing_changes();
    impossible_reservations_are_refused();
    CHECK(live_blocks == 0);
    printf("test_ring: %d checks passed\n", check_count);
    return 0;
}
