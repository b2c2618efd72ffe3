#include "pi_step/pi_step_lazy_cpu.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "pi_step/pi_step_lazy_rows.h"

namespace als {
namespace {

constexpr int64_t kChunk = 8192;  // entries of a work item
constexpr int64_t kRun = 512;     // entries whose powers are added in a row, in lanes
constexpr int64_t kGrain = 4;     // chunks that are worth a thread
constexpr int64_t kChain = kRun / kPiSumsLanes + 3 + kChunk / kRun;

double prior_of(const PiLazyState& s, const PiRule& rule, int64_t i) {
  return s.log_prior ? rule.prior * s.log_prior[i] : 0.0;
}

const float* prior_at(const PiLazyState& s, int64_t first) {
  return s.log_prior ? s.log_prior + first : nullptr;
}

// body(chunk, first entry, entries) over all chunks, in parallel.
template <typename Body>
void for_chunks(int64_t n, const Body& body) {
  parallel_for((n + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      body(c, c * kChunk, std::min(kChunk, n - c * kChunk));
    }
  });
}

// New power sums at the present scale of entries in [low, high].
void make_sums(const PiLazyState& s, const PiRule& rule, double low, double high) {
  start_sums(s.sums, low, high, s.scalars[kPiScale], s.scalars[kPiLogMean]);
  const PiFrame frame = PiFrame::of(s.sums);
  const PiLazyRows& rows = lazy_rows(cpu_level());
  std::vector<double> moments((s.n + kChunk - 1) / kChunk * kPiMoments);
  for_chunks(s.n, [&](int64_t c, int64_t first, int64_t count) {
    for (int64_t at = first; at < first + count; at += kRun) {
      rows.add_moments(s.u + at, prior_at(s, at), std::min(kRun, first + count - at), frame,
                       rule.prior, moments.data() + c * kPiMoments);
    }
  });
  const auto n = static_cast<double>(s.n);
  for (size_t at = 0; at < moments.size(); ++at) {
    add_moment(s.sums, static_cast<int>(at % kPiMoments), moments[at] / n);
  }
  end_sums(s.sums, kChain);
}

// Both normalisers from all entries; those of the batch are lifted out and added by themselves, so
// that nothing is ever subtracted. `plan` rewrites the entries first, if it says so.
void exact_pass(const PiLazyState& s, const PiBatch& batch, const PiRule& rule, const PiPlan& plan,
                bool sums) {
  std::vector<double> lifted(batch.size);
  for (int64_t p = 0; p < batch.size; ++p) {
    if (!batch.counts(p, s.n)) continue;
    double& entry = s.u[batch.index[p]];
    lifted[p] = plan.rewrite ? rewrite_entry(entry, plan) : entry;
    entry = -INFINITY;
  }
  const PiLazyRows& rows = lazy_rows(cpu_level());
  std::vector<PiNormalisers> parts((s.n + kChunk - 1) / kChunk);
  for_chunks(s.n, [&](int64_t c, int64_t first, int64_t count) {
    double* u = s.u + first;
    if (plan.rewrite) {
      for (int64_t i = 0; i < count; ++i) u[i] = rewrite_entry(u[i], plan);
    }
    parts[c] = rows.normalise(u, prior_at(s, first), count, plan.new_scale,
                              rule.rho * plan.new_scale, rule.prior);
  });
  PiNormalisers all;
  for (const PiNormalisers& part : parts) all.add(part);
  for (int64_t p = 0; p < batch.size; ++p) {
    if (!batch.counts(p, s.n)) continue;
    const int64_t i = batch.index[p];
    s.u[i] = lifted[p];
    all.add_entry(lifted[p], prior_of(s, rule, i), ascent(batch.grad[p], rule.step), plan.new_scale,
                  rule.rho);
  }
  s.scalars[kPiScale] = plan.new_scale;
  s.scalars[kPiLogMean] = all.total.log_mean(s.n);
  s.scalars[kPiLogMeanHalf] = all.half.log_mean(s.n);
  if (sums) make_sums(s, rule, all.low, all.high);
}

}  // namespace

void lazy_step(const PiLazyState& s, const PiBatch& batch, const PiRule& rule) {
  const PiLazyPlan plan = plan_lazy(s.scalars, rule);
  const double scale = plan.step.new_scale;
  const int64_t room = (batch.size + kPiBatchRows - 1) / kPiBatchRows * kPiBatchRows;
  std::vector<double> rows(4 * room);
  double* const old_u = rows.data();
  double* const new_u = old_u + room;
  double* const x = new_u + room;
  double* const gain = x + room;
  std::vector<int64_t> index(batch.size);
  int64_t count = 0;
  for (int64_t p = 0; p < batch.size; ++p) {
    if (!batch.counts(p, s.n)) continue;
    gain[count] = ascent(batch.grad[p], rule.step);
    index[count++] = batch.index[p];
  }
  // Entries lie all over u: with nothing to compute in between, many reads are on their way at
  // once.
  for (int64_t p = 0; p < count; ++p) old_u[p] = s.u[index[p]];
  for (int64_t p = 0; p < count; ++p) x[p] = prior_of(s, rule, index[p]);
  for (int64_t p = 0; p < count; ++p) new_u[p] = advance_entry(old_u[p], gain[p], plan.step);
  for (int64_t p = 0; p < count; ++p) s.u[index[p]] = new_u[p];
  const int64_t padded = (count + kPiBatchRows - 1) / kPiBatchRows * kPiBatchRows;
  for (int64_t p = count; p < padded; ++p) {
    old_u[p] = new_u[p] = -INFINITY;
    x[p] = gain[p] = 0.0;
  }
  const auto n = static_cast<double>(s.n);
  double moments[kPiMoments];
  PiChange change = lazy_rows(cpu_level())
                        .change({old_u, new_u, x, gain, padded}, PiFrame::of(s.sums), scale,
                                rule.rho, level_at(s.sums, rule.rho * scale), moments);
  change.mass /= n;
  change.half /= n;
  change.half_mass /= n;
  if (s.sums[kPiPauseLeft] == 0.0) {
    for (int j = 0; j < kPiMoments; ++j) add_moment(s.sums, j, moments[j] / n);
  }
  const PiDemand demand = settle(s.scalars, s.sums, rule, plan, change, batch.size);
  if (demand == PiDemand::kNothing) return;
  exact_pass(s, batch, rule, plan.after, demand == PiDemand::kSums);
}

void lazy_normalize(const PiLazyState& s, const PiBatch& batch, const PiRule& rule) {
  exact_pass(s, batch, rule, plan_same(s.scalars), true);
}

}  // namespace als
