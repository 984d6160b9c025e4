// Runs a CUDA kernel on one CPU thread: every thread of a block is a fiber.
//
// What it is strict about, because a GPU is not: barriers that not all threads reach, at the same
// line; shuffles from lanes that take no part; misaligned vector accesses and array indices out of
// bounds (the compiler's own checks report here); writes beyond dynamic shared memory; addresses
// where there is no memory. Shared
// memory is garbage when a block starts. The seed of a launch chooses the order of blocks and of
// threads between two barriers, and whether an asynchronous copy is made at once or as late as
// its wait allows: a missing barrier or wait gives wrong numbers for one of them.
//
// What it does not emulate: time, caches, memory order between blocks that run at once, textures,
// tensor cores, clusters, inline PTX. Fibers switch by setjmp; ucontext only makes their stacks.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

constexpr size_t SHARED_LIMIT = 227 * 1024;  // of a block, on compute capability 9.0
constexpr size_t SHARED_GUARD = 4096;
// `extern __shared__ ... unsigned char dynamic_shared[]` in a kernel is this.
thread_local __attribute__((aligned(1024))) unsigned char
    dynamic_shared[SHARED_LIMIT + SHARED_GUARD];

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr int MAX_THREADS = 1024;
constexpr unsigned char GARBAGE = 0xff;  // NaN in every float format

enum class State { ready, at_barrier, in_warp, done, faulted };
enum class WarpCall { sync, shuffle, ballot };

struct AsyncCopy {
  void* target;
  const void* source;
  size_t bytes, zeros;
};

struct Fiber {
  jmp_buf context;
  ucontext_t first;
  bool started = false;
  State state = State::done;
  uint3 thread;
  int number;  // within the block
  // What a waiting fiber waits for.
  int line;
  WarpCall call;
  unsigned mask;
  int source;
  alignas(16) unsigned char value[16];
  unsigned ballot;
  // Asynchronous copies: groups committed, oldest first, and the one that is still open.
  std::vector<std::vector<AsyncCopy>> groups;
  std::vector<AsyncCopy> open;
};

struct Launch {
  uint3 grid, block;
  unsigned shared_bytes, seed;
};

inline thread_local Fiber* self = nullptr;
inline thread_local uint3 block_index;
inline thread_local const Launch* launch = nullptr;
inline thread_local jmp_buf scheduler;
inline thread_local std::function<void()>* body = nullptr;
inline thread_local char fault_text[512];

// The first fault of a launch is kept.
inline void fault(const char* format, ...) {
  if (fault_text[0]) return;
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(fault_text, sizeof fault_text, format, arguments);
  va_end(arguments);
  if (self && length > 0 && length < int(sizeof fault_text)) {
    snprintf(fault_text + length, sizeof fault_text - length,
             " (block %u,%u,%u thread %u,%u,%u)", block_index.x, block_index.y, block_index.z,
             self->thread.x, self->thread.y, self->thread.z);
  }
}

__attribute__((noinline)) inline void to_scheduler() {
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

// The thread goes no further, and its block with it.
inline void end_with_fault() {
  self->state = State::faulted;
  to_scheduler();
}

// A fiber runs one thread after another, of one block after another.
inline void live() {
  for (;;) {
    (*body)();
    self->groups.push_back(std::move(self->open));
    for (auto& group : self->groups) {
      if (!group.empty()) fault("the thread returned before its asynchronous copies were made");
    }
    self->groups.clear();
    self->open.clear();
    self->state = State::done;
    to_scheduler();
  }
}

inline Fiber* new_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = stack;
  fiber->first.uc_stack.ss_size = STACK_BYTES;
  makecontext(&fiber->first, live, 0);
  return fiber;
}

__attribute__((noinline)) inline void run(Fiber* fiber) {
  self = fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->context, 1);
    fiber->started = true;
    setcontext(&fiber->first);
  }
  self = nullptr;
}

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

inline bool complete_warps(const std::vector<Fiber*>& fibers) {
  bool any = false;
  for (size_t first = 0; first < fibers.size(); first += WARP) {
    size_t last = std::min(first + WARP, fibers.size());
    std::vector<Fiber*> lanes(fibers.begin() + first, fibers.begin() + last);
    for (Fiber* lane : lanes) {
      if (lane->state == State::in_warp) any |= complete(lanes, *lane);
    }
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

// Runs one block to its end. False: it cannot end.
inline bool run_block(const std::vector<Fiber*>& fibers, const std::vector<int>& turns) {
  for (;;) {
    for (int turn : turns) {
      if (fibers[turn]->state == State::ready) run(fibers[turn]);
    }
    auto done = [](Fiber* fiber) { return fiber->state == State::done; };
    if (std::all_of(fibers.begin(), fibers.end(), done)) return true;
    if (complete_warps(fibers) || open_barrier(fibers)) continue;
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
inline thread_local std::vector<Fiber*> pool;

// An access to memory that is not there ends the thread that made it. On a stack of its own,
// since that of the fiber may be what has run out; leaving by a jump, so the signal must not be
// blocked while it is handled.
class CatchBadAddresses {
 public:
  CatchBadAddresses() {
    stack_t stack = {memory_, 0, sizeof memory_};
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
      if (self == nullptr) abort();
      fault("no memory at address %p", info->si_addr);
      self->state = State::faulted;
      _longjmp(scheduler, 1);
    };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_);
  }
  ~CatchBadAddresses() {
    sigaction(SIGSEGV, &old_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  char memory_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_;
};

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
  auto turns = order(threads, what.seed);
  for (int block : order(blocks, what.seed)) {
    block_index = {block % what.grid.x, block / what.grid.x % what.grid.y,
                   block / (what.grid.x * what.grid.y)};
    memset(dynamic_shared, GARBAGE, what.shared_bytes + SHARED_GUARD);
    for (int number = 0; number < threads; ++number) {
      fibers[number]->state = State::ready;
      fibers[number]->number = number;
      fibers[number]->thread = {number % what.block.x, number / what.block.x % what.block.y,
                                number / (what.block.x * what.block.y)};
    }
    if (!run_block(fibers, turns)) pool.clear();  // they wait in the middle of a kernel
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

// The compiler's checks call these. The data that they are given begins with the place.
struct UbsanPlace {
  const char* file;
  unsigned line, column;
};
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(UbsanPlace* place,
                                                                             size_t pointer) {
  emulator::fault("%s:%u: misaligned or null address 0x%zx", place->file, place->line, pointer);
  emulator::end_with_fault();
}
extern "C" inline __attribute__((used)) void __ubsan_handle_out_of_bounds(UbsanPlace* place,
                                                                          size_t index) {
  emulator::fault("%s:%u: index %zd is out of bounds", place->file, place->line, ssize_t(index));
  emulator::end_with_fault();
}
