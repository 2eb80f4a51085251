// The activations by name, in the order of the table in fastdeq/activations.py: the macro expands
// to F("identity", Identity) F("relu", Relu) ... for dispatchers.

#pragma once

#include <string_view>

#define FASTDEQ_FOR_EACH_ACTIVATION(F) \
  F("identity", Identity)              \
  F("relu", Relu)                      \
  F("leaky_relu", LeakyRelu)           \
  F("tanh", Tanh)                      \
  F("hardtanh", Hardtanh)              \
  F("sigmoid", Sigmoid)                \
  F("softplus", Softplus)              \
  F("elu", Elu)                        \
  F("gelu", Gelu)                      \
  F("silu", Silu)

namespace fastdeq {

// The index in the table, -1 for a name that is not in it.
inline int activation_index(std::string_view name) {
  int index = 0;
#define FASTDEQ_COMPARE(known, functor) \
  if (name == known) return index;      \
  ++index;
  FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_COMPARE)
#undef FASTDEQ_COMPARE
  return -1;
}

}  // namespace fastdeq
