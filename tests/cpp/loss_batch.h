// Random batches for the tests of the loss rows, on the CPU and emulated, and the losses to try.
#pragma once

#include <array>
#include <cstring>
#include <random>
#include <vector>

namespace als {
struct BFloat16 {  // what loss_rows_isa.h asks of its includer
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};
}  // namespace als

#include "sample_loss/loss_rows_isa.h"

namespace als {

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
struct Batch {
  int64_t rows, classes;
  std::vector<scalar_t> logits;
  std::vector<int64_t> index;
  std::vector<T> dense, class_weight, scale, losses, state;
  std::vector<scalar_t> grad;

  Batch(int64_t b, int64_t c, unsigned seed = 0)
      : rows(b),
        classes(c),
        logits(b * c),
        index(b),
        dense(b * c),
        class_weight(c),
        scale(b),
        losses(b),
        state(3 * b),
        grad(b * c) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0, 3);
    std::uniform_real_distribution<float> uniform(0, 1);
    for (auto& z : logits) set(z, normal(engine));
    for (auto& y : index) y = static_cast<int64_t>(engine() % c);
    for (auto& t : dense) t = uniform(engine) / static_cast<T>(c);
    for (auto& w : class_weight) w = uniform(engine);
    for (auto& g : scale) g = normal(engine);
  }
  static void set(float& z, float value) { z = value; }
  static void set(double& z, float value) { z = value; }
  static void set(BFloat16& z, float value) { z.bits = detail::bits_of(value) >> 16; }

  LossJob<scalar_t> job(LossKind kind, std::array<T, 3> parameters, T smoothing,
                        bool probabilities) {
    LossJob<scalar_t> j{};
    j.logits = logits.data();
    j.rows = rows;
    j.classes = j.row_stride = classes;
    if (probabilities)
      j.dense = dense.data();
    else
      j.index = index.data();
    j.class_weight = class_weight.data();
    j.scale = scale.data();
    j.spec = {kind, {parameters[0], parameters[1], parameters[2]}, smoothing, probabilities};
    j.ignore_index = -100;
    j.losses = losses.data();
    j.state_out = state.data();
    j.grad = grad.data();
    return j;
  }
};

struct Case {
  const char* name;
  LossKind kind;
  std::array<double, 3> parameters;
  double smoothing;
  bool probabilities;
};
const Case kCases[] = {
    {"cross_entropy", LossKind::kCrossEntropy, {}, 0, false},
    {"smoothing", LossKind::kCrossEntropy, {}, 0.2, false},
    {"probabilities", LossKind::kCrossEntropy, {}, 0.1, true},
    {"gce", LossKind::kGce, {0.6}, 0, false},
    {"sce", LossKind::kSce, {0.5, 1.5, -4}, 0, false},
    {"mae", LossKind::kMae, {}, 0, false},
    {"focal", LossKind::kFocal, {1.5}, 0, false},
    {"bootstrap_hard", LossKind::kBootstrapHard, {0.7}, 0, false},
    {"bootstrap_soft", LossKind::kBootstrapSoft, {0.7}, 0, false},
};

template <typename scalar_t>
LossJob<scalar_t> job_of(Batch<scalar_t>& batch, const Case& c) {
  using T = accumulate_t<scalar_t>;
  return batch.job(c.kind,
                   {static_cast<T>(c.parameters[0]), static_cast<T>(c.parameters[1]),
                    static_cast<T>(c.parameters[2])},
                   static_cast<T>(c.smoothing), c.probabilities);
}

template <typename scalar_t, typename grad_t>
bool is_general(const LossJob<scalar_t, grad_t>& job) {
  return job.spec.side() != SideTarget::kNone || job.spec.needs_entropy();
}

}  // namespace als
