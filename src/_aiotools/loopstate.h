/* loopstate.h: what belongs to one event loop: its timer queue, its batch of wake-ups, its clock.
 *
 * Four services, all of them for the thread of the loop unless they say otherwise:
 *
 *   alarms     deadlines embedded in their owners; the loop sees one armed handle for the earliest
 *   turns      work for the next turn of the loop; one call_soon for all that is asked for in one tick
 *   wake-ups   waiters that became ready (waiter.h), run in one batch from one call_soon
 *   posts      work that any thread hands to the loop, one call_soon_threadsafe per burst
 */
#ifndef AIOT_LOOPSTATE_H
#define AIOT_LOOPSTATE_H

/* First: Python.h must come before the standard headers, which heap.h brings in. */
#include "state.h"

#include "heap.h"
#include "link.h"
#include "ptrmap.h"

typedef struct AiotLoop AiotLoop;
typedef struct AiotWaiter AiotWaiter;
typedef struct aiot_alarm aiot_alarm;
typedef struct aiot_post aiot_post;
typedef struct aiot_turn aiot_turn;

/* ---- alarms ------------------------------------------------------------------------------------------------- */

/* A deadline, embedded in the object that has it. While it is set the loop state owns a reference to owner.
 * fire runs in the loop's tick, after the alarm was taken off the queue, and may set it again. An
 * exception that it leaves goes to the loop's exception handler; SystemExit and KeyboardInterrupt stop the loop. */
struct aiot_alarm {
    aiot_heap_node node;
    PyObject *owner;                        /* borrowed while not set; must be filled in before aiot_alarm_set */
    int (*fire)(AiotLoop *loop, PyObject *owner);
};

static inline void
aiot_alarm_init(aiot_alarm *alarm, PyObject *owner, int (*fire)(AiotLoop *, PyObject *))
{
    aiot_heap_node_init(&alarm->node);
    alarm->owner = owner;
    alarm->fire = fire;
}

static inline bool
aiot_alarm_is_set(const aiot_alarm *alarm)
{
    return aiot_heap_has(&alarm->node);
}

/* Sets it, or moves it when it is set, to when (loop.time() seconds; infinity is never, but keeps the owner
 * alive). 0, or -1 with an exception and the alarm as it was before. */
int aiot_alarm_set(AiotLoop *loop, aiot_alarm *alarm, double when);

/* Takes it off the queue if it is there. Drops the queue's reference to the owner: hold one of your own. */
void aiot_alarm_cancel(AiotLoop *loop, aiot_alarm *alarm);

/* ---- turns -------------------------------------------------------------------------------------------------- */

/* Embedded in its owner; while it is queued the loop state owns a reference to owner. run is called from the loop, once,
 * after all that call_soon was asked for before; asked for in a tick or in another turn, after all that is asked
 * for until that is over: the first steps of tasks that were made there are done then. It may ask for another turn, and
 * leaves exceptions as fire does. There is no way to take it back: let run find nothing to do. */
struct aiot_turn {
    aiot_turn *next;
    PyObject *owner;
    int (*run)(AiotLoop *loop, PyObject *owner);
    bool queued;
};

static inline void
aiot_turn_init(aiot_turn *turn, PyObject *owner, int (*run)(AiotLoop *, PyObject *))
{
    turn->next = NULL;
    turn->owner = owner;
    turn->run = run;
    turn->queued = false;
}

/* Asked for already: does nothing. 0, or -1 with an exception and nothing changed. */
int aiot_turn_ask(AiotLoop *loop, aiot_turn *turn);

/* ---- posts: from any thread --------------------------------------------------------------------------------- */

typedef enum {
    AIOT_POST_DELIVERED,                    /* in the thread of the loop */
    AIOT_POST_CLOSED,                       /* the loop is closed, or gone: in the posting thread, or in the one that closes it */
    AIOT_POST_NOT_NOW,                      /* in the posting thread: the loop could not be told (no memory, no stack left), which was reported */
} aiot_post_outcome;

/* Embedded in its owner; until it was run, once, the loop state owns a reference to owner. */
struct aiot_post {
    aiot_post *next;
    PyObject *owner;
    void (*run)(AiotLoop *loop, PyObject *owner, aiot_post_outcome outcome);
};

/* Any thread. The post must not be under way already. Never fails: see outcome above. No exception is set. */
void aiot_loop_post(AiotLoop *loop, aiot_post *post);

/* ---- the loop state ----------------------------------------------------------------------------------------- */

