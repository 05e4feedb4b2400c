# The nvcc that compiles the Hopper kernels.
#
# Reads      CMAKE_CUDA_COMPILER, else the environment's CUDACXX, else its CUDA_HOME or CUDA_PATH: taken at their word.
#            Without any of them: the first that is new enough, of Python_EXECUTABLE's wheels and of Nvcc_PLACES
# Provides   Nvcc_EXECUTABLE, Nvcc_VERSION; Nvcc_LIBRARY_DIR, of its runtime, where it does not look there itself;
#            Nvcc_NOT_FOUND_MESSAGE, half a sentence, where there is none

include(BuildingPython)

if(NOT DEFINED Nvcc_PLACES)
  set(Nvcc_PLACES nvcc /usr/local/cuda/bin/nvcc) # PATH, and where NVIDIA's installer puts it
endif()
set(_named "${CMAKE_CUDA_COMPILER}")
if(NOT _named)
  string(REGEX MATCH "^[^ ]*" _named "$ENV{CUDACXX}") # arguments may follow
endif()
foreach(_toolkit "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
  if(_toolkit AND NOT _named)
    set(_named "${_toolkit}/bin/nvcc")
  endif()
endforeach()
if(_named)
  set(_candidates "${_named}")
  set(Nvcc_NOT_FOUND_MESSAGE "there was no ${_named}")
else()
  # Of the wheels some come without the others, as what ptxas needs does with other frameworks.
  query_building_python(
    _wheels
    "import importlib.util, pathlib
spaces = importlib.util.find_spec('nvidia').submodule_search_locations
toolkits = [folder for space in spaces for folder in sorted(pathlib.Path(space).glob('cu[0-9]*'), reverse=True)]
needed = ['bin/nvcc', 'bin/crt', 'nvvm/bin/cicc', 'include/cuda_runtime.h', 'include/cccl', 'lib/libcudart_static.a']
print(next(folder for folder in toolkits if all((folder / part).exists() for part in needed)) / 'bin' / 'nvcc')")
  set(_candidates ${_wheels_LINES} ${Nvcc_PLACES})
  set(Nvcc_NOT_FOUND_MESSAGE "no nvcc was found")
endif()

set(Nvcc_EXECUTABLE "")
set(Nvcc_VERSION "")
foreach(_candidate IN LISTS _candidates)
  find_program(_compiler NAMES "${_candidate}" NO_CACHE NO_CMAKE_SYSTEM_PATH)
  if(_compiler)
    execute_process(COMMAND "${_compiler}" --version OUTPUT_VARIABLE _told ERROR_VARIABLE _told)
    string(REGEX MATCH "release [0-9.]+, V([0-9.]+)" _told "${_told}")
    if(_told AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL Nvcc_FIND_VERSION)
      set(Nvcc_EXECUTABLE "${_compiler}")
      set(Nvcc_VERSION "${CMAKE_MATCH_1}")
      break()
    endif()
    set(Nvcc_NOT_FOUND_MESSAGE "${_compiler} was version ${CMAKE_MATCH_1}")
  endif()
  unset(_compiler)
endforeach()
unset(_compiler)

# nvcc looks in lib64, and in wheels that is lib.
cmake_path(GET Nvcc_EXECUTABLE PARENT_PATH Nvcc_LIBRARY_DIR)
cmake_path(REPLACE_FILENAME Nvcc_LIBRARY_DIR lib)
if(NOT EXISTS "${Nvcc_LIBRARY_DIR}/libcudart_static.a")
  set(Nvcc_LIBRARY_DIR "")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Nvcc
  REQUIRED_VARS Nvcc_EXECUTABLE
  VERSION_VAR Nvcc_VERSION
  REASON_FAILURE_MESSAGE "${Nvcc_NOT_FOUND_MESSAGE}")
