// Fibers: stacks of their own that give way to each other on one thread of the operating system.
//
// A switch is six pushes and pops on x86-64, `swapcontext` elsewhere (or with DYRATE_EMULATE_UCONTEXT), which enters the kernel for the
// signal mask each time. Address sanitizer is told about every switch, so it knows the stack that it looks at.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(DYRATE_EMULATE_UCONTEXT)
#define DYRATE_FIBER_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define DYRATE_FIBER_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DYRATE_FIBER_ASAN
#endif
#endif
#ifdef DYRATE_FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef DYRATE_FIBER_UCONTEXT
// void dyrate_emulation_switch(void** leave, void* enter): saves what a call must preserve on this stack and its top in *leave, then
// goes on where `enter` was left. Weak: each object file that includes this has a copy.
extern "C" __attribute__((visibility("hidden"))) void dyrate_emulation_switch(void** leave, void* enter);
asm(R"(
  .pushsection .text
  .weak dyrate_emulation_switch
  .hidden dyrate_emulation_switch
  .type dyrate_emulation_switch, @function
dyrate_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size dyrate_emulation_switch, . - dyrate_emulation_switch
  .popsection
)");
#endif

namespace dyrate::emulation {

/// Memory for one stack, with a page below it that nobody may touch.
class Stack {
 public:
#ifdef DYRATE_FIBER_ASAN
  static constexpr std::size_t kBytes = 512 * 1024;  // red zones make frames several times as large
#else
  static constexpr std::size_t kBytes = 128 * 1024;
#endif

  Stack() {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = kBytes + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    if (mprotect(memory_, page, PROT_NONE) != 0) {
      munmap(memory_, mapped_);
      throw std::bad_alloc();
    }
    bottom_ = memory_ + page;
  }
  ~Stack() { munmap(memory_, mapped_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  char* top() const { return bottom_ + kBytes; }
  bool holds(const void* address) const { return address >= bottom_ && address < bottom_ + kBytes; }

 private:
  std::size_t mapped_ = 0;
  char *memory_ = nullptr, *bottom_ = nullptr;
};

/// A stack that runs `entry()`, which must never return but give way for good.
class Fiber {
 public:
  /// The fiber starts over; what ran on its stack before is forgotten. `number` spreads tops over cache sets.
  void start(void (*entry)(), unsigned number) {
#ifdef DYRATE_FIBER_ASAN
    __asan_unpoison_memory_region(stack_.bottom(), Stack::kBytes);  // a launch that failed leaves frames behind
    fake_ = nullptr;
#endif
    char* top = stack_.top() - number % 16 * 256;
#ifdef DYRATE_FIBER_UCONTEXT
    getcontext(&inner_);
    inner_.uc_stack.ss_sp = stack_.bottom();
    inner_.uc_stack.ss_size = static_cast<std::size_t>(top - stack_.bottom());
    inner_.uc_link = nullptr;
    makecontext(&inner_, entry, 0);
#else
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // where a return address would be: entry finds the stack as a call leaves it
    *--slot = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
    inner_ = slot;
#endif
  }

  /// Runs it until it gives way.
  void resume() {
#ifdef DYRATE_FIBER_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.bottom(), Stack::kBytes);
#endif
#ifdef DYRATE_FIBER_UCONTEXT
    swapcontext(&outer_, &inner_);
#else
    dyrate_emulation_switch(&outer_, inner_);
#endif
#ifdef DYRATE_FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  /// On the fiber, first of all.
  void arrived() {
#ifdef DYRATE_FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake_, &outer_bottom_, &outer_bytes_);
#endif
  }

  /// On the fiber: back to whoever resumed it. `for_good`: nothing on this stack is needed any more.
  void give_way(bool for_good) {
#ifdef DYRATE_FIBER_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, outer_bottom_, outer_bytes_);
#else
    (void)for_good;
#endif
#ifdef DYRATE_FIBER_UCONTEXT
    swapcontext(&inner_, &outer_);
#else
    dyrate_emulation_switch(&inner_, outer_);
#endif
    arrived();
  }

  bool holds(const void* address) const { return stack_.holds(address); }

 private:
  Stack stack_;
#ifdef DYRATE_FIBER_UCONTEXT
  ucontext_t inner_, outer_;
#else
  void *inner_ = nullptr, *outer_ = nullptr;
#endif
#ifdef DYRATE_FIBER_ASAN
  void* fake_ = nullptr;
  const void* outer_bottom_ = nullptr;
  std::size_t outer_bytes_ = 0;
#endif
};

}  // namespace dyrate::emulation
