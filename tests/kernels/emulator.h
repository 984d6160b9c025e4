// Runs a CUDA kernel on one CPU thread: every thread of a block is a fiber.
//
// What it is strict about, because a GPU is not: barriers that not all threads reach, at the same
// line; shuffles from lanes that take no part; misaligned vector accesses and array indices out of
// bounds (the compiler's own checks report here); writes beyond dynamic shared memory; addresses
// where there is no memory. Shared memory is garbage when a block starts. The seed of a launch
// chooses the order of blocks, of warps and of threads, whether warps run ahead of one another,
// and whether an asynchronous copy is made at once or as late as its wait allows: a missing barrier
// or wait gives wrong numbers for one of them.
//
// What it does not emulate: time, caches, memory order between blocks that run at once, textures,
// clusters, inline PTX.

#pragma once

// What a kernel's translation unit sees: little, because there are many of them. The emulator
// itself (emulator.cpp) is a library that all of theirs share, and with it its fibers: stacks of
// each one's own would be tens of thousands of mappings.

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

namespace emulator {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;

// The thread that runs.
struct Thread {
  uint3 index;
  int number;  // within the block
};
extern Thread* self;
extern uint3 block_index;

struct Launch {
  uint3 grid, block;
  unsigned shared_bytes, seed;
};
extern Launch launch;

// The first fault of a launch is kept; its text is the launch's result.
void fault(const char* format, ...);
// The thread goes no further, and its block with it.
void end_with_fault();

void wait_at_barrier(int line);
// Each waits until the lanes of `mask` have made the same call, from the same line.
void sync_warp(unsigned mask, int line);
unsigned ballot(unsigned mask, bool predicate, int line);
// `value`, of at most 16 bytes, becomes the one of lane `source`.
void shuffle(unsigned mask, int source, void* value, size_t bytes, int line);

// `bytes` from `source`, and behind them `zeros` zero bytes; both together 4, 8 or 16.
void copy_async(void* target, const void* source, size_t bytes, size_t zeros);
void copy_async_commit();
// Until at most `left` of the groups committed are still under way.
void copy_async_wait(size_t left);

// Runs a grid: shape is grid, block (three numbers each), shared_bytes and seed; `call` calls
// `kernel` with what `arguments` point to, whose sizes must be those it takes. Returns the fault,
// or an empty string.
struct Signature {
  void (*call)(void (*kernel)(), void** arguments);
  const size_t* sizes;
  size_t count;
  unsigned char* shared;  // some of the shared memory that its library has
};
const char* start(void (*kernel)(), Signature takes, const unsigned* shape, void** arguments,
                  const size_t* sizes, size_t count);

template <typename... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::decay_t<Parameters>*>(arguments[I])...);
}

// As the driver starts a kernel: with pointers to its arguments.
template <typename... Parameters>
const char* start(void (*kernel)(Parameters...), const unsigned* shape, void** arguments,
                  const size_t* sizes, size_t count) {
  static const size_t takes[] = {sizeof(Parameters)..., 0};
  static thread_local unsigned char shared;
  auto with = [](void (*kernel)(), void** arguments) {
    call(reinterpret_cast<void (*)(Parameters...)>(kernel), arguments,
         std::index_sequence_for<Parameters...>{});
  };
  return start(reinterpret_cast<void (*)()>(kernel),
               {with, takes, sizeof...(Parameters), &shared}, shape, arguments, sizes, count);
}

}  // namespace emulator
