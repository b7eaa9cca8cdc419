// Tests of the torch-free core, meant to run under AddressSanitizer and UndefinedBehaviorSanitizer: every kernel at
// every SIMD level over buffers of exactly the right size, so that one element too many is an error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/run.h"
#include "tests/expect.h"
#include "tests/inputs.h"

namespace {

using namespace rst;

// The tensors of one parameter, each in its own allocation of exactly its size, off alignment by `shift` scalars.
struct Parameter {
  std::vector<std::vector<char>> memory;
  Tensor tensor;

  Parameter(DType dtype, int64_t numel, unsigned operands, Master master, int shift, std::mt19937& random,
            bool complex = false) {
    memory.resize(kOperands);
    tensor.dtype = dtype;
    tensor.state_dtype = master == Master::None ? dtype : DType::Float;
    tensor.remainder = master == Master::Remainder;
    tensor.numel = numel;
    tensor.complex = complex;
    for (int s = 0; s < kOperands; ++s) {
      if (!(operands >> s & 1)) continue;
      const int64_t size = size_of(tensor.dtype_of(s));
      memory[s].resize((numel + shift) * size);
      tensor.data[s] = memory[s].data() + shift * size;
      for (int64_t i = 0; i < numel; ++i) put(s, i, std::normal_distribution<double>()(random));
      if (s == kState1) {
        for (int64_t i = 0; i < numel; ++i) put(s, i, 0);
      }
    }
  }
  void put(int s, int64_t i, double value) { ::put(tensor, s, i, value); }
};

struct Model {
  std::vector<Parameter> parameters;
  Table table;

