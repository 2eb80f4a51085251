// The small solve of csrc/common/anderson.h by the lanes of an emulated warp, and by one thread.

#include <cuda_runtime.h>

#include <exception>
#include <vector>

#include "common/anderson.h"
#include "cuda/device.cuh"

namespace {

using namespace fastdeq;

// Mirrored by a ctypes structure in the test; the pointers are to float64.
struct Call {
  const double* gram;
  int32_t entries, newest, count;
  double regularization, rank_tolerance, max_weight;
  double* gamma;
  int32_t by_warp, seed;
  int32_t dropped, rejected;  // out
};

void run(Call& c) {
  SolveOptions options;
  options.regularization = c.regularization;
  options.rank_tolerance = c.rank_tolerance;
  options.max_weight = c.max_weight;
  const Gram gram{c.gram, c.entries, 1, c.entries, c.newest, c.count};
  std::vector<double> work(small_solve_doubles(c.entries - 1), double(NAN));
  std::vector<AndersonOutcome> found(c.by_warp ? cuda::kWarpLanes : 1);
  if (c.by_warp) {
    const auto kernel = [&] {
      found[threadIdx.x] = solve_small(cuda::WarpLanes{}, gram, options, work.data(), c.gamma);
    };
    emulate(kernel, 1, cuda::kWarpLanes, 0, uint64_t(c.seed));
  } else {
    found[0] = solve_small(OneLane{}, gram, options, work.data(), c.gamma);
  }
  c.dropped = found[0].dropped;
  c.rejected = found[0].rejected;
  for (const AndersonOutcome& other : found) {
    if (other.dropped != c.dropped || other.rejected != found[0].rejected) {
      throw std::runtime_error("the lanes of the warp have different outcomes");
    }
  }
}

}  // namespace

// The reason why it failed, empty if it did not.
extern "C" const char* small_solve_call(Call* call) {
  static std::string message;
  message.clear();
  try {
    run(*call);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
