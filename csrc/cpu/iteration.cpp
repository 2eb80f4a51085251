// See iteration.h. Samples go to threads; where there are fewer samples than threads, parts of long
// rows do. Memory, in states: the point and the best iterate, with heavy-ball steps the last
// change, and with a history two for each entry, taken when the entry is first used.

#include "cpu/iteration.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "cpu/engine.h"
#include "cpu/iteration_judge.h"
#include "cpu/threads.h"

namespace fastdeq {
namespace {

// Numbers that a thread reads or writes at least: some 30 microseconds.
constexpr int64_t kGrain = 262144;
// Rows that are divided among threads are so in parts of this length.
constexpr int64_t kPart = 32768;

template <typename T>
const EngineFor<T>& rows_engine() {
  if constexpr (sizeof(T) == 4) {
    return engine().for_float;
  } else {
    return engine().for_double;
  }
}

// Entries [begin, end) of the rows, all in one part of the state.
struct Range {
  int64_t part, begin, end;
};

template <typename T>
class IterationOf : public Iteration {
 public:
  IterationOf(const at::Tensor& start, const SolveOptions& options,
              const std::vector<int64_t>& parts)
      : judge_(options, start.size(0), parts.size()),
        batch_(start.size(0)),
        size_(start.size(1)),
        point_(start.clone()),
        best_(start.clone()) {
    if (options.begins_with_momentum()) last_ = at::empty_like(start);
    int64_t begin = 0;
    for (size_t p = 0; p < parts.size(); begin += parts[p++]) {
      whole_.push_back({int64_t(p), begin, begin + parts[p]});
      for (int64_t at = 0; at < parts[p]; at += kPart) {
        ranges_.push_back({int64_t(p), begin + at, begin + std::min(parts[p], at + kPart)});
      }
    }
    TORCH_CHECK(begin == size_, "parts of ", begin, " entries for rows of ", size_);
  }

  at::Tensor point() const override { return point_; }

  bool advance(const at::Tensor& given) override {
    TORCH_CHECK(given.sizes() == point_.sizes() && given.is_cpu(), "the value must be ",
                point_.sizes(), " on the CPU, got ", given.sizes());
    const at::Tensor value = given.to(point_.scalar_type()).contiguous();
    value_ = value.const_data_ptr<T>();
    // What others hold, the value for one if it is a view of the point, is left to them.
    next_ = point_.storage().use_count() > 1 ? at::empty_like(point_) : point_;
    make_entries();
    const int64_t numbers = std::max<int64_t>(1, size_ * (4 + 2 * most_ages_));
    Sharing& sharing = sharing_of(Shared::kIteration, double(batch_ * numbers));
    if (batch_ >= available_threads() || numbers < kGrain) {
      parallel_for(batch_, std::max<int64_t>(1, kGrain / numbers), sharing,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t b = begin; b < end; ++b) iterate(b);
                   });
    } else {
      iterate_in_parts(sharing);
    }
    point_ = std::move(next_);
    ++evaluations_;
    const auto& samples = judge_.samples;
    return std::any_of(samples.begin(), samples.end(), [](const auto& s) { return !s.ended; });
  }

