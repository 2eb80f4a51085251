// One worker: takes samples from the common queue into its slots and iterates them until all are
// done. What an evaluation means for its sample is decided in common/sample.h. Slots that end make
// room for samples that wait, so every product runs on as many slots as there are.

#pragma once

#include "cpu/anderson_slot.h"
#include "cpu/begin_end.h"
#include "cpu/evaluate.h"
#include "cpu/iteration_rows.h"
#include "cpu/pack.h"
#include "cpu/plain_steps.h"
#include "cpu/rounding.h"
#include "cpu/symmetric_solvers.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

// Multiply-adds between two looks for an interrupt, about a tenth of a millisecond; and what a
// sample's iteration costs beside its product.
constexpr int64_t kWorkPerLook = int64_t(1) << 22;
constexpr int64_t kWorkBeside = 1024;

template <typename T>
class Worker {
 public:
  Worker(const SolveTask<T>& task, std::byte* scratch, bool looks)
      : task_(task),
        options_(task.options),
        looks_(looks),
        full_epilogue_(epilogue_for<T, false>(task)),
        low_epilogue_(task.low_precision ? epilogue_for<T, true>(task) : nullptr),
        symmetric_solver_(task) {
    slots_ = reinterpret_cast<Slot<T>*>(scratch);
    scratch += align(task.slots * int64_t(sizeof(Slot<T>)));
    order_ = reinterpret_cast<int32_t*>(scratch);
    scratch += align(task.slots * int64_t(sizeof(int32_t)));
    rows_ = reinterpret_cast<const void**>(scratch);
    scratch += align(task.slots * int64_t(sizeof(void*)));
    chosen_ = reinterpret_cast<Slot<T>**>(scratch);
    scratch += align(task.slots * int64_t(sizeof(void*)));
    small_ = reinterpret_cast<double*>(scratch);
    scratch += small_bytes(task);
    triangle_ = reinterpret_cast<T*>(scratch);
    scratch += triangle_bytes(task);
    for (int64_t i = 0; i < task.slots; ++i) {
      place_buffers(task, slots_[i], scratch + i * slot_bytes(task));
      order_[i] = int32_t(i);
    }
  }

  void run() {
    for (;;) {
      while (active_ < task_.slots && load_next()) {
      }
      if (active_ == 0 || is_interrupted()) return;
      const Products products = most_requested();
      const int64_t count = partition(products);
      evaluate(count, products);
      for (int64_t i = count - 1; i >= 0; --i) {
        if (advance(slot(i), products)) remove(i);
      }
    }
  }

 private:
  Slot<T>& slot(int64_t i) { return slots_[order_[i]]; }

  bool is_interrupted() {
    if (looks_) {
      work_ += active_ * (task_.size * task_.size + kWorkBeside);
      if (work_ >= kWorkPerLook) {
        work_ = 0;
        task_.look(task_.look_context);
      }
    }
    return task_.interrupted != nullptr && task_.interrupted->load(std::memory_order_relaxed);
  }

  void remove(int64_t i) {
    --active_;
    const int32_t freed = order_[i];
    order_[i] = order_[active_];
    order_[active_] = freed;
  }

  // Products are computed for one precision at a time, the one that most slots wait for.
  Products most_requested() {
    int64_t counts[3] = {};
    for (int64_t i = 0; i < active_; ++i) ++counts[int(slot(i).schedule.next)];
    int best = 0;
    for (int kind = 1; kind < 3; ++kind) best = counts[kind] > counts[best] ? kind : best;
    return Products(best);
  }

  // Brings the slots that wait for such `products` to the front.
  int64_t partition(Products products) {
    int64_t count = 0;
    for (int64_t i = 0; i < active_; ++i) {
      if (slot(i).schedule.next != products) continue;
      const int32_t moved = order_[i];
      order_[i] = order_[count];
      order_[count++] = moved;
    }
    return count;
  }

  // Puts the next sample that is not done at once into the first free slot; false if none is left.
  bool load_next() {
    for (;;) {
      const int64_t sample = task_.next_sample->fetch_add(1, std::memory_order_relaxed);
      if (sample >= task_.batch) return false;
      Slot<T>& fresh = slot(active_);
      if (start(fresh, sample)) {
        ++active_;
        return true;
      }
    }
  }

  // False when the sample is done already.
  bool start(Slot<T>& fresh, int64_t sample) {
    const bool at_zero = begin(task_, fresh, sample);
    if (task_.slope != nullptr && !scale_to_unit(task_, fresh)) {
      finish(fresh, Status::kNonfinite);
      return false;
    }
    if (!at_zero) return true;
    // The product of W with zeros is known.
    const T zeros[kPanel<T>] = {};
    for (int64_t j = 0; j < task_.size; j += kPanel<T>) {
      full_epilogue_(task_, fresh, zeros, j,
                     task_.size < j + kPanel<T> ? task_.size : j + kPanel<T>);
    }
    return !advance(fresh, Products::kFull);
  }

  // Evaluates the first `count` slots.
  void evaluate(int64_t count, Products products) {
    for (int64_t i = 0; i < count; ++i) {
      Slot<T>& l = slot(i);
      chosen_[i] = &l;
      rows_[i] = products == Products::kFull ? static_cast<const void*>(l.point) : l.change;
    }
    if (task_.triangle_parts > 0) {
      evaluate_triangle<T>({task_, chosen_, rows_, count, full_epilogue_, triangle_});
      return;
    }
    const auto epilogue = products == Products::kFull ? full_epilogue_ : low_epilogue_;
    Evaluation<T> evaluation{task_, chosen_, rows_, count, products, epilogue};
    const int64_t all = panels<T>(task_.size);
    if (task_.parallel_for != nullptr) {
      task_.parallel_for(task_.sharing, all, &evaluation, &evaluate_panels<T>);
    } else {
      evaluate_panels<T>(&evaluation, 0, all);
    }
  }

