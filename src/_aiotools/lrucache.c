/* lrucache.c: the cache of results of a coroutine function, behind lru_cache(): the callable, bound and not.
 *
 * The picture of the whole is in lrucache_core.h.
 */

#include "lrucache_core.h"

#include "args.h"

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    CacheObject *cache;
    PyObject *instance;
    PyObject *weakrefs;
} BoundObject;

/* ---- calling the cache ----------------------------------------------------------------------------------------- */

/* A new awaitable that is done, when the key's value is there and fresh. 1, 0 or -1. */
static int
cache_hit_lock_held(CacheObject *self, aiot_state *state, PyObject *key, PyObject **result)
{
    EntryObject *entry;
    int there = aiot_lru_find(self, key, &entry);
    if (there <= 0) {
        return there;
    }
    if (entry->content != VALUE) {
        Py_DECREF(entry);
        return 0;
    }
    if (!isinf(entry->fresh_until)) {
        aiot_lru_time now;
        /* Comparing the keys may have cleared the cache, and with it its loop. */
        if (aiot_lru_now(self, self->loop, &now) < 0) {
            Py_DECREF(entry);
            return -1;
        }
        if (!aiot_lru_is_before(now, entry->fresh_until, entry->shift)) {
            Py_DECREF(entry);
            return 0;
        }
    }
    *result = entry->value == Py_None ? aiot_done_none(state) : aiot_done_new(state, entry->value);
    if (*result != NULL) {
        self->hits++;
        aiot_lru_touch(entry);
    }
    Py_DECREF(entry);
    return *result == NULL ? -1 : 1;
}

/* Whether the running loop is the one of the cache; any will do when it is shared, which has none. Anything else is said when
 * the call is awaited. */
static bool
cache_is_at_home_lock_held(CacheObject *self, aiot_state *state)
{
    if (self->loop == NULL) {
        return self->shared;
    }
    PyObject *running = aiot_call_noargs(state->maybe_running_loop);
    if (running == NULL) {
        PyErr_Clear();
        return false;
    }
    bool at_home = self->loop != NULL && running == self->loop->loop;
    Py_DECREF(running);
    return at_home;
}

static PyObject *
cache_call(CacheObject *self, PyObject *instance, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(self));
    PyObject *key = aiot_lru_key(state, self, instance, args, nargs, kwnames);
    if (key == NULL) {
        return NULL;
    }
    PyObject *result = NULL;
    bool at_home;
    int there;
    Py_BEGIN_CRITICAL_SECTION(self);
    there = aiot_lru_check_open(self);
    at_home = cache_is_at_home_lock_held(self, state);
    if (there == 0 && at_home) {
        there = cache_hit_lock_held(self, state, key, &result);
    }
    Py_END_CRITICAL_SECTION();
    if (there == 0 && !at_home && PyObject_Hash(key) == -1) {
        there = -1;
    }
    if (there == 0) {
        result = aiot_lru_call(state, self, key, instance, args, nargs, kwnames);
    }
    Py_DECREF(key);
    return result;
}

static PyObject *
Cache_vectorcall(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    return cache_call((CacheObject *)op, NULL, args, PyVectorcall_NARGS(nargsf), kwnames);
}

static PyObject *
Bound_vectorcall(PyObject *op, PyObject *const *args, size_t nargsf, PyObject *kwnames)
{
    BoundObject *self = (BoundObject *)op;
    return cache_call(self->cache, self->instance, args, PyVectorcall_NARGS(nargsf), kwnames);
}

/* ---- methods of the cache and of what is bound ------------------------------------------------------------------ */

static CacheObject *
cache_of(PyObject *op, PyObject **instance)
{
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    *instance = NULL;
    if (Py_TYPE(op) == state->LruBoundType) {
        *instance = ((BoundObject *)op)->instance;
        return ((BoundObject *)op)->cache;
    }
    return (CacheObject *)op;
}

static PyObject *
maxsize_object(CacheObject *self)
{
    return self->maxsize < 0 ? Py_NewRef(Py_None) : PyLong_FromSsize_t(self->maxsize);
}

PyDoc_STRVAR(cache_info_doc,
"cache_info($self, /)\n--\n\n"
"A named tuple: hits, misses, maxsize, currsize.\n\n"
"Each call counts once, when it starts, whatever becomes of it: as a hit if it finds\n"
"a result or an error, stale or not, or joins a call that is under way, else as a\n"
"miss. currsize includes calls that are under way, and nothing that is expired.");