  Model(unsigned operands, Master masters, unsigned seed) {
    std::mt19937 random(seed);
    int64_t index = 0;
    for (DType dtype : {DType::Float, DType::Double, DType::BFloat16, DType::Half}) {
      const bool has = masters == Master::Remainder ? dtype == DType::BFloat16 : size_of(dtype) == 2;
      const Master master = has ? masters : Master::None;
      unsigned own = master == Master::None ? operands : operands | bit(kMaster);
      if (master == Master::Copy) own &= ~bit(kBackup);
      for (int64_t numel : {0, 1, 7, 16, 33, 1000, 16384, 16385, 40001}) {
        parameters.emplace_back(dtype, numel, own, master, static_cast<int>(index % 3), random,
                                numel % 2 == 0 && size_of(dtype) > 2);
        parameters.back().tensor.index = index++;
      }
    }
    for (Parameter& p : parameters) table.tensors.push_back(p.tensor);
    table.cut();
  }
  // The table of a rule with so many state tensors.
  Table with_states(int states) const {
    Table some = table;
    for (Tensor& tensor : some.tensors) std::fill(tensor.data + kState0 + states, tensor.data + kMaster, nullptr);
    return some;
  }
  std::vector<std::vector<char>> bytes(int operand) const {
    std::vector<std::vector<char>> all;
    for (const Parameter& p : parameters) all.push_back(p.memory[operand]);
    return all;
  }
};

// Hyperparameters of every rule that do something, in the order of its columns, gamma last.
void choose(int rule, OpParams& params) {
  static const double kHyperparams[kRules][longest_row()] = {
      {0.1, 0.9, 0, 0.01, 2.0},
      {0.01, 0.9, 0.999, 1e-8, 0.01, 2.0},
      {0.01, 0.9, 0.99, 0.01, 2.0},
  };
  params.rule = rule;
  static const double kStep = 1;
  params.hyperparams = kHyperparams[rule];
  params.steps = &kStep;
  params.flag = true;
}

constexpr Master kKinds[] = {Master::None, Master::Copy, Master::Remainder};
constexpr unsigned kAllStates = bit(kState0) | bit(kState1) | bit(kState2);
constexpr unsigned kAll = bit(kParam) | bit(kGrad) | bit(kBackup) | bit(kFirstGrad) | kAllStates;
static_assert(sizeof(KernelTable) / sizeof(Kernel) == 65 + 48 * kRuleVariants,
              "run the new kernel in run_everything, then count it here");

bool is_half(const Tensor& t) { return t.dtype == DType::Half && !t.has(kMaster); }  // whose state no kernel rounds
std::vector<std::vector<std::vector<char>>> run_everything(Master masters, const Threads& threads) {
  Model model(kAll, masters, 5);
  const auto before = model.bytes(kParam);
  double stats[kStats] = {};
  const double rho[] = {0.5};
  const double gammas[] = {2.0};
  std::vector<std::vector<std::vector<char>>> seen;
  if (masters == Master::Copy) restore(model.table, OpParams{}, threads);  // parameters start as their rounded masters
  const auto start = model.bytes(kParam);
  for (bool adaptive : {false, true}) {
    OpParams params;
    params.adaptive = adaptive;
    params.eta = 0.01;
    params.stochastic = true;
    params.stats = stats;
    params.rhos = rho;
    grad_norm(model.table, params, threads);
    EXPECT(std::isfinite(stats[kNorm]) && stats[kNorm] > 0);
    perturb(model.table, params, threads);
    seen.push_back(model.bytes(kParam));
    EXPECT(seen.back() != start);
    restore(model.table, params, threads);
    EXPECT(model.bytes(kParam) == start);
  }
  if (masters != Master::Copy) EXPECT(start == before);
  OpParams params;
  for (int rule = 0; rule < kRules; ++rule) {
    for (int states = kRuleInfos[rule].fewest_states; states <= kRuleInfos[rule].most_states; ++states) {
      choose(rule, params);
      Table some = model.with_states(states);
      update(some, params, threads);
      for (Tensor& t : some.tensors) t.rounds_state = states > 0 && size_of(t.dtype) < 8 && !t.complex && !is_half(t);
      update(some, params, threads);
      for (int operand : {kParam, kState0, kState1, kState2}) seen.push_back(model.bytes(operand));
    }
  }
  params.gammas = gammas;
  restore(model.table, params, threads);
  seen.push_back(model.bytes(kGrad));
  return seen;
}

void test_kernels() {
  for (Master masters : kKinds) {
    std::vector<std::vector<std::vector<char>>> expected;
    for (const KernelTable* level : runnable_kernels()) {
      EXPECT(select_kernels(level->name));
      const auto one = run_everything(masters, Threads{});
      for (int64_t threshold : {kAutomaticThreshold, int64_t{0}, INT64_MAX}) {
        set_non_temporal_threshold(threshold);
        EXPECT(one == run_everything(masters, Threads{3, run_threads}));
      }
      set_non_temporal_threshold(kAutomaticThreshold);
      if (!expected.empty()) EXPECT(one == expected);
      expected = one;
      std::printf("level %s, masters %d\n", level->name, static_cast<int>(masters));
    }
  }
}

// Stores past the caches, kernel by kernel.
void test_streaming() {
  double stats[kStats] = {1, 1};
  const double rho[] = {0.5};
  OpParams params;
  params.stats = stats;
  params.rhos = rho;
  params.stochastic = true;
  for (const KernelTable* level : runnable_kernels()) {
    for (Master masters : kKinds) {
      std::vector<std::vector<std::vector<char>>> seen[2];
      for (bool streaming : {false, true}) {
        Model model(kAll, masters, 7);
        for (const Tensor& t : model.table.tensors) {
          if (t.numel == 0) continue;
          const int dtype = static_cast<int>(t.dtype);
          const int master = static_cast<int>(t.master());
          std::vector<std::pair<Kernel, int>> kernels{{level->perturb[dtype][0][master], 0}};
          for (int rule = 0; rule < kRules; ++rule) {
            const RuleInfo& info = kRuleInfos[rule];
            const int variant = info.first_variant + info.most_states - info.fewest_states;
            for (bool mixing : {false, true}) kernels.push_back({level->update[variant][dtype][mixing][master], rule});
          }
          kernels.push_back({level->restore[dtype][t.master() == Master::Copy], 0});
          for (const auto& [kernel, rule] : kernels) {
            choose(rule, params);
            ChunkArgs c{};
            c.params = &params;
            c.tensor = &t;
            c.count = static_cast<int>(std::min(t.numel, kChunk));
            c.streaming = c.prefetches = streaming;
            std::copy(t.data, t.data + kOperands, c.data);
            c.source = t.data[t.source(true)];
            kernel(c);
            seen[streaming].push_back(model.parameters[t.index].memory);
          }
        }
      }
      EXPECT(seen[0] == seen[1]);
    }
  }
}

void test_sgd_value() {
  std::mt19937 random(1);
  Parameter p(DType::Double, 37, kAll, Master::None, 0, random);
  std::vector<double> w(37), g(37), b(37), m(37), g1(37);
  std::memcpy(w.data(), p.tensor.data[kBackup], 37 * 8);
  std::memcpy(g.data(), p.tensor.data[kGrad], 37 * 8);
  std::memcpy(m.data(), p.tensor.data[kState0], 37 * 8);
  std::memcpy(g1.data(), p.tensor.data[kFirstGrad], 37 * 8);
  Table table;
  table.tensors = {p.tensor};
  table.cut();
  const double row[] = {0.1, 0.9, 0.2, 0.01, 2.0};
  OpParams params;
  params.rule = kSgd;
  params.hyperparams = row;
  update(table, params, Threads{});
  for (int i = 0; i < 37; ++i) {
    const double d = 2.0 * g[i] - g1[i] + 0.01 * w[i], buf = 0.9 * m[i] + 0.8 * d;
    EXPECT(std::fabs(static_cast<double*>(p.tensor.data[kParam])[i] - (w[i] - 0.1 * buf)) < 1e-14);
  }
}

void test_non_finite() {
  std::mt19937 random(2);
  for (double bad : {0.0, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    Parameter p(DType::Float, 100, kAll, Master::None, 0, random);
    for (int i = 0; i < 100; ++i) p.put(kGrad, i, bad);
    const auto before = p.memory[kParam];
    Table table;
    table.tensors = {p.tensor};
    table.cut();
    double stats[kStats] = {};
    const double rho[] = {0.5};
    OpParams params;
    params.stats = stats;
    params.rhos = rho;
    grad_norm(table, params, Threads{});
    EXPECT(stats[kNonFinite] == (bad == 0 ? 0 : 1) && stats[kInverse] == 0);
    perturb(table, params, Threads{});
    EXPECT(p.memory[kParam] == before && p.memory[kBackup] == before);
  }
}

void test_table() {
  Table table;
  for (int64_t numel : {int64_t{0}, int64_t{5}, kChunk, kChunk + 1, int64_t{1000000000}}) {
    Tensor t;
    t.numel = numel;
    table.tensors.push_back(t);
  }
  table.cut();
  int64_t scalars = 0;
  for (const Chunk& chunk : table.chunks) scalars += chunk.count;
  EXPECT(scalars == 1000000000 + 2 * kChunk + 6);
  for (int n : {1, 2, 3, 7, 64}) {
    EXPECT(first_chunk(table, 0, n) == 0);
    EXPECT(first_chunk(table, n, n) == static_cast<int64_t>(table.chunks.size()));
    for (int k = 0; k < n; ++k) EXPECT(first_chunk(table, k, n) <= first_chunk(table, k + 1, n));
  }
  Table empty;
  empty.cut();
  EXPECT(first_chunk(empty, 0, 2) == 0 && first_chunk(empty, 2, 2) == 0 && useful_threads(empty, 4, 8) == 1);

  const int64_t sizes[] = {2, 3, 4}, dense[] = {12, 4, 1}, last[] = {1, 8, 2}, gaps[] = {24, 8, 2},
                expanded[] = {0, 4, 1};
  EXPECT(is_dense(3, sizes, dense) && is_dense(3, sizes, last) && !is_dense(3, sizes, gaps) &&
         !is_dense(3, sizes, expanded));
  EXPECT(!may_overlap(3, sizes, dense) && !may_overlap(3, sizes, gaps) && may_overlap(3, sizes, expanded));
}

void test_strided() {
  // A 40 x 50 parameter with gaps, whose gradient is transposed: elements must meet by index, not by address.
  std::vector<float> w(40 * 100), g(50 * 40), backup(40 * 50);
  for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i);
  for (size_t i = 0; i < g.size(); ++i) g[i] = static_cast<float>(i % 7) - 3;
  const std::vector<float> before = w;
  const int64_t sizes[] = {40, 50}, ws[] = {100, 2}, gs[] = {1, 40}, bs[] = {50, 1};
  View views[kOperands];
  views[kParam] = {w.data(), 2, sizes, ws};
  views[kGrad] = {g.data(), 2, sizes, gs};
  views[kBackup] = {backup.data(), 2, sizes, bs};
  Tensor tensor;
  set_layout(tensor, views);
  EXPECT(tensor.strided() && tensor.numel == 2000);
  Table table;
  table.tensors = {tensor};
  table.cut();
  double stats[kStats] = {1, 1};
  const double rho[] = {0.5};
  OpParams params;
  params.stats = stats;
  params.rhos = rho;
  perturb(table, params, Threads{});
  for (int i = 0; i < 40; ++i) {
    for (int j = 0; j < 50; ++j) {
      EXPECT(w[i * 100 + j * 2] == before[i * 100 + j * 2] + 0.5f * g[j * 40 + i]);
      EXPECT(w[i * 100 + j * 2 + 1] == before[i * 100 + j * 2 + 1]);
    }
  }
  restore(table, OpParams{}, Threads{});
  EXPECT(w == before);
}

// A tensor with gaps is summed piece by piece, a dense one in place: to the same norm, bit for bit.
void test_strided_norm() {
  constexpr int64_t kGap = 2;
  std::mt19937 random(4);
  for (DType dtype : {DType::Float, DType::Double, DType::BFloat16, DType::Half}) {
    Parameter dense(dtype, 20011, 1u << kParam | 1u << kGrad, Master::None, 0, random);
    Tensor strided = dense.tensor;
    strided.sizes = {strided.numel};
    strided.strides.assign(kOperands, kGap);
    const int64_t size = size_of(dtype);
    std::vector<char> spread[2];
    for (int s : {kParam, kGrad}) {
      std::vector<char>& to = spread[s == kGrad];
      to.resize(((dense.tensor.numel - 1) * kGap + 1) * size);
      for (int64_t i = 0; i < dense.tensor.numel; ++i) {
        std::memcpy(to.data() + i * kGap * size, dense.memory[s].data() + i * size, size);
      }
      strided.data[s] = to.data();
    }
    for (const KernelTable* level : runnable_kernels()) {
      EXPECT(select_kernels(level->name));
      for (bool adaptive : {false, true}) {
        OpParams params;
        params.adaptive = adaptive;
        params.eta = 0.01;
        double norms[2] = {};
        for (bool gaps : {false, true}) {
          Table table;
          table.tensors = {gaps ? strided : dense.tensor};
          table.cut();
          double stats[kStats] = {};
          params.stats = stats;
          grad_norm(table, params, Threads{});
          norms[gaps] = stats[kNorm];
        }
        EXPECT(norms[0] > 100 && norms[0] < 200 + 100 * adaptive && norms[1] == norms[0]);
      }
    }
  }
}

void test_half() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t back = float_to_half_bits(half_bits_to_float(static_cast<uint16_t>(h)));
    EXPECT((h & 0x7fff) > 0x7c00 ? (back & 0x7fff) > 0x7c00 : back == h);  // a NaN stays one
  }
}

