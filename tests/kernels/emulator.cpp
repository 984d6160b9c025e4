// How the threads of a grid take turns: see emulator.h.

#include <algorithm>
#include <numeric>
#include <random>

#include "emulator_fiber.h"
#include "emulator_memory.h"

namespace emulator {

void wait_at_barrier(int line) {
  current()->line = line;
  current()->state = State::at_barrier;
  to_scheduler();
}

void wait_in_warp(WarpCall call, unsigned mask, int line) {
  int lane = self->number % WARP;
  if (!(mask >> lane & 1)) {
    fault("line %d: lane %d calls with a mask 0x%08x that leaves it out", line, lane, mask);
    end_with_fault();
  }
  Fiber* fiber = current();
  fiber->call = call;
  fiber->mask = mask;
  fiber->line = line;
  fiber->state = State::in_warp;
  to_scheduler();
}

void sync_warp(unsigned mask, int line) { wait_in_warp(WarpCall::sync, mask, line); }

unsigned ballot(unsigned mask, bool predicate, int line) {
  current()->value[0] = predicate;
  wait_in_warp(WarpCall::ballot, mask, line);
  return current()->ballot;
}

void shuffle(unsigned mask, int source, void* value, size_t bytes, int line) {
  memcpy(current()->value, value, bytes);
  current()->source = source;
  wait_in_warp(WarpCall::shuffle, mask, line);
  memcpy(value, current()->value, bytes);
}

// Even seeds copy as late as may be, odd ones at once.

void make(const AsyncCopy& copy) {
  memcpy(copy.target, copy.source, copy.bytes);
  memset(static_cast<char*>(copy.target) + copy.bytes, 0, copy.zeros);
}

void copy_async(void* target, const void* source, size_t bytes, size_t zeros) {
  size_t size = bytes + zeros;
  if (size_t(target) % size || (bytes && size_t(source) % size)) {
    fault("an asynchronous copy of %zu bytes from %p to %p", size, source, target);
    end_with_fault();
  }
  AsyncCopy copy = {target, source, bytes, zeros};
  if (launch.seed % 2) make(copy);
  current()->open.push_back(copy);
}

void copy_async_commit() {
  current()->groups.push_back(std::move(current()->open));
  current()->open.clear();
}

void copy_async_wait(size_t left) {
  auto& groups = current()->groups;
  while (groups.size() > left) {
    if (launch.seed % 2 == 0) {
      for (const AsyncCopy& copy : groups.front()) make(copy);
    }
    groups.erase(groups.begin());
  }
}

// Lets the barrier open if all threads have come to it. True: it did.
bool open_barrier(const std::vector<Fiber*>& fibers) {
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
bool complete(const std::vector<Fiber*>& lanes, const Fiber& asking) {
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

bool complete(const Warp& warp) {
  bool any = false;
  for (Fiber* lane : warp.lanes) {
    if (lane->state == State::in_warp) any |= complete(warp.lanes, *lane);
  }
  return any;
}

std::vector<int> order(int count, unsigned seed) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (seed == 1) std::reverse(numbers.begin(), numbers.end());
  if (seed > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed));
  return numbers;
}

std::vector<Warp> warps_of(const std::vector<Fiber*>& fibers, unsigned seed) {
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
bool run_block(const std::vector<Fiber*>& fibers, const std::vector<Warp>& warps,
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
std::vector<Fiber*> pool;

// Every block of the grid, one after another. Stops at a block that faults.
void run_grid(const Launch& what, unsigned char* some_shared) {
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
  CatchBadAddresses caught;
  auto warps = warps_of(fibers, what.seed);
  auto shared = shared_memory(some_shared);
  for (int block : order(blocks, what.seed)) {
    block_index = {block % what.grid.x, block / what.grid.x % what.grid.y,
                   block / (what.grid.x * what.grid.y)};
    spoil(shared, what.shared_bytes);
    for (int number = 0; number < threads; ++number) {
      fibers[number]->state = State::ready;
      fibers[number]->number = number;
      fibers[number]->index = {number % what.block.x, number / what.block.x % what.block.y,
                                number / (what.block.x * what.block.y)};
    }
    if (!run_block(fibers, warps, what.seed < 2)) {
      for (Fiber* fiber : fibers) rewind(fiber);  // they wait in the middle of a kernel
    }
    const unsigned char* guard = dynamic_shared + what.shared_bytes;
    if (std::any_of(guard, guard + SHARED_GUARD, [](unsigned char c) { return c != GARBAGE; })) {
      fault("a write beyond the %u bytes of dynamic shared memory", what.shared_bytes);
    }
    if (fault_text[0]) return;
  }
}

const char* start(void (*kernel)(), Signature takes, const unsigned* shape, void** arguments,
                  const size_t* sizes, size_t count) {
  fault_text[0] = 0;
  self = nullptr;
  if (count != takes.count) {
    fault("%zu arguments, and the kernel takes %zu", count, takes.count);
    return fault_text;
  }
  for (size_t i = 0; i < count; ++i) {
    if (sizes[i] != takes.sizes[i]) {
      fault("argument %zu has %zu bytes, and the kernel takes %zu", i, sizes[i], takes.sizes[i]);
      return fault_text;
    }
  }
  launch = {{shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, shape[6], shape[7]};
  body = [=] { takes.call(kernel, arguments); };
  run_grid(launch, takes.shared);
  return fault_text;
}

}  // namespace emulator

// The compiler's checks call these. The data that they are given begins with the place.
struct UbsanPlace {
  const char* file;
  unsigned line, column;
};
extern "C" __attribute__((used)) void __ubsan_handle_type_mismatch_v1(UbsanPlace* place, size_t pointer) {
  emulator::fault("%s:%u: misaligned or null address 0x%zx", place->file, place->line, pointer);
  emulator::end_with_fault();
}
extern "C" __attribute__((used)) void __ubsan_handle_out_of_bounds(UbsanPlace* place, size_t index) {
  emulator::fault("%s:%u: index %zd is out of bounds", place->file, place->line, ssize_t(index));
  emulator::end_with_fault();
}
