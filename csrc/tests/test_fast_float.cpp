// Tests of the division and the square root of the GPU kernels, without a GPU.
#include "cuda/fast_float.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "tests/expect.h"

using namespace rst;

// Quotients and roots as GPU kernels round them, from approximations as far off as those of the hardware may be, in
// units of the last place: what IEEE 754 asks for, or rarely the number next to it.
int main() {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> mantissa(1, 2);
  std::uniform_int_distribution<int> exponent(-40, 40), off_by_one(-1, 1), off_by_two(-2, 2);
  const auto number = [&] { return std::ldexp(mantissa(random), exponent(random)); };
  const auto near = [&](double x, auto& off) {
    return from_bits(to_bits(static_cast<float>(x)) + static_cast<uint32_t>(off(random)));
  };
  const auto apart = [](float a, float b) {
    return std::abs(static_cast<int64_t>(to_bits(a)) - static_cast<int64_t>(to_bits(b)));
  };
  int quotients = 0, roots = 0;
  for (int i = 0; i < 1000000; ++i) {
    const float a = number() * (i % 2 == 0 ? 1 : -1), b = number();
    const float quotient = cuda::corrected_quotient(a, b, near(1.0 / static_cast<double>(b), off_by_one));
    const float root = cuda::corrected_root(b, near(1 / std::sqrt(static_cast<double>(b)), off_by_two));
    EXPECT(apart(quotient, a / b) <= 1 && apart(root, std::sqrt(b)) <= 1);
    quotients += quotient != a / b;
    roots += root != std::sqrt(b);
  }
  EXPECT(quotients <= 1 && roots <= 20);
  const float halfway = cuda::corrected_quotient(13070404, 15476995, 6.46120313e-08f);
  EXPECT(apart(halfway, 13070404.0f / 15476995.0f) <= 1);
  constexpr float inf = INFINITY, third = 1.0f / 3;
  EXPECT(to_bits(cuda::corrected_quotient(0.0f, 3, third)) == to_bits(0.0f));
  EXPECT(to_bits(cuda::corrected_quotient(-0.0f, 3, third)) == to_bits(-0.0f));
  EXPECT(cuda::corrected_quotient(inf, 3, third) == inf && cuda::corrected_quotient(-inf, 3, third) == -inf);
  EXPECT(cuda::corrected_quotient(3, inf, 0) == 0 && std::isnan(cuda::corrected_quotient(inf, inf, 0)));
  EXPECT(std::isnan(cuda::corrected_quotient(NAN, 3, third)) && std::isnan(cuda::corrected_quotient(3, NAN, NAN)));
  std::printf(failures == 0 ? "all passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
