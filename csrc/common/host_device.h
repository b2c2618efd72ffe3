// Qualifiers for formulas that one header shares between g++ and nvcc. Torch-free.
#pragma once

// Always inlined on the host: a formula then takes the instruction set of the loop that calls it.
#ifdef __CUDACC__
#define ALS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALS_HOST_DEVICE inline __attribute__((always_inline))
#endif
