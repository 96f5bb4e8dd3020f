/* lrucache_store.c: what lru_cache keeps: keys, entries, for how long, and which of them goes first.
 *
 * The picture of the whole is in lrucache_core.h.
 */

#include "lrucache_core.h"

/* ---- keys ---------------------------------------------------------------------------------------------------- */

/* As functools makes them: a lone str or int is its own key; else a tuple of the arguments, with a mark before the
 * keywords, and the types of all values when these count. */
static PyObject *
key_of_arguments(aiot_state *state, bool typed, PyObject *instance, PyObject *const *args, Py_ssize_t nargs,
                 PyObject *kwnames)
{
    Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    Py_ssize_t n = nargs + (instance != NULL);
    if (!typed && nkw == 0 && n == 1) {
        PyObject *only = instance != NULL ? instance : args[0];
        if (PyUnicode_CheckExact(only) || PyLong_CheckExact(only)) {
            return Py_NewRef(only);
        }
    }
    PyObject *key = PyTuple_New(n + (nkw > 0 ? 1 + 2 * nkw : 0) + (typed ? n + nkw : 0));
    if (key == NULL) {
        return NULL;
    }
    Py_ssize_t at = 0;
    if (instance != NULL) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(instance));
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(args[i]));
    }
    if (nkw > 0) {
        PyTuple_SET_ITEM(key, at++, Py_NewRef(state->lru_mark));
        for (Py_ssize_t i = 0; i < nkw; i++) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef(PyTuple_GET_ITEM(kwnames, i)));
            PyTuple_SET_ITEM(key, at++, Py_NewRef(args[nargs + i]));
        }
    }
    if (typed) {
        if (instance != NULL) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef((PyObject *)Py_TYPE(instance)));
        }
        for (Py_ssize_t i = 0; i < nargs + nkw; i++) {
            PyTuple_SET_ITEM(key, at++, Py_NewRef((PyObject *)Py_TYPE(args[i])));
        }
    }
    return key;
}

/* f(instance, *args, **kwargs), for arguments as a vectorcall has them. */
static PyObject *
call_with_instance(PyObject *func, PyObject *instance, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    Py_ssize_t n = nargs + (kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames));
    PyObject **all = PyMem_New(PyObject *, n + 1);
    if (all == NULL) {
        return PyErr_NoMemory();
    }
    all[0] = instance;
    for (Py_ssize_t i = 0; i < n; i++) {
        all[i + 1] = args[i];
    }
    PyObject *answer = PyObject_Vectorcall(func, all, (size_t)nargs + 1, kwnames);
    PyMem_Free(all);
    return answer;
}

PyObject *
aiot_lru_key(aiot_state *state, CacheObject *self, PyObject *instance, PyObject *const *args, Py_ssize_t nargs,
             PyObject *kwnames)
{
    if (AIOT_LIKELY(self->key_func == NULL)) {
        return key_of_arguments(state, self->typed, instance, args, nargs, kwnames);
    }
    if (instance != NULL) {
        return call_with_instance(self->key_func, instance, args, nargs, kwnames);
    }
    return PyObject_Vectorcall(self->key_func, args, (size_t)nargs, kwnames);
}

/* The way back: a new tuple of the arguments, and in *kwargs a dict or NULL, of a key that key_of_arguments made. */
static PyObject *
arguments_of_key(aiot_state *state, bool typed, PyObject *key, PyObject **kwargs)
{
    *kwargs = NULL;
    if (!PyTuple_CheckExact(key)) {
        return PyTuple_Pack(1, key);
    }
    Py_ssize_t len = PyTuple_GET_SIZE(key), mark = 0;
    while (mark < len && PyTuple_GET_ITEM(key, mark) != state->lru_mark) {
        mark++;
    }
    if (mark == len) {
        return PyTuple_GetSlice(key, 0, typed ? len / 2 : len);
    }
    Py_ssize_t nkw = typed ? (len - 2 * mark - 1) / 3 : (len - mark - 1) / 2;
    PyObject *dict = PyDict_New();
    if (dict == NULL) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nkw; i++) {
        PyObject *name = PyTuple_GET_ITEM(key, mark + 1 + 2 * i);
        if (PyDict_SetItem(dict, name, PyTuple_GET_ITEM(key, mark + 2 + 2 * i)) < 0) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    PyObject *args = PyTuple_GetSlice(key, 0, mark);
    if (args == NULL) {
        Py_DECREF(dict);
        return NULL;
    }
    *kwargs = dict;
    return args;
}

