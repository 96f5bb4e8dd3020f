#include "heap.h"

#include "check.h"

#include <math.h>

static void
empty_heap_has_no_first_and_allocates_nothing(void)
{
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    CHECK(aiot_heap_first(&h) == NULL);
    CHECK(aiot_heap_len(&h) == 0);
    CHECK(live_blocks == 0);
    CHECK(aiot_heap_check(&h));
    aiot_heap_fini(&h);
}

static void
equal_deadlines_come_out_in_order_of_setting(void)
{
    enum { N = 200 };
    static aiot_heap_node nodes[N];
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    for (int i = 0; i < N; i++) {
        aiot_heap_node_init(&nodes[i]);
        CHECK(!aiot_heap_has(&nodes[i]));
        CHECK(aiot_heap_push(&h, &nodes[i], i % 2 ? 2.0 : 1.0) == 0);
        CHECK(aiot_heap_has(&nodes[i]));
    }
    for (int i = 0; i < N; i++) {
        aiot_heap_node *first = aiot_heap_first(&h);
        CHECK(first == &nodes[i < N / 2 ? 2 * i : 2 * (i - N / 2) + 1]);
        aiot_heap_remove(&h, first);
        CHECK(!aiot_heap_has(first));
        CHECK(aiot_heap_check(&h));
    }
    aiot_heap_fini(&h);
}

static void
a_shift_moves_all_and_new_ties_come_out_in_order_of_setting(void)
{
    enum { N = 300 };
    static aiot_heap_node nodes[N];
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    aiot_heap_shift(&h, 1.0);
    for (int i = 0; i < N; i++) {
        aiot_heap_node_init(&nodes[i]);
        CHECK(aiot_heap_push(&h, &nodes[i], i % 3 ? random_below(1000) * 1e-12 : INFINITY) == 0);
    }
    aiot_heap_shift(&h, 0.5);
    CHECK(aiot_heap_check(&h));
    CHECK(aiot_heap_first(&h)->when >= 0.5 && aiot_heap_first(&h)->when < 0.51);
    /* So large a clock cannot tell them apart. */
    aiot_heap_shift(&h, 1.7e9);
    CHECK(aiot_heap_check(&h));
    for (int i = 0; i < N; i++) {
        if (i % 3) {
            CHECK(aiot_heap_first(&h) == &nodes[i] && nodes[i].when == 1.7e9 + 0.5);
            aiot_heap_remove(&h, &nodes[i]);
        }
    }
    for (int i = 0; i < N; i += 3) {
        CHECK(aiot_heap_first(&h) == &nodes[i] && isinf(nodes[i].when));
        aiot_heap_remove(&h, &nodes[i]);
    }
    aiot_heap_fini(&h);
}

static void
move_counts_as_set_now(void)
{
    aiot_heap_node a, b;
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    aiot_heap_node_init(&a);
    aiot_heap_node_init(&b);
    CHECK(aiot_heap_push(&h, &a, 1.0) == 0);
    CHECK(aiot_heap_push(&h, &b, 1.0) == 0);
    CHECK(aiot_heap_first(&h) == &a);
    aiot_heap_move(&h, &a, 1.0);
    CHECK(aiot_heap_first(&h) == &b);
    aiot_heap_move(&h, &b, 1.0);
    CHECK(aiot_heap_first(&h) == &a);
    aiot_heap_move(&h, &a, 5.0);
    CHECK(aiot_heap_first(&h) == &b);
    aiot_heap_move(&h, &a, 0.5);
    CHECK(aiot_heap_first(&h) == &a && a.when == 0.5);
    aiot_heap_fini(&h);
}

