// What the bindings to torch share: the stable ABI alone, so that one build serves later releases.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <new>
#include <vector>

#include "isa.h"
#include "types.h"

namespace dynaconv {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Memory for one thread's use, aligned to whole cache lines.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// f(T{}) with T the tensor's C++ type.
template <class F>
void with_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return f(float{});
    case torch::headeronly::ScalarType::Double: return f(double{});
    case torch::headeronly::ScalarType::BFloat16: return f(bfloat16{});
    default: STD_TORCH_CHECK(false, "dynaconv: float32, float64 and bfloat16 only");
  }
}

inline Ints strides_of(const Tensor& t) {
  const auto s = t.strides();
  return Ints(s.begin(), s.end());
}

inline Ints sizes_of(const Tensor& t) {
  const auto s = t.sizes();
  return Ints(s.begin(), s.end());
}

}  // namespace dynaconv
