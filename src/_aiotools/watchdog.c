/* watchdog.c: watches an event loop from a thread that needs no GIL.
 *
 * Who is who
 *   the loop     calls beat() every interval seconds, from a timer of its own; see aiotools/watchdog.py
 *   the watcher  a thread that never runs Python: compares the time of the last beat with the clock
 *   the scribe   a thread that the watcher starts when a beat is late: takes the GIL (which may last for ever) and calls
 *                report(what, seconds), where Python code finds out what the loop is at
 *
 * States:     new -> running (start) -> stopped (stop); not to be started again.
 * Invariants: at most one scribe; none is started once stopping is set.
 * Ownership:  the watch belongs to the object, which frees it in stop() after both threads have ended. Only when
 *             stop() is called by the scribe, from inside report(), the watch is left to the scribe.
 * Locking:    watch.mutex for what watcher, scribe and stop() share. It is held for a few instructions and never
 *             while waiting for the GIL. The words are atomic: written by the loop (all but hang and evidence)
 *             and by the watcher (these two), read by anybody, also by other processes that map the page.
 * Fork:       a child has neither thread. There, beat() does nothing (the page may be shared) and stop() only forgets.
 * Exit:       both threads end in stop(), which aiotools/watchdog.py calls at the latest from atexit.
 */

#include "watchdog.h"

#include "args.h"
#include "page.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#if defined(_WIN32)
#  define WIN32_LEAN_AND_MEAN
#  include <windows.h>
#  include <io.h>
#else
#  include <errno.h>
#  include <pthread.h>
#  include <signal.h>
#  include <time.h>
#  include <unistd.h>
#endif

/* What report() is asked for. */
#define ASK_WHERE 1
#define ASK_HANG 2

/* Nanoseconds in which the GIL must be had; after that native code is said to hold it. */
#define GIL_PATIENCE 1000000000LL
/* And so many looks of the watcher: a starved process must not be taken for one whose GIL is held. */
#define GIL_LOOKS 40
/* Nanoseconds that a report may take once it has the GIL. */
#define REPORT_PATIENCE 3000000000LL

/* The words, on a page of others or in the watch. aiotools/server/board.py knows this layout. */
enum { WORD_BEAT, WORD_BEATS, WORD_LONGEST, WORD_STALLS, WORD_HANG, WORD_EVIDENCE, WORDS };

/* Values of WORD_EVIDENCE. */
enum { EVIDENCE_NONE, EVIDENCE_WHOLE, EVIDENCE_NATIVE };

/* Bucket i counts delays below 2**i milliseconds, the last one all others. */
#define BUCKETS 18

typedef struct {
    /* set before the watcher starts */
    PyInterpreterState *interp;
    PyObject *report;
    uint64_t *words;
    int64_t interval, slow, hang;           /* nanoseconds; hang 0: none */
    int fd;                                 /* for what is written without the GIL, or -1 */
    int signum;                             /* raises a dump of all stacks, or 0 */
    PyThread_type_lock wake;                /* held; released in order to stop the watcher */
    PyThread_type_lock gone;                /* held while the watcher runs */
    PyThread_type_lock written;             /* held while a scribe runs */
    /* shared, under mutex */
    PyThread_type_lock mutex;
    bool stopping;
    bool left_to_scribe;
    bool scribing;                          /* a scribe runs */
    bool attached;                          /* and has the GIL */
    bool hang_written;                      /* ASK_HANG was answered */
    bool paused;                            /* the loop isn't running: nothing is late */
    int asked;
    double asked_age;
    unsigned long scribe_ident;
    /* the watcher's alone */
    uint64_t seen;                          /* the beat that all below is about */
    bool where_asked, hang_asked, hang_done;
    int64_t asked_at;                       /* when the scribe that is under way was asked */
    int looks;                              /* since the hang was noticed */
    int64_t looked_at;
    int64_t grace_from;
} watch;

