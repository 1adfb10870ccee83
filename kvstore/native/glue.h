// What every Python face of the kernels needs. Included after Python.h.
#pragma once

namespace kvstore {

template <typename Function>
PyCFunction as_method(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// Choose an instruction set by its Python name: None, or ValueError if `use` refuses it.
template <typename Use>
PyObject* choose_isa(Use use, PyObject* name) {
    PyObject* bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return nullptr;
    const bool used = use(PyBytes_AsString(bytes));
    Py_DecRef(bytes);
    if (used) Py_RETURN_NONE;
    return PyErr_Format(PyExc_ValueError, "instruction set %R is unknown or not supported by this processor", name);
}

}  // namespace kvstore
