// Counts the memory requests of a process, by LD_PRELOAD; glibc only.
//
// Preloaded, these take the place of the C library's functions. operator new, PyTorch's allocator
// and OpenMP call them. The memory stays glibc's, so free needs no counterpart.

#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {

void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* old, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

static std::atomic<long> requests{0};

long allocation_count() { return requests.load(); }

void* malloc(size_t bytes) {
  ++requests;
  return __libc_malloc(bytes);
}

void* calloc(size_t count, size_t bytes) {
  ++requests;
  return __libc_calloc(count, bytes);
}

void* realloc(void* old, size_t bytes) {
  ++requests;
  return __libc_realloc(old, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
  ++requests;
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  ++requests;
  return __libc_memalign(alignment, bytes);
}

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  ++requests;
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

}  // extern "C"