typedef struct {
    PyObject_HEAD
    watch *watch;                           /* NULL when not running */
    PyObject *report;
    Py_buffer view;                         /* of the page; view.obj is NULL when there is none */
    uint64_t own[WORDS];
    uint64_t *words;
    uint64_t histogram[BUCKETS];
    int64_t interval, slow, hang;
    int fd;
    int signum;
    int64_t pid;
    bool started;
} WatchdogObject;

static int64_t
now_ns(void)
{
#if defined(_WIN32)
    LARGE_INTEGER frequency, counter;
    QueryPerformanceFrequency(&frequency);
    QueryPerformanceCounter(&counter);
    return (int64_t)((double)counter.QuadPart * 1e9 / (double)frequency.QuadPart);
#else
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000LL + ts.tv_nsec;
#endif
}

static int64_t
process_id(void)
{
#if defined(_WIN32)
    return (int64_t)GetCurrentProcessId();
#else
    return (int64_t)getpid();
#endif
}

/* ---- without the GIL ---------------------------------------------------------------------------------------- */

static void
write_text(int fd, const char *text)
{
    size_t left = strlen(text);
    while (fd >= 0 && left > 0) {
#if defined(_WIN32)
        int n = _write(fd, text, (unsigned int)left);
#else
        ssize_t n = write(fd, text, left);
        if (n < 0 && errno == EINTR) {
            continue;
        }
#endif
        if (n <= 0) {
            return;     /* nobody reads it: there is no other place to complain */
        }
        text += n;
        left -= (size_t)n;
    }
}

static void
watch_free(watch *w)
{
    PyThread_type_lock locks[] = {w->wake, w->gone, w->written, w->mutex};
    for (size_t i = 0; i < sizeof(locks) / sizeof(locks[0]); i++) {
        if (locks[i] != NULL) {
            PyThread_free_lock(locks[i]);
        }
    }
    PyMem_RawFree(w);
}

/* A thread in which no signal is handled: handlers belong to the threads of the program. Its identity, or
 * PYTHREAD_INVALID_THREAD_ID. */
