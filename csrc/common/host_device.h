// Qualifiers for formulas that one header shares between g++ and nvcc. Torch-free.
#pragma once

#ifdef __CUDACC__
#define ALS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALS_HOST_DEVICE inline
#endif
