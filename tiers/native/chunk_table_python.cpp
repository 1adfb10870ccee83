// Signatures and meaning are in kvstore/_native.pyi and kvstore/tiers/packed_index.py.
#include "chunk_table_python.h"

#include <cstring>
#include <new>
#include <stdexcept>

#include "chunk_table.h"
#include "glue.h"
#include "xxh3.h"

namespace kvstore::chunk_table {
namespace {

// A record of the catalog, see kvstore/tiers/catalog.py.
struct Record {
    uint16_t volume, zero;
    uint32_t check;
    uint64_t offset, nbytes, access;
    Key parent;
};
constexpr size_t kRecordBytes = 64;
constexpr size_t kChecked = 8;
static_assert(sizeof(Record) == kRecordBytes, "records are read as they lie");

struct Object {
    PyObject_HEAD
    ChunkTable table;
};

ChunkTable& table_of(PyObject* self) { return reinterpret_cast<Object*>(self)->table; }

// Runs `work`, turning what C++ throws into what Python raises.
template <typename Work>
PyObject* guarded(Work work) try {
    return work();
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
} catch (const std::length_error& error) {
    return PyErr_Format(PyExc_OverflowError, "%s", error.what());
}

PyObject* refuse(const char* problem) {
    PyErr_SetString(PyExc_ValueError, problem);
    return nullptr;
}

bool read_key(PyObject* object, Key& key) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(object, &data, &size) != 0) return false;
    if (size != Py_ssize_t(key.size())) return refuse("a chunk key has 32 bytes") != nullptr;
    std::memcpy(key.data(), data, key.size());
    return true;
}

PyObject* key_bytes(const ChunkTable& table, uint32_t slot) {
    static const Key root{};
    const Key& key = slot == kNoSlot ? root : table[slot].key;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key.data()), Py_ssize_t(key.size()));
}

// (key, offset, nbytes, access, parent, children)
PyObject* row(const ChunkTable& table, uint32_t slot) {
    const ChunkSlot& chunk = table[slot];
    return Py_BuildValue("NKKKNI", key_bytes(table, slot), static_cast<unsigned long long>(chunk.offset),
                         static_cast<unsigned long long>(chunk.nbytes), static_cast<unsigned long long>(chunk.access),
                         key_bytes(table, chunk.parent), chunk.children);
}

PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    unsigned long long seed = 0;
    if (!PyArg_ParseTuple(args, "K", &seed)) return nullptr;
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = allocate(type, 0);
    if (!self) return nullptr;
    try {
        new (&table_of(self)) ChunkTable(seed);
    } catch (const std::bad_alloc&) {
        // The destructor must not see a table that was never made.
        reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
        Py_DecRef(reinterpret_cast<PyObject*>(type));
        return PyErr_NoMemory();
    }
    return self;
}

void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    table_of(self).~ChunkTable();
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DecRef(reinterpret_cast<PyObject*>(type));
}

Py_ssize_t length(PyObject* self) { return Py_ssize_t(table_of(self).size()); }

PyObject* nbytes(PyObject* self, PyObject*) { return PyLong_FromSize_t(table_of(self).nbytes()); }

PyObject* last_access(PyObject* self, PyObject*) {
    const ChunkTable& table = table_of(self);
    return PyLong_FromUnsignedLongLong(table.size() ? table[table.newest()].access : 0);
}

PyObject* get(PyObject* self, PyObject* object) {
    Key key;
    if (!read_key(object, key)) return nullptr;
    const uint32_t slot = table_of(self).find(key);
    if (slot == kNoSlot) Py_RETURN_NONE;
    return row(table_of(self), slot);
}

PyObject* add(PyObject* self, PyObject* args) {
    PyObject *key_object, *parent_object;
    unsigned long long offset, nbytes, access;
    if (!PyArg_ParseTuple(args, "OOKKK", &key_object, &parent_object, &offset, &nbytes, &access)) return nullptr;
    Key key, parent;
    if (!read_key(key_object, key) || !read_key(parent_object, parent)) return nullptr;
    return guarded([&] { return PyBool_FromLong(table_of(self).add(key, parent, offset, nbytes, access)); });
}

PyObject* remove(PyObject* self, PyObject* object) {
    Key key;
    if (!read_key(object, key)) return nullptr;
    const uint32_t slot = table_of(self).find(key);
    if (slot != kNoSlot) table_of(self).remove(slot);
    return PyBool_FromLong(slot != kNoSlot);
}

