// An order of points in which neighbours in space are mostly neighbours in the order. Torch-free.
//
// The kNN of the CPU packs the database in it: then the rows of a panel lie close together, and a
// panel as a whole can be left out by the distance of its centre. What comes out is a heuristic; no
// result depends on it.
#pragma once

#include <cstdint>
#include <vector>

namespace als {

constexpr int kKnnCoordinates = 16;  // a point: one cache line

// Orthonormal directions in which rows vary most, [count][dim]: subspace iteration on `samples`
// centred rows [samples][dim]. Directions that the rows do not span are 0.
std::vector<float> knn_directions(const float* sample, int64_t samples, int64_t dim, int64_t count);

// Coordinates of a row along the directions; those beyond `count` are 0.
void knn_project(const float* row, const float* directions, int64_t dim, int64_t count,
                 float* point /* [kKnnCoordinates] */);

// Puts the points order[begin, middle) on one side and [middle, end) on the other of a plane across
// the direction in which they vary most. Equal points are parted by their position.
void knn_split(const float* points /* [n][kKnnCoordinates] */, int32_t* order, int64_t begin,
               int64_t middle, int64_t end);

// Where a part of `size` points is cut: at a multiple of `leaf` near the middle; 0: not at all.
inline int64_t knn_middle(int64_t size, int64_t leaf) {
  return size <= leaf ? 0 : (size / leaf + 1) / 2 * leaf;
}

}  // namespace als
