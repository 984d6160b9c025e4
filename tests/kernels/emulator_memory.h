// Memory of a launch: what is a block's, and what is nobody's.

#pragma once

#include <link.h>
#include <signal.h>

#include <cstdlib>

#include "emulator_fiber.h"

constexpr size_t SHARED_LIMIT = 227 * 1024;  // of a block, on compute capability 9.0
constexpr size_t SHARED_GUARD = 4096;
// `extern __shared__ ... unsigned char dynamic_shared[]` in a kernel is this.
thread_local __attribute__((aligned(1024))) unsigned char
    dynamic_shared[SHARED_LIMIT + SHARED_GUARD];

namespace emulator {

constexpr unsigned char GARBAGE = 0xff;  // NaN in every float format

struct SharedMemory {
  unsigned char* start;
  size_t bytes;
};

// The variables that are `thread_local` of the library of the kernel, for the calling thread: all
// of them are shared memory. `some` is one of them.
SharedMemory shared_memory(unsigned char* some) {
  SharedMemory found = {some, 0};
  auto look = [](dl_phdr_info* library, size_t, void* argument) {
    auto& found = *static_cast<SharedMemory*>(argument);
    auto start = static_cast<unsigned char*>(library->dlpi_tls_data);
    for (int i = 0; start && i < library->dlpi_phnum; ++i) {
      size_t bytes = library->dlpi_phdr[i].p_memsz;
      if (library->dlpi_phdr[i].p_type != PT_TLS || size_t(found.start - start) >= bytes) continue;
      found = {start, bytes};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

// No block finds what another left.
void spoil(SharedMemory shared, size_t dynamic_bytes) {
  if (!shared.bytes) return fault("shared memory is not where it should be");
  memset(dynamic_shared, GARBAGE, dynamic_bytes + SHARED_GUARD);
  memset(shared.start, GARBAGE, shared.bytes);
}

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
      current()->state = State::faulted;
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

}  // namespace emulator
