// One worker: takes samples from the common queue into its lines and iterates them until all are
// done. The state machine of fastdeq/driver.py, per sample; lines that end make room for samples
// that wait, so every product runs on as many lines as there are.

#pragma once

#include "anderson_line.h"
#include "evaluate.h"
#include "load.h"
#include "pack.h"
#include "ramp.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
class Worker {
 public:
  Worker(const SolveTask<T>& task, std::byte* scratch)
      : task_(task),
        exact_epilogue_(epilogue_for<T, false>(task)),
        narrow_epilogue_(task.ramp ? epilogue_for<T, true>(task) : nullptr) {
    lines_ = reinterpret_cast<Line<T>*>(scratch);
    scratch += align(task.lines * int64_t(sizeof(Line<T>)));
    order_ = reinterpret_cast<int32_t*>(scratch);
    scratch += align(task.lines * int64_t(sizeof(int32_t)));
    rows_ = reinterpret_cast<const void**>(scratch);
    scratch += align(task.lines * int64_t(sizeof(void*)));
    chosen_ = reinterpret_cast<Line<T>**>(scratch);
    scratch += align(task.lines * int64_t(sizeof(void*)));
    small_ = reinterpret_cast<double*>(scratch);
    scratch += small_bytes(task);
    for (int64_t i = 0; i < task.lines; ++i) {
      place_buffers(task, lines_[i], scratch + i * line_bytes(task));
      order_[i] = int32_t(i);
    }
  }

  void run() {
    for (;;) {
      while (active_ < task_.lines && load_next()) {
      }
      if (active_ == 0) return;
      const Kind kind = most_wanted();
      const int64_t count = partition(kind);
      evaluate(count, kind);
      for (int64_t i = count - 1; i >= 0; --i) {
        if (advance(line(i), kind)) remove(i);
      }
    }
  }

 private:
  Line<T>& line(int64_t i) { return lines_[order_[i]]; }

  void remove(int64_t i) {
    --active_;
    const int32_t freed = order_[i];
    order_[i] = order_[active_];
    order_[active_] = freed;
  }

  // Products are made for one kind of evaluation at a time, the one that most lines wait for.
  Kind most_wanted() {
    int64_t counts[3] = {};
    for (int64_t i = 0; i < active_; ++i) ++counts[int(line(i).next)];
    int best = 0;
    for (int kind = 1; kind < 3; ++kind) best = counts[kind] > counts[best] ? kind : best;
    return Kind(best);
  }

  // Brings the lines that wait for `kind` to the front.
  int64_t partition(Kind kind) {
    int64_t count = 0;
    for (int64_t i = 0; i < active_; ++i) {
      if (line(i).next != kind) continue;
      const int32_t moved = order_[i];
      order_[i] = order_[count];
      order_[count++] = moved;
    }
    return count;
  }

  // Puts the next sample that is not done at once into the first free line; false if none is left.
  bool load_next() {
    for (;;) {
      const int64_t sample = task_.next_sample->fetch_add(1, std::memory_order_relaxed);
      if (sample >= task_.batch) return false;
      Line<T>& fresh = line(active_);
      if (start(fresh, sample)) {
        ++active_;
        return true;
      }
    }
  }

  // False when the sample is done already.
  bool start(Line<T>& fresh, int64_t sample) {
    const bool at_zero = load_sample(task_, fresh, sample);
    if (task_.slope != nullptr && !scale_to_unit(task_, fresh)) {
      finish(fresh, Status::kNonfinite);
      return false;
    }
    if (!at_zero) return true;
    // The product of W with zeros is known.
    const T zeros[kPanel<T>] = {};
    for (int64_t j = 0; j < task_.size; j += kPanel<T>) {
      exact_epilogue_(task_, fresh, zeros, j,
                      task_.size < j + kPanel<T> ? task_.size : j + kPanel<T>);
    }
    return !advance(fresh, Kind::kExact);
  }

  // Evaluates the first `count` lines.
  void evaluate(int64_t count, Kind kind) {
    for (int64_t i = 0; i < count; ++i) {
      Line<T>& l = line(i);
      chosen_[i] = &l;
      rows_[i] = kind == Kind::kExact ? static_cast<const void*>(l.point) : l.change;
    }
    Evaluation<T> evaluation{task_, chosen_,
                             rows_, count,
                             kind,  kind == Kind::kExact ? exact_epilogue_ : narrow_epilogue_};
    const int64_t all = panels<T>(task_.size);
    if (task_.parallel_for != nullptr) {
      task_.parallel_for(all, &evaluation, &evaluate_panels<T>);
    } else {
      evaluate_panels<T>(&evaluation, 0, all);
    }
  }

