// The Python face of the chunk table, added to kvstore._native as the type ChunkTable.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

namespace kvstore::chunk_table {

// Adds the type to the module; -1 with an exception set if that fails.
int add_to_module(PyObject* module);

}  // namespace kvstore::chunk_table
