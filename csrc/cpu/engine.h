// Which engine this machine runs.

#pragma once

#include "cpu/solve_task.h"

namespace fastdeq {

// The best one that was compiled, that the processor has, and that PyTorch's own choice allows
// (ATEN_CPU_CAPABILITY=avx2 or default lowers both).
const Engine& engine();

// Whether that engine has products in bytes and in bfloat16.
bool has_low_precision();

}  // namespace fastdeq
