// What the forward is told. Kernels include this and know nothing of torch.
#pragma once

#include "params/decision.h"
#include "params/operands.h"
#include "params/outputs.h"
#include "params/problem.h"
#include "params/visibility.h"

namespace lite_attention {

struct ForwardParams {
  Problem problem;
  Operands operands;
  Visibility visibility;
  Decision decision;
  Outputs outputs;
};

}  // namespace lite_attention
