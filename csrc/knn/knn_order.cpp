#include "knn/knn_order.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace als {
namespace {

constexpr int kIterations = 4;           // a rough subspace is as good as the exact one
constexpr int64_t kSplitSamples = 1024;  // points that choose the direction of a split

float dot(const float* a, const float* b, int64_t n) {
  constexpr int kLanes = 8;
  float lane[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += a[j + l] * b[j + l];
  }
  float sum = std::accumulate(lane, lane + kLanes, 0.0f);
  for (int64_t j = whole; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// Gram-Schmidt, twice: the second time removes what rounding left.
void orthonormalise(float* rows, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows + i * dim;
    const float before = std::sqrt(dot(row, row, dim));
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t p = 0; p < i; ++p) {
        const float along = dot(row, rows + p * dim, dim);
        for (int64_t j = 0; j < dim; ++j) row[j] -= along * rows[p * dim + j];
      }
    }
    const float length = std::sqrt(dot(row, row, dim));
    const float scale = length > 1e-4f * before ? 1.0f / length : 0.0f;
    for (int64_t j = 0; j < dim; ++j) row[j] *= scale;
  }
}

}  // namespace

std::vector<float> knn_directions(const float* sample, int64_t samples, int64_t dim,
                                  int64_t count) {
  std::vector<float> directions(count * dim), next(count * dim);
  for (int64_t i = 0; i < count && samples > 0; ++i) {
    std::copy_n(sample + i * samples / count * dim, dim, &directions[i * dim]);
  }
  orthonormalise(directions.data(), count, dim);
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    std::fill(next.begin(), next.end(), 0.0f);
    for (int64_t s = 0; s < samples; ++s) {
      const float* row = sample + s * dim;
      for (int64_t i = 0; i < count; ++i) {
        const float along = dot(row, &directions[i * dim], dim);
        for (int64_t j = 0; j < dim; ++j) next[i * dim + j] += along * row[j];
      }
    }
    orthonormalise(next.data(), count, dim);
    directions.swap(next);
  }
  return directions;
}

void knn_project(const float* row, const float* directions, int64_t dim, int64_t count,
                 float* point) {
  for (int64_t i = 0; i < kKnnCoordinates; ++i) {
    point[i] = i < count ? dot(row, directions + i * dim, dim) : 0.0f;
  }
}

void knn_split(const float* points, int32_t* order, int64_t begin, int64_t middle, int64_t end) {
  constexpr int kWidth = kKnnCoordinates;
  const int64_t size = end - begin;
  const int64_t samples = std::min(size, kSplitSamples);
  float mean[kWidth] = {}, covariance[kWidth][kWidth] = {};
  const auto sampled = [&](int64_t s) {
    return points + int64_t{order[begin + s * size / samples]} * kWidth;
  };
  for (int64_t s = 0; s < samples; ++s) {
    for (int j = 0; j < kWidth; ++j) mean[j] += sampled(s)[j] / static_cast<float>(samples);
  }
  for (int64_t s = 0; s < samples; ++s) {
    float x[kWidth];
    for (int j = 0; j < kWidth; ++j) x[j] = sampled(s)[j] - mean[j];
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < kWidth; ++j) covariance[i][j] += x[i] * x[j];
    }
  }
  int widest = 0;
  for (int j = 1; j < kWidth; ++j) {
    if (covariance[j][j] > covariance[widest][widest]) widest = j;
  }
  float direction[kWidth];
  std::copy_n(covariance[widest], kWidth, direction);
  for (int iteration = 0; iteration < 2 * kIterations; ++iteration) {
    float next[kWidth], largest = 0.0f;
    for (int i = 0; i < kWidth; ++i) {
      next[i] = dot(covariance[i], direction, kWidth);
      largest = std::max(largest, std::fabs(next[i]));
    }
    if (!(largest > 0.0f)) break;
    for (int j = 0; j < kWidth; ++j) direction[j] = next[j] / largest;
  }
  std::vector<std::pair<float, int32_t>> along(size);
  for (int64_t i = 0; i < size; ++i) {
    const int32_t point = order[begin + i];
    along[i] = {dot(points + int64_t{point} * kWidth, direction, kWidth), point};
  }
  std::nth_element(along.begin(), along.begin() + (middle - begin), along.end());
  for (int64_t i = 0; i < size; ++i) order[begin + i] = along[i].second;
}

}  // namespace als
