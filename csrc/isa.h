// Which instruction set the kernels run with.
//
// Every file in kernels/ is compiled once for each instruction set, with DYNACONV_ISA defined as
// its name: a namespace of its own, so that the linker never mixes code of two sets. For the same
// reason kernels include nothing with inline functions of its own (no torch, no standard
// containers).
#pragma once

namespace dynaconv {

enum class Isa { portable, avx2, avx512 };

// The best that this CPU has; the environment variable DYNACONV_ISA may name a lower one.
Isa isa();
const char* isa_name();

}  // namespace dynaconv

// DYNACONV_CALL(function(arguments)): in the namespace of the instruction set at hand.
#if defined(__x86_64__)
#define DYNACONV_CALL(...)                                     \
  do {                                                         \
    switch (::dynaconv::isa()) {                               \
      case ::dynaconv::Isa::avx512: avx512::__VA_ARGS__; break; \
      case ::dynaconv::Isa::avx2: avx2::__VA_ARGS__; break;     \
      default: portable::__VA_ARGS__;                          \
    }                                                          \
  } while (0)
// DYNACONV_DECLARE(declarations): once in each namespace.
#define DYNACONV_DECLARE(...)            \
  namespace portable { __VA_ARGS__ }     \
  namespace avx2 { __VA_ARGS__ }         \
  namespace avx512 { __VA_ARGS__ }
#else
#define DYNACONV_CALL(...) portable::__VA_ARGS__
#define DYNACONV_DECLARE(...) namespace portable { __VA_ARGS__ }
#endif
