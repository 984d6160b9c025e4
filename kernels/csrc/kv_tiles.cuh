// How tiles of paged keys and values come into shared memory, ahead of their use.

#pragma once

#include "common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 16;  // tokens; they lie in one block of the block table
constexpr int MIN_AHEAD_BYTES = 6144;  // that a warp has on their way

template <typename T, int HEAD_DIM>
struct Ring {
  static constexpr int STEPS = HEAD_DIM / 16;
  static constexpr int ROW_BYTES = HEAD_DIM * sizeof(T);
  // An odd number of 16-byte columns puts a column of eight rows into all banks.
  static constexpr int PITCH = (ROW_BYTES / 16 | 1) * 16;
  static constexpr int STAGE_BYTES = 2 * TILE * PITCH;
  static constexpr int TILES_AHEAD = (MIN_AHEAD_BYTES - 1) / (2 * TILE * ROW_BYTES) + 1;
  static constexpr int STAGES = TILES_AHEAD + 1;
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
};

// Brings the tiles of one warp into its ring, ahead of their use.
template <typename T, int HEAD_DIM>
struct Tiles {
  using R = Ring<T, HEAD_DIM>;
  const T* keys;
  long long value_offset;
  const int* table;
  int block_tokens, begin, end;  // of the warp's first tile; of the chunk
  unsigned char* ring;
  int slot = 0;  // where tile 32 * n + lane begins, for the n now under way

  __device__ int count() const { return end <= begin ? 0 : (end - begin - 1) / (TILE * WARPS) + 1; }
  __device__ int first_token(int tile) const { return begin + tile * TILE * WARPS; }
  __device__ unsigned char* stage(int tile) const {
    return ring + tile % R::STAGES * R::STAGE_BYTES;
  }

  // Starts the copy of a tile; with none left, only counts as if.
  __device__ void start(int tile) {
    int lane = threadIdx.x % 32;
    if (tile < count()) {
      if (tile % 32 == 0 && tile + lane < count()) {
        int token = first_token(tile + lane);
        slot = table[token / block_tokens] * block_tokens + token % block_tokens;
      }
      const T* from = keys + (long long)__shfl_sync(0xffffffff, slot, tile % 32) * HEAD_DIM;
      copy(stage(tile), from, end - first_token(tile));
      copy(stage(tile) + TILE * R::PITCH, from + value_offset, end - first_token(tile));
    }
    copy_async_commit();
  }

  // TILE rows; zeros for those that the sequence does not have, as 0 times them must be 0.
  __device__ static void copy(unsigned char* to, const T* from, int rows) {
    constexpr unsigned COLUMNS = R::ROW_BYTES / 16, PIECES = TILE * COLUMNS;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(from);
    unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned first = 0; first < PIECES; first += 32) {
      // Where whole rows are 32 pieces, what a lane adds is the same in every round.
      constexpr bool EVEN = 32 % COLUMNS == 0;
      unsigned row = EVEN ? first / COLUMNS + lane / COLUMNS : (first + lane) / COLUMNS;
      unsigned column = EVEN ? lane % COLUMNS : (first + lane) % COLUMNS;
      if (PIECES % 32 == 0 || first + lane < PIECES) {
        copy_async(to + row * R::PITCH + column * 16, bytes + (first + lane) * 16,
                   int(row) < rows);
      }
    }
  }
};
