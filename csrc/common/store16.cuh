// A store of 16 bytes that stays one. Torch-free.
#pragma once

#include <cstring>

namespace als {

// For v of 16 bytes and an aligned place in global memory. nvcc takes many an assignment of such a
// structure apart into stores of 2 or 4 bytes.
template <typename V>
__device__ inline void store16(void* to, const V& v) {
  static_assert(sizeof(V) == 16);
#ifdef __CUDACC__
  unsigned word[4];
  memcpy(word, &v, 16);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]),
               "r"(word[2]), "r"(word[3])
               : "memory");
#else
  *static_cast<V*>(to) = v;
#endif
}

}  // namespace als