static PyObject *
cache_info(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    Py_ssize_t hits, misses, size;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = aiot_lru_expire(self);
    hits = self->hits;
    misses = self->misses;
    size = PyDict_GET_SIZE(self->entries);
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    return PyObject_CallFunction(aiot_state_of_exact_type(Py_TYPE(op))->LruInfo, "nnNn", hits, misses,
                                 maxsize_object(self), size);
}

PyDoc_STRVAR(cache_parameters_doc,
"cache_parameters($self, /)\n--\n\n"
"A new dict: maxsize, typed, tasks (how many calls are under way), closed.\n\n"
"Of the options that were given also jitter, stale_while_refresh, cache_errors_for,\n"
"shared, max_weight, and weight, which is what all results weigh together now.");

/* dict[name] = value (stolen). 0 or -1. */
static int
set_item(PyObject *dict, const char *name, PyObject *value)
{
    int failed = value == NULL ? -1 : PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return failed;
}

static int
add_options(CacheObject *self, PyObject *dict, Py_ssize_t weight)
{
    if ((self->jitter > 0.0 && set_item(dict, "jitter", PyFloat_FromDouble(self->jitter)) < 0)
        || (self->stale_for > 0.0 && set_item(dict, "stale_while_refresh", PyFloat_FromDouble(self->stale_for)) < 0)
        || (self->errors_for > 0.0 && set_item(dict, "cache_errors_for", PyFloat_FromDouble(self->errors_for)) < 0)
        || (self->shared && set_item(dict, "shared", Py_NewRef(Py_True)) < 0))
    {
        return -1;
    }
    if (self->weigh == NULL) {
        return 0;
    }
    return set_item(dict, "max_weight", PyLong_FromSsize_t(self->max_weight)) < 0
           || set_item(dict, "weight", PyLong_FromSsize_t(weight)) < 0 ? -1 : 0;
}

static PyObject *
cache_parameters(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    Py_ssize_t tasks, weight;
    bool closed;
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = aiot_lru_expire(self);
    tasks = self->n_flights;
    weight = self->weight;
    closed = self->closed;
    Py_END_CRITICAL_SECTION();
    if (failed) {
        return NULL;
    }
    PyObject *dict = Py_BuildValue("{sNsOsnsO}", "maxsize", maxsize_object(self), "typed",
                                   self->typed ? Py_True : Py_False, "tasks", tasks, "closed",
                                   closed ? Py_True : Py_False);
    if (dict != NULL && add_options(self, dict, weight) < 0) {
        Py_CLEAR(dict);
    }
    return dict;
}

PyDoc_STRVAR(cache_clear_doc,
"cache_clear($self, /)\n--\n\n"
"Forget all results and set the counters to zero.\n\n"
"Calls that are under way go on for those who wait for them; their results are\n"
"not kept.");

static PyObject *
cache_clear(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    Py_BEGIN_CRITICAL_SECTION(self);
    self->hits = self->misses = 0;
    aiot_lru_empty(self);
    if (self->n_flights == 0) {
        /* Nothing of that loop is left: the next one may be any. */
        Py_CLEAR(self->loop);
    }
    Py_END_CRITICAL_SECTION();
    Py_RETURN_NONE;
}

/* Is the key of these arguments cached? If drop, not any more. True, False or NULL. */
static PyObject *
cache_look(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, bool drop)
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    PyObject *key = aiot_lru_key(aiot_state_of_exact_type(Py_TYPE(op)), self, instance, args, nargs, kwnames);
    if (key == NULL) {
        return NULL;
    }
    int there;
    Py_BEGIN_CRITICAL_SECTION(self);
    EntryObject *entry;
    bool fresh;
    there = aiot_lru_find_current(self, NULL, key, &entry, &fresh);
    if (there > 0) {
        if (drop) {
            aiot_lru_drop(entry);
        }
        Py_DECREF(entry);
    }
    Py_END_CRITICAL_SECTION();
    Py_DECREF(key);
    return there < 0 ? NULL : PyBool_FromLong(there);
}

PyDoc_STRVAR(cache_invalidate_doc,
"cache_invalidate($self, /, *args, **kwargs)\n--\n\n"
"Forget the result for these arguments. Returns whether there was one.\n\n"
"A call that is under way goes on for those who wait for it; its result is not\n"
"kept. Raises TypeError when the arguments are not hashable.");

static PyObject *
cache_invalidate(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return cache_look(op, args, nargs, kwnames, true);
}

