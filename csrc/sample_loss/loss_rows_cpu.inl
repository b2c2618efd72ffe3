// The row loops of the CPU kernels; loss_rows_isa.h includes this once an instruction set, with
// kVectorBytes.
//
// Rows are taken in blocks whose exponentials fit the L1 cache. Everything a row needs once (logs,
// powers, divisions) is done for a whole block in vectors. Two layouts of a block:
//
//   by row    a row of 16 classes or more fills whole vectors: each row starts on one, and the
//             surplus of its last vector holds the logit -inf, whose exponential adds nothing.
//   by class  a row of fewer classes would leave most of a vector empty: the block is transposed,
//             and a vector holds one class of many rows.

constexpr int kLanes = 16;  // of every sum and maximum, whatever the instruction set
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockElements = 4096;

template <typename T, int kWidth>
struct VectorOf {
  typedef T type __attribute__((vector_size(kWidth * sizeof(T))));
};

template <typename V, typename T>
inline __attribute__((always_inline)) V load_vector(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename T>
constexpr T kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Joins the lanes of a vector: the lower half with the upper one, and so on.
template <typename T, int kWidth, class Join>
inline __attribute__((always_inline)) T fold_vector(const typename VectorOf<T, kWidth>::type& v,
                                                    const Join& join) {
  if constexpr (kWidth == 2) {
    return join(v[0], v[1]);
  } else {
    using Half = typename VectorOf<T, kWidth / 2>::type;
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    return fold_vector<T, kWidth / 2>(join(half[0], half[1]), join);
  }
}

// Joins x[0] ... x[n - 1], n a multiple of kLanes, and kLanes more at `tail` if that is not null,
// into kLanes chains and those pairwise: one order on every instruction set. Four vectors of kLanes
// at a time hide the latency.
template <typename T, class Join>
inline __attribute__((always_inline)) T fold(const T* x, int64_t n, const T* tail, T start,
                                             const Join& join) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  using V = typename VectorOf<T, kWidth>::type;
  constexpr int kParts = kLanes / kWidth;
  static_assert(kWidth * kParts == kLanes);
  V first[kParts];
  for (int p = 0; p < kParts; ++p) first[p] = V{} + start;
  int64_t j = 0;
  if (n >= 8 * kLanes) {
    V chain[4][kParts];
    for (int u = 0; u < 4; ++u) {
      for (int p = 0; p < kParts; ++p) chain[u][p] = V{} + start;
    }
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) {
        for (int p = 0; p < kParts; ++p) {
          chain[u][p] = join(chain[u][p], load_vector<V>(x + j + u * kLanes + p * kWidth));
        }
      }
    }
    for (int p = 0; p < kParts; ++p) {
      first[p] = join(join(chain[0][p], chain[1][p]), join(chain[2][p], chain[3][p]));
    }
  }
  for (; j < n; j += kLanes) {
    for (int p = 0; p < kParts; ++p) first[p] = join(first[p], load_vector<V>(x + j + p * kWidth));
  }
  if (tail) {
    for (int p = 0; p < kParts; ++p) first[p] = join(first[p], load_vector<V>(tail + p * kWidth));
  }
  for (int parts = kParts / 2; parts > 0; parts /= 2) {
    for (int p = 0; p < parts; ++p) first[p] = join(first[p], first[p + parts]);
  }
  return fold_vector<T, kWidth>(first[0], join);
}

// Sum of x[0] ... x[n - 1], n a multiple of kLanes; a chain adds at most 256 numbers before they go
// to float64.
template <typename T>
inline T sum_of(const T* x, int64_t n) {
  constexpr int64_t kRun = 256 * 4 * kLanes;
  const auto add = [](auto a, auto b) { return a + b; };
  if (n <= kRun) return fold<T>(x, n, nullptr, 0, add);
  double total = 0;
  for (int64_t j = 0; j < n; j += kRun) {
    total += fold<T>(x + j, std::min(kRun, n - j), nullptr, 0, add);
  }
  return static_cast<T>(total);
}

