// The Python face of the ladder's kernels: checks that every size fits before anything runs without the interpreter's lock. What
// the functions do is said in codecs/ladder_native.py.
#include "ladder_python.h"

#include "glue.h"

#include <cstring>
#include <deque>
#include <new>
#include <string>

#include "ladder.h"
#include "r32.h"

namespace kvstore::ladder {

namespace {

bool refuse(const char* message) {
    PyErr_SetString(PyExc_ValueError, message);
    return false;
}

// A view of a Python object's memory, released at the end of its scope.
class View {
  public:
    View() = default;
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    ~View() {
        if (held_) PyBuffer_Release(&view_);
    }

    // Contiguous items; of a number that is checked by `has`.
    bool open(PyObject* object, Py_ssize_t itemsize, bool writable = false) {
        return acquire(object, PyBUF_ND, writable) && (view_.itemsize == itemsize || refuse("an array has items of another size than expected"));
    }

    // An array (heads, tokens, dim) of any strides.
    bool open_array(PyObject* object, bool writable) {
        return acquire(object, PyBUF_STRIDES, writable) && (view_.ndim == 3 || refuse("an array must have the axes (heads, tokens, dim)"));
    }

    bool has(size_t items) const { return count() == items || refuse("an array has another number of items than expected"); }
    size_t count() const { return size_t(view_.len) / size_t(view_.itemsize); }
    size_t nbytes() const { return size_t(view_.len); }
    template <typename Item>
    Item* data() const {
        return static_cast<Item*>(view_.buf);
    }

    Strided strided() const {
        Strided out{data<uint8_t>(), {}, {}, size_t(view_.itemsize)};
        for (int axis = 0; axis < 3; ++axis) {
            out.shape[axis] = view_.shape[axis];
            out.strides[axis] = view_.strides[axis];
        }
        return out;
    }

  private:
    bool acquire(PyObject* object, int flags, bool writable) {
        if (PyObject_GetBuffer(object, &view_, flags | (writable ? PyBUF_WRITABLE : 0)) == 0) return held_ = true;
        if (PyErr_ExceptionMatches(PyExc_TypeError)) return false;
        PyErr_Clear();
        return refuse("an array must be contiguous, and writable where it is written");
    }

    Py_buffer view_{};
    bool held_ = false;
};

// Calls `open(view, item)` for a new view of every item of a sequence.
template <typename Open>
bool open_each(std::deque<View>& views, PyObject* sequence, const Open& open) {
    const Py_ssize_t count = PySequence_Size(sequence);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* item = PySequence_GetItem(sequence, i);
        if (!item) return false;
        const bool opened = open(views.emplace_back(), item);
        Py_DecRef(item);
        if (!opened) return false;
    }
    return count >= 0;
}

bool expect(const char* function, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, expected, given);
    return false;
}

// tokens, classes, widths
struct GroupArguments {
    View classes, widths;
    Blocks blocks{};

    bool open(PyObject* const* args) {
        const size_t tokens = PyLong_AsSize_t(args[0]);
        if (PyErr_Occurred() || !classes.open(args[1], 1) || !widths.open(args[2], 4)) return false;
        blocks = {tokens, widths.count(), classes.data<int8_t>(), widths.data<uint32_t>()};
        size_t end = 0;
        for (size_t i = 0; i < blocks.count; ++i) {
            const size_t start = end;
            end += blocks.widths[i];
            if (end > classes.count()) return refuse("widths are more than there are classes");
            if (tokens > UINT32_MAX || size_t{blocks.widths[i]} * (tokens + 1) >= size_t{1} << 28) return refuse("a block is too large");
            for (size_t j = start; j < end; ++j) {
                const int own = blocks.classes[j];
                if (own < kClassMin || own > kClassMax || (j > start && own > blocks.classes[j - 1])) return refuse("classes are out of range or order");
            }
        }
        return end == classes.count() || refuse("widths are fewer than there are classes");
    }
    size_t columns() const { return classes.count(); }
};

// levels, tables, centroids
struct SourceArguments {
    std::deque<View> levels;
    View tables, centroids;
    Source source{};

    bool open(PyObject* const* args) {
        const auto open_level = [&](View& view, PyObject* item) {
            if (!view.open(item, 1)) return false;
            source.levels.push_back({view.data<uint8_t>(), view.nbytes()});
            return true;
        };
        if (!open_each(levels, args[0], open_level)) return false;
        if (levels.empty() || levels.size() > kLevels) return refuse("levels must be 1 to 4");
        if (!tables.open(args[1], 4) || !tables.has(kTables * r32::kSlots) || !centroids.open(args[2], 4) || !centroids.has(kCentroids)) return false;
        source.tables = tables.data<uint32_t>();
        source.centroids = centroids.data<float>();
        return true;
    }
};

bool parse_format(PyObject* name, Format& out) {
    constexpr const char* names[] = {"float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2"};
    PyObject* bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return false;
    size_t found = 0;
    while (found < std::size(names) && std::strcmp(PyBytes_AsString(bytes), names[found]) != 0) ++found;
    Py_DecRef(bytes);
    out = Format(found);
    return found < std::size(names) || refuse("the element type is unknown");
}

