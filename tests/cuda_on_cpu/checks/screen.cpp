#include <algorithm>

#include "cases.h"

namespace checks {
namespace {

struct Setting {
  Dtype from, to;
  bool copies, shifted, special;
  int64_t length;
};

// Values that a narrower type rounds, overflows on, or keeps only as a subnormal.
double special_value(int64_t e, Random* random) {
  const double x = random->next();
  switch (e % 7) {
    case 0:
      return kNaN;
    case 1:
      return x < 0 ? -INFINITY : INFINITY;
    case 2:
      return 65519.9 + x;  // the largest float16 is 65504; from 65520 on it is infinity
    case 3:
      return x * 0x1p-20;  // subnormal in float16
    case 4:
      return x * 0x1p-130;  // subnormal in float32 and bfloat16
    case 5:
      return x < 0 ? 3.4e38 : -3.4e38;  // rounds to infinity in bfloat16
    default:
      return (x < 0 ? 1 : 3) + 0x1p-8;  // a tie between two bfloat16 numbers
  }
}

struct Expected {
  double nonfinite = 0, squares = 0, largest = 0;

  void add(double stored) {
    if (!std::isfinite(stored)) {
      nonfinite += 1;
      return;
    }
    squares += stored * stored;
    largest = std::max(largest, std::fabs(stored));
  }
};

void check_one(const Setting& setting) {
  Case line(format("screen %s to %s P=%lld%s%s", name_of(setting.from),
                   setting.copies ? name_of(setting.to) : "nothing",
                   static_cast<long long>(setting.length), setting.shifted ? " shifted" : "",
                   setting.special ? " special values" : ""));
  Row from(setting.length, setting.from, setting.shifted);
  Row to(setting.copies ? setting.length : 0, setting.to, setting.shifted);
  Random random(9);
  Expected expected;
  for (int64_t e = 0; e < setting.length; ++e) {
    const double x = setting.special ? special_value(e, &random) : random.next();
    from.set(e, round_to(x, setting.from));
    expected.add(round_to(from.get(e), setting.to));
  }
  const fedcmt::ScreenArguments arguments{from.data(), setting.from, to.data(), setting.to,
                                          setting.length};
  const Array<double> sums(3);
  const Array<char> workspace(fedcmt::cuda::screen_workspace_bytes(arguments));
  line.status(fedcmt::cuda::screen(arguments, sums.data(), {workspace.data(), 0, nullptr}));
  for (int64_t e = 0; e < to.length(); ++e) {
    line.equal("to", to.get(e), round_to(from.get(e), setting.to));
  }
  line.equal("nonfinite", sums[0], expected.nonfinite);
  line.near("squares", sums[1], expected.squares, 1e-12 * expected.squares);
  line.equal("largest", sums[2], expected.largest);
  line.digest(sums);
  line.digest(to.data(), to.length() * size_of(setting.to));
  line.that("no write outside", to.is_intact() && workspace.is_intact());
}

}  // namespace

void check_screen(Effort effort) {
  if (effort == Effort::kTiny) {
    check_one({Dtype::kFloat32, Dtype::kBFloat16, true, true, true, 9001});
    check_one({Dtype::kBFloat16, Dtype::kBFloat16, false, false, false, 9001});
    return;
  }
  for (const Dtype from : dtypes()) {
    for (const int64_t length : {0, 1, 7, 1023, 4099, 9001}) {
      check_one({from, from, false, length % 2 == 1, length > 1, length});
      for (const Dtype to : dtypes()) {
        check_one({from, to, true, false, false, length});
        check_one({from, to, true, true, true, length});
        if (effort == Effort::kFull) check_one({from, to, true, false, true, length});
      }
    }
  }
}

}  // namespace checks
