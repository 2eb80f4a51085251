// The solvers of symmetric cells in the state machine of a worker: what a line evaluates next.

#pragma once

#include "energy_line.h"
#include "minres_line.h"
#include "ramp.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
class Structured {
 public:
  explicit Structured(const SolveTask<T>& task)
      : task_(task),
        energy_(energy_functions_for(task)),
        descends_(task.solver == Solver::kEnergy) {}

  // After an evaluation of an iterate in full precision at `at`. False when nothing helps.
  bool step(Line<T>& l, const T* at, double relative) const {
    if (descends_ && l.iterations == 0) {
      open(l, l.pre);
      return true;
    }
    if (!descends_ && l.iterations + 1 >= task_.max_iter) {  // the plain step is all that is left
      copy(task_.size, l.value, l.point);
      l.mode = Mode::kTrial;
      l.next = Kind::kExact;
      return true;
    }
    const bool goes_on =
        descends_ ? energy_step(task_, l, at, relative, energy_) : minres_step(task_, l, relative);
    prepare(l);
    return goes_on;
  }

  // After the product of a direction.
  void direction(Line<T>& l) const {
    const bool done = descends_ ? energy_direction(task_, l) : minres_direction(task_, l);
    // The last evaluation of MINRES is to be of an iterate.
    if (done || (!descends_ && l.iterations + 1 >= task_.max_iter)) {
      l.mode = Mode::kTrial;
      if (descends_) {
        energy_trial(task_, l, energy_);
      } else {
        minres_iterate(task_, l);
      }
    }
    prepare(l);
  }

  // From heavy-ball steps, at the best iterate.
  void take_over(Line<T>& l) const {
    if (descends_) {
      open(l, l.best_pre);
    } else {
      l.mode = Mode::kOpen;
      minres_take_over(task_, l);
    }
    l.next = Kind::kExact;
    l.plain = false;
  }

 private:
  // The descent begins at phi(a).
  void open(Line<T>& l, const T* a) const {
    l.mode = Mode::kOpen;
    copy(task_.size, a, energy_rows(l).a);
    energy_.point(task_, l, a);
  }

  // A direction of the energy solver may be rounded.
  void prepare(Line<T>& l) const {
    const bool narrow = descends_ && l.mode == Mode::kDirection && l.narrowest != Kind::kExact;
    l.next = narrow ? l.narrowest : Kind::kExact;
    if (narrow) round_next<T>(task_, l, l.point, nullptr, -1);
  }

  const SolveTask<T>& task_;
  const EnergyFunctions<T> energy_;
  const bool descends_;
};

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
