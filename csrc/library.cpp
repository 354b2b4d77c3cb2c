// The library's names; each binding adds its operators.
#include "binding.h"

namespace dynaconv {
namespace {

// Which instruction set is at work: 0 portable, 1 AVX2, 2 AVX-512.
int64_t instruction_set() { return static_cast<int64_t>(isa()); }

}  // namespace
}  // namespace dynaconv

STABLE_TORCH_LIBRARY(dynaconv_native, m) { m.def("instruction_set() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(dynaconv_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&dynaconv::instruction_set));
}
