// Where an attention's results go.
#pragma once

namespace lite_attention {

struct Outputs {
  void* out = nullptr;   // contiguous [batch, query_len, query_heads, head_dim]
  float* lse = nullptr;  // contiguous [batch, query_heads, query_len], natural log
};

}  // namespace lite_attention
