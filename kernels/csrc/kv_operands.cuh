// Keys, values and queries as operands of the tensor cores: 16 tokens, 16 elements at a step.

#pragma once

#include "tensor_core.cuh"

// The type in which the tensor cores multiply: bytes become halves, exactly.
template <typename T>
struct Product {
  using Type = T;
};
template <>
struct Product<Fp8> {
  using Type = Half;
};
template <>
struct Product<Int8> {
  using Type = Half;
};

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

// x and y as a rounded pair, and what the rounding cut off as another.
template <typename P>
__device__ inline void split(float x, float y, unsigned& rounded, unsigned& rest) {
  rounded = packed(P{}, x, y);
  rest = packed(P{}, x - to_float(P{static_cast<unsigned short>(rounded)}),
                y - to_float(P{static_cast<unsigned short>(rounded >> 16)}));
}

// Which element of a head stands in column 2 * quad + i (half 0) or that + 8 (half 1) of a step.
// Of bytes a lane gets four neighbours at once, so there the columns are numbered to suit that.
template <typename T>
__device__ inline int key_element(int step, int quad, int half, int i) {
  return 16 * step + (sizeof(T) == 1 ? 4 * quad + 2 * half + i : 8 * half + 2 * quad + i);
}
template <typename T>
__device__ inline int value_element(int step, int quad, int half, int i) {
  return 16 * step + (sizeof(T) == 1 ? 4 * quad + 2 * i + half : 8 * half + 2 * quad + i);
}

template <typename T, typename Query, int HEAD_DIM>
__device__ void load_query(unsigned (&operands)[HEAD_DIM / 16][4], const Query* head, bool wanted) {
  using P = typename Product<T>::Type;
  int quad = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2] = {0, 0};
      if (wanted) {
        Vector<Query, 2> given = load_vector<2>(head + key_element<T>(step, quad, half, 0));
        for (int i = 0; i < 2; ++i) x[i] = to_float(given.elements[i]);
      }
      unsigned(&pair)[4] = operands[step];
      if constexpr (same<P, Query>) {
        pair[2 * half] = packed(P{}, x[0], x[1]);
        pair[2 * half + 1] = 0;
      } else {
        split<P>(x[0], x[1], pair[2 * half], pair[2 * half + 1]);
      }
    }
  }
}

// b[n] holds keys of tokens 8 * n and on, as columns, for one step of 16 elements.
template <typename T, int PITCH>
__device__ void key_operands(unsigned (&b)[2][2], const unsigned char* tile, int step) {
  int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    unsigned m[4];
    int row = lane / 16 * 8 + lane % 8;
    load_matrices(m, tile + row * PITCH + step * 32 + lane / 8 % 2 * 16);
    for (int n = 0; n < 2; ++n) b[n][0] = m[2 * n], b[n][1] = m[2 * n + 1];
  } else {
    unsigned m[2];
    load_matrices(m, tile + lane % 16 * PITCH + step * 16);
    for (int n = 0; n < 2; ++n) {
      b[n][0] = as_halves(T{}, bytes_of<0, 1>(m[n]));
      b[n][1] = as_halves(T{}, bytes_of<2, 3>(m[n]));
    }
  }
}

// b[n] holds the values of all 16 tokens, as rows, for eight of the 16 elements of a step.
template <typename T, int PITCH>
__device__ void value_operands(unsigned (&b)[2][2], const unsigned char* tile, int step) {
  int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    unsigned m[4];
    load_transposed(m, tile + lane % 16 * PITCH + step * 32 + lane / 16 * 16);
    for (int n = 0; n < 2; ++n) b[n][0] = m[2 * n], b[n][1] = m[2 * n + 1];
  } else {
    unsigned m[2];  // two neighbours of one token, and below them those of the next
    load_transposed(m, tile + lane % 16 * PITCH + step * 16);
    for (int half = 0; half < 2; ++half) {
      b[0][half] = as_halves(T{}, bytes_of<0, 2>(m[half]));
      b[1][half] = as_halves(T{}, bytes_of<1, 3>(m[half]));
    }
  }
}
