// The row loops of the CPU kernels; loss_rows_isa.h includes this once an instruction set.
//
// Rows are taken in blocks whose exponentials fit the L1 cache. Everything a row needs once (logs,
// powers, divisions) is done for a whole block in vectors, and exp runs over the block as one flat
// array, so that 10 classes cost no more an element than 1000.

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockElements = 6144;

constexpr int kLanes = 64, kFewLanes = 8;

// join(... term(begin) ... term(end - 1)), in as many chains as GCC can put into vectors. The order
// is the same on every instruction set.
template <typename T, class Term, class Join>
inline T fold(int64_t begin, int64_t end, T start, const Term& term, const Join& join) {
  int64_t i = begin;
  T rest = start;
  if (end - i < 2 * kFewLanes) {  // ten classes: the rows of a block overlap, lanes would not pay
    for (; i < end; ++i) rest = join(rest, term(i));
    return rest;
  }
  T lane[kLanes];
  for (int k = 0; k < kFewLanes; ++k) lane[k] = start;
  if (end - i >= kLanes) {
    for (int k = kFewLanes; k < kLanes; ++k) lane[k] = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) lane[k] = join(lane[k], term(i + k));
    }
    for (int width = kLanes / 2; width >= kFewLanes; width /= 2) {
      for (int k = 0; k < width; ++k) lane[k] = join(lane[k], lane[k + width]);
    }
  }
  for (; i + kFewLanes <= end; i += kFewLanes) {
    for (int k = 0; k < kFewLanes; ++k) lane[k] = join(lane[k], term(i + k));
  }
  for (int width = kFewLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lane[k] = join(lane[k], lane[k + width]);
  }
  for (; i < end; ++i) rest = join(rest, term(i));
  return join(lane[0], rest);
}

template <typename T>
T max_of(const T* x, int64_t n) {  // NaN compares false: it is found in the exponentials
  return fold(
      int64_t{0}, n, T(-INFINITY), [x](int64_t i) { return x[i]; },
      [](T a, T b) { return b > a ? b : a; });
}

// Sum of term(i); a lane adds at most 256 numbers before they go to float64.
template <typename T, class Term>
inline T sum_of(int64_t n, const Term& term) {
  constexpr int64_t kRun = 256 * kLanes;
  double total = 0;
  for (int64_t i = 0; i < n; i += kRun) {
    total += fold(i, std::min(n, i + kRun), T(0), term, [](T a, T b) { return a + b; });
  }
  return static_cast<T>(total);
}

// As T: the logits themselves where that is their type, else converted into the buffer.
template <typename T>
const T* as_real(const T* z, T*, int64_t) {
  return z;
}
template <typename T, typename scalar_t>
const T* as_real(const scalar_t* z, T* buffer, int64_t n) {
  for (int64_t c = 0; c < n; ++c) buffer[c] = static_cast<T>(z[c]);
  return buffer;
}

template <typename grad_t, typename T>
inline __attribute__((always_inline)) void store(grad_t* out, T value) {
  *out = static_cast<grad_t>(value);
}
inline __attribute__((always_inline)) void store(BFloat16* out, float value) {
  uint32_t bits;  // round to nearest, ties to even, without a branch
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto half = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  std::memcpy(out, &half, sizeof half);
}

// What the rows of a block need once, one array a quantity.
template <typename T>
struct Block {
  RowFate fate[kBlockRows];
  int64_t y[kBlockRows];    // class index, 0 where the row has none that may be used
  int64_t top[kBlockRows];  // arg max, hard bootstrap only
  T max[kBlockRows], rest[kBlockRows], extra[kBlockRows], side[kBlockRows];
  T hit[kBlockRows], log_hit[kBlockRows], class_weight[kBlockRows];
  T side_mass[kBlockRows], target_side[kBlockRows], scale[kBlockRows];
  T loss[kBlockRows], linear[kBlockRows], log[kBlockRows], at_target[kBlockRows];
};

