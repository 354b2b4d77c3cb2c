// What bindings and kernels share.
#pragma once

#include <stdint.h>

namespace dynaconv {

// a / b rounded up, for positive numbers. Static, so that no instruction set's copy of it is linked
// into another's code.
static inline __attribute__((always_inline)) int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct bfloat16 {
  uint16_t bits;
};

}  // namespace dynaconv