// Stretches of elements that follow one another in the whole tensor: as long as they can be, within one block.
void test_shards() {
  constexpr auto kBlock = static_cast<int64_t>(Shard::kBlock);
  for (const Shard shard : {Shard{}, {5, 7, 11}, {0, 4, 4}, {kBlock - 50, Shard::kEndless, 0}, {kBlock - 9, 6, 64}}) {
    for (int64_t i = 0; i < 200; ++i) {
      const uint64_t place = shard.position(i), next = shard.position(i + 1);
      const bool ends = (i + 1) % shard.run == 0 || next / Shard::kBlock != place / Shard::kBlock;
      EXPECT(ends == (shard.together(i) == 1) && (ends || next == place + 1));
      EXPECT(shard.together(i) == 1 || shard.together(i + 1) == shard.together(i) - 1);
      for (int64_t n = 1; n < 100; ++n) {
        const bool alike = place == static_cast<uint64_t>(shard.offset + i) && n <= shard.together(i);
        EXPECT(shard.in_one_stretch(i, n) == (alike && i + n <= shard.run));
      }
    }
  }
}

}  // namespace

int main() {
  test_table();
  test_half();
  test_shards();
  test_strided();
  test_strided_norm();
  test_sgd_value();
  test_non_finite();
  test_kernels();
  test_streaming();
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