  IterationResult result() const override {
    const at::TensorOptions options = point_.options();
    const int64_t counters = counters_of(judge_.options.solver);
    const auto make = [&](at::TensorOptions kind) { return at::empty({batch_}, kind); };
    IterationResult r;
    r.value = best_;
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
  T* row(const at::Tensor& t, int64_t b) const {
    return t.defined() ? data(t) + b * size_ : nullptr;
  }
  IteratedSample& sample(int64_t b) { return judge_.samples[size_t(b)]; }

  // Room in the history for what this evaluation may bring.
  void make_entries() {
    most_ages_ = 0;
    if (judge_.options.window == 0) return;
    int64_t needed = 0;
    for (const IteratedSample& s : judge_.samples) {
      if (s.ended) continue;
      needed = std::max(needed, s.entry + 1);
      most_ages_ = std::max<int64_t>(most_ages_, s.count);
    }
    while (int64_t(f_history_.size()) < needed) {
      f_history_.push_back(at::empty_like(point_));
      g_history_.push_back(at::empty_like(point_));
    }
  }

  void iterate(int64_t b) {
    if (!sample(b).ended) {
      judge_.clear_sums(b);
      for (const Range& range : whole_) {
        measure(b, range, judge_.sums_of(b) + range.part * judge_.places);
      }
      judge_.decide(b, evaluations_);
    }
    take_step(b, 0, size_);
    end_step(b);
  }

  // Few samples with long rows: the rows are divided among threads.
  void iterate_in_parts(Sharing& sharing) {
    const int64_t count = int64_t(ranges_.size()), places = judge_.places;
    const auto for_all = [&](auto body) {
      parallel_for(batch_ * count, 1, sharing, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i, i / count, ranges_[size_t(i % count)]);
      });
    };
    std::vector<double> partial(size_t(batch_ * count * places), 0.0);
    for_all([&](int64_t i, int64_t b, const Range& range) {
      if (!sample(b).ended) measure(b, range, partial.data() + i * places);
    });
    for (int64_t b = 0; b < batch_; ++b) {
      if (sample(b).ended) continue;
      judge_.clear_sums(b);
      for (int64_t i = 0; i < count; ++i) {
        double* const sums = judge_.sums_of(b) + ranges_[size_t(i)].part * places;
        for (int64_t j = 0; j < places; ++j)
          sums[j] += partial[size_t((b * count + i) * places + j)];
      }
      judge_.decide(b, evaluations_);
    }
    for_all([&](int64_t, int64_t b, const Range& range) { take_step(b, range.begin, range.end); });
    for (int64_t b = 0; b < batch_; ++b) end_step(b);
  }

  // The evaluation of sample b with the history's entries before it, to which `old` will point.
  RowEvaluation<T> evaluation(int64_t b, int64_t ages, bool enters, std::vector<const T*>& old) {
    const int64_t entry = sample(b).entry;
    RowEvaluation<T> e;
    e.value = value_ + b * size_;
    e.point = row(point_, b);
    e.ages = ages;
    if (enters) {
      e.f = row(f_history_[size_t(entry)], b);
      e.g = row(g_history_[size_t(entry)], b);
    }
    old.resize(size_t(2 * ages));
    for (int64_t age = 0; age < ages; ++age) {
      const size_t before = size_t(entry_of(entry, age + 1, judge_.entries));
      old[size_t(age)] = row(f_history_[before], b);
      old[size_t(ages + age)] = row(g_history_[before], b);
    }
    e.old_f = old.data();
    e.old_g = old.data() + ages;
    return e;
  }

  // Adds to the sums of one part. What may enter the history is written there at once.
  void measure(int64_t b, const Range& range, double* sums) {
    const bool enters = judge_.remembers(sample(b));
    std::vector<const T*> old;
    const RowEvaluation<T> e = evaluation(b, enters ? sample(b).count : 0, enters, old);
    rows_engine<T>().measure(e, range.begin, range.end, sums);
  }

  void take_step(int64_t b, int64_t begin, int64_t end) {
    const IteratedSample& s = sample(b);
    const Decision& d = s.decision;
    if (!s.ended || d.improved) {
      const bool enters = s.enters() && !d.stop;
      std::vector<const T*> old;
      const int64_t ages = d.step == Step::kTakeBack ? 1 : enters ? d.count : 0;
      const RowEvaluation<T> e = evaluation(b, ages, enters, old);
      if (enters && !s.remembered) {  // the first that does
        std::vector<double> unused(size_t(judge_.places), 0.0);
        rows_engine<T>().measure(e, begin, end, unused.data());
      }
      RowStep<T> how;
      how.step = d.stop ? Step::kPlain : d.step;
      how.best = d.improved ? row(best_, b) : nullptr;
      how.next = d.stop ? nullptr : row(next_, b);
      how.last = row(last_, b);
      how.damping = T(judge_.options.damping);
      how.omega = d.omega;
      how.gamma = judge_.gamma_of(b);
      rows_engine<T>().take_step(e, how, begin, end);
    }
    if (s.ended && !next_.is_same(point_)) {  // it keeps its point
      std::copy(row(point_, b) + begin, row(point_, b) + end, row(next_, b) + begin);
    }
  }

  void end_step(int64_t b) {
    IteratedSample& s = sample(b);
    if (s.enters() || s.decision.step == Step::kTakeBack) {
      s.entry = s.entry + 1 == judge_.entries ? 0 : s.entry + 1;
    }
    s.decision = {};
  }

  Judge<T> judge_;
  const int64_t batch_, size_;
  std::vector<Range> whole_, ranges_;
  at::Tensor point_, best_, last_, next_;
  std::vector<at::Tensor> f_history_, g_history_;  // (B, n) for each entry
  const T* value_ = nullptr;
  int64_t evaluations_ = 0, most_ages_ = 0;
};

}  // namespace

std::unique_ptr<Iteration> Iteration::make(const at::Tensor& start, const SolveOptions& options,
                                           const std::vector<int64_t>& parts) {
  TORCH_CHECK(start.is_cpu() && start.dim() == 2 && start.is_contiguous(),
              "the start must be (B, n), contiguous, on the CPU");
  TORCH_CHECK(options.solver != Solver::kEnergy && options.solver != Solver::kMinres,
              "these steps are for affine cells");
  if (start.scalar_type() == at::kDouble) {
    return std::make_unique<IterationOf<double>>(start, options, parts);
  }
  TORCH_CHECK(start.scalar_type() == at::kFloat, "the start must be float32 or float64");
  return std::make_unique<IterationOf<float>>(start, options, parts);
}

}  // namespace fastdeq
