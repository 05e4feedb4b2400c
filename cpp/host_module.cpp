// lite_attention._host: facts of this build for Python, and a context variable that compiled code can read. No tensors
// pass through here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "kernels/cpu/common/variants.h"
#include "operators/interface.h"
#include "revision.h"
#include "rules/tile_shape.h"

namespace py = pybind11;

namespace {

// A contextvars.ContextVar whose value is an attribute. torch.compile cannot trace ContextVar.get; an attribute that C
// defines it reads, guards on, and reads again at each call.
class ContextValue {
 public:
  explicit ContextValue(const char* name)
      : variable_(py::reinterpret_steal<py::object>(PyContextVar_New(name, Py_None))) {
    if (!variable_) throw py::error_already_set();
  }

  py::object current() const {
    PyObject* value = nullptr;
    if (PyContextVar_Get(variable_.ptr(), nullptr, &value) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

  py::object variable() const { return variable_; }

 private:
  py::object variable_;
};

}  // namespace

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

  py::class_<ContextValue>(module, "ContextValue", "A context variable with the default None.")
      .def(py::init<const char*>())
      .def_property_readonly("current", &ContextValue::current, "Its value in the current context.")
      .def_property_readonly("variable", &ContextValue::variable, "The ContextVar, to set and reset it.");

  module.attr("OPERATOR_INTERFACE") = lite_attention_operator_interface();
  module.attr("VERSION") = LITE_ATTENTION_VERSION;
  module.attr("GIT_REVISION") = LITE_ATTENTION_GIT_REVISION;
  module.attr("KERNEL_HASH") = lite_attention_kernel_hash();
  module.attr("CXX_COMPILER") = LITE_ATTENTION_CXX_COMPILER;
  module.attr("TORCH_BUILD_VERSION") = LITE_ATTENTION_TORCH_VERSION;
  module.attr("WHY_NO_CUDA") = LITE_ATTENTION_WHY_NO_CUDA;  // the end of a sentence; empty in a build with CUDA kernels
  // Empty in a build without CUDA kernels.
  module.attr("CUDA_ARCHITECTURES") = LITE_ATTENTION_CUDA_ARCHITECTURES;
  module.attr("CUDA_VERSION") = LITE_ATTENTION_CUDA_VERSION;
  module.attr("CUTLASS_VERSION") = LITE_ATTENTION_CUTLASS_VERSION;
  module.attr("HEAD_DIM_MULTIPLE") = kHeadDimMultiple;
  module.attr("FINE_TILE_N") = kFineTileN;
}
