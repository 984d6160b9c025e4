// New keys and values into their pages: rotated (keys), converted, quantised on the way.

#include "common.cuh"

constexpr int THREADS = 128;

template <typename T>
__device__ inline T kept(float value, float scale) {
  return from_float<T>(sizeof(T) == 1 ? __fdiv_rn(value, scale) : value);
}

// VECTOR numbers of a row, from number `first` on.
template <typename In, typename T, int VECTOR>
__device__ inline void write_row(const In* from, T* to, int first, float scale) {
  Vector<In, VECTOR> given = load_vector<VECTOR>(from + first);
  Vector<T, VECTOR> row;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    row.elements[i] = kept<T>(to_float(given.elements[i]), scale);
  }
  store_vector(to + first, row);
}

// The same of both halves of a key, with element i paired with i + HEAD_DIM / 2
// (arXiv:2104.09864). Every product and sum is rounded by itself, as torch does it.
template <typename In, typename T, int VECTOR, int HEAD_DIM>
__device__ inline void write_rotated(const In* from, T* to, int first, const float* cosines,
                                     const float* sines, float scale) {
  constexpr int HALF = HEAD_DIM / 2;
  Vector<In, VECTOR> low = load_vector<VECTOR>(from + first);
  Vector<In, VECTOR> high = load_vector<VECTOR>(from + HALF + first);
  Vector<T, VECTOR> row_low, row_high;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    float cosine = cosines[first + i], sine = sines[first + i];
    float x = to_float(low.elements[i]), y = to_float(high.elements[i]);
    float turned_x = __fadd_rn(__fmul_rn(x, cosine), __fmul_rn(y, -sine));
    float turned_y = __fadd_rn(__fmul_rn(y, cosine), __fmul_rn(x, sine));
    row_low.elements[i] = kept<T>(turned_x, scale);
    row_high.elements[i] = kept<T>(turned_y, scale);
  }
  store_vector(to + first, row_low);
  store_vector(to + HALF + first, row_high);
}

// A thread for every pair of vectors of a key, and the same of its value. Rows whose slot is
// negative pad the batch, and write nothing. Keys are rotated if there are positions.
template <typename In, typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS)
    write_kv(const In* keys, long long key_stride, const In* values, long long value_stride,
             const long long* slots, const long long* positions, const float* cosines,
             const float* sines, const float* scales, int scale_stride, T* kv,
             long long head_stride, long long value_offset, int tokens, int kv_heads) {
  constexpr int VECTOR = 16 / (sizeof(In) > sizeof(T) ? sizeof(In) : sizeof(T));
  constexpr int HALF = HEAD_DIM / 2, PIECES = HALF / VECTOR;
  long long number = (long long)blockIdx.x * THREADS + threadIdx.x;
  int first = number % PIECES * VECTOR;
  number /= PIECES;
  int head = number % kv_heads;
  long long token = number / kv_heads;
  if (token >= tokens || slots[token] < 0) return;
  const In* key = keys + token * key_stride + head * HEAD_DIM;
  const In* value = values + token * value_stride + head * HEAD_DIM;
  T* page = kv + head * head_stride + slots[token] * HEAD_DIM;
  float key_scale = scales ? scales[head * scale_stride] : 1;
  float value_scale = scales ? scales[head * scale_stride + 1] : 1;
  if (positions != nullptr) {
    long long row = positions[token] * HALF;
    write_rotated<In, T, VECTOR, HEAD_DIM>(key, page, first, cosines + row, sines + row, key_scale);
  } else {
    write_row<In, T, VECTOR>(key, page, first, key_scale);
    write_row<In, T, VECTOR>(key, page, HALF + first, key_scale);
  }
  write_row<In, T, VECTOR>(value, page + value_offset, first, value_scale);
  write_row<In, T, VECTOR>(value, page + value_offset, HALF + first, value_scale);
}
