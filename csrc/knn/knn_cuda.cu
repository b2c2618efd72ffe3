#include <algorithm>

#include "common/cuda.h"
#include "knn/knn.h"
#include "knn/knn_kernels.cuh"

namespace als {
namespace {

constexpr int64_t kChunkBytes = int64_t{64} << 20;  // packed database tiles
constexpr int64_t kSpanBytes = int64_t{128} << 20;  // packed queries and their group maxima
constexpr int64_t kSumBytes = int64_t{16} << 20;    // column sums of the parts
constexpr int64_t kMostBlocks = 1024;               // where blocks take their work in turn
constexpr int64_t kFewestBlocks = 2048;             // of scoring, before runs of tiles get long
constexpr int64_t kLongestRun = 32;                 // database tiles of a block

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

// Device memory of the search; freed to the stream-ordered allocator at the end of the call.
template <typename V>
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t size)
      : tensor_(empty_on(like, {size * static_cast<int64_t>(sizeof(V))}, ScalarType::Byte)) {}
  V* get() const { return reinterpret_cast<V*>(tensor_.mutable_data_ptr<uint8_t>()); }

 private:
  Tensor tensor_;
};

// Blocks of knn_score_hopper, one an SM, where the image of this library that the device runs holds
// that kernel; else 0. Images of other architectures, 9.0 without the "a" included, hold one that
// allows a single thread.
int hopper_blocks() {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, knn_score_hopper));
  if (attributes.maxThreadsPerBlock < kKnnHopperThreads) return 0;
  STD_CUDA_CHECK(cudaFuncSetAttribute(knn_score_hopper, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kKnnHopperShared));
  int device = 0, blocks = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  return blocks;
}

void launch_score(KnnScoreParams score, int hopper, cudaStream_t stream) {
  const int64_t query_tiles = ceil_div(score.queries, kKnnTile);
  if (hopper > 0) {
    const int64_t shares = ceil_div(query_tiles, 2) * score.tiles;
    knn_score_hopper<<<grid(std::min<int64_t>(shares, hopper)), kKnnHopperThreads, kKnnHopperShared,
                       stream>>>(score);
  } else {
    score.block_tiles = static_cast<int>(
        std::clamp<int64_t>(score.tiles * query_tiles / kFewestBlocks, 1, kLongestRun));
    const dim3 blocks(grid(query_tiles), grid(ceil_div(score.tiles, score.block_tiles)));
    knn_score<<<blocks, kKnnThreads, kKnnScoreShared, stream>>>(score);
  }
  ALS_LAUNCH_CHECK();
}

