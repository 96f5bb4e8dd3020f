/* state.h: the module state, and the ways to reach it.
 *
 * All that belongs to one interpreter lives here. Each field is named once, in a list, from which the
 * struct, traverse, clear and the start-up code are made. What belongs to an event loop hangs on its loop
 * state instead (loopstate.h).
 */
#ifndef AIOT_STATE_H
#define AIOT_STATE_H

#include "compat.h"


/* Interned strings: the field is str_NAME. */
#define AIOT_STRINGS(V) \
    V(__aexit__) \
    V(__aenter__) \
    V(__dict__) \
    V(__module__) \
    V(_aiotools_cancel_requests) \
    V(_aiotools_loopstate) \
    V(_aiotools_note) \
    V(_asyncio_future_blocking) \
    V(_fut_waiter) \
    V(_must_cancel) \
    V(add_done_callback) \
    V(call_at) \
    V(call_exception_handler) \
    V(call_soon) \
    V(call_soon_threadsafe) \
    V(callback) \
    V(cancel) \
    V(cancelled) \
    V(cancelling) \
    V(close) \
    V(co_filename) \
    V(context) \
    V(coro) \
    V(create_task) \
    V(done) \
    V(eager_start) \
    V(exception) \
    V(exception_handler) \
    V(get_coro) \
    V(exceptions) \
    V(get_debug) \
    V(get_loop) \
    V(get_task_factory) \
    V(is_closed) \
    V(is_running) \
    V(loop) \
    V(message) \
    V(monotonic) \
    V(msg) \
    V(name) \
    V(remove_done_callback) \
    V(send) \
    V(set_result) \
    V(split) \
    V(task) \
    V(tasks) \
    V(time) \
    V(timeout) \
    V(timer) \
    V(uncancel) \
    /* barrier */ \
    V(action) \
    V(parties) \
    /* context managers */ \
    V(__doc__) \
    V(aclose) \
    V(ag_await) \
    V(ag_frame) \
    V(asend) \
    V(athrow) \
    V(cr_await) \
    V(cr_frame) \
    V(gi_code) \
    V(throw) \
    V(yield_return) \
    V(func) \
    V(args) \
    V(kwds) \
    V(ctxvar) \
    V(value) \
    V(thing) \
    /* arguments of scopes */ \
    V(limit) \
    V(shield) \
    /* arguments of sleep */ \
    V(delay) \
    V(result) \
    V(when) \
    /* queue */ \
    V(_get) \
    V(_init) \
    V(_peek) \
    V(_put) \
    V(_qsize) \
    V(block) \
    V(immediate) \
    V(item) \
    V(items) \
    V(items_put) \
    V(max) \
    V(maxsize) \
    /* lru_cache */ \
    V(cache_errors_for) \
    V(expire_after) \
    V(jitter) \
    V(key) \
    V(max_weight) \
    V(shared) \
    V(stale_while_refresh) \
    V(typed) \
    V(wait) \
    V(weight)

/* Imported objects: field, module, attribute. */
#define AIOT_IMPORTS(V) \
    V(AsyncQueueEmpty, "asyncio", "QueueEmpty") \
    V(AsyncQueueFull, "asyncio", "QueueFull") \
    V(BrokenBarrierError, "asyncio", "BrokenBarrierError") \
    V(CancelledError, "asyncio", "CancelledError") \
    V(Collection, "collections.abc", "Collection") \
    V(InvalidStateError, "asyncio", "InvalidStateError") \
    V(SyncQueueEmpty, "queue", "Empty") \
    V(SyncQueueFull, "queue", "Full") \
    V(asyncio_Future, "asyncio", "Future") \
    V(asyncio_Task, "asyncio", "Task") \
    V(asyncio_taskgroups_dict, "asyncio.taskgroups", "__dict__") \
    V(asyncio_timeouts_dict, "asyncio.timeouts", "__dict__") \
    V(base_loop_create_task, "asyncio.base_events", "BaseEventLoop.create_task") \
    V(base_loop_time, "asyncio.base_events", "BaseEventLoop.time") \
    V(copy_context, "contextvars", "copy_context") \
    V(copy_copy, "copy", "copy") \
    V(current_task, "asyncio", "current_task") \
    V(decorator_call, "contextlib", "AsyncContextDecorator.__call__") \
    V(enter_task, "asyncio", "_enter_task") \
    V(get_running_loop, "asyncio", "get_running_loop") \
    V(maybe_running_loop, "asyncio", "_get_running_loop") \
    V(namedtuple, "collections", "namedtuple") \
    V(iscoroutine, "asyncio", "iscoroutine") \
    V(leave_task, "asyncio", "_leave_task") \
    V(SimpleNamespace, "types", "SimpleNamespace") \
    V(task_cancelling, "asyncio", "Task.cancelling") \
    V(task_done, "asyncio", "Task.done") \
    V(task_exception, "asyncio", "Task.exception") \
    V(time_module_dict, "time", "__dict__") \
    V(time_monotonic, "time", "monotonic")

