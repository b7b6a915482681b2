// The threads of a Metal kernel, as fibers of one thread of the CPU, a threadgroup at a time.
//
// A fiber runs until it comes to a barrier or an operation of its simdgroup, and then the next one runs, in an order
// given from outside; a simdgroup runs as far as it can before another one begins. So a kernel that lacks a barrier
// gives another result in another order. An operation takes place when no lane of the simdgroup can run on; lanes that
// have returned, or that wait at a barrier, take no part. A barrier opens when every thread of the group waits at it or
// has returned. To meet at different lines is an error.
#pragma once
#include <ucontext.h>

#include <source_location>
#include <vector>

#include "types.h"

namespace emulator {

constexpr int LANES = 32, LARGEST = 64, STACK = 1 << 16;  // LARGEST: bytes of a value that lanes exchange
typedef std::source_location Place;
enum class State { runs, at_operation, at_barrier, returned };

struct Thread {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup;
  State state;
  Place place;  // where it waits
  unsigned char value[LARGEST];  // what it brings to an operation
  ucontext_t context;
};

struct Simdgroup {  // what the last operation brought together
  unsigned char values[LANES][LARGEST];
  bool active[LANES];
};

struct Machine {
  std::vector<Thread> threads;  // of the threadgroup that runs
  std::vector<Simdgroup> simdgroups;
  std::vector<std::vector<char>> stacks;
  std::vector<std::vector<uint>> order;  // of simdgroups, and of threads in each
  ucontext_t scheduler;
  uint current;
  void (*kernel_call)(void**);
  void** arguments;
  const char* error;
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }

// -- what a thread does -----------------------------------------------------------------------------------------------

inline void wait(State state, Place place) {
  self().state = state;
  self().place = place;
  swapcontext(&self().context, &machine.scheduler);
}

inline void barrier(Place place) { wait(State::at_barrier, place); }

template <class T> struct Lanes {
  T value[LANES];
  bool active[LANES];
};

// Each lane's value, for all lanes of the simdgroup.
template <class T> Lanes<T> exchange(T value, Place place) {
  static_assert(sizeof(T) <= LARGEST);
  memcpy(self().value, &value, sizeof value);
  wait(State::at_operation, place);
  const Simdgroup& group = machine.simdgroups[self().simdgroup_index_in_threadgroup];
  Lanes<T> lanes;
  for (int i = 0; i < LANES; i++) {
    memcpy(&lanes.value[i], group.values[i], sizeof(T));
    lanes.active[i] = group.active[i];
  }
  return lanes;
}

inline void start() {
  machine.kernel_call(machine.arguments);
  self().state = State::returned;
  swapcontext(&self().context, &machine.scheduler);
}

// -- what the scheduler does ------------------------------------------------------------------------------------------

inline uint smaller(uint a, uint b) { return a < b ? a : b; }

inline bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

// Lets waiting threads [first, last) run on, if they all wait at one place.
inline void release(uint first, uint last, State waiting) {
  const Thread* one = nullptr;
  for (uint i = first; i < last; i++) {
    Thread& thread = machine.threads[i];
    if (thread.state != waiting) continue;
    if (one && !same(one->place, thread.place)) machine.error = "threads wait for each other at different lines";
    one = &thread;
    thread.state = State::runs;
  }
}

// The operation that lanes of a simdgroup wait for; false if none does.
inline bool operate(uint index) {
  const uint first = index * LANES, last = smaller(first + LANES, machine.threads.size());
  Simdgroup& group = machine.simdgroups[index];
  bool any = false;
  for (uint i = 0; i < LANES; i++) {
    group.active[i] = first + i < last && machine.threads[first + i].state == State::at_operation;
    if (group.active[i]) memcpy(group.values[i], machine.threads[first + i].value, LARGEST);
    any |= group.active[i];
  }
  release(first, last, State::at_operation);
  return any;
}

// Each simdgroup as far as it can go, one after the other, then all past the barrier.
inline void run_threadgroup() {
  while (!machine.error) {
    for (const std::vector<uint>& lanes : machine.order) {
      do {
        for (uint i : lanes) {
          if (i >= machine.threads.size() || machine.threads[i].state != State::runs) continue;
          machine.current = i;
          swapcontext(&machine.scheduler, &self().context);
        }
      } while (!machine.error && lanes[0] / LANES < machine.simdgroups.size() && operate(lanes[0] / LANES));
    }
    bool waiting = false;
    for (const Thread& thread : machine.threads) waiting |= thread.state == State::at_barrier;
    if (!waiting) return;
    release(0, machine.threads.size(), State::at_barrier);
  }
}

// The threads of a whole group, by simdgroup, in an order of all of them.
inline std::vector<std::vector<uint>> by_simdgroup(const uint* order, uint ordered) {
  std::vector<std::vector<uint>> lanes;
  std::vector<int> place((ordered + LANES - 1) / LANES, -1);
  for (uint i = 0; i < ordered; i++) {
    int& at = place[order[i] / LANES];
    if (at < 0) at = lanes.size(), lanes.emplace_back();
    lanes[at].push_back(order[i]);
  }
  return lanes;
}

inline uint3 point(uint i, uint3 size) { return uint3(i % size.x, i / size.x % size.y, i / size.x / size.y); }

inline void place_thread(uint i, uint3 grid, uint3 group, uint3 groups, uint3 at, uint3 size) {
  Thread& thread = machine.threads[i];
  thread.thread_position_in_threadgroup = point(i, size);
  thread.threadgroup_position_in_grid = at;
  thread.thread_position_in_grid = at * group + point(i, size);
  thread.threads_per_threadgroup = size;
  thread.threadgroups_per_grid = groups;
  thread.threads_per_grid = grid;
  thread.thread_index_in_threadgroup = i;
  thread.thread_index_in_simdgroup = i % LANES;
  thread.simdgroup_index_in_threadgroup = i / LANES;
  thread.simdgroups_per_threadgroup = machine.simdgroups.size();
  thread.threads_per_simdgroup = LANES;
  thread.state = State::runs;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = machine.stacks[i].data();
  thread.context.uc_stack.ss_size = STACK;
  makecontext(&thread.context, start, 0);
}

// The whole grid, a group after the other; those at its edges may be smaller. Returns what went wrong, or null.
inline const char* run(void (*call)(void**), void** arguments, uint3 grid, uint3 group, const uint* order) {
  const uint3 groups = (grid + group - uint3(1)) / group;
  machine.kernel_call = call, machine.arguments = arguments, machine.error = nullptr;
  machine.order = by_simdgroup(order, group.x * group.y * group.z);
  for (uint g = 0; g < groups.x * groups.y * groups.z && !machine.error; g++) {
    const uint3 at = point(g, groups), left = grid - at * group;
    const uint3 size(smaller(left.x, group.x), smaller(left.y, group.y), smaller(left.z, group.z));
    machine.threads.resize(size.x * size.y * size.z);
    machine.simdgroups.resize((machine.threads.size() + LANES - 1) / LANES);
    while (machine.stacks.size() < machine.threads.size()) machine.stacks.emplace_back(STACK);
    for (uint i = 0; i < machine.threads.size(); i++) place_thread(i, grid, group, groups, at, size);
    run_threadgroup();
  }
  return machine.error;
}

// A thread's position as the type in which a kernel asks for it: uint3, uint2 or uint, or 16 bits of each.
template <class T> T position(uint3 at) {
  if constexpr (std::is_arithmetic_v<T>) return T(at.x);
  else if constexpr (sizeof(T().of) / sizeof(T().x) == 2) return T(at.x, at.y);
  else return T(at);
}
template <class T> T position(uint at) { return T(at); }

}  // namespace emulator
