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

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator_fiber.h"
#include "emulator_memory.h"

namespace emulator {

inline void wait_at_barrier(int line) {
  self->line = line;
  self->state = State::at_barrier;
  to_scheduler();
}

inline void wait_in_warp(WarpCall call, unsigned mask, int line) {
  if (!(mask >> (self->number % WARP) & 1)) {
    fault("line %d: lane %d calls with a mask 0x%08x that leaves it out", line,
          self->number % WARP, mask);
    end_with_fault();
  }
  self->call = call;
  self->mask = mask;
  self->line = line;
  self->state = State::in_warp;
  to_scheduler();
}

// Lets the barrier open if all threads have come to it. True: it did.
inline bool open_barrier(const std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) {
    if (fiber->state != State::at_barrier) return false;
    if (fiber->line != fibers[0]->line) {
      fault("threads wait at barriers in lines %d and %d", fibers[0]->line, fiber->line);
    }
  }
  for (Fiber* fiber : fibers) fiber->state = State::ready;
  return true;
}

// Completes a warp's call if all lanes of its mask have made it. True: it did.
inline bool complete(const std::vector<Fiber*>& lanes, const Fiber& asking) {
  std::vector<Fiber*> taking;
  for (int lane = 0; lane < WARP; ++lane) {
    if (!(asking.mask >> lane & 1)) continue;
    if (lane >= int(lanes.size())) return false;
    Fiber* fiber = lanes[lane];
    if (fiber->state != State::in_warp || fiber->mask != asking.mask ||
        fiber->line != asking.line || fiber->call != asking.call) {
      return false;
    }
    taking.push_back(fiber);
  }
  unsigned char values[WARP][16];
  unsigned ballot = 0;
  for (Fiber* fiber : taking) {
    memcpy(values[fiber->number % WARP], fiber->value, 16);
    ballot |= unsigned(fiber->value[0] != 0) << fiber->number % WARP;
  }
  unsigned mask = asking.mask;
  for (Fiber* fiber : taking) {
    if (fiber->call == WarpCall::shuffle) {
      if (mask >> fiber->source & 1) {
        memcpy(fiber->value, values[fiber->source], 16);
      } else {
        fault("line %d: a shuffle from lane %d, which takes no part", fiber->line, fiber->source);
      }
    }
    fiber->ballot = ballot;
    fiber->state = State::ready;
  }
  return true;
}

// The threads of one warp, in the order in which they take turns.
struct Warp {
  std::vector<Fiber*> lanes, turns;
};

inline bool complete(const Warp& warp) {
  bool any = false;
  for (Fiber* lane : warp.lanes) {
    if (lane->state == State::in_warp) any |= complete(warp.lanes, *lane);
  }
  return any;
}

inline std::vector<int> order(int count, unsigned seed) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (seed == 1) std::reverse(numbers.begin(), numbers.end());
  if (seed > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed));
  return numbers;
}

inline std::vector<Warp> warps_of(const std::vector<Fiber*>& fibers, unsigned seed) {
  std::vector<Warp> warps;
  int count = (int(fibers.size()) + WARP - 1) / WARP;
  for (int number : order(count, seed)) {
    auto first = fibers.begin() + number * WARP;
    Warp warp = {{first, std::min(first + WARP, fibers.end())}, {}};
    for (int lane : order(int(warp.lanes.size()), seed)) warp.turns.push_back(warp.lanes[lane]);
    warps.push_back(warp);
  }
  return warps;
}