static unsigned long
start_thread(void (*body)(void *), void *arg)
{
#if defined(_WIN32)
    return PyThread_start_new_thread(body, arg);
#else
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    unsigned long ident = PyThread_start_new_thread(body, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ident;
#endif
}

/* The scribe's part that has the GIL. */
static void
scribe_report(watch *w, PyObject *report, int asked, double age)
{
    PyObject *answer = PyObject_CallFunction(report, "id", asked, age);
    if (answer == NULL) {
        PyErr_WriteUnraisable(report);
    }
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    if (answer == Py_False) {
        w->paused = true;
    }
    if (asked & ASK_HANG) {
        w->hang_written = true;
    }
    PyThread_release_lock(w->mutex);
    Py_XDECREF(answer);
}

static void
scribe_body(void *arg)
{
    watch *w = (watch *)arg;
    PyThreadState *tstate = PyThreadState_New(w->interp);
    if (tstate != NULL) {
        PyEval_AcquireThread(tstate);
    }
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    w->scribe_ident = PyThread_get_thread_ident();
    w->attached = tstate != NULL;
    PyObject *report = tstate != NULL && !w->stopping ? Py_NewRef(w->report) : NULL;
    while (report != NULL && w->asked != 0 && !w->stopping) {
        int asked = w->asked;
        double age = w->asked_age;
        w->asked = 0;
        PyThread_release_lock(w->mutex);
        scribe_report(w, report, asked, age);
        PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    }
    PyThread_release_lock(w->mutex);
    if (tstate != NULL) {
        Py_XDECREF(report);
        PyThreadState_Clear(tstate);
        PyThreadState_DeleteCurrent();
    }
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    bool left_to_scribe = w->left_to_scribe;
    w->scribing = w->attached = false;
    w->scribe_ident = 0;
    PyThread_release_lock(w->mutex);
    PyThread_release_lock(w->written);
    if (left_to_scribe) {
        watch_free(w);
    }
}

/* The watcher's: has the scribe answer what. Says whether there is one. */
static bool
ask_scribe(watch *w, int what, int64_t age, int64_t now)
{
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    bool start = !w->scribing;
    w->asked |= what;
    w->asked_age = (double)age * 1e-9;
    PyThread_release_lock(w->mutex);
    if (!start) {
        return true;
    }
    w->asked_at = now;
    /* The last scribe may be in its last instructions. */
    PyThread_acquire_lock(w->written, WAIT_LOCK);
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    w->scribing = true;
    PyThread_release_lock(w->mutex);
    if (start_thread(scribe_body, w) == PYTHREAD_INVALID_THREAD_ID) {
        PyThread_acquire_lock(w->mutex, WAIT_LOCK);
        w->scribing = false;
        PyThread_release_lock(w->mutex);
        PyThread_release_lock(w->written);
        return false;
    }
    return true;
}

static void
write_native_evidence(watch *w, int64_t age)
{
    char line[200];
    snprintf(line, sizeof(line),
             "The event loop has not turned for %.1f s. No tasks to show: native code holds the GIL.\n",
             (double)age * 1e-9);
    write_text(w->fd, line);
#if !defined(_WIN32)
    if (w->signum != 0) {
        /* faulthandler writes the stacks of all threads. It does so in this thread: a signal to another one could end the
         * very call that hangs (EINTR), before anybody has looked. */
        sigset_t one;
        sigemptyset(&one);
        sigaddset(&one, w->signum);
        pthread_sigmask(SIG_UNBLOCK, &one, NULL);
        pthread_kill(pthread_self(), w->signum);
        pthread_sigmask(SIG_BLOCK, &one, NULL);
    }
#endif
}

/* One look at the loop; returns the nanoseconds until the next. */
static int64_t
watch_look(watch *w, int64_t expected)
{
    int64_t now = now_ns();
    if (now - w->looked_at - expected > (expected > 250000000LL ? expected : 250000000LL)) {
        /* It is the process that stood still: stopped, or starved of processors. The loop gets its time again. */
        w->grace_from = now;
    }
    w->looked_at = now;
    int64_t beat = (int64_t)aiot_word_load(&w->words[WORD_BEAT]);
    int64_t patience = w->hang > 0 && w->hang < w->slow ? w->hang : w->slow;
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    bool paused = w->paused, attached = w->attached, scribing = w->scribing, hang_written = w->hang_written;
    if ((uint64_t)beat != w->seen) {
        w->seen = (uint64_t)beat;
        w->where_asked = w->hang_asked = w->hang_done = false;
        w->paused = w->hang_written = paused = hang_written = false;
        w->asked = 0;
    }
    int unheard = scribing ? 0 : w->asked;
    PyThread_release_lock(w->mutex);
    int64_t base = beat > w->grace_from ? beat : w->grace_from;
    int64_t age = now - base - w->interval;
    if (paused) {
        if (w->hang_asked && !w->hang_done) {
            w->hang_done = true;
            aiot_word_store(&w->words[WORD_HANG], 0);
        }
        return patience;
    }
    if (age < patience) {
        return patience - age;
    }
    if (unheard != 0) {
        /* It was asked when the last scribe was on its way out already, or there was no thread to be had. */
        scribing = ask_scribe(w, unheard, age, now);
    }
    if (age >= w->slow && !w->where_asked) {
        w->where_asked = true;
        ask_scribe(w, ASK_WHERE, age, now);
        scribing = true;
    }
    if (w->hang == 0 || w->hang_done) {
        return patience;
    }
    if (age < w->hang) {
        return w->hang - age < patience ? w->hang - age : patience;
    }
    if (!w->hang_asked) {
        w->hang_asked = true;
        w->looks = 0;
        aiot_word_store(&w->words[WORD_HANG], (uint64_t)now);
        scribing = ask_scribe(w, ASK_HANG, age, now);
        return 2000000;
    }
    int64_t waited = now - w->asked_at;
    w->looks++;
    if (hang_written || (attached && waited > REPORT_PATIENCE)) {
        w->hang_done = true;
        aiot_word_store(&w->words[WORD_EVIDENCE], EVIDENCE_WHOLE);
    }
    else if (!attached && (!scribing || (waited > GIL_PATIENCE && w->looks > GIL_LOOKS))) {
        w->hang_done = true;
        PyThread_acquire_lock(w->mutex, WAIT_LOCK);
        w->asked &= ~ASK_HANG;          /* what it finds out later would no longer be what hangs */
        PyThread_release_lock(w->mutex);
        write_native_evidence(w, age);
        aiot_word_store(&w->words[WORD_EVIDENCE], EVIDENCE_NATIVE);
    }
    return 5000000;
}

static void
watcher_body(void *arg)
{
    watch *w = (watch *)arg;
    int64_t wait = w->interval;
    for (;;) {
        PY_TIMEOUT_T us = (PY_TIMEOUT_T)((wait > 1000000 ? wait : 1000000) / 1000);
        if (PyThread_acquire_lock_timed(w->wake, us, 0) == PY_LOCK_ACQUIRED) {
            break;
        }
        wait = watch_look(w, wait);
    }
    PyThread_release_lock(w->gone);
}

/* ---- with the GIL ------------------------------------------------------------------------------------------- */

static watch *
watch_new(WatchdogObject *self)
{
    watch *w = (watch *)PyMem_RawCalloc(1, sizeof(watch));
    if (w == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    w->interp = PyInterpreterState_Get();
    w->words = self->words;
    w->interval = self->interval;
    w->slow = self->slow;
    w->hang = self->hang;
    w->fd = self->fd;
    w->signum = self->signum;
    w->wake = PyThread_allocate_lock();
    w->gone = PyThread_allocate_lock();
    w->written = PyThread_allocate_lock();
    w->mutex = PyThread_allocate_lock();
    if (w->wake == NULL || w->gone == NULL || w->written == NULL || w->mutex == NULL) {
        watch_free(w);
        PyErr_NoMemory();
        return NULL;
    }
    w->report = self->report;
    w->seen = aiot_word_load(&self->words[WORD_BEAT]);
    w->looked_at = now_ns();
    PyThread_acquire_lock(w->wake, WAIT_LOCK);
    PyThread_acquire_lock(w->gone, WAIT_LOCK);
    return w;
}

static void
watchdog_stop(WatchdogObject *self)
{
    watch *w;
    Py_BEGIN_CRITICAL_SECTION(self);
    w = self->watch;
    self->watch = NULL;
    Py_END_CRITICAL_SECTION();
    if (w == NULL) {
        return;
    }
    if (self->pid != process_id()) {
        return;         /* a forked child: there is no thread, and the locks are in whatever state they were */
    }
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    w->stopping = true;
    bool in_scribe = w->scribing && w->scribe_ident == PyThread_get_thread_ident();
    w->left_to_scribe = in_scribe;
    PyThread_release_lock(w->mutex);
    PyThread_release_lock(w->wake);
    Py_BEGIN_ALLOW_THREADS
    PyThread_acquire_lock(w->gone, WAIT_LOCK);
    if (!in_scribe) {
        PyThread_acquire_lock(w->written, WAIT_LOCK);
        PyThread_release_lock(w->written);
    }
    Py_END_ALLOW_THREADS
    if (!in_scribe) {
        watch_free(w);
    }
}

static int
as_nanoseconds(PyObject *obj, const char *name, bool zero, int64_t *out)
{
    double seconds;
    if (aiot_as_seconds(obj, name, &seconds) < 0) {
        return -1;
    }
    if (!(seconds < 1e9) || seconds < 0 || (seconds == 0 && !zero)) {
        PyErr_Format(PyExc_ValueError, "%s must be %s and less than 1e9 seconds, not %R", name,
                     zero ? "at least 0" : "more than 0", obj);
        return -1;
    }
    *out = (int64_t)ceil(seconds * 1e9);
    return 0;
}

PyDoc_STRVAR(Watchdog_doc,
"_Watchdog(report, interval, slow, hang, fd, signum, page, /)\n--\n\n"
"The thread behind aiotools.LoopWatchdog.\n\n"
"report(what, age) is called in a thread of its own with the GIL when a beat is\n"
"late by slow seconds (what & 1) or hang seconds (what & 2); False says that the\n"
"loop is not running, so nothing is late. interval, slow and hang are in seconds,\n"
"hang 0 for none. fd (-1: none) takes what is written without the GIL; signum (0:\n"
"none) is sent to this process when native code holds the GIL. page is a writable\n"
"buffer of 48 bytes for the words, or None.");

static PyObject *
Watchdog_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *report, *interval, *slow, *hang, *page;
    int fd, signum;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "_Watchdog() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOOOiiO:_Watchdog", &report, &interval, &slow, &hang, &fd, &signum, &page)) {
        return NULL;
    }
    WatchdogObject *self = (WatchdogObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->fd = fd;
    self->signum = signum;
    self->pid = process_id();
    self->words = self->own;
    if (as_nanoseconds(interval, "interval", false, &self->interval) < 0
        || as_nanoseconds(slow, "slow", false, &self->slow) < 0
        || as_nanoseconds(hang, "hang_timeout", true, &self->hang) < 0
        || (page != Py_None && aiot_get_words(page, WORDS, &self->view, &self->words) < 0))
    {
        Py_DECREF(self);
        return NULL;
    }
    self->report = Py_NewRef(report);
    return (PyObject *)self;
}

