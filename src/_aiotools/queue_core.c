/* queue_core.c: the items of a queue, who waits for them, and the rules of handing over.
 *
 * Hand-off:   items stay in the queue until whoever gets them resumes; a wake-up is a ticket. Who has one takes an item,
 *             or, if one who did not wait was quicker, goes back to its place in the line. A ticket that is given up
 *             (cancelled, timed out) goes to the next in line. Room for putters is handed over in the same way.
 * Invariants: (with the lock free) a getter is in the line only while count <= tickets of getters, and none is once the
 *             queue is shut down and empty; a putter is in the line only while the free room <= tickets of
 *             putters, and none is after shutdown. dispatch_lock_held() restores both after each change.
 *             The order numbers in a line rise from its head.
 * Locking:    `lock` guards all fields; with the GIL it is the GIL. Nothing under it runs Python code, allocates
 *             or drops a reference. What runs hooks holds the guard (queue_hooks.c) first, then takes `lock` for moments.
 *             Threads are woken under the lock, since they free their entries after; awaitables after it.
 * Re-entry:   waking awaitables runs code of loops, dropping items runs finalizers: both after the locks are free.
 * Fork:       the first use in a child forgets the lines, whose threads and loops the child does not have, without
 *             looking into them: their memory may be in use for something else.
 */

#include "queue_core.h"

/* ---- lines --------------------------------------------------------------------------------------------------- */

static void
lines_init(QueueCore *core)
{
    for (int side = 0; side < AIOT_Q_SIDES; side++) {
        aiot_link_init(&core->lines[side].waiting);
        core->lines[side].tickets = 0;
        core->lines[side].n = 0;
    }
}

void
aiot_q_after_fork(QueueCore *core)
{
    core->forks = aiot_fork_count;
    lines_init(core);
    core->rehoming = core->rehome_again = false;
    aiot_q_guard_after_fork(core);
}

#ifdef AIOT_DEBUG
static bool
lines_are_consistent(QueueCore *core)
{
    for (int side = 0; side < AIOT_Q_SIDES; side++) {
        aiot_q_line *line = &core->lines[side];
        uint64_t order = 0;
        Py_ssize_t waiting = 0;
        for (aiot_link *link = line->waiting.next; link != &line->waiting; link = link->next) {
            aiot_q_entry *entry = AIOT_CONTAINER_OF(link, aiot_q_entry, link);
            if (entry->place != AIOT_Q_WAITING || entry->side != side || entry->order <= order) {
                return false;
            }
            order = entry->order;
            waiting++;
        }
        if (line->tickets < 0 || line->n != waiting + line->tickets) {
            return false;
        }
    }
    return core->guarded || (core->count == (Py_ssize_t)core->items.len && aiot_chunks_check(&core->items));
}
#endif

/* Puts it at its place: at the end, or, having been in it before, before all that came later. */
static void
link_lock_held(QueueCore *core, aiot_q_entry *entry)
{
    aiot_q_line *line = &core->lines[entry->side];
    aiot_link *before = &line->waiting;
    if (entry->order == 0) {
        entry->order = ++core->last_order;
    }
    else {
        /* Those before it came back as well: few. */
        before = line->waiting.next;
        while (before != &line->waiting && AIOT_CONTAINER_OF(before, aiot_q_entry, link)->order < entry->order) {
            before = before->next;
        }
    }
    aiot_link_insert_between(before->prev, &entry->link, before);
    entry->forks = core->forks;
    entry->place = AIOT_Q_WAITING;
    line->n++;
}

/* Takes it out of where it is. True if it had a ticket. *unlinked: the line's reference to the owner is yours. */
static bool
unlink_lock_held(QueueCore *core, aiot_q_entry *entry, bool *unlinked)
{
    uint8_t place = entry->place;
    *unlinked = false;
    if (place == AIOT_Q_OUT) {
        return false;
    }
    entry->place = AIOT_Q_OUT;
    if (entry->forks != core->forks) {
        aiot_link_init(&entry->link);
        return false;
    }
    core->lines[entry->side].n--;
    if (place == AIOT_Q_TICKET) {
        core->lines[entry->side].tickets--;
        return true;
    }
    aiot_link_remove(&entry->link);
    *unlinked = true;
    return false;
}

