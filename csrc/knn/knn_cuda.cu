#include "common/cuda.h"
#include "common/staging.h"
#include "knn/knn.h"
#include "knn/knn_cuda_few.h"
#include "knn/knn_cuda_search.h"
#include "knn/knn_cuda_upload.h"

namespace als {
namespace {

struct Request {
  int64_t k;
  KnnMetric metric;
  bool exclude_self, exact;
};

template <typename T>
void search(const Tensor& query, const Tensor& database, const Request& request,
            const KnnOutputs& outputs, cudaStream_t stream) {
  const int64_t dim = query.size(1), rows = database.size(0);
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
  const KnnRows<T> x{static_cast<const T*>(query.const_data_ptr()), query.size(0), dim,
                     request.metric};
  auto* const distance = std::get<0>(outputs).mutable_data_ptr<float>();
  auto* const index = std::get<1>(outputs).mutable_data_ptr<int64_t>();
  const KnnFewPlan few = KnnFewPlan::of(x.rows, rows, dim, row_bytes, request.k);
  if (database.is_cuda() && few.serves) {
    const KnnRows<T> y{static_cast<const T*>(database.const_data_ptr()), rows, dim, request.metric};
    search_few(few, x, y, request.k, request.exclude_self, distance, index, query, stream);
    return;
  }
  const int64_t part = database.is_cuda()
                           ? KnnCudaPlan::resident_rows(rows, dim)
                           : KnnCudaPlan::part_rows(rows, dim, row_bytes, staging_bytes());
  const int64_t span_bytes =
      database.is_cuda() ? KnnCudaPlan::kSpanBytes : KnnCudaPlan::kSpanBytesStaged;
  const int blocks = knn_hopper_blocks();
  const KnnCudaPlan plan = KnnCudaPlan::of(x.rows, part, dim, span_bytes, blocks);
  // Freed to the stream-ordered allocator at the end of the call.
  const Tensor workspace = empty_on(query, {KnnCudaMemory::of(plan, 0).bytes}, ScalarType::Byte);
  const auto start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  const KnnCudaSearch<T> search{
      x,     request.k, request.exclude_self,           request.exact, distance,
      index, plan,      KnnCudaMemory::of(plan, start), stream,        blocks};
  const auto run = [&](const void* data, int64_t first) {
    search.run(
        {static_cast<const T*>(data), std::min(part, rows - first), dim, request.metric, first});
  };
  if (database.is_cuda()) {
    const auto* data = static_cast<const T*>(database.const_data_ptr());
    for (int64_t first = 0; first < rows; first += part) run(data + first * dim, first);
    return;
  }
  KnnUpload upload(database, query, part, stream);
  upload.start(0);
  for (int64_t i = 0; i * part < rows; ++i) {
    if ((i + 1) * part < rows) upload.start(i + 1);  // ahead of launches that may fill the queue
    run(upload.get(i), i * part);
    upload.done(i);
  }
}

bool in_pinned_memory(const Tensor& t) {
  cudaPointerAttributes found{};
  STD_CUDA_CHECK(cudaPointerGetAttributes(&found, t.const_data_ptr()));
  return found.type == cudaMemoryTypeHost;
}

KnnOutputs knn_cuda(const Tensor& query, const Tensor& database, int64_t k, int64_t metric,
                    bool exclude_self, bool exact) {
  check_knn(query, database, k, metric, exclude_self);
  ALS_CHECK(k <= kKnnMaxK, "k: expected at most ", kKnnMaxK, " on CUDA, got ", k);
  const CudaScope scope(query);
  if (database.is_cpu()) {
    ALS_CHECK(database.is_contiguous(), "database: expected contiguous rows in host memory");
    ALS_CHECK(in_pinned_memory(database),
              "database: expected on the device of query or in pinned host memory");
  }
  KnnOutputs outputs = empty_knn_outputs(query, k);
  if (query.size(0) == 0) return outputs;
  const Tensor x = torch::stable::contiguous(query);
  const Tensor y = torch::stable::contiguous(database);
  const Request request{k, static_cast<KnnMetric>(metric), exclude_self, exact};
  switch (query.scalar_type()) {
    case ScalarType::Double:
      search<double>(x, y, request, outputs, scope.stream());
      break;
    case ScalarType::BFloat16:
      search<__nv_bfloat16>(x, y, request, outputs, scope.stream());
      break;
    case ScalarType::Half:
      search<__half>(x, y, request, outputs, scope.stream());
      break;
    default:
      search<float>(x, y, request, outputs, scope.stream());
  }
  return outputs;
}

}  // namespace
}  // namespace als

STABLE_TORCH_LIBRARY_IMPL(als_ext, CUDA, m) { m.impl("knn", TORCH_BOX(&als::knn_cuda)); }
