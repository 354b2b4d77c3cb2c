#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace dynaconv {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa chosen() {
  const Isa most = best();
  const char* wish = std::getenv("DYNACONV_ISA");
  if (wish && !std::strcmp(wish, "portable")) return Isa::portable;
  if (wish && !std::strcmp(wish, "avx2") && most != Isa::portable) return Isa::avx2;
  return most;
}

}  // namespace

Isa isa() {
  static const Isa answer = chosen();
  return answer;
}

const char* isa_name() {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

}  // namespace dynaconv
