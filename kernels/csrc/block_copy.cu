// Blocks between an engine's pages and buffers in canonical order, either way.
//
// A launch takes up to LIMIT blocks. Its plan is a kernel argument, so that nothing has to be
// brought to the device first, nothing to be kept until it has run. Buffers are addresses that
// the device can reach: its own memory, or this host's pinned memory, which is then read or
// written over the bus, 16 bytes a thread, without a copy on the way.
//
// The launcher is block_copy_cuda.py; it checks all that is taken for granted here.

#include "common.cuh"

constexpr int LIMIT = 256;
constexpr int UNROLL = 4;  // loads under way in every thread: the bus is far away
constexpr int THREADS = 256;

struct Plan {
  // Pages: element (half, layer, block, head, token, d) lies at bases[layer * 2 + half] plus the
  // strides, which are in elements. Those of tokens and d may differ between K and V.
  const unsigned long long* bases;
  long long block_stride, head_stride;
  long long token_strides[2], element_strides[2];
  // Buffers: heads lie head_bytes apart; in one, [layer][K, V][token][d] and then, if there are
  // any, float scales [layer][K, V], scale_offset bytes after its beginning.
  long long head_bytes, scale_offset;
  int page_tokens, block_tokens, run_tokens, head_dim;
  int layers, first_layer, layer_count;
  int first_head, heads;  // of the pages; a buffer begins with first_head
  int blocks;
  // Tokens come in runs that lie together in a page: runs[block * runs a block + ...] is a run's
  // first slot, page * page_tokens + offset, or negative for one that is left out.
  int runs[LIMIT];
  unsigned long long buffers[LIMIT];
};

struct Piece {
  int block, head, layer, half;  // head and layer: first ones are 0, the offsets come on top
};

// Piece number `number` of a launch.
__device__ inline Piece piece_of(const Plan& plan, unsigned number) {
  Piece piece;
  piece.half = number % 2;
  number /= 2;
  piece.layer = plan.first_layer + number % plan.layer_count;
  number /= plan.layer_count;
  piece.head = number % plan.heads;
  piece.block = number / plan.heads;
  return piece;
}

__device__ inline unsigned pieces(const Plan& plan) {
  return unsigned(plan.blocks) * plan.heads * plan.layer_count * 2;
}

// Element d of a token in its page; null where the token is left out.
template <typename T>
__device__ inline T* in_page(const Plan& plan, const Piece& piece, int token, int d) {
  int runs = plan.block_tokens / plan.run_tokens;
  int slot = plan.runs[piece.block * runs + token / plan.run_tokens];
  if (slot < 0) return nullptr;
  slot += token % plan.run_tokens;
  long long element = slot / plan.page_tokens * plan.block_stride +
                      (plan.first_head + piece.head) * plan.head_stride +
                      slot % plan.page_tokens * plan.token_strides[piece.half] +
                      d * plan.element_strides[piece.half];
  return reinterpret_cast<T*>(__ldg(plan.bases + piece.layer * 2 + piece.half)) + element;
}

// Element number `element` of a piece in its buffer.
template <typename T>
__device__ inline T* in_buffer(const Plan& plan, const Piece& piece, int element) {
  unsigned long long head = plan.buffers[piece.block] + piece.head * plan.head_bytes;
  long long before = (piece.layer * 2LL + piece.half) * plan.block_tokens * plan.head_dim;
  return reinterpret_cast<T*>(head) + before + element;
}

__device__ inline float* scale_of(const Plan& plan, const Piece& piece) {
  unsigned long long head = plan.buffers[piece.block] + piece.head * plan.head_bytes;
  return reinterpret_cast<float*>(head + plan.scale_offset) + piece.layer * 2 + piece.half;
}

// VECTOR neighbouring elements of a token: what one thread moves at once.
struct Step {
  Piece piece;
  int token, d;
};

template <int VECTOR>
__device__ inline Step step_of(const Plan& plan, unsigned number) {
  int in_row = plan.head_dim / VECTOR;
  Step step;
  step.d = number % in_row * VECTOR;
  number /= in_row;
  step.token = number % plan.block_tokens;
  step.piece = piece_of(plan, number / plan.block_tokens);
  return step;
}

template <int VECTOR>
__device__ inline unsigned steps(const Plan& plan) {
  return pieces(plan) * plan.block_tokens * (plan.head_dim / VECTOR);
}

