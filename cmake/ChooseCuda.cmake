# Whether the Hopper kernels are built, and if not, why.
#
# Reads      LITE_ATTENTION_CUDA, TorchStable_VERSION, TorchStable_CUDA, and what FindNvcc.cmake reads
# Provides   why_no_cuda: empty where they are built; else the end of a sentence that begins "this build holds no CUDA
#            kernels, as", for the end of the build, info and the operators' errors. Nvcc_EXECUTABLE where they are built

set(LITE_ATTENTION_CUDA AUTO CACHE STRING "Build the Hopper kernels: ON, OFF, or AUTO, where torch has CUDA and nvcc is found")
set_property(CACHE LITE_ATTENTION_CUDA PROPERTY STRINGS AUTO ON OFF)

set(why_no_cuda "")
set(again "install it again (`pip install .`)")
if(NOT LITE_ATTENTION_CUDA)
  set(why_no_cuda "it was built with LITE_ATTENTION_CUDA=OFF: ${again} without that")
elseif(LITE_ATTENTION_CUDA STREQUAL "AUTO" AND NOT TorchStable_CUDA)
  set(why_no_cuda "it was built with torch ${TorchStable_VERSION}: ${again} where torch has CUDA")
else()
  find_package(Nvcc 12.8 QUIET)
  if(NOT Nvcc_FOUND)
    set(wheels "")
    if(TorchStable_CUDA VERSION_GREATER_EQUAL 13) # before, no wheel held nvcc
      set(wheels ", or `pip install 'cuda-toolkit[nvcc,cccl]'`")
    endif()
    set(get_nvcc "get nvcc 12.8 or newer (with the CUDA toolkit${wheels})")
    if(NOT LITE_ATTENTION_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "LITE_ATTENTION_CUDA is ${LITE_ATTENTION_CUDA}, but ${Nvcc_NOT_FOUND_MESSAGE}: ${get_nvcc}")
    endif()
    set(why_no_cuda "${Nvcc_NOT_FOUND_MESSAGE} when it was built: ${get_nvcc} and ${again}")
  endif()
endif()