// Sum of term(0) ... term(n - 1), for what is not in memory.
template <typename T, class Term>
inline T sum_of_terms(int64_t n, const Term& term) {
  constexpr int64_t kRun = 8 * kLanes;
  T run[kRun];
  double total = 0;
  int64_t j = 0;
  for (; j + kRun <= n; j += kRun) {
    for (int64_t k = 0; k < kRun; ++k) run[k] = term(j + k);
    total += sum_of(run, kRun);
  }
  const int64_t rest = n - j, padded = (rest + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = 0; k < rest; ++k) run[k] = term(j + k);
  for (int64_t k = rest; k < padded; ++k) run[k] = 0;
  return static_cast<T>(total + sum_of(run, padded));
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

template <typename scalar_t, typename grad_t, bool kByClass>
struct Rows {
  using T = accumulate_t<scalar_t>;
  using Job = LossJob<scalar_t, grad_t>;

  const Job& job;
  const int64_t end;  // of the rows that this call computes
  const SideTarget side = job.spec.side();
  const bool entropy = job.spec.needs_entropy();
  const int64_t classes = job.classes;
  const int64_t whole = classes / kLanes * kLanes;  // classes in whole vectors
  const int64_t padded = (classes + kLanes - 1) / kLanes * kLanes;
  const int64_t block_rows =
      kByClass ? kBlockRows : std::clamp<int64_t>(kBlockElements / padded, 1, kBlockRows);
  const int64_t size = kByClass ? classes * kBlockRows : block_rows * padded;
  std::vector<T> memory = std::vector<T>((entropy ? 2 : 1) * size + 64 / sizeof(T));
  T* const e_buffer = aligned(memory.data());  // differences to the maximum, then exponentials
  T* const d_buffer = e_buffer + size;         // differences, with entropy
  Block<T> block = {};

  static T* aligned(T* p) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
  }
  // Row i, class c of a buffer.
  T& at(T* buffer, int64_t i, int64_t c) const {
    return kByClass ? buffer[c * kBlockRows + i] : buffer[i * padded + c];
  }
  SideWeights<T> side_weights(int64_t r) const {
    const T eps = job.spec.label_smoothing;
    return {job.dense ? job.dense + r * classes : nullptr, job.class_weight, 1 - eps,
            eps / static_cast<T>(classes)};
  }

  // By row: the logits of row r as T, in the buffer or, where that is their type, where they are;
  // those beyond the last whole vector always in the buffer, followed by -inf.
  void load_row(T* d, int64_t r) const {
    const scalar_t* z = job.row(r);
    if constexpr (!std::is_same_v<scalar_t, T>) {
      for (int64_t c = 0; c < whole; ++c) d[c] = static_cast<T>(z[c]);
    }
    const int rest = static_cast<int>(classes - whole);
    if (rest == 0) return;
    T tail[kLanes];
    if (r + 1 < job.rows && job.row_stride >= kLanes) {  // what follows is the next row
      for (int k = 0; k < kLanes; ++k) tail[k] = static_cast<T>(z[whole + k]);
    } else {
      for (int k = 0; k < rest; ++k) tail[k] = static_cast<T>(z[whole + k]);
      for (int k = rest; k < kLanes; ++k) tail[k] = 0;
    }
    // A vector at a time: GCC takes a loop of selects over so few apart into single numbers.
    constexpr int kWidth = kVectorBytes / sizeof(T);
    using V = typename VectorOf<T, kWidth>::type;
    for (int k = 0; k < kLanes; k += kWidth) {
      const V lane = load_vector<V>(kLaneNumbers<T> + k), v = load_vector<V>(tail + k);
      const V kept = lane < V{} + static_cast<T>(rest) ? v : V{} + T(-INFINITY);
      std::memcpy(d + whole + k, &kept, sizeof kept);
    }
  }
  const T* loaded(const T* d, int64_t r) const {
    if constexpr (std::is_same_v<scalar_t, T>) {
      return job.row(r);
    } else {
      return d;
    }
  }

  // d = f(logits - max) for what load_row has loaded.
  template <class F>
  void map_row(T* __restrict__ d, int64_t r, T max, const F& f) const {
    if constexpr (std::is_same_v<scalar_t, T>) {
      const T* __restrict__ z = job.row(r);
      for (int64_t c = 0; c < whole; ++c) d[c] = f(z[c] - max);
    } else {
      for (int64_t c = 0; c < whole; ++c) d[c] = f(d[c] - max);
    }
    if (whole == padded) return;
    T* tail = d + whole;
    for (int k = 0; k < kLanes; ++k) tail[k] = f(tail[k] - max);
  }

  void differences_by_row(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = begin + i;
      T* d = e_buffer + i * padded;
      load_row(d, r);
      // NaN compares false: it is found in the exponentials
      block.max[i] = job.state_in
                         ? job.state_in[3 * r]
                         : fold(loaded(d, r), whole, whole < padded ? d + whole : nullptr,
                                T(-INFINITY), [](auto a, auto b) { return b > a ? b : a; });
    }
    if (side == SideTarget::kNone && !entropy) {  // nothing else is asked about the differences
      for (int64_t i = 0; i < rows; ++i) {
        map_row(e_buffer + i * padded, begin + i, block.max[i],
                [](T x) { return exp_of_nonpositive(x); });
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      map_row(e_buffer + i * padded, begin + i, block.max[i], [](T x) { return x; });
    }
    side_sums(begin, rows);
    exponentials(rows * padded);
  }

  void differences_by_class(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const scalar_t* z = job.row(begin + i);
      for (int64_t c = 0; c < classes; ++c) {
        e_buffer[c * kBlockRows + i] = static_cast<T>(z[c]);
      }
    }
    T max[kBlockRows];
    if (job.state_in) {
      for (int64_t i = 0; i < rows; ++i) max[i] = job.state_in[3 * (begin + i)];
      for (int64_t i = rows; i < kBlockRows; ++i) max[i] = 0;
    } else {
      for (int64_t i = 0; i < kBlockRows; ++i) max[i] = T(-INFINITY);
      for (int64_t c = 0; c < classes; ++c) {
        const T* z = e_buffer + c * kBlockRows;
        for (int64_t i = 0; i < kBlockRows; ++i) max[i] = z[i] > max[i] ? z[i] : max[i];
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      T* d = e_buffer + c * kBlockRows;
      for (int64_t i = 0; i < kBlockRows; ++i) d[i] -= max[i];
    }
    std::copy_n(max, kBlockRows, block.max);
    side_sums(begin, rows);
    exponentials(size);
  }

  void exponentials(int64_t n) {
    T* e = e_buffer;
    if (entropy) std::copy_n(e, n, d_buffer);
    for (int64_t j = 0; j < n; ++j) e[j] = exp_of_nonpositive(e[j]);
  }

  // What the loss needs beside the softmax, from the differences.
  void side_sums(int64_t begin, int64_t rows) {
    if (side == SideTarget::kArgmax) {
      for (int64_t i = 0; i < rows; ++i) {
        int64_t top = 0;
        while (top < classes - 1 && at(e_buffer, i, top) != 0) ++top;
        block.top[i] = top;
      }
    } else if (side != SideTarget::kNone) {
      if (job.state_in) {
        for (int64_t i = 0; i < rows; ++i) block.side_mass[i] = job.state_in[3 * (begin + i) + 2];
      } else if constexpr (kByClass) {
        side_sums_by_class(begin, rows);
      } else {
        side_sums_by_row(begin, rows);
      }
      std::copy_n(block.side_mass, rows, block.extra);
    }
  }
  void side_sums_by_row(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const SideWeights<T> q = side_weights(begin + i);
      const T* d = e_buffer + i * padded;
      block.side_mass[i] = sum_of_terms<T>(classes, [&q](int64_t c) { return q(c); });
      block.side[i] = sum_of_terms<T>(classes, [&q, d](int64_t c) { return weighted(q(c), d[c]); });
    }
  }
  void side_sums_by_class(int64_t begin, int64_t rows) {
    T mass[kBlockRows] = {}, sum[kBlockRows] = {}, q[kBlockRows] = {};
    for (int64_t c = 0; c < classes; ++c) {
      if (job.dense) {
        for (int64_t i = 0; i < rows; ++i) q[i] = side_weights(begin + i)(c);
      } else {
        std::fill_n(q, kBlockRows, side_weights(begin)(c));
      }
      const T* d = e_buffer + c * kBlockRows;
      for (int64_t i = 0; i < kBlockRows; ++i) mass[i] += q[i];
      for (int64_t i = 0; i < kBlockRows; ++i) sum[i] += weighted(q[i], d[i]);
    }
    std::copy_n(mass, kBlockRows, block.side_mass);
    std::copy_n(sum, kBlockRows, block.side);
  }

  // What the rows of a block are given, and what their class index says.
  void look_up(int64_t begin, int64_t rows) {
    Block<T>& b = block;
    if (job.grad) std::copy_n(job.scale + begin, rows, b.scale);
    std::fill_n(b.class_weight, rows, T(1));
    if (job.index) {
      const int64_t* index = job.index + begin;
      for (int64_t i = 0; i < rows; ++i) {
        b.fate[i] = fate_of(index[i], classes, job.ignore_index);
        b.y[i] = b.fate[i] == RowFate::kLoss ? index[i] : 0;
      }
      for (int64_t i = 0; i < rows; ++i) {
        b.log_hit[i] = static_cast<T>(job.row(begin + i)[b.y[i]]) - b.max[i];
        b.hit[i] = at(e_buffer, i, b.y[i]);
      }
      if (job.class_weight) {
        for (int64_t i = 0; i < rows; ++i) b.class_weight[i] = job.class_weight[b.y[i]];
      }
    }
    for (int64_t i = 0; i < rows && side != SideTarget::kNone; ++i) {
      if (side == SideTarget::kArgmax) {
        b.side_mass[i] = b.class_weight[i] * (1 - job.spec.parameters[0]);
        b.target_side[i] = b.top[i] == b.y[i] ? b.side_mass[i] : T(0);
      } else if (job.index) {
        b.target_side[i] = side_weights(begin + i)(b.y[i]);
      }
    }
    for (int64_t i = 0; i < rows && job.state_in; ++i) {
      b.rest[i] = job.state_in[3 * (begin + i) + 1];
      if (entropy) b.extra[i] = job.state_in[3 * (begin + i) + 2];
    }
  }

  void sums(int64_t rows) {
    if (job.state_in) return;
    if (entropy) add_entropies(rows);
    if (job.index) {  // without the target, so that 1 - p_y has no cancellation
      for (int64_t i = 0; i < rows; ++i) at(e_buffer, i, block.y[i]) = 0;
    }
    if constexpr (kByClass) {
      T rest[kBlockRows] = {};
      for (int64_t c = 0; c < classes; ++c) {
        const T* e = e_buffer + c * kBlockRows;
        for (int64_t i = 0; i < kBlockRows; ++i) rest[i] += e[i];
      }
      std::copy_n(rest, kBlockRows, block.rest);
    } else {
      for (int64_t i = 0; i < rows; ++i) block.rest[i] = sum_of(e_buffer + i * padded, padded);
    }
    if (job.index) {
      for (int64_t i = 0; i < rows; ++i) at(e_buffer, i, block.y[i]) = block.hit[i];
    }
  }

  void add_entropies(int64_t rows) {
    if constexpr (kByClass) {
      T extra[kBlockRows] = {};
      for (int64_t c = 0; c < classes; ++c) {
        const T *e = e_buffer + c * kBlockRows, *d = d_buffer + c * kBlockRows;
        for (int64_t i = 0; i < kBlockRows; ++i) extra[i] += weighted(e[i], d[i]);
      }
      std::copy_n(extra, kBlockRows, block.extra);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        const T *e = e_buffer + i * padded, *d = d_buffer + i * padded;
        block.extra[i] =
            sum_of_terms<T>(padded, [e, d](int64_t c) { return weighted(e[c], d[c]); });
      }
    }
  }

  void finish(int64_t rows) {
    // Whole vectors of rows; the surplus holds numbers of earlier rows or zeros, and is not used.
    const int64_t whole_rows = (rows + kLanes - 1) / kLanes * kLanes;
    visit_loss(job.spec, [&](const auto& loss) {
      Block<T>& b = block;
      for (int64_t i = 0; i < whole_rows; ++i) {
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

  // g dL/dz of row r, but for corrections. Whole vectors, whose surplus falls on the next row,
  // which is written later; the last row of the range is written exactly.
  void write_row(int64_t i, int64_t r, grad_t* __restrict__ out) const {
    const T* __restrict__ e = e_buffer + i * padded;
    const int64_t n = r + 1 < end ? padded : classes;
    const T linear = block.linear[i];
    if (entropy) {
      const T* d = d_buffer + i * padded;
      const T log = block.log[i];
      for (int64_t c = 0; c < n; ++c) store(out + c, softmax_slope(e[c], d[c], linear, log));
    } else if (has_side_weights()) {
      const SideWeights<T> q = side_weights(r);
      const T scale = block.scale[i];
      for (int64_t c = 0; c < classes; ++c) store(out + c, e[c] * linear - scale * q(c));
    } else {
      for (int64_t c = 0; c < n; ++c) store(out + c, e[c] * linear);
    }
  }

  // The same by class: in the buffer for all rows, and from there to a row.
  void scale_block() {
    for (int64_t c = 0; c < classes; ++c) {
      T* e = e_buffer + c * kBlockRows;
      if (entropy) {
        const T* d = d_buffer + c * kBlockRows;
        for (int64_t i = 0; i < kBlockRows; ++i) {
          e[i] = softmax_slope(e[i], d[i], block.linear[i], block.log[i]);
        }
      } else {
        for (int64_t i = 0; i < kBlockRows; ++i) e[i] *= block.linear[i];
      }
    }
  }
  void transpose_row(int64_t i, int64_t r, grad_t* __restrict__ out) const {
    const T* __restrict__ e = e_buffer + i;
    if (has_side_weights()) {
      const SideWeights<T> q = side_weights(r);
      const T scale = block.scale[i];
      for (int64_t c = 0; c < classes; ++c) store(out + c, e[c * kBlockRows] - scale * q(c));
    } else {
      for (int64_t c = 0; c < classes; ++c) store(out + c, e[c * kBlockRows]);
    }
  }

  bool has_side_weights() const {
    return side == SideTarget::kSmoothing || side == SideTarget::kProbabilities;
  }

  void write(int64_t begin, int64_t rows) {
    if constexpr (kByClass) scale_block();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = begin + i;
      grad_t* out = job.grad + r * classes;
      if (block.fate[i] != RowFate::kLoss) {
        for (int64_t c = 0; c < classes; ++c) store(out + c, by_fate(i, T(0)));
        continue;
      }
      if constexpr (kByClass) {
        transpose_row(i, r, out);
      } else {
        write_row(i, r, out);
      }
      if (side == SideTarget::kArgmax) {
        const int64_t top = block.top[i];
        const T e = at(e_buffer, i, top);
        store(out + top,
              (kByClass ? e : e * block.linear[i]) - block.scale[i] * block.side_mass[i]);
      }
      if (job.index) store(out + block.y[i], block.at_target[i]);
    }
  }

  T by_fate(int64_t i, T value) const {
    const RowFate fate = block.fate[i];
    return fate == RowFate::kLoss ? value : fate == RowFate::kIgnored ? T(0) : T(NAN);
  }

  void run(int64_t begin, int64_t rows) {
    if constexpr (kByClass) {
      differences_by_class(begin, rows);
    } else {
      differences_by_row(begin, rows);
    }
    look_up(begin, rows);
    sums(rows);
    finish(rows);
    for (int64_t i = 0; i < rows && job.losses; ++i) {
      job.losses[begin + i] = by_fate(i, block.loss[i]);
    }
    for (int64_t i = 0; i < rows && job.state_out; ++i) {
      T* state = job.state_out + 3 * (begin + i);
      state[0] = block.max[i];
      state[1] = block.rest[i];
      state[2] = block.extra[i];
    }
    if (job.grad) write(begin, rows);
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
      const T total = sum_of_terms<T>(
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

template <bool kByClass, typename scalar_t, typename grad_t>
void softmax_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end) {
  Rows<scalar_t, grad_t, kByClass> rows{job, end};
  for (; begin < end; begin += rows.block_rows) {
    rows.run(begin, std::min(rows.block_rows, end - begin));
  }
}

template <typename scalar_t, typename grad_t>
void loss_rows(const LossJob<scalar_t, grad_t>& job, int64_t begin, int64_t end) {
  if (job.spec.kind == LossKind::kSquaredError) return squared_error_rows(job, begin, end);
  if (job.classes < kLanes) return softmax_rows<true>(job, begin, end);
  softmax_rows<false>(job, begin, end);
}