static void
infinities_and_negative_zero_have_their_place(void)
{
    aiot_heap_node late, never, before, zero, minus_zero;
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    aiot_heap_node *all[] = {&never, &late, &zero, &minus_zero, &before};
    double whens[] = {INFINITY, 1e300, 0.0, -0.0, -INFINITY};
    for (int i = 0; i < 5; i++) {
        aiot_heap_node_init(all[i]);
        CHECK(aiot_heap_push(&h, all[i], whens[i]) == 0);
    }
    aiot_heap_node *expected[] = {&before, &zero, &minus_zero, &late, &never};
    for (int i = 0; i < 5; i++) {
        CHECK(aiot_heap_first(&h) == expected[i]);
        aiot_heap_remove(&h, expected[i]);
    }
    aiot_heap_fini(&h);
}

static void
fini_puts_the_remaining_nodes_out(void)
{
    aiot_heap_node nodes[40];
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    for (int i = 0; i < 40; i++) {
        aiot_heap_node_init(&nodes[i]);
        CHECK(aiot_heap_push(&h, &nodes[i], i) == 0);
    }
    aiot_heap_fini(&h);
    for (int i = 0; i < 40; i++) {
        CHECK(!aiot_heap_has(&nodes[i]));
    }
    CHECK(live_blocks == 0);
    CHECK(aiot_heap_push(&h, &nodes[3], 1.0) == 0);
    CHECK(aiot_heap_first(&h) == &nodes[3]);
    aiot_heap_fini(&h);
}

static void
push_without_memory_changes_nothing(void)
{
    static aiot_heap_node nodes[100];
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    int refused = 0;
    for (int i = 0; i < 100; i++) {
        aiot_heap_node_init(&nodes[i]);
        refuse_from = 0;
        if (aiot_heap_push(&h, &nodes[i], 100 - i) < 0) {
            refused++;
            CHECK(!aiot_heap_has(&nodes[i]));
            CHECK(aiot_heap_len(&h) == (size_t)i);
            CHECK(aiot_heap_check(&h));
            refuse_from = -1;
            CHECK(aiot_heap_push(&h, &nodes[i], 100 - i) == 0);
        }
        refuse_from = -1;
        CHECK(aiot_heap_first(&h) == &nodes[i]);
    }
    CHECK(refused == 4);    /* at 0, 16, 32 and 64 nodes */
    aiot_heap_fini(&h);
}

static void
removal_gives_memory_back_and_works_without_memory(void)
{
    enum { N = 10000 };
    static aiot_heap_node nodes[N];
    for (int no_memory = 0; no_memory < 2; no_memory++) {
        aiot_heap h;
        aiot_heap_init(&h, check_realloc, check_free);
        for (int i = 0; i < N; i++) {
            aiot_heap_node_init(&nodes[i]);
            CHECK(aiot_heap_push(&h, &nodes[i], (double)random_below(1000)) == 0);
        }
        size_t room = h.room;
        CHECK(room >= N);
        refuse_from = no_memory ? 0 : -1;
        for (int i = 0; i < N; i++) {
            aiot_heap_remove(&h, &nodes[i]);
        }
        refuse_from = -1;
        CHECK(aiot_heap_len(&h) == 0 && aiot_heap_check(&h));
        CHECK(no_memory ? h.room == room : h.room <= 16);
        aiot_heap_fini(&h);
    }
}

static void
random_operations_keep_order_and_invariants(void)
{
    enum { N = 300, STEPS = 60000 };
    static aiot_heap_node nodes[N];
    static unsigned long long set_at[N];    /* the model: (when, set_at) */
    static double when[N];
    unsigned long long now = 0;
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    for (int i = 0; i < N; i++) {
        aiot_heap_node_init(&nodes[i]);
    }
    for (int step = 0; step < STEPS; step++) {
        unsigned i = random_below(N);
        double w = random_below(50);
        if (!aiot_heap_has(&nodes[i])) {
            CHECK(aiot_heap_push(&h, &nodes[i], w) == 0);
            when[i] = w;
            set_at[i] = now++;
        }
        else if (random_below(2)) {
            aiot_heap_move(&h, &nodes[i], w);
            when[i] = w;
            set_at[i] = now++;
        }
        else {
            aiot_heap_remove(&h, &nodes[i]);
        }
        if (step % 64) {
            continue;
        }
        CHECK(aiot_heap_check(&h));
        int first = -1;
        size_t len = 0;
        for (int k = 0; k < N; k++) {
            if (aiot_heap_has(&nodes[k])) {
                len++;
                CHECK(aiot_heap_at(&h, nodes[k].place) == &nodes[k]);
                if (first < 0 || when[k] < when[first] || (when[k] == when[first] && set_at[k] < set_at[first])) {
                    first = k;
                }
            }
        }
        CHECK(len == aiot_heap_len(&h));
        CHECK(aiot_heap_first(&h) == (first < 0 ? NULL : &nodes[first]));
    }
    aiot_heap_fini(&h);
}

