// Deformable convolution in 1-D to 3-D: what its kernels are given.
//
// The kernels read the input as rows of channels, one row a position, in the dtype C that is
// computed in (float for bfloat16). Output positions go in tiles. Channels go in slices, taps in
// chunks; what a chunk of taps sees of a slice is one row of columns a position, tap by tap.
#pragma once

#include "isa.h"
#include "types.h"

namespace dynaconv {

struct DeformShape {
  int64_t rank, batch, channels, out_channels, groups, offset_groups, taps;
  int64_t inputs, positions;                    // points of the input, and of the output
  int64_t group_in, group_out, offset_channels;  // channels of a group, and of an offset group
  int64_t length[3], size[3], kernel[3], stride[3], padding[3], dilation[3];
};

// How a call is cut into pieces.
struct DeformCut {
  int64_t tile;    // positions at a time, at most DEFORM_TILE
  int64_t slice;   // channels at a time
  int64_t taps;    // taps at a time; slice * taps is at most DEFORM_COLUMNS
  int64_t ranges;  // parts of the slices that different tasks of one sample take
};

constexpr int64_t DEFORM_TILE = 98;
constexpr int64_t DEFORM_COLUMNS = 576;
// Room for a tile's positions in whole vectors.
constexpr int64_t DEFORM_POINTS = 112;
// From a row of columns to the next: an odd number of cache lines, so that rows do not compete for
// the same places in the cache.
constexpr int64_t DEFORM_ROW = DEFORM_COLUMNS + 16;
// Output channels that one task packs.
constexpr int64_t DEFORM_BLOCK = 32;
// Packed columns are padded to a multiple of this, the widest vector.
constexpr int64_t DEFORM_PAD = 16;

// A tensor (batch, channels, positions): the strides.
template <class T>
struct Planes {
  T* data;
  int64_t sample, channel, position;
};

// The same with channels side by side.
template <class T>
struct Rows {
  T* data;
  int64_t sample, row;
};

template <class T, class C, class O>
struct DeformForward {
  DeformShape shape;
  DeformCut cut;
  Rows<const C> input;
  Planes<const O> offset;
  Planes<const T> modulation;  // data may be null
  const C* weight;             // as pack_forward leaves it
  const T* bias;               // may be null
  Planes<T> output;
};

template <class T, class C, class O>
struct DeformBackward {
  DeformShape shape;
  DeformCut cut;
  Rows<const C> input, grad;
  Planes<const O> offset;
  Planes<const T> modulation;  // data may be null
  const C* weight;             // as pack_backward leaves it
  Rows<C> grad_input;          // data may be null; rows as far apart as the input's
  Planes<O> grad_offset;       // data may be null
  Planes<T> grad_modulation;   // data may be null
  C* parts;  // with more than one range: (ranges, batch, offset groups, taps, rank + 1, positions)
  T* grad_weight;
};

DYNACONV_DECLARE(
    // A task: `step` positions of one sample, (batch, ceil(positions / step)).
    template <class T, class C>
    void planes_to_rows(Planes<const T> from, Rows<C> to, int64_t channels, int64_t positions,
                        int64_t step, int64_t begin, int64_t end);
    template <class T, class C>
    void rows_to_planes(Rows<const C> from, Planes<T> to, int64_t channels, int64_t positions,
                        int64_t step, int64_t begin, int64_t end);

    // weight is (C_out, C / groups, taps), contiguous. A task of pack_forward: DEFORM_BLOCK output
    // channels of a group, (groups, blocks); of pack_backward: (slices, taps).
    template <class T, class C>
    void pack_forward(const DeformShape& shape, const DeformCut& cut, const T* weight, C* packed,
                      int64_t begin, int64_t end);
    template <class T, class C>
    void pack_backward(const DeformShape& shape, const DeformCut& cut, const T* weight, C* packed,
                       int64_t begin, int64_t end);

    // A task: one tile, (batch, tiles).
    template <class T, class C, class O>
    void deform_forward(const DeformForward<T, C, O>& call, int64_t begin, int64_t end,
                        C* scratch);
    // A task: a range of slices of one sample, (batch, ranges).
    template <class T, class C, class O>
    void deform_backward_data(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end,
                              C* scratch);
    // A task: one tap of an offset group of a sample, (batch, offset groups, taps).
    template <class T, class C, class O>
    void deform_add_parts(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end);
    // A task: a chunk of taps of one slice, (slices, chunks).
    template <class T, class C, class O>
    void deform_backward_weight(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end,
                                C* scratch);)

}  // namespace dynaconv
