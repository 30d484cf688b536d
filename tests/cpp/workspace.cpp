// Buffers: disjoint and aligned, borrowed by one call at a time, used again.
#include "cpu/workspace.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "pool.h"

using sparse_transcoder::Plan;
using sparse_transcoder::Pool;
using sparse_transcoder::Workspace;

namespace {

struct Item {
  int64_t bytes = 100;
  std::atomic<int> borrowers{0};
};

}  // namespace

TEST(workspace_buffers_are_apart) {
  const Plan plans[] = {
      {.rows = 1,
       .lanes = 1,
       .block = 1,
       .panel = 1,
       .hidden_size = 1,
       .int8_bytes = 0,
       .int8_inputs = 0,
       .int16_stride = 0,
       .job_rows = 1,
       .top_k = 1,
       .capacity = 1},
      {.rows = 7,
       .lanes = 3,
       .block = 2,
       .panel = 5,
       .hidden_size = 33,
       .int8_bytes = 384,
       .int8_inputs = 64,
       .int16_stride = 0,
       .job_rows = 7,
       .top_k = 4,
       .capacity = 68},
      {.rows = 512,
       .lanes = 4,
       .block = 64,
       .panel = 512,
       .hidden_size = 576,
       .int8_bytes = 1408,
       .int8_inputs = 576,
       .int16_stride = 608,
       .job_rows = 256,
       .top_k = 50,
       .capacity = 114},
  };
  for (const Plan& plan : plans) {
    const Workspace w(plan);
    struct Span {
      uintptr_t begin;
      size_t bytes;
    };
    const auto span = [](auto* data, int64_t count) {
      return Span{reinterpret_cast<uintptr_t>(data), count * sizeof(*data)};
    };
    const int64_t tile = sparse_transcoder::cpu::panel_features;
    std::vector<Span> spans = {span(w.hidden, plan.rows * plan.hidden_size),
                               span(w.int8, plan.rows * plan.int8_bytes),
                               span(w.int16, plan.rows * plan.int16_stride),
                               span(w.int16_scale, plan.rows),
                               span(w.margin, plan.rows),
                               span(w.lists, plan.rows * plan.lanes),
                               span(w.keys, plan.rows * plan.lanes * plan.capacity),
                               span(w.open, plan.rows * plan.lanes * plan.capacity),
                               span(w.scores, plan.lanes * plan.scores()),
                               span(w.candidates, plan.lanes * plan.panel),
                               span(w.masks, plan.lanes * plan.job_rows),
                               span(w.survivors, plan.lanes * 3 * plan.survivors()),
                               span(w.packed, plan.lanes * tile * plan.int16_stride),
                               span(w.rotated, plan.lanes * plan.int8_inputs),
                               span(w.tally, plan.lanes),
                               span(w.merged, plan.lanes * plan.lanes * plan.capacity),
                               span(w.merged_open, plan.lanes * plan.lanes * plan.capacity)};
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
      return a.begin < b.begin ||
             (a.begin == b.begin && a.bytes < b.bytes);  // no layer may have a copy: empty buffers
    });
    for (size_t i = 0; i < spans.size(); ++i) {
      EXPECT_EQUAL(spans[i].begin % 64, 0u);
      if (i > 0) EXPECT(spans[i - 1].begin + spans[i - 1].bytes <= spans[i].begin);
      std::fill_n(reinterpret_cast<char*>(spans[i].begin), spans[i].bytes,
                  1);  // a sanitizer sees what is outside
    }
    EXPECT(spans.back().begin + spans.back().bytes - spans.front().begin <=
           static_cast<size_t>(w.bytes));
  }
}

TEST(workspace_pool_reuses) {
  int made = 0;
  Pool<Item> pool([&made] {
    ++made;
    return std::make_unique<Item>();
  });
  EXPECT_EQUAL(made, 1);  // planned when built, not by the first call
  for (int i = 0; i < 5; ++i) pool.borrow();
  EXPECT_EQUAL(made, 1);
  {
    const auto a = pool.borrow(), b = pool.borrow();
    EXPECT(a.get() != b.get());
  }
  const auto a = pool.borrow(), b = pool.borrow();
  EXPECT_EQUAL(made, 2);
  EXPECT_EQUAL(pool.bytes(), 200);
}

TEST(workspace_pool_lends_to_one_at_a_time) {
  std::atomic<int> made{0};
  Pool<Item> pool([&made] {
    ++made;
    return std::make_unique<Item>();
  });
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller)
    callers.emplace_back([&pool] {
      for (int i = 0; i < 500; ++i) {
        const auto item = pool.borrow();
        EXPECT_EQUAL(item->borrowers.fetch_add(1), 0);
        std::this_thread::yield();
        --item->borrowers;
      }
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT(made <= 8);
  EXPECT_EQUAL(pool.bytes(), 100 * made);
}

TEST(workspace_pool_survives_a_refusal) {
  bool refuse = false;
  Pool<Item> pool([&refuse] {
    if (refuse) throw std::runtime_error("no memory");
    return std::make_unique<Item>();
  });
  auto first = pool.borrow();
  refuse = true;
  try {
    pool.borrow();
    EXPECT(!"nothing thrown");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQUAL(pool.bytes(), 100);
  first.reset();
  EXPECT(pool.borrow() != nullptr);
}