template <typename T>
void search(const Tensor& query, const Tensor& database, int64_t k, KnnMetric metric,
            bool exclude_self, bool exact, const KnnOutputs& outputs, cudaStream_t stream) {
  const int64_t dim = query.size(1);
  const KnnRows<T> x{static_cast<const T*>(query.const_data_ptr()), query.size(0), dim, metric};
  const KnnRows<T> y{static_cast<const T*>(database.const_data_ptr()), database.size(0), dim,
                     metric};

  // Mean and extent of the database.
  const int64_t most_parts = std::clamp<int64_t>(kSumBytes / (8 * dim), 1, 1024);
  const int64_t part = ceil_div(y.rows, std::min(most_parts, ceil_div(y.rows, kKnnThreads)));
  const int64_t parts = ceil_div(y.rows, part);
  const Workspace<double> sums(query, parts * dim);
  const Workspace<double> mean(query, dim);
  const Workspace<KnnExtent> extent(query, 1);
  STD_CUDA_CHECK(cudaMemsetAsync(extent.get(), 0, sizeof(KnnExtent), stream));
  knn_column_sums<<<grid(parts), kKnnThreads, 0, stream>>>(y, part, sums.get(), extent.get());
  ALS_LAUNCH_CHECK();
  knn_mean<<<grid(ceil_div(dim, kKnnThreads)), kKnnThreads, 0, stream>>>(sums.get(), parts, dim,
                                                                         extent.get(), mean.get());
  ALS_LAUNCH_CHECK();
  const int64_t extent_blocks = std::min<int64_t>(ceil_div(y.rows, kKnnSubgroups), 2048);
  knn_extent<<<grid(extent_blocks), kKnnThreads, 0, stream>>>(y, mean.get(), extent.get());
  ALS_LAUNCH_CHECK();

  // Sizes: `chunk` database tiles are packed at a time, `span` queries served at a time. What is
  // for queries that are scored again in float32 has room for all of them.
  const int64_t depth = ceil_div(dim, kKnnFloatSlab) * kKnnFloatSlab;
  const int64_t tile_bytes = knn_slabs(dim) * kKnnSlabBytes;
  const int64_t float_tile = kKnnTile * depth;
  const int64_t tiles = ceil_div(y.rows, kKnnTile);
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (tile_bytes + 4 * float_tile), 1, tiles);
  const int64_t groups = tiles * kKnnTileGroups;
  const int64_t query_bytes = 4 * groups + 4 * depth + tile_bytes / kKnnTile +
                              static_cast<int64_t>(sizeof(KnnQuery) + sizeof(KnnBf16Error) + 4);
  int64_t span = std::clamp<int64_t>(kSpanBytes / query_bytes, 1, x.rows);
  if (span > kKnnTile) span = span / kKnnTile * kKnnTile;
  const int64_t query_tiles = ceil_div(span, kKnnTile);
  const Workspace<uint8_t> packed_query(query, query_tiles * tile_bytes);
  const Workspace<KnnQuery> queries(query, span);
  const Workspace<KnnBf16Error> errors(query, span);
  const Workspace<float> group_max(query, span * groups);
  const Workspace<uint8_t> packed(query, chunk * tile_bytes);
  const Workspace<float> half_norm(query, chunk * kKnnTile);
  const Workspace<float> group_norm(query, groups);
  const Workspace<float> group_residual(query, groups);
  const Workspace<float> float_query(query, query_tiles * float_tile);
  const Workspace<float> float_packed(query, chunk * float_tile);
  const Workspace<float> float_half_norm(query, chunk * kKnnTile);
  const Workspace<int> listed_query(query, span);
  const Workspace<unsigned> listed_count(query, 1);
  const KnnListed listed{listed_query.get(), listed_count.get()};

  STD_CUDA_CHECK(cudaFuncSetAttribute(knn_score, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kKnnScoreShared));
  const int hopper = hopper_blocks();
  int capacity = 256;
  while (capacity < 2 * k) capacity *= 2;
  constexpr int kEntry = sizeof(int64_t) + sizeof(uint32_t);
  const int shared = capacity * kEntry;
  if (shared > 40 * 1024) {                       // beyond the default limit, less the static part
    constexpr int kMost = 2 * kKnnMaxK * kEntry;  // the same value in every thread
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(knn_select<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost));
  }

  for (int64_t first = 0; first < x.rows; first += span) {
    const int64_t count = std::min(span, x.rows - first);
    const int64_t count_tiles = ceil_div(count, kKnnTile);
    STD_CUDA_CHECK(cudaMemsetAsync(listed.count, 0, sizeof(unsigned), stream));
    knn_pack_queries<<<grid(count_tiles), kKnnThreads, 0, stream>>>(
        x, first, count, mean.get(), extent.get(), exact, packed_query.get(), queries.get(),
        errors.get());
    ALS_LAUNCH_CHECK();
    for (int64_t tile = 0; tile < tiles; tile += chunk) {
      const int64_t here = std::min(chunk, tiles - tile);
      const int64_t group = tile * kKnnTileGroups;
      if (first == 0 || chunk < tiles) {
        const KnnTiles out{packed.get(), half_norm.get(), group_norm.get() + group,
                           group_residual.get() + group};
        knn_pack_database<<<grid(here), kKnnThreads, 0, stream>>>(y, tile * kKnnTile, mean.get(),
                                                                  extent.get(), out);
        ALS_LAUNCH_CHECK();
      }
      const KnnScoreParams score{packed_query.get(),
                                 packed.get(),
                                 half_norm.get(),
                                 group_max.get(),
                                 count,
                                 groups,
                                 group,
                                 dim,
                                 static_cast<int>(here),
                                 0};
      launch_score(score, hopper, stream);
    }
    KnnSelectParams<T> select{x,
                              y,
                              first,
                              count,
                              groups,
                              k,
                              exclude_self,
                              capacity,
                              group_max.get(),
                              group_norm.get(),
                              group_residual.get(),
                              queries.get(),
                              errors.get(),
                              extent.get(),
                              exact && metric != KnnMetric::kIp ? score_error(dim).square : 0.0,
                              knn_budget(k, groups),
                              false,
                              listed,
                              std::get<0>(outputs).mutable_data_ptr<float>(),
                              std::get<1>(outputs).mutable_data_ptr<int64_t>()};
    knn_select<<<grid(count), kKnnThreads, shared, stream>>>(select);
    ALS_LAUNCH_CHECK();

    // The listed queries again, in float32. Nobody here knows whether there are any.
    knn_pack_queries_float<<<grid(count_tiles), kKnnThreads, 0, stream>>>(
        x, first, depth, mean.get(), queries.get(), listed, float_query.get());
    ALS_LAUNCH_CHECK();
    for (int64_t tile = 0; tile < tiles; tile += chunk) {
      const int64_t here = std::min(chunk, tiles - tile);
      knn_pack_database_float<<<grid(here), kKnnThreads, 0, stream>>>(
          y, tile * kKnnTile, depth, mean.get(), extent.get(), listed, float_packed.get(),
          float_half_norm.get());
      ALS_LAUNCH_CHECK();
      const KnnRescoreParams rescore{float_query.get(),
                                     float_packed.get(),
                                     float_half_norm.get(),
                                     group_max.get(),
                                     here,
                                     groups,
                                     tile * kKnnTileGroups,
                                     depth,
                                     listed};
      knn_rescore<<<grid(std::min(here * count_tiles, kMostBlocks)), kKnnThreads, 0, stream>>>(
          rescore);
      ALS_LAUNCH_CHECK();
    }
    select.rescored = true;
    knn_select<<<grid(std::min(count, kMostBlocks)), kKnnThreads, shared, stream>>>(select);
    ALS_LAUNCH_CHECK();
  }
}

