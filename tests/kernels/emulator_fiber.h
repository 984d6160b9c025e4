// One thread of a block: a fiber, which switches by setjmp; ucontext only makes its stack.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

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

inline Fiber* self = nullptr;
inline uint3 block_index;
inline const Launch* launch = nullptr;
inline jmp_buf scheduler;
inline std::function<void()>* body = nullptr;
inline char fault_text[512];

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
  mprotect(stack, 4096, PROT_NONE);  // a stack that overflows is an access to no memory
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

}  // namespace emulator
