#include "exponents_python.h"

#include "glue.h"

#include <new>

#include "exponents.h"

namespace kvstore::exponents {

namespace {

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

    // Contiguous memory of that many axes (any number for 0), or an array of any strides.
    bool open(PyObject* object, const char* name, int axes, bool writable, bool strided = false) {
        if (PyObject_GetBuffer(object, &view_, (strided ? PyBUF_STRIDES : PyBUF_ND) | (writable ? PyBUF_WRITABLE : 0)) != 0) {
            if (PyErr_ExceptionMatches(PyExc_TypeError)) return false;
            PyErr_Clear();
            return refuse("%s must be contiguous, and writable where it is written", name);
        }
        held_ = true;
        if (axes && view_.ndim != axes) return refuse("%s has another number of axes than expected", name);
        return true;
    }

    // One array of (heads, tokens, dim) elements of 1, 2 or 4 bytes.
    bool open_array(PyObject* object, bool writable) {
        if (!open(object, "array", 3, writable, true)) return false;
        return view_.itemsize == 1 || view_.itemsize == 2 || view_.itemsize == 4 || refuse("%s must have elements of 1, 2 or 4 bytes", "array");
    }

    template <typename Item = uint8_t>
    Item* data() const {
        return static_cast<Item*>(view_.buf);
    }
    size_t nbytes() const { return size_t(view_.len); }
    size_t size(int axis) const { return size_t(view_.shape[axis]); }
    bool has_items(Py_ssize_t itemsize, size_t count) const { return view_.itemsize == itemsize && nbytes() == count * size_t(itemsize); }

    Strided strided() const {
        Strided out{data(), {}, {}, size_t(view_.itemsize)};
        for (int axis = 0; axis < 3; ++axis) {
            out.shape[axis] = view_.shape[axis];
            out.strides[axis] = view_.strides[axis];
        }
        return out;
    }

  private:
    static bool refuse(const char* format, const char* name) {
        PyErr_Format(PyExc_ValueError, format, name);
        return false;
    }

    Py_buffer view_{};
    bool held_ = false;
};

PyObject* refuse(const char* message) {
    PyErr_SetString(PyExc_ValueError, message);
    return nullptr;
}

bool expect(const char* function, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, expected, given);
    return false;
}

struct Arrays {
    std::vector<View> views;
    std::vector<Strided> strided;
    size_t nbytes = 0;

    bool open(PyObject* sequence, bool writable) {
        const Py_ssize_t count = PySequence_Size(sequence);
        if (count < 0) return false;
        views.reserve(size_t(count));
        for (Py_ssize_t i = 0; i < count; ++i) {
            PyObject* item = PySequence_GetItem(sequence, i);
            if (!item) return false;
            views.emplace_back();
            const bool opened = views.back().open_array(item, writable);
            Py_DecRef(item);
            if (!opened) return false;
            strided.push_back(views.back().strided());
            nbytes += views.back().nbytes();
            if (strided.back().nbytes() / size_t(strided.back().shape[0] ? strided.back().shape[0] : 1) > UINT32_MAX) {
                return refuse("a head has 4 GiB or more"), false;
            }
        }
        return true;
    }
};

// Runs `work` without the interpreter's lock; false with an exception set if memory runs out.
template <typename Work>
bool run(const Work& work) {
    PyThreadState* state = PyEval_SaveThread();
    bool done = true;
    try {
        work();
    } catch (const std::bad_alloc&) {
        done = false;
    }
    PyEval_RestoreThread(state);
    if (!done) PyErr_NoMemory();
    return done;
}

