// (A + A^T) / 2 in blocks that fit the first-level cache: PyTorch adds a transposed matrix element
// by element, and takes three times as long at 1024 x 1024 and more. And whether a matrix is that
// still, at the cost of reading both.
//
// Specification: fastdeq/ops/symmetric_part.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "cpu/threads.h"

namespace fastdeq {
namespace {

constexpr int64_t kBlock = 32;

template <typename T>
void block(const T* in, T* out, int64_t size, int64_t row, int64_t column) {
  const int64_t rows = std::min(kBlock, size - row), columns = std::min(kBlock, size - column);
  T lower[kBlock][kBlock], upper[kBlock][kBlock];  // of A, the first one transposed
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) lower[i][j] = in[(column + j) * size + row + i];
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T* const from = in + (row + i) * size + column;
    T* const to = out + (row + i) * size + column;
    for (int64_t j = 0; j < columns; ++j) {
      upper[i][j] = T(0.5) * (from[j] + lower[i][j]);
      to[j] = upper[i][j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    T* const to = out + (column + j) * size + row;
    for (int64_t i = 0; i < rows; ++i) to[i] = upper[i][j];
  }
}

// Whether `part` has that block and the one across the diagonal.
template <typename T>
bool has_block(const T* in, const T* part, int64_t size, int64_t row, int64_t column) {
  const int64_t rows = std::min(kBlock, size - row), columns = std::min(kBlock, size - column);
  T lower[kBlock][kBlock], across[kBlock][kBlock];  // of A and of the part, transposed
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t at = (column + j) * size + row;
    for (int64_t i = 0; i < rows; ++i) lower[i][j] = in[at + i], across[i][j] = part[at + i];
  }
  bool same = true;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * size + column;
    for (int64_t j = 0; j < columns; ++j) {
      const T value = T(0.5) * (in[at + j] + lower[i][j]);
      same &= (value == part[at + j]) & (value == across[i][j]);  // false for NaN
    }
  }
  return same;
}

// Calls body(row, column) for the blocks on and above the diagonal, by threads where that pays.
template <typename Body>
void for_each_block(int64_t size, const Body& body) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  // Rows of blocks b and blocks - 1 - b together are as long as any other two.
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 15) / (kBlock * size));
  Sharing& sharing = sharing_of(Shared::kSymmetricPart, double(size) * double(size));
  parallel_for((blocks + 1) / 2, grain, sharing, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t j = b; j < blocks; ++j) body(b * kBlock, j * kBlock);
      const int64_t other = blocks - 1 - b;
      if (other == b) continue;
      for (int64_t j = other; j < blocks; ++j) body(other * kBlock, j * kBlock);
    }
  });
}

at::Tensor symmetric_part(const at::Tensor& a) {
  TORCH_CHECK(a.dim() == 2 && a.size(0) == a.size(1), "a square matrix is needed, got ", a.sizes());
  if (a.scalar_type() != at::kFloat && a.scalar_type() != at::kDouble) {
    return at::add(a, a.t()).div_(2).contiguous();
  }
  const at::Tensor in = a.contiguous();
  if (in.numel() == 0) return at::empty_like(in);
  at::Tensor out = at::empty_like(in);
  const int64_t size = in.size(0);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "symmetric_part", [&] {
    const auto* const from = in.const_data_ptr<scalar_t>();
    auto* const to = out.mutable_data_ptr<scalar_t>();
    for_each_block(size, [&](int64_t row, int64_t column) { block(from, to, size, row, column); });
  });
  return out;
}

at::Tensor is_symmetric_part(const at::Tensor& a, const at::Tensor& part) {
  const auto told = [](bool same) { return at::scalar_tensor(same, at::kBool); };
  if (a.dim() != 2 || a.size(0) != a.size(1) || a.sizes() != part.sizes() ||
      a.scalar_type() != part.scalar_type()) {
    return told(false);
  }
  if (a.numel() == 0) return told(true);
  if (a.scalar_type() != at::kFloat && a.scalar_type() != at::kDouble) {
    return told(at::equal(symmetric_part(a), part));
  }
  const at::Tensor in = a.contiguous(), other = part.contiguous();
  std::atomic<bool> same{true};
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "is_symmetric_part", [&] {
    const auto* const from = in.const_data_ptr<scalar_t>();
    const auto* const to = other.const_data_ptr<scalar_t>();
    for_each_block(in.size(0), [&](int64_t row, int64_t column) {
      if (!same.load(std::memory_order_relaxed)) return;
      if (!has_block(from, to, in.size(0), row, column)) same = false;
    });
  });
  return told(same);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CPU, m) {
  m.impl("symmetric_part", &symmetric_part);
  m.impl("is_symmetric_part", &is_symmetric_part);
}

}  // namespace fastdeq
