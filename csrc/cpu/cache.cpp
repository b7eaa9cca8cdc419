// The caches of this processor, and how much data they keep from one op to the next.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <string>

#include "cpu/run.h"

namespace rst {

namespace {

constexpr int64_t kUnknown = 0;

struct Cache {
  int64_t bytes = kUnknown;
  int64_t cpus = 1;  // that share it
};

// How many numbers a list such as "0,2-3" has; 1 if it is none.
int64_t length(std::istream& list) {
  int64_t count = 0, first = 0, last = 0;
  while (list >> first) {
    last = first;
    if (list.peek() == '-') list.ignore() >> last;
    count += last - first + 1;
    list.ignore();  // a comma
  }
  return std::max<int64_t>(count, 1);
}

// The largest cache of a level that Linux lists for the first core; level 0: of all.
Cache listed(int level) {
  Cache largest;
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::ifstream size_file(folder + "/size"), level_file(folder + "/level"), cpus_file(folder + "/shared_cpu_list");
    if (!size_file.is_open()) return largest;
    int64_t size = 0;
    int its_level = 0;
    char unit = ' ';
    size_file >> size >> unit;
    level_file >> its_level;
    const int64_t bytes = unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
    if ((level == 0 || level == its_level) && bytes > largest.bytes) largest = {bytes, length(cpus_file)};
  }
}

// What the C library says; some count the caches of all sockets, or report those of a hypervisor's host: the smaller of
// both is right.
#if defined(_SC_LEVEL3_CACHE_SIZE)
constexpr int kLevel2 = _SC_LEVEL2_CACHE_SIZE, kLevel3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kLevel2 = -1, kLevel3 = -1;  // which no C library knows
#endif
Cache smaller(Cache cache, int name) {
  const int64_t of_library = sysconf(name);
  if (of_library > 0) cache.bytes = cache.bytes == kUnknown ? of_library : std::min(cache.bytes, of_library);
  return cache;
}

const Cache& last_level() {
  static const Cache found = smaller(listed(0), kLevel3);
  return found;
}

std::atomic<int64_t>& chosen_threshold() {
  static std::atomic<int64_t> bytes{kAutomaticThreshold};
  return bytes;
}

}  // namespace

int64_t cache_bytes() { return last_level().bytes != kUnknown ? last_level().bytes : int64_t{32} << 20; }

int64_t core_cache_bytes() {
  static const int64_t found = smaller(listed(2), kLevel2).bytes;
  return found != kUnknown ? found : int64_t{1} << 20;
}

int64_t bytes_kept(int64_t last_level, int64_t cpus, int64_t own) {
  constexpr int64_t kMostPerCpu = 16 << 20;
  const int64_t kept = last_level > kMostPerCpu * cpus ? own : std::max(own, last_level / 2);
  return std::min(last_level, kept);
}

int64_t non_temporal_threshold(int threads) {
  const int64_t bytes = chosen_threshold().load(std::memory_order_relaxed);
  if (bytes != kAutomaticThreshold) return bytes;
  return bytes_kept(cache_bytes(), last_level().cpus, 2 * threads * core_cache_bytes());
}

void set_non_temporal_threshold(int64_t bytes) { chosen_threshold().store(bytes, std::memory_order_relaxed); }

}  // namespace rst