/* Types of ours. */
#define AIOT_TYPES(V) \
    V(AsyncQueueType) \
    V(LifoQueueType) \
    V(PriorityQueueType) \
    V(QueueCoreType) \
    V(QueueOpType) \
    V(QueueType) \
    V(SyncQueueType) \
    V(BarrierType) \
    V(BarrierWaitType) \
    V(CtxMgrType) \
    V(GroupRunType) \
    V(GroupWorkerType) \
    V(CtxStepType) \
    V(SendingCtxMgrType) \
    V(ResettingType) \
    V(ResettingStepType) \
    V(ClosingType) \
    V(ClosingExitType) \
    V(ClockDriverType) \
    V(ClockHandleType) \
    V(ClockType) \
    V(CancelWaitType) \
    V(CancellerType) \
    V(ChildType) \
    V(CrewType) \
    V(CrewWaitType) \
    V(DoneType) \
    V(IndexedChildType) \
    V(LoopStateType) \
    V(LruBoundType) \
    V(LruCacheType) \
    V(LruCallType) \
    V(LruCloseType) \
    V(LruEntryType) \
    V(LruFlightType) \
    V(PatchType) \
    V(PostCallType) \
    V(ScopeEnterType) \
    V(ScopeExitType) \
    V(ShieldScopeType) \
    V(ShieldType) \
    V(SleepType) \
    V(StopIterationType) \
    V(SweepType) \
    V(TaskContextType) \
    V(TaskGroupCoreType) \
    V(TaskScopeType) \
    V(TimerRunType) \
    V(TimerStatsType) \
    V(TimerTickType) \
    V(TimerType) \
    V(TimeoutMethodType) \
    V(TimeoutStepType) \
    V(TimeoutType) \
    V(WaiterType) \
    V(WatchdogType)

/* Other objects made at start-up. */
#define AIOT_OBJECTS(V) \
    V(add_to_awaited_by)  /* asyncio.future_add_to_awaited_by, or NULL before 3.14 */ \
    V(current_taskgroup)  /* the context variable */ \
    V(discard_from_awaited_by) \
    V(QueueShutDown)      /* what both sides of a queue raise once it is shut down */ \
    V(QueueStatistics)    /* the named tuple */ \
    V(done_none)          /* the shared awaitable whose result is None */ \
    V(kw_context)         /* ("context",), for vectorcalls */ \
    V(kw_loop_eager_start) /* ("loop", "eager_start") */ \
    V(kw_name)            /* ("name",) */ \
    V(loop_token)         /* LoopExceptionHandler.TOKEN */ \
    V(kw_eager_start)     /* ("eager_start",) */ \
    V(no_loop)            /* stands in for a loop where a finished future needs one */ \
    V(LruInfo)            /* the named tuple of cache_info() */ \
    V(lru_mark)           /* between the arguments and the keywords of a key */ \
    V(loops)              /* {id(loop): weak reference to its state}, for loops that take no attribute */ \
    V(shield_var)         /* the context variable that says which shield one is inside */ \
    V(stop_false)         /* a StopIteration(False) that is used again and again (awaitable.c), or NULL */ \
    V(stop_lent)          /* a plain StopIteration that is used again and again (awaitable.h), or NULL */ \
    V(zero)               /* the integer */ \
    V(timeout_message)    /* "timeout", as our timeouts cancel their tasks */

/* Objects that live for one await are kept for reuse (freelist.h): the field is free_NAME. */
#define AIOT_FREE_LISTS(V) \
    V(barrier_waits) \
    V(ctx_managers) \
    V(ctx_steps) \
    V(group_workers) \
    V(dones) \
    V(queue_ops) \
    V(sleeps) \
    V(stops) \
    V(timeouts) \
    V(waiters)

/* A hop through checkpoint() takes a quarter less with them (424 -> 330 ns on 3.13). A task frees what it waited on
 * before it waits again, so a few are enough for any number of tasks. */
typedef struct {
#if AIOT_FREELISTS
    PyObject *kept[16];
    int n;
#else
    char unused;
#endif
} aiot_free_list;

/* The loop that was asked for last, and its state: borrowed. See loopstate.c. */
typedef struct {
    PyObject *loop;
    PyObject *found;
    uint64_t epoch;
} aiot_loop_cache;

typedef struct {
#define V(name) PyObject *str_##name;
    AIOT_STRINGS(V)
#undef V
#define V(name, module, attribute) PyObject *name;
    AIOT_IMPORTS(V)
#undef V
#define V(name) PyTypeObject *name;
    AIOT_TYPES(V)
#undef V
#define V(name) PyObject *name;
    AIOT_OBJECTS(V)
#undef V
    /* Changes whenever a loop state dies: what threads remember of loop states is void then. */
    uint64_t loops_epoch;
#ifndef Py_GIL_DISABLED
    aiot_loop_cache last_loop;
#endif
#define V(name) aiot_free_list free_##name;
    AIOT_FREE_LISTS(V)
#undef V
    bool no_free_lists;             /* set when the module goes */
    bool has_watchers;              /* clockwatch.h */
    int dict_watcher, type_watcher;
} aiot_state;

extern struct PyModuleDef aiot_module_def;

static inline aiot_state *
aiot_state_of_module(PyObject *module)
{
    aiot_state *state = (aiot_state *)PyModule_GetState(module);
    assert(state != NULL);
    return state;
}

/* Of a type that PyType_FromModuleAndSpec made, not of a subclass of it. */
static inline aiot_state *
aiot_state_of_exact_type(PyTypeObject *type)
{
    aiot_state *state = (aiot_state *)PyType_GetModuleState(type);
    assert(state != NULL);
    return state;
}

/* Of an instance of one of our types or of a subclass. NULL with TypeError when type isn't ours. */
static inline aiot_state *
aiot_state_of_type(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &aiot_module_def);
    return module == NULL ? NULL : aiot_state_of_module(module);
}

/* Makes a heap type of the module and stores it in *field; public types also become attributes. */
int aiot_add_type(PyObject *module, PyTypeObject **field, PyType_Spec *spec, PyObject *bases, bool is_public);

#endif /* AIOT_STATE_H */
