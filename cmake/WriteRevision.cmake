# Run at every build (cmake -P): writes which sources it is made of, as a header that is touched only when that changes.
#
# Reads      SOURCE (the checkout), HEADER (the path to write)
# Defines    LITE_ATTENTION_GIT_REVISION (git's, with -dirty; or unknown), LITE_ATTENTION_KERNEL_HASH (of what lies in cpp/)

execute_process(
  COMMAND git describe --always --dirty --abbrev=12
  WORKING_DIRECTORY "${SOURCE}"
  OUTPUT_VARIABLE revision
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)
if(NOT revision)
  set(revision "unknown")
endif()

file(GLOB_RECURSE sources RELATIVE "${SOURCE}" "${SOURCE}/cpp/*.h" "${SOURCE}/cpp/*.cpp" "${SOURCE}/cpp/*.cuh"
     "${SOURCE}/cpp/*.cu" "${SOURCE}/cpp/*.in") # sorted
set(hashes "")
foreach(source IN LISTS sources)
  file(SHA256 "${SOURCE}/${source}" hash)
  string(APPEND hashes "${hash} ${source}\n")
endforeach()
string(SHA256 hash "${hashes}")
string(SUBSTRING "${hash}" 0 12 hash)

file(CONFIGURE OUTPUT "${HEADER}" @ONLY CONTENT [[
#define LITE_ATTENTION_GIT_REVISION "@revision@"
#define LITE_ATTENTION_KERNEL_HASH "@hash@"
]])