/* ---- time ---------------------------------------------------------------------------------------------------- */

/* The clock of a loop, finer than its time() where that counts milliseconds. 0 or -1. */
static int
loop_now(AiotLoop *loop, aiot_lru_time *now)
{
    now->shift = loop->clock_shift;
    return aiot_loop_deadline(loop, 0.0, &now->at);
}

int
aiot_lru_now(CacheObject *self, AiotLoop *loop, aiot_lru_time *now)
{
    if (AIOT_LIKELY(loop != NULL)) {
        return loop_now(loop, now);
    }
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *running = aiot_call_noargs(state->maybe_running_loop);
    if (running == NULL) {
        return -1;
    }
    if (running != Py_None) {
        loop = aiot_loop_get(state, running);
    }
    else if (self->loop != NULL) {
        loop = (AiotLoop *)Py_NewRef((PyObject *)self->loop);
    }
    Py_DECREF(running);
    if (PyErr_Occurred()) {
        return -1;
    }
    int failed;
    PyObject *alive = loop == NULL ? NULL : aiot_loop_object_anywhere(loop);
    if (alive != NULL) {
        failed = loop_now(loop, now);
        Py_DECREF(alive);
    }
    else {
        /* What all loops count by that nobody changed. */
        PyObject *reading = PyObject_CallNoArgs(state->time_monotonic);
        now->at = reading == NULL ? -1.0 : PyFloat_AsDouble(reading);
        now->shift = 0.0;
        failed = now->at == -1.0 && PyErr_Occurred() ? -1 : 0;
        Py_XDECREF(reading);
    }
    Py_XDECREF(loop);
    return failed;
}

static bool
entry_is_gone(EntryObject *self, aiot_lru_time now)
{
    return !aiot_lru_is_before(now, self->gone_at, self->shift);
}

/* ---- entries ------------------------------------------------------------------------------------------------- */

