// The floating-point environment that every result is computed in.
#pragma once

#include <cfenv>

namespace sparse_transcoder {

// The default environment, for a scope. Flushed subnormals or another rounding on the caller's
// thread would give bits that worker threads do not give.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&callers_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t callers_;
};

}  // namespace sparse_transcoder
