// Which leaves an evaluation uses; see outer_leaves.cpp.

#pragma once

#include <pybind11/pybind11.h>

namespace fastdeq {

// Adds outer_leaves to the module.
void bind_outer_leaves(pybind11::module_& m);

}  // namespace fastdeq
