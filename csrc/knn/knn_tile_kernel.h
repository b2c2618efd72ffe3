// Body of the scoring kernel, compiled once per instruction set: the including file sets the target
// and defines kLanes (floats in a register), kRows (queries at a time), Vec and its
// Mask of comparisons (mask_greater, any, bits), and multiply_add, which adds the products of one
// unit. No header is included here: an inline function
// of the standard library compiled for AVX-512 could replace its namesake in files that must run
// everywhere.

constexpr int kColumns = 2 * kLanes;

// acc[i][.] = sum over `depth` of query[i] * panel: an outer product a step, all sums in registers.
inline __attribute__((always_inline)) void multiply(const float* query, const float* panel,
                                                    int64_t depth, Vec (&acc)[kRows][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = Vec{};
  for (int64_t d = 0; d < depth; ++d, query += kRows, panel += kColumns) {
    const Vec left = *reinterpret_cast<const Vec*>(panel);
    const Vec right = *reinterpret_cast<const Vec*>(panel + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      multiply_add(query[i], left, acc[i][0]);
      multiply_add(query[i], right, acc[i][1]);
    }
  }
}

// The error of the scores of a panel without what depends on the query.
inline __attribute__((always_inline)) float square_error(const KnnTileTask& t, int64_t panel) {
  const double norm = t.norm[panel];
  return static_cast<float>(t.square * (0.5 * norm * norm + t.offset));
}

// Appends the columns of `mask` to the list of a slot.
__attribute__((noinline)) void push(const KnnTileTask& t, int64_t slot, uint32_t mask, Vec left,
                                    Vec right, int64_t panel) {
  if (t.count[slot] + kColumns > t.capacity) t.make_room(t.owner, slot);
  alignas(64) float score[kColumns];
  *reinterpret_cast<Vec*>(score) = left;
  *reinterpret_cast<Vec*>(score + kLanes) = right;
  const float error =
      t.radius[slot] * t.norm[panel] + t.spread[slot] * t.residual[panel] + square_error(t, panel);
  int64_t at = slot * t.capacity + t.count[slot];
  const int64_t start = at;
  for (; mask != 0; mask &= mask - 1) {
    const int column = __builtin_ctz(mask);
    const int64_t position = t.first_row + panel * kColumns + column;
    const int64_t row = t.row_of == nullptr ? position : t.row_of[position];
    t.entry_score[at] = score[column];
    t.entry_error[at] = error;
    t.entry_index[at] = row;
    at += row != t.self[slot];
  }
  t.count[slot] += at - start;
}

// Scores of one group against one panel -> candidates.
inline __attribute__((always_inline)) void select(const KnnTileTask& t, int64_t group,
                                                  int64_t panel, const Vec (&acc)[kRows][2]) {
  const float norm = t.norm[panel], residual = t.residual[panel];
  const float square = square_error(t, panel);
  const float* lower = t.lower + group * kRows;
  const float* radius = t.radius + group * kRows;
  const float* spread = t.spread + group * kRows;
  float cut[kRows];
  for (int i = 0; i < kRows; ++i) {
    cut[i] = lower[i] - radius[i] * norm - spread[i] * residual - square;
  }
  const float* h = t.half_norm + panel * kColumns;
  const Vec left = *reinterpret_cast<const Vec*>(h);
  const Vec right = *reinterpret_cast<const Vec*>(h + kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Vec a = acc[i][0] - left;
    const Vec b = acc[i][1] - right;
    const Vec limit = cut[i] - Vec{};
    const Mask above = mask_greater(a, limit), beside = mask_greater(b, limit);
    if (__builtin_expect(any(above, beside), 0)) {
      push(t, group * kRows + i, bits(above) | bits(beside) << kLanes, a, b, panel);
    }
  }
}

// One depth block of one group against one panel; block sums go through `scratch`.
inline __attribute__((always_inline)) void score(const KnnTileTask& t, int64_t group, int64_t panel,
                                                 int64_t begin, int64_t end, const float* next) {
  // The groups share the work of bringing the next block into the cache.
  const int64_t share = (end - begin) * kColumns / t.groups + 1;
  for (int64_t at = 0; at < share; at += 16) __builtin_prefetch(next + group * share + at, 0, 2);
  Vec acc[kRows][2];
  multiply(t.query + (group * t.depth + begin) * kRows,
           t.database + (panel * t.depth + begin) * kColumns, end - begin, acc);
  Vec* sums = reinterpret_cast<Vec*>(t.scratch) + group * kRows * 2;
  if (begin > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] += sums[2 * i];
      acc[i][1] += sums[2 * i + 1];
    }
  }
  if (end == t.depth) {
    select(t, group, panel, acc);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sums[2 * i] = acc[i][0];
    sums[2 * i + 1] = acc[i][1];
  }
}

int64_t run(const KnnTileTask& t) {
  const int64_t blocks = knn_depth_blocks(t.depth);
  const int64_t depth = (t.depth + blocks - 1) / blocks;
  int64_t i = t.begin;
  for (; i < t.end && !*t.stop; ++i) {
    const int64_t panel = t.visits[i];
    const int64_t following = t.visits[i + 1 < t.end ? i + 1 : i];
    for (int64_t begin = 0; begin < t.depth; begin += depth) {
      const int64_t end = begin + depth < t.depth ? begin + depth : t.depth;
      const float* next =
          t.database + (end < t.depth ? panel * t.depth + end : following * t.depth) * kColumns;
      for (int64_t group = 0; group < t.groups; ++group) score(t, group, panel, begin, end, next);
    }
  }
  return i;
}

void products(const float* query, int64_t groups, const float* centres, int64_t panels,
              int64_t depth, float* out) {
  for (int64_t panel = 0; panel < panels; ++panel, centres += depth * kColumns) {
    for (int64_t group = 0; group < groups; ++group, out += kRows * kColumns) {
      Vec sum[kRows][2] = {};
      const int64_t blocks = knn_depth_blocks(depth);
      const int64_t length = (depth + blocks - 1) / blocks;
      for (int64_t begin = 0; begin < depth; begin += length) {
        Vec acc[kRows][2];
        multiply(query + (group * depth + begin) * kRows, centres + begin * kColumns,
                 begin + length < depth ? length : depth - begin, acc);
        for (int i = 0; i < kRows; ++i) {
          sum[i][0] += acc[i][0];
          sum[i][1] += acc[i][1];
        }
      }
      for (int i = 0; i < kRows; ++i) {
        reinterpret_cast<Vec*>(out)[2 * i] = sum[i][0];
        reinterpret_cast<Vec*>(out)[2 * i + 1] = sum[i][1];
      }
    }
  }
}

void reach(const KnnReachTask& t, float* out) {
  const Vec* product = reinterpret_cast<const Vec*>(t.product);
  for (int64_t v = 0; v < 2 * t.panels; v += 2, out += kColumns) {
    Vec best[2];
    const Vec* radius = reinterpret_cast<const Vec*>(t.radius) + v;
    const Vec* half = reinterpret_cast<const Vec*>(t.half) + v;
    best[0] = best[1] = -3.0e38f - Vec{};
    for (int64_t i = 0; i < t.queries; ++i, product += 2) {
      for (int h = 0; h < 2; ++h) {
        const Vec value = product[h] + radius[h] * t.tau[i] - t.cut[i];
        best[h] = value > best[h] ? value : best[h];
      }
    }
    for (int h = 0; h < 2; ++h) reinterpret_cast<Vec*>(out)[h] = best[h] - half[h];
  }
}
