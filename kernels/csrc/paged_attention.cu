// Attention of one query token of each sequence to its paged KV (decode).
//
// A sequence's context is cut into chunks, by its own length alone. A block computes one chunk of
// one KV head for up to eight of the query heads that share it; a second kernel adds the chunks
// up, in order. So the bits of a result depend on nothing but the sequence: not on its company,
// not on the grid, not on where its pages lie. The grid is fixed and blocks find their work from
// the lengths on the device, so that a CUDA graph can replay both kernels.
//
// In a block each warp goes its own way through every fourth tile of 16 tokens, copies tiles
// ahead of their use, and keeps softmax's running maximum and sum (arXiv:1805.02867); the warps
// meet only at the end of the chunk. docs/adr/0051-paged-attention.md says why, and what it costs.

#include "kv_operands.cuh"
#include "kv_tiles.cuh"

constexpr int HEADS = 8;        // query heads in one product
constexpr int MAX_CHUNKS = 32;  // of a sequence: one for each lane that adds them up
constexpr int MIN_CHUNK_TOKENS = 512;
constexpr float LOG2_E = 1.4426950408889634f;

template <typename T, typename Query>
struct Arguments {
  const Query* query;  // [batch, kv_heads * group, HEAD_DIM]
  long long query_stride;
  const T* kv;  // one layer's keys of the first head
  long long head_stride, value_offset;
  const int* block_tables;
  int table_width;
  const int* contexts;
  const float* scales;  // of the layer's keys and values, or null
  int scale_stride;
  Query* out;              // as query, dense
  float* partial_sums;     // [batch, heads, MAX_CHUNKS, HEAD_DIM], and behind it
  float* partial_weights;  // [batch, heads, MAX_CHUNKS, 2]: maximum, sum of weights
  int batch, kv_heads, group, block_tokens;
};

// What a block works on.
struct Chunk {
  int sequence, kv_head, first_head, heads;  // query heads of the group
  int index, begin, end;                     // tokens
  bool whole;                                // nothing else of this sequence
};

// Softmax of some of the tokens, so far. Each quad of lanes has one head. Rows g + 8 of the
// products are the same heads' as rows g, with what rounding the operands had cut off.
template <int STEPS>
struct Running {
  float maximum = __int_as_float(0xff800000);
  float weights = 0;
  float sums[STEPS][2][4] = {};
};

__device__ inline int chunk_tokens(int context) {
  int tokens = MIN_CHUNK_TOKENS;
  while (tokens * MAX_CHUNKS < context) tokens *= 2;
  return tokens;
}
__device__ inline int chunks_of(int context) {
  return context <= 0 ? 0 : (context - 1) / chunk_tokens(context) + 1;
}

// Ends of each sequence's work items, in `last`[batch]: sums of their numbers.
__device__ inline void count_items(int* last, const int* contexts, int batch, int per_chunk) {
  for (int i = threadIdx.x; i < batch; i += THREADS) last[i] = per_chunk * chunks_of(contexts[i]);
  __syncthreads();
  if (threadIdx.x < 32) {
    int lane = threadIdx.x, before = 0;
    for (int first = 0; first < batch; first += 32) {
      int sum = first + lane < batch ? last[first + lane] : 0;
      for (int delta = 1; delta < 32; delta *= 2) {
        int left = __shfl_up_sync(0xffffffff, sum, delta);
        if (lane >= delta) sum += left;
      }
      if (first + lane < batch) last[first + lane] = before + sum;
      before += __shfl_sync(0xffffffff, sum, 31);
    }
  }
  __syncthreads();
}