PyDoc_STRVAR(cache_invalidate_where_doc,
"cache_invalidate_where($self, predicate, /)\n--\n\n"
"Forget the results of all calls for whose arguments predicate says so.\n\n"
"predicate is called as predicate(*args, **kwargs), with the arguments of each call\n"
"whose result is cached or under way; with key=, as predicate(key). Through an instance\n"
"it is asked about that instance only, which is left out of the arguments. It is an\n"
"ordinary function; when it raises, nothing is forgotten. Returns how many were.");

static PyObject *
cache_invalidate_where(PyObject *op, PyObject *predicate)
{
    PyObject *instance;
    CacheObject *self = cache_of(op, &instance);
    if (!PyCallable_Check(predicate)) {
        PyErr_Format(PyExc_TypeError, "predicate must be callable, not '%.200s'", Py_TYPE(predicate)->tp_name);
        return NULL;
    }
    return aiot_lru_invalidate_where(self, instance, predicate);
}

PyDoc_STRVAR(cache_contains_doc,
"cache_contains($self, /, *args, **kwargs)\n--\n\n"
"Whether a call with these arguments would be a hit, or is under way.\n\n"
"Changes neither the counters nor what is evicted next. Raises TypeError when the\n"
"arguments are not hashable.");

static PyObject *
cache_contains(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return cache_look(op, args, nargs, kwnames, false);
}

PyDoc_STRVAR(cache_close_doc,
"cache_close($self, /, *, wait=False)\n--\n\n"
"Refuse new calls with RuntimeError, and see calls under way to their end; await it.\n\n"
"They are cancelled, unless wait is true: then they are waited for. Of calls on other\n"
"loops (shared=True) those are not waited for whose loop does not run now. The results\n"
"stay in the cache until cache_clear().");

static PyObject *
cache_close(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const aiot_params params = {"cache_close", 0, 0, 1, {AIOT_NAME(wait)}};
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    PyObject *given[1];
    if (aiot_bind(state, &params, args, nargs, kwnames, given) < 0) {
        return NULL;
    }
    int wait = given[0] == NULL ? 0 : PyObject_IsTrue(given[0]);
    if (wait < 0) {
        return NULL;
    }
    PyObject *instance;
    CacheObject *cache = cache_of(op, &instance);
    return aiot_lru_close(state, cache, wait);
}

static PyObject *
cache_reduce(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyObject_GetAttrString(op, "__qualname__");
}

static PyObject *
cache_copy(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(op);
}

#define KEYWORDS(f) (PyCFunction)(void (*)(void))f, METH_FASTCALL | METH_KEYWORDS
#define CACHE_METHODS                                                   \
    {"cache_info", cache_info, METH_NOARGS, cache_info_doc},            \
    {"cache_parameters", cache_parameters, METH_NOARGS, cache_parameters_doc}, \
    {"cache_clear", cache_clear, METH_NOARGS, cache_clear_doc},         \
    {"cache_invalidate", KEYWORDS(cache_invalidate), cache_invalidate_doc}, \
    {"cache_invalidate_where", cache_invalidate_where, METH_O, cache_invalidate_where_doc}, \
    {"cache_contains", KEYWORDS(cache_contains), cache_contains_doc},   \
    {"cache_close", KEYWORDS(cache_close), cache_close_doc}

static PyMethodDef Bound_methods[] = {
    CACHE_METHODS,
    {NULL, NULL, 0, NULL},
};