static void
issue_ticket_lock_held(aiot_q_line *line, aiot_q_woken *woken)
{
    aiot_q_entry *entry = AIOT_CONTAINER_OF(line->waiting.next, aiot_q_entry, link);
    aiot_link_remove(&entry->link);
    entry->place = AIOT_Q_TICKET;
    line->tickets++;
    if (entry->wake_lock != NULL) {
        PyThread_release_lock(entry->wake_lock);
        return;
    }
    entry->next_woken = NULL;
    if (woken->last == NULL) {
        woken->first = entry;
    }
    else {
        woken->last->next_woken = entry;
    }
    woken->last = entry;
}

/* Gives tickets to all who can go on. */
static inline void
dispatch_lock_held(QueueCore *core, aiot_q_woken *woken)
{
    aiot_q_line *line = &core->lines[AIOT_Q_GET];
    while (!aiot_link_is_empty(&line->waiting) && (core->count > line->tickets || (core->shut && core->count <= 0))) {
        issue_ticket_lock_held(line, woken);
    }
    line = &core->lines[AIOT_Q_PUT];
    while (!aiot_link_is_empty(&line->waiting)
           && (core->shut || core->maxsize <= 0 || core->maxsize - core->count > line->tickets))
    {
        issue_ticket_lock_held(line, woken);
    }
    line = &core->lines[AIOT_Q_JOIN];
    while (core->unfinished == 0 && !aiot_link_is_empty(&line->waiting)) {
        issue_ticket_lock_held(line, woken);
    }
    AIOT_CHECK(lines_are_consistent(core));
}

/* ---- waking -------------------------------------------------------------------------------------------------- */

/* The state of the loop that runs in this thread: new reference, or NULL without an exception. */
static AiotLoop *
loop_that_runs_here(aiot_state *state)
{
    AiotLoop *found = NULL;
    PyObject *loop = aiot_call_noargs(state->maybe_running_loop);
    if (loop != NULL && loop != Py_None) {
        found = aiot_loop_get(state, loop);
    }
    Py_XDECREF(loop);
    if (found == NULL) {
        PyErr_Clear();
    }
    return found;
}

