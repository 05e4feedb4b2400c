# CUTLASS's headers, which hold CuTe.
#
# Reads      CUTLASS_ROOT (a checkout, its include folder found below), else the nvidia-cutlass wheel of Python_EXECUTABLE
# Provides   Cutlass::Cutlass, Cutlass_VERSION

include(BuildingPython)
if(CUTLASS_ROOT)
  find_path(Cutlass_INCLUDE_DIR cute/tensor.hpp PATHS "${CUTLASS_ROOT}/include" "${CUTLASS_ROOT}" NO_DEFAULT_PATH)
  set(Cutlass_NOT_FOUND_MESSAGE "CUTLASS_ROOT is ${CUTLASS_ROOT}, where there is no include/cute/tensor.hpp")
else()
  # Found without an import, which would need the wheel's own dependencies.
  query_building_python(
    cutlass "import importlib.util; print(*importlib.util.find_spec('cutlass_library').submodule_search_locations)")
  find_path(Cutlass_INCLUDE_DIR cute/tensor.hpp PATHS "${cutlass_LINES}/source/include" NO_DEFAULT_PATH)
  set(Cutlass_NOT_FOUND_MESSAGE
      "The CUDA kernels need CUTLASS's headers: `pip install --no-deps nvidia-cutlass==4.2.0` in the environment of ${Python_EXECUTABLE}, or -DCUTLASS_ROOT=<checkout>. A build without these kernels: -DLITE_ATTENTION_CUDA=OFF"
  )
endif()

if(Cutlass_INCLUDE_DIR)
  file(STRINGS "${Cutlass_INCLUDE_DIR}/cutlass/version.h" cutlass_version REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) +[0-9]+")
  list(TRANSFORM cutlass_version REPLACE "[^0-9]+" "")
  list(JOIN cutlass_version "." Cutlass_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Cutlass
  REQUIRED_VARS Cutlass_INCLUDE_DIR
  VERSION_VAR Cutlass_VERSION
  REASON_FAILURE_MESSAGE "${Cutlass_NOT_FOUND_MESSAGE}")

if(Cutlass_FOUND AND NOT TARGET Cutlass::Cutlass)
  add_library(Cutlass::Cutlass INTERFACE IMPORTED)
  target_include_directories(Cutlass::Cutlass SYSTEM INTERFACE "${Cutlass_INCLUDE_DIR}")
endif()
