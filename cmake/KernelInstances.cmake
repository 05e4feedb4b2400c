# The Hopper kernels: their sources, with which flags nvcc compiles them, and the table of those that it takes longest for:
# one source for each line, with every traversal that cpp/kernels/sm90/forward/shapes.cuh has for its columns. This file and
# cpp/ decide their machine code, with what info prints: compiler, architecture, CUTLASS. revision.py hashes both.
#
# Provides   sm90 (objects)

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

add_library(
  sm90 OBJECT
  ${forward_instances}
  cpp/kernels/sm90/common/tensor_map.cu
  cpp/kernels/sm90/forward/forward.cu
  cpp/kernels/sm90/merge.cu
  cpp/kernels/sm90/plan/plan.cu
  cpp/kernels/sm90/plan/queue.cu
  cpp/kernels/sm90/top_k_map.cu)
target_compile_options(sm90 PRIVATE --expt-relaxed-constexpr -Xptxas=-v)
target_compile_definitions(sm90 PRIVATE CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED) # wgmma of 176 columns
target_link_libraries(sm90 PRIVATE lite_attention_flags Cutlass::Cutlass)
# In front of a launcher that is there already, such as ccache, which repeats what nvcc said.
set(check_ptxas "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/check_ptxas.py"
                $<IF:$<BOOL:${LITE_ATTENTION_WERROR}>,error,warning>)
set(launchers ${check_ptxas} ${CMAKE_CUDA_COMPILER_LAUNCHER})
set_target_properties(sm90 PROPERTIES CUDA_COMPILER_LAUNCHER "${launchers}")
