#include "chunks.h"

#include "check.h"

#include <string.h>

static char things[5000];    /* their addresses are the items */

static void
push(aiot_chunks *c, void *item)
{
    if (aiot_chunks_must_grow(c)) {
        CHECK(aiot_chunks_give(c, check_realloc(NULL, sizeof(aiot_chunk))));
    }
    CHECK(!aiot_chunks_must_grow(c));
    aiot_chunks_push_back(c, item);
}

static void *
pop(aiot_chunks *c, int front)
{
    aiot_chunk *needless;
    void *item = front ? aiot_chunks_pop_front(c, &needless) : aiot_chunks_pop_back(c, &needless);
    check_free(needless);
    return item;
}

static void
an_empty_sequence_needs_a_chunk_and_has_none(void)
{
    aiot_chunks c;
    aiot_chunks_init(&c);
    CHECK(aiot_chunks_must_grow(&c) && aiot_chunks_check(&c) && live_blocks == 0);
    aiot_chunks_fini(&c, check_free);
    CHECK(live_blocks == 0);
}

static void
a_second_spare_chunk_is_refused(void)
{
    aiot_chunks c;
    aiot_chunks_init(&c);
    aiot_chunk *chunk = check_realloc(NULL, sizeof(aiot_chunk)), *another = check_realloc(NULL, sizeof(aiot_chunk));
    CHECK(aiot_chunks_give(&c, chunk) && !aiot_chunks_give(&c, another));
    check_free(another);
    aiot_chunks_fini(&c, check_free);
    CHECK(live_blocks == 0);
}

static int
compare(void *item, void *arg)
{
    void ***expected = arg;
    return *(*expected)++ == item ? 0 : 7;
}

static void
random_operations_agree_with_a_plain_array(void)
{
    enum { STEPS = 200000 };
    static void *model[STEPS + 1];
    size_t front = 0, back = 0;
    aiot_chunks c;
    aiot_chunks_init(&c);
    for (int step = 0; step < STEPS; step++) {
        int growing = (step / 3000) % 2 == 0;
        if (random_below(10) < (growing ? 7u : 3u)) {
            void *item = &things[random_below(sizeof things)];
            push(&c, item);
            model[back++] = item;
        }
        else if (front < back) {
            int from_front = (int)random_below(3) > 0;
            CHECK(aiot_chunks_front(&c) == model[front] && aiot_chunks_back(&c) == model[back - 1]);
            void *expected = from_front ? model[front++] : model[--back];
            CHECK(pop(&c, from_front) == expected);
        }
        CHECK(c.len == back - front);
        if (step % 64 == 0 || c.len < 3) {
            CHECK(aiot_chunks_check(&c));
        }
        if (step % 1000 == 0) {
            void **expected = model + front;
            CHECK(aiot_chunks_visit(&c, compare, &expected) == 0 && expected == model + back);
        }
    }
    aiot_chunks_fini(&c, check_free);
    CHECK(live_blocks == 0 && c.len == 0);
}

static void
a_short_queue_allocates_no_more_than_two_chunks(void)
{
    aiot_chunks c;
    aiot_chunks_init(&c);
    for (int i = 0; i < 3 * AIOT_CHUNK_ITEMS; i++) {
        push(&c, &things[i]);
        push(&c, &things[i]);
        pop(&c, 1);
        CHECK(pop(&c, 1) == &things[i]);
    }
    push(&c, things);
    for (int i = 0; i < 10 * AIOT_CHUNK_ITEMS; i++) {
        push(&c, &things[i]);
        pop(&c, 1);
    }
    CHECK(live_blocks <= 2 && c.len == 1);
    aiot_chunks_fini(&c, check_free);
    CHECK(live_blocks == 0);
}

static void
taking_all_leaves_nothing(void)
{
    aiot_chunks c, taken;
    aiot_chunks_init(&c);
    for (int i = 0; i < 200; i++) {
        push(&c, &things[i]);
    }
    aiot_chunks_take_all(&c, &taken);
    CHECK(c.len == 0 && aiot_chunks_must_grow(&c) && aiot_chunks_check(&c));
    CHECK(taken.len == 200 && aiot_chunks_check(&taken) && aiot_chunks_front(&taken) == things);
    push(&c, things);
    aiot_chunks_fini(&c, check_free);
    aiot_chunks_fini(&taken, check_free);
    CHECK(live_blocks == 0);
}

int
main(void)
{
    an_empty_sequence_needs_a_chunk_and_has_none();
    a_second_spare_chunk_is_refused();
    random_operations_agree_with_a_plain_array();
    a_short_queue_allocates_no_more_than_two_chunks();
    taking_all_leaves_nothing();
    printf("test_chunks: %d checks passed\n", check_count);
    return 0;
}
