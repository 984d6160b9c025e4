// What kernels/csrc/tensor_core.cuh has as PTX, for the emulator: written from the tables of the
// PTX ISA ("Matrix fragments for mma.m16n8k16", "ldmatrix"), element by element. Products are
// added in float32, one after another; a tensor core's own order and rounding are not specified.

#pragma once

#include "emulator_cuda.h"

// What the lanes of each warp of the running block lay open to one another.
template <typename T>
struct EmulatedWarp {
  static T (&lanes())[emulator::WARP] {
    static thread_local T warps[emulator::MAX_THREADS / emulator::WARP][emulator::WARP];
    return warps[emulator::self->number / emulator::WARP];
  }
};

// Calls `use(lanes)` in every lane once all lanes of its warp have given their value.
template <typename T, typename Use>
void emulated_together(const T& own, int line, Use use) {
  auto& lanes = EmulatedWarp<T>::lanes();
  lanes[emulated_lane()] = own;
  __syncwarp(0xffffffff, line);
  use(lanes);
  __syncwarp(0xffffffff, line);
}

struct EmulatedRow {
  unsigned short elements[8];
};

// Each lane reads the row that it names when it comes here, not when all have come: what others
// wrote must have been waited for before.
template <int MATRICES>
void emulated_load(unsigned (&to)[MATRICES], const void* row, bool transposed, int line) {
  EmulatedRow own = {};
  if (emulated_lane() < 8 * MATRICES) {
    if (uintptr_t(row) % 16) {
      emulator::fault("line %d: a matrix row at %p is not aligned", line, row);
      emulator::end_with_fault();
    }
    memcpy(&own, row, sizeof own);
  }
  emulated_together(own, line, [&](auto& rows) {
    auto element = [&](int matrix, int r, int c) {
      return unsigned(rows[8 * matrix + r].elements[c]);
    };
    int group = emulated_lane() / 4, pair = 2 * (emulated_lane() % 4);
    for (int m = 0; m < MATRICES; ++m) {
      to[m] = transposed ? element(m, pair, group) | element(m, pair + 1, group) << 16
                         : element(m, group, pair) | element(m, group, pair + 1) << 16;
    }
  });
}

inline void load_matrices(unsigned (&to)[2], const void* row, int line = __builtin_LINE()) {
  emulated_load(to, row, false, line);
}
inline void load_matrices(unsigned (&to)[4], const void* row, int line = __builtin_LINE()) {
  emulated_load(to, row, false, line);
}
inline void load_transposed(unsigned (&to)[2], const void* row, int line = __builtin_LINE()) {
  emulated_load(to, row, true, line);
}
inline void load_transposed(unsigned (&to)[4], const void* row, int line = __builtin_LINE()) {
  emulated_load(to, row, true, line);
}

struct EmulatedOperands {
  unsigned a[4], b[2];
};

template <typename T>
void multiply(T, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
              int line = __builtin_LINE()) {
  EmulatedOperands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated_together(own, line, [&](auto& lanes) {
    auto number = [](unsigned word, int half) {
      return to_float(T{static_cast<unsigned short>(word >> 16 * half)});
    };
    for (int i = 0; i < 4; ++i) {
      int row = emulated_lane() / 4 + i / 2 * 8, column = emulated_lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        unsigned left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
        unsigned right = lanes[column * 4 + k % 8 / 2].b[k / 8];
        sum[i] += number(left, k % 2) * number(right, k % 2);
      }
    }
  });
}

template <typename T>
unsigned packed(T, float low, float high) {
  return from_float<T>(low).bits | unsigned(from_float<T>(high).bits) << 16;
}

inline unsigned as_halves(Fp8, unsigned pair) {
  auto half = [](unsigned byte) {
    return from_float<Half>(to_float(Fp8{static_cast<unsigned char>(byte)})).bits;
  };
  return half(pair & 0xff) | unsigned(half(pair >> 8 & 0xff)) << 16;
}
inline unsigned as_halves(Int8, unsigned pair) {
  auto half = [](unsigned byte) { return from_float<Half>(to_float(Int8(byte))).bits; };
  return half(pair & 0xff) | unsigned(half(pair >> 8 & 0xff)) << 16;
}

template <int FIRST, int SECOND>
unsigned bytes_of(unsigned word) {
  return (word >> 8 * FIRST & 0xff) | (word >> 8 * SECOND & 0xff) << 8;
}
