// Body of the scoring kernel, compiled once per instruction set: the including file sets the target
// and defines kLanes (floats in a register), kRows (queries at a time) and mask_greater. No header
// is included here: an inline function of the standard library compiled for AVX-512 could replace
// its namesake in files that must run everywhere.

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

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
      acc[i][0] += query[i] * left;
      acc[i][1] += query[i] * right;
    }
  }
}

// Appends the columns of `mask` to the list of a slot.
__attribute__((noinline)) void push(const KnnTileTask& t, int64_t slot, uint32_t mask, Vec left,
                                    Vec right, int64_t panel) {
  if (t.count[slot] + kColumns > t.capacity) t.make_room(t.owner, slot);
  alignas(64) float score[kColumns];
  *reinterpret_cast<Vec*>(score) = left;
  *reinterpret_cast<Vec*>(score + kLanes) = right;
  int64_t at = slot * t.capacity + t.count[slot];
  const int64_t start = at;
  for (; mask != 0; mask &= mask - 1) {
    const int column = __builtin_ctz(mask);
    const int64_t row = t.first_row + panel * kColumns + column;
    t.entry_score[at] = score[column];
    t.entry_norm[at] = t.norm[panel];
    t.entry_index[at] = row;
    at += row != t.self[slot];
  }
  t.count[slot] += at - start;
}

// Scores of one group against one panel -> candidates.
inline __attribute__((always_inline)) void select(const KnnTileTask& t, int64_t group,
                                                  int64_t panel, const Vec (&acc)[kRows][2]) {
  // The cut in float32, rounded down: a row is never lost to the rounding of the cut.
  const double norm = t.norm[panel];
  const double square = t.square * (0.5 * norm * norm + t.offset);
  float cut[kRows];
  for (int i = 0; i < kRows; ++i) {
    const double exact = t.lower[group * kRows + i] - t.radius[group * kRows + i] * norm - square;
    cut[i] = static_cast<float>(exact - __builtin_fabs(exact) * 2.4e-7);
  }
  const float* h = t.half_norm + panel * kColumns;
  const Vec left = *reinterpret_cast<const Vec*>(h);
  const Vec right = *reinterpret_cast<const Vec*>(h + kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Vec a = acc[i][0] - left;
    const Vec b = acc[i][1] - right;
    const Vec limit = cut[i] - Vec{};
    const uint32_t mask = mask_greater(a, limit) | (mask_greater(b, limit) << kLanes);
    if (__builtin_expect(mask != 0, 0)) push(t, group * kRows + i, mask, a, b, panel);
  }
}

// One depth block of one group against one panel; block sums go through `scratch`.
inline __attribute__((always_inline)) void score(const KnnTileTask& t, int64_t group, int64_t panel,
                                                 int64_t begin, int64_t end) {
  Vec acc[kRows][2];
  multiply(t.query + (group * t.dim + begin) * kRows,
           t.database + (panel * t.dim + begin) * kColumns, end - begin, acc);
  Vec* sums = reinterpret_cast<Vec*>(t.scratch) + group * kRows * 2;
  if (begin > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] += sums[2 * i];
      acc[i][1] += sums[2 * i + 1];
    }
  }
  if (end == t.dim) {
    select(t, group, panel, acc);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sums[2 * i] = acc[i][0];
    sums[2 * i + 1] = acc[i][1];
  }
}

void run(const KnnTileTask& t) {
  const int64_t blocks = knn_depth_blocks(t.dim);
  const int64_t depth = (t.dim + blocks - 1) / blocks;
  for (int64_t i = 0, panel = 0; i < t.panels; ++i, panel = (panel + t.stride) % t.panels) {
    for (int64_t begin = 0; begin < t.dim; begin += depth) {
      const int64_t end = begin + depth < t.dim ? begin + depth : t.dim;
      for (int64_t group = 0; group < t.groups; ++group) score(t, group, panel, begin, end);
    }
  }
}
