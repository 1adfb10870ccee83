// The Python face of the kernels: kvstore._native. Signatures and meaning as in kvstore/kernels_numpy.py.
//
// Uses the limited API of CPython 3.11, so one build serves every later version.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <new>
#include <vector>

#include "chunk_table_python.h"
#include "exponents_python.h"
#include "glue.h"
#include "ladder_python.h"
#include "planes.h"
#include "pieces.h"
#include "r32_python.h"
#include "xxh3.h"

namespace {

// Releasing and taking the lock costs about as much as moving this many bytes.
constexpr size_t kKeepLockBytesMax = 4096;

// A view of a Python object's memory, released at the end of its scope.
class View {
  public:
    View() = default;
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    View(View&& other) noexcept : view_(other.view_), held_(other.held_) { other.held_ = false; }
    ~View() {
        if (held_) PyBuffer_Release(&view_);
    }

    // Contiguous bytes, writable if `writable`; false with an exception set otherwise.
    bool open_bytes(PyObject* object, bool writable, const char* name) {
        return open(object, PyBUF_ND | (writable ? PyBUF_WRITABLE : 0), writable, name);
    }

    // An array of three axes with any strides.
    bool open_array(PyObject* object, bool writable) {
        if (!open(object, PyBUF_STRIDES | (writable ? PyBUF_WRITABLE : 0), writable, "array")) return false;
        if (view_.ndim == 3) return true;
        PyErr_Format(PyExc_ValueError, "array has %d axes; expected 3 (heads, tokens, dim)", view_.ndim);
        return false;
    }

    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    size_t nbytes() const { return static_cast<size_t>(view_.len); }

    kvstore::Strided strided() const {
        kvstore::Strided out{data(), {}, {}, static_cast<size_t>(view_.itemsize)};
        for (int axis = 0; axis < 3; ++axis) {
            out.shape[axis] = view_.shape[axis];
            out.strides[axis] = view_.strides[axis];
        }
        return out;
    }

  private:
    bool open(PyObject* object, int flags, bool writable, const char* name) {
        if (PyObject_GetBuffer(object, &view_, flags) == 0) return held_ = true;
        if (PyErr_ExceptionMatches(PyExc_TypeError)) return false;
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, writable ? "%s must be writable%s" : "%s must be readable%s", name,
                     flags & PyBUF_STRIDES & ~PyBUF_ND ? "" : ", contiguous memory");
        return false;
    }

    Py_buffer view_{};
    bool held_ = false;
};

// Runs `work`, without the interpreter's lock when there is enough to do.
template <typename Work>
void run(size_t nbytes, Work work) {
    if (nbytes <= kKeepLockBytesMax) return work();
    PyThreadState* state = PyEval_SaveThread();
    work();
    PyEval_RestoreThread(state);
}

bool expect_args(const char* function, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, expected, given);
    return false;
}

PyObject* py_xxh3(PyObject*, PyObject* data) {
    View view;
    if (!view.open_bytes(data, false, "data")) return nullptr;
    uint64_t hash = 0;
    run(view.nbytes(), [&] { hash = kvstore::xxh3(view.data(), view.nbytes()); });
    return PyLong_FromUnsignedLongLong(hash);
}

PyObject* py_copy_xxh3(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!expect_args("copy_xxh3", count, 2)) return nullptr;
    View target, source;
    if (!target.open_bytes(args[0], true, "target") || !source.open_bytes(args[1], false, "source")) return nullptr;
    if (target.nbytes() != source.nbytes()) {
        return PyErr_Format(PyExc_ValueError, "source has %zu bytes, target %zu", source.nbytes(), target.nbytes());
    }
    uint64_t hash = 0;
    run(source.nbytes(), [&] { hash = kvstore::copy_xxh3(target.data(), source.data(), source.nbytes()); });
    return PyLong_FromUnsignedLongLong(hash);
}

// The views of a sequence of arrays, whose sizes add up to `nbytes`; false with an exception set otherwise.
bool open_arrays(PyObject* sequence, bool writable, size_t nbytes, std::vector<View>& views, std::vector<kvstore::Strided>& arrays) {
    const Py_ssize_t count = PySequence_Size(sequence);
    if (count < 0) return false;
    views.reserve(size_t(count));
    arrays.reserve(size_t(count));
    size_t total = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* item = PySequence_GetItem(sequence, i);
        if (!item) return false;
        views.emplace_back();
        const bool opened = views.back().open_array(item, writable);
        Py_DecRef(item);
        if (!opened) return false;
        arrays.push_back(views.back().strided());
        total += views.back().nbytes();
    }
    if (total == nbytes) return true;
    PyErr_Format(PyExc_ValueError, "arrays have %zu bytes, the buffer %zu", total, nbytes);
    return false;
}

