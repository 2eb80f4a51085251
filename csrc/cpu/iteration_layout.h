// Where the entries of states lie that an iteration of a general map owns or is given.
//
// A sample's row has parts, of so many entries. The parts of a row lie one after the other, as
// (B, n); or `apart`, the part of all samples as (B, n_p), one after the other, so that a map of
// several tensors sees each in memory of its own.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

namespace fastdeq {

// Rows that are divided among threads are so in parts of this length.
constexpr int64_t kRangeLength = 32768;

// Whether all entries are finite: x - x is NaN, and not 0, for infinite x too.
template <typename T>
bool is_finite(const T* x, int64_t count) {
  int bad = 0;
  for (int64_t j = 0; j < count; ++j) bad |= x[j] - x[j] != 0;
  return bad == 0;
}

// Entries [begin, end) of a part of a row.
struct Range {
  int64_t part, begin, end;
};

class Layout {
 public:
  Layout(const std::vector<int64_t>& sizes, int64_t batch, int64_t size, bool apart)
      : batch(batch), size(size), apart(apart), sizes(sizes) {
    int64_t begin = 0;
    for (size_t p = 0; p < sizes.size(); begin += sizes[p++]) {
      begins_.push_back(begin);
      whole.push_back({int64_t(p), 0, sizes[p]});
      for (int64_t at = 0; at < sizes[p]; at += kRangeLength) {
        ranges.push_back({int64_t(p), at, std::min(sizes[p], at + kRangeLength)});
      }
    }
    TORCH_CHECK(begin == size, "parts of ", begin, " entries for rows of ", size);
  }

  // Of part p in a row.
  int64_t begin(size_t part) const { return begins_[part]; }
  // Of the first entry of part p of sample b.
  int64_t at(int64_t part, int64_t b) const {
    const int64_t begin = begins_[size_t(part)];
    return apart ? batch * begin + b * sizes[size_t(part)] : b * size + begin;
  }

  // A state (B, n), in this layout, as its parts (B, n_p); views.
  std::vector<at::Tensor> parts_of(const at::Tensor& state) const {
    std::vector<at::Tensor> parts;
    for (size_t p = 0; p < sizes.size(); ++p) {
      parts.push_back(apart ? state.view(-1)
                                  .narrow(0, batch * begins_[p], batch * sizes[p])
                                  .view({batch, sizes[p]})
                            : state.narrow(1, begins_[p], sizes[p]));
    }
    return parts;
  }

  // The same as rows (B, n); a copy where parts lie apart.
  at::Tensor rows_of(const at::Tensor& state) const {
    return apart ? at::cat(parts_of(state), 1) : state;
  }

  // Zeros for sample b of a state where its row is not finite.
  template <typename T>
  void make_finite(T* state, int64_t b) const {
    const auto part_finite = [&](const Range& r) {
      return is_finite(state + at(r.part, b), r.end);
    };
    if (std::all_of(whole.begin(), whole.end(), part_finite)) return;
    for (const Range& r : whole) std::fill_n(state + at(r.part, b), r.end, T(0));
  }

  const int64_t batch, size;
  const bool apart;
  const std::vector<int64_t> sizes;
  std::vector<Range> whole, ranges;  // each part; parts of bounded length

 private:
  std::vector<int64_t> begins_;
};

// A value of the map as it is given: rows (B, n), or a tensor (B, n_p) for each part, read where
// they lie if their entries are T and adjacent, and else copied. Nothing given: zeros.
template <typename T>
class GivenValue {
 public:
  GivenValue() = default;
  GivenValue(const std::vector<at::Tensor>& given, const Layout& layout, at::ScalarType dtype) {
    if (given.empty()) return;
    const bool whole = given.size() == 1 && layout.sizes.size() > 1;
    TORCH_CHECK(whole || given.size() == layout.sizes.size(), "the value must have ",
                layout.sizes.size(), " parts, got ", given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      const at::IntArrayRef shape = given[i].sizes();
      const int64_t width = whole ? layout.size : layout.sizes[i];
      TORCH_CHECK(shape.equals({layout.batch, width}) && given[i].is_cpu(), "the value must be [",
                  layout.batch, ", ", width, "] on the CPU, got ", shape);
      at::Tensor readable = given[i].to(dtype);
      if (width > 1 && readable.stride(1) != 1) readable = readable.contiguous();
      rows_.push_back({readable.template const_data_ptr<T>(), readable.stride(0)});
      memory_.push_back(std::move(readable));
    }
    if (!whole) return;
    const Row all = rows_[0];
    rows_.clear();
    int64_t begin = 0;
    for (const int64_t width : layout.sizes) {
      rows_.push_back({all.data + begin, all.stride});
      begin += width;
    }
  }

  // Part p of sample b; null for zeros.
  const T* at(int64_t part, int64_t b) const {
    if (rows_.empty()) return nullptr;
    const Row& row = rows_[size_t(part)];
    return row.data + b * row.stride;
  }

 private:
  struct Row {
    const T* data;
    int64_t stride;
  };
  std::vector<Row> rows_;
  std::vector<at::Tensor> memory_;
};

}  // namespace fastdeq