static PyMethodDef Cache_methods[] = {
    CACHE_METHODS,
    {"__reduce__", cache_reduce, METH_NOARGS, NULL},
    {"__copy__", cache_copy, METH_NOARGS, NULL},
    {"__deepcopy__", cache_copy, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

/* ---- the type of what is bound ---------------------------------------------------------------------------------- */

/* The function, bound as the cache is: so that signatures don't show self. */
static PyObject *
Bound_get_wrapped(PyObject *op, void *Py_UNUSED(closure))
{
    BoundObject *self = (BoundObject *)op;
    PyObject *wrapped = PyObject_GetAttrString((PyObject *)self->cache, "__wrapped__");
    if (wrapped == NULL) {
        return NULL;
    }
    PyObject *bound = PyMethod_New(wrapped, self->instance);
    Py_DECREF(wrapped);
    return bound;
}

/* What it lacks is that of the cache: its name, its documentation, what marks it as a coroutine function. */
static PyObject *
Bound_getattro(PyObject *op, PyObject *name)
{
    BoundObject *self = (BoundObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    aiot_state *state = aiot_state_of_exact_type(type);
    if (name == state->str___doc__ || name == state->str___module__) {
        return PyObject_GetAttr((PyObject *)self->cache, name);
    }
    PyObject *value;
    value = PyObject_GenericGetAttr(op, name);
    if (value == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        value = PyObject_GetAttr((PyObject *)self->cache, name);
    }
    return value;
}

static PyObject *
Bound_repr(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    return PyUnicode_FromFormat("<bound %R of %R>", self->cache, self->instance);
}

static PyObject *
Bound_richcompare(PyObject *a, PyObject *b, int how)
{
    if ((how != Py_EQ && how != Py_NE) || Py_TYPE(a) != Py_TYPE(b)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    BoundObject *x = (BoundObject *)a;
    BoundObject *y = (BoundObject *)b;
    return PyBool_FromLong((x->cache == y->cache && x->instance == y->instance) == (how == Py_EQ));
}

static Py_hash_t
Bound_hash(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    Py_hash_t hash = (Py_hash_t)(((size_t)self->cache >> 4) ^ ((size_t)self->instance >> 5));
    return hash == -1 ? -2 : hash;
}

static int
Bound_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((BoundObject *)op)->cache);
    Py_VISIT(((BoundObject *)op)->instance);
    return 0;
}

static void
Bound_dealloc(PyObject *op)
{
    BoundObject *self = (BoundObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Py_CLEAR(self->cache);
    Py_CLEAR(self->instance);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef Bound_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(BoundObject, vectorcall), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(BoundObject, weakrefs), Py_READONLY, NULL},
    {"__self__", Py_T_OBJECT_EX, offsetof(BoundObject, instance), Py_READONLY, "The instance."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef Bound_getset[] = {
    {"__wrapped__", Bound_get_wrapped, NULL, "The method of the instance, without the cache.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Bound_slots[] = {
    {Py_tp_doc, "A cached method, seen through an instance."},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_getattro, Bound_getattro},
    {Py_tp_repr, Bound_repr},
    {Py_tp_richcompare, Bound_richcompare},
    {Py_tp_hash, Bound_hash},
    {Py_tp_methods, Bound_methods},
    {Py_tp_members, Bound_members},
    {Py_tp_getset, Bound_getset},
    {Py_tp_traverse, Bound_traverse},
    {Py_tp_dealloc, Bound_dealloc},
    {0, NULL},
};

static PyType_Spec Bound_spec = {
    .name = "aiotools._aiotools.LruBound",
    .basicsize = sizeof(BoundObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION
             | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = Bound_slots,
};

/* ---- the type of caches ------------------------------------------------------------------------------------------- */

static PyObject *
Cache_descr_get(PyObject *op, PyObject *instance, PyObject *Py_UNUSED(owner))
{
    if (instance == NULL || instance == Py_None) {
        return Py_NewRef(op);
    }
    aiot_state *state = aiot_state_of_exact_type(Py_TYPE(op));
    BoundObject *bound = (BoundObject *)state->LruBoundType->tp_alloc(state->LruBoundType, 0);
    if (bound == NULL) {
        return NULL;
    }
    bound->vectorcall = Bound_vectorcall;
    bound->cache = (CacheObject *)Py_NewRef(op);
    bound->instance = Py_NewRef(instance);
    return (PyObject *)bound;
}

/* ---- arguments -------------------------------------------------------------------------------------------------- */

static void *
raw_realloc(void *p, size_t n)
{
    return PyMem_RawRealloc(p, n);
}

/* A number of seconds that is not negative; NULL and None leave *out alone. 0 or -1. */
static int
seconds_argument(PyObject *given, const char *name, double *out)
{
    if (given == NULL || given == Py_None) {
        return 0;
    }
    double seconds;
    if (aiot_as_seconds(given, name, &seconds) < 0) {
        return -1;
    }
    if (seconds < 0) {
        PyErr_Format(PyExc_ValueError, "%s must not be negative", name);
        return -1;
    }
    *out = seconds;
    return 0;
}

/* Borrowed in *out; NULL and None leave it alone. 0 or -1. */
static int
callable_argument(PyObject *given, const char *name, PyObject **out)
{
    if (given == NULL || given == Py_None) {
        return 0;
    }
    if (!PyCallable_Check(given)) {
        PyErr_Format(PyExc_TypeError, "%s must be callable, not '%.200s'", name, Py_TYPE(given)->tp_name);
        return -1;
    }
    *out = given;
    return 0;
}

/* An int that is not negative; NULL and None leave *out alone. 0 or -1. */
static int
weight_argument(PyObject *given, const char *name, Py_ssize_t *out)
{
    if (given == NULL || given == Py_None) {
        return 0;
    }
    if (!PyLong_Check(given)) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not '%.200s'", name, Py_TYPE(given)->tp_name);
        return -1;
    }
    Py_ssize_t weight = PyLong_AsSsize_t(given);
    if (weight == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        PyErr_Clear();
        PyErr_Format(PyExc_OverflowError, "%s is too large", name);
        return -1;
    }
    if (weight < 0) {
        PyErr_Format(PyExc_ValueError, "%s must not be negative", name);
        return -1;
    }
    *out = weight;
    return 0;
}

/* maxsize as an int: -1 for None. 0 or -1. */
static int
size_argument(PyObject *given, Py_ssize_t *out)
{
    *out = -1;
    if (given == NULL || given == Py_None) {
        return 0;
    }
    Py_ssize_t size = PyNumber_AsSsize_t(given, PyExc_OverflowError);
    if (size == -1 && PyErr_Occurred()) {
        return -1;
    }
    *out = size < 0 ? 0 : size;
    return 0;
}

typedef struct {
    PyObject *key_func;
    PyObject *weigh;
    Py_ssize_t maxsize;
    Py_ssize_t max_weight;
    double expire_after;
    double jitter;
    double stale_for;
    double errors_for;
} cache_options;

/* What makes no sense together. 0 or -1. */
static int
check_options(const cache_options *options, bool typed)
{
    const char *problem = NULL;
    if (isinf(options->jitter)) {
        problem = "jitter must be finite";
    }
    else if (options->jitter > 0 && isinf(options->expire_after)) {
        problem = "jitter needs expire_after, which it adds to";
    }
    else if (options->stale_for > 0 && isinf(options->expire_after)) {
        problem = "stale_while_refresh needs expire_after, which it follows";
    }
    else if (options->weigh != NULL && options->max_weight < 0) {
        problem = "weight needs max_weight";
    }
    else if (options->weigh == NULL && options->max_weight >= 0) {
        problem = "max_weight needs weight";
    }
    else if (options->key_func != NULL && typed) {
        problem = "typed says nothing together with key, which makes the keys";
    }
    if (problem != NULL) {
        PyErr_SetString(PyExc_ValueError, problem);
        return -1;
    }
    return 0;
}

/* random.random: new reference. */
static PyObject *
find_random(void)
{
    PyObject *module = PyImport_ImportModule("random");
    PyObject *random = module == NULL ? NULL : PyObject_GetAttrString(module, "random");
    Py_XDECREF(module);
    return random;
}

static PyObject *
Cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const aiot_params params = {
        "LruCache", 4, 1, 11,
        {AIOT_NAME(func), AIOT_NAME(maxsize), AIOT_NAME(typed), AIOT_NAME(expire_after), AIOT_NAME(jitter),
         AIOT_NAME(stale_while_refresh), AIOT_NAME(cache_errors_for), AIOT_NAME(key), AIOT_NAME(weight),
         AIOT_NAME(max_weight), AIOT_NAME(shared)},
    };
    aiot_state *state = aiot_state_of_exact_type(type);
    PyObject *given[11];
    if (aiot_bind_tuple(state, &params, args, kwargs, given) < 0) {
        return NULL;
    }
    cache_options options = {NULL, NULL, -1, -1, INFINITY, 0.0, 0.0, 0.0};
    int typed = given[2] == NULL ? 0 : PyObject_IsTrue(given[2]);
    int shared = given[10] == NULL ? 0 : PyObject_IsTrue(given[10]);
    if (typed < 0 || shared < 0 || size_argument(given[1], &options.maxsize) < 0
        || seconds_argument(given[3], "expire_after", &options.expire_after) < 0
        || seconds_argument(given[4], "jitter", &options.jitter) < 0
        || seconds_argument(given[5], "stale_while_refresh", &options.stale_for) < 0
        || seconds_argument(given[6], "cache_errors_for", &options.errors_for) < 0
        || callable_argument(given[7], "key", &options.key_func) < 0
        || callable_argument(given[8], "weight", &options.weigh) < 0
        || weight_argument(given[9], "max_weight", &options.max_weight) < 0
        || check_options(&options, typed) < 0)
    {
        return NULL;
    }
    CacheObject *self = (CacheObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    aiot_heap_init(&self->deadlines, raw_realloc, PyMem_RawFree);
    aiot_link_init(&self->recent);
    aiot_link_init(&self->flights);
    aiot_link_init(&self->closers);
    self->vectorcall = Cache_vectorcall;
    self->func = Py_NewRef(given[0]);
    self->key_func = Py_XNewRef(options.key_func);
    self->weigh = Py_XNewRef(options.weigh);
    self->maxsize = options.maxsize;
    self->max_weight = options.max_weight;
    self->typed = typed;
    self->shared = shared;
    self->expire_after = options.expire_after;
    self->jitter = options.jitter;
    self->stale_for = options.stale_for;
    self->errors_for = options.errors_for;
    self->entries = PyDict_New();
    if (self->entries == NULL || (self->jitter > 0 && (self->random = find_random()) == NULL)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *
Cache_repr(PyObject *op)
{
    return PyUnicode_FromFormat("<lru_cache of %R>", ((CacheObject *)op)->func);
}

static int
Cache_traverse(PyObject *op, visitproc visit, void *arg)
{
    CacheObject *self = (CacheObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->dict);
    Py_VISIT(self->func);
    Py_VISIT(self->key_func);
    Py_VISIT(self->weigh);
    Py_VISIT(self->random);
    Py_VISIT(self->entries);
    Py_VISIT(self->loop);
    return aiot_lru_traverse_flights(self, visit, arg);
}

/* The members that calls rely on stay; emptying the dict breaks the cycle with the entries. */
static int
Cache_clear(PyObject *op)
{
    CacheObject *self = (CacheObject *)op;
    Py_CLEAR(self->dict);
    if (self->entries != NULL) {
        PyDict_Clear(self->entries);
    }
    PyObject *func = self->func;
    self->func = Py_NewRef(Py_None);
    Py_XDECREF(func);
    if (self->key_func != NULL) {
        Py_SETREF(self->key_func, Py_NewRef(Py_None));
    }
    if (self->weigh != NULL) {
        Py_SETREF(self->weigh, Py_NewRef(Py_None));
    }
    aiot_lru_disown_flights(self);
    return 0;
}

static void
Cache_dealloc(PyObject *op)
{
    CacheObject *self = (CacheObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    Py_CLEAR(self->dict);
    Py_CLEAR(self->entries);
    Py_CLEAR(self->func);
    Py_CLEAR(self->key_func);
    Py_CLEAR(self->weigh);
    Py_CLEAR(self->random);
    Py_CLEAR(self->loop);
    aiot_heap_fini(&self->deadlines);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef Cache_members[] = {
    {"__vectorcalloffset__", Py_T_PYSSIZET, offsetof(CacheObject, vectorcall), Py_READONLY, NULL},
    {"__dictoffset__", Py_T_PYSSIZET, offsetof(CacheObject, dict), Py_READONLY, NULL},
    {"__weaklistoffset__", Py_T_PYSSIZET, offsetof(CacheObject, weakrefs), Py_READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef Cache_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot Cache_slots[] = {
    {Py_tp_doc, "LruCache(func, maxsize=None, typed=False, expire_after=None, *, jitter=None, stale_while_refresh=None,\n"
                "         cache_errors_for=None, key=None, weight=None, max_weight=None, shared=False)\n--\n\n"
                "A coroutine function with a cache of its results; lru_cache() makes it."},
    {Py_tp_new, Cache_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, Cache_descr_get},
    {Py_tp_repr, Cache_repr},
    {Py_tp_methods, Cache_methods},
    {Py_tp_members, Cache_members},
    {Py_tp_getset, Cache_getset},
    {Py_tp_traverse, Cache_traverse},
    {Py_tp_clear, Cache_clear},
    {Py_tp_dealloc, Cache_dealloc},
    {0, NULL},
};

static PyType_Spec Cache_spec = {
    .name = "aiotools._aiotools.LruCache",
    .basicsize = sizeof(CacheObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_VECTORCALL
             | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .slots = Cache_slots,
};

int
aiot_lrucache_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    if ((state->lru_mark = PyObject_CallNoArgs((PyObject *)&PyBaseObject_Type)) == NULL
        || (state->LruInfo = PyObject_CallFunction(state->namedtuple, "ss", "CacheInfo",
                                                   "hits misses maxsize currsize")) == NULL
        || aiot_lrucache_store_add_types(module) < 0 || aiot_lrucache_flight_add_types(module) < 0
        || aiot_add_type(module, &state->LruBoundType, &Bound_spec, NULL, false) < 0
        || aiot_add_type(module, &state->LruCacheType, &Cache_spec, NULL, true) < 0)
    {
        return -1;
    }
    return 0;
}
