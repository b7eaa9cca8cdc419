// A plain read/write probe: the memory-bandwidth ceiling that the kernels are compared with.
//
// Each mix moves the bytes of one op, one contiguous array per stream, with next to no arithmetic (an exclusive
// or, so that no byte pattern is slow and the element type does not matter). It knows nothing of torch.
//   norm     reads g
//   perturb  reads w, g              writes w (read-modify-write) and backup (write only)
//   update   reads backup, g, m      writes w (write only) and m (read-modify-write)
//   base     reads w, g, m           writes w and m (both read-modify-write)
// Variants say which stores bypass the cache: 0 none, 1 the write-only stream, 2 every written stream.
#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr size_t kStep = 128;  // bytes per loop turn: two cache lines

inline __m256i load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

template <bool Stream>
inline void store(uint8_t* p, __m256i v) {
  if constexpr (Stream) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v);
  else _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
}

struct Arrays {
  uint8_t *w, *g, *m, *backup;
};

uint64_t norm(const Arrays& a, size_t begin, size_t end) {
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
  for (size_t i = begin; i < end; i += kStep) {
    s0 = _mm256_xor_si256(s0, load(a.g + i));
    s1 = _mm256_xor_si256(s1, load(a.g + i + 32));
    s2 = _mm256_xor_si256(s2, load(a.g + i + 64));
    s3 = _mm256_xor_si256(s3, load(a.g + i + 96));
  }
  const __m256i s = _mm256_xor_si256(_mm256_xor_si256(s0, s1), _mm256_xor_si256(s2, s3));
  alignas(32) uint64_t lane[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), s);
  return lane[0] ^ lane[1] ^ lane[2] ^ lane[3];
}

// StreamOnly: the write-only stream bypasses the cache; StreamBoth: the read-modify-write streams do too.
template <bool StreamOnly, bool StreamBoth>
void perturb(const Arrays& a, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i += kStep) {
    for (size_t j = i; j < i + kStep; j += 32) {
      const __m256i w = load(a.w + j), g = load(a.g + j);
      store<StreamOnly>(a.backup + j, w);
      store<StreamBoth>(a.w + j, _mm256_xor_si256(w, g));
    }
  }
}

template <bool StreamOnly, bool StreamBoth>
void update(const Arrays& a, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i += kStep) {
    for (size_t j = i; j < i + kStep; j += 32) {
      const __m256i m = _mm256_xor_si256(load(a.m + j), load(a.g + j));
      const __m256i b = load(a.backup + j);
      store<StreamBoth>(a.m + j, m);
      store<StreamOnly>(a.w + j, _mm256_xor_si256(b, m));
    }
  }
}

template <bool StreamBoth>
void base(const Arrays& a, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i += kStep) {
    for (size_t j = i; j < i + kStep; j += 32) {
      const __m256i m = _mm256_xor_si256(load(a.m + j), load(a.g + j));
      const __m256i w = load(a.w + j);
      store<StreamBoth>(a.m + j, m);
      store<StreamBoth>(a.w + j, _mm256_xor_si256(w, m));
    }
  }
}

uint64_t part(const Arrays& a, int mix, int variant, size_t begin, size_t end) {
  uint64_t seen = 0;
  switch (mix * 3 + variant) {
    case 0: case 1: case 2: seen = norm(a, begin, end); break;
    case 3: perturb<false, false>(a, begin, end); break;
    case 4: perturb<true, false>(a, begin, end); break;
    case 5: perturb<true, true>(a, begin, end); break;
    case 6: update<false, false>(a, begin, end); break;
    case 7: update<true, false>(a, begin, end); break;
    case 8: update<true, true>(a, begin, end); break;
    case 9: case 10: base<false>(a, begin, end); break;
    case 11: base<true>(a, begin, end); break;
    default: break;
  }
  _mm_sfence();
  return seen;
}

}  // namespace

// Runs one pass of a mix over `bytes` (a multiple of kStep) per array; the arrays are 64-byte aligned. Every thread
// takes every threads-th block of `block` bytes, or one contiguous piece when block is 0. The calling thread takes part.
extern "C" uint64_t probe_run(int mix, int variant, uint8_t* w, uint8_t* g, uint8_t* m, uint8_t* backup, size_t bytes,
                              size_t block, int threads) {
  const Arrays a{w, g, m, backup};
  const size_t count = static_cast<size_t>(threads);
  if (block == 0) block = (bytes / count + kStep - 1) / kStep * kStep;
  std::vector<uint64_t> seen(count, 0);
  const auto work = [&](size_t t) {
    for (size_t begin = t * block; begin < bytes; begin += count * block) {
      const size_t end = begin + block < bytes ? begin + block : bytes;
      seen[t] ^= part(a, mix, variant, begin, end);
    }
  };
  std::vector<std::thread> pool;
  for (size_t t = 1; t < count; ++t) pool.emplace_back(work, t);
  work(0);
  for (std::thread& thread : pool) thread.join();
  uint64_t all = 0;
  for (uint64_t s : seen) all ^= s;
  return all;
}
