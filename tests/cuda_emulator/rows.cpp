// The kernels of csrc/cuda/rows.cuh on the emulated machine, for tests/cuda/test_cuda_rows.py.

#include "cuda/rows.cuh"

#include <exception>

namespace {

using namespace fastdeq::cuda;

// Mirrored by a ctypes structure in the test; pointers are to numbers of the dtype asked for.
struct Call {
  int64_t batch, size;
  const void *slope, *grad, *value;  // value: what is to be restored; null: rows are to be scaled
  void *rows, *norms, *largests;
  uint64_t seed;
  const char* skip;  // "file:line" of a synchronisation to leave out
  int32_t skipped;   // out
};

template <typename T>
void run(Call& c) {
  T *const rows = static_cast<T*>(c.rows), *const norms = static_cast<T*>(c.norms),
           *const largests = static_cast<T*>(c.largests);
  const unsigned threads = threads_per_row(c.size);
  cuda_emulator::machine.skip = c.skip;
  if (c.value != nullptr) {
    emulate(restore_rows_kernel<T>, unsigned(c.batch), threads, 0, c.seed,
            static_cast<const T*>(c.value), norms, largests, c.size, rows);
  } else {
    emulate(scale_rows_kernel<T>, unsigned(c.batch), threads, kRowSharedBytes, c.seed,
            static_cast<const T*>(c.slope), static_cast<const T*>(c.grad), c.size, rows, norms,
            largests);
  }
  c.skipped = cuda_emulator::machine.skipped;
}

}  // namespace

// The reason why it failed, empty if it did not.
extern "C" const char* rows_call(Call* call, int is_double) {
  static std::string message;
  message.clear();
  try {
    is_double ? run<double>(*call) : run<float>(*call);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
