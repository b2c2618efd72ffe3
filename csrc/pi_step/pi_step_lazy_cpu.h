// The lazy pi step on the CPU: what pi_step_cpu.cpp calls where a state has power sums.
#pragma once

#include <cstdint>

#include "pi_step/pi_step_math.h"

namespace als {

// A batch: ascending indices; the first of equal ones holds their sum, the others are skipped.
struct PiBatch {
  const int64_t* index;
  const double* grad;
  int64_t size;

  bool counts(int64_t p, int64_t n) const {
    return (p == 0 || index[p] != index[p - 1]) && index[p] >= 0 && index[p] < n;
  }
};

struct PiLazyState {
  double* u;               // [n]
  const float* log_prior;  // [n] or null
  double* scalars;         // [kPiScalars]
  double* sums;            // [kPiSumsSize]
  int64_t n;
};

// A step in O(B), or with exact passes where the sums do not serve.
void lazy_step(const PiLazyState& state, const PiBatch& batch, const PiRule& rule);

// Both normalisers by an exact pass, and new sums. batch: the pending one.
void lazy_normalize(const PiLazyState& state, const PiBatch& batch, const PiRule& rule);

}  // namespace als