struct AiotLoop {
    PyObject_HEAD
    aiot_state *state;              /* of the module */
    PyObject *module;               /* keeps state alive, whatever the collector takes apart first */
    PyObject *loop;                 /* the event loop: borrowed, NULL once it is gone */
    PyObject *loop_ref;             /* weak reference that sets loop to NULL; NULL when loop is owned after all */
    PyObject *dict;                 /* its __dict__, NULL if it has none */
    unsigned int spawn_version;     /* of its type, when that had asyncio's or uvloop's own create_task(); 0: not known */
    PyObject *get_loop;             /* callable that returns loop, for waiters */
    PyObject *done_future;          /* a finished asyncio.Future: what a task's wake-up takes for "go on" */
    PyObject *weakrefs;
    PyObject *table_key;            /* of a loop that takes no attribute: its key in the module's table */
    unsigned long thread;           /* where aiot_loop_get_running last found it */
    PyTypeObject *plain_type;       /* the type that had the default loop's time() on the real clock; not owned, to compare */
    uint32_t plain_seen;            /* aiot_clock_epoch() at that time; 0: not seen, or its changes can't be seen */
    /* wake-ups: waiters linked by their next field */
    AiotWaiter *ready_first, *ready_last;
    uint64_t ready_pushed, ready_popped;    /* callbacks, counted since ever */
    bool drain_armed;               /* a call_soon of the drain is under way */
    bool coarse;                    /* loop.time() counts milliseconds: uvloop, winloop */
    bool no_eager_start;            /* its create_task() was seen not to take eager_start */
    /* timer queue */
    int ticking;                    /* depth of running ticks */
    double tick_now;                /* the clock reading of the running tick */
    double tick_at;                 /* when the armed handle is due */
    double clock_shift;             /* the sum of all aiot_loop_shift() */
    PyObject *tick_handle;          /* or NULL */
    aiot_heap alarms;
    /* scopes (shield.h): task -> its innermost open frame, nothing owned */
    aiot_ptrmap frames;
    /* turns */
    aiot_turn *turns_first, *turns_last;
    uint64_t turns_asked, turns_popped;     /* since ever */
    int turning;                    /* depth of running turns */
    bool turns_armed;               /* a call_soon for them is under way */
    /* posts */
    aiot_mutex posts_lock;
    aiot_post *posts_first, *posts_last;
    bool posts_armed;
};

/* The state of the running loop, made at first use. New reference; NULL with RuntimeError when no loop runs. */
AiotLoop *aiot_loop_get_running(aiot_state *state);

/* The state of any loop object. New reference. */
AiotLoop *aiot_loop_get(aiot_state *state, PyObject *loop);

/* loop.time(). 0 or -1. */
int aiot_loop_time(AiotLoop *loop, double *now);

/* The deadline that lies delay seconds ahead: on an unpatched coarse loop counted from the monotonic clock,
 * which that loop's own time() lags behind by up to a millisecond. 0 or -1. */
int aiot_loop_deadline(AiotLoop *loop, double delay, double *when);

/* The same, and tells whether it was counted from the monotonic clock; else loop.time() is somebody's own. */
int aiot_loop_deadline_on(AiotLoop *loop, double delay, double *when, bool *monotonic);

/* Whether the monotonic clock is certainly before when. Quicker than to read it; when in doubt, false. */
bool aiot_clock_is_before(double when);

/* Whether this thread is the one where the loop was last seen to run: then no other thread runs it now. */
bool aiot_loop_ran_here(AiotLoop *loop);

/* The earliest deadline that is set, infinity when there is none. */
double aiot_loop_next_deadline(AiotLoop *loop);

/* Another clock was put into the loop (clock.c): moves all deadlines by delta, so that each keeps its remaining delay,
 * and arms the handle anew, with the call_at that the loop has now. Who keeps absolute times elsewhere
 * corrects them by the change of clock_shift. 0, or -1 with an exception and no handle armed. */
int aiot_loop_shift(AiotLoop *loop, double delta);

/* asyncio.current_task(loop): new reference, NULL with RuntimeError "... must be used within a task" for what. */
PyObject *aiot_loop_current_task(AiotLoop *loop, const char *what);

/* The event loop itself: new reference, NULL with RuntimeError once it is gone. */
PyObject *aiot_loop_object(AiotLoop *loop);

/* The same from any thread, where the loop may go at any moment; NULL without an exception once it is gone. */
PyObject *aiot_loop_object_anywhere(AiotLoop *loop);

/* Have the loop run aiot_loop_drain (waiter.h) soon. 0 or -1; waiter.c sees to it that this is not done twice. */
int aiot_loop_arm_drain(AiotLoop *loop);

/* Before a fire function runs code of a user, who may run the loop from inside: arms the handle that a tick otherwise
 * arms at its end. (Not the one for turns, which would come too early for them.) 0 or -1. */
int aiot_loop_arm_tick(AiotLoop *loop);

/* loop.get_debug(): 1, 0 or -1. */
int aiot_loop_is_debug(AiotLoop *loop);

/* loop.call_soon(callback, *[arg], context=context); context NULL: a fresh empty one. 0 or -1. */
int aiot_loop_call_soon(AiotLoop *loop, PyObject *callback, PyObject *arg, PyObject *context);

/* Hands the pending exception to loop.call_exception_handler({message, exception, key: value}) (key may be NULL).
 * Leaves no exception set, unless it was SystemExit or KeyboardInterrupt: those stay set, and -1 is returned. */
int aiot_loop_report(AiotLoop *loop, const char *message, PyObject *key, PyObject *value);

/* Of a pending exception that call_soon and its kin raised: is the loop closed? Else it lives, and something is wrong that may
 * pass: no memory, no stack left. */
bool aiot_loop_error_is_closed(void);

/* PyErr_WriteUnraisable, but for KeyboardInterrupt: that is raised again at the next opportunity, not lost. */
void aiot_write_unraisable(PyObject *where);

int aiot_loopstate_add_types(PyObject *module);

#endif /* AIOT_LOOPSTATE_H */
