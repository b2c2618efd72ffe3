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
  int64_t panels;          // database panels of this task
  int64_t stride;          // visiting order: panel (i * stride) mod panels, coprime
  int64_t begin;           // visits made before
  const float* database;   // [panels][depth][columns]
  const float* half_norm;  // [panels][columns]: h, +inf for a column that must not be chosen
  const float* norm;       // [panels]: largest length of a packed row of the panel
  const float* residual;   // [panels]: largest length of what packing rounded away
  int64_t first_row;       // database row of panel 0, column 0

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

struct KnnTileKernel {
  int rows;
  int columns;
  int features;                        // in a unit: 1 for float32, 2 for bf16
  int64_t (*run)(const KnnTileTask&);  // returns the visits made
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
