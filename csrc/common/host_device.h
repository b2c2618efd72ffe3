// Qualifiers for formulas that one header shares between g++ and nvcc. Torch-free.
#pragma once

// Always inlined on the host: a formula then takes the instruction set of the loop that calls it.
#ifdef __CUDACC__
#define ALS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALS_HOST_DEVICE inline __attribute__((always_inline))
#endif

// For kernels, which the C++ tests also run on the CPU, with dynamic shared memory of their own.
#ifdef __CUDACC__
#define ALS_PRAGMA(text) _Pragma(#text)
#define ALS_UNROLL _Pragma("unroll")
#define ALS_UNROLL_BY(n) ALS_PRAGMA(unroll n)
#define ALS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]  // bytes
#else
#define ALS_UNROLL
#define ALS_UNROLL_BY(n)
#endif
