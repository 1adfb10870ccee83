// The Python face of R32: checks that every size fits before anything runs without the interpreter's lock. What the
// functions do is said in codecs/r32/coder.py.
#include "r32_python.h"

#include "glue.h"

#include <new>

#include "r32.h"

namespace kvstore::r32 {

namespace {

constexpr size_t kTileSymbolsMax = size_t{1} << 28;

// Contiguous memory of a Python object with items of `itemsize` bytes, released at the end of its scope.
class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
        if (held_) PyBuffer_Release(&view_);
    }

    bool open(PyObject* object, const char* name, Py_ssize_t itemsize, int axes, bool writable) {
        if (PyObject_GetBuffer(object, &view_, PyBUF_ND | (writable ? PyBUF_WRITABLE : 0)) != 0) return false;
        held_ = true;
        if (view_.itemsize == itemsize && view_.ndim == axes) return true;
        PyErr_Format(PyExc_ValueError, "%s must have %d axes of items of %zd bytes", name, axes, itemsize);
        return false;
    }

    template <typename Item>
    Item* data() const {
        return static_cast<Item*>(view_.buf);
    }
    size_t size(int axis = 0) const { return size_t(view_.shape[axis]); }

  private:
    Py_buffer view_{};
    bool held_ = false;
};

bool refuse(const char* message) {
    PyErr_SetString(PyExc_ValueError, message);
    return false;
}

// The arguments that describe tiles and tables, and whether they fit each other.
struct Tiles {
    Memory counts, ids, tables, lengths;
    Batch batch{};
    size_t symbols = 0;
    size_t room = 0;

    bool open(PyObject* counts_object, PyObject* ids_object, PyObject* lanes, PyObject* tables_object, Py_ssize_t entry_bytes, size_t entries, PyObject* lengths_object, bool encoding) {
        if (!counts.open(counts_object, "counts", 4, 1, false) || !ids.open(ids_object, "ids", 2, 3, false)) return false;
        if (!tables.open(tables_object, "tables", entry_bytes, 2, false) || !lengths.open(lengths_object, "lengths", 4, 1, encoding)) return false;
        const unsigned long wanted = PyLong_AsUnsignedLong(lanes);
        if (PyErr_Occurred()) return false;
        if (wanted != 8 && wanted != 16 && wanted != 32) return refuse("lanes must be 8, 16 or 32");
        batch = {counts.size(), counts.data<uint32_t>(), unsigned(wanted), ids.data<uint16_t>(), ids.size(0), ids.size(1), ids.size(2)};
        if (lengths.size() != batch.tiles) return refuse("lengths and counts must have one item a tile");
        if ((batch.id_tiles != 1 && batch.id_tiles != batch.tiles) || batch.period < 1 || (batch.id_lanes != 1 && batch.id_lanes != wanted)) {
            return refuse("ids must have the shape (1 or tiles, period, 1 or lanes)");
        }
        if (tables.size(1) != entries) return refuse("tables have another number of entries");
        for (size_t i = 0; i < batch.id_tiles * batch.period * batch.id_lanes; ++i) {
            if (batch.ids[i] >= tables.size(0)) return refuse("a table id is not below the number of tables");
        }
        for (size_t i = 0; i < batch.tiles; ++i) {
            if (batch.counts[i] > kTileSymbolsMax) return refuse("a tile has too many symbols");
            symbols += batch.counts[i];
            room += tile_bytes_max(batch.counts[i], batch.lanes);
        }
        return true;
    }

    // The stream has exactly the bytes that `lengths` promise, and `ok` a place for each tile.
    bool fits(const Memory& stream, const Memory& ok) const {
        size_t total = 0;
        for (size_t i = 0; i < batch.tiles; ++i) total += lengths.data<uint32_t>()[i];
        if (total != stream.size()) return refuse("stream does not have the bytes that lengths add up to");
        return ok.size() == batch.tiles || refuse("ok must have one item a tile");
    }
};

bool as_size(PyObject* object, size_t& out) {
    out = PyLong_AsSize_t(object);
    return !PyErr_Occurred();
}

// radix, values_per_symbol and zero from three arguments; tokens and channels from the shape of `values`.
bool open_unpacking(PyObject* const* args, const Memory& values, Unpacking& out) {
    size_t radix, values_per_symbol, zero;
    if (!as_size(args[0], radix) || !as_size(args[1], values_per_symbol) || !as_size(args[2], zero)) return false;
    size_t alphabet = 1;
    for (size_t i = 0; i < values_per_symbol && radix > 1 && alphabet <= kSymbols; ++i) alphabet *= radix;
    if (alphabet < 2 || alphabet > kSymbols || zero >= radix) return refuse("packing is not possible");
    out = {unsigned(radix), unsigned(values_per_symbol), int(zero), values.size(1), values.size(2)};
    if (out.channels < 1 || out.tokens > kTileSymbolsMax / out.channels) return refuse("a tile has no or too many values");
    return true;
}

size_t symbols_of(const Unpacking& how) { return (how.tokens + how.values_per_symbol - 1) / how.values_per_symbol * how.channels; }

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

bool expect(const char* function, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", function, expected, given);
    return false;
}

