// The size of the last-level cache: smaller data stays there from one op to the next.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "cpu/run.h"

namespace rst {

// The largest cache of the first core that Linux lists; 0 if it lists none.
static int64_t listed_cache_bytes() {
  int64_t largest = 0;
  for (int index = 0;; ++index) {
    const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size";
    FILE* file = std::fopen(path.c_str(), "r");
    if (file == nullptr) return largest;
    long long size = 0;
    char unit = ' ';
    if (std::fscanf(file, "%lld%c", &size, &unit) >= 1) {
      largest = std::max<int64_t>(largest, unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size);
    }
    std::fclose(file);
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
