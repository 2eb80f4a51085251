// See iteration.h. Samples go to threads; where there are fewer samples than threads, parts of long
// rows do. Memory, in states: the point and the best iterate, with heavy-ball steps the last
// change, and with a history two for each entry, taken when the entry is first used.

#include "cpu/iteration.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>

#include <cmath>

#include "cpu/engine.h"
#include "cpu/iteration_history.h"
#include "cpu/iteration_judge.h"
#include "cpu/iteration_layout.h"
#include "cpu/kept_pages.h"
#include "cpu/threads.h"

namespace fastdeq {
namespace {

constexpr int64_t kGrain = 262144;  // numbers that a thread touches at least: some 30 us

template <typename T>
const EngineFor<T>& rows_engine() {
  if constexpr (sizeof(T) == 4) {
    return engine().for_float;
  } else {
    return engine().for_double;
  }
}

template <typename T>
class IterationOf : public Iteration {
 public:
  IterationOf(const at::Tensor& start, const SolveOptions& options,
              const std::vector<int64_t>& parts, bool apart, const at::Tensor& offset,
              const at::Tensor& scale)
      : judge_(options, start.size(0), parts.size()),
        history_(options.window, start.size(0), start.size(1)),
        layout_(parts, start.size(0), start.size(1), apart),
        batch_(start.size(0)),
        size_(start.size(1)),
        point_(apart ? at::empty(start.sizes(), start.options())
                     : start.clone(at::MemoryFormat::Contiguous)),
        best_(at::empty_like(point_)) {
    if (offset.defined()) {
      TORCH_CHECK(offset.sizes() == start.sizes() && scale.sizes() == start.sizes().slice(0, 1),
                  "the offset must be ", start.sizes(), " with a scale for each row");
      offset_ = offset.to(start.scalar_type()).contiguous();
      scale_ = scale.to(start.scalar_type()).contiguous();
    }
    if (options.begins_with_momentum()) last_ = at::empty_like(point_);
    const auto own = apart ? layout_.parts_of(point_) : std::vector<at::Tensor>();
    for (size_t p = 0; p < own.size(); ++p) {
      own[p].copy_(start.narrow(1, layout_.begin(p), parts[p]));
    }
    T* const from = data(point_);
    Sharing& sharing = sharing_of(Shared::kIteration, double(batch_ * size_));
    parallel_for(batch_, std::max<int64_t>(1, kGrain / size_), sharing,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t b = begin; b < end; ++b) layout_.make_finite(from, b);
                 });
  }

  at::Tensor point() const override { return layout_.rows_of(point_.detach()); }
  std::vector<at::Tensor> points() const override { return layout_.parts_of(point_.detach()); }

  int64_t advance(const std::vector<at::Tensor>& given) override {
    value_ = GivenValue<T>(given, layout_, point_.scalar_type());
    // What others hold, the value for one if it is a view of the point, is left to them.
    next_ = point_.storage().use_count() > 1 ? at::empty_like(point_) : point_;
    rows_ = {data_or_null(offset_), data_or_null(scale_), data(point_),
             data(next_),           data(best_),          data_or_null(last_)};
    make_entries();
    const int64_t numbers = std::max<int64_t>(1, size_ * (4 + 2 * most_ages_));
    Sharing& sharing = sharing_of(Shared::kIteration, double(batch_ * numbers));
    if (batch_ >= available_threads() || numbers < kGrain) {
      parallel_for(batch_, std::max<int64_t>(1, kGrain / numbers), sharing,
                   [&](int64_t begin, int64_t end) {
                     Scratch own = scratch();
                     for (int64_t b = begin; b < end; ++b) iterate(b, own);
                   });
    } else {
      iterate_in_parts(sharing);
    }
    point_ = std::move(next_);
    value_ = {};
    ++evaluations_;
    return int64_t(judge_.running().size());
  }

  at::Tensor running() const override { return at::tensor(judge_.running(), at::kLong); }

