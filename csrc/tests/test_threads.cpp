// More data than all caches hold, which threads take side by side: one gradient, many times over. And how much they
// hold.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/run.h"
#include "tests/expect.h"
#include "tests/inputs.h"

using namespace rst;

// By made-up caches, in MiB.
void test_bytes_kept() {
  const auto kept = [](int64_t last_level, int64_t cpus, int64_t own) {
    return bytes_kept(last_level << 20, cpus, own << 20) >> 20;
  };
  EXPECT(kept(32, 2, 4) == 16);       // an EPYC, of which two cores are rented
  EXPECT(kept(260, 2, 8) == 8);       // a Xeon, likewise
  EXPECT(kept(260, 60, 240) == 240);  // all of one
  EXPECT(kept(33, 2, 4) == 4 && kept(32, 1, 4) == 4);
  EXPECT(kept(96, 16, 16) == 48);
  EXPECT(kept(2, 1, 8) == 2);  // no more than there is
}

int main() {
  test_bytes_kept();
  std::vector<float> g(1 << 20);
  for (size_t i = 0; i < g.size(); ++i) g[i] = static_cast<float>(i % 1000) / 1000;
  Tensor tensor;
  tensor.numel = static_cast<int64_t>(g.size());
  tensor.data[kParam] = tensor.data[kGrad] = g.data();
  Table table;
  table.tensors.assign(cache_bytes() / static_cast<int64_t>(g.size() * sizeof(float)) + 2, tensor);
  table.cut();
  double one[kStats] = {};
  OpParams params;
  params.stats = one;
  grad_norm(table, params, Threads{});
  EXPECT(one[kNorm] > 0 && one[kInverse] > 0);
  for (int threads : {2, 3, 8}) {
    double several[kStats] = {};
    params.stats = several;
    grad_norm(table, params, Threads{threads, run_threads});
    EXPECT(std::memcmp(one, several, sizeof(one)) == 0);
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