/* How many entries went to another place since the last call. */
static size_t
count_moved(const aiot_heap_node *nodes, size_t *places, size_t n)
{
    size_t moved = 0;
    for (size_t i = 0; i < n; i++) {
        moved += nodes[i].place != places[i];
        places[i] = nodes[i].place;
    }
    return moved;
}

/* One entry per level, each compared with four others at most. */
static void
a_million_deadlines_cost_twice_the_steps_of_a_thousand(void)
{
    for (size_t n = 1000, levels = 6; n <= 1000000; n *= 1000, levels += 5) {
        aiot_heap_node *nodes = calloc(n, sizeof(*nodes));
        size_t *places = calloc(n, sizeof(*places));
        CHECK(nodes != NULL && places != NULL);
        aiot_heap h;
        aiot_heap_init(&h, check_realloc, check_free);
        for (size_t i = 0; i < n; i++) {
            aiot_heap_node_init(&nodes[i]);
            CHECK(aiot_heap_push(&h, &nodes[i], random_below(1000000000)) == 0);
        }
        CHECK(h.room <= 2 * n);
        count_moved(nodes, places, n);
        refuse_from = 0;
        for (int i = 0; i < 8; i++) {
            aiot_heap_node *node = &nodes[random_below((unsigned)n)];
            aiot_heap_move(&h, node, i % 2 == 0 ? -1.0 - i : random_below(1000000000));
            CHECK(count_moved(nodes, places, n) <= levels + 1);
            aiot_heap_remove(&h, aiot_heap_first(&h));
            CHECK(count_moved(nodes, places, n) <= levels + 1);
        }
        refuse_from = -1;
        CHECK(aiot_heap_check(&h));
        aiot_heap_fini(&h);
        free(nodes);
        free(places);
    }
}

static void
check_sees_a_broken_heap(void)
{
    aiot_heap_node nodes[8];
    aiot_heap h;
    aiot_heap_init(&h, check_realloc, check_free);
    for (int i = 0; i < 8; i++) {
        aiot_heap_node_init(&nodes[i]);
        CHECK(aiot_heap_push(&h, &nodes[i], i) == 0);
    }
    CHECK(aiot_heap_check(&h));
    nodes[5].place = 6;
    CHECK(!aiot_heap_check(&h));
    nodes[5].place = 5;
    nodes[7].when = -1.0;
    CHECK(!aiot_heap_check(&h));
    h.entries[7].when = -1.0;
    CHECK(!aiot_heap_check(&h));
    nodes[7].when = h.entries[7].when = 7.0;
    CHECK(aiot_heap_check(&h));
    aiot_heap_fini(&h);
}

int
main(void)
{
    empty_heap_has_no_first_and_allocates_nothing();
    equal_deadlines_come_out_in_order_of_setting();
    a_shift_moves_all_and_new_ties_come_out_in_order_of_setting();
    move_counts_as_set_now();
    infinities_and_negative_zero_have_their_place();
    fini_puts_the_remaining_nodes_out();
    push_without_memory_changes_nothing();
    removal_gives_memory_back_and_works_without_memory();
    random_operations_keep_order_and_invariants();
    a_million_deadlines_cost_twice_the_steps_of_a_thousand();
    check_sees_a_broken_heap();
    CHECK(live_blocks == 0);
    printf("test_heap: %d checks passed\n", check_count);
    return 0;
}
