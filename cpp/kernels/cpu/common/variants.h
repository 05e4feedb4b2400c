// The builds of forward.cpp and which of them this processor gets. Knows nothing of torch; the host module shares it.
#pragma once

#include <string>
#include <vector>

namespace lite_attention::cpu {

// Names of the builds this processor can run, the fastest first.
std::vector<std::string> runnable_variants();

// The build in use: the fastest runnable one, or the one named by LITE_ATTENTION_CPU_VARIANT, which is read once. A
// name that is unknown or not runnable throws std::runtime_error.
const std::string& selected_variant();

}  // namespace lite_attention::cpu
