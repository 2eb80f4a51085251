// The solve of a plain affine cell as one node of the autograd graph; see affine_node.cpp.

#pragma once

#include <pybind11/pybind11.h>

namespace fastdeq {

// Adds AffinePlan and SolveOutputs to the module.
void bind_affine_node(pybind11::module_& m);

}  // namespace fastdeq
