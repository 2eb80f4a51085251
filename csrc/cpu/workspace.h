// Memory of a calling thread that outlives the call: fresh pages cost more than a small solve.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <utility>

namespace fastdeq {

// A large one is not kept.
constexpr int64_t kKeptBytes = int64_t(1) << 25;

// At least `bytes` bytes, of unknown content, lent for the life of this object: a solve within the
// solve, in a signal handler of Python, gets others. There is one such memory for each kUse.
template <int kUse>
class Workspace {
 public:
  Workspace(int64_t bytes, const at::TensorOptions& options) : is_kept_(bytes <= kKeptBytes) {
    if (is_kept_) memory_ = std::move(kept());
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, options);
  }
  ~Workspace() {
    if (is_kept_) kept() = std::move(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  const at::Tensor& memory() const { return memory_; }

 private:
  static at::Tensor& kept() {
    thread_local at::Tensor tensor;
    return tensor;
  }

  bool is_kept_;
  at::Tensor memory_;
};

}  // namespace fastdeq
