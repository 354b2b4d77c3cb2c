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

// DYNACONV_DECLARE(declarations): once in each instruction set's namespace.
// DYNACONV_RUN(call): in the namespace of the one at hand; DYNACONV_CALL(result, call) keeps what
// it returns.
#if defined(__x86_64__)
#define DYNACONV_DECLARE(...)        \
  namespace portable { __VA_ARGS__ } \
  namespace avx2 { __VA_ARGS__ }     \
  namespace avx512 { __VA_ARGS__ }
#define DYNACONV_WHERE(prefix, ...)                                  \
  do {                                                               \
    switch (::dynaconv::isa()) {                                     \
      case ::dynaconv::Isa::avx512: prefix avx512::__VA_ARGS__; break; \
      case ::dynaconv::Isa::avx2: prefix avx2::__VA_ARGS__; break;     \
      default: prefix portable::__VA_ARGS__;                         \
    }                                                                \
  } while (0)
#else
#define DYNACONV_DECLARE(...) namespace portable { __VA_ARGS__ }
#define DYNACONV_WHERE(prefix, ...) prefix portable::__VA_ARGS__
#endif
#define DYNACONV_RUN(...) DYNACONV_WHERE(, __VA_ARGS__)
#define DYNACONV_CALL(result, ...) DYNACONV_WHERE(result =, __VA_ARGS__)
