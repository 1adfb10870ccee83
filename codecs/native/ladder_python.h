// The Python face of the ladder's kernels, added to kvstore._native.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

namespace kvstore::ladder {

// Adds the functions to the module; -1 with an exception set if that fails.
int add_to_module(PyObject* module);

}  // namespace kvstore::ladder
