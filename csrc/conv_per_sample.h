// A convolution whose kernel is each sample's own, or mixed for it from a few experts' kernels.
#pragma once

#include "isa.h"
#include "types.h"

namespace dynaconv {

// One spatial dimension: the sizes read and written, and how the kernel lies.
struct Axis {
  int64_t from, to, taps, stride, padding, dilation;
};

// The output or the input's gradient:
//   output[n, m, q] = bias[n, m] + sum over r and k of W[n][m, r, k] * input[n, r, at(q, k)],
// at(q, k) = q * stride + k * dilation - padding, or where `transposed` is set, as for the
// gradient, the whole (q + padding - k * dilation) / stride. Zero outside.
struct ConvPerSample {
  int64_t batch, from_channels, to_channels, taps;
  int64_t experts;  // 0: weight holds a kernel for each sample
  bool transposed;
  Axis axes[3];
  const void* input;
  int64_t input_strides[5];
  // Contiguous; to_channels come before from_channels, after them where transposed.
  const void* weight;
  const void* coefficients;  // (batch, experts) or (batch, experts, taps), contiguous
  int64_t kinds;             // coefficients of an expert: 1, or as many as taps
  const void* bias;          // none, or with these strides
  int64_t bias_strides[2];
  void* output;
  int64_t output_strides[5];
};

// The kernels' gradient dW[n][m, c, k] = sum over p of grad[n, m, p] * input[n, c, at(p, k)], or
// where they are mixed: d weight[e] = sum over n of coefficients[n, e] dW[n], and
// d coefficients[n, e] = <dW[n], weight[e]>; likewise tap by tap where each has coefficients.
struct KernelGradient {
  int64_t batch, in_channels, out_channels, taps;
  int64_t experts;
  Axis axes[3];
  const void* input;
  int64_t input_strides[5];
  const void* grad;
  int64_t grad_strides[5];
  const void* weight;
  const void* coefficients;
  int64_t kinds;
  // Contiguous like weight; of experts in the dtype that is computed in.
  void* kernel_gradient;
  void* coefficient_gradient;  // (tasks, batch, experts, kinds): each task's part
};

// How the work is cut: tasks that are independent of each other, and a thread's memory in numbers
// of the dtype that is computed in.
struct Cut {
  int64_t tasks, scratch;
};

DYNACONV_DECLARE(
    void cut(const ConvPerSample& job, int64_t number_bytes, Cut* answer);
    void cut(const KernelGradient& job, int64_t number_bytes, Cut* answer);
    template <class T>
    void run(const ConvPerSample& job, int64_t begin, int64_t end, void* scratch);
    template <class T>
    void run(const KernelGradient& job, int64_t begin, int64_t end, void* scratch);)

}  // namespace dynaconv
