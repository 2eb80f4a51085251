// One worker: takes samples from the common queue into its lines and iterates them until all are
// done. The state machine of fastdeq/driver.py, per sample; lines that end make room for samples
// that wait, so every product runs on as many lines as there are.

#pragma once

#include "anderson_line.h"
#include "evaluate.h"
#include "heavy_ball.h"
#include "load.h"
#include "pack.h"
#include "ramp.h"
#include "structured.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
class Worker {
 public:
  Worker(const SolveTask<T>& task, std::byte* scratch)
      : task_(task),
        exact_epilogue_(epilogue_for<T, false>(task)),
        narrow_epilogue_(task.ramp ? epilogue_for<T, true>(task) : nullptr),
        structured_(task) {
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
    triangle_ = reinterpret_cast<T*>(scratch);
    scratch += triangle_bytes(task);
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
    if (task_.triangle_parts > 0) {
      evaluate_triangle<T>({task_, chosen_, rows_, count, exact_epilogue_, triangle_});
      return;
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
    if (l.mode == Mode::kDirection) {
      if (l.iterations == task_.max_iter) return finish(l, at_the_limit(l));
      structured_.direction(l);
      ++l.iterations;
      return false;
    }
    double square_difference = 0, square_value = 0;
    for (int64_t panel = 0; panel < panels<T>(task_.size); ++panel) {
      square_difference += l.sums[kSums * panel];
      square_value += l.sums[kSums * panel + 1];
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
        if (task_.ramp || l.mode >= Mode::kOpen) {  // what comes next goes on from this one
          copy(task_.size, l.pre, l.best_pre);
        } else {
          swap(l.best_pre, l.pre);
        }
      } else {
        if (l.iterations == 0) copy(task_.size, l.pre, l.best_pre);  // best is the start
        ++l.idle;
      }
      const Status limit = at_the_limit(l);
      if (l.iterations == task_.max_iter || (limit == Status::kConverged && !task_.fixed)) {
        return finish(l, limit);
      }
      if (!step(l, at, double(relative))) return true;
      if (l.iterations >= task_.patience && l.idle >= task_.patience && !task_.fixed) {
        return finish(l, Status::kStagnated);
      }
    } else {
      ++l.since_anchor;
      step_narrow(l, double(relative));
    }
    if (task_.ramp && (l.mode == Mode::kSteps || l.mode == Mode::kMomentum)) {
      l.next = next_kind(task_, l, double(relative));
      if (in_place && l.next != Kind::kExact) {
        round_next<T>(task_, l, l.mode == Mode::kMomentum ? l.last : l.value, nullptr,
                      largest_change(task_, l));
      } else if (l.next != Kind::kExact) {
        round_next<T>(task_, l, l.point, at, -1);
      }
    }
    ++l.iterations;
    return false;
  }

  // The step after a narrow evaluation; without a history the next point is in place already.
  void step_narrow(Line<T>& l, double relative) {
    // Nearer to the goal its rounding hides how fast the residual falls.
    const bool trusted = relative > 1.5 * l.goal;
    if (!__builtin_isfinite(l.norm) && !l.accelerated) {
      // Perhaps its rounding is to blame: back to the best point, in full precision.
      l.narrowest = Kind::kExact;
      l.count = 0;
      copy(task_.size, l.best, l.point);
      l.omega = 1;
    } else if (l.mode == Mode::kMomentum) {
      if (learn(l, trusted) && task_.solver != Solver::kHeavyBall) structured_.take_over(l);
    } else if (!l.plain) {
      anderson_step(task_, l, l.point, small_);
      swap(l.point, l.value);
    } else if (trusted && slow(l)) {
      l.plain = false;
      l.goal = __builtin_inf();  // an anchor before the first step with a history
    }
  }

  bool slow(const Line<T>& l) const {
    return task_.window > 0 && !(l.norm <= task_.accelerate_above * l.previous_norm);
  }

  // The line was evaluated in full precision at `at`, which stays. False when it is done.
  bool step(Line<T>& l, const T* at, double relative) {
    const bool after_exact = l.since_anchor == 0, finite = __builtin_isfinite(l.norm);
    if (l.mode == Mode::kSteps || l.mode == Mode::kMomentum) {
      if (l.plain && after_exact && slow(l)) l.plain = false;
      if (task_.ramp) anchor(task_, l, relative);
      if (l.mode == Mode::kMomentum) {
        heavy_ball_step(task_, l, at);
        const bool late = learn(l, after_exact);
        if ((late || !finite) && task_.solver != Solver::kHeavyBall &&
            __builtin_isfinite(l.best_residual)) {
          structured_.take_over(l);
          return true;
        }
      }
      if (l.plain ? !finite : !anderson_step(task_, l, at, small_)) return fail(l);
      if (l.mode == Mode::kSteps && l.plain && task_.damping != 1) damp(l, at);
      swap(l.point, l.value);
      return true;
    }
    if (!finite && (l.mode == Mode::kOpen || task_.solver == Solver::kMinres)) return fail(l);
    if (structured_.step(l, at, relative)) return true;
    finish(l, Status::kStagnated);
    return false;
  }

  Status at_the_limit(const Line<T>& l) const {
    return double(l.best_residual) <= task_.tol ? Status::kConverged : Status::kMaxIter;
  }

  bool fail(Line<T>& l) {
    const Status limit = at_the_limit(l);  // converged before, where there is no stop test
    finish(l, limit == Status::kConverged ? limit : Status::kNonfinite);
    return false;
  }

  void damp(Line<T>& l, const T* at) {
    const Vec<T> damping = splat<T>(T(task_.damping));
    for (int64_t j = 0; j < task_.size; j += kLanes<T>) {
      const Vec<T> z = load(at + j);
      store(l.value + j, z + damping * (load(l.value + j) - z));
    }
  }

  bool finish(const Line<T>& l, Status status) {
    unload(task_, l, status);
    return true;
  }

  const SolveTask<T>& task_;
  const Epilogue<T> exact_epilogue_, narrow_epilogue_;
  const Structured<T> structured_;
  Line<T>* lines_;
  int32_t* order_;  // the lines, those in use first
  int64_t active_ = 0;
  const void** rows_;  // what the next product multiplies, and the lines it is for
  Line<T>** chosen_;
  double* small_;
  T* triangle_;
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