static EntryObject *
entry_new(aiot_state *state, CacheObject *cache, PyObject *key)
{
    EntryObject *self = (EntryObject *)state->LruEntryType->tp_alloc(state->LruEntryType, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_heap_node_init(&self->deadline);
    aiot_link_init(&self->recent);
    aiot_link_init(&self->flights);
    self->cache = (CacheObject *)Py_NewRef((PyObject *)cache);
    self->key = Py_NewRef(key);
    return self;
}

static void
entry_no_deadline(EntryObject *self)
{
    if (aiot_heap_has(&self->deadline)) {
        aiot_heap_remove(&self->cache->deadlines, &self->deadline);
    }
}

static void
entry_no_weight(EntryObject *self)
{
    self->cache->weight -= self->weight;
    self->weight = 0;
}

/* EMPTY it is, whatever else. */
static void
entry_forget(EntryObject *self)
{
    entry_no_deadline(self);
    entry_no_weight(self);
    self->content = EMPTY;
    PyObject *value = self->value, *traceback = self->traceback;
    self->value = self->traceback = NULL;
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* dict.pop(key), if it leads to this entry. Sets no exception. */
static void
entry_leave_dict(EntryObject *self)
{
    PyObject *entries = Py_NewRef(self->cache->entries);
    PyObject *found;
    int failed = PyDict_GetItemRef(entries, self->key, &found);
    if (failed > 0) {
        failed = found == (PyObject *)self ? PyDict_DelItem(entries, self->key) : 0;
        Py_DECREF(found);
    }
    if (failed < 0) {
        /* A key that can't be compared any more. What stays in the dict does not count as cached. */
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) {
            aiot_write_unraisable((PyObject *)self->cache);
        }
        PyErr_Clear();
    }
    Py_DECREF(entries);
}

/* A refresh whose result nobody will see. */
static FlightObject *
vain_refresh(EntryObject *self)
{
    for (aiot_link *link = self->flights.next; link != &self->flights; link = link->next) {
        FlightObject *flight = AIOT_CONTAINER_OF(link, FlightObject, in_entry);
        if (flight->background && !flight->stopping && aiot_link_is_empty(&flight->waiting)) {
            return flight;
        }
    }
    return NULL;
}

void
aiot_lru_drop(EntryObject *self)
{
    if (!self->cached) {
        return;
    }
    self->cached = false;
    aiot_lru_unlink(&self->recent);
    entry_no_deadline(self);
    entry_no_weight(self);
    PyObject *pending = PyErr_GetRaisedException();
    entry_leave_dict(self);
    FlightObject *flight;
    while ((flight = vain_refresh(self)) != NULL) {
        Py_INCREF(flight);
        aiot_lru_stop(flight);
        flight->stopping = true;
        Py_DECREF(flight);
    }
    if (pending != NULL) {
        PyErr_SetRaisedException(pending);
    }
}

void
aiot_lru_drop_if_vain(EntryObject *self)
{
    if (self->content == EMPTY && aiot_link_is_empty(&self->flights)) {
        aiot_lru_drop(self);
    }
}

/* What it holds is over; a flight that is under way brings something new. */
static void
entry_expire(EntryObject *self)
{
    Py_INCREF(self);
    if (aiot_link_is_empty(&self->flights)) {
        aiot_lru_drop(self);
    }
    else {
        entry_forget(self);
    }
    Py_DECREF(self);
}

static void
drop_least_recent(CacheObject *self)
{
    EntryObject *first = AIOT_CONTAINER_OF(aiot_link_first(&self->recent), EntryObject, recent);
    Py_INCREF(first);
    aiot_lru_drop(first);
    Py_DECREF(first);
}

static void
expire_until(CacheObject *self, aiot_lru_time now)
{
    aiot_heap_node *node;
    while ((node = aiot_heap_first(&self->deadlines)) != NULL) {
        EntryObject *first = AIOT_CONTAINER_OF(node, EntryObject, deadline);
        if (!entry_is_gone(first, now)) {
            break;
        }
        entry_expire(first);
    }
}

int
aiot_lru_expire(CacheObject *self)
{
    if (aiot_heap_len(&self->deadlines) == 0) {
        return 0;
    }
    aiot_lru_time now;
    if (aiot_lru_now(self, NULL, &now) < 0) {
        return -1;
    }
    expire_until(self, now);
    return 0;
}

int
aiot_lru_find_current(CacheObject *self, AiotLoop *loop, PyObject *key, EntryObject **found, bool *fresh)
{
    int there = aiot_lru_find(self, key, found);
    *fresh = true;
    if (there <= 0 || (*found)->content == EMPTY || isinf((*found)->fresh_until)) {
        return there;
    }
    aiot_lru_time now;
    if (aiot_lru_now(self, loop, &now) < 0) {
        Py_CLEAR(*found);
        return -1;
    }
    if (entry_is_gone(*found, now)) {
        entry_expire(*found);
        if (!(*found)->cached) {
            Py_CLEAR(*found);
            return 0;
        }
        return 1;
    }
    *fresh = aiot_lru_is_before(now, (*found)->fresh_until, (*found)->shift);
    return 1;
}

/* PyDict_SetDefaultRef() of 3.13: 1 when it was there, 0 when it was put in, -1. */
static int
set_default(PyObject *dict, PyObject *key, PyObject *value, PyObject **found)
{
#if PY_VERSION_HEX >= 0x030D0000
    return PyDict_SetDefaultRef(dict, key, value, found);
#else
    *found = Py_XNewRef(PyDict_SetDefault(dict, key, value));
    return *found == NULL ? -1 : *found != value;
#endif
}

EntryObject *
aiot_lru_obtain(aiot_state *state, CacheObject *self, PyObject *key)
{
    EntryObject *entry = entry_new(state, self, key);
    if (entry == NULL) {
        return NULL;
    }
    PyObject *found;
    int there = set_default(self->entries, key, (PyObject *)entry, &found);
    if (there > 0 && ((EntryObject *)found)->cached) {
        Py_DECREF(entry);
        return (EntryObject *)found;
    }
    if (there > 0) {
        /* What does not count as cached gives way. */
        there = PyDict_SetItem(self->entries, key, (PyObject *)entry);
    }
    Py_XDECREF(found);
    if (there < 0) {
        Py_DECREF(entry);
        return NULL;
    }
    entry->cached = true;
    aiot_link_append(&self->recent, &entry->recent);
    return entry;
}

static bool
is_too_full(CacheObject *self)
{
    return self->maxsize >= 0 && PyDict_GET_SIZE(self->entries) > self->maxsize && !aiot_link_is_empty(&self->recent);
}

void
aiot_lru_evict(CacheObject *self)
{
    if (!is_too_full(self)) {
        return;
    }
    if (aiot_lru_expire(self) < 0) {
        /* Without a clock nothing counts as over. */
        aiot_write_unraisable((PyObject *)self);
    }
    while (is_too_full(self)) {
        drop_least_recent(self);
    }
}

void
aiot_lru_empty(CacheObject *self)
{
    while (!aiot_link_is_empty(&self->recent)) {
        drop_least_recent(self);
    }
    /* Those that could not be found again. */
    PyDict_Clear(self->entries);
}

/* ---- what they hold ------------------------------------------------------------------------------------------ */

int
aiot_lru_weigh(CacheObject *self, PyObject *value, Py_ssize_t *weight)
{
    *weight = 0;
    if (self->weigh == NULL) {
        return 0;
    }
    PyObject *answer = PyObject_CallOneArg(self->weigh, value);
    if (answer == NULL) {
        return -1;
    }
    if (!PyLong_Check(answer)) {
        PyErr_Format(PyExc_TypeError, "weight must return an int, not '%.200s'", Py_TYPE(answer)->tp_name);
        Py_DECREF(answer);
        return -1;
    }
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(answer, &overflow);
    int negative = overflow < 0 || (overflow == 0 && number < 0);
    if (negative) {
        PyErr_Format(PyExc_ValueError, "weight must not return a negative number, as %R", answer);
    }
    Py_DECREF(answer);
    *weight = overflow > 0 || number > PY_SSIZE_T_MAX ? -1 : (Py_ssize_t)number;
    return negative ? -1 : 0;
}

/* Drops the least recently used entries that weigh something until one of them, which stays, may have a new weight. */
static void
make_room(CacheObject *self, EntryObject *but, Py_ssize_t weight)
{
    while (self->weight - but->weight > self->max_weight - weight) {
        aiot_link *link = self->recent.next;
        EntryObject *entry = NULL;
        for (; link != &self->recent; link = link->next) {
            entry = AIOT_CONTAINER_OF(link, EntryObject, recent);
            if (entry->weight > 0 && entry != but) {
                break;
            }
        }
        if (link == &self->recent) {
            break;
        }
        Py_INCREF(entry);
        aiot_lru_drop(entry);
        Py_DECREF(entry);
    }
}

/* 0, or -1 when there is no memory. A time of infinity needs no place among the deadlines. */
static int
entry_set_deadline(EntryObject *self, aiot_lru_time now, double fresh_for, double kept_for)
{
    self->shift = now.shift;
    self->fresh_until = now.at + fresh_for;
    self->gone_at = now.at + kept_for;
    self->retry_at = -INFINITY;
    if (isinf(self->gone_at)) {
        entry_no_deadline(self);
        return 0;
    }
    /* Without the shift, so that all compare. */
    double when = self->gone_at - now.shift;
    if (aiot_heap_has(&self->deadline)) {
        aiot_heap_move(&self->cache->deadlines, &self->deadline, when);
        return 0;
    }
    if (aiot_heap_push(&self->cache->deadlines, &self->deadline, when) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* If it is cached still. value is borrowed, traceback stolen. 0 or -1. */
static int
entry_hold(EntryObject *self, aiot_lru_content content, PyObject *value, PyObject *traceback, Py_ssize_t weight,
           aiot_lru_time now, double fresh_for, double kept_for)
{
    CacheObject *cache = self->cache;
    if (cache->weigh != NULL) {
        make_room(cache, self, weight);
    }
    if (!self->cached) {
        Py_XDECREF(traceback);
        return 0;
    }
    if (entry_set_deadline(self, now, fresh_for, kept_for) < 0) {
        Py_XDECREF(traceback);
        aiot_lru_drop(self);
        return -1;
    }
    cache->weight = cache->weight - self->weight + weight;
    self->weight = weight;
    PyObject *old_value = self->value, *old_traceback = self->traceback;
    self->value = Py_NewRef(value);
    self->traceback = traceback;
    self->content = (uint8_t)content;
    Py_XDECREF(old_value);
    Py_XDECREF(old_traceback);
    return 0;
}

/* How long a result is fresh: 0 or -1. */
static int
fresh_time(CacheObject *cache, double *seconds)
{
    *seconds = cache->expire_after;
    if (cache->random == NULL) {
        return 0;
    }
    PyObject *answer = PyObject_CallNoArgs(cache->random);
    double part = answer == NULL ? -1.0 : PyFloat_AsDouble(answer);
    Py_XDECREF(answer);
    if (part == -1.0 && PyErr_Occurred()) {
        return -1;
    }
    *seconds += part * cache->jitter;
    return 0;
}

int
aiot_lru_keep(EntryObject *self, AiotLoop *loop, PyObject *value, Py_ssize_t weight)
{
    CacheObject *cache = self->cache;
    if (cache->weigh != NULL && (weight < 0 || weight > cache->max_weight)) {
        entry_expire(self);
        return 0;
    }
    aiot_lru_time now = {0.0, 0.0};
    double seconds = INFINITY;
    if (!isinf(cache->expire_after)) {
        if (fresh_time(cache, &seconds) < 0 || aiot_lru_now(cache, loop, &now) < 0) {
            aiot_lru_drop(self);
            return -1;
        }
        expire_until(cache, now);
    }
    return entry_hold(self, VALUE, value, NULL, weight, now, seconds, seconds + cache->stale_for);
}

int
aiot_lru_keep_error(EntryObject *self, AiotLoop *loop, PyObject *exc)
{
    CacheObject *cache = self->cache;
    aiot_lru_time now = {0.0, 0.0};
    if (aiot_lru_now(cache, loop, &now) < 0) {
        return -1;
    }
    expire_until(cache, now);
    if (self->content == VALUE) {
        /* It has its old one still, and shall not be asked for a new one at once. */
        self->retry_at = now.at + (self->shift - now.shift) + cache->errors_for;
        return 0;
    }
    /* With nothing said about their weight, failures count, so that they can't fill the memory. */
    Py_ssize_t weight = cache->weigh == NULL ? 0 : 1;
    if (weight > 0 && weight > cache->max_weight) {
        return 0;
    }
    return entry_hold(self, ERROR, exc, PyException_GetTraceback(exc), weight, now, cache->errors_for,
                      cache->errors_for);
}

/* ---- cache_invalidate_where() -------------------------------------------------------------------------------- */

/* Whether the predicate wants an entry dropped: 1, 0 or -1. Runs any code, without the lock. */
static int
predicate_wants(aiot_state *state, CacheObject *self, EntryObject *entry, PyObject *instance, PyObject *predicate)
{
    PyObject *answer;
    if (self->key_func != NULL) {
        answer = PyObject_CallOneArg(predicate, entry->key);
    }
    else {
        PyObject *kwargs;
        PyObject *args = arguments_of_key(state, self->typed, entry->key, &kwargs);
        if (args == NULL) {
            return -1;
        }
        if (instance != NULL) {
            /* Of this instance only, and without it. */
            if (PyTuple_GET_SIZE(args) == 0 || PyTuple_GET_ITEM(args, 0) != instance) {
                Py_DECREF(args);
                Py_XDECREF(kwargs);
                return 0;
            }
            Py_SETREF(args, PyTuple_GetSlice(args, 1, PyTuple_GET_SIZE(args)));
        }
        answer = args == NULL ? NULL : PyObject_Call(predicate, args, kwargs);
        Py_XDECREF(args);
        Py_XDECREF(kwargs);
    }
    if (answer == NULL) {
        return -1;
    }
    if (PyCoro_CheckExact(answer)) {
        PyObject *closed = PyObject_CallMethodNoArgs(answer, state->str_close);
        Py_DECREF(answer);
        if (closed != NULL) {
            Py_DECREF(closed);
            PyErr_SetString(PyExc_TypeError, "predicate must not be a coroutine function");
        }
        return -1;
    }
    int wants = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return wants;
}

/* A new list of the entries, oldest use first. */
static PyObject *
list_entries_lock_held(CacheObject *self)
{
    PyObject *list = PyList_New(0);
    for (aiot_link *link = self->recent.next; list != NULL && link != &self->recent; link = link->next) {
        if (PyList_Append(list, (PyObject *)AIOT_CONTAINER_OF(link, EntryObject, recent)) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

PyObject *
aiot_lru_invalidate_where(CacheObject *self, PyObject *instance, PyObject *predicate)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *all = NULL;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = aiot_lru_expire(self);
    if (!failed) {
        all = list_entries_lock_held(self);
    }
    Py_END_CRITICAL_SECTION();
    PyObject *unwanted = all == NULL ? NULL : PyList_New(0);
    Py_ssize_t n = unwanted == NULL ? 0 : PyList_GET_SIZE(all);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *entry = PyList_GET_ITEM(all, i);
        int wants = predicate_wants(state, self, (EntryObject *)entry, instance, predicate);
        if (wants < 0 || (wants > 0 && PyList_Append(unwanted, entry) < 0)) {
            Py_CLEAR(unwanted);
            break;
        }
    }
    Py_XDECREF(all);
    if (unwanted == NULL) {
        return NULL;
    }
    Py_ssize_t dropped = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(unwanted); i++) {
        EntryObject *entry = (EntryObject *)PyList_GET_ITEM(unwanted, i);
        dropped += entry->cached;
        aiot_lru_drop(entry);
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(unwanted);
    return PyLong_FromSsize_t(dropped);
}

/* ---- the type of entries -------------------------------------------------------------------------------------- */

static int
Entry_traverse(PyObject *op, visitproc visit, void *arg)
{
    EntryObject *self = (EntryObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->cache);
    Py_VISIT(self->key);
    Py_VISIT(self->value);
    Py_VISIT(self->traceback);
    return 0;
}

static void
Entry_dealloc(PyObject *op)
{
    EntryObject *self = (EntryObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    assert(aiot_link_is_empty(&self->flights));
    /* In the lists still when the collector emptied the dict. */
    Py_BEGIN_CRITICAL_SECTION(self->cache);
    aiot_lru_unlink(&self->recent);
    entry_no_deadline(self);
    entry_no_weight(self);
    Py_END_CRITICAL_SECTION();
    Py_CLEAR(self->value);
    Py_CLEAR(self->traceback);
    Py_CLEAR(self->key);
    Py_CLEAR(self->cache);
    type->tp_free(op);
    Py_DECREF(type);
}

/* No tp_clear: a flight that somebody waits for needs its entry; the cache clears the dict, and so breaks the cycles. */
static PyType_Slot Entry_slots[] = {
    {Py_tp_doc, "What one key of a cache leads to."},
    {Py_tp_traverse, Entry_traverse},
    {Py_tp_dealloc, Entry_dealloc},
    {0, NULL},
};

static PyType_Spec Entry_spec = {
    .name = "aiotools._aiotools.LruEntry",
    .basicsize = sizeof(EntryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Entry_slots,
};

int
aiot_lrucache_store_add_types(PyObject *module)
{
    return aiot_add_type(module, &aiot_state_of_module(module)->LruEntryType, &Entry_spec, NULL, false);
}
