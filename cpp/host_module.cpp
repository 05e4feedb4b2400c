// lite_attention._host: facts of this build for Python. No tensors pass through here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "kernels/cpu/variants.h"
#include "tile_shape.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, module, py::mod_gil_not_used()) {
  using namespace lite_attention;
  module.doc() = "Facts of this lite_attention build: tile shapes, instruction sets, compilers.";

  module.def(
      "tile_shapes",
      [] {
        std::vector<std::tuple<int, int, int, int>> rows;
        for (const TileShape& shape : kTileShapes) {
          rows.emplace_back(shape.max_head_dim, shape.tile_m, shape.tile_n, shape.visit_rows);
        }
        return rows;
      },
      "Rows (max_head_dim, tile_m, tile_n, visit_rows), ascending in max_head_dim.");
  module.def("cpu_variants", &cpu::runnable_variants,
             "Builds of the CPU kernel this processor can run, the fastest first.");
  module.def("selected_cpu_variant", &cpu::selected_variant, "The build of the CPU kernel in use.");

  // Must equal OPERATOR_INTERFACE in python/lite_attention/_library.py.
  module.attr("OPERATOR_INTERFACE") = 2;
  module.attr("VERSION") = LITE_ATTENTION_VERSION;
  module.attr("GIT_REVISION") = LITE_ATTENTION_GIT_REVISION;
  module.attr("CXX_COMPILER") = LITE_ATTENTION_CXX_COMPILER;
  module.attr("TORCH_BUILD_VERSION") = LITE_ATTENTION_TORCH_VERSION;
  // Empty in a build without CUDA kernels.
  module.attr("CUDA_ARCHITECTURES") = LITE_ATTENTION_CUDA_ARCHITECTURES;
  module.attr("CUDA_VERSION") = LITE_ATTENTION_CUDA_VERSION;
  module.attr("CUTLASS_VERSION") = LITE_ATTENTION_CUTLASS_VERSION;
  module.attr("HEAD_DIM_MULTIPLE") = kHeadDimMultiple;
  module.attr("FINE_TILE_N") = kFineTileN;
}