PyDoc_STRVAR(Watchdog_start_doc,
"start($self, /)\n--\n\n"
"Beat once and start the thread. Raises RuntimeError the second time or when no\n"
"thread can be had.");

static PyObject *
Watchdog_start(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    WatchdogObject *self = (WatchdogObject *)op;
    bool first;
    Py_BEGIN_CRITICAL_SECTION(self);
    first = !self->started;
    self->started = true;
    Py_END_CRITICAL_SECTION();
    if (!first) {
        PyErr_SetString(PyExc_RuntimeError, "a watchdog can be started only once");
        return NULL;
    }
    for (int i = 0; i < WORDS; i++) {
        aiot_word_store(&self->words[i], 0);
    }
    aiot_word_store(&self->words[WORD_BEAT], (uint64_t)now_ns());
    watch *w = watch_new(self);
    if (w == NULL) {
        return NULL;
    }
    if (start_thread(watcher_body, w) == PYTHREAD_INVALID_THREAD_ID) {
        watch_free(w);
        PyErr_SetString(PyExc_RuntimeError, "can't start the watchdog's thread");
        return NULL;
    }
    Py_BEGIN_CRITICAL_SECTION(self);
    self->watch = w;
    Py_END_CRITICAL_SECTION();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(Watchdog_beat_doc,
"beat($self, /)\n--\n\n"
"Note that the loop turns. Returns the seconds by which this beat is late if that\n"
"is at least `slow`, else None.");

/* By how much this beat is late, -1 when nobody watches. The watch stays while it is looked at: stop() takes it away under the
 * same lock. */
static int64_t
beat_lock_held(WatchdogObject *self)
{
    watch *w = self->watch;
    if (w == NULL || self->pid != process_id()) {
        return -1;
    }
    int64_t now = now_ns();
    uint64_t *words = self->words;
    int64_t late = now - (int64_t)aiot_word_load(&words[WORD_BEAT]) - self->interval;
    PyThread_acquire_lock(w->mutex, WAIT_LOCK);
    if (w->paused || late < 0) {
        late = 0;
    }
    PyThread_release_lock(w->mutex);
    int bucket = 0;
    while (bucket < BUCKETS - 1 && late >= (int64_t)1000000 << bucket) {
        bucket++;
    }
    self->histogram[bucket]++;
    if ((uint64_t)late > aiot_word_load(&words[WORD_LONGEST])) {
        aiot_word_store(&words[WORD_LONGEST], (uint64_t)late);
    }
    if (late >= self->slow) {
        aiot_word_store(&words[WORD_STALLS], aiot_word_load(&words[WORD_STALLS]) + 1);
    }
    if (aiot_word_load(&words[WORD_HANG]) != 0) {
        aiot_word_store(&words[WORD_HANG], 0);
        aiot_word_store(&words[WORD_EVIDENCE], EVIDENCE_NONE);
    }
    aiot_word_store(&words[WORD_BEATS], aiot_word_load(&words[WORD_BEATS]) + 1);
    aiot_word_store(&words[WORD_BEAT], (uint64_t)now);
    return late;
}

static PyObject *
Watchdog_beat(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    WatchdogObject *self = (WatchdogObject *)op;
    int64_t late;
    Py_BEGIN_CRITICAL_SECTION(op);
    late = beat_lock_held(self);
    Py_END_CRITICAL_SECTION();
    if (late >= self->slow) {
        return PyFloat_FromDouble((double)late * 1e-9);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(Watchdog_stop_doc,
"stop($self, /)\n--\n\n"
"End the thread and wait for its end. Any thread; does nothing the second time.");

static PyObject *
Watchdog_stop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    watchdog_stop((WatchdogObject *)op);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(Watchdog_read_doc,
"read($self, /)\n--\n\n"
"(beats, longest delay in seconds, stalls, seconds since the last beat, counts of\n"
"delays below 1, 2, 4, ... ms and of all others).");

static PyObject *
Watchdog_read(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    WatchdogObject *self = (WatchdogObject *)op;
    PyObject *counts = PyTuple_New(BUCKETS);
    if (counts == NULL) {
        return NULL;
    }
    for (int i = 0; i < BUCKETS; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(self->histogram[i]);
        if (count == NULL) {
            Py_DECREF(counts);
            return NULL;
        }
        PyTuple_SET_ITEM(counts, i, count);
    }
    uint64_t *words = self->words;
    double age = self->started ? (double)(now_ns() - (int64_t)aiot_word_load(&words[WORD_BEAT])) * 1e-9 : 0.0;
    return Py_BuildValue("KdKdN", (unsigned long long)aiot_word_load(&words[WORD_BEATS]),
                         (double)aiot_word_load(&words[WORD_LONGEST]) * 1e-9,
                         (unsigned long long)aiot_word_load(&words[WORD_STALLS]), age, counts);
}

static int
Watchdog_traverse(PyObject *op, visitproc visit, void *arg)
{
    WatchdogObject *self = (WatchdogObject *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->report);
    Py_VISIT(self->view.obj);
    return 0;
}

static int
Watchdog_clear(PyObject *op)
{
    WatchdogObject *self = (WatchdogObject *)op;
    watchdog_stop(self);
    Py_CLEAR(self->report);
    if (self->view.obj != NULL) {
        self->words = self->own;
        PyBuffer_Release(&self->view);
    }
    return 0;
}

static void
Watchdog_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Watchdog_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef Watchdog_methods[] = {
    {"beat", Watchdog_beat, METH_NOARGS, Watchdog_beat_doc},
    {"read", Watchdog_read, METH_NOARGS, Watchdog_read_doc},
    {"start", Watchdog_start, METH_NOARGS, Watchdog_start_doc},
    {"stop", Watchdog_stop, METH_NOARGS, Watchdog_stop_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Watchdog_slots[] = {
    {Py_tp_doc, (void *)Watchdog_doc},
    {Py_tp_new, Watchdog_new},
    {Py_tp_methods, Watchdog_methods},
    {Py_tp_traverse, Watchdog_traverse},
    {Py_tp_clear, Watchdog_clear},
    {Py_tp_dealloc, Watchdog_dealloc},
    {0, NULL},
};

static PyType_Spec Watchdog_spec = {
    .name = "aiotools._aiotools._Watchdog",
    .basicsize = sizeof(WatchdogObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Watchdog_slots,
};

int
aiot_watchdog_add_types(PyObject *module)
{
    aiot_state *state = aiot_state_of_module(module);
    return aiot_add_type(module, &state->WatchdogType, &Watchdog_spec, NULL, true);
}
