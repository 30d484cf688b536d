// The routes: requests are checked, become jobs of the host, and their steps become JSON.
#pragma once

#include <memory>
#include <string>

#include "host.h"

namespace feature_server {

class Http {
 public:
  explicit Http(Host& host);
  ~Http();

  // The port that was bound: Options::port, or a free one where that is 0. Throws
  // std::runtime_error.
  int bind();
  // Serves until stop().
  void serve();
  // New work is refused from now on. Waits until every accepted response is written, or for
  // Options::drain seconds, and returns how many are not.
  int64_t drain();
  void stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace feature_server
