// What device code uses of the CUDA language, on the emulated machine of emulator.h. Compile with
// g++ -std=c++20 -U_FORTIFY_SOURCE -I tests/cuda_emulator -I csrc.

#pragma once

#include <cmath>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define __syncthreads() ::cuda_emulator::machine.sync_block(__FILE__, __LINE__, false)
#define __syncthreads_or(any) ::cuda_emulator::machine.sync_block(__FILE__, __LINE__, (any) != 0)
#define __threadfence() ::cuda_emulator::machine.fence(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::machine.exchange(mask, 0, 0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_emulator::machine.exchange(mask, value, cuda_emulator::machine.lane() ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = predicate != 0 ? 1u << cuda_emulator::machine.lane() : 0;
  for (int bits = 1; bits < 32; bits *= 2) votes |= __shfl_xor_sync(mask, votes, bits);
  return votes;
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  cuda_emulator::machine.happened();
  return before;
}

template <typename T>
void __stcg(T* at, T value) {
  cuda_emulator::machine.store(at, &value, sizeof(T));
}

template <typename T>
T __ldcg(const T* at) {
  T value;
  cuda_emulator::machine.load(&value, at, sizeof(T));
  return value;
}

// Runs `kernel(arguments...)` as a grid of one dimension; throws std::runtime_error on a deadlock,
// a write outside of shared memory and the like.
template <typename Kernel, typename... Arguments>
void emulate(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, uint64_t seed,
             const Arguments&... arguments) {
  cuda_emulator::machine.launch(blocks, threads, shared, seed, [&] { kernel(arguments...); });
}
