// The places of threads on the emulated machine: fibers, warps, blocks with their shared memory,
// and stores that others do not see yet.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Each library that is loaded has a machine of its own.
#define CUDA_EMULATOR_OWN __attribute__((visibility("hidden")))
inline CUDA_EMULATOR_OWN dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = size_t(1) << 16, kGuard = 4096;
constexpr unsigned char kGuardByte = 0xa5;

// Stores by address, 4 bytes each.
class Stores {
 public:
  void add(const void* to, const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4) {
      std::memcpy(&words_[uintptr_t(to) + i], static_cast<const char*>(from) + i, 4);
    }
  }

  void move_to(Stores& other) {
    for (const auto& [address, word] : words_) other.words_[address] = word;
    words_.clear();
  }

  void move_to_memory() {
    for (const auto& [address, word] : words_) {
      std::memcpy(reinterpret_cast<void*>(address), &word, 4);
    }
    words_.clear();
  }

  // Null where nothing has been stored.
  const uint32_t* find(uintptr_t address) const {
    if (words_.empty()) return nullptr;
    const auto found = words_.find(address);
    return found == words_.end() ? nullptr : &found->second;
  }

 private:
  std::unordered_map<uintptr_t, uint32_t> words_;
};

struct Barrier {
  unsigned arrived = 0;
  std::vector<struct Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t exchanged[2][kLanes];
  unsigned turn = 0;
};

struct alignas(128) Line {
  unsigned char bytes[128];
};

struct Block {
  std::vector<Line> lines;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<struct Fiber*> fibers;
  Stores stores;
  bool any_next = false, any = false;

  // Shared memory of so many bytes, as after a launch.
  void make_shared(size_t bytes) {
    lines.resize((bytes + 2 * kGuard + sizeof(Line) - 1) / sizeof(Line));
    std::memset(lines.data(), kGuardByte, bytes + 2 * kGuard);
    std::memset(shared(), 0xff, bytes);  // NaN in either dtype
  }

  unsigned char* shared() { return lines.data()->bytes + kGuard; }

  bool guards_are_whole(size_t bytes) {
    for (size_t i = 0; i < kGuard; ++i) {
      if (lines.data()->bytes[i] != kGuardByte || shared()[bytes + i] != kGuardByte) return false;
    }
    return true;
  }
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  jmp_buf place;
  ucontext_t start;
  bool started = false, done = false;
  dim3 thread, block_index;
  Block* block = nullptr;
  unsigned lane = 0;
  uint64_t haste = 0, own_haste = 0;  // now, and while it does not spin
  Warp* warp = nullptr;
  Stores stores;
  std::vector<Copy> copies;
};

}  // namespace cuda_emulator
