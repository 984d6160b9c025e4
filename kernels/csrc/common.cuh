// What all kernels share: element types, conversions, asynchronous copies, sums over a warp.
//
// No CUDA header is included, here or in any source: NVRTC needs nothing but these files, and a
// host compiler can run them (KVSTORE_EMULATED; the tests do). What is inline PTX has another
// form for it beside it. Rounding is to nearest even everywhere, as torch does.

#pragma once

// Elements as they lie in memory.
struct Bfloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};
struct Fp8 {  // e4m3, without infinities
  unsigned char bits;
};
using Int8 = signed char;

// The largest number of a type that values are scaled to fit into.
template <typename T>
constexpr float LARGEST = 0;
template <>
constexpr float LARGEST<Fp8> = 448.0f;
template <>
constexpr float LARGEST<Int8> = 127.0f;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Int8 value) { return float(value); }
__device__ inline float to_float(Bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}
__device__ inline float to_float(Half value) {
#ifdef KVSTORE_EMULATED
  return float(emulated_bits<_Float16>(value.bits));
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}
__device__ inline float to_float(Fp8 value) {
  // Exponent and mantissa as a half's are 2^8 too small; subnormal numbers come out right.
  unsigned magnitude = value.bits & 0x7f;
  unsigned sign = unsigned(value.bits & 0x80) << 8;
  Half half = {static_cast<unsigned short>(sign | magnitude << 7)};
  return magnitude == 0x7f ? __uint_as_float(0x7fc00000) : to_float(half) * 256.0f;
}

template <typename T>
__device__ T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
__device__ inline Half from_float<Half>(float value) {
#ifdef KVSTORE_EMULATED
  return {emulated_bits<unsigned short>(_Float16(value))};
#else
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#endif
}
// Beyond the largest number: the largest number. Scales are chosen so that it is not met.
template <>
__device__ inline Fp8 from_float<Fp8>(float value) {
  unsigned bits = __float_as_uint(value);
  unsigned sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  float magnitude = __uint_as_float(bits);
  unsigned coded;
  if (bits > 0x7f800000) {
    coded = 0x7f;
  } else if (magnitude >= LARGEST<Fp8>) {
    coded = 0x7e;
  } else if (magnitude < 0x1p-6f) {  // subnormal: steps of 2^-9; the eighth is the first normal
    coded = unsigned(__float2int_rn(magnitude * 512.0f));
  } else {
    coded = (bits + 0x7ffff + (bits >> 20 & 1) >> 20) - (120 << 3);
  }
  return {static_cast<unsigned char>(sign | coded)};
}
template <>
__device__ inline Int8 from_float<Int8>(float value) {
  return Int8(__float2int_rn(fminf(fmaxf(value, -LARGEST<Int8>), LARGEST<Int8>)));
}

// What one instruction loads or stores: at most 16 bytes, aligned to their number.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

// N neighbouring elements, in registers.
template <typename T, int N>
struct Vector {
  using Word = typename WordOf<sizeof(T) * N>::type;
  union {
    Word word;
    T elements[N];
  };
};
template <int N, typename T>
__device__ inline Vector<T, N> load_vector(const T* address) {
  Vector<T, N> vector;
  vector.word = *reinterpret_cast<const typename Vector<T, N>::Word*>(address);
  return vector;
}
template <int N, typename T>
__device__ inline void store_vector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<typename Vector<T, N>::Word*>(address) = vector.word;
}

// Asynchronous copies from global to shared memory, 16 bytes each (cp.async, sm_80). A thread
// sees what it copied after wait; other threads after a barrier behind that.

// Zeros instead of the source where `valid` is false; nothing is read then.
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
#ifdef KVSTORE_EMULATED
  emulator::copy_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
#else
  unsigned address = unsigned(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(global), "r"(bytes)
               : "memory");
#endif
}
__device__ inline void copy_async_commit() {
#ifdef KVSTORE_EMULATED
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most LEFT of the groups committed are still under way.
template <int LEFT>
__device__ inline void copy_async_wait() {
#ifdef KVSTORE_EMULATED
  emulator::copy_async_wait(LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Over the lanes of a warp, or of every WIDTH neighbours in it: all of them get the result.
template <int WIDTH = 32>
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lanes = WIDTH / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, lanes);
  }
  return value;
}
template <int WIDTH = 32>
__device__ inline float warp_max(float value) {
#pragma unroll
  for (int lanes = WIDTH / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
  }
  return value;
}
