# The parts of an installed torch that a library on its stable ABI needs: headers and libtorch.
#
# torch's own package config is not used: it would enable CUDA, inject flags and tie the result to one torch build.
#
# Reads      Python_EXECUTABLE (the interpreter torch is installed for)
# Provides   TorchStable::TorchStable, TorchStable_VERSION, TorchStable_CUDA (torch's CUDA version, empty without)

include(BuildingPython)
# Without an import, which would load CUDA's libraries.
query_building_python(
  torch
  "import importlib.util, pathlib, runpy
folder = pathlib.Path(importlib.util.find_spec('torch').origin).parent
facts = runpy.run_path(str(folder / 'version.py'))
print(facts['__version__'], facts['cuda'] or '', folder, sep='\\n')")
if(torch_ERROR)
  set(TorchStable_NOT_FOUND_MESSAGE
      "${Python_EXECUTABLE} has no torch: install torch >= 2.10 first. Python said:\n${torch_ERROR}")
else()
  list(GET torch_LINES 0 TorchStable_VERSION)
  list(GET torch_LINES 1 TorchStable_CUDA)
  list(GET torch_LINES 2 torch_folder)
  find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h PATHS "${torch_folder}/include" NO_DEFAULT_PATH NO_CACHE)
  find_library(TorchStable_LIBRARY torch PATHS "${torch_folder}/lib" NO_DEFAULT_PATH NO_CACHE)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_LIBRARY TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "${TorchStable_NOT_FOUND_MESSAGE}")

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable INTERFACE IMPORTED)
  target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  # The oldest torch the library shall load in: headers newer than 2.10's stable API do not compile.
  target_compile_definitions(TorchStable::TorchStable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
  # Nothing here may look used to the linker, yet libtorch must be named as needed: torch's own copy is loaded locally.
  target_link_options(TorchStable::TorchStable INTERFACE "LINKER:--no-as-needed")
  target_link_libraries(TorchStable::TorchStable INTERFACE "${TorchStable_LIBRARY}")
endif()