// Calls `each(key, place in the sequence)` until it answers false.
template <typename Each>
bool for_each_key(PyObject* keys, Each each) {
    const Py_ssize_t count = PySequence_Size(keys);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* item = PySequence_GetItem(keys, i);
        if (!item) return false;
        Key key;
        const bool read = read_key(item, key);
        Py_DecRef(item);
        if (!read || !each(key, i)) return false;
    }
    return count >= 0;
}

PyObject* sizes(PyObject* self, PyObject* keys) {
    const Py_ssize_t count = PySequence_Size(keys);
    PyObject* out = count < 0 ? nullptr : PyList_New(count);
    if (!out) return nullptr;
    const ChunkTable& table = table_of(self);
    const bool done = for_each_key(keys, [&](const Key& key, Py_ssize_t i) {
        const uint32_t slot = table.find(key);
        PyObject* size = slot == kNoSlot ? Py_BuildValue("") : PyLong_FromUnsignedLongLong(table[slot].nbytes);
        return size && PyList_SetItem(out, i, size) == 0;
    });
    if (done) return out;
    Py_DecRef(out);
    return nullptr;
}

PyObject* touch(PyObject* self, PyObject* args) {
    PyObject* keys;
    unsigned long long access;
    if (!PyArg_ParseTuple(args, "OK", &keys, &access)) return nullptr;
    ChunkTable& table = table_of(self);
    const bool done = for_each_key(keys, [&](const Key& key, Py_ssize_t) {
        const uint32_t slot = table.find(key);
        if (slot != kNoSlot) table.use(slot, ++access);
        return true;
    });
    return done ? PyLong_FromUnsignedLongLong(access) : nullptr;
}

bool append(PyObject* list, PyObject* item) {
    const bool appended = item && PyList_Append(list, item) == 0;
    if (item) Py_DecRef(item);
    return appended;
}

PyObject* walk(PyObject* self, PyObject* args) {
    unsigned long long from, limit;
    if (!PyArg_ParseTuple(args, "KK", &from, &limit)) return nullptr;
    const ChunkTable& table = table_of(self);
    if (from != kNoSlot && !table.is_there(from)) return refuse("the cursor's chunk has been removed");
    uint32_t slot = from == kNoSlot ? table.oldest() : uint32_t(from);
    PyObject* rows = PyList_New(0);
    if (!rows) return nullptr;
    for (; slot != kNoSlot && limit; --limit, slot = table[slot].newer) {
        if (append(rows, row(table, slot))) continue;
        Py_DecRef(rows);
        return nullptr;
    }
    return Py_BuildValue("NK", rows, static_cast<unsigned long long>(slot));
}

PyObject* rows_of(const ChunkTable& table, const std::vector<uint32_t>& chosen) {
    PyObject* rows = PyList_New(0);
    for (size_t i = 0; rows && i < chosen.size(); ++i) {
        if (append(rows, row(table, chosen[i]))) continue;
        Py_DecRef(rows);
        rows = nullptr;
    }
    return rows;
}

PyObject* take_used(PyObject* self, PyObject* limit_object) {
    const size_t limit = PyLong_AsSize_t(limit_object);
    if (PyErr_Occurred()) return nullptr;
    return guarded([&] { return rows_of(table_of(self), table_of(self).take_used(limit)); });
}

PyObject* by_offset(PyObject* self, PyObject* args) {
    unsigned long long offset, limit;
    if (!PyArg_ParseTuple(args, "KK", &offset, &limit)) return nullptr;
    return guarded([&] { return rows_of(table_of(self), table_of(self).by_offset(offset, size_t(limit))); });
}

// What is wrong with a row of a catalog, nullptr if nothing is; adds the chunk.
const char* load_row(ChunkTable& table, PyObject* key_object, PyObject* record_object) {
    char *key_data = nullptr, *data = nullptr;
    Py_ssize_t key_size = 0, size = 0;
    if (PyBytes_AsStringAndSize(key_object, &key_data, &key_size) || PyBytes_AsStringAndSize(record_object, &data, &size)) return "";
    if (key_size != Py_ssize_t(sizeof(Key)) || size != Py_ssize_t(kRecordBytes)) return "size";
    uint8_t checked[sizeof(Key) + kRecordBytes - kChecked];
    std::memcpy(checked, key_data, sizeof(Key));
    std::memcpy(checked + sizeof(Key), data + kChecked, kRecordBytes - kChecked);
    Record record;
    std::memcpy(&record, data, kRecordBytes);
    if (record.volume || record.zero || record.check != uint32_t(xxh3(checked, sizeof checked))) return "checksum";
    Key key;
    std::memcpy(key.data(), key_data, sizeof(Key));
    return table.add(key, record.parent, record.offset, record.nbytes, record.access) ? nullptr : "twice";
}

