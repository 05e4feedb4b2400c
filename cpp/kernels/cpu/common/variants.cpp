#include "kernels/cpu/common/variants.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace lite_attention::cpu {

std::vector<std::string> runnable_variants() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // What the compiler may use under -march=x86-64-v3 and -v4 (CMakeLists.txt).
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("lzcnt") &&
                  __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) names.emplace_back("avx512");
  if (v3) names.emplace_back("avx2");
#endif
  names.emplace_back("baseline");
  return names;
}

const std::string& selected_variant() {
  static const std::string selected = [] {
    const std::vector<std::string> names = runnable_variants();
    const char* wanted = std::getenv("LITE_ATTENTION_CPU_VARIANT");
    if (wanted == nullptr || *wanted == '\0') return names.front();
    if (std::find(names.begin(), names.end(), wanted) != names.end()) return std::string(wanted);
    std::string message = "LITE_ATTENTION_CPU_VARIANT is '" + std::string(wanted) + "', expected one of:";
    for (const std::string& name : names) message += " " + name;
    throw std::runtime_error(message);
  }();
  return selected;
}

}  // namespace lite_attention::cpu
