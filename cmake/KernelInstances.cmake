# The sources of the kernels that nvcc takes longest for: one for each line of the table, each with every traversal that
# cpp/kernels/sm90/forward/shapes.cuh has for its columns.
#
# Provides   forward_instances (paths below the build folder)

#               columns  dtype
set(instance_table
                "64      kBFloat16"
                "64      kFloat16"
                "128     kBFloat16"
                "128     kFloat16"
                "256     kBFloat16"
                "256     kFloat16")
set(short_kBFloat16 bf16)
set(short_kFloat16 fp16)

set(forward_instances "")
foreach(line IN LISTS instance_table)
  string(REGEX MATCH "([0-9]+) +([A-Za-z0-9]+)" matched "${line}")
  set(columns ${CMAKE_MATCH_1})
  set(dtype ${CMAKE_MATCH_2})
  set(instance "${CMAKE_CURRENT_BINARY_DIR}/instances/forward_d${columns}_${short_${dtype}}.cu")
  configure_file(cpp/kernels/sm90/forward/forward_instance.cu.in "${instance}" @ONLY)
  list(APPEND forward_instances "${instance}")
endforeach()
