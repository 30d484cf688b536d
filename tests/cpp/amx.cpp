// The AMX screen's own instructions, against the screen of avx512vnni. On a processor without AMX
// each raises SIGILL, and the handler does what Intel's manual says of the bytes that stand there.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/kernels/kernels.h"
#include "emulated_amx/tiles.h"

using namespace sparse_transcoder;
using namespace sparse_transcoder::cpu;

namespace {

constexpr int registers[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a VEX prefix of three bytes, of the map and sizes that those of AMX have.
struct Instruction {
  int prefix, opcode;  // prefix: 0, or 1 for 66, 2 for F3 and 3 for F2
  int reg, rm, vvvv;   // register numbers; rm where there is no address
  bool has_address, has_index;
  char* base;
  int64_t index;
  int length;

  Instruction(const uint8_t* code, const greg_t* values) {
    using emulated_amx::require;
    const bool is_amx = code[0] == 0xc4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0;
    require(is_amx, "it has no such instruction");
    const auto extended = [&](int low, int bit) { return low | (code[1] >> bit & 1 ? 0 : 8); };
    const int modrm = code[4], mod = modrm >> 6;
    prefix = code[2] & 3;
    vvvv = ~code[2] >> 3 & 15;
    opcode = code[3];
    reg = extended(modrm >> 3 & 7, 7);
    rm = extended(modrm & 7, 5);
    length = 5;
    has_address = mod != 3;
    has_index = has_address && (modrm & 7) == 4;
    base = nullptr;
    index = 0;
    if (!has_address) return;
    require(mod != 0 || (modrm & 7) != 5, "the handler knows no address relative to the code");
    int base_register = rm;
    if (has_index) {
      const int sib = code[length++], index_register = extended(sib >> 3 & 7, 6);
      require(mod != 0 || (sib & 7) != 5, "the handler knows no address without a base");
      base_register = extended(sib & 7, 5);
      if (index_register != 4) index = values[registers[index_register]] << (sib >> 6);
    }
    base = reinterpret_cast<char*>(values[registers[base_register]]);
    int32_t offset = 0;
    if (mod == 1) offset = static_cast<int8_t>(code[length]);
    if (mod == 2) std::memcpy(&offset, code + length, sizeof(offset));
    base += offset;
    length += mod == 1 ? 1 : mod == 2 ? 4 : 0;
  }

  void run() const {
    if (opcode == 0x49 && prefix == 0 && has_address && reg == 0)
      emulated_amx::configure(base + index);
    else if (opcode == 0x49 && prefix == 0 && !has_address && reg == 0 && rm == 0)
      emulated_amx::release();
    else if (opcode == 0x49 && prefix == 3 && !has_address)
      emulated_amx::zero(reg);
    else if (opcode == 0x4b && prefix == 3 && has_index)
      emulated_amx::load(reg, base, index);
    else if (opcode == 0x4b && prefix == 2 && has_index)
      emulated_amx::store(reg, base, index);
    else if (opcode == 0x5e && prefix == 2 && !has_address)
      emulated_amx::add_products(reg, rm, vvvv);
    else
      emulated_amx::require(false, "the screen has no such instruction");
  }
};

void run_instruction(int, siginfo_t*, void* context) {
  greg_t* values = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(values[REG_RIP]), values);
  instruction.run();
  values[REG_RIP] += instruction.length;
}

// Handles SIGILL while it lives.
class Handler {
 public:
  Handler() {
    struct sigaction action = {};
    action.sa_sigaction = run_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~Handler() { sigaction(SIGILL, &before_, nullptr); }

 private:
  struct sigaction before_;
};

}  // namespace

TEST(amx_instructions_give_the_masks_of_avx512vnni) {
  const KernelTable* vnni = nullptr;
  for (const KernelTable& kernels : runnable_kernels())
    if (kernels.name == "avx512vnni") vnni = &kernels;
  if (vnni == nullptr) return;  // what surrounds the instructions needs it
  KernelTable amx = *vnni;
  use_avx512amx(amx);
  EXPECT(amx.screen_int8 != vnni->screen_int8);
  const Handler handler;
  std::mt19937 random_bits(1);
  std::normal_distribution<float> normal;
  for (const int64_t size : {5, 64, 100, 576, 1000})
    for (const int64_t planes : {1, 2})
      for (const int64_t rows : {1, 3, 4, 6, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40, 64, 65, 70}) {
        const Int8Layout layout(size);
        const int64_t row_bytes = planes * layout.row_bytes();
        std::vector<float> x(rows * size), w(panel_features * size), rotated(layout.inputs),
            low(panel_features);
        for (float& value : x) value = normal(random_bits);
        for (float& value : w) value = normal(random_bits);
        for (float& value : low) value = normal(random_bits) * std::sqrt(static_cast<float>(size));
        std::vector<int8_t> packed(rows * row_bytes);
        std::vector<uint8_t> panel(layout.panel_bytes());
        for (int64_t r = 0; r < rows; ++r)
          vnni->quantise_row(layout, x.data() + r * size, planes, packed.data() + r * row_bytes,
                             rotated.data());
        vnni->quantise_panel(layout, w.data(), panel_features, panel.data());
        const auto screen = [&](const KernelTable& kernels) {
          std::vector<uint64_t> masks(rows + 1, 67890);
          Prefetcher prefetcher;
          prefetcher.add(panel.data(), layout.panel_bytes());
          kernels.screen_int8({layout, packed.data(), rows, planes, panel.data(), low.data()},
                              masks.data(), prefetcher);
          return masks;
        };
        EXPECT(screen(amx) == screen(*vnni));
      }
}
