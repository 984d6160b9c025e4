// The CUDA C++ that our kernels use, for a host compiler: see emulator.h for how it runs.

#pragma once

#include <cmath>
#include <cstdint>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One CPU thread runs one block at a time, so what is the block's is that thread's; and
// `thread_local` may stand both before a variable in a function and behind `extern`.
#define __shared__ thread_local

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::launch.block)
#define gridDim (emulator::launch.grid)
constexpr int warpSize = emulator::WARP;

#define VECTOR2(name, type)                   \
  struct alignas(2 * sizeof(type)) name##2 {  \
    type x, y;                                \
  };                                          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define VECTOR4(name, type)                                       \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name##4 { \
    type x, y, z, w;                                              \
  };                                                              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR2(int, int)
VECTOR2(uint, unsigned)
VECTOR2(float, float)
VECTOR2(short, short)
VECTOR2(ushort, unsigned short)
VECTOR2(char, signed char)
VECTOR2(uchar, unsigned char)
VECTOR2(longlong, long long)
VECTOR2(ulonglong, unsigned long long)
VECTOR2(double, double)
VECTOR4(int, int)
VECTOR4(uint, unsigned)
VECTOR4(float, float)
VECTOR4(short, short)
VECTOR4(ushort, unsigned short)
VECTOR4(char, signed char)
VECTOR4(uchar, unsigned char)
#undef VECTOR2
#undef VECTOR4
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// Barriers and warps. The default arguments are the lines of the calls.

inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_at_barrier(line); }

inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
  emulator::sync_warp(mask, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulator::ballot(mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

template <typename T>
T emulated_shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  emulator::shuffle(mask, source, &value, sizeof value, line);
  return value;
}
inline int emulated_lane() { return emulator::self->number % emulator::WARP; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  int first = emulated_lane() / width * width;
  return emulated_shuffle(mask, value, first + (source & (width - 1)), line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  int lane = emulated_lane(), source = lane - int(delta);
  return emulated_shuffle(mask, value, source < lane / width * width ? lane : source, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   int line = __builtin_LINE()) {
  int lane = emulated_lane(), source = lane + int(delta);
  return emulated_shuffle(mask, value, source >= (lane / width + 1) * width ? lane : source, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  int line = __builtin_LINE()) {
  int lane = emulated_lane(), source = lane ^ lanes;
  return emulated_shuffle(mask, value, source >= (lane / width + 1) * width ? lane : source, line);
}

// Blocks run one after another, so any access is atomic and seen by all.

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <typename T>
T emulated_exchange(T* address, T value) {
  T before = *address;
  *address = value;
  return before;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return emulated_exchange(address, T(*address + value));
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulated_exchange(address, *address < value ? value : *address);
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulated_exchange(address, value < *address ? value : *address);
}
template <typename T>
T atomicExch(T* address, T value) {
  return emulated_exchange(address, value);
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  return *address == compare ? emulated_exchange(address, value) : *address;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulated_exchange(address, *address >= limit ? 0 : *address + 1);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

// Numbers.

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return emulated_bits<float>(bits); }
inline float __int_as_float(int bits) { return emulated_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulated_bits<int>(value); }
inline int __float2int_rn(float value) { return int(std::nearbyint(value)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
