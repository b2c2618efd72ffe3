#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "common/parallel.h"
#include "pi_step/pi_step.h"
#include "pi_step/pi_step_chunk.h"
#include "pi_step/pi_step_lazy_cpu.h"

namespace als {
namespace {

constexpr int64_t kGrain = 4;  // chunks that are worth a thread
constexpr int64_t kReads = 256;

// Lift the batch out, add up the rest, put the batch back; without `advance` only
// the normalisers are wanted.
void pass(float* u, const float* log_prior, double* scalars, int64_t n, const PiBatch& batch,
          const PiRule& rule, const PiPlan& plan, bool advance) {
  std::vector<float> lifted(batch.size);
  for (int64_t p = 0; p < batch.size; ++p) {
    if (!batch.counts(p, n)) continue;
    float& entry = u[batch.index[p]];
    lifted[p] = advance_entry(entry, advance ? ascent(batch.grad[p], rule.step) : 0.0, plan);
    entry = -INFINITY;
  }

  const PiExponent exponent = exponent_of(plan.new_scale, rule);
  const ChunkFunction sum_chunk = chunk_function(cpu_level());
  const int64_t chunks = (n + kPiChunk - 1) / kPiChunk;
  std::vector<ChunkSums> sums(chunks);
  parallel_for(chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * kPiChunk;
      const int64_t count = std::min(kPiChunk, n - first);
      if (plan.rewrite) {
        for (int64_t i = first; i < first + count; ++i) u[i] = rewrite_entry(u[i], plan);
      }
      sums[c] = sum_chunk(u + first, log_prior ? log_prior + first : nullptr, count, exponent);
    }
  });

  LogSum total, half;
  for (const ChunkSums& s : sums) {
    total.add(s.max, s.sum);
    half.add(s.max_half, s.sum_half);
  }
  for (int64_t p = 0; p < batch.size; ++p) {
    if (!batch.counts(p, n)) continue;
    const int64_t i = batch.index[p];
    u[i] = lifted[p];
    const double prior = log_prior ? rule.prior * log_prior[i] : 0.0;
    const double r = plan.new_scale * lifted[p];
    total.add(kLog2E * (prior + r), 1.0);
    half.add(kLog2E * (prior + rule.rho * (r + ascent(batch.grad[p], rule.step))), 1.0);
  }
  scalars[kPiScale] = plan.new_scale;
  scalars[kPiLogMean] = total.log_mean(n);
  scalars[kPiLogMeanHalf] = half.log_mean(n);
}

// Checks the indices and sorts them into `sorted`; `order` says where each stood. Equal ones keep
// their order: a radix sort, 8 bits at a time, of as many bits as n has.
void sort_batch(const int64_t* index, int64_t size, int64_t n, int64_t* sorted,
                std::vector<int64_t>& order) {
  for (int64_t p = 0; p < size; ++p) {
    ALS_CHECK(index[p] >= 0 && index[p] < n, "index: expected values in [0, ", n, "), got ",
              index[p], " at position ", p);
  }
  order.resize(2 * size);
  int64_t* from = order.data();
  int64_t* to = from + size;
  std::iota(from, to, int64_t{0});
  for (int shift = 0; (n - 1) >> shift > 0; shift += 8) {
    int64_t start[256] = {};
    for (int64_t p = 0; p < size; ++p) ++start[(index[p] >> shift) & 255];
    int64_t at = 0;
    for (int64_t& count : start) at += std::exchange(count, at);
    for (int64_t p = 0; p < size; ++p) to[start[(index[from[p]] >> shift) & 255]++] = from[p];
    std::swap(from, to);
  }
  if (from != order.data()) std::copy_n(from, size, order.data());
  for (int64_t p = 0; p < size; ++p) sorted[p] = index[order[p]];
}

PiLazyState lazy_state(const Tensor& u, const Tensor& scalars, const Tensor& sums,
                       const float* log_prior) {
  return {u.mutable_data_ptr<double>(), log_prior, scalars.mutable_data_ptr<double>(),
          sums.mutable_data_ptr<double>(), u.size(0)};
}

