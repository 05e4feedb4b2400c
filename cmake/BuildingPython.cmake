# query_building_python(<prefix> <code> [<argument>...]): runs code in the interpreter that the build is for.
#
# Reads      Python_EXECUTABLE
# Provides   <prefix>_LINES (what it printed, as a list), <prefix>_ERROR (empty if it succeeded)
#
# An isolated build hides the environment that it is meant for. pip does so by these variables, and what that environment
# holds (torch, CUTLASS, nvcc) need not be downloaded again; cmake/build_backend.py asks the same way. The build's own
# environment goes first.
function(query_building_python prefix code)
  set(errors "")
  foreach(hidden "" "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env ${hidden} ${Python_EXECUTABLE} -c "${code}" ${ARGN}
      OUTPUT_VARIABLE output
      ERROR_VARIABLE error
      RESULT_VARIABLE failed
      OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed)
      set(errors "")
      break()
    endif()
    string(APPEND errors "${error}")
  endforeach()
  string(REPLACE "\n" ";" lines "${output}")
  set(${prefix}_LINES "${lines}" PARENT_SCOPE)
  set(${prefix}_ERROR "${errors}" PARENT_SCOPE)
endfunction()
