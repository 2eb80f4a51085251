// How a persistent solve is laid out on a device: pure arithmetic, for the host.
//
//   d            size of the state           B        samples
//   group        `members` blocks that solve a tile of `tile_rows` samples together
//   member       keeps `tile_columns` rows of W in shared memory, for so many outputs
//   register tile  rows x columns of outputs in the registers of a thread; a warp has 4 x 8 of them
//   warps        of a block: warps_m x warps_n warp tiles, each shared by `splits` warps, which
//                take turns along k
//   chunk        16-byte units of a point row that are in shared memory at a time, twice
//
// The plan is the fastest by a simple count of clock cycles among all that fit; the figures in it
// are from the data sheets of sm_80 and sm_90 or guesses, not measurements.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "common/anderson.h"

namespace fastdeq {
namespace cuda {

struct RegisterTile {
  int rows, columns;
};

// What persistent.cu instantiates.
constexpr RegisterTile kRegisterTiles[] = {{8, 4}, {4, 4}, {4, 2}, {1, 4}};
constexpr int kRegisterTileCount = 4;
constexpr int kWarpRows = 4, kWarpColumns = 8;  // threads of a warp
constexpr int kPersistentWarps = 8;
constexpr int kMostTileRows = 128;
constexpr int kStagePad = 8;  // entries between the rows of staged sums, against bank conflicts
constexpr int kUnitBytes = 16;

struct PersistentProblem {
  int64_t size = 0, batch = 0;
  int element_bytes = 4;
  int window = 0;  // Anderson
  bool momentum = false;
  int sample_bytes = 0;  // shared memory of a sample's scalars
};

struct PersistentDevice {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // most of a block
};

struct PersistentPlan {
  std::string reason;  // why nothing fits; empty otherwise
  int tile = 0;        // index into kRegisterTiles
  int warps_m = 1, warps_n = 1, splits = 1;
  int chunk = 1;  // units, a power of two
  int tile_rows = 0, tile_columns = 0;
  int members = 0, groups = 0;
  int tiles = 0;
  int row_units = 0, weight_units = 0;  // of a point row, of a row of W in shared memory
  int sums = 0;                         // that a member makes for each sample
  int64_t weight_bytes = 0, area_bytes = 0, shared_bytes = 0;
  // Scratch: byte offsets of its parts. Counters come first; they must be zero.
  int64_t counter_bytes = 0, points = 0, partial_sums = 0, last = 0, history = 0, gram = 0;
  int64_t scratch_bytes = 0;
  double cycles = 0;  // of an iteration of the whole batch, by count
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_to(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t kCounterStride = 128;  // bytes: a line of the second-level cache each

// Of the small solve of one sample and its weights.
constexpr int64_t small_bytes(int64_t window) { return 8 * (small_solve_doubles(window) + window); }

inline int64_t planned_area(const PersistentPlan& p, const PersistentProblem& q) {
  const int64_t chunks = int64_t(2) * p.tile_rows * (p.chunk + 1) * kUnitBytes;
  const int64_t staged =
      int64_t(p.splits) * p.tile_rows * (p.tile_columns + kStagePad) * q.element_bytes;
  const int64_t totals = int64_t(p.sums) * p.tile_rows * 8;
  const int64_t small = q.window > 0 ? small_bytes(q.window) : 0;
  return round_to(std::max({chunks, staged, totals, small}), 16);
}

inline int64_t planned_shared(const PersistentPlan& p, const PersistentProblem& q) {
  return p.weight_bytes + p.area_bytes + round_to(int64_t(p.tile_rows) * q.sample_bytes, 16);
}

inline void plan_scratch(PersistentPlan& p, const PersistentProblem& q) {
  int64_t at = p.counter_bytes = p.groups * kCounterStride;
  const auto part = [&](int64_t bytes) {
    const int64_t begin = at;
    at += round_to(bytes, 128);
    return begin;
  };
  const int64_t blocks = int64_t(p.groups) * p.members;
  const int64_t own = blocks * p.tile_rows * p.tile_columns * q.element_bytes;
  const int64_t entries = q.window > 0 ? q.window + 1 : 0;
  p.points = part(int64_t(p.groups) * 2 * p.tile_rows * p.row_units * kUnitBytes);
  p.partial_sums = part(blocks * 2 * p.sums * p.tile_rows * 8);
  p.last = part(q.momentum ? own : 0);
  p.history = part(2 * entries * own);
  p.gram = part(blocks * p.tile_rows * entries * entries * 8);
  p.scratch_bytes = at;
}

// Cycles of an iteration: products, reads of shared memory at 128 bytes each cycle (half of a
// warp's reads of 512 bytes are shared by lanes), the points from the second-level cache at 40
// bytes each cycle, whichever takes longest, and waits.
inline double planned_cycles(const PersistentPlan& p, const PersistentProblem& q) {
  const RegisterTile r = kRegisterTiles[p.tile];
  const double terms = double(p.tile_rows) * p.tile_columns * double(q.size);
  const double products = terms / (q.element_bytes == 4 ? 128 : 64);
  const double entries = double(kUnitBytes) / q.element_bytes;
  const double reads = terms / (32.0 * r.rows * r.columns * entries) * (r.rows + r.columns) * 2;
  const double rows = double(std::min<int64_t>(p.tile_rows, q.batch));
  const double points = rows * double(q.size) * q.element_bytes / 40;
  const double epilogue = 20.0 * p.tile_rows * p.tile_columns / 32;
  const double waits = (p.members > 1 ? 3000 : 500) +
                       double(divide_up(p.row_units, p.chunk)) * 100 + 4.0 * p.members;
  const double rounds = double(divide_up(p.tiles, p.groups));
  return rounds * (std::max({products, reads, points}) + epilogue + waits);
}

// Fills in what follows from the tile and the arrangement of warps; false where it does not fit.
inline bool complete_plan(PersistentPlan& p, const PersistentProblem& q,
                          const PersistentDevice& device) {
  const RegisterTile r = kRegisterTiles[p.tile];
  const int entries = kUnitBytes / q.element_bytes;
  p.tile_rows = p.warps_m * kWarpRows * r.rows;
  p.tile_columns = p.warps_n * kWarpColumns * r.columns;
  p.row_units = int(divide_up(q.size, entries));
  p.weight_units = p.row_units | 1;  // odd: rows begin in different banks
  p.sums = 2 + (q.window > 0 ? q.window + 1 : 0);
  p.weight_bytes = int64_t(p.tile_columns) * p.weight_units * kUnitBytes;
  const int64_t members = divide_up(q.size, p.tile_columns);
  if (members > device.multiprocessors || p.weight_bytes > device.shared_bytes) return false;
  p.members = int(members);
  const int64_t tiles = divide_up(q.batch, p.tile_rows);
  if (tiles > INT32_MAX) return false;
  p.tiles = int(tiles);
  p.groups = int(std::min<int64_t>(device.multiprocessors / p.members, tiles));
  const int64_t units = std::max<int64_t>(p.row_units, 2 * p.splits);
  for (p.chunk = 128; p.chunk >= 2 * p.splits; p.chunk /= 2) {
    if (p.chunk >= 2 * units) continue;
    if (int64_t(2) * p.tile_rows * (p.chunk + 1) * kUnitBytes > 40 * 1024) continue;
    p.area_bytes = planned_area(p, q);
    p.shared_bytes = planned_shared(p, q);
    if (p.shared_bytes <= device.shared_bytes) return true;
  }
  return false;
}

// The fastest of the plans that fit, if any; with `only`, of those with that register tile.
inline PersistentPlan fastest_plan(const PersistentProblem& q, const PersistentDevice& device,
                                   int warps, int only) {
  PersistentPlan best;
  for (int tile = 0; tile < kRegisterTileCount; ++tile) {
    if (only >= 0 && tile != only) continue;
    for (int warps_m = 1; warps_m <= warps; warps_m *= 2) {
      if (warps_m * kWarpRows * kRegisterTiles[tile].rows > kMostTileRows) break;
      for (int warps_n = 1; warps_m * warps_n <= warps; warps_n *= 2) {
        PersistentPlan p;
        p.tile = tile;
        p.warps_m = warps_m;
        p.warps_n = warps_n;
        p.splits = warps / (warps_m * warps_n);
        if (!complete_plan(p, q, device)) continue;
        p.cycles = planned_cycles(p, q);
        if (best.members == 0 || p.cycles < best.cycles) best = p;
      }
    }
  }
  return best;
}

inline PersistentPlan plan_persistent(const PersistentProblem& q, const PersistentDevice& device,
                                      int warps = kPersistentWarps, int only = -1) {
  PersistentPlan best = fastest_plan(q, device, warps, only);
  if (best.members > 0) {
    plan_scratch(best, q);
    return best;
  }
  const std::string size = std::to_string(q.size);
  PersistentProblem without = q;
  without.window = 0;
  best.reason =
      "W (" + size + " x " + size + ", " + std::to_string(q.element_bytes) + " bytes an entry)";
  if (q.window > 0 && fastest_plan(without, device, warps, only).members > 0) {
    best.reason += " with an Anderson window of " + std::to_string(q.window);
  }
  best.reason += " does not fit into the shared memory of " +
                 std::to_string(device.multiprocessors) + " multiprocessors, " +
                 std::to_string(device.shared_bytes) + " bytes for a block of each";
  return best;
}

}  // namespace cuda
}  // namespace fastdeq
