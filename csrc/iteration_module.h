// The iterations of a general map for Python; see iteration_module.cpp.

#pragma once

#include <pybind11/pybind11.h>

namespace fastdeq {

// Adds Iteration to the module.
void bind_iteration(pybind11::module_& m);

}  // namespace fastdeq
