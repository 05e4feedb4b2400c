# CUTLASS's headers, which hold CuTe.
#
# Reads      CUTLASS_ROOT (a checkout, its include folder found below it), else the nvidia-cutlass wheel of Python_EXECUTABLE,
#            else downloads that wheel, from where pip or uv is set up to: headers of 6 MB without what they depend on
# Provides   Cutlass::Cutlass, Cutlass_VERSION

include(BuildingPython)
if(CUTLASS_ROOT)
  set(_include_folders "${CUTLASS_ROOT}/include" "${CUTLASS_ROOT}")
  set(Cutlass_NOT_FOUND_MESSAGE "CUTLASS_ROOT is ${CUTLASS_ROOT}, where there is no include/cute/tensor.hpp")
else()
  # Found without an import, which would need the wheel's own dependencies.
  query_building_python(
    _installed "import importlib.util; print(*importlib.util.find_spec('cutlass_library').submodule_search_locations)")
  set(_downloads "${CMAKE_CURRENT_BINARY_DIR}/cutlass")
  set(_include_folders "${_downloads}/cutlass_library/source/include")
  set(Cutlass_NOT_FOUND_MESSAGE "")
  if(_installed_LINES)
    set(_include_folders "${_installed_LINES}/source/include")
  elseif(NOT EXISTS "${_include_folders}/cute/tensor.hpp")
    set(_requirement "nvidia-cutlass==${Cutlass_FIND_VERSION}.*")
    message(STATUS "Downloading ${_requirement} for its headers")
    set(_arguments install --quiet --no-deps --target "${_downloads}" "${_requirement}")
    if(NOT "$ENV{UV}" STREQUAL "") # uv runs this build
      execute_process(COMMAND "$ENV{UV}" pip ${_arguments} --python "${Python_EXECUTABLE}" ERROR_VARIABLE _download_ERROR)
    else()
      query_building_python(
        _download "import runpy; runpy.run_module('pip', run_name='__main__', alter_sys=True)" ${_arguments})
    endif()
    set(Cutlass_NOT_FOUND_MESSAGE
        "The CUDA kernels need CUTLASS's headers, and ${_requirement} cannot be downloaded: install it (pip install --no-deps '${_requirement}') in the environment of ${Python_EXECUTABLE}, or pass -C cmake.define.CUTLASS_ROOT=<checkout>. A build without these kernels: -C cmake.define.LITE_ATTENTION_CUDA=OFF. The download said:\n${_download_ERROR}"
    )
  endif()
endif()
find_path(Cutlass_INCLUDE_DIR cute/tensor.hpp PATHS ${_include_folders} NO_DEFAULT_PATH NO_CACHE)

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