// targets, dtype, cosine, sine, first and behind the last of the targets that are rotated
struct TargetArguments {
    std::deque<View> views;
    View cosine, sine;
    Rotation rotation{};
    std::vector<Target> targets;

    bool open(PyObject* const* args, size_t tokens) {
        Format format;
        if (!parse_format(args[1], format) || !cosine.open(args[2], 4) || !sine.open(args[3], 4) || !sine.has(cosine.count())) return false;
        const size_t start = PyLong_AsSize_t(args[4]);
        if (PyErr_Occurred()) return false;
        const size_t stop = PyLong_AsSize_t(args[5]);
        if (PyErr_Occurred()) return false;
        rotation = {cosine.data<float>(), sine.data<float>(), tokens ? cosine.count() / tokens : 0};
        if (rotation.half * tokens != cosine.count()) return refuse("the rotation has other tokens than the group");
        const size_t itemsize = format == Format::kFloat32 ? 4 : format == Format::kBfloat16 || format == Format::kFloat16 ? 2 : 1;
        return open_each(views, args[0], [&](View& view, PyObject* item) {
            if (!view.open_array(item, true)) return false;
            const bool rotated = start <= targets.size() && targets.size() < stop;
            targets.push_back({view.strided(), format, rotated ? &rotation : nullptr});
            const Strided& array = targets.back().array;
            if (array.itemsize != itemsize || size_t(array.shape[1]) != tokens || array.shape[0] != targets[0].array.shape[0]) {
                return refuse("a target has another element type or shape than expected");
            }
            return !rotated || 2 * rotation.half <= size_t(array.shape[2]) || refuse("the rotation is wider than what it rotates");
        });
    }
};

// Runs `work` without the interpreter's lock; answers what is wrong with the bytes as text, "" for nothing.
template <typename Work>
PyObject* run(const Work& work) {
    const char* wrong = nullptr;
    bool done = true;
    PyThreadState* state = PyEval_SaveThread();
    try {
        wrong = work();
    } catch (const std::bad_alloc&) {
        done = false;
    }
    PyEval_RestoreThread(state);
    return done ? PyUnicode_FromString(wrong ? wrong : "") : PyErr_NoMemory();
}