template <typename Arguments>
__device__ Chunk chunk_of(const Arguments& a, const int* last, int item) {
  int low = 0, high = a.batch - 1;  // the first sequence whose items end behind this one
  while (low < high) {
    int middle = (low + high) / 2;
    if (last[middle] > item) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Chunk chunk;
  chunk.sequence = low;
  int rest = item - (low ? last[low - 1] : 0);
  int splits = (a.group - 1) / HEADS + 1;  // neighbours, so that L2 has the KV of all but one
  chunk.first_head = rest % splits * HEADS;
  chunk.heads = min(HEADS, a.group - chunk.first_head);
  chunk.kv_head = rest / splits % a.kv_heads;
  chunk.index = rest / (splits * a.kv_heads);
  int context = a.contexts[low], tokens = chunk_tokens(context);
  chunk.begin = chunk.index * tokens;
  chunk.end = min(context, chunk.begin + tokens);
  chunk.whole = context <= tokens;
  return chunk;
}

// Adds one tile, of which the sequence has `tokens`. `scale` is softmax's, for powers of 2.
template <typename T, int HEAD_DIM>
__device__ void attend(Running<HEAD_DIM / 16>& running, const unsigned (&query)[HEAD_DIM / 16][4],
                       const unsigned char* tile, int tokens, float scale) {
  using P = typename Product<T>::Type;
  constexpr int PITCH = Ring<T, HEAD_DIM>::PITCH, STEPS = HEAD_DIM / 16;
  float scores[2][4] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned b[2][2];
    key_operands<T, PITCH>(b, tile, step);
    for (int n = 0; n < 2; ++n) multiply(P{}, scores[n], query[step], b[n][0], b[n][1]);
  }
  float score[2][2], maximum = running.maximum;
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 2; ++i) {
      bool there = 8 * n + threadIdx.x % 4 * 2 + i < tokens;
      score[n][i] = there ? (scores[n][i] + scores[n][i + 2]) * scale : __int_as_float(0xff800000);
      maximum = fmaxf(maximum, score[n][i]);
    }
  }
  maximum = warp_max<4>(maximum);
  float shrink = exp2f(running.maximum - maximum);
  running.maximum = maximum;
  running.weights *= shrink;
  unsigned weights[4];
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 2; ++i) {
      score[n][i] = exp2f(score[n][i] - maximum);
      running.weights += score[n][i];
    }
    split<P>(score[n][0], score[n][1], weights[2 * n], weights[2 * n + 1]);
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned b[2][2];
    value_operands<T, PITCH>(b, tile + TILE * PITCH, step);
    for (int n = 0; n < 2; ++n) {
      for (float& sum : running.sums[step][n]) sum *= shrink;
      multiply(P{}, running.sums[step][n], weights, b[n][0], b[n][1]);
    }
  }
}

// Adds the warps up and writes the chunk: the result if it is all, else its part of it.
template <typename T, typename Query, int HEAD_DIM>
__device__ void merge(const Arguments<T, Query>& a, const Chunk& chunk,
                      const Running<HEAD_DIM / 16>& running, float* sums, float value_scale) {
  constexpr int PITCH = HEAD_DIM + 8;  // floats of a head
  static_assert(4 * WARPS * HEADS * PITCH <= Ring<T, HEAD_DIM>::RING_BYTES);
  __shared__ float maxima[WARPS][HEADS], weights[WARPS][HEADS];
  int warp = threadIdx.x / 32, own_head = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  float own_weights = warp_sum<4>(running.weights);
  __syncthreads();  // no warp reads its ring any more
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        sums[(warp * HEADS + own_head) * PITCH + value_element<T>(step, quad, half, i)] =
            running.sums[step][half][i] + running.sums[step][half][i + 2];
      }
    }
  }
  if (quad == 0) {
    maxima[warp][own_head] = running.maximum;
    weights[warp][own_head] = own_weights;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < chunk.heads * HEAD_DIM; i += THREADS) {
    int head = i / HEAD_DIM, element = i % HEAD_DIM;
    float maximum = maxima[0][head], weight = 0, sum = 0;
    for (int w = 1; w < WARPS; ++w) maximum = fmaxf(maximum, maxima[w][head]);
    for (int w = 0; w < WARPS; ++w) {
      float shrink = exp2f(maxima[w][head] - maximum);
      weight += shrink * weights[w][head];
      sum += shrink * sums[(w * HEADS + head) * PITCH + element];
    }
    sum *= value_scale;
    long long row = (long long)chunk.sequence * a.kv_heads * a.group +
                    chunk.kv_head * a.group + chunk.first_head + head;
    if (chunk.whole) {
      a.out[row * HEAD_DIM + element] = from_float<Query>(sum / weight);
    } else {
      long long part = row * MAX_CHUNKS + chunk.index;
      a.partial_sums[part * HEAD_DIM + element] = sum;
      if (element < 2) a.partial_weights[2 * part + element] = element ? weight : maximum;
    }
  }
  __syncthreads();  // before the ring is filled again
}

