// Instructions of the tensor cores, one function each (PTX ISA 8.0; sm_80 and later).
//
// Nothing but instructions is here: the emulator has its own form of each, written from the same
// tables, so that what is around them can be tested without a GPU. Sixteen-bit operands are
// `unsigned`s of two, the first in the low half.

#pragma once

#include "common.cuh"

#ifdef KVSTORE_EMULATED
#include "emulator_tensor_core.h"
#else

// Two 8x8 matrices of 16-bit elements from shared memory. Lane i < 16 names row i % 8 of matrix
// i / 8: 16 bytes. Register m of lane i gets elements 2 * (i % 4) and the next of row i / 4 of
// matrix m.
__device__ inline void load_matrices(unsigned (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
// Four of them: all lanes name rows.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same, transposed: register m of lane i gets element i / 4 of rows 2 * (i % 4) and the next.
__device__ inline void load_transposed(unsigned (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline void load_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}

// sum += a b, with a 16x16, b 16x8 and sum 16x8, in float32. In lane i, with g = i / 4 and
// c = 2 * (i % 4), registers of two hold columns c, c + 1 of a and rows c, c + 1 of b:
// a[0] row g; a[1] row g + 8; a[2] row g, columns + 8; a[3] row g + 8, columns + 8;
// b0 column g; b1 column g, rows + 8; sum[0..1] row g, columns c, c + 1; sum[2..3] row g + 8.
__device__ inline void multiply(Bfloat16, float (&sum)[4], const unsigned (&a)[4], unsigned b0,
                                unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(Half, float (&sum)[4], const unsigned (&a)[4], unsigned b0,
                                unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline unsigned packed(Bfloat16, float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline unsigned packed(Half, float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two numbers in the low half of `pair` as halves, which hold all of them exactly.
__device__ inline unsigned as_halves(Fp8, unsigned pair) {
  unsigned halves;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<unsigned short>(pair)));
#else
  // As in common.cuh, two at a time: where a half has them, exponents mean 2^8 times less.
  unsigned wide = __byte_perm(pair, 0, 0x1404);
  unsigned nan = (((wide & 0x7f007f00) + 0x01000100) & 0x80008000) >> 15;
  halves = (wide & 0x80008000) | (wide & 0x7f007f00) >> 1;
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x5c005c00));
  halves |= nan * 0x7e00;
#endif
  return halves;
}
__device__ inline unsigned as_halves(Int8, unsigned pair) {
  // 0x6400 + b is the half 1024 + b, for bytes b = 128 + the number.
  unsigned halves = __byte_perm(pair ^ 0x8080, 0x6464, 0x5140);
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x64806480));
  return halves;
}

// Bytes FIRST and SECOND of a word, in the low half of what comes back.
template <int FIRST, int SECOND>
__device__ inline unsigned bytes_of(unsigned word) {
  return __byte_perm(word, 0, FIRST | SECOND << 4);
}

#endif