  IterationResult result() const override {
    const at::TensorOptions options = point_.options();
    const int64_t counters = counters_of(judge_.options.solver);
    const auto make = [&](at::TensorOptions kind) { return at::empty({batch_}, kind); };
    IterationResult r;
    r.value = layout_.rows_of(best_);
    r.status = make(options.dtype(at::kChar));
    r.iterations = make(options.dtype(at::kInt));
    r.residual = make(options), r.rate = make(options);
    r.middle = make(options), r.end = make(options);
    r.rejects = at::empty({batch_, counters}, options.dtype(at::kInt));
    for (int64_t b = 0; b < batch_; ++b) {
      const IteratedSample& s = judge_.samples[size_t(b)];
      r.status.template mutable_data_ptr<int8_t>()[b] = int8_t(s.status);
      r.iterations.template mutable_data_ptr<int32_t>()[b] = s.iterations;
      for (int64_t i = 0; i < counters; ++i) {
        r.rejects.template mutable_data_ptr<int32_t>()[b * counters + i] = s.rejects[i];
      }
      const bool known = std::isfinite(s.previous_norm);
      data(r.residual)[b] = T(s.best_residual);
      data(r.rate)[b] = known ? T(s.norm / s.previous_norm) : T(NAN);
      data(r.middle)[b] = T(s.trend.middle);
      data(r.end)[b] = T(s.trend.end());
    }
    return r;
  }

 private:
  static T* data(const at::Tensor& t) { return t.mutable_data_ptr<T>(); }
  // Of the tensors, of which each access costs as much as a short row.
  struct Rows {
    const T *offset = nullptr, *scale = nullptr;
    T *point = nullptr, *next = nullptr, *best = nullptr, *last = nullptr;
  };
  static T* data_or_null(const at::Tensor& t) { return t.defined() ? data(t) : nullptr; }
  IteratedSample& sample(int64_t b) { return judge_.samples[size_t(b)]; }

