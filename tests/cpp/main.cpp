// Runs the tests whose names start with one of the arguments; all of them without arguments. It
// needs no torch, so that tests of kernels can be run without one.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>
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

namespace {

// Runs the tests whose names begin with one of these, or all.
int run_tests(int count, char** names) {
  int run = 0, failed = 0;
  for (const Test& test : tests()) {
    bool wanted = count == 0;
    for (int i = 0; i < count; ++i) wanted |= test.name.rfind(names[i], 0) == 0;
    if (!wanted) continue;
    std::fprintf(stderr, "%s\n", test.name.c_str());
    failed_checks = 0;
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__, error.what());
    }
    ++run;
    if (failures() > 0) {
      ++failed;
      std::fprintf(stderr, "  %d checks failed\n", failures());
    }
  }
  std::fprintf(stderr, "%d of %d tests passed\n", run - failed, run);
  return failed > 0 || run == 0;
}

}  // namespace
}  // namespace check

int main(int count, char** names) {
  try {
    sparse_transcoder::cpu::active_kernels();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "skipped: %s\n", error.what());
    return 77;
  }
#ifdef __SANITIZE_THREAD__
  // It does not see how torch's threads wait for each other. Calls of another thread than this one
  // have the library's own threads.
  int status = 1;
  std::thread([&] { status = check::run_tests(count - 1, names + 1); }).join();
  return status;
#else
  return check::run_tests(count - 1, names + 1);
#endif
}
