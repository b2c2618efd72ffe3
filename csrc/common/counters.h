// Counts of events that results do not show, such as a fallback taken. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>

namespace als {

// A file-level object; als_ext._C.counters() gives all of them by name.
class Counter {
 public:
  explicit Counter(const char* name) { all()[name] = this; }
  void add() { value_.fetch_add(1, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

  static std::map<std::string, const Counter*>& all() {
    static std::map<std::string, const Counter*> counters;
    return counters;
  }

 private:
  std::atomic<int64_t> value_{0};
};

}  // namespace als