  // Room in the history for what this evaluation may bring.
  void make_entries() {
    most_ages_ = 0;
    if (judge_.options.window == 0) return;
    int64_t needed = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const IteratedSample& s = sample(b);
      if (s.ended) continue;
      const int32_t most = most_differences(s, judge_.options);
      needed = std::max<int64_t>({needed, history_.held(b), std::min(s.count + 1, most)});
      most_ages_ = std::max(most_ages_, judge_.ages(s));
    }
    history_.reserve(needed, point_.options());
  }

  // What a thread needs to work with.
  struct Scratch {
    std::vector<const T*> old;
    std::vector<double> work;
    explicit Scratch(int64_t window)
        : old(size_t(2 * window + 2)), work(size_t(small_solve_doubles(window))) {}
  };
  Scratch scratch() const { return Scratch(judge_.options.window); }

  void iterate(int64_t b, Scratch& scratch) {
    if (!sample(b).ended) {
      judge_.clear_sums(b);
      for (const Range& range : layout_.whole) {
        measure(b, range, judge_.sums_of(b) + range.part * judge_.places, scratch);
      }
      judge_.decide(b, evaluations_, scratch.work.data());
    }
    for (const Range& range : layout_.whole) take_step(b, range, scratch);
    end_step(b);
  }

  // Few samples with long rows: the rows are divided among threads.
  void iterate_in_parts(Sharing& sharing) {
    const auto& ranges = layout_.ranges;
    const int64_t count = int64_t(ranges.size()), places = judge_.places;
    const auto for_all = [&](auto body) {
      parallel_for(batch_ * count, 1, sharing, [&](int64_t begin, int64_t end) {
        Scratch own = scratch();
        for (int64_t i = begin; i < end; ++i) body(i, i / count, ranges[size_t(i % count)], own);
      });
    };
    std::vector<double> partial(size_t(batch_ * count * places), 0.0);
    for_all([&](int64_t i, int64_t b, const Range& range, Scratch& own) {
      if (!sample(b).ended) measure(b, range, partial.data() + i * places, own);
    });
    Scratch own = scratch();
    for (int64_t b = 0; b < batch_; ++b) {
      if (sample(b).ended) continue;
      judge_.clear_sums(b);
      for (int64_t i = 0; i < count; ++i) {
        double* const sums = judge_.sums_of(b) + ranges[size_t(i)].part * places;
        for (int64_t j = 0; j < places; ++j) {
          sums[j] += partial[size_t((b * count + i) * places + j)];
        }
      }
      judge_.decide(b, evaluations_, own.work.data());
    }
    for_all(
        [&](int64_t, int64_t b, const Range& range, Scratch& own) { take_step(b, range, own); });
    for (int64_t b = 0; b < batch_; ++b) end_step(b);
  }

  // A part of the evaluation of sample b, with so many of those before it.
  RowEvaluation<T> evaluation(int64_t b, int64_t part, int64_t ages, Scratch& scratch) const {
    const int64_t at = layout_.at(part, b);
    RowEvaluation<T> e;
    e.value = value_.at(part, b);
    if (rows_.offset != nullptr) {
      e.offset = rows_.offset + at;
      e.scale = rows_.scale[b];
    }
    e.point = rows_.point + at;
    e.ages = ages;
    const T** const old = scratch.old.data();
    for (int64_t age = 0; age < ages; ++age) {
      old[age] = history_.value(b, age + 1) + at;
      old[ages + age] = history_.residual(b, age + 1) + at;
    }
    e.old_f = old;
    e.old_g = old + ages;
    return e;
  }

  // Adds to the sums of one part.
  void measure(int64_t b, const Range& range, double* sums, Scratch& scratch) {
    const RowEvaluation<T> e = evaluation(b, range.part, judge_.ages(sample(b)), scratch);
    rows_engine<T>().measure(e, range.begin, range.end, sums);
  }

  void take_step(int64_t b, const Range& range, Scratch& scratch) {
    const IteratedSample& s = sample(b);
    const Decision& d = s.decision;
    const int64_t at = layout_.at(range.part, b);
    const bool is_best = d.improved || evaluations_ == 0;
    if (!s.ended || is_best) {
      const bool mixes = d.step == Step::kMix && !d.stop;
      const int64_t ages = d.step == Step::kTakeBack ? 1 : mixes ? d.count : 0;
      RowStep<T> how;
      how.step = d.stop ? Step::kPlain : d.step;
      how.best = is_best ? rows_.best + at : nullptr;
      how.next = d.stop ? nullptr : rows_.next + at;
      how.last = rows_.last == nullptr ? nullptr : rows_.last + at;
      how.damping = T(judge_.options.damping);
      how.omega = d.omega;
      how.gamma = judge_.gamma_of(b);
      if (s.enters() && !d.stop) {
        how.f = history_.next_value(b, s.count) + at;
        how.g = history_.next_residual(b, s.count) + at;
      }
      const RowEvaluation<T> e = evaluation(b, range.part, ages, scratch);
      rows_engine<T>().take_step(e, how, range.begin, range.end);
    }
    if (s.ended && rows_.next != rows_.point) {  // it keeps its point
      const T* const from = rows_.point + at;
      std::copy(from + range.begin, from + range.end, rows_.next + at + range.begin);
    }
  }

  void end_step(int64_t b) {
    IteratedSample& s = sample(b);
    if (s.enters() && !s.ended) {
      history_.enter(b, s.count);
      ++s.entered;
    }
    s.decision = {};
  }

  Judge<T> judge_;
  History<T> history_;
  const Layout layout_;
  const int64_t batch_, size_;
  GivenValue<T> value_;
  at::Tensor point_, best_, last_, next_, offset_, scale_;
  Rows rows_;
  int64_t evaluations_ = 0, most_ages_ = 0;
};

}  // namespace

std::unique_ptr<Iteration> Iteration::make(const at::Tensor& start, const SolveOptions& options,
                                           const std::vector<int64_t>& parts, bool apart,
                                           const at::Tensor& offset, const at::Tensor& scale) {
  TORCH_CHECK(start.is_cpu() && start.dim() == 2, "the start must be (B, n) on the CPU");
  TORCH_CHECK(options.solver != Solver::kEnergy && options.solver != Solver::kMinres,
              "these steps are for affine cells");
  TORCH_CHECK(!apart || !offset.defined(), "an offset is for parts in one row");
  keep_pages_for(int64_t(start.numel() * start.element_size()));
  if (start.scalar_type() == at::kDouble) {
    return std::make_unique<IterationOf<double>>(start, options, parts, apart, offset, scale);
  }
  TORCH_CHECK(start.scalar_type() == at::kFloat, "the start must be float32 or float64");
  return std::make_unique<IterationOf<float>>(start, options, parts, apart, offset, scale);
}

}  // namespace fastdeq