PyObject* py_gather_xxh3(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    if (!expect_args("gather_xxh3", count, 2)) return nullptr;
    View target;
    std::vector<View> views;
    std::vector<kvstore::Strided> arrays;
    if (!target.open_bytes(args[0], true, "target")) return nullptr;
    if (!open_arrays(args[1], false, target.nbytes(), views, arrays)) return nullptr;
    uint64_t hash = 0;
    run(target.nbytes(), [&] { hash = kvstore::gather_xxh3(target.data(), target.nbytes(), arrays); });
    return PyLong_FromUnsignedLongLong(hash);
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

PyObject* py_scatter_xxh3(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    if (!expect_args("scatter_xxh3", count, 2)) return nullptr;
    View source;
    std::vector<View> views;
    std::vector<kvstore::Strided> arrays;
    if (!source.open_bytes(args[1], false, "source")) return nullptr;
    if (!open_arrays(args[0], true, source.nbytes(), views, arrays)) return nullptr;
    uint64_t hash = 0;
    run(source.nbytes(), [&] { hash = kvstore::scatter_xxh3(arrays, source.data(), source.nbytes()); });
    return PyLong_FromUnsignedLongLong(hash);
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

using PlanesFunction = void (*)(uint8_t*, const uint8_t*, size_t, size_t);

PyObject* regroup(const char* name, PlanesFunction function, PyObject* const* args, Py_ssize_t count) {
    if (!expect_args(name, count, 3)) return nullptr;
    View target, source;
    if (!target.open_bytes(args[0], true, "target") || !source.open_bytes(args[1], false, "source")) return nullptr;
    const Py_ssize_t itemsize = PyLong_AsSsize_t(args[2]);
    if (itemsize == -1 && PyErr_Occurred()) return nullptr;
    if (target.nbytes() != source.nbytes()) {
        return PyErr_Format(PyExc_ValueError, "source has %zu bytes, target %zu", source.nbytes(), target.nbytes());
    }
    if (itemsize < 1 || source.nbytes() % size_t(itemsize) != 0) {
        return PyErr_Format(PyExc_ValueError, "%zu bytes are no whole number of elements of %zd bytes", source.nbytes(), itemsize);
    }
    run(source.nbytes(), [&] { function(target.data(), source.data(), source.nbytes() / size_t(itemsize), size_t(itemsize)); });
    Py_RETURN_NONE;
}

PyObject* py_split_planes(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return regroup("split_planes", kvstore::split_planes, args, count);
}

PyObject* py_merge_planes(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return regroup("merge_planes", kvstore::merge_planes, args, count);
}

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(kvstore::isa()); }

PyObject* py_use_isa(PyObject*, PyObject* name) { return kvstore::choose_isa(kvstore::use_isa, name); }

PyMethodDef methods[] = {
    {"xxh3", py_xxh3, METH_O, "xxh3(data, /)\n--\n\nXXH3-64 (seed 0) of contiguous bytes."},
    {"copy_xxh3", kvstore::as_method(py_copy_xxh3), METH_FASTCALL,
     "copy_xxh3(target, source, /)\n--\n\nCopy contiguous bytes and return their XXH3-64."},
    {"gather_xxh3", kvstore::as_method(py_gather_xxh3), METH_FASTCALL,
     "gather_xxh3(target, arrays, /)\n--\n\nWrite strided arrays one after another; return the XXH3-64 of the bytes."},
    {"scatter_xxh3", kvstore::as_method(py_scatter_xxh3), METH_FASTCALL,
     "scatter_xxh3(arrays, source, /)\n--\n\nFill strided arrays one after another; return the XXH3-64 of the source."},
    {"split_planes", kvstore::as_method(py_split_planes), METH_FASTCALL,
     "split_planes(target, source, itemsize, /)\n--\n\nRegroup elements into byte planes."},
    {"merge_planes", kvstore::as_method(py_merge_planes), METH_FASTCALL,
     "merge_planes(target, source, itemsize, /)\n--\n\nUndo split_planes."},
    {"isa", py_isa, METH_NOARGS, "isa()\n--\n\nInstruction set in use: avx512, avx2 or scalar."},
    {"use_isa", py_use_isa, METH_O, "use_isa(name, /)\n--\n\nUse another instruction set, for tests and measurements."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(kvstore::r32::add_to_module)},
                            {Py_mod_exec, reinterpret_cast<void*>(kvstore::exponents::add_to_module)},
                            {Py_mod_exec, reinterpret_cast<void*>(kvstore::ladder::add_to_module)},
                            {Py_mod_exec, reinterpret_cast<void*>(kvstore::chunk_table::add_to_module)},
                            {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kvstore._native", "Byte-moving kernels in C++; see kvstore.kernels.",
                          0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
