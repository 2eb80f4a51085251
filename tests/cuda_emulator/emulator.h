// A small emulation of the CUDA execution model on one CPU thread, for tests of device code.
//
// Every thread of a launch is a fiber, and all blocks are resident at once, as in a cooperative
// launch. A fiber runs until it waits or yields; which one goes on is drawn from a seed, evenly or,
// for two seeds of three, with warps or blocks that are ahead of others, so that a missing barrier
// gives wrong results for some seeds. Also seen:
//   - __stcg is visible to the own thread at once, to the block after __syncthreads, to other
//     blocks only after a __threadfence that follows: a missing fence leaves them stale data.
//   - An asynchronous copy happens no sooner than the wait for it.
//   - Shared memory starts as NaN and has guard zones, checked at the end.
//   - All threads wait, or spin without anything happening: the launch ends with an error.
// Not seen: a read of exchanged data through a cache that is not coherent (a plain load), races
// between instructions of the threads that no wait separates, misaligned vectors.
//
// `skip` leaves out the synchronisation in one line of a source file: a planted error.

#pragma once

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>

#include "fibers.h"

namespace cuda_emulator {

class Machine {
 public:
  std::string skip;  // "file.cuh:line"
  bool skipped = false;

  void launch(unsigned blocks, unsigned threads, size_t shared, uint64_t seed,
              std::function<void()> kernel) {
    if (threads % kLanes != 0) throw std::runtime_error("a block of whole warps is needed");
    random_.seed(seed);
    kernel_ = std::move(kernel);
    error_.clear();
    skipped = false;
    naps_ = 0;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    shared_ = shared;
    place(blocks, threads);
    haste_ = int(seed % 3);
    for (Fiber& fiber : fibers_) {  // the same for a warp, or for a block
      const uint64_t warp = haste_ == 1 ? fiber.thread.x / kLanes : 0;
      fiber.haste = fiber.own_haste = std::mt19937_64(seed + 64 * fiber.block_index.x + warp)();
    }
    while (!runnable_.empty() && error_.empty()) {
      std::swap(runnable_[draw()], runnable_.back());
      current_ = runnable_.back();
      runnable_.pop_back();
      resume();
      if (naps_ > 100 * uint64_t(blocks) * threads) fail("threads spin and nothing happens");
    }
    for (const Fiber& fiber : fibers_) {
      if (!fiber.done && error_.empty()) error_ = "deadlock: all threads wait";
    }
    for (Block& block : blocks_) {
      if (error_.empty() && !block.guards_are_whole(shared_)) {
        error_ = "a write outside of shared memory";
      }
      block.stores.move_to_memory();
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  unsigned char* shared() { return current_->block->shared(); }

  // The wait of `count` fibers for each other.
  void wait(Barrier& barrier, unsigned count) {
    current_->haste = current_->own_haste;
    ++barrier.arrived;
    if (barrier.arrived < count) {
      barrier.waiting.push_back(current_);
      leave();
      return;
    }
    naps_ = 0;
    barrier.arrived = 0;
    runnable_.insert(runnable_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }

  bool sync_block(const char* file, int line, bool any) {
    if (skips(file, line)) return any;
    Block& block = *current_->block;
    block.any_next |= any;
    if (block.barrier.arrived + 1 == blockDim.x) {
      for (Fiber* fiber : block.fibers) fiber->stores.move_to(block.stores);
      block.any = block.any_next;
      block.any_next = false;
    }
    wait(block.barrier, blockDim.x);
    return block.any;
  }

  // Every lane's value, once all lanes have given theirs.
  template <typename T>
  T exchange(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) fail("only whole warps can exchange values here");
    Warp& warp = *current_->warp;
    const unsigned turn = warp.turn;
    std::memcpy(&warp.exchanged[turn][current_->lane], &value, sizeof(T));
    if (warp.barrier.arrived + 1 == kLanes) warp.turn ^= 1;
    wait(warp.barrier, kLanes);
    if (from < kLanes) std::memcpy(&value, &warp.exchanged[turn][from], sizeof(T));
    return value;
  }

  unsigned lane() const { return current_->lane; }

  void fence(const char* file, int line) {
    if (skips(file, line)) return;
    current_->block->stores.move_to_memory();
    current_->stores.move_to_memory();
  }

  void store(void* to, const void* from, size_t bytes) {
    current_->stores.add(to, from, bytes);
    preempt();
  }

  void load(void* to, const void* from, size_t bytes) {
    preempt();
    for (size_t i = 0; i < bytes; i += 4) {
      const void* const stored = find(uintptr_t(from) + i);
      const void* const in_memory = static_cast<const char*>(from) + i;
      std::memcpy(static_cast<char*>(to) + i, stored != nullptr ? stored : in_memory, 4);
    }
  }

  void copy_async(void* to, const void* from) {
    if (uintptr_t(to) % 16 != 0 || uintptr_t(from) % 16 != 0) fail("misaligned asynchronous copy");
    current_->copies.push_back({to, from});
  }

  void wait_copies() {
    for (const Copy& copy : current_->copies) load(copy.to, copy.from, 16);
    current_->copies.clear();
  }

  // Of a counter that others raise. Skipped, it is as high as anybody may wait for.
  unsigned acquire(const unsigned* at, const char* file, int line) {
    if (skips(file, line)) return *at + (1u << 30);
    nap();
    return *at;
  }

  // An atomic operation has happened: what others wait for may be there.
  void happened() { naps_ = 0; }

  void nap() {
    ++naps_;
    current_->haste = 0;
    yield();
  }

  bool skips(const char* file, int line) {
    if (skip.empty()) return false;
    const char* name = std::strrchr(file, '/');
    const bool same = skip == std::string(name ? name + 1 : file) + ":" + std::to_string(line);
    skipped |= same;
    return same;
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message;
    if (current_ == nullptr) throw std::runtime_error(message);
    _longjmp(scheduler_, 1);
  }

 private:
  void place(unsigned blocks, unsigned threads) {
    blocks_ = std::vector<Block>(blocks);
    fibers_ = std::vector<Fiber>(size_t(blocks) * threads);
    while (stacks_.size() < fibers_.size()) {
      stacks_.push_back(std::unique_ptr<char[]>(new char[kStack]));
    }
    runnable_.clear();
    for (unsigned b = 0; b < blocks; ++b) {
      Block& block = blocks_[b];
      block.make_shared(shared_);
      block.warps.resize(threads / kLanes);
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers_[size_t(b) * threads + t];
        fiber.thread = {t, 0, 0};
        fiber.block_index = {b, 0, 0};
        fiber.block = &block;
        fiber.lane = t % kLanes;
        fiber.warp = &block.warps[t / kLanes];
        block.fibers.push_back(&fiber);
        runnable_.push_back(&fiber);
      }
    }
  }

  // The place of a runnable fiber; the hastiest of a few where some are hastier than others.
  size_t draw() {
    std::uniform_int_distribution<size_t> any(0, runnable_.size() - 1);
    size_t best = any(random_);
    for (int i = 0; haste_ != 0 && i < 10; ++i) {
      const size_t other = any(random_);
      if (runnable_[other]->haste > runnable_[best]->haste) best = other;
    }
    return best;
  }

  __attribute__((noinline)) void resume() {
    threadIdx = current_->thread;
    blockIdx = current_->block_index;
    if (_setjmp(scheduler_) != 0) {
      current_ = nullptr;
      return;
    }
    if (current_->started) _longjmp(current_->place, 1);
    current_->started = true;
    getcontext(&current_->start);
    current_->start.uc_stack.ss_sp = stacks_[size_t(current_ - fibers_.data())].get();
    current_->start.uc_stack.ss_size = kStack;
    current_->start.uc_link = nullptr;
    makecontext(&current_->start, &enter, 0);
    setcontext(&current_->start);
  }

  static void enter();

  void finish() {
    naps_ = 0;
    current_->done = true;
    current_->stores.move_to(current_->block->stores);
    _longjmp(scheduler_, 1);
  }

  __attribute__((noinline)) void leave() {
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  void yield() {
    runnable_.push_back(current_);
    leave();
  }

  void preempt() {
    if (random_() % 16 == 0) yield();
  }

  const uint32_t* find(uintptr_t address) const {
    const uint32_t* own = current_->stores.find(address);
    return own != nullptr ? own : current_->block->stores.find(address);
  }

  std::function<void()> kernel_;
  std::mt19937_64 random_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber*> runnable_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
  size_t shared_ = 0;
  int haste_ = 0;
  uint64_t naps_ = 0;
};

inline CUDA_EMULATOR_OWN Machine machine;

inline void Machine::enter() {
  machine.kernel_();
  machine.finish();
}

}  // namespace cuda_emulator
