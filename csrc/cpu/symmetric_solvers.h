// The solvers of symmetric cells: what a slot evaluates next.

#pragma once

#include "cpu/energy_slot.h"
#include "cpu/minres_slot.h"
#include "cpu/rounding.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
class SymmetricSolver {
 public:
  explicit SymmetricSolver(const SolveTask<T>& task)
      : task_(task),
        energy_(energy_functions_for(task)),
        descends_(task.options.solver == Solver::kEnergy) {}

  // After an evaluation of an iterate in full precision at `at`. False when nothing helps.
  bool step(Slot<T>& l, const T* at, double relative) const {
    if (descends_ && l.iterations == 0) {
      open(l, l.pre);
      return true;
    }
    if (!descends_ &&
        l.iterations + 1 >= task_.options.updates()) {  // the plain step is all that is left
      copy(task_.size, l.value, l.point);
      l.mode = Mode::kTrial;
      l.schedule.next = Products::kFull;
      return true;
    }
    const bool goes_on =
        descends_ ? energy_step(task_, l, at, relative, energy_) : minres_step(task_, l, relative);
    prepare(l);
    return goes_on;
  }

  // After the product of a direction.
  void direction(Slot<T>& l) const {
    const bool done = descends_ ? energy_direction(task_, l) : minres_direction(task_, l);
    // The last evaluation of MINRES is to be of an iterate.
    if (done || (!descends_ && l.iterations + 1 >= task_.options.updates())) {
      l.mode = Mode::kTrial;
      if (descends_) {
        energy_trial(task_, l, energy_);
      } else {
        minres_iterate(task_, l);
      }
    }
    prepare(l);
  }

  // At the best iterate of heavy-ball steps.
  void begin(Slot<T>& l) const {
    if (descends_) {
      open(l, l.best_pre);
    } else {
      l.mode = Mode::kOpen;
      minres_first(task_, l);
    }
    l.schedule.next = Products::kFull;
    l.plain = false;
  }

 private:
  // The descent begins at phi(a).
  void open(Slot<T>& l, const T* a) const {
    l.mode = Mode::kOpen;
    copy(task_.size, a, energy_rows(l).a);
    energy_.point(task_, l, a);
  }

  // A direction of the energy solver may be rounded.
  void prepare(Slot<T>& l) const {
    const bool low =
        descends_ && l.mode == Mode::kDirection && l.schedule.lowest != Products::kFull;
    l.schedule.next = low ? l.schedule.lowest : Products::kFull;
    if (low) round_next<T>(task_, l, nullptr);
  }

  const SolveTask<T>& task_;
  const EnergyFunctions<T> energy_;
  const bool descends_;
};

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
