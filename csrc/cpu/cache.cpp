// The size of the last-level cache: smaller data stays there from one op to the next.
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "cpu/run.h"

namespace rst {

// The largest cache of the first core that Linux lists; 0 if it lists none.
static int64_t listed_cache_bytes() {
  int64_t largest = 0;
  for (int index = 0;; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    if (!file.is_open()) return largest;
    int64_t size = 0;
    char unit = ' ';
    file >> size >> unit;
    largest = std::max(largest, unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size);
  }
}

int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = listed_cache_bytes();
#if defined(_SC_LEVEL3_CACHE_SIZE)
    // Some C libraries count the caches of all sockets, or report those of a hypervisor's host: the smaller is right.
    const int64_t of_library = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (of_library > 0) found = found > 0 ? std::min(found, of_library) : of_library;
#endif
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace rst