// Bits as they are. T has the elements' size; every vector is aligned to its own size.
template <typename T, int VECTOR, bool OUT>
__global__ void __launch_bounds__(THREADS) copy_pages(const __grid_constant__ Plan plan) {
  using Word = typename WordOf<sizeof(T) * VECTOR>::type;
  unsigned stride = gridDim.x * blockDim.x, count = steps<VECTOR>(plan);
  for (unsigned first = blockIdx.x * blockDim.x + threadIdx.x; first < count;
       first += UNROLL * stride) {
    Word words[UNROLL];
    Word* targets[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      targets[i] = nullptr;
      unsigned number = first + i * stride;
      if (number >= count) continue;
      Step step = step_of<VECTOR>(plan, number);
      T* page = in_page<T>(plan, step.piece, step.token, step.d);
      if (page == nullptr) continue;
      T* buffer = in_buffer<T>(plan, step.piece, step.token * plan.head_dim + step.d);
      targets[i] = reinterpret_cast<Word*>(OUT ? buffer : page);
      words[i] = __ldcs(reinterpret_cast<const Word*>(OUT ? page : buffer));
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if (targets[i] != nullptr) __stcs(targets[i], words[i]);
    }
  }
}

// Pages of one type, buffers of another. With SCALED, which is for the way in only, elements
// are multiplied by the scale of their piece.
template <typename Page, typename Buffer, int VECTOR, bool OUT, bool SCALED>
__global__ void __launch_bounds__(THREADS) convert_pages(const __grid_constant__ Plan plan) {
  static_assert(!(OUT && SCALED), "quantise_pages writes scaled elements");
  unsigned stride = gridDim.x * blockDim.x, count = steps<VECTOR>(plan);
  for (unsigned number = blockIdx.x * blockDim.x + threadIdx.x; number < count; number += stride) {
    Step step = step_of<VECTOR>(plan, number);
    Page* page = in_page<Page>(plan, step.piece, step.token, step.d);
    if (page == nullptr) continue;
    Buffer* buffer = in_buffer<Buffer>(plan, step.piece, step.token * plan.head_dim + step.d);
    if (OUT) {
      Vector<Page, VECTOR> from = load_vector<VECTOR>(page);
      Vector<Buffer, VECTOR> to;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        to.elements[i] = from_float<Buffer>(to_float(from.elements[i]));
      }
      store_vector(buffer, to);
    } else {
      float scale = SCALED ? *scale_of(plan, step.piece) : 1.0f;
      Vector<Buffer, VECTOR> from = load_vector<VECTOR>(buffer);
      Vector<Page, VECTOR> to;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        to.elements[i] = from_float<Page>(to_float(from.elements[i]) * scale);
      }
      store_vector(page, to);
    }
  }
}

// The largest value of any thread of a block of THREADS: all of them get it.
__device__ inline float block_max(float value) {
  __shared__ float of_warps[THREADS / 32];
  value = warp_max(value);
  __syncthreads();  // those before may still be read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) value = fmaxf(value, of_warps[warp]);
  return value;
}

// Pages to buffers of a narrow type: each piece gets a scale, so that its largest magnitude
// becomes the type's largest number. One block a piece, which it reads twice; the second time it
// is in the cache.
template <typename Page, typename Buffer, int VECTOR>
__global__ void __launch_bounds__(THREADS) quantise_pages(const __grid_constant__ Plan plan) {
  int in_row = plan.head_dim / VECTOR, count = plan.block_tokens * in_row;
  for (unsigned number = blockIdx.x; number < pieces(plan); number += gridDim.x) {
    Piece piece = piece_of(plan, number);
    float largest = 0.0f;
    for (int v = threadIdx.x; v < count; v += THREADS) {
      Page* page = in_page<Page>(plan, piece, v / in_row, v % in_row * VECTOR);
      Vector<Page, VECTOR> from = load_vector<VECTOR>(page);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) largest = fmaxf(largest, fabsf(to_float(from.elements[i])));
    }
    largest = block_max(largest);
    // What is smaller than any number that matters is zero: its reciprocal would be infinite.
    bool zero = largest < 0x1p-100f;
    float inverse = zero ? 0.0f : LARGEST<Buffer> / largest;
    if (threadIdx.x == 0) *scale_of(plan, piece) = zero ? 0.0f : largest / LARGEST<Buffer>;
    for (int v = threadIdx.x; v < count; v += THREADS) {
      Page* page = in_page<Page>(plan, piece, v / in_row, v % in_row * VECTOR);
      Vector<Page, VECTOR> from = load_vector<VECTOR>(page);
      Vector<Buffer, VECTOR> to;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        to.elements[i] = from_float<Buffer>(to_float(from.elements[i]) * inverse);
      }
      store_vector(in_buffer<Buffer>(plan, piece, v * VECTOR), to);
    }
  }
}
