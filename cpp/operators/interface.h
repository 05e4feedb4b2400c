#pragma once

// The hash of the operators' schemas that this library was built for, see python/lite_attention/ops/interface.py. Each
// library tells its own, to whom opens it too.
extern "C" __attribute__((visibility("default"))) const char* lite_attention_operator_interface();

// The hash of the kernels' sources that this library was built from, see cmake/revision.py. Libraries of two builds do
// not load together, so that what a record tells is what ran.
extern "C" __attribute__((visibility("default"))) const char* lite_attention_kernel_hash();
