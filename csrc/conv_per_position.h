// conv_per_position: what the binding hands to the kernels.
#pragma once

#include "isa.h"
#include "types.h"

namespace dynaconv {

// A call in three spatial dimensions (1-D and 2-D: the first ones are 1). Strides are in numbers.
// Output and gradients are written in place of what the names say: the forward pass writes
// `output`, the gradient of the input writes `input` and reads `output` as the upstream gradient,
// the gradient of the weight writes `weight` and reads it too.
struct PerPosition {
  int64_t batch, groups, channels;  // channels of one group
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  void *input, *weight, *output;
  int64_t x_stride[5], y_stride[5];    // batch, channel, space
  int64_t w_stride[2], tap[3], at[3];  // batch, group; kernel; space

  // The piece that one task computes: `chunk` channels of a group, or all those of `bundle` groups,
  // at a box of `tile` positions.
  int64_t chunk, bundle, tile[3];
  int64_t tasks;
};

// What a call computes.
enum class Wanted { output, input_gradient, weight_gradient };

DYNACONV_DECLARE(namespace per_position {
  // Whether channels, rather than positions, lie in the lanes of a vector.
  template <class T> bool by_channels(Wanted, const PerPosition&);
  // Bytes of scratch that a thread needs.
  template <class T> int64_t scratch(Wanted, const PerPosition&);
  // The tasks from begin to end.
  template <class T>
  void run(Wanted, const PerPosition&, int64_t begin, int64_t end, void* scratch);
})

}  // namespace dynaconv
