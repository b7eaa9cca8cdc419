// A plain read/write probe: the memory-bandwidth ceiling that the kernels are compared with.
//
// Each mix moves the bytes of one op over the very tensors that the op works on, with next to no arithmetic. It knows
// nothing of torch. With keep = 0 every write stores what was there (in w after update: what lies in backup), so that
// the optimizer goes on as if nothing had happened; any other mask lets a test see what was read and written.
//   norm     reads g
//   perturb  reads w, g              writes w (read-modify-write) and backup (write only)
//   update   reads backup, g, m      writes w (write only) and m (read-modify-write)
//   base     reads w, g, m           writes w and m (both read-modify-write)
// Variants say which stores bypass the cache: 0 none, 1 the write-only stream, 2 every written stream.
#include <immintrin.h>
#include <sched.h>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

// A stretch of one parameter and its companions, with a thread to take it. Matches Piece of probe.py.
struct Piece {
  uint8_t *w, *g, *m, *backup;
  size_t bytes;
  size_t owner;
};

namespace {

typedef uint64_t Wide __attribute__((vector_size(32)));
constexpr size_t kStep = 128;  // bytes per loop turn: two cache lines

template <class U>
inline U load(const uint8_t* p) {
  U u;
  std::memcpy(&u, p, sizeof(u));
  return u;
}

template <bool Stream>
inline void store(uint8_t* p, Wide v) {
  if constexpr (Stream) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
  else std::memcpy(p, &v, sizeof(v));
}
template <bool>
inline void store(uint8_t* p, uint8_t v) { *p = v; }

// Each mix at one offset. StreamOnly: the write-only stream bypasses the cache; StreamBoth: the others do too.
struct Norm {
  template <class U>
  static U at(const Piece& a, size_t i, U) { return load<U>(a.g + i); }
};

template <bool StreamOnly, bool StreamBoth>
struct Perturb {
  template <class U>
  static U at(const Piece& a, size_t i, U keep) {
    const U w = load<U>(a.w + i), g = load<U>(a.g + i);
    store<StreamOnly>(a.backup + i, w);
    store<StreamBoth>(a.w + i, static_cast<U>(w ^ (g & keep)));
    return U{};
  }
};

// From the backup, w is write only; from w itself, as in a base step, it is read too.
template <bool FromBackup, bool StreamW, bool StreamM>
struct Update {
  template <class U>
  static U at(const Piece& a, size_t i, U keep) {
    const U m = load<U>(a.m + i) ^ (load<U>(a.g + i) & keep), from = load<U>((FromBackup ? a.backup : a.w) + i);
    store<StreamM>(a.m + i, m);
    store<StreamW>(a.w + i, static_cast<U>(from ^ (m & keep)));
    return U{};
  }
};

template <class Mix>
uint64_t sweep(const Piece& a, uint64_t keep) {
  const Wide wide = Wide{} + keep;
  Wide seen[kStep / sizeof(Wide)] = {};
  size_t i = 0;
  for (; i + kStep <= a.bytes; i += kStep) {
    for (size_t k = 0; k < kStep / sizeof(Wide); ++k) seen[k] ^= Mix::template at<Wide>(a, i + k * sizeof(Wide), wide);
  }
  for (; i + sizeof(Wide) <= a.bytes; i += sizeof(Wide)) seen[0] ^= Mix::template at<Wide>(a, i, wide);
  uint64_t all = 0;
  for (; i < a.bytes; ++i) all ^= uint64_t{Mix::template at<uint8_t>(a, i, static_cast<uint8_t>(keep))} << 8 * (i % 8);
  for (const Wide& s : seen) all ^= s[0] ^ s[1] ^ s[2] ^ s[3];
  return all;
}

uint64_t part(const Piece& a, int mix, int variant, uint64_t keep) {
  switch (mix * 3 + variant) {
    case 0: case 1: case 2: return sweep<Norm>(a, keep);
    case 3: return sweep<Perturb<false, false>>(a, keep);
    case 4: return sweep<Perturb<true, false>>(a, keep);
    case 5: return sweep<Perturb<true, true>>(a, keep);
    case 6: return sweep<Update<true, false, false>>(a, keep);
    case 7: return sweep<Update<true, true, false>>(a, keep);
    case 8: return sweep<Update<true, true, true>>(a, keep);
    case 9: case 10: return sweep<Update<false, false, false>>(a, keep);
    case 11: return sweep<Update<false, true, true>>(a, keep);
    default: return 0;
  }
}

// The CPUs that this thread may use: one of every core, and then those that share a core with one of them.
std::vector<int> usable_cpus() {
  cpu_set_t allowed;
  std::vector<int> cpus, siblings;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string path = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
    int first = cpu;  // of those on its core
    if (FILE* file = std::fopen(path.c_str(), "r")) {
      if (std::fscanf(file, "%d", &first) != 1) first = cpu;
      std::fclose(file);
    }
    (first == cpu || !CPU_ISSET(first, &allowed) ? cpus : siblings).push_back(cpu);
  }
  cpus.insert(cpus.end(), siblings.begin(), siblings.end());
  return cpus;
}

// Holds the calling thread on one of these CPUs, and lets it go where it might before. A thread that the system has just
// started may share its parent's core until the next tick, milliseconds later: longer than a pass over a small model.
class Pinned {
 public:
  Pinned(const std::vector<int>& cpus, size_t turn) {
    if (turn >= cpus.size() || sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpus[turn], &one);
    held_ = sched_setaffinity(0, sizeof(one), &one) == 0;
  }
  ~Pinned() {
    if (held_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  cpu_set_t before_;
  bool held_ = false;
};

}  // namespace

// Runs one pass of a mix over all pieces, whose addresses are multiples of 32; the calling thread takes part. A piece
// goes to its owner, or with `in_turn` to the thread that asks next; `backwards`: the last one first. Leaves in `seconds`
// the time from the moment when all threads are awake, each on a CPU of its own, until the last one is done. Returns what
// the norm read, folded into 8 bytes.
extern "C" uint64_t probe_run(int mix, int variant, const Piece* pieces, size_t count, bool in_turn, bool backwards,
                              size_t threads, uint64_t keep, double* seconds) {
  std::vector<uint64_t> seen(threads, 0);
  std::atomic<size_t> next{0}, awake{0}, done{0};
  const auto work = [&](size_t t) {
    uint64_t mine = 0;
    for (size_t i = in_turn ? next++ : 0; i < count; i = in_turn ? next++ : i + 1) {
      const Piece& piece = pieces[backwards ? count - 1 - i : i];
      if (in_turn || piece.owner == t) mine ^= part(piece, mix, variant, keep);
    }
    _mm_sfence();
    seen[t] = mine;
    ++done;
  };
  static const std::vector<int> cpus = usable_cpus();
  std::vector<std::thread> pool;
  for (size_t t = 1; t < threads; ++t) {
    pool.emplace_back([&, t] {
      const Pinned pinned(cpus, t);
      ++awake;
      while (awake < threads) {}
      work(t);
    });
  }
  while (awake < threads - 1) {}
  const Pinned pinned(cpus, 0);  // after the others have started, which take over where their parent may run
  const auto start = std::chrono::steady_clock::now();
  ++awake;
  work(0);
  while (done < threads) {}
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (std::thread& thread : pool) thread.join();
  uint64_t all = 0;
  for (uint64_t s : seen) all ^= s;
  return all;
}