void pi_step_cpu(Tensor u, Tensor scalars, Tensor skipped, Tensor pending_index,
                 Tensor pending_grad, std::optional<Tensor> log_prior, std::optional<Tensor> sums,
                 Tensor index, std::optional<Tensor> order, Tensor loss,
                 std::optional<Tensor> found_inf, double rho, double step, double prior) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  check_pi_batch(u, skipped, pending_index, index, loss, found_inf);
  ALS_CHECK(!order, "order: expected None on the CPU, where the kernel sorts");
  if (found_inf && *found_inf->const_data_ptr<float>() != 0.0f) return;
  const int64_t n = u.size(0);
  const int64_t size = index.size(0);
  const PiLosses losses = losses_of(loss);
  auto* keys = pending_index.mutable_data_ptr<int64_t>();
  auto* grads = pending_grad.mutable_data_ptr<double>();
  std::vector<int64_t> from;
  sort_batch(index.const_data_ptr<int64_t>(), size, n, keys, from);
  int64_t unusable = 0;
  for (int64_t p = 0, head = 0; p < size; ++p) {  // in batch order within equal indices
    if (p == 0 || keys[p] != keys[p - 1]) head = p;
    grads[p] = 0.0;
    const double value = losses[from[p]];
    if (usable_loss(value)) {
      grads[head] += value;
    } else {
      ++unusable;
    }
  }
  std::fill(keys + size, keys + pending_index.size(0), std::numeric_limits<int64_t>::max());
  std::fill(grads + size, grads + pending_grad.size(0), 0.0);
  *skipped.mutable_data_ptr<int64_t>() += unusable;
  const PiBatch batch{keys, grads, size};
  const float* prior_of = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  if (sums) return lazy_step(lazy_state(u, scalars, *sums, prior_of), batch, rule);
  auto* state = scalars.mutable_data_ptr<double>();
  state[kPiHasPending] = 1.0;
  pass(u.mutable_data_ptr<float>(), prior_of, state, n, batch, rule, plan_step(state, rule), true);
}

void pi_normalize_cpu(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                      std::optional<Tensor> log_prior, std::optional<Tensor> sums, double rho,
                      double step, double prior) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  const PiBatch batch{pending_index.const_data_ptr<int64_t>(),
                      pending_grad.const_data_ptr<double>(), pending_index.size(0)};
  const float* prior_of = log_prior ? log_prior->const_data_ptr<float>() : nullptr;
  if (sums) return lazy_normalize(lazy_state(u, scalars, *sums, prior_of), batch, rule);
  auto* state = scalars.mutable_data_ptr<double>();
  pass(u.mutable_data_ptr<float>(), prior_of, state, u.size(0), batch, rule, plan_same(state),
       false);
}

Tensor pi_weight_cpu(Tensor u, Tensor scalars, Tensor pending_index, Tensor pending_grad,
                     std::optional<Tensor> log_prior, std::optional<Tensor> sums,
                     std::optional<Tensor> index, double rho, double step, double prior, bool half,
                     bool log) {
  const PiRule rule =
      check_pi_state(u, scalars, pending_index, pending_grad, log_prior, sums, rho, step, prior);
  const PiView view = view_of(u, scalars, pending_index, pending_grad, log_prior, rule);
  const Tensor keys = check_pi_index(u, index);
  const int64_t* wanted = index ? keys.const_data_ptr<int64_t>() : nullptr;
  const int64_t size = keys.size(0);
  for (int64_t p = 0; wanted != nullptr && p < size; ++p) {
    ALS_CHECK(wanted[p] >= 0 && wanted[p] < u.size(0), "index: expected values in [0, ", u.size(0),
              "), got ", wanted[p], " at position ", p);
  }
  Tensor out = empty_on(u, {size}, ScalarType::Float);
  auto* result = out.mutable_data_ptr<float>();
  parallel_for(size, 2048, [&](int64_t begin, int64_t end) {
    double entry[kReads], prior_exponent[kReads];
    for (int64_t first = begin; first < end; first += kReads) {
      const int64_t count = std::min(kReads, end - first);
      const auto at = [&](int64_t p) { return wanted ? wanted[first + p] : first + p; };
      // Entries lie all over u. With nothing to compute in between, many reads are on their way at
      // once; software prefetches are dropped where the page is not in the TLB.
      for (int64_t p = 0; p < count; ++p) entry[p] = view.entry(at(p));
      for (int64_t p = 0; p < count; ++p) prior_exponent[p] = view.prior_exponent(at(p));
      for (int64_t p = 0; p < count; ++p) {
        const double value = log_weight_of(view, at(p), entry[p], prior_exponent[p], half);
        result[first + p] = static_cast<float>(log ? value : exp_of(value));
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CPU, m) {
  m.impl("pi_step_", TORCH_BOX(&als::pi_step_cpu));
  m.impl("pi_normalize_", TORCH_BOX(&als::pi_normalize_cpu));
  m.impl("pi_weight", TORCH_BOX(&als::pi_weight_cpu));
}
