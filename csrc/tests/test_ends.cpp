// The ends of tensors: every one of them lies right before a page that nobody may touch, and after bytes that nobody
// may change. AddressSanitizer does not see masked accesses, a page does.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/run.h"
#include "tests/expect.h"
#include "tests/inputs.h"

namespace {

using namespace rst;

// So many bytes before a guard page.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : bytes_(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room_ = (bytes + kBefore + page - 1) / page * page;
    memory_ =
        static_cast<char*>(mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT(memory_ != MAP_FAILED && mprotect(memory_ + room_, page, PROT_NONE) == 0);
    mapped_ = room_ + page;
    std::memset(memory_, kFiller, room_);
  }
  ~GuardedMemory() { munmap(memory_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  char* data() const { return memory_ + room_ - bytes_; }
  std::vector<char> bytes() const { return {data(), data() + bytes_}; }
  bool untouched_before() const {
    for (const char* p = memory_; p < data(); ++p) {
      if (*p != kFiller) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBefore = 256;
  static constexpr char kFiller = 0x5a;
  size_t bytes_, room_ = 0, mapped_ = 0;
  char* memory_ = nullptr;
};

constexpr unsigned kUsed = bit(kParam) | bit(kGrad) | bit(kBackup) | bit(kFirstGrad) | bit(kState0) | bit(kState1);

// What all ops leave in a parameter of so many elements and its companions.
std::vector<std::vector<char>> run_all(DType dtype, int64_t numel, Master master, bool rounds_state) {
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.state_dtype = master == Master::None ? dtype : DType::Float;
  tensor.remainder = master == Master::Remainder;
  tensor.rounds_state = rounds_state;
  tensor.numel = numel;
  std::vector<std::unique_ptr<GuardedMemory>> memory(kOperands);
  for (int s = 0; s < kOperands; ++s) {
    if (!((master == Master::None ? kUsed : kUsed | bit(kMaster)) >> s & 1)) continue;
    if (s == kBackup && master == Master::Copy) continue;
    memory[s] = std::make_unique<GuardedMemory>(numel * size_of(tensor.dtype_of(s)));
    tensor.data[s] = memory[s]->data();
    for (int64_t i = 0; i < numel; ++i) {
      put(tensor, s, i, (s == kState1 ? 1 : (i + s) % 3 - 1) * (1 + static_cast<double>(i) / 128));
    }
  }
  Table table;
  table.tensors = {tensor};
  table.cut();
  double stats[kStats] = {};
  const double rho[] = {0.5}, gammas[] = {2.0}, row[] = {0.01, 0.9, 0.999, 1e-8, 0.01, 2.0}, step[] = {1};
  OpParams params;
  params.stats = stats;
  params.rhos = rho;
  params.stochastic = true;
  params.hyperparams = row;
  params.steps = step;
  params.rule = kAdam;
  for (bool adaptive : {true, false}) {
    params.adaptive = adaptive;
    params.eta = 0.01;
    grad_norm(table, params, Threads{});
    perturb(table, params, Threads{});
    restore(table, params, Threads{});
  }
  perturb(table, params, Threads{});
  update(table, params, Threads{});
  params.gammas = gammas;
  restore(table, params, Threads{});
  std::vector<std::vector<char>> seen(1, std::vector<char>(sizeof(stats)));
  std::memcpy(seen[0].data(), stats, sizeof(stats));
  for (const auto& one : memory) {
    if (one == nullptr) continue;
    EXPECT(one->untouched_before());
    seen.push_back(one->bytes());
  }
  return seen;
}

}  // namespace

int main() {
  for (DType dtype : {DType::Float, DType::Double, DType::BFloat16, DType::Half}) {
    for (Master master : {Master::None, Master::Copy, Master::Remainder}) {
      if (master != Master::None && size_of(dtype) != 2) continue;
      if (master == Master::Remainder && dtype != DType::BFloat16) continue;
      for (bool rounds_state : {false, true}) {
        if (rounds_state && (dtype == DType::Double || (dtype == DType::Half && master == Master::None))) continue;
        for (int64_t numel = 1; numel <= 130; ++numel) {
          std::vector<std::vector<char>> expected;
          for (const KernelTable* level : runnable_kernels()) {
            EXPECT(select_kernels(level->name));
            for (int64_t threshold : {kAutomaticThreshold, int64_t{0}}) {
              set_non_temporal_threshold(threshold);
              const auto seen = run_all(dtype, numel, master, rounds_state);
              if (expected.empty()) expected = seen;
              EXPECT(seen == expected);
            }
          }
        }
      }
    }
  }
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
