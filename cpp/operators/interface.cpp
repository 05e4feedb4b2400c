#include "operators/interface.h"

#include "operator_interface.h"  // written by the build

const char* lite_attention_operator_interface() { return LITE_ATTENTION_OPERATOR_INTERFACE; }