// Block sizes are multiples of TILE. Shared memory: Ring::RING_BYTES, and an int a sequence.
template <typename T, typename Query, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, HEAD_DIM <= 128 ? 3 : 1)
    paged_attention(const Query* query, long long query_stride, const T* kv, long long head_stride,
                    long long value_offset, const int* block_tables, int table_width,
                    const int* contexts, const float* scales, int scale_stride, Query* out,
                    float* workspace, int batch, int kv_heads, int group, int block_tokens) {
  using R = Ring<T, HEAD_DIM>;
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  float* partial_weights = workspace + (long long)batch * kv_heads * group * MAX_CHUNKS * HEAD_DIM;
  const Arguments<T, Query> a = {
      query,    query_stride, kv,           head_stride, value_offset, block_tables,
      table_width, contexts,  scales,       scale_stride, out,         workspace,
      partial_weights, batch, kv_heads,     group,       block_tokens};
  int* last = reinterpret_cast<int*>(dynamic_shared + R::RING_BYTES);
  count_items(last, contexts, batch, kv_heads * ((group - 1) / HEADS + 1));

  int warp = threadIdx.x / 32, head = threadIdx.x % 32 / 4;
  for (int item = blockIdx.x; item < last[batch - 1]; item += gridDim.x) {
    Chunk chunk = chunk_of(a, last, item);
    Tiles<T, HEAD_DIM> tiles = {kv + chunk.kv_head * head_stride,
                                value_offset,
                                block_tables + (long long)chunk.sequence * table_width,
                                block_tokens,
                                chunk.begin + warp * TILE,
                                chunk.end,
                                dynamic_shared + warp * R::STAGES * R::STAGE_BYTES};
    for (int tile = 0; tile < R::TILES_AHEAD; ++tile) tiles.start(tile);

    unsigned operands[R::STEPS][4];
    int first_head = chunk.kv_head * group + chunk.first_head;
    load_query<T, Query, HEAD_DIM>(
        operands, query + chunk.sequence * query_stride + (first_head + head) * HEAD_DIM,
        head < chunk.heads);
    const float* scale = scales ? scales + chunk.kv_head * scale_stride : nullptr;
    float score_scale = LOG2_E * rsqrtf(HEAD_DIM) * (scale ? scale[0] : 1);

    Running<R::STEPS> running;
    for (int tile = 0; tile < tiles.count(); ++tile) {
      copy_async_wait<R::TILES_AHEAD - 1>();
      __syncwarp();  // the tile is here for all lanes, and the one before is done with
      tiles.start(tile + R::TILES_AHEAD);
      attend<T, HEAD_DIM>(running, operands, tiles.stage(tile), chunk.end - tiles.first_token(tile),
                          score_scale);
    }
    copy_async_wait<0>();
    merge<T, Query, HEAD_DIM>(a, chunk, running, reinterpret_cast<float*>(dynamic_shared),
                              scale ? scale[1] : 1);
  }
}

// Adds up the chunks of sequences that have several, and zeros what has no context. One warp for
// each query head of each sequence.
template <typename Query, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS)
    paged_attention_sum(const int* contexts, const float* workspace, Query* out, int batch,
                        int heads) {
  int lane = threadIdx.x % 32;
  long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= (long long)batch * heads) return;
  int chunks = chunks_of(contexts[row / heads]);
  if (chunks == 1) return;
  const float* sums = workspace + row * MAX_CHUNKS * HEAD_DIM;
  const float* weights = workspace + (long long)batch * heads * MAX_CHUNKS * HEAD_DIM +
                         row * MAX_CHUNKS * 2;
  float maximum = lane < chunks ? weights[2 * lane] : __int_as_float(0xff800000);
  float overall = warp_max(maximum);
  float shrink = lane < chunks ? exp2f(maximum - overall) : 0;
  float own = lane < chunks ? weights[2 * lane + 1] : 0;
  float total = warp_sum(own * shrink);
  for (int first = 0; first < HEAD_DIM; first += 32) {
    int element = first + lane;
    float sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float part = element < HEAD_DIM ? sums[chunk * HEAD_DIM + element] : 0;
      sum += __shfl_sync(0xffffffff, shrink, chunk) * part;
    }
    if (element < HEAD_DIM) {
      out[row * HEAD_DIM + element] = from_float<Query>(chunks ? sum / total : 0);
    }
  }
}
