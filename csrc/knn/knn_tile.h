// The float32 scoring kernel of the CPU: packed panels in, candidates out. Torch-free.
//
// knn_tile_<level>.cpp compiles knn_tile_kernel.h once per instruction set. A level has its own
// panel shape: `rows` queries against `columns` database rows at a time.
#pragma once

#include <cstdint>

namespace als {

// Packed layouts. Depth (the D features) is the slow axis inside a group, so that the kernel reads
// both operands as streams:
//   query     [groups][dim][rows]      database  [panels][dim][columns]
struct KnnTileTask {
  int64_t dim;
  int64_t groups;          // query groups of this task
  const float* query;      // [groups][dim][rows]
  int64_t panels;          // database panels of this task
  int64_t stride;          // visiting order: panel (i * stride) mod panels, coprime
  const float* database;   // [panels][dim][columns]
  const float* half_norm;  // [panels][columns]: h, +inf for a column that must not be chosen
  const float* norm;       // [panels]: largest |c'| of the panel
  int64_t first_row;       // database row of panel 0, column 0

  // A row belongs in the list of query i when  score + radius[i] * norm + square * (norm^2 / 2 +
  // offset) >= lower[i], that is, when its true score may reach lower[i].
  const double* lower;   // [groups * rows], raised by make_room
  const double* radius;  // [groups * rows]
  double square;
  double offset;

  // Candidates: slot i holds count[i] entries at i * capacity.
  int64_t capacity;
  int64_t* count;        // [groups * rows]
  const int64_t* self;   // [groups * rows]: database row to leave out, or -1
  float* entry_score;    // [groups * rows][capacity]
  float* entry_norm;     // [groups * rows][capacity]: norm of the entry's panel
  int64_t* entry_index;  // [groups * rows][capacity]
  float* scratch;        // [groups][rows][columns], for dim > kKnnDepth
  void* owner;
  void (*make_room)(void* owner, int64_t slot);  // leaves room for one more panel
};

struct KnnTileKernel {
  int rows;
  int columns;
  void (*run)(const KnnTileTask&);
};

constexpr int kKnnMaxColumns = 32;
// Features multiplied in one go: a panel slice of 192 x 32 floats is 24 KiB and stays in L1.
constexpr int64_t kKnnDepth = 192;

inline int64_t knn_depth_blocks(int64_t dim) { return (dim + kKnnDepth - 1) / kKnnDepth; }

// The longest chain of additions behind a score of the kernel: one block, then the block sums.
inline int64_t knn_tile_chain(int64_t dim) {
  const int64_t blocks = knn_depth_blocks(dim);
  return (dim + blocks - 1) / blocks + blocks;
}

extern const KnnTileKernel knn_tile_baseline;
#if defined(__x86_64__)
extern const KnnTileKernel knn_tile_avx2;
extern const KnnTileKernel knn_tile_avx512;
#endif

}  // namespace als
