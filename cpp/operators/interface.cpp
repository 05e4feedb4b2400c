#include "operators/interface.h"

#include "kernel_hash.h"         // written by the build
#include "operator_interface.h"  // likewise

const char* lite_attention_operator_interface() { return LITE_ATTENTION_OPERATOR_INTERFACE; }

const char* lite_attention_kernel_hash() { return LITE_ATTENTION_KERNEL_HASH; }