PyObject* load(PyObject* self, PyObject* args) {
    PyObject* rows;
    Py_ssize_t expected;
    if (!PyArg_ParseTuple(args, "On", &rows, &expected)) return nullptr;
    if (expected < 0 || expected >= Py_ssize_t(kNoSlot)) return refuse("the expected number of chunks is out of range");
    PyObject* iterator = PyObject_GetIter(rows);
    PyObject* bad = iterator ? PyList_New(0) : nullptr;
    PyObject* out = !bad ? nullptr : guarded([&]() -> PyObject* {
        ChunkTable& table = table_of(self);
        table.reserve(size_t(expected));
        while (PyObject* item = PyIter_Next(iterator)) {
            const bool pair = PyTuple_Check(item) && PyTuple_Size(item) == 2;
            if (!pair) PyErr_SetString(PyExc_TypeError, "a row of a catalog is a tuple (key, record)");
            PyObject* key = pair ? PyTuple_GetItem(item, 0) : nullptr;
            PyObject* record = pair ? PyTuple_GetItem(item, 1) : nullptr;
            const char* problem = pair ? load_row(table, key, record) : "";
            const bool sound = !problem || (*problem && append(bad, Py_BuildValue("(OOs)", key, record, problem)));
            Py_DecRef(item);
            if (!sound) return nullptr;
        }
        if (PyErr_Occurred()) return nullptr;
        table.sort_by_access();
        Py_IncRef(bad);
        return bad;
    });
    if (iterator) Py_DecRef(iterator);
    if (bad) Py_DecRef(bad);
    return out;
}

PyObject* extents(PyObject* self, PyObject*) {
    const ChunkTable& table = table_of(self);
    const Py_ssize_t nbytes = Py_ssize_t(table.size() * sizeof(uint64_t));
    PyObject* offsets = PyBytes_FromStringAndSize(nullptr, nbytes);
    PyObject* sizes = offsets ? PyBytes_FromStringAndSize(nullptr, nbytes) : nullptr;
    if (!sizes) {
        if (offsets) Py_DecRef(offsets);
        return nullptr;
    }
    char *offset = PyBytes_AsString(offsets), *size = PyBytes_AsString(sizes);
    for (uint32_t slot = table.oldest(); slot != kNoSlot; slot = table[slot].newer) {
        std::memcpy(offset, &table[slot].offset, sizeof(uint64_t));
        std::memcpy(size, &table[slot].nbytes, sizeof(uint64_t));
        offset += sizeof(uint64_t);
        size += sizeof(uint64_t);
    }
    return Py_BuildValue("NN", offsets, sizes);
}

PyMethodDef methods[] = {
    {"nbytes", nbytes, METH_NOARGS, "nbytes()\n--\n\nBytes of memory that the table takes."},
    {"last_access", last_access, METH_NOARGS, "last_access()\n--\n\nAccess number of the most recently used, 0 of nothing."},
    {"get", get, METH_O, "get(key, /)\n--\n\n(key, offset, nbytes, access, parent, children), or None."},
    {"add", add, METH_VARARGS, "add(key, parent, offset, nbytes, access, /)\n--\n\nAdd as the most recently used; False if there."},
    {"remove", remove, METH_O, "remove(key, /)\n--\n\nForget a chunk; False if it is not there."},
    {"sizes", sizes, METH_O, "sizes(keys, /)\n--\n\nBytes of each chunk, None where there is none."},
    {"touch", touch, METH_VARARGS, "touch(keys, access, /)\n--\n\nCount a use of each, numbered from access + 1; the last number."},
    {"walk", walk, METH_VARARGS, "walk(cursor, limit, /)\n--\n\nRows by use, oldest first, and where to go on; START and END are 2**32 - 1."},
    {"take_used", take_used, METH_O, "take_used(limit, /)\n--\n\nRows used since they were last taken."},
    {"by_offset", by_offset, METH_VARARGS, "by_offset(offset, limit, /)\n--\n\nRows of the first chunks at `offset` or behind, by offset."},
    {"load", load, METH_VARARGS, "load(rows, expected, /)\n--\n\nAdd what a catalog holds, by access; (key, record, problem) of what is bad."},
    {"extents", extents, METH_NOARGS, "extents()\n--\n\nOffsets and sizes, u64 each, oldest first."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"kvstore._native.ChunkTable", sizeof(Object), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

int add_to_module(PyObject* module) {
    PyObject* type = PyType_FromSpec(&spec);
    if (!type) return -1;
    const int added = PyModule_AddObjectRef(module, "ChunkTable", type);
    Py_DecRef(type);
    return added;
}

}  // namespace kvstore::chunk_table