  // Judges the evaluation just made and takes a step. True when the line is done.
  bool advance(Line<T>& l, Kind kind) {
    double square_difference = 0, square_value = 0;
    for (int64_t panel = 0; panel < panels<T>(task_.size); ++panel) {
      square_difference += l.sums[2 * panel];
      square_value += l.sums[2 * panel + 1];
    }
    l.previous_norm = l.norm;
    l.norm = __builtin_sqrt(square_difference);
    // Next to infinity every residual would be small.
    const T relative = __builtin_isfinite(square_value)
                           ? T(l.norm / (__builtin_sqrt(square_value) + task_.residual_eps))
                           : T(__builtin_nan(""));
    const T* at = l.point;
    const bool exact = kind == Kind::kExact, in_place = !exact && l.plain;
    if (exact) {
      if (relative < l.best_residual) {  // false for NaN
        l.best_residual = relative;
        l.idle = 0;
        swap(l.best, l.point);  // at is the best now, and the next point goes elsewhere
        if (task_.ramp) {       // narrow evaluations go on from this pre-activation
          copy(l.pre, l.best_pre);
        } else {
          swap(l.best_pre, l.pre);
        }
      } else {
        if (l.iterations == 0) copy(l.pre, l.best_pre);  // best is the start
        ++l.idle;
      }
      if (double(l.best_residual) <= task_.tol) return finish(l, Status::kConverged);
      if (l.iterations == task_.max_iter) return finish(l, Status::kMaxIter);
      const bool after_exact = l.since_anchor == 0;
      if (l.plain && after_exact && slow(l)) l.plain = false;
      if (task_.ramp) anchor(task_, l, double(relative));
      if (!step(l, at)) return finish(l, Status::kNonfinite);
      if (l.iterations >= task_.patience && l.idle >= task_.patience) {
        return finish(l, Status::kStagnated);
      }
    } else {
      ++l.since_anchor;
      step_narrow(l, double(relative));
    }
    if (task_.ramp) {
      l.next = next_kind(task_, l, double(relative));
      if (l.next != Kind::kExact)
        round_next(l, in_place ? l.value : l.point, in_place ? nullptr : at);
    }
    ++l.iterations;
    return false;
  }

  void round_next(Line<T>& l, const T* a, const T* b) {
#if defined(FASTDEQ_RAMP)
    if constexpr (sizeof(T) == 4) round_change(l, l.next, a, b, task_.size);
#endif
  }

  // The step after a narrow evaluation; without acceleration the next point is in place already.
  void step_narrow(Line<T>& l, double relative) {
    if (!__builtin_isfinite(l.norm) && !l.accelerated) {
      // Perhaps its rounding is to blame: back to the best point, in full precision.
      l.narrowest = Kind::kExact;
      l.count = 0;
      copy(l.best, l.point);
    } else if (!l.plain) {
      anderson_step(task_, l, l.point, small_);
      swap(l.point, l.value);
    } else if (relative > 1.5 * l.goal && slow(l)) {
      // Nearer to the goal its rounding hides how fast the residual falls.
      l.plain = false;
      l.goal = __builtin_inf();  // an anchor before the first step with a history
    }
  }

  bool slow(const Line<T>& l) const {
    return task_.window > 0 && !(l.norm <= task_.accelerate_above * l.previous_norm);
  }

  // The line was evaluated at `at`, which stays. False when its value is not finite.
  bool step(Line<T>& l, const T* at) {
    if (!l.plain) {
      if (!anderson_step(task_, l, at, small_)) return false;
    } else if (!__builtin_isfinite(l.norm)) {
      return false;
    } else if (task_.damping != 1) {
      const Vec<T> damping = splat<T>(T(task_.damping));
      for (int64_t j = 0; j < task_.size; j += kLanes<T>) {
        const Vec<T> z = load(at + j);
        store(l.value + j, z + damping * (load(l.value + j) - z));
      }
    }
    swap(l.point, l.value);
    return true;
  }

  bool finish(const Line<T>& l, Status status) {
    const int64_t size = task_.size, offset = l.sample * size;
    // A step at a time, as the product of the two may overflow.
    for (int64_t j = 0; j < size; ++j) {
      task_.value[offset + j] = l.best[j] * l.row_norm * l.largest;
    }
    if (task_.value_slope != nullptr && status == Status::kNonfinite) {
      for (int64_t j = 0; j < size; ++j) task_.value_slope[offset + j] = 0;
    } else if (task_.value_slope != nullptr) {
      activate(task_.activation, 1, l.best_pre, task_.value_slope + offset, size);
    }
    task_.status[l.sample] = int8_t(status);
    task_.iterations[l.sample] = l.iterations;
    task_.residual[l.sample] = l.best_residual;
    if (task_.rejects != nullptr) {
      for (int i = 0; i < kCounters; ++i) task_.rejects[l.sample * kCounters + i] = l.rejects[i];
    }
    return true;
  }

  template <typename P>
  static void swap(P*& a, P*& b) {
    P* const c = a;
    a = b;
    b = c;
  }

  void copy(const T* from, T* to) const {
    for (int64_t j = 0; j < task_.size; j += kLanes<T>) store(to + j, load(from + j));
  }

  const SolveTask<T>& task_;
  const Epilogue<T> exact_epilogue_, narrow_epilogue_;
  Line<T>* lines_;
  int32_t* order_;  // the lines, those in use first
  int64_t active_ = 0;
  const void** rows_;  // what the next product multiplies, and the lines it is for
  Line<T>** chosen_;
  double* small_;
};

template <typename T>
void work(const SolveTask<T>& task, int64_t worker) {
  Worker<T>(task, task.scratch + worker * scratch_bytes(task)).run();
}

template <typename T>
constexpr EngineFor<T> engine_for() {
  return {&round_up<T>, &panels<T>, &pack<T>, &scratch_bytes<T>, &work<T>, &activate<T>};
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
