// One thread of a block: a fiber, which switches by setjmp; ucontext only makes its stack.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <functional>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr size_t STACK_BYTES = 128 * 1024;

enum class State { ready, at_barrier, in_warp, done, faulted };
enum class WarpCall { sync, shuffle, ballot };

struct AsyncCopy {
  void* target;
  const void* source;
  size_t bytes, zeros;
};

struct Fiber : Thread {
  jmp_buf context;
  ucontext_t first;
  bool started = false;
  State state = State::done;
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

Thread* self = nullptr;
uint3 block_index;
Launch launch;
jmp_buf scheduler;
std::function<void()> body;
char fault_text[512];

void fault(const char* format, ...) {
  if (fault_text[0]) return;
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(fault_text, sizeof fault_text, format, arguments);
  va_end(arguments);
  if (self && length > 0 && length < int(sizeof fault_text)) {
    snprintf(fault_text + length, sizeof fault_text - length,
             " (block %u,%u,%u thread %u,%u,%u)", block_index.x, block_index.y, block_index.z,
             self->index.x, self->index.y, self->index.z);
  }
}

Fiber* current() { return static_cast<Fiber*>(self); }

__attribute__((noinline)) void to_scheduler() {
  if (_setjmp(current()->context) == 0) _longjmp(scheduler, 1);
}

void end_with_fault() {
  current()->state = State::faulted;
  to_scheduler();
}

// A fiber runs one thread after another, of one block after another.
void live() {
  for (;;) {
    body();
    Fiber* fiber = current();
    fiber->groups.push_back(std::move(fiber->open));
    for (auto& group : fiber->groups) {
      if (!group.empty()) fault("the thread returned before its asynchronous copies were made");
    }
    fiber->groups.clear();
    fiber->open.clear();
    fiber->state = State::done;
    to_scheduler();
  }
}

// Makes the fiber begin anew, in the middle of whatever it was.
void rewind(Fiber* fiber) {
  fiber->started = false;
  fiber->groups.clear();
  fiber->open.clear();
  makecontext(&fiber->first, live, 0);
}

Fiber* new_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(stack, 4096, PROT_NONE);  // a stack that overflows is an access to no memory
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = stack;
  fiber->first.uc_stack.ss_size = STACK_BYTES;
  rewind(fiber);
  return fiber;
}

__attribute__((noinline)) void run(Fiber* fiber) {
  self = fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->context, 1);
    fiber->started = true;
    setcontext(&fiber->first);
  }
  self = nullptr;
}

}  // namespace emulator
