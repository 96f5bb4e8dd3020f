/* chunks.c: a sequence of pointers in chunks; what is not for the hot path.
 *
 *      first                 last
 *      [ . . . a b c ] <-> [ d e . . . ]      spare: [ ]
 *        head  ^                 ^ tail
 *
 * Invariants: first and last are NULL together; head < AIOT_CHUNK_ITEMS; tail > 0 unless the sequence is empty; with len 0
 *             there is one chunk at most and head == tail == 0.
 * Locking:    none; the sequence belongs to one owner.
 */
#include "chunks.h"

int
aiot_chunks_check(const aiot_chunks *c)
{
    if (c->first == NULL || c->last == NULL) {
        return c->first == c->last && c->len == 0 && c->head == 0 && c->tail == 0;
    }
    if (c->first->prev != NULL || c->last->next != NULL || c->head >= AIOT_CHUNK_ITEMS || c->tail > AIOT_CHUNK_ITEMS) {
        return 0;
    }
    size_t chunks = 1;
    for (const aiot_chunk *chunk = c->first; chunk != c->last; chunk = chunk->next) {
        if (chunk->next == NULL || chunk->next->prev != chunk) {
            return 0;
        }
        chunks++;
    }
    if (c->len == 0) {
        return chunks == 1 && c->head == 0 && c->tail == 0;
    }
    return c->tail > 0 && c->len == (chunks - 1) * AIOT_CHUNK_ITEMS + c->tail - c->head;
}

int
aiot_chunks_visit(const aiot_chunks *c, int (*visit)(void *item, void *arg), void *arg)
{
    for (const aiot_chunk *chunk = c->first; chunk != NULL; chunk = chunk->next) {
        unsigned begin = chunk == c->first ? c->head : 0;
        unsigned end = chunk == c->last ? c->tail : AIOT_CHUNK_ITEMS;
        for (unsigned i = begin; i < end; i++) {
            int answer = visit(chunk->items[i], arg);
            if (answer != 0) {
                return answer;
            }
        }
    }
    return 0;
}

void
aiot_chunks_take_all(aiot_chunks *c, aiot_chunks *taken)
{
    *taken = *c;
    aiot_chunks_init(c);
}

void
aiot_chunks_fini(aiot_chunks *c, void (*free_fn)(void *))
{
    aiot_chunk *chunk = c->first;
    while (chunk != NULL) {
        aiot_chunk *next = chunk->next;
        free_fn(chunk);
        chunk = next;
    }
    if (c->spare != NULL) {
        free_fn(c->spare);
    }
    aiot_chunks_init(c);
}