static AIOT_NOINLINE void
wake_all(QueueCore *core, aiot_q_woken *woken)
{
    PyObject *pending = PyErr_GetRaisedException();
    AiotLoop *here = loop_that_runs_here(core->state);
    aiot_q_entry *entry = woken->first;
    while (entry != NULL) {
        /* Once it is told, it may go. */
        aiot_q_entry *next = entry->next_woken;
        PyObject *owner = entry->owner;
        aiot_q_wake_awaitable(owner, here);
        Py_DECREF(owner);
        entry = next;
    }
    Py_XDECREF(here);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

static inline void
wake(QueueCore *core, aiot_q_woken *woken)
{
    if (woken->first != NULL) {
        wake_all(core, woken);
    }
}

void
aiot_q_leave(QueueCore *core, aiot_q_entry *entry)
{
    aiot_q_woken woken = {0};
    bool unlinked;
    aiot_q_lock(core);
    if (unlink_lock_held(core, entry, &unlinked)) {
        dispatch_lock_held(core, &woken);
    }
    aiot_q_unlock(core);
    wake(core, &woken);
    if (unlinked) {
        Py_XDECREF(entry->owner);
    }
}

void
aiot_q_unwake(QueueCore *core, aiot_q_entry *entry)
{
    PyObject *owner = Py_XNewRef(entry->owner);     /* the line's */
    bool unlinked;
    aiot_q_lock(core);
    bool had_ticket = unlink_lock_held(core, entry, &unlinked);
    if (had_ticket || unlinked) {
        link_lock_held(core, entry);
    }
    aiot_q_unlock(core);
    if (!had_ticket) {
        Py_XDECREF(owner);
    }
}

void
aiot_q_rehome(QueueCore *core, aiot_q_entry *entry)
{
    bool unlinked;
    aiot_q_lock(core);
    bool had_ticket = unlink_lock_held(core, entry, &unlinked);
    if (!had_ticket || core->rehoming) {
        core->rehome_again = core->rehome_again || had_ticket;
        aiot_q_unlock(core);
        if (unlinked) {
            Py_XDECREF(entry->owner);
        }
        return;
    }
    core->rehoming = true;
    do {
        aiot_q_woken woken = {0};
        core->rehome_again = false;
        dispatch_lock_held(core, &woken);
        aiot_q_unlock(core);
        wake(core, &woken);
        aiot_q_lock(core);
    } while (core->rehome_again);
    core->rehoming = false;
    aiot_q_unlock(core);
}

/* ---- one item ------------------------------------------------------------------------------------------------ */

/* May somebody of that manner have one of `available` things, of which the tickets' holders wait for some? */
static inline bool
may_have(Py_ssize_t available, Py_ssize_t tickets, aiot_q_manner manner, bool had_ticket)
{
    return available > 0
           && (tickets == 0 || had_ticket || manner == AIOT_Q_NOWAIT
               || (manner == AIOT_Q_BLOCK && available > tickets));
}

static inline bool
may_get_lock_held(QueueCore *core, aiot_q_manner manner, bool had_ticket)
{
    return may_have(core->count, core->lines[AIOT_Q_GET].tickets, manner, had_ticket);
}

static inline bool
may_put_lock_held(QueueCore *core, aiot_q_manner manner, bool had_ticket)
{
    Py_ssize_t room = core->maxsize <= 0 ? PY_SSIZE_T_MAX : core->maxsize - core->count;
    return may_have(room, core->lines[AIOT_Q_PUT].tickets, manner, had_ticket);
}

/* The owner's reference of the line is taken by the caller, before the lock. */
static inline aiot_q_outcome
wait_lock_held(QueueCore *core, aiot_q_entry *entry, bool link)
{
    if (!link) {
        return AIOT_Q_MUST_WAIT;
    }
    link_lock_held(core, entry);
    return AIOT_Q_LINKED;
}

static inline void
count_put_lock_held(QueueCore *core, Py_ssize_t count)
{
    core->count = count;
    core->unfinished++;
    core->n_put++;
    if (count > core->most) {
        core->most = count;
    }
}

/* Before and after the lock, for the reference that the line owns while the entry waits in it. */
typedef struct {
    PyObject *owner;
    bool unlinked;
} line_reference;

static inline line_reference
line_reference_take(aiot_q_entry *entry, bool link)
{
    line_reference reference = {link ? Py_XNewRef(entry->owner) : NULL, false};
    return reference;
}

static inline void
line_reference_drop(line_reference reference, aiot_q_entry *entry, aiot_q_outcome outcome)
{
    if (outcome != AIOT_Q_LINKED) {
        Py_XDECREF(reference.owner);
    }
    if (reference.unlinked) {
        Py_XDECREF(entry->owner);
    }
}

static aiot_q_outcome
get_guarded(QueueCore *core, aiot_q_manner manner, aiot_q_entry *entry, bool link, PyObject **out)
{
    if (aiot_q_guard_enter(core) < 0) {
        return AIOT_Q_ERROR;
    }
    aiot_q_woken woken = {0};
    line_reference reference = line_reference_take(entry, link);
    aiot_q_outcome outcome = AIOT_Q_ERROR;
    bool may = false;
    Py_ssize_t n = aiot_q_hook_qsize(core);
    aiot_q_lock(core);
    bool had_ticket = entry != NULL && unlink_lock_held(core, entry, &reference.unlinked);
    if (n >= 0) {
        core->count = n;
        may = may_get_lock_held(core, manner, had_ticket);
        if (!may) {
            outcome = core->shut && n == 0 ? AIOT_Q_SHUT_DOWN : wait_lock_held(core, entry, link);
        }
    }
    if (!may) {
        dispatch_lock_held(core, &woken);
    }
    aiot_q_unlock(core);
    if (may) {
        *out = aiot_q_hook_get(core);
        aiot_q_lock(core);
        if (*out != NULL) {
            outcome = AIOT_Q_DONE;
            core->count = n - 1;
            core->n_got++;
        }
        dispatch_lock_held(core, &woken);
        aiot_q_unlock(core);
    }
    aiot_q_guard_exit(core);
    wake(core, &woken);
    line_reference_drop(reference, entry, outcome);
    return outcome;
}

static inline aiot_q_outcome
get_one(QueueCore *core, aiot_q_manner manner, aiot_q_entry *entry, bool link, PyObject **out)
{
    if (core->guarded) {
        return get_guarded(core, manner, entry, link, out);
    }
    aiot_q_woken woken = {0};
    line_reference reference = line_reference_take(entry, link);
    aiot_chunk *needless = NULL;
    aiot_q_outcome outcome;
    aiot_q_lock(core);
    bool had_ticket = entry != NULL && unlink_lock_held(core, entry, &reference.unlinked);
    if (AIOT_LIKELY(may_get_lock_held(core, manner, had_ticket))) {
        *out = core->order == AIOT_Q_FIFO ? aiot_chunks_pop_front(&core->items, &needless)
                                          : aiot_chunks_pop_back(&core->items, &needless);
        core->count--;
        core->n_got++;
        outcome = AIOT_Q_DONE;
    }
    else if (core->shut && core->count == 0) {
        outcome = AIOT_Q_SHUT_DOWN;
    }
    else {
        outcome = wait_lock_held(core, entry, link);
    }
    dispatch_lock_held(core, &woken);
    aiot_q_unlock(core);
    if (needless != NULL) {
        PyMem_RawFree(needless);
    }
    wake(core, &woken);
    line_reference_drop(reference, entry, outcome);
    return outcome;
}

static aiot_q_outcome
put_guarded(QueueCore *core, aiot_q_manner manner, aiot_q_entry *entry, bool link, PyObject *item)
{
    if (aiot_q_guard_enter(core) < 0) {
        return AIOT_Q_ERROR;
    }
    aiot_q_woken woken = {0};
    line_reference reference = line_reference_take(entry, link);
    aiot_q_outcome outcome = AIOT_Q_ERROR;
    bool may = false;
    Py_ssize_t n = aiot_q_hook_qsize(core);
    aiot_q_lock(core);
    bool had_ticket = entry != NULL && unlink_lock_held(core, entry, &reference.unlinked);
    if (n >= 0) {
        core->count = n;
        may = !core->shut && may_put_lock_held(core, manner, had_ticket);
        if (!may) {
            outcome = core->shut ? AIOT_Q_SHUT_DOWN : wait_lock_held(core, entry, link);
        }
    }
    if (!may) {
        dispatch_lock_held(core, &woken);
    }
    aiot_q_unlock(core);
    if (may) {
        int failed = aiot_q_hook_put(core, item);
        aiot_q_lock(core);
        if (!failed) {
            outcome = AIOT_Q_DONE;
            count_put_lock_held(core, n + 1);
        }
        dispatch_lock_held(core, &woken);
        aiot_q_unlock(core);
    }
    aiot_q_guard_exit(core);
    wake(core, &woken);
    line_reference_drop(reference, entry, outcome);
    return outcome;
}

/* Takes a reference to the item, if it takes it. */
static inline aiot_q_outcome
put_one(QueueCore *core, aiot_q_manner manner, aiot_q_entry *entry, bool link, PyObject *item)
{
    if (core->guarded) {
        return put_guarded(core, manner, entry, link, item);
    }
    aiot_q_woken woken = {0};
    line_reference reference = line_reference_take(entry, link);
    aiot_chunk *chunk = NULL;
    aiot_q_outcome outcome;
    bool had_ticket = false;
    aiot_q_lock(core);
    if (entry != NULL) {
        had_ticket = unlink_lock_held(core, entry, &reference.unlinked);
    }
    for (;;) {
        if (core->shut) {
            outcome = AIOT_Q_SHUT_DOWN;
        }
        else if (AIOT_UNLIKELY(!may_put_lock_held(core, manner, had_ticket))) {
            outcome = wait_lock_held(core, entry, link);
        }
        else if (AIOT_UNLIKELY(aiot_chunks_must_grow(&core->items)) && chunk == NULL) {
            aiot_q_unlock(core);
            chunk = PyMem_RawMalloc(sizeof(aiot_chunk));
            aiot_q_lock(core);
            if (chunk != NULL) {
                continue;
            }
            outcome = AIOT_Q_ERROR;
        }
        else {
            if (chunk != NULL && aiot_chunks_give(&core->items, chunk)) {
                chunk = NULL;
            }
            Py_INCREF(item);
            aiot_chunks_push_back(&core->items, item);
            count_put_lock_held(core, core->count + 1);
            outcome = AIOT_Q_DONE;
        }
        break;
    }
    dispatch_lock_held(core, &woken);
    aiot_q_unlock(core);
    if (chunk != NULL) {
        PyMem_RawFree(chunk);
    }
    wake(core, &woken);
    line_reference_drop(reference, entry, outcome);
    if (outcome == AIOT_Q_ERROR) {
        PyErr_NoMemory();
    }
    return outcome;
}

/* ---- requests ------------------------------------------------------------------------------------------------ */

static Py_ssize_t
count_now(QueueCore *core)
{
    aiot_q_lock(core);
    Py_ssize_t count = core->guarded && !(core->overridden & AIOT_HOOK_QSIZE) ? aiot_q_store_len(core) : core->count;
    aiot_q_unlock(core);
    return count;
}

static aiot_q_outcome
get_many(QueueCore *core, Py_ssize_t max, aiot_q_manner manner, aiot_q_entry *entry, bool link, PyObject **out)
{
    /* Room for all of them first: an item that was taken must not be lost for want of memory. */
    Py_ssize_t n = count_now(core);
    n = n < 1 ? 1 : n > max ? max : n;
    PyObject *list = PyList_New(n);
    if (list == NULL) {
        return AIOT_Q_ERROR;
    }
    Py_ssize_t taken = 0;
    PyObject *item;
    aiot_q_outcome outcome = get_one(core, manner, entry, link, &item);
    if (outcome != AIOT_Q_DONE) {
        Py_DECREF(list);
        return outcome;
    }
    if (manner == AIOT_Q_IN_LINE) {
        manner = AIOT_Q_BLOCK;
    }
    do {
        PyList_SET_ITEM(list, taken++, item);
    } while (taken < n && (outcome = get_one(core, manner, NULL, false, &item)) == AIOT_Q_DONE);
    if (outcome == AIOT_Q_ERROR) {
        /* The items are out of the queue: hand them over. A hook that goes on failing is heard at the next call. */
        aiot_write_unraisable((PyObject *)core);
    }
    if (taken < n) {
        Py_SET_SIZE(list, taken);
    }
    *out = list;
    return AIOT_Q_DONE;
}

static aiot_q_outcome
put_many(QueueCore *core, aiot_q_request *request, aiot_q_manner manner, aiot_q_entry *entry, bool link)
{
    if (request->n >= PyList_GET_SIZE(request->in)) {
        return AIOT_Q_DONE;
    }
    do {
        aiot_q_outcome outcome = put_one(core, manner, entry, link, PyList_GET_ITEM(request->in, request->n));
        if (outcome != AIOT_Q_DONE) {
            return outcome;
        }
    } while (++request->n < PyList_GET_SIZE(request->in));
    return AIOT_Q_DONE;
}

static aiot_q_outcome
join(QueueCore *core, aiot_q_entry *entry, bool link)
{
    line_reference reference = line_reference_take(entry, link);
    aiot_q_outcome outcome = AIOT_Q_DONE;
    aiot_q_lock(core);
    /* Once it was woken it is over, even if there is a new task by now: as with asyncio.Queue. */
    bool had_ticket = entry != NULL && unlink_lock_held(core, entry, &reference.unlinked);
    if (!had_ticket && core->unfinished > 0) {
        outcome = wait_lock_held(core, entry, link);
    }
    aiot_q_unlock(core);
    line_reference_drop(reference, entry, outcome);
    return outcome;
}

aiot_q_outcome
aiot_q_try(QueueCore *core, aiot_q_request *request, aiot_q_manner manner, aiot_q_entry *entry, bool link)
{
    aiot_q_outcome outcome;
    switch (request->kind) {
    case AIOT_REQ_GET:
        return get_one(core, manner, entry, link, &request->out);
    case AIOT_REQ_PUT:
        outcome = put_one(core, manner, entry, link, request->in);
        request->n = outcome == AIOT_Q_DONE;
        return outcome;
    case AIOT_REQ_GET_MANY:
        return get_many(core, request->max, manner, entry, link, &request->out);
    case AIOT_REQ_PUT_MANY:
        return put_many(core, request, manner, entry, link);
    case AIOT_REQ_JOIN:
        return join(core, entry, link);
    case AIOT_REQ_CLOSE:
        return aiot_q_shutdown(core, true) < 0 ? AIOT_Q_ERROR : AIOT_Q_DONE;
    default:
        assert(request->kind == AIOT_REQ_WAIT_CLOSED);
        if (aiot_q_is_shut(core)) {
            return AIOT_Q_DONE;
        }
        PyErr_SetString(PyExc_RuntimeError, "Waiting for non-closed queue");
        return AIOT_Q_ERROR;
    }
}

/* ---- the rest ------------------------------------------------------------------------------------------------ */

Py_ssize_t
aiot_q_qsize(QueueCore *core)
{
    if (!(core->overridden & AIOT_HOOK_QSIZE)) {
        return count_now(core);
    }
    if (aiot_q_guard_enter(core) < 0) {
        return -1;
    }
    Py_ssize_t n = aiot_q_hook_qsize(core);
    aiot_q_guard_exit(core);
    return n;
}

PyObject *
aiot_q_peek(QueueCore *core)
{
    PyObject *item = NULL;
    if (core->guarded) {
        if (aiot_q_guard_enter(core) < 0) {
            return NULL;
        }
        if (aiot_q_hook_qsize(core) > 0) {
            item = aiot_q_hook_peek(core);
        }
        aiot_q_guard_exit(core);
        return item;
    }
    aiot_q_lock(core);
    if (core->count > 0) {
        item = Py_NewRef(core->order == AIOT_Q_FIFO ? aiot_chunks_front(&core->items) : aiot_chunks_back(&core->items));
    }
    aiot_q_unlock(core);
    return item;
}

int
aiot_q_task_done(QueueCore *core)
{
    aiot_q_woken woken = {0};
    aiot_q_lock(core);
    bool too_many = core->unfinished <= 0;
    if (!too_many && --core->unfinished == 0) {
        dispatch_lock_held(core, &woken);
    }
    aiot_q_unlock(core);
    wake(core, &woken);
    if (too_many) {
        PyErr_SetString(PyExc_ValueError, "task_done() called too many times");
        return -1;
    }
    return 0;
}

static int
drop_item(void *item, void *Py_UNUSED(arg))
{
    Py_DECREF((PyObject *)item);
    return 0;
}

static void
finish_tasks_lock_held(QueueCore *core, Py_ssize_t n)
{
    core->unfinished = core->unfinished > n ? core->unfinished - n : 0;
}

/* Takes everything out by the hooks, into a list; the guard is held. 0, or -1 with a hook's exception. */
static int
drain_guarded(QueueCore *core, PyObject *list)
{
    Py_ssize_t n;
    while ((n = aiot_q_hook_qsize(core)) > 0) {
        PyObject *item = aiot_q_hook_get(core);
        if (item == NULL) {
            return -1;
        }
        aiot_q_lock(core);
        core->count = n - 1;
        finish_tasks_lock_held(core, 1);
        aiot_q_unlock(core);
        int failed = PyList_Append(list, item);
        Py_DECREF(item);
        if (failed) {
            return -1;
        }
    }
    if (n == 0) {
        aiot_q_lock(core);
        core->count = 0;
        aiot_q_unlock(core);
    }
    return n < 0 ? -1 : 0;
}

static int
shutdown_guarded(QueueCore *core, bool immediate)
{
    PyObject *dropped = PyList_New(0);
    if (dropped == NULL) {
        return -1;
    }
    if (aiot_q_guard_enter(core) < 0) {
        Py_DECREF(dropped);
        return -1;
    }
    aiot_q_woken woken = {0};
    aiot_q_lock(core);
    core->shut = true;
    aiot_q_unlock(core);
    int failed = immediate ? drain_guarded(core, dropped) : 0;
    aiot_q_lock(core);
    dispatch_lock_held(core, &woken);
    aiot_q_unlock(core);
    aiot_q_guard_exit(core);
    wake(core, &woken);
    PyObject *pending = PyErr_GetRaisedException();
    Py_DECREF(dropped);
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
    return failed;
}

int
aiot_q_shutdown(QueueCore *core, bool immediate)
{
    if (core->guarded) {
        return shutdown_guarded(core, immediate);
    }
    aiot_q_woken woken = {0};
    aiot_chunks dropped;
    aiot_chunks_init(&dropped);
    aiot_q_lock(core);
    core->shut = true;
    if (immediate) {
        aiot_chunks_take_all(&core->items, &dropped);
        finish_tasks_lock_held(core, core->count);
        core->count = 0;
    }
    dispatch_lock_held(core, &woken);
    aiot_q_unlock(core);
    wake(core, &woken);
    aiot_chunks_visit(&dropped, drop_item, NULL);
    aiot_chunks_fini(&dropped, PyMem_RawFree);
    return 0;
}

bool
aiot_q_is_shut(QueueCore *core)
{
    aiot_q_lock(core);
    bool shut = core->shut;
    aiot_q_unlock(core);
    return shut;
}

PyObject *
aiot_q_statistics(QueueCore *core)
{
    Py_ssize_t qsize = aiot_q_qsize(core);
    if (qsize < 0) {
        return NULL;
    }
    aiot_q_lock(core);
    Py_ssize_t unfinished = core->unfinished, most = core->most;
    Py_ssize_t getters = core->lines[AIOT_Q_GET].n, putters = core->lines[AIOT_Q_PUT].n;
    Py_ssize_t joiners = core->lines[AIOT_Q_JOIN].n;
    unsigned long long put = core->n_put, got = core->n_got;
    bool shut = core->shut;
    aiot_q_unlock(core);
    return PyObject_CallFunction(core->state->QueueStatistics, "nnnnnnnKKO", core->maxsize, qsize, most, unfinished,
                                 getters, putters, joiners, put, got, shut ? Py_True : Py_False);
}

/* ---- the type ------------------------------------------------------------------------------------------------ */

QueueCore *
aiot_q_core_new(aiot_state *state, aiot_q_order order, int overridden, PyObject *hooks)
{
    PyTypeObject *type = state->QueueCoreType;
    QueueCore *core = (QueueCore *)type->tp_alloc(type, 0);
    if (core == NULL) {
        return NULL;
    }
    core->state = state;
    core->module = Py_NewRef(PyType_GetModule(type));
    core->forks = aiot_fork_count;
    lines_init(core);
    aiot_chunks_init(&core->items);
    core->order = order;
    core->overridden = (uint8_t)overridden;
    core->guarded = overridden || order == AIOT_Q_HEAP;
    if (overridden) {
        core->hooks = Py_NewRef(hooks);
    }
    if (core->guarded && (core->guard = PyThread_allocate_lock()) == NULL) {
        Py_DECREF(core);
        PyErr_NoMemory();
        return NULL;
    }
    return core;
}

typedef struct {
    visitproc visit;
    void *arg;
} visit_and_arg;

static int
visit_item(void *item, void *arg)
{
    visit_and_arg *v = arg;
    return v->visit((PyObject *)item, v->arg);
}

static int
QueueCore_traverse(PyObject *op, visitproc visit, void *arg)
{
    QueueCore *self = (QueueCore *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->module);
    Py_VISIT(self->hooks);
    visit_and_arg v = {visit, arg};
    int answer = aiot_chunks_visit(&self->items, visit_item, &v);
    if (answer != 0) {
        return answer;
    }
    for (size_t i = 0; i < self->heap_len; i++) {
        Py_VISIT(self->heap[i]);
    }
    if (self->forks != aiot_fork_count) {
        /* The entries may be gone. What they owned is not freed then. */
        return 0;
    }
    for (int side = 0; side < AIOT_Q_SIDES; side++) {
        aiot_link *head = &self->lines[side].waiting;
        for (aiot_link *link = head->next; link != head; link = link->next) {
            Py_VISIT(AIOT_CONTAINER_OF(link, aiot_q_entry, link)->owner);
        }
    }
    return 0;
}

static int
QueueCore_clear(PyObject *op)
{
    QueueCore *self = (QueueCore *)op;
    aiot_chunks items;
    aiot_q_lock(self);
    aiot_chunks_take_all(&self->items, &items);
    self->count = 0;
    PyObject **heap = self->heap;
    size_t heap_len = self->heap_len;
    self->heap = NULL;
    self->heap_len = self->heap_room = 0;
    aiot_q_unlock(self);
    /* No thread is blocked in what nobody refers to: only awaitables are left. */
    for (int side = 0; side < AIOT_Q_SIDES; side++) {
        aiot_link *head = &self->lines[side].waiting;
        while (!aiot_link_is_empty(head)) {
            aiot_q_entry *entry = AIOT_CONTAINER_OF(head->next, aiot_q_entry, link);
            bool unlinked;
            unlink_lock_held(self, entry, &unlinked);
            Py_XDECREF(entry->owner);
        }
    }
    aiot_chunks_visit(&items, drop_item, NULL);
    aiot_chunks_fini(&items, PyMem_RawFree);
    for (size_t i = 0; i < heap_len; i++) {
        Py_DECREF(heap[i]);
    }
    PyMem_Free(heap);
    Py_CLEAR(self->hooks);
    return 0;
}

static void
QueueCore_dealloc(PyObject *op)
{
    QueueCore *self = (QueueCore *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    /* A queue in a queue in a queue ... */
    AIOT_TRASHCAN_BEGIN(op, QueueCore_dealloc)
    QueueCore_clear(op);
    if (self->guard != NULL && !self->lost_in_fork) {
        PyThread_free_lock(self->guard);
    }
    PyObject *module = self->module;
    type->tp_free(op);
    Py_DECREF(type);
    Py_XDECREF(module);
    AIOT_TRASHCAN_END
}

static PyType_Slot QueueCore_slots[] = {
    {Py_tp_doc, "What a queue and its two sides have in common."},
    {Py_tp_traverse, QueueCore_traverse},
    {Py_tp_clear, QueueCore_clear},
    {Py_tp_dealloc, QueueCore_dealloc},
    {0, NULL},
};

static PyType_Spec QueueCore_spec = {
    .name = "aiotools._aiotools.QueueCore",
    .basicsize = sizeof(QueueCore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = QueueCore_slots,
};

int
aiot_queue_core_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if (aiot_forks_init() < 0) {
        PyErr_NoMemory();
        return -1;
    }
    return aiot_add_type(module, &state->QueueCoreType, &QueueCore_spec, NULL, false);
}
