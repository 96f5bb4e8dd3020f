/* orphan.c: a process whose parent is gone ends within a deadline, also when native code holds the GIL.
 *
 * The kernel says by a signal that the parent is gone (aiotools/fork.py). A Python handler for it runs between two
 * bytecodes, so not in a process that is stuck in native code. Here a handler in C comes before it: it sets a timer
 * that the kernel ends the process with, and then calls the handler that was there, so that the process can use
 * its time to finish.
 *
 * State:      signal dispositions and timers belong to the process, and so do the variables here: they are no state of
 *             a module or an interpreter. Only the main thread sets them, before the handler is installed.
 * In the handler: only what POSIX allows there.
 * Fork:       a child has the handler without the timer, and setting it does nothing: its parent lives.
 */

#include "orphan.h"

#include "args.h"

#include <math.h>

#if !defined(_WIN32)

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

/* With a timer of its own the deadline needs neither SIGALRM nor ITIMER_REAL, which a program may use or block. */
#if defined(__linux__) && defined(SIGEV_SIGNAL)
#  define OWN_TIMER 1
#else
#  define OWN_TIMER 0
#endif

static struct sigaction handler_before;
#if OWN_TIMER
static bool timer_there;
static timer_t timer;
static struct itimerspec deadline;
#else
static struct itimerval deadline;
#endif

static void
on_signal(int signum, siginfo_t *info, void *context)
{
    int saved = errno;
#if OWN_TIMER
    timer_settime(timer, 0, &deadline, NULL);
#else
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = SIG_DFL;
    sigemptyset(&action.sa_mask);
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &deadline, NULL);
#endif
    errno = saved;
    if (handler_before.sa_flags & SA_SIGINFO) {
        handler_before.sa_sigaction(signum, info, context);
    }
    else if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN) {
        handler_before.sa_handler(signum);
    }
}

PyDoc_STRVAR(end_after_signal_doc,
"_end_after_signal($module, signum, seconds, /)\n--\n\n"
"Have the kernel end this process seconds after the signal signum comes, whatever\n"
"its code is at then.\n\n"
"The handler that is installed now is called as well; installing another one later\n"
"takes the deadline away. For one signal per process, from its main thread. Raises\n"
"OSError for what the system refuses, ValueError for bad seconds.");

static PyObject *
end_after_signal(PyObject *Py_UNUSED(module), PyObject *args)
{
    int signum;
    PyObject *obj;
    double seconds;
    if (!PyArg_ParseTuple(args, "iO:_end_after_signal", &signum, &obj) || aiot_as_seconds(obj, "seconds", &seconds) < 0) {
        return NULL;
    }
    if (!(seconds > 0) || !(seconds < 1e9)) {
        PyErr_Format(PyExc_ValueError, "seconds must be more than 0 and less than 1e9, not %R", obj);
        return NULL;
    }
    double whole = floor(seconds);
#if OWN_TIMER
    if (!timer_there) {
        struct sigevent event;
        memset(&event, 0, sizeof(event));
        event.sigev_notify = SIGEV_SIGNAL;
        event.sigev_signo = SIGKILL;
        if (timer_create(CLOCK_MONOTONIC, &event, &timer) < 0) {
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        timer_there = true;
    }
    deadline.it_value.tv_sec = (time_t)whole;
    deadline.it_value.tv_nsec = (long)((seconds - whole) * 1e9) + 1;
#else
    deadline.it_value.tv_sec = (time_t)whole;
    deadline.it_value.tv_usec = (suseconds_t)((seconds - whole) * 1e6) + 1;
#endif
    struct sigaction action, before;
    if (sigaction(signum, NULL, &before) < 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if ((before.sa_flags & SA_SIGINFO) && before.sa_sigaction == on_signal) {
        Py_RETURN_NONE;     /* there already: only the deadline is new */
    }
    handler_before = before;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | (before.sa_flags & (SA_ONSTACK | SA_RESTART));
    action.sa_mask = before.sa_mask;
    if (sigaction(signum, &action, NULL) < 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyMethodDef orphan_functions[] = {
    {"_end_after_signal", end_after_signal, METH_VARARGS, end_after_signal_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_orphan_add_functions(PyObject *module)
{
    return PyModule_AddFunctions(module, orphan_functions);
}

#else /* _WIN32: no signal tells of a parent's end */

int
aiot_orphan_add_functions(PyObject *Py_UNUSED(module))
{
    return 0;
}

#endif
