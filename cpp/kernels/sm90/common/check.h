// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace lite_attention::sm90 {

inline void check(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(action) + " failed: " + cudaGetErrorString(error));
}

}  // namespace lite_attention::sm90