  // Judges the last evaluation and takes a step. True when the slot is done.
  bool advance(Slot<T>& l, Products products) {
    if (l.mode == Mode::kDirection) {
      if (l.iterations == options_.updates()) return finish(l, status_at_the_limit(l));
      symmetric_solver_.direction(l);
      ++l.iterations;
      return false;
    }
    const Norms norms = norms_of(task_, l, products != Products::kFull && l.plain);
    const double norm = norms.difference;
    const double relative = double(T(relative_residual(options_, norm, norms.value)));
    if (products != Products::kFull) {
      take_low_step(l, products, norm, relative);
      return false;
    }
    const T* const at = l.point;
    return l.mode == Mode::kSteps ? take_step(l, at, norm, relative)
                                  : take_structured_step(l, at, norm, relative);
  }

  // After an evaluation in full precision at `at`, which stays where it is.
  void keep_best(Slot<T>& l, bool improved, bool at_start) {
    if (improved) {
      swap(l.best, l.point);  // `at` is the best now, and the next point goes elsewhere
      if (task_.low_precision || l.mode != Mode::kSteps) {  // what comes next goes on from this one
        copy(task_.size, l.pre, l.best_pre);
      } else {
        swap(l.best_pre, l.pre);
      }
    } else if (at_start) {
      copy(task_.size, l.pre, l.best_pre);  // the best is the start
    }
  }

  FASTDEQ_INLINE bool take_step(Slot<T>& l, const T* at, double norm, double relative) {
    const bool at_start = l.iterations == 0;
    PrecisionSchedule* const schedule = task_.low_precision ? &l.schedule : nullptr;
    const Decision d = judge(l, options_, norm, relative, schedule);
    keep_best(l, d.improved, at_start);
    add_to_history(l, at, d);  // it counts its rejects
    if (d.stop) return finish(l, d.status);
    if (d.step == Step::kSwitch) {
      symmetric_solver_.begin(l);
      return false;
    }
    if (d.step == Step::kPlain) damped_step(task_, l, at);
    if (d.step == Step::kHeavyBall) heavy_ball_step(task_, l, at, d.omega);
    if (d.step == Step::kTakeBack) take_back(task_, l);
    swap(l.point, l.value);
    if (task_.low_precision) {
      choose_products(l, options_, relative, l.schedule);
      if (l.schedule.next != Products::kFull) round_next<T>(task_, l, at);
    }
    return false;
  }

  // The next point of kMix and kRefill.
  FASTDEQ_INLINE void add_to_history(Slot<T>& l, const T* at, const Decision& d) {
    if (d.step == Step::kMix) anderson_step(task_, l, at, d.count, small_);
    if (d.step == Step::kRefill) refill_step(task_, l, at, d.count);
  }

  // Without a history the epilogue has put the next point in place already, and rounded the change
  // from the one before.
  FASTDEQ_INLINE void take_low_step(Slot<T>& l, Products products, double norm, double relative) {
    const bool in_place = l.plain;
    const Decision d = judge_low(l, options_, norm, relative, l.schedule);
    const T* const at = l.point;
    if (d.step == Step::kSwitch) {
      symmetric_solver_.begin(l);
      return;
    }
    if (d.step == Step::kBest) {
      copy(task_.size, l.best, l.point);
    } else if (!in_place) {
      add_to_history(l, at, d);
      if (d.step == Step::kTakeBack) take_back(task_, l);
      swap(l.point, l.value);
    }
    choose_products(l, options_, relative, l.schedule);
    if (l.schedule.next == Products::kFull) return;
    if (!in_place) {
      round_next<T>(task_, l, at);
    } else if (l.schedule.next == products) {
      take_rounded(task_, l);
    } else {  // it is rounded to what was thought to come
      l.schedule.next = Products::kFull;
    }
  }

  bool take_structured_step(Slot<T>& l, const T* at, double norm, double relative) {
    const Decision d = verify(l, options_, norm, relative);
    keep_best(l, d.improved, l.iterations == 0);
    if (d.stop) return finish(l, d.status);
    const bool retries = l.mode == Mode::kTrial && options_.solver == Solver::kEnergy;
    if (!__builtin_isfinite(norm) && !retries) return finish(l, status_of_failure(l));
    if (!symmetric_solver_.step(l, at, relative) || is_out_of_patience(l, options_)) {
      return finish(l, l.converged ? Status::kConverged : Status::kStagnated);
    }
    ++l.iterations;
    return false;
  }

  bool finish(const Slot<T>& l, Status status) {
    end(task_, l, status);
    return true;
  }

  const SolveTask<T>& task_;
  const SolveOptions& options_;
  const bool looks_;
  const Epilogue<T> full_epilogue_, low_epilogue_;
  const SymmetricSolver<T> symmetric_solver_;
  Slot<T>* slots_;
  int32_t* order_;  // the slots, those in use first
  int64_t active_ = 0;
  int64_t work_ = 0;   // since the last look
  const void** rows_;  // what the next product multiplies, and the slots it is for
  Slot<T>** chosen_;
  double* small_;
  T* triangle_;
};

template <typename T>
void work(const SolveTask<T>& task, int64_t worker) {
  const bool looks = worker == 0 && task.look != nullptr;
  Worker<T>(task, task.scratch + worker * scratch_bytes(task), looks).run();
}

template <typename T>
constexpr EngineFor<T> engine_for() {
  return {&round_up<T>, &panels<T>,   &pack<T>,    &scratch_bytes<T>,
          &work<T>,     &activate<T>, &measure<T>, &take_step<T>};
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
