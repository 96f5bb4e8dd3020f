#include "link.h"

#include "check.h"

typedef struct {
    int number;
    aiot_link link;
} item;

static void
expect(aiot_link *head, const int *numbers, int count)
{
    aiot_link *l = head;
    for (int i = 0; i < count; i++) {
        CHECK(l->next->prev == l);
        l = l->next;
        CHECK(l != head);
        CHECK(AIOT_CONTAINER_OF(l, item, link)->number == numbers[i]);
    }
    CHECK(l->next == head && head->prev == l);
    CHECK(aiot_link_is_empty(head) == (count == 0));
    CHECK(aiot_link_first(head) == (count ? head->next : NULL));
}

int
main(void)
{
    aiot_link head, other;
    item items[5];
    aiot_link_init(&head);
    aiot_link_init(&other);
    for (int i = 0; i < 5; i++) {
        items[i].number = i;
        aiot_link_init(&items[i].link);
        CHECK(aiot_link_is_out(&items[i].link));
    }
    expect(&head, NULL, 0);

    /* Appending keeps order, prepending reverses it. */
    aiot_link_append(&head, &items[0].link);
    expect(&head, (int[]){0}, 1);
    aiot_link_append(&head, &items[1].link);
    aiot_link_prepend(&head, &items[2].link);
    aiot_link_prepend(&head, &items[3].link);
    expect(&head, (int[]){3, 2, 0, 1}, 4);
    CHECK(!aiot_link_is_out(&items[0].link));

    /* A removed link is out, may be removed again, and may enter again. */
    aiot_link_remove(&items[2].link);
    CHECK(aiot_link_is_out(&items[2].link));
    aiot_link_remove(&items[2].link);
    expect(&head, (int[]){3, 0, 1}, 3);
    aiot_link_remove(&items[3].link);
    aiot_link_remove(&items[1].link);
    expect(&head, (int[]){0}, 1);
    aiot_link_remove(&items[0].link);
    expect(&head, NULL, 0);

    /* Splicing: into empty, into filled, from empty. */
    aiot_link_append(&other, &items[4].link);
    aiot_link_append(&other, &items[3].link);
    aiot_link_splice(&head, &other);
    expect(&head, (int[]){4, 3}, 2);
    expect(&other, NULL, 0);
    aiot_link_append(&other, &items[2].link);
    aiot_link_append(&other, &items[1].link);
    aiot_link_splice(&head, &other);
    expect(&head, (int[]){4, 3, 2, 1}, 4);
    expect(&other, NULL, 0);
    aiot_link_splice(&head, &other);
    expect(&head, (int[]){4, 3, 2, 1}, 4);
    aiot_link_splice(&other, &head);
    expect(&other, (int[]){4, 3, 2, 1}, 4);
    expect(&head, NULL, 0);

    printf("test_link: %d checks passed\n", check_count);
    return 0;
}
