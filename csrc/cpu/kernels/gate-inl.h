// The gate: what a score, give or take its margin, says about a feature. It is written once, for
// vectors of any width.
#pragma once

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// A vector of one float32. Masks have one bit per lane.
struct Scalar {
  using Floats = float;
  static constexpr int64_t width = 1;
  static float load(const float* from) { return *from; }
  static float fill(float value) { return value; }
  static float add(float a, float b) { return a + b; }
  static float subtract(float a, float b) { return a - b; }
  static float multiply(float a, float b) { return a * b; }
  static float multiply_add(float a, float b, float c) { return a * b + c; }
  static int64_t count(unsigned mask) { return mask; }
  static unsigned at_least(float a, float b) { return a >= b; }
  static unsigned not_less(float a, float b) { return !(a < b); }  // also true where one is NaN
};

template <typename Vector>
using Floats = typename Vector::Floats;

// A bound on |score - exact dot product| of the features from `feature` on.
template <typename Vector>
inline Floats<Vector> margin_at(Margin margin, const float* norm, const float* residual,
                                int64_t feature) {
  return Vector::multiply_add(
      Vector::fill(margin.per_norm), Vector::load(norm + feature),
      Vector::multiply(Vector::fill(margin.per_residual), Vector::load(residual + feature)));
}

// The scores of features from `feature` on against their bounds. A NaN, which is the margin of a
// row too large to screen, rules nothing out.
template <typename Vector>
class Gate {
 public:
  Gate(const FeatureBounds& bounds, int64_t feature, Floats<Vector> scores, Floats<Vector> margin)
      : bounds_(bounds),
        feature_(feature),
        upper_(Vector::add(scores, margin)),
        lower_(Vector::subtract(scores, margin)) {}

  unsigned may_be_active() const {
    return Vector::not_less(upper_, Vector::load(bounds_.surely_out_below + feature_));
  }
  unsigned surely_active() const {
    return Vector::at_least(lower_, Vector::load(bounds_.surely_in_from + feature_));
  }
  // Whether the activation may reach min_value.
  unsigned may_reach(float min_value) const {
    return Vector::not_less(
        upper_, Vector::subtract(Vector::fill(min_value), Vector::load(bounds_.bias + feature_)));
  }

 private:
  const FeatureBounds& bounds_;
  const int64_t feature_;
  const Floats<Vector> upper_, lower_;
};

// Features [begin, last whole vector) of KernelTable::gate_row. `found` candidates are there
// already. Returns how many there are then, and sets `begin` to the first feature that is left.
template <typename Vector>
inline int64_t gate_vectors(const GateArgs& args, int64_t& begin, int64_t found,
                            uint32_t* candidates, int64_t* active_count) {
  int64_t surely_active = 0, i = begin;
  for (; i + Vector::width <= args.count; i += Vector::width) {
    const Gate<Vector> gate(args.bounds, i, Vector::load(args.scores + i),
                            margin_at<Vector>(args.margin, args.bounds.norm, args.residual, i));
    const unsigned may = gate.may_be_active();
    if (may == 0) continue;
    const unsigned sure = gate.surely_active(), reaches = gate.may_reach(args.min_value);
    surely_active += Vector::count(sure);
    for (unsigned mask = may & (reaches | ~sure); mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      candidates[found++] = static_cast<uint32_t>(i + lane) << 1 | (~sure >> lane & 1);
    }
  }
  begin = i;
  *active_count += surely_active;
  return found;
}

// KernelTable::gate_row in whole vectors, and the last features one by one.
template <typename Vector>
int64_t gate_row(const GateArgs& args, uint32_t* candidates, int64_t* active_count) {
  int64_t begin = 0;
  const int64_t found = gate_vectors<Vector>(args, begin, 0, candidates, active_count);
  return gate_vectors<Scalar>(args, begin, found, candidates, active_count);
}

}  // namespace
}  // namespace sparse_transcoder::cpu