PyObject* py_encode_fixed(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    View target;
    Arrays arrays;
    if (!expect("encode_fixed", count, 2) || !target.open(args[0], "target", 0, true) || !arrays.open(args[1], false)) return nullptr;
    if (target.nbytes() < directory_bytes(arrays.strided) + arrays.nbytes) return refuse("target is smaller than the directory and the arrays");
    size_t written = 0;
    if (!run([&] { written = encode_fixed(target.data(), arrays.strided); })) return nullptr;
    return PyLong_FromSize_t(written);
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

PyObject* py_decode_fixed(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    View source;
    Arrays arrays;
    if (!expect("decode_fixed", count, 2) || !arrays.open(args[0], true) || !source.open(args[1], "source", 0, false)) return nullptr;
    const char* wrong = nullptr;
    if (!run([&] { wrong = decode_fixed(arrays.strided, source.data(), source.nbytes()); })) return nullptr;
    return wrong ? PyUnicode_FromString(wrong) : PyUnicode_FromString("");
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

PyObject* py_split_rotated(PyObject*, PyObject* const* args, Py_ssize_t count) {
    View planes, array;
    if (!expect("split_rotated", count, 2) || !planes.open(args[0], "planes", 0, true) || !array.open_array(args[1], false)) return nullptr;
    if (planes.nbytes() != array.nbytes()) return refuse("planes and array have different sizes");
    if (!run([&] { split_rotated(planes.data(), array.strided()); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_merge_rotated(PyObject*, PyObject* const* args, Py_ssize_t count) {
    View planes, array;
    if (!expect("merge_rotated", count, 2) || !array.open_array(args[0], true) || !planes.open(args[1], "planes", 0, false)) return nullptr;
    if (planes.nbytes() != array.nbytes()) return refuse("planes and array have different sizes");
    if (!run([&] { merge_rotated(array.strided(), planes.data()); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_channel_sums(PyObject*, PyObject* const* args, Py_ssize_t count) {
    View sums, tops;
    if (!expect("channel_sums", count, 2) || !sums.open(args[0], "sums", 3, true) || !tops.open(args[1], "tops", 3, false)) return nullptr;
    const size_t heads = tops.size(0), tokens = tops.size(1), dim = tops.size(2);
    if (!tops.has_items(1, heads * tokens * dim) || !sums.has_items(8, heads * dim * 2)) return refuse("sums must be u64 (heads, dim, 2), tops bytes");
    if (!run([&] { channel_sums(sums.data<uint64_t>(), tops.data(), heads, tokens, dim); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_count_tops(PyObject*, PyObject* const* args, Py_ssize_t count) {
    View counts, tops, ids;
    if (!expect("count_tops", count, 3) || !counts.open(args[0], "counts", 2, true) || !tops.open(args[1], "tops", 3, false)) return nullptr;
    if (!ids.open(args[2], "ids", 2, false)) return nullptr;
    const size_t heads = tops.size(0), tokens = tops.size(1), dim = tops.size(2), tables = counts.size(0);
    if (!tops.has_items(1, heads * tokens * dim) || !ids.has_items(1, heads * dim) || !counts.has_items(8, tables * kTops)) {
        return refuse("counts must be u64 (tables, 256), tops bytes (heads, tokens, dim), ids bytes (heads, dim)");
    }
    for (size_t i = 0; i < heads * dim; ++i) {
        if (ids.data()[i] >= tables) return refuse("an id is not below the number of tables");
    }
    if (!run([&] { count_tops(counts.data<uint64_t>(), tops.data(), ids.data(), heads, tokens, dim, tables); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* py_use_isa(PyObject*, PyObject* name) { return kvstore::choose_isa(use_isa, name); }

PyMethodDef methods[] = {
    {"encode_fixed", as_method(py_encode_fixed), METH_FASTCALL, "encode_fixed(target, arrays, /)\n--\n\nWrite a segment of block format 2; bytes written."},
    {"decode_fixed", as_method(py_decode_fixed), METH_FASTCALL, "decode_fixed(arrays, source, /)\n--\n\nFill arrays from such a segment; what is wrong with it, or nothing."},
    {"split_rotated", as_method(py_split_rotated), METH_FASTCALL, "split_rotated(planes, array, /)\n--\n\nRotate elements and split them into byte planes."},
    {"merge_rotated", as_method(py_merge_rotated), METH_FASTCALL, "merge_rotated(array, planes, /)\n--\n\nUndo split_rotated."},
    {"channel_sums", as_method(py_channel_sums), METH_FASTCALL, "channel_sums(sums, tops, /)\n--\n\nSums and sums of squares over tokens."},
    {"count_tops", as_method(py_count_tops), METH_FASTCALL, "count_tops(counts, tops, ids, /)\n--\n\nCount symbols for each table."},
    {"exponents_use_isa", py_use_isa, METH_O, "exponents_use_isa(name, /)\n--\n\nUse another instruction set, for tests and measurements."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_to_module(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace kvstore::exponents
