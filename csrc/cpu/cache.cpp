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

// The largest cache of a level that Linux lists for the first core; level 0: of all.
int64_t listed(int level) {
  int64_t largest = kUnknown;
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::ifstream size_file(folder + "/size"), level_file(folder + "/level");
    if (!size_file.is_open()) return largest;
    int64_t size = 0;
    int its_level = 0;
    char unit = ' ';
    size_file >> size >> unit;
    level_file >> its_level;
    if (level == 0 || level == its_level) {
      largest = std::max(largest, unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size);
    }
  }
}

// What the C library says; some count the caches of all sockets, or report those of a hypervisor's host: the smaller of
// both is right.
#if defined(_SC_LEVEL3_CACHE_SIZE)
constexpr int kLevel2 = _SC_LEVEL2_CACHE_SIZE, kLevel3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kLevel2 = -1, kLevel3 = -1;  // which no C library knows
#endif
int64_t smaller(int64_t listed, int name) {
  const int64_t of_library = sysconf(name);
  if (of_library <= 0) return listed;
  return listed == kUnknown ? of_library : std::min(listed, of_library);
}

std::atomic<int64_t>& chosen_threshold() {
  static std::atomic<int64_t> bytes{kAutomaticThreshold};
  return bytes;
}

}  // namespace

int64_t cache_bytes() {
  static const int64_t found = smaller(listed(0), kLevel3);
  return found != kUnknown ? found : int64_t{32} << 20;
}

int64_t core_cache_bytes() {
  static const int64_t found = smaller(listed(2), kLevel2);
  return found != kUnknown ? found : int64_t{1} << 20;
}

int64_t non_temporal_threshold(int threads) {
  const int64_t bytes = chosen_threshold().load(std::memory_order_relaxed);
  return bytes != kAutomaticThreshold ? bytes : std::min(cache_bytes(), 2 * threads * core_cache_bytes());
}

void set_non_temporal_threshold(int64_t bytes) { chosen_threshold().store(bytes, std::memory_order_relaxed); }

}  // namespace rst