// target, ok, stream, lengths, counts, ids, lanes, tables, threads
PyObject* py_decode(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!expect("r32_decode", count, 9)) return nullptr;
    Memory target, ok, stream;
    Tiles tiles;
    size_t threads;
    if (!target.open(args[0], "target", 1, 1, true) || !ok.open(args[1], "ok", 1, 1, true) || !stream.open(args[2], "stream", 1, 1, false)) return nullptr;
    if (!tiles.open(args[4], args[5], args[6], args[7], 4, kSlots, args[3], false) || !tiles.fits(stream, ok) || !as_size(args[8], threads)) return nullptr;
    if (target.size() != tiles.symbols) return refuse("target does not have the size of all symbols"), nullptr;
    const bool done = run([&] {
        decode(tiles.batch, tiles.tables.data<uint32_t>(), stream.data<uint8_t>(), tiles.lengths.data<uint32_t>(), target.data<uint8_t>(), ok.data<uint8_t>(), threads);
    });
    if (!done) return nullptr;
    Py_RETURN_NONE;
}

// values (tiles, tokens, channels), ok, stream, lengths, counts, ids, lanes, tables, radix, values_per_symbol, zero, threads
PyObject* py_decode_values(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!expect("r32_decode_values", count, 12)) return nullptr;
    Memory values, ok, stream;
    Tiles tiles;
    size_t threads;
    if (!values.open(args[0], "values", 1, 3, true) || !ok.open(args[1], "ok", 1, 1, true) || !stream.open(args[2], "stream", 1, 1, false)) return nullptr;
    if (!tiles.open(args[4], args[5], args[6], args[7], 4, kSlots, args[3], false) || !tiles.fits(stream, ok) || !as_size(args[11], threads)) return nullptr;
    Unpacking how;
    if (!open_unpacking(args + 8, values, how)) return nullptr;
    if (values.size(0) != tiles.batch.tiles) return refuse("values must have the shape (tiles, tokens, channels)"), nullptr;
    for (size_t i = 0; i < tiles.batch.tiles; ++i) {
        if (tiles.batch.counts[i] != symbols_of(how)) return refuse("a tile does not have the symbols of its values"), nullptr;
    }
    const bool done = run([&] {
        decode_values(tiles.batch, tiles.tables.data<uint32_t>(), stream.data<uint8_t>(), tiles.lengths.data<uint32_t>(), how, values.data<int8_t>(), ok.data<uint8_t>(), threads);
    });
    if (!done) return nullptr;
    Py_RETURN_NONE;
}

// target, lengths, symbols, counts, ids, lanes, tables, threads; answers the bytes written, -1 for a symbol without a frequency
PyObject* py_encode(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!expect("r32_encode", count, 8)) return nullptr;
    Memory target, symbols;
    Tiles tiles;
    size_t threads;
    if (!target.open(args[0], "target", 1, 1, true) || !symbols.open(args[2], "symbols", 1, 1, false)) return nullptr;
    if (!tiles.open(args[3], args[4], args[5], args[6], 8, kSymbols, args[1], true) || !as_size(args[7], threads)) return nullptr;
    if (symbols.size() != tiles.symbols) return refuse("symbols are not as many as counts add up to"), nullptr;
    if (target.size() < tiles.room) return refuse("target has less room than the largest possible stream"), nullptr;
    size_t written = 0;
    const bool done = run([&] {
        written = encode(tiles.batch, tiles.tables.data<uint64_t>(), symbols.data<uint8_t>(), target.data<uint8_t>(), tiles.lengths.data<uint32_t>(), threads);
    });
    return done ? PyLong_FromSsize_t(written == SIZE_MAX ? -1 : Py_ssize_t(written)) : nullptr;
}

// symbols (tiles, symbols), values (tiles, tokens, channels), radix, values_per_symbol, zero; answers whether all values fit
PyObject* py_pack(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!expect("r32_pack", count, 5)) return nullptr;
    Memory symbols, values;
    Unpacking how;
    if (!symbols.open(args[0], "symbols", 1, 2, true) || !values.open(args[1], "values", 1, 3, false) || !open_unpacking(args + 2, values, how)) return nullptr;
    if (symbols.size(0) != values.size(0) || symbols.size(1) != symbols_of(how)) return refuse("symbols must have the shape (tiles, symbols)"), nullptr;
    bool fit = true;
    run([&] {
        for (size_t i = 0; i < values.size(0); ++i) {
            fit &= pack(how, values.data<int8_t>() + i * how.tokens * how.channels, symbols.data<uint8_t>() + i * symbols.size(1));
        }
    });
    return PyBool_FromLong(fit);
}

PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa()); }

PyObject* py_use_isa(PyObject*, PyObject* name) { return kvstore::choose_isa(use_isa, name); }

PyMethodDef methods[] = {
    {"r32_decode", as_method(py_decode), METH_FASTCALL,
     "r32_decode(target, ok, stream, lengths, counts, ids, lanes, tables, threads, /)\n--\n\nDecode tiles to symbols."},
    {"r32_decode_values", as_method(py_decode_values), METH_FASTCALL,
     "r32_decode_values(values, ok, stream, lengths, counts, ids, lanes, tables, radix, values_per_symbol, zero, threads, /)\n--\n\n"
     "Decode tiles and unpack their symbols."},
    {"r32_encode", as_method(py_encode), METH_FASTCALL,
     "r32_encode(target, lengths, symbols, counts, ids, lanes, tables, threads, /)\n--\n\nEncode tiles; bytes written, or -1."},
    {"r32_pack", as_method(py_pack), METH_FASTCALL,
     "r32_pack(symbols, values, radix, values_per_symbol, zero, /)\n--\n\nPack values; False if one does not fit."},
    {"r32_isa", py_isa, METH_NOARGS, "r32_isa()\n--\n\nInstruction set in use: avx512, avx2, neon or scalar."},
    {"r32_use_isa", py_use_isa, METH_O, "r32_use_isa(name, /)\n--\n\nUse another instruction set, for tests and measurements."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_to_module(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace kvstore::r32
