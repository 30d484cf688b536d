// Buffers: disjoint and aligned, borrowed by one call at a time, used again.
#include "cpu/workspace.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "pool.h"

using sparse_transcoder::Pool;
using sparse_transcoder::cpu::Plan;
using sparse_transcoder::cpu::Workspace;

namespace {

struct Item {
  int64_t bytes = 100;
  std::atomic<int> borrowers{0};
};

}  // namespace

TEST(workspace_buffers_are_apart) {
  const Plan plans[] = {
      {.max_rows = 1,
       .max_block_rows = 1,
       .workers = 1,
       .tile_rows = 1,
       .tile_features = 1,
       .hidden_size = 1,
       .int8_row_bytes = 0,
       .int8_inputs = 0,
       .int16_stride = 0,
       .max_ranks = 1,
       .capacity = 1},
      {.max_rows = 7,
       .max_block_rows = 7,
       .workers = 3,
       .tile_rows = 2,
       .tile_features = 5,
       .hidden_size = 33,
       .int8_row_bytes = 384,
       .int8_inputs = 64,
       .int16_stride = 0,
       .max_ranks = 64,
       .capacity = 68},
      {.max_rows = 512,
       .max_block_rows = 256,
       .workers = 4,
       .tile_rows = 64,
       .tile_features = 512,
       .hidden_size = 576,
       .int8_row_bytes = 1408,
       .int8_inputs = 576,
       .int16_stride = 608,
       .max_ranks = 50,
       .capacity = 114},
  };
  for (const Plan& plan : plans) {
    const Workspace w(plan);
    struct Span {
      uintptr_t begin;
      size_t bytes;
    };
    std::vector<Span> spans;
    const auto add = [&spans](auto* data, int64_t count) {
      spans.push_back({reinterpret_cast<uintptr_t>(data), count * sizeof(*data)});
    };
    const int64_t reservoirs = plan.max_rows * plan.workers;
    add(w.normed, plan.max_rows * plan.hidden_size);
    add(w.int8, plan.max_rows * plan.int8_row_bytes);
    add(w.int16, plan.max_rows * plan.int16_stride);
    add(w.int16_scales, plan.max_rows);
    add(w.margins, plan.max_rows);
    add(w.reservoirs, reservoirs);
    add(w.keys, reservoirs * plan.capacity);
    add(w.deferred, reservoirs * plan.capacity);
    EXPECT_EQUAL(static_cast<int64_t>(w.workers.size()), plan.workers);
    for (const sparse_transcoder::cpu::WorkerBuffers& worker : w.workers) {
      add(worker.scores, plan.score_count());
      add(worker.products, plan.product_count());
      add(worker.candidates, plan.tile_features);
      add(worker.positions, sparse_transcoder::cpu::SurvivorList::digits);
      const int64_t masks = sparse_transcoder::cpu::mask_count(plan.max_block_rows);
      add(worker.masks.rows, masks);
      add(worker.masks.words, masks + 2);
      add(worker.survivors, 3 * plan.survivor_capacity());
      add(worker.int16_panel, sparse_transcoder::panel_features * plan.int16_stride);
      add(worker.rotated, plan.int8_inputs);
      add(worker.merged_keys, plan.workers * plan.capacity);
      add(worker.merged_deferred, plan.workers * plan.capacity);
      add(worker.is_ranked, plan.max_ranks / 64 + 1);
      add(worker.entries, plan.entry_capacity());
      add(worker.entry_count, 1);
      add(worker.counters, 1);
    }
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
      // Where no layer has a copy its buffers are empty.
      return a.begin < b.begin || (a.begin == b.begin && a.bytes < b.bytes);
    });
    for (size_t i = 0; i < spans.size(); ++i) {
      EXPECT_EQUAL(spans[i].begin % 64, 0u);
      if (i > 0) EXPECT(spans[i - 1].begin + spans[i - 1].bytes <= spans[i].begin);
      // A sanitizer sees what is outside.
      std::fill_n(reinterpret_cast<char*>(spans[i].begin), spans[i].bytes, 1);
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