// Runs one block to its end. False: it cannot end. With `ahead` each warp runs as far as it can
// before the next one does, else all go from one call of their warps to the next.
inline bool run_block(const std::vector<Fiber*>& fibers, const std::vector<Warp>& warps,
                      bool ahead) {
  for (;;) {
    bool moved = false;
    for (const Warp& warp : warps) {
      bool again;
      do {
        for (Fiber* fiber : warp.turns) {
          if (fiber->state == State::ready) run(fiber);
        }
        again = complete(warp);
        moved |= again;
      } while (again && ahead);
    }
    auto done = [](Fiber* fiber) { return fiber->state == State::done; };
    if (std::all_of(fibers.begin(), fibers.end(), done)) return true;
    if (moved || open_barrier(fibers)) continue;
    for (Fiber* fiber : fibers) {
      if (done(fiber)) continue;
      self = fiber;
      fault("line %d: %s waits for threads that returned or wait elsewhere", fiber->line,
            fiber->state == State::at_barrier ? "a barrier" : "a warp");
    }
    self = nullptr;
    return false;
  }
}

// Fibers are kept from launch to launch, because making one costs a system call.
inline std::vector<Fiber*> pool;

// Every block of the grid, one after another. Stops at a block that faults.
inline void run_grid(const Launch& what, std::function<void()> kernel) {
  int threads = what.block.x * what.block.y * what.block.z;
  int blocks = what.grid.x * what.grid.y * what.grid.z;
  if (threads < 1 || threads > MAX_THREADS || what.shared_bytes > SHARED_LIMIT) {
    return fault("%d threads and %u bytes of shared memory: no GPU takes that", threads,
                 what.shared_bytes);
  }
  if (what.grid.y > 65535 || what.grid.z > 65535) {
    return fault("a grid of %u x %u x %u", what.grid.x, what.grid.y, what.grid.z);
  }
  while (int(pool.size()) < threads) pool.push_back(new_fiber());
  std::vector<Fiber*> fibers(pool.begin(), pool.begin() + threads);
  launch = &what;
  body = &kernel;
  CatchBadAddresses caught;
  auto warps = warps_of(fibers, what.seed);
  auto shared = shared_memory();
  for (int block : order(blocks, what.seed)) {
    block_index = {block % what.grid.x, block / what.grid.x % what.grid.y,
                   block / (what.grid.x * what.grid.y)};
    spoil(shared, what.shared_bytes);
    for (int number = 0; number < threads; ++number) {
      fibers[number]->state = State::ready;
      fibers[number]->number = number;
      fibers[number]->thread = {number % what.block.x, number / what.block.x % what.block.y,
                                number / (what.block.x * what.block.y)};
    }
    if (!run_block(fibers, warps, what.seed < 2)) pool.clear();  // they wait in the middle of a kernel
    const unsigned char* guard = dynamic_shared + what.shared_bytes;
    if (std::any_of(guard, guard + SHARED_GUARD, [](unsigned char c) { return c != GARBAGE; })) {
      fault("a write beyond the %u bytes of dynamic shared memory", what.shared_bytes);
    }
    if (fault_text[0]) return;
  }
}

// Calls `kernel` with what `arguments` point to, as the driver does. Returns the fault, or "".
template <typename... Parameters, size_t... I>
void unpack(void (*kernel)(Parameters...), const Launch& what, void** arguments,
            const size_t* sizes, size_t count, std::index_sequence<I...>) {
  const size_t wanted[] = {sizeof(Parameters)..., 0};
  if (count != sizeof...(Parameters)) {
    return fault("%zu arguments, and the kernel takes %zu", count, sizeof...(Parameters));
  }
  for (size_t i = 0; i < count; ++i) {
    if (sizes[i] != wanted[i]) {
      return fault("argument %zu has %zu bytes, and the kernel takes %zu", i, sizes[i], wanted[i]);
    }
  }
  run_grid(what, [&] { kernel(*static_cast<std::decay_t<Parameters>*>(arguments[I])...); });
}

template <typename... Parameters>
const char* start(void (*kernel)(Parameters...), const unsigned* shape, void** arguments,
                  const size_t* sizes, size_t count) {
  fault_text[0] = 0;
  self = nullptr;
  Launch what = {{shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shape[6],
                 shape[7]};
  unpack(kernel, what, arguments, sizes, count, std::index_sequence_for<Parameters...>{});
  return fault_text;
}

}  // namespace emulator