// targets, dtype, cosine, sine, rotated start, rotated stop, tokens, classes, widths, steps, places, gains, centres, levels, tables, centroids
PyObject* py_decode_heads(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    GroupArguments group;
    TargetArguments targets;
    SourceArguments source;
    View steps, places, gains, centres;
    if (!expect("ladder_decode_heads", count, 16) || !group.open(args + 6) || !targets.open(args, group.blocks.tokens) || !source.open(args + 13)) return nullptr;
    if (!steps.open(args[9], 4) || !places.open(args[10], 4) || !gains.open(args[11], 4) || !centres.open(args[12], 4)) return nullptr;
    if (!steps.has(group.blocks.count) || !places.has(group.columns()) || !gains.has(group.columns()) || !centres.has(group.columns())) return nullptr;
    const size_t heads = targets.targets.empty() ? 0 : size_t(targets.targets[0].array.shape[0]);
    if (heads * targets.targets.size() != group.blocks.count) return refuse("there must be a block for each head of each target"), nullptr;
    for (size_t i = 0, column = 0; i < group.blocks.count; ++i) {
        const size_t width = group.blocks.widths[i];
        if (width != size_t(targets.targets[i / heads].array.shape[2])) return refuse("a block has another width than its target"), nullptr;
        for (const size_t end = column + width; column < end; ++column) {
            if (places.data<uint32_t>()[column] >= width || width > UINT16_MAX) return refuse("a place is outside its block"), nullptr;
        }
    }
    const Scales scales{steps.data<float>(), places.data<uint32_t>(), gains.data<float>(), centres.data<float>()};
    return run([&] { return decode_heads(group.blocks, source.source, scales, targets.targets); });
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

// numbers, present, tokens, classes, widths, steps, levels, tables, centroids
PyObject* py_decode_components(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    GroupArguments group;
    SourceArguments source;
    View numbers, present, steps;
    if (!expect("ladder_decode_components", count, 9) || !group.open(args + 2) || !source.open(args + 6)) return nullptr;
    if (!numbers.open(args[0], 4, true) || !present.open(args[1], 4, true) || !steps.open(args[5], 4)) return nullptr;
    if (!numbers.has(group.columns() * group.blocks.tokens) || !present.has(group.blocks.count) || !steps.has(group.blocks.count)) return nullptr;
    return run([&] { return decode_components(group.blocks, source.source, steps.data<float>(), numbers.data<float>(), present.data<uint32_t>()); });
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

// targets, dtype, cosine, sine, rotated start, rotated stop, tokens, channels, means
PyObject* py_write_channels(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    TargetArguments targets;
    std::deque<View> channels, means;
    std::vector<Strided> from;
    std::vector<const float*> mean_of;
    if (!expect("ladder_write_channels", count, 9)) return nullptr;
    const size_t tokens = PyLong_AsSize_t(args[6]);
    if (PyErr_Occurred() || !targets.open(args, tokens)) return nullptr;
    const auto open_channels = [&](View& view, PyObject* item) {
        if (!view.open_array(item, false)) return false;
        from.push_back(view.strided());
        if (from.size() > targets.targets.size() || std::memcmp(from.back().shape, targets.targets[from.size() - 1].array.shape, sizeof from.back().shape) != 0) {
            return refuse("channels have another shape than their target");
        }
        return (from.back().itemsize == 4 && from.back().strides[2] == 4) || refuse("channels must be fp32, each token's consecutive");
    };
    const auto open_mean = [&](View& view, PyObject* item) {
        if (mean_of.size() == from.size()) return refuse("there are more means than channels");
        const Strided& own = from[mean_of.size()];
        mean_of.push_back(nullptr);
        if (!view.open(item, 4) || !view.has(size_t(own.shape[0]) * size_t(own.shape[2]))) return false;
        mean_of.back() = view.data<float>();
        return true;
    };
    if (!open_each(channels, args[7], open_channels) || !open_each(means, args[8], open_mean)) return nullptr;
    if (from.size() != targets.targets.size() || mean_of.size() != from.size()) return refuse("there must be channels and means for every target"), nullptr;
    return run([&]() -> const char* {
        write_channels(targets.targets, from, mean_of);
        return nullptr;
    });
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

// finest, numbers of every block, places, marks of tokens; answers whether all fit
PyObject* py_quantise(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    View finest, places, marks;
    std::deque<View> numbers;
    if (!expect("ladder_quantise", count, 4) || !finest.open(args[0], 2, true) || !places.open(args[2], 4) || !marks.open(args[3], 1)) return nullptr;
    const size_t tokens = marks.count();
    size_t columns = 0;
    std::vector<size_t> widths;
    const auto open_block = [&](View& view, PyObject* item) {
        if (!view.open(item, 4)) return false;
        const size_t width = tokens ? view.count() / tokens : 0;
        if (width * tokens != view.count() || width > places.count() - columns) return refuse("a block has other tokens or components than expected");
        for (size_t i = 0; i < width; ++i) {
            if (places.data<uint32_t>()[columns + i] >= width) return refuse("a place is outside its block");
        }
        widths.push_back(width);
        columns += width;
        return true;
    };
    if (!open_each(numbers, args[1], open_block) || !finest.has(columns * tokens) || (tokens && !places.has(columns))) return nullptr;
    bool fit = true;
    PyObject* done = run([&]() -> const char* {
        int16_t* out = finest.data<int16_t>();
        const uint32_t* sources = places.data<uint32_t>();
        for (size_t i = 0; i < widths.size(); out += tokens * widths[i], sources += widths[i], ++i) {
            fit &= quantise(out, numbers[i].data<float>(), sources, marks.data<uint8_t>(), tokens, widths[i]);
        }
        return nullptr;
    });
    if (!done) return nullptr;
    Py_DecRef(done);
    return PyBool_FromLong(fit);
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

// tokens, classes, widths, finest, tables; answers the bytes of the levels
PyObject* py_encode(PyObject*, PyObject* const* args, Py_ssize_t count) try {
    GroupArguments group;
    View finest, tables;
    if (!expect("ladder_encode", count, 5) || !group.open(args) || !finest.open(args[3], 2) || !tables.open(args[4], 8)) return nullptr;
    if (!finest.has(group.columns() * group.blocks.tokens) || !tables.has(kTables * r32::kSymbols)) return nullptr;
    std::vector<uint8_t> levels[kLevels];
    PyObject* done = run([&]() -> const char* {
        encode(group.blocks, finest.data<int16_t>(), tables.data<uint64_t>(), levels);
        return nullptr;
    });
    if (!done) return nullptr;
    Py_DecRef(done);
    PyObject* out = PyList_New(0);
    for (size_t level = 0; out && level < kLevels; ++level) {
        PyObject* bytes = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(levels[level].data()), Py_ssize_t(levels[level].size()));
        if (!bytes || PyList_Append(out, bytes) != 0) Py_CLEAR(out);
        Py_XDECREF(bytes);
    }
    return out;
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

PyObject* py_use_isa(PyObject*, PyObject* name) { return kvstore::choose_isa(use_isa, name); }

PyMethodDef methods[] = {
    {"ladder_decode_heads", as_method(py_decode_heads), METH_FASTCALL, "Decode a layer group whose components are channels into its arrays; what is wrong with the bytes."},
    {"ladder_decode_components", as_method(py_decode_components), METH_FASTCALL, "Decode a layer group to components; what is wrong with the bytes."},
    {"ladder_write_channels", as_method(py_write_channels), METH_FASTCALL, "Write channels and their means to arrays."},
    {"ladder_quantise", as_method(py_quantise), METH_FASTCALL, "Values at the finest level from components in base steps; whether all fit."},
    {"ladder_encode", as_method(py_encode), METH_FASTCALL, "The bytes of all levels of a layer group from its finest values."},
    {"ladder_use_isa", py_use_isa, METH_O, "ladder_use_isa(name, /)\n--\n\nUse another instruction set, for tests and measurements."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_to_module(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace kvstore::ladder
