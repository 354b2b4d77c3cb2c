// What bindings and kernels share.
#pragma once

#include <stdint.h>

namespace dynaconv {

struct bfloat16 {
  uint16_t bits;
};

}  // namespace dynaconv
