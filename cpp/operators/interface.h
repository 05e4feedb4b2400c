#pragma once

// The hash of the operators' schemas that this library was built for, see python/lite_attention/ops/interface.py. Each
// library tells its own, to whom opens it too.
extern "C" __attribute__((visibility("default"))) const char* lite_attention_operator_interface();