template <typename scalar_t, typename grad_t>
struct Rows {
  using T = accumulate_t<scalar_t>;
  using Job = LossJob<scalar_t, grad_t>;

  const Job& job;
  const SideTarget side = job.spec.side();
  const bool entropy = job.spec.needs_entropy();
  const int64_t classes = job.classes;
  const int64_t block_rows = std::clamp<int64_t>(kBlockElements / classes, 1, kBlockRows);
  std::vector<T> e_buffer = std::vector<T>(block_rows * classes);
  std::vector<T> d_buffer = std::vector<T>(entropy ? block_rows * classes : 0);
  Block<T> block = {};

  SideWeights<T> side_weights(int64_t r) const {
    const T eps = job.spec.label_smoothing;
    return {job.dense ? job.dense + r * classes : nullptr, job.class_weight, 1 - eps,
            eps / static_cast<T>(classes)};
  }

  // Differences to the row's maximum, and what has to be known before they turn into exponentials.
  void differences(int64_t i, int64_t r) {
    T* d = e_buffer.data() + i * classes;
    const T* z = as_real(job.row(r), d, classes);
    const T max = job.state_in ? job.state_in[3 * r] : max_of(z, classes);
    for (int64_t c = 0; c < classes; ++c) d[c] = z[c] - max;
    block.max[i] = max;
    block.side[i] = 0;
    if (job.index) {
      const int64_t y = job.index[r];
      block.fate[i] = fate_of(y, classes, job.ignore_index);
      block.y[i] = block.fate[i] == RowFate::kLoss ? y : 0;
      block.log_hit[i] = d[block.y[i]];
      block.class_weight[i] = job.class_weight ? job.class_weight[block.y[i]] : T(1);
    } else {
      block.class_weight[i] = 1;
    }
    block.scale[i] = job.grad ? job.scale[r] : T(0);
    if (side == SideTarget::kArgmax) {
      int64_t top = 0;
      while (top < classes - 1 && d[top] != 0) ++top;
      block.top[i] = top;
      block.side_mass[i] = block.class_weight[i] * (1 - job.spec.parameters[0]);
      block.target_side[i] = top == block.y[i] ? block.side_mass[i] : T(0);
    } else if (side != SideTarget::kNone) {
      const SideWeights<T> q = side_weights(r);
      if (job.index) block.target_side[i] = q(block.y[i]);
      if (job.state_in) {
        block.side_mass[i] = job.state_in[3 * r + 2];
      } else {
        block.side_mass[i] = sum_of<T>(classes, [&](int64_t c) { return q(c); });
        block.side[i] = sum_of<T>(classes, [&](int64_t c) { return weighted(q(c), d[c]); });
      }
      block.extra[i] = block.side_mass[i];
    }
  }

  void sums(int64_t i, int64_t r) {
    T* e = e_buffer.data() + i * classes;
    if (job.index) block.hit[i] = e[block.y[i]];
    if (job.state_in) {
      block.rest[i] = job.state_in[3 * r + 1];
      if (entropy) block.extra[i] = job.state_in[3 * r + 2];
      return;
    }
    if (job.index) e[block.y[i]] = 0;
    block.rest[i] = sum_of<T>(classes, [e](int64_t c) { return e[c]; });
    if (job.index) e[block.y[i]] = block.hit[i];
    if (entropy) {
      const T* d = d_buffer.data() + i * classes;
      block.extra[i] = sum_of<T>(classes, [e, d](int64_t c) { return weighted(e[c], d[c]); });
    }
  }

