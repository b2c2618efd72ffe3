#include "common/cuda.h"
#include "knn/knn.h"
#include "knn/knn_cuda_search.h"

namespace als {
namespace {

// The workspace is freed to the stream-ordered allocator at the end of the call.
template <typename T>
void search(const Tensor& query, const Tensor& database, int64_t k, KnnMetric metric,
            bool exclude_self, bool exact, const KnnOutputs& outputs, cudaStream_t stream) {
  const int64_t dim = query.size(1);
  const KnnRows<T> x{static_cast<const T*>(query.const_data_ptr()), query.size(0), dim, metric};
  const KnnRows<T> y{static_cast<const T*>(database.const_data_ptr()), database.size(0), dim,
                     metric};
  const KnnCudaPlan plan = KnnCudaPlan::of(x.rows, y.rows, dim);
  const Tensor workspace = empty_on(query, {KnnCudaMemory::of(plan, 0).bytes}, ScalarType::Byte);
  const auto start = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  const KnnCudaSearch<T> search{x,
                                k,
                                exclude_self,
                                exact,
                                std::get<0>(outputs).mutable_data_ptr<float>(),
                                std::get<1>(outputs).mutable_data_ptr<int64_t>(),
                                plan,
                                KnnCudaMemory::of(plan, start),
                                stream};
  search.run(y);
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
