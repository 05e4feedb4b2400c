# The headers revision.h and kernel_hash.h, which say what a build is made of (revision.py).
#
# Provides   include_revision(TARGET FOLDER): TARGET may include them, and knows them as of this build

function(include_revision target folder)
  if(NOT TARGET revision)
    # At every build, not once when it is configured: what info prints in a bug report must be what was built.
    add_custom_target(
      revision
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/revision.py" "${folder}"
      BYPRODUCTS "${folder}/revision.h" "${folder}/kernel_hash.h"
      VERBATIM)
  endif()
  add_dependencies(${target} revision)
  target_include_directories(${target} PRIVATE "${folder}")
endfunction()
