// The scoring kernels of the CPU: packed panels in, candidates out. Torch-free.
//
// knn_tile_<level>.cpp compiles knn_tile_kernel.h once per instruction set. A level has its own
// panel shape: `rows` queries against `columns` database rows at a time. Operands come in units of
// four bytes: one float32, or two neighbouring features in bf16.
#pragma once

#include <cstdint>

namespace als {

// Packed layouts. Depth (the units of a row) is the slow axis inside a group, so that the kernel
// reads both operands as streams:
//   query     [groups][depth][rows]      database  [panels][depth][columns]
struct KnnTileTask {
  int64_t depth;
  int64_t groups;          // query groups of this task
  const float* query;      // [groups][depth][rows]
  const int32_t* visits;   // panels in the order of their visits
  int64_t begin, end;      // of the visits to make
  const float* database;   // [panels][depth][columns]
  const float* half_norm;  // [panels][columns]: h, +inf for a column that must not be chosen
  const float* norm;       // [panels]: largest length of a packed row of the panel
  const float* residual;   // [panels]: largest length of what packing rounded away
  int64_t first_row;       // position of panel 0, column 0
  const int32_t* row_of;   // database row at a position; null: the position itself

  // A row belongs in the list of query i when score + error >= lower[i], where
  //   error = radius[i] * norm + spread[i] * residual + square * (norm^2 / 2 + offset).
  // `lower` is rounded down and the coefficients up by knn_margin, so float32 decides safely.
  const float* lower;   // [groups * rows], raised by make_room
  const float* radius;  // [groups * rows]
  const float* spread;  // [groups * rows]
  double square;
  double offset;

  // Candidates: slot i holds count[i] entries at i * capacity.
  int64_t capacity;
  int64_t* count;        // [groups * rows]
  const int64_t* self;   // [groups * rows]: database row to leave out, or -1
  float* entry_score;    // [groups * rows][capacity]
  float* entry_error;    // [groups * rows][capacity]
  int64_t* entry_index;  // [groups * rows][capacity]
  float* scratch;        // [groups][rows][columns], for depth > kKnnDepth
  void* owner;
  void (*make_room)(void* owner, int64_t slot);  // leaves room for one more panel
  const bool* stop;                              // set by make_room: no further panel
};

// Which panels can still matter to some queries. The rows of panel c lie within radius[c] of its
// centre m, and query i looks for rows within tau[i]. Such a row has |q - m| <= radius + tau, which
// in terms of products and of h = (|m|^2 - radius^2) / 2, cut = (|q|^2 - tau^2) / 2 reads
//   <q, m> + radius tau - h >= cut.
struct KnnReachTask {
  int64_t queries;
  int64_t panels;        // of centres
  const float* product;  // [panels][queries][columns]: <q, m>
  const float* half;     // [panels * columns]: h
  const float* radius;   // [panels * columns]
  const float* tau;      // [queries]
  const float* cut;      // [queries]
};

struct KnnTileKernel {
  int rows;
  int columns;
  int features;                        // in a unit: 1 for float32, 2 for bf16
  int64_t (*run)(const KnnTileTask&);  // returns the visit it stopped before
  // <q, m> of `groups` packed query groups and packed centres -> [panels][groups * rows][columns].
  void (*products)(const float* query, int64_t groups, const float* centres, int64_t panels,
                   int64_t depth, float* out);
  // The largest left side - cut over the queries, [panels * columns]: negative, out of reach.
  void (*reach)(const KnnReachTask&, float* out);
};

constexpr int kKnnMaxColumns = 32;
// Units multiplied in one go: a panel slice of 128 x 32 of them is 16 KiB and stays in L1.
constexpr int64_t kKnnDepth = 128;

inline int64_t knn_depth_blocks(int64_t depth) { return (depth + kKnnDepth - 1) / kKnnDepth; }

// The longest chain of additions behind a score: one block, then the block sums.
inline int64_t knn_tile_chain(int64_t depth, int features) {
  const int64_t blocks = knn_depth_blocks(depth);
  return (depth + blocks - 1) / blocks * features + blocks;
}

extern const KnnTileKernel knn_tile_baseline;
#if defined(__x86_64__)
extern const KnnTileKernel knn_tile_avx2;
extern const KnnTileKernel knn_tile_avx512;
extern const KnnTileKernel knn_tile_bf16;
#endif

}  // namespace als