  void finish(int64_t rows) {
    // Whole vectors of rows; the surplus holds numbers of earlier rows or zeros, and is not used.
    const int64_t padded = std::min<int64_t>(kBlockRows, (rows + 15) / 16 * 16);
    visit_loss(job.spec, [&](const auto& loss) {
      Block<T>& b = block;
      for (int64_t i = 0; i < padded; ++i) {
        const RowResult<T> r =
            finish_row(loss, RowSums<T>{b.max[i], b.rest[i], b.extra[i], b.side[i]},
                       RowTarget<T>{b.hit[i], b.log_hit[i], b.class_weight[i], b.side_mass[i],
                                    b.target_side[i]},
                       b.scale[i]);
        b.loss[i] = r.loss;
        b.linear[i] = r.linear;
        b.log[i] = r.log;
        b.at_target[i] = r.at_target;
      }
    });
  }

  void write_gradient(int64_t i, int64_t r) const {
    grad_t* __restrict__ out = job.grad + r * classes;
    if (block.fate[i] != RowFate::kLoss) {
      const T value = block.fate[i] == RowFate::kIgnored ? T(0) : T(NAN);
      for (int64_t c = 0; c < classes; ++c) store(out + c, value);
      return;
    }
    const T* e = e_buffer.data() + i * classes;
    const T linear = block.linear[i];
    if (entropy) {
      const T* d = d_buffer.data() + i * classes;
      const T log = block.log[i];
      for (int64_t c = 0; c < classes; ++c) {
        store(out + c, softmax_slope(e[c], d[c], linear, log));
      }
    } else if (side == SideTarget::kSmoothing || side == SideTarget::kProbabilities) {
      const SideWeights<T> q = side_weights(r);
      const T scale = block.scale[i];
      for (int64_t c = 0; c < classes; ++c) store(out + c, e[c] * linear - scale * q(c));
    } else {
      for (int64_t c = 0; c < classes; ++c) store(out + c, e[c] * linear);
      if (side == SideTarget::kArgmax) {
        const int64_t top = block.top[i];
        store(out + top, e[top] * linear - block.scale[i] * block.side_mass[i]);
      }
    }
    if (job.index) store(out + block.y[i], block.at_target[i]);
  }

  void run(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) differences(i, begin + i);
    T* e = e_buffer.data();
    const int64_t n = rows * classes;
    if (entropy) std::copy_n(e, n, d_buffer.data());
    for (int64_t j = 0; j < n; ++j) e[j] = exp_of_nonpositive(e[j]);
    for (int64_t i = 0; i < rows; ++i) sums(i, begin + i);
    finish(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = begin + i;
      if (job.losses) {
        const RowFate fate = block.fate[i];
        job.losses[r] = fate == RowFate::kLoss      ? block.loss[i]
                        : fate == RowFate::kIgnored ? T(0)
                                                    : T(NAN);
      }
      if (job.state_out) {
        job.state_out[3 * r] = block.max[i];
        job.state_out[3 * r + 1] = block.rest[i];
        job.state_out[3 * r + 2] = block.extra[i];
      }
      if (job.grad) write_gradient(i, r);
    }
  }
};

template <typename scalar_t, typename grad_t>
void squared_error_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end) {
  using T = accumulate_t<scalar_t>;
  const int64_t size = job.classes;
  for (int64_t r = begin; r < end; ++r) {
    const scalar_t* z = job.row(r);
    const T* t = job.dense + r * size;
    if (job.losses) {
      const T total = sum_of<T>(
          size, [z, t](int64_t j) { return squared_error_term(static_cast<T>(z[j]), t[j]); });
      job.losses[r] = total / static_cast<T>(size);
    }
    if (job.grad) {
      const T scale = 2 * job.scale[r] / static_cast<T>(size);
      grad_t* out = job.grad + r * size;
      for (int64_t j = 0; j < size; ++j) {
        store(out + j, squared_error_slope(static_cast<T>(z[j]), t[j], scale));
      }
    }
  }
}

template <typename scalar_t, typename grad_t>
void loss_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end) {
  if (job.spec.kind == LossKind::kSquaredError) return squared_error_rows(job, begin, end);
  Rows<scalar_t, grad_t> rows{job};
  for (; begin < end; begin += rows.block_rows) {
    rows.run(begin, std::min(rows.block_rows, end - begin));
  }
}
