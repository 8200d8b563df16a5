// check_ops EFFORT [OPERATION]: runs the operations of fedcmt::cuda on small cases and compares
// them with plain float64 loops. EFFORT: tiny, small or full. Prints a line for each case.
#include <cstring>

#include "cases.h"

namespace {

struct Operation {
  const char* name;
  void (*check)(checks::Effort);
};

constexpr Operation kOperations[] = {
    {"gramian", checks::check_gramian},
    {"server_step", checks::check_server_step},
    {"weighted_mean", checks::check_weighted_mean},
    {"screen", checks::check_screen},
    {"project_conflicts", checks::check_project_conflicts},
    {"warp_patch", checks::check_warp_patch},
    {"change_intensities", checks::check_change_intensities},
};

checks::Effort parse_effort(const char* name) {
  if (std::strcmp(name, "tiny") == 0) return checks::Effort::kTiny;
  if (std::strcmp(name, "small") == 0) return checks::Effort::kSmall;
  if (std::strcmp(name, "full") == 0) return checks::Effort::kFull;
  std::fprintf(stderr, "effort should be tiny, small or full. Got '%s'\n", name);
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: check_ops tiny|small|full [operation]\n");
    return 2;
  }
  const checks::Effort effort = parse_effort(argv[1]);
  bool found = false;
  for (const Operation& operation : kOperations) {
    if (argc > 2 && std::strcmp(argv[2], operation.name) != 0) continue;
    found = true;
    operation.check(effort);
  }
  if (!found) std::fprintf(stderr, "no operation is named '%s'\n", argv[2]);
  return found && checks::Case::failures() == 0 ? 0 : 1;
}
