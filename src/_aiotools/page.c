/* page.c: records that one process writes and others read, in memory that they share.
 *
 * Layout:     word 0 of a record is its counter, the rest its contents. The counter is odd while the writer is at work.
 * Writer:     one per record at a time. One that dies in the middle leaves the counter odd; the next one goes on from there.
 * Reader:     any number. It copies the contents word by word between two looks at the counter, and tries again
 *             when that was odd or has moved; it never blocks the writer and never returns half of a record.
 */

#include "page.h"

#include <string.h>

/* A writer is at work for some ten nanoseconds, unless it was descheduled there or has died. */
#define READ_TRIES 1000

int
aiot_get_words(PyObject *obj, Py_ssize_t n, Py_buffer *view, uint64_t **words)
{
    if (PyObject_GetBuffer(obj, view, PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (view->len < n * (Py_ssize_t)sizeof(uint64_t) || (uintptr_t)view->buf % sizeof(uint64_t) != 0) {
        PyErr_Format(PyExc_ValueError, "a buffer of at least %zd bytes at a multiple of 8 is needed, not %zd bytes at %p",
                     n * (Py_ssize_t)sizeof(uint64_t), view->len, view->buf);
        PyBuffer_Release(view);
        return -1;
    }
    *words = (uint64_t *)view->buf;
    return 0;
}

PyDoc_STRVAR(record_write_doc,
"_record_write($module, record, data, /)\n--\n\n"
"Replace the contents of a record in shared memory.\n\n"
"record is a writable buffer at a multiple of 8 bytes, data bytes of which at most\n"
"len(record) - 8 fit; the rest is filled with zeros. One writer at a time.\n"
"Raises ValueError when they do not fit.");

static PyObject *
record_write(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "_record_write() takes 2 arguments (%zd given)", nargs);
        return NULL;
    }
    Py_buffer record, data;
    uint64_t *words;
    if (aiot_get_words(args[0], 2, &record, &words) < 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&record);
        return NULL;
    }
    Py_ssize_t room = record.len / (Py_ssize_t)sizeof(uint64_t) - 1;
    if (data.len > room * (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit in a record of %zd", data.len, record.len);
    }
    else {
        uint64_t counter = aiot_word_load(&words[0]) | 1;
        aiot_word_store(&words[0], counter);
        aiot_word_fence();
        for (Py_ssize_t i = 0; i < room; i++) {
            uint64_t word = 0;
            Py_ssize_t left = data.len - i * (Py_ssize_t)sizeof(word);
            if (left > 0) {
                memcpy(&word, (const char *)data.buf + i * (Py_ssize_t)sizeof(word),
                       left < (Py_ssize_t)sizeof(word) ? (size_t)left : sizeof(word));
            }
            aiot_word_store(&words[1 + i], word);
        }
        aiot_word_store(&words[0], counter + 1);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&record);
    if (PyErr_Occurred()) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(record_read_doc,
"_record_read($module, record, /)\n--\n\n"
"The contents of a record in shared memory, as bytes.\n\n"
"None when no whole record could be had: its writer was interrupted, or has died,\n"
"in the middle of writing. Raises ValueError for what cannot be a record.");

static PyObject *
record_read(PyObject *Py_UNUSED(module), PyObject *arg)
{
    Py_buffer record;
    uint64_t *words;
    if (aiot_get_words(arg, 2, &record, &words) < 0) {
        return NULL;
    }
    Py_ssize_t room = record.len / (Py_ssize_t)sizeof(uint64_t) - 1;
    PyObject *found = PyBytes_FromStringAndSize(NULL, room * (Py_ssize_t)sizeof(uint64_t));
    bool whole = false;
    if (found != NULL) {
        char *copy = PyBytes_AS_STRING(found);
        for (int tries = 0; tries < READ_TRIES && !whole; tries++) {
            uint64_t before = aiot_word_load(&words[0]);
            if (before & 1) {
                continue;
            }
            for (Py_ssize_t i = 0; i < room; i++) {
                uint64_t word = aiot_word_load(&words[1 + i]);
                memcpy(copy + i * (Py_ssize_t)sizeof(word), &word, sizeof(word));
            }
            aiot_word_fence();
            whole = aiot_word_load(&words[0]) == before;
        }
    }
    PyBuffer_Release(&record);
    if (found != NULL && !whole) {
        Py_DECREF(found);
        Py_RETURN_NONE;
    }
    return found;
}

PyDoc_STRVAR(word_swap_doc,
"_word_swap($module, words, index, expected, value, /)\n--\n\n"
"Set words[index] to value if it is expected, and say whether it was; atomic among\n"
"all processes that map these words. words is a writable buffer at a multiple of 8\n"
"bytes. Raises IndexError beyond its end.");

static PyObject *
word_swap(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *obj;
    Py_ssize_t index;
    unsigned long long expected, value;
    if (!PyArg_ParseTuple(args, "OnKK:_word_swap", &obj, &index, &expected, &value)) {
        return NULL;
    }
    Py_buffer view;
    uint64_t *words;
    if (aiot_get_words(obj, 1, &view, &words) < 0) {
        return NULL;
    }
    bool inside = index >= 0 && index < view.len / (Py_ssize_t)sizeof(uint64_t);
    bool swapped = inside && aiot_word_swap(&words[index], expected, value);
    PyBuffer_Release(&view);
    if (!inside) {
        PyErr_Format(PyExc_IndexError, "no word %zd in this buffer", index);
        return NULL;
    }
    return PyBool_FromLong(swapped);
}

static PyMethodDef page_functions[] = {
    {"_record_read", record_read, METH_O, record_read_doc},
    {"_record_write", (PyCFunction)(void (*)(void))record_write, METH_FASTCALL, record_write_doc},
    {"_word_swap", word_swap, METH_VARARGS, word_swap_doc},
    {NULL, NULL, 0, NULL},
};

int
aiot_page_add_functions(PyObject *module)
{
    return PyModule_AddFunctions(module, page_functions);
}