KnnOutputs knn_cuda(const Tensor& query, const Tensor& database, int64_t k, int64_t metric,
                    bool exclude_self, bool exact) {
  check_knn(query, database, k, metric, exclude_self);
  ALS_CHECK(k <= kKnnMaxK, "k: expected at most ", kKnnMaxK, " on CUDA, got ", k);
  KnnOutputs outputs = empty_knn_outputs(query, k);
  if (query.size(0) == 0) return outputs;
  const CudaScope scope(query);
  const Tensor x = torch::stable::contiguous(query);
  const Tensor y = torch::stable::contiguous(database);
  const auto kind = static_cast<KnnMetric>(metric);
  switch (query.scalar_type()) {
    case ScalarType::Double:
      search<double>(x, y, k, kind, exclude_self, exact, outputs, scope.stream());
      break;
    case ScalarType::BFloat16:
      search<__nv_bfloat16>(x, y, k, kind, exclude_self, exact, outputs, scope.stream());
      break;
    case ScalarType::Half:
      search<__half>(x, y, k, kind, exclude_self, exact, outputs, scope.stream());
      break;
    default:
      search<float>(x, y, k, kind, exclude_self, exact, outputs, scope.stream());
  }
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) { m.impl("knn", TORCH_BOX(&als::knn_cuda)); }
