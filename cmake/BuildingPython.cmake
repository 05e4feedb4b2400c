# query_building_python(<prefix> <code>): runs code in the interpreter that the build is for.
#
# Reads      Python_EXECUTABLE
# Provides   <prefix>_LINES (what it printed, as a list), <prefix>_ERROR (empty if it succeeded)
#
# An isolated build (plain `pip install .`) hides the environment's packages behind these variables; torch and CUTLASS are
# meant to be the ones already installed there, not gigabytes downloaded for their headers.
function(query_building_python prefix code)
  foreach(hidden "" "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env ${hidden} ${Python_EXECUTABLE} -c "${code}"
      OUTPUT_VARIABLE output
      ERROR_VARIABLE error
      RESULT_VARIABLE failed
      OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed)
      set(error "")
      break()
    endif()
  endforeach()
  string(REPLACE "\n" ";" lines "${output}")
  set(${prefix}_LINES "${lines}" PARENT_SCOPE)
  set(${prefix}_ERROR "${error}" PARENT_SCOPE)
endfunction()
