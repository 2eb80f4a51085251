// Products with the weight by the library, into memory that is there: nothing is allocated, so that
// they can be captured.
//
//   exact    float32 (never TF32) or float64     narrow   bfloat16 factors, float32 sums and result

#pragma once

#include <ATen/BlasBackend.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <mutex>

namespace fastdeq {

// While it lives, products of float32 tensors by this thread are made in float32.
//
// NoTF32Guard is what ATen has for that: it is local to the thread, and cuBLAS obeys it whatever
// torch.backends.cuda.matmul.allow_tf32 says. cublasLt, which makes plain products only where
// torch.backends.cuda.preferred_blas_library says so, looks at the global flag alone; there cuBLAS
// is preferred meanwhile. That is a global setting: another thread's products may go to cuBLAS as
// well for that long, and a change that another thread makes to it meanwhile is lost.
class FloatProducts {
 public:
  FloatProducts() {
    const std::lock_guard<std::mutex> lock(mutex());
    at::Context& context = at::globalContext();
    if (users()++ == 0) preferred() = context.blasPreferredBackend();
    if (preferred() == at::BlasBackend::Cublaslt) {
      context.setBlasPreferredBackend(at::BlasBackend::Cublas);
    }
  }
  FloatProducts(const FloatProducts&) = delete;
  FloatProducts& operator=(const FloatProducts&) = delete;
  ~FloatProducts() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (--users() == 0 && preferred() == at::BlasBackend::Cublaslt) {
      at::globalContext().setBlasPreferredBackend(preferred());
    }
  }

 private:
  static std::mutex& mutex() {
    static std::mutex made;
    return made;
  }
  static int& users() {
    static int count = 0;
    return count;
  }
  static at::BlasBackend& preferred() {
    static at::BlasBackend before = at::BlasBackend::Default;
    return before;
  }

  const at::NoTF32Guard no_tf32_;
};

class LibraryProducts {
 public:
  // product, point (B, d); factor (d, d), one stride 1, the other at least d.
  LibraryProducts(at::Tensor product, at::Tensor point, at::Tensor factor)
      : product_(std::move(product)), point_(std::move(point)), factor_(std::move(factor)) {}

  // change (B, d) bfloat16.
  void allow_narrow(at::Tensor change) {
    change_ = std::move(change);
    narrow_factor_ = factor_.to(at::kBFloat16);
  }

  // product = rows @ factor.
  void exact(const at::Tensor& rows) { at::mm_out(product_, rows, factor_); }
  void exact() { exact(point_); }
  // product = change @ factor.
  void narrow() { at::mm_out(product_, change_, narrow_factor_, at::kFloat); }

  const at::Tensor& product() const { return product_; }
  const at::Tensor& factor() const { return factor_; }

 private:
  at::Tensor product_, point_, factor_, change_, narrow_factor_;
};

}  // namespace fastdeq
