// Runs the tests whose names start with one of the arguments; all of them without arguments. It
// needs no torch, so that tests of kernels can be run without one.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/kernels/kernels.h"

namespace check {
namespace {

struct Test {
  std::string name;
  void (*body)();
};

std::vector<Test>& tests() {
  static std::vector<Test> table;
  return table;
}

std::atomic<int> failed_checks{0};

}  // namespace

void fail(const char* file, int line, const std::string& what) {
  if (failed_checks.fetch_add(1) < 20)
    std::fprintf(stderr, "  %s:%d: %s\n", file, line, what.c_str());
}

int failures() { return failed_checks; }

bool add(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

}  // namespace check

int main(int count, char** names) {
  try {
    sparse_transcoder::cpu::active_kernels();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "skipped: %s\n", error.what());
    return 77;
  }
  int run = 0, failed = 0;
  for (const check::Test& test : check::tests()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= test.name.rfind(names[i], 0) == 0;
    if (!wanted) continue;
    std::fprintf(stderr, "%s\n", test.name.c_str());
    check::failed_checks = 0;
    try {
      test.body();
    } catch (const std::exception& error) {
      check::fail(__FILE__, __LINE__, error.what());
    }
    ++run;
    if (check::failures() > 0) {
      ++failed;
      std::fprintf(stderr, "  %d checks failed\n", check::failures());
    }
  }
  std::fprintf(stderr, "%d of %d tests passed\n", run - failed, run);
  return failed > 0 || run == 0;
}
