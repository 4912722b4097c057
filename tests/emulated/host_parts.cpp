// The host parts of the CUDA backend, plan.h and checks.h, against counting by hand. Random shapes; run under sanitizers.
// Prints one line for each test; the exit code is the number of those that failed.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "checks.h"

namespace {

using namespace dyrate;
using std::int64_t;

std::mt19937_64 engine(7);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }

/// Small, large, and the edges of what integers hold.
int64_t any_number() {
  static const int64_t edges[] = {0, 1, -1, 2, INT32_MAX, INT32_MIN, int64_t{INT32_MAX} + 1, INT64_MAX, INT64_MIN, kMostRows, kMostRows + 1, 65535, 65536};
  const int64_t kind = between(0, 5);
  if (kind == 0) return edges[between(0, static_cast<int64_t>(std::size(edges)) - 1)];
  if (kind == 1) return static_cast<int64_t>(engine());
  return kind < 4 ? between(0, 9) : between(0, 5000);
}

struct Failure {
  std::string words;
};

void require(bool holds, const std::string& words) {
  if (!holds) throw Failure{words};
}

/// The words of the refusal; empty where the call is accepted.
std::string refusal(const std::function<void()>& check) {
  try {
    check();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void accepts(const std::function<void()>& check, const std::string& what) {
  const std::string words = refusal(check);
  require(words.empty(), what + " is refused: " + words);
}

void refuses(const std::function<void()>& check, const std::string& part, const std::string& what) {
  const std::string words = refusal(check);
  require(!words.empty(), what + " is accepted");
  require(words.find(part) != std::string::npos, what + ": '" + words + "' does not name " + part);
  require(words.find(": expected ") != std::string::npos && words.find(", got ") != std::string::npos, what + ": " + words);
}

const void* at(std::uint64_t address) { return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address)); }

// ---- plan.h ---------------------------------------------------------------------------------------------------------------------

AttentionCall some_shape() {
  AttentionCall call{};
  call.type = Type::kFloat16;
  call.batch = static_cast<int>(between(1, between(0, 1) ? 8 : kGridLimit));
  call.kv_heads = static_cast<int>(between(1, between(0, 1) ? 8 : 200));
  call.heads = call.kv_heads * static_cast<int>(between(1, between(0, 1) ? 16 : kGridLimit / call.kv_heads));
  call.dim = static_cast<int>(between(1, kMostDim));
  call.value_dim = static_cast<int>(between(1, kMostDim));
  call.capacity = static_cast<int>(between(0, between(0, 1) ? 2000 : kMostRows));
  call.visual_capacity = static_cast<int>(between(0, call.capacity));
  call.list_width = between(0, 1) ? static_cast<int>(between(0, between(0, 1) ? 600 : kMostRows)) : 0;
  call.write_logits = static_cast<int>(between(0, 1));
  call.scale = 1.f;
  return call;
}

Gpu some_gpu() {
  static const int known[] = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130};
  const int capability = known[between(0, static_cast<int64_t>(std::size(known)) - 1)];
  const int code = between(0, 3) ? capability : between(0, 1) ? 75 : capability / 10 * 10;
  return {static_cast<int>(between(1, between(0, 1) ? 200 : 1 << 20)), capability, code};
}

/// Blocks of the staged kernel that fit one multiprocessor, by CUDA's table of shared memory.
int64_t staged_held(const AttentionCall& call, const Gpu& gpu) {
  const int major = gpu.capability / 10;
  const int64_t kib = major == 12 || major > 12 || gpu.capability == 86 || gpu.capability == 89 ? 100 : major == 8 ? 164 : 228;
  const int64_t row = std::max(call.dim, call.value_dim) <= 64 ? 64 : 128;
  const int64_t warp = call.unit == 1 ? 2048 : 16 * (row + 8) * 2;  // bytes of keys that a warp holds
  const int64_t block = call.stages * 4 * 2 * warp + (call.unit == 1 ? 512 : 1536) + 1024;
  return std::min<int64_t>(call.unit == 1 ? 4 : call.unit == 8 ? 3 : 2, kib * 1024 / block);
}

void check_kernel(const AttentionCall& call, const Gpu& gpu, const AttentionSettings& settings) {
  const int group = call.heads / call.kv_heads;
  const bool can = call.type != Type::kFloat32 && gpu.code >= 80 && std::max(call.dim, call.value_dim) <= 128 && settings.stages != 1;
  const bool cores = can && settings.tensor_cores && group >= settings.tensor_cores;
  require(call.unit == (cores ? group <= 8 ? 8 : 16 : can && group == 1 ? 1 : 0), "heads of a unit: " + std::to_string(call.unit));
  if (call.unit == 0) {
    require(call.stages == 0 && call.bulk == 0, "a ring for the kernel that has none");
    return;
  }
  require(call.stages >= 2 && call.stages <= kMostStages, "stages");
  require(call.bulk == (settings.bulk && gpu.code >= 90 && call.unit < 16), "bulk");
  const int64_t held = staged_held(call, gpu);
  require(held >= 1, "a block that does not fit");
  AttentionCall other = call;
  other.stages = call.stages + 1;
  if (settings.stages) {
    require(call.stages == settings.stages || (call.stages < settings.stages && staged_held(other, gpu) == 0), "other stages than asked for");
  } else {
    require(call.stages == kMostStages || staged_held(other, gpu) < held, "fewer stages than fit");
    other.stages = 2;
    require(staged_held(other, gpu) == held, "fewer blocks than two stages leave");
  }
  other.key_stride[2] = int64_t{INT32_MAX} + 1;
  plan_kernel(other, gpu, settings);
  require(other.unit == 0, "a stride of more than 32 bits");
}

void plans() {
  for (int trial = 0; trial < 20000; ++trial) {
    AttentionCall call = some_shape();
    if (between(0, 3) == 0) call.type = Type::kFloat32;
    const Gpu gpu = some_gpu();
    const AttentionSettings settings{static_cast<int>(between(0, 3)), static_cast<int>(between(0, kMostStages)), static_cast<int>(between(0, 1))};
    plan_attention(call, gpu, settings);
    check_kernel(call, gpu, settings);
    const int64_t text = call.capacity - call.visual_capacity, rows = (call.list_width ? call.list_width : call.visual_capacity) + text;
    require(call.max_splits >= 1 && call.max_splits <= kSplitLimit, "splits out of range: " + std::to_string(call.max_splits));
    require(call.max_splits == 1 || static_cast<int64_t>(call.max_splits - 1) * call.min_rows < rows, "a split without rows");
    require(call.logit_capacity >= rows && call.logit_capacity >= 1 && call.logit_capacity < rows + 32, "logit capacity");
    require(call.logit_capacity % 16 == 0, "rows of logits are not aligned");
    int64_t units = 0, units_here = 0;  // counted by walking over the heads of each key/value head
    const int group = call.heads / call.kv_heads;
    for (int first = 0; first < group; first += group_block(group)) ++units;
    for (int first = 0; first < group; first += call.unit ? call.unit : group_block(group)) ++units_here;
    units *= call.kv_heads;
    units_here *= call.kv_heads;
    require(attention_units(call) == units && units_here <= units, "units");
    const int64_t blocks = units_here * call.batch;
    const int64_t held = call.unit ? staged_held(call, gpu) : std::max(call.dim, call.value_dim) > 128 || group > 4 ? 2 : 3;
    const int64_t at_once = held * int64_t{gpu.multiprocessors};
    require(call.max_splits == 1 || call.max_splits * blocks <= at_once, "more blocks than run at once");
    const bool more = (call.max_splits + 1) * blocks <= at_once && call.max_splits < kSplitLimit && int64_t{call.max_splits} * call.min_rows < rows;
    require(!more, "fewer blocks than would run at once");
    const AttentionScratch sizes = attention_scratch(call);
    const int64_t heads = int64_t{call.batch} * call.heads;
    require(sizes.counters == units * call.batch && sizes.head_stat == heads * 2, "scratch of counters and heads");
    require(sizes.part == heads * call.max_splits * call.value_dim && sizes.part_stat == heads * call.max_splits * 4, "scratch of parts");
    require(sizes.logits == (call.write_logits ? heads * call.logit_capacity : 0), "scratch of logits");
    if (heads <= INT32_MAX && blocks <= INT32_MAX) {
      for (auto strides : {call.query_stride + 2, call.key_stride + 3, call.value_stride + 3}) *strides = 1;
      accepts([&] { check_shape(call); }, "a planned call");
    }
  }
}

void plans_of_rows() {
  for (int trial = 0; trial < 20000; ++trial) {
    const int batch = static_cast<int>(between(1, kMostReorderBatch)), tensors = static_cast<int>(between(1, kMostTensors));
    const int64_t size = between(0, 3) ? between(0, 5000) : between(0, int64_t{1} << 50);
    const int movers = compact_movers(batch, tensors, size), blocks = reorder_blocks(batch, size);
    require(movers >= 1 && movers <= 8192 && (movers == 1 || int64_t{movers - 1} * 64 < size), "movers");
    require(movers == 1 || int64_t{movers} * batch * tensors <= 8192, "more movers than the machine has use for");
    require(blocks == 1024 || int64_t{blocks} * (kMostReorderBatch / batch) >= size, "a reorder block works twice");
    require(blocks >= 1 && blocks <= 1024 && (blocks == 1 || int64_t{blocks - 1} * (kMostReorderBatch / batch) < size), "reorder blocks");
  }
}

// ---- spans ----------------------------------------------------------------------------------------------------------------------

void spans() {
  for (int trial = 0; trial < 200000; ++trial) {
    const int64_t item = int64_t{1} << between(0, 3);
    const std::uint64_t address = between(0, 3) ? static_cast<std::uint64_t>(between(1, int64_t{1} << 48)) : engine();
    Axis axes[3];
    __int128 last = 0;
    bool empty = false, negative = false, large = false;
    for (Axis& axis : axes) {
      axis = {between(0, 9) ? between(1, between(0, 1) ? 9 : kMostRows) : 0, any_number()};
      empty |= axis.size == 0;
      negative |= axis.stride < 0;
      if (!empty && !negative) {
        last += static_cast<__int128>(axis.size - 1) * axis.stride;
        large |= last >= static_cast<__int128>(1) << 62;
      }
    }
    const __int128 end = static_cast<__int128>(address) + (last + 1) * item;
    const bool fits = address < kAddressLimit && !large && end < static_cast<__int128>(kAddressLimit);
    Span span{""};
    const std::string words = refusal([&] { span = span_of("tensor", at(address), item, {axes[0], axes[1], axes[2]}); });
    const std::string what = "tensor of item " + std::to_string(item) + " at " + std::to_string(address);
    if (address == 0 || address >= kAddressLimit || address % static_cast<std::uint64_t>(item)) {
      require(!words.empty(), what + " is accepted");
    } else if (words.empty()) {
      require(empty || !negative, what + ": a negative stride is accepted");
      if (empty) {
        require(span.begin == span.end, what + ": an empty tensor has memory");
      } else {
        require(fits, what + " does not fit and is accepted");
        require(span.begin == address && static_cast<__int128>(span.end) == end, what + ": ends elsewhere");
      }
    } else {
      require(negative || !fits || last > static_cast<__int128>(kAddressLimit / 8), what + " is refused: " + words);
    }
  }
  refuses([] { span_of("tensor", nullptr, 4, {{1, 1}}); }, "tensor", "a null address");
  accepts([] { span_of("tensor", nullptr, 4, {{1, 1}}, true); }, "an optional null address");
  refuses([] { span_of("tensor", at(6), 4, {{1, 1}}); }, "multiple of 4", "a misaligned address");
  accepts([] { span_of("tensor", at(7), 1, {{1, 1}}); }, "an odd address of bytes");
}

void memory_apart() {
  for (int trial = 0; trial < 100000; ++trial) {
    const auto some = [](const char* name) {
      const std::uint64_t begin = static_cast<std::uint64_t>(between(1, 60));
      return between(0, 9) ? Span{name, begin, begin + static_cast<std::uint64_t>(between(1, 20))} : Span{name};
    };
    const Span first = some("first"), second = some("second");
    bool common = false;
    for (std::uint64_t byte = first.begin; byte < first.end; ++byte) common |= second.begin <= byte && byte < second.end;
    require(refusal([&] { expect_apart(first, {second}); }).empty() == !common, "expect_apart of two");
    const Span both[] = {first, second};
    require(refusal([&] { expect_apart(both, {}); }).empty() == !common, "expect_apart among the written");
  }
  refuses([] { expect_apart(Span{"kept", 8, 16}, {Span{"score", 15, 20}}); }, "score", "a common byte");
}

// ---- rows -----------------------------------------------------------------------------------------------------------------------

/// First bytes of all rows, in a list.
std::vector<int64_t> starts(const std::array<Axis, 3>& axes) {
  std::vector<int64_t> found{0};
  for (const Axis& axis : axes) {
    std::vector<int64_t> next;
    for (int64_t start : found) {
      for (int64_t i = 0; i < axis.size; ++i) next.push_back(start + i * axis.stride);
    }
    found.swap(next);
  }
  return found;
}

/// The bytes of all rows; false where two rows share one.
bool distinct(const std::array<Axis, 3>& axes, int64_t row, std::set<int64_t>& bytes, int64_t origin = 0) {
  bool all_new = true;
  for (int64_t start : starts(axes)) {
    for (int64_t i = 0; i < row; ++i) all_new &= bytes.insert(origin + start + i).second;
  }
  return all_new;
}

/// Axes of a slice of a contiguous tensor whose dimensions lie in any order.
std::array<Axis, 3> sliced(int64_t row, int64_t* end = nullptr) {
  int order[3] = {0, 1, 2};
  std::shuffle(order, order + 3, engine);
  std::array<Axis, 3> axes;
  int64_t stride = row + between(0, 3);
  for (int place : order) {
    axes[place] = {between(1, 4), stride};
    stride *= axes[place].size + between(0, 2);
  }
  if (end) *end = stride;
  return axes;
}

void rows_apart() {
  int refused = 0;
  for (int trial = 0; trial < 30000; ++trial) {
    const int64_t row = between(1, 4);
    const bool ordinary = trial % 2;
    std::array<Axis, 3> axes = sliced(row);
    if (!ordinary) {
      for (Axis& axis : axes) axis = {between(1, 4), between(0, 24)};
    }
    std::set<int64_t> bytes;
    const bool holds = distinct(axes, row, bytes);
    const bool accepted = refusal([&] { expect_distinct_rows("rows", row, {axes[0], axes[1], axes[2]}); }).empty();
    require(!accepted || holds, "rows that share bytes are accepted");
    require(accepted || !ordinary, "a slice of a tensor is refused");
    refused += !holds;
  }
  require(refused > 1000, "too few bad cases");
}

MovingRows moving(int64_t sequences, const std::vector<std::pair<std::uint64_t, std::array<Axis, 3>>>& tensors, int64_t row) {
  MovingRows all;
  all.sequences = sequences;
  for (const auto& [address, axes] : tensors) {
    const int i = all.tensors++;
    all.rows[i] = {address, axes[0].stride, axes[1].stride, axes[2].stride, axes[1].size, row};
    all.capacity[i] = axes[2].size;
  }
  return all;
}

void tensors_apart() {
  int interleaved = 0, common = 0;
  for (int trial = 0; trial < 30000; ++trial) {
    const int64_t row = between(1, 4), kind = between(0, 2);
    std::array<Axis, 3> first = sliced(row), second = first;
    if (kind == 0) {  // another slice with as many sequences
      second = sliced(row);
      second[0].size = first[0].size;
      if (second[0].stride == 0) continue;
    }
    const std::uint64_t a = 1000 + static_cast<std::uint64_t>(between(0, 60)), b = 1000 + static_cast<std::uint64_t>(between(0, 60));
    MovingRows all = moving(first[0].size, {{a, first}, {b, second}}, row);
    std::set<int64_t> bytes;
    if (!distinct(first, row, bytes, static_cast<int64_t>(a))) continue;
    std::set<int64_t> alone;
    if (!distinct(second, row, alone)) continue;
    const bool holds = distinct(second, row, bytes, static_cast<int64_t>(b));
    const bool accepted = refusal([&] { check(all, 1); }).empty();
    require(!accepted || holds, "tensors that share bytes are accepted");
    common += !holds;
    interleaved += accepted && all.span[0].overlaps(all.span[1]);
  }
  require(interleaved > 300 && common > 3000, "too few cases of a kind: " + std::to_string(interleaved) + ", " + std::to_string(common));
  // keys and values in one buffer, [batch, 2, heads, rows, dim] and [batch, heads, rows, 2, dim]
  const std::array<Axis, 3> by_half{{{3, 2 * 4 * 5 * 16}, {4, 5 * 16}, {5, 16}}}, by_row{{{3, 4 * 5 * 32}, {4, 5 * 32}, {5, 32}}};
  for (std::uint64_t order : {0, 1}) {
    MovingRows halves = moving(3, {{64 + order * 320, by_half}, {64 + (1 - order) * 320, by_half}}, 16);
    accepts([&] { check(halves, 16); }, "keys and values in halves of a sequence");
    MovingRows pairs = moving(3, {{64 + order * 16, by_row}, {64 + (1 - order) * 16, by_row}}, 16);
    accepts([&] { check(pairs, 16); }, "keys and values side by side");
  }
  MovingRows twice = moving(3, {{64, by_row}, {64, by_row}}, 16);
  refuses([&] { check(twice, 16); }, "rows", "one tensor twice");
  MovingRows shifted = moving(3, {{64, by_row}, {64 + 8, by_row}}, 16);
  refuses([&] { check(shifted, 8); }, "rows", "tensors half a row apart");
}

void words() {
  for (int trial = 0; trial < 20000; ++trial) {
    Rows rows[3];
    const int count = static_cast<int>(between(1, 3));
    const auto number = [] { return between(1, 40) << between(0, 6); };
    int want = 16;
    for (int i = 0; i < count; ++i) {
      rows[i] = {static_cast<std::uint64_t>(number()), number(), number(), number(), number(), number()};
      for (int64_t part : {static_cast<int64_t>(rows[i].address), rows[i].sequence_stride, rows[i].head_stride, rows[i].row_stride, rows[i].row_bytes}) {
        while (part % want) want /= 2;
      }
    }
    require(word_of(rows, count) == want, "word of " + std::to_string(want));
  }
}

// ---- calls ----------------------------------------------------------------------------------------------------------------------

/// A valid call over memory that does not exist: checks never read it.
AttentionCall valid_attention() {
  AttentionCall call{};
  call.type = Type::kFloat16;
  call.batch = 2, call.heads = 8, call.kv_heads = 4, call.dim = 64, call.value_dim = 32, call.capacity = 100, call.visual_capacity = 60;
  call.list_width = 40, call.window = 9, call.scale = 0.125f, call.write_logits = 1;
  plan_attention(call, Gpu{132, 90, 90}, AttentionSettings{2, 0, 0});
  const int64_t query[] = {8 * 64, 64, 1}, key[] = {4 * 100 * 64, 100 * 64, 64, 1}, value[] = {4 * 100 * 32, 100 * 32, 32, 1};
  std::memcpy(call.query_stride, query, sizeof query);
  std::memcpy(call.key_stride, key, sizeof key);
  std::memcpy(call.value_stride, value, sizeof value);
  call.new_key_stride[0] = 256, call.new_key_stride[1] = 64, call.new_value_stride[0] = 128, call.new_value_stride[1] = 32;
  call.kept_stride = 40, call.text_type_stride = 40, call.position_stride = 100, call.query_position_stride = 1;
  std::uint64_t next = 1 << 20;
  const auto place = [&next](auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<std::uintptr_t>(next));
    next += 1 << 20;
  };
  place(call.query), place(call.key), place(call.value), place(call.output), place(call.n_visual), place(call.n_text), place(call.kept);
  place(call.n_kept), place(call.text_type), place(call.position), place(call.query_position), place(call.new_key), place(call.new_value);
  place(call.part), place(call.part_stat), place(call.head_stat), place(call.logits), place(call.counters), place(call.mass);
  return call;
}

template <class Call, class Pointer>
void misplaced(const Call& valid, Pointer Call::* member, const char* name, int item, bool optional) {
  const auto address = reinterpret_cast<std::uintptr_t>(valid.*member);
  const auto with = [&](std::uintptr_t changed) {
    Call call = valid;
    call.*member = reinterpret_cast<Pointer>(changed);
    check_addresses(call);
  };
  if (!optional) refuses([&] { with(0); }, name, std::string("null ") + name);
  if (item > 1) refuses([&] { with(address + 1); }, name, std::string("misaligned ") + name);
  refuses([&] { with(std::uintptr_t{1} << 63); }, name, std::string("far away ") + name);
  refuses([&] { with((std::uintptr_t{1} << 62) - 8); }, name, std::string("ending outside ") + name);
}

void attention_calls() {
  const AttentionCall valid = valid_attention();
  accepts([&] { check_shape(valid), check_addresses(valid); }, "the valid attention call");
  misplaced(valid, &AttentionCall::query, "query", 2, false);
  misplaced(valid, &AttentionCall::key, "key", 2, false);
  misplaced(valid, &AttentionCall::value, "value", 2, false);
  misplaced(valid, &AttentionCall::output, "output", 2, true);
  misplaced(valid, &AttentionCall::n_visual, "n_visual", 4, false);
  misplaced(valid, &AttentionCall::n_text, "n_text", 4, false);
  misplaced(valid, &AttentionCall::kept, "kept", 4, false);
  misplaced(valid, &AttentionCall::n_kept, "n_kept", 4, false);
  misplaced(valid, &AttentionCall::text_type, "text_type", 1, false);
  misplaced(valid, &AttentionCall::position, "position", 4, false);
  misplaced(valid, &AttentionCall::query_position, "query_position", 4, false);
  misplaced(valid, &AttentionCall::new_key, "new_key", 2, false);
  misplaced(valid, &AttentionCall::new_value, "new_value", 2, false);
  misplaced(valid, &AttentionCall::part, "part", 4, false);
  misplaced(valid, &AttentionCall::part_stat, "part_stat", 4, false);
  misplaced(valid, &AttentionCall::head_stat, "head_stat", 4, false);
  misplaced(valid, &AttentionCall::logits, "logits", 4, false);
  misplaced(valid, &AttentionCall::counters, "counters", 4, false);
  misplaced(valid, &AttentionCall::mass, "mass", 4, true);

  // what is written must lie apart from everything else
  const auto moved = [&](auto member, const void* target, const char* name) {
    AttentionCall call = valid;
    call.*member = reinterpret_cast<std::remove_reference_t<decltype(call.*member)>>(const_cast<void*>(target));
    refuses([&] { check_addresses(call); }, "memory apart from", name);
  };
  moved(&AttentionCall::output, valid.query, "output in query");
  moved(&AttentionCall::part, valid.key, "part in key");
  moved(&AttentionCall::mass, valid.logits, "mass in logits");
  moved(&AttentionCall::counters, valid.n_text, "counters in n_text");
  moved(&AttentionCall::head_stat, valid.part_stat, "head_stat in part_stat");
  moved(&AttentionCall::new_key, valid.key, "new_key in key");
  moved(&AttentionCall::new_value, valid.value, "new_value in value");
  moved(&AttentionCall::position, valid.value, "position in value that is written");
  {
    AttentionCall call = valid;
    call.new_key = call.new_value = nullptr;
    call.value = call.key;
    accepts([&] { check_addresses(call); }, "keys that are values too, where nothing is appended");
    call.key_stride[0] = 0;
    accepts([&] { check_addresses(call); }, "keys that all sequences share");
    call = valid;
    call.key_stride[0] = 0;
    refuses([&] { check_addresses(call); }, "key_stride", "appending to keys that all sequences share");
    call = valid;
    call.value_stride[2] = 31;
    refuses([&] { check_addresses(call); }, "value_stride", "appending to rows that overlap");
    call = valid;
    call.n_kept = nullptr;
    refuses([&] { check_addresses(call); }, "n_kept", "a list without lengths");
    call = valid;
    call.write_logits = 0;
    refuses([&] { check_addresses(call); }, "mass", "mass without logits");
    call = valid;
    call.list_width = 0;
    refuses([&] { check_addresses(call); }, "kept", "a list of no columns");
  }

  const auto shaped = [&](auto change, const char* name) {
    AttentionCall call = valid;
    change(call);
    refuses([&] { check_shape(call); }, name, name);
  };
  shaped([](AttentionCall& c) { c.type = static_cast<Type>(3); }, "type");
  shaped([](AttentionCall& c) { c.type = static_cast<Type>(-1); }, "type");
  shaped([](AttentionCall& c) { c.batch = 0; }, "batch");
  shaped([](AttentionCall& c) { c.batch = kGridLimit + 1; }, "batch");
  shaped([](AttentionCall& c) { c.heads = 7; }, "kv_heads");
  shaped([](AttentionCall& c) { c.kv_heads = 16; }, "kv_heads");
  shaped([](AttentionCall& c) { c.batch = 60000, c.heads = c.kv_heads = 60000; }, "batch * heads");
  shaped([](AttentionCall& c) { c.dim = kMostDim + 1; }, "dim");
  shaped([](AttentionCall& c) { c.value_dim = 0; }, "value_dim");
  shaped([](AttentionCall& c) { c.capacity = -1; }, "capacity");
  shaped([](AttentionCall& c) { c.visual_capacity = c.capacity + 1; }, "visual_capacity");
  shaped([](AttentionCall& c) { c.list_width = -1; }, "list_width");
  shaped([](AttentionCall& c) { c.window = -1; }, "window");
  shaped([](AttentionCall& c) { c.write_logits = 2; }, "write_logits");
  shaped([](AttentionCall& c) { c.scale = std::nanf(""); }, "scale");
  shaped([](AttentionCall& c) { c.max_splits = kSplitLimit + 1; }, "max_splits");
  shaped([](AttentionCall& c) { c.min_rows = 0; }, "min_rows");
  shaped([](AttentionCall& c) { c.logit_capacity = 79; }, "logit_capacity");
  shaped([](AttentionCall& c) { c.query_stride[2] = 2; }, "query_stride");
  shaped([](AttentionCall& c) { c.key_stride[3] = 0; }, "key_stride");
  shaped([](AttentionCall& c) { c.value_stride[3] = 64; }, "value_stride");
}

void other_calls() {
  DecideCall decide{};
  decide.batch = 2, decide.heads = 4, decide.visual_capacity = 60, decide.logit_capacity = 64, decide.decide = 1, decide.classes = 9;
  decide.weight_type = decide.bias_type = decide.score_type = Type::kFloat32;
  decide.weight_stride[0] = 16, decide.weight_stride[1] = 1, decide.bias_stride[1] = 1;
  std::uint64_t next = 1 << 20;
  const auto place = [&next](auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<std::uintptr_t>(next));
    next += 1 << 20;
  };
  place(decide.n_visual), place(decide.head_stat), place(decide.logits), place(decide.mass), place(decide.importance), place(decide.weight);
  place(decide.bias), place(decide.rates), place(decide.kept), place(decide.n_kept), place(decide.rate), place(decide.counters);
  accepts([&] { check_shape(decide), check_addresses(decide); }, "the valid decide call");
  misplaced(decide, &DecideCall::mass, "mass", 4, false);
  misplaced(decide, &DecideCall::weight, "weight", 4, false);
  misplaced(decide, &DecideCall::rates, "rates", 8, false);
  misplaced(decide, &DecideCall::kept, "kept", 4, false);
  misplaced(decide, &DecideCall::rate, "rate", 8, false);
  misplaced(decide, &DecideCall::counters, "counters", 4, false);
  {
    DecideCall call = decide;
    call.classes = 0;
    refuses([&] { check_addresses(call); }, "count", "neither predictor nor count");
    call = decide;
    call.kept_in = call.n_kept_in = decide.n_visual;
    refuses([&] { check_addresses(call); }, "kept_in", "a list of no columns");
    call = decide;
    call.kept = const_cast<std::int32_t*>(decide.n_visual);
    refuses([&] { check_addresses(call); }, "n_visual", "kept in n_visual");
    call = decide;
    call.logit_capacity = 59;
    refuses([&] { check_shape(call); }, "logit_capacity", "fewer logits than tokens");
    call = decide;
    call.classes = -1;
    refuses([&] { check_shape(call); }, "classes", "a negative number of classes");
    call = decide;
    call.decide = 0;
    call.kept = call.n_kept = nullptr;
    call.rate = nullptr, call.counters = nullptr, call.mass = nullptr, call.weight = call.bias = nullptr, call.rates = nullptr;
    accepts([&] { check_addresses(call); }, "importance alone");
  }
  SelectCall select{};
  select.batch = 2, select.tokens = 30, select.score_type = Type::kFloat64, select.score_stride[0] = 30, select.score_stride[1] = 1;
  place(select.score), place(select.count), place(select.n_visual), place(select.kept), place(select.n_kept);
  accepts([&] { check_shape(select), check_addresses(select); }, "the valid select call");
  misplaced(select, &SelectCall::score, "score", 8, false);
  misplaced(select, &SelectCall::count, "count", 4, false);
  misplaced(select, &SelectCall::kept, "kept", 4, false);
  select.n_kept = select.kept + 3;
  refuses([&] { check_addresses(select); }, "kept", "n_kept in kept");
  PredictCall predict{};
  predict.batch = 2, predict.features = 16, predict.classes = 9, predict.weight_stride[0] = 16, predict.weight_stride[1] = 1;
  predict.bias_stride[1] = 1, predict.mass_type = predict.weight_type = predict.bias_type = Type::kBFloat16;
  place(predict.mass), place(predict.weight), place(predict.bias), place(predict.rates), place(predict.rate), place(predict.index);
  accepts([&] { check_shape(predict), check_addresses(predict); }, "the valid predict call");
  misplaced(predict, &PredictCall::mass, "mass", 2, false);
  misplaced(predict, &PredictCall::index, "index", 8, false);
  predict.features = 0;
  refuses([&] { check_shape(predict); }, "features", "no features");
}

/// Whatever comes, checks end in acceptance or in a refusal with words, never in undefined behaviour; what they accept, they must plan.
void anything() {
  int accepted = 0;
  for (int trial = 0; trial < 300000; ++trial) {
    AttentionCall call = valid_attention();
    int* const numbers[] = {&call.batch, &call.heads, &call.kv_heads, &call.dim, &call.value_dim, &call.capacity, &call.visual_capacity,
                            &call.list_width, &call.logit_capacity, &call.max_splits, &call.min_rows, &call.window, &call.write_logits};
    int64_t* const strides[] = {&call.query_stride[0], &call.query_stride[1], &call.key_stride[0], &call.key_stride[1], &call.key_stride[2],
                                &call.value_stride[0], &call.value_stride[1], &call.value_stride[2], &call.new_key_stride[0],
                                &call.new_value_stride[1], &call.kept_stride, &call.text_type_stride, &call.position_stride};
    const void** const pointers[] = {&call.query, const_cast<const void**>(&call.key), const_cast<const void**>(&call.value), &call.new_key};
    for (int64_t changes = between(1, 3); changes > 0; --changes) {
      switch (between(0, 3)) {
        case 0: *numbers[between(0, static_cast<int64_t>(std::size(numbers)) - 1)] = static_cast<int>(any_number()); break;
        case 1: *strides[between(0, static_cast<int64_t>(std::size(strides)) - 1)] = any_number(); break;
        case 2: *pointers[between(0, 3)] = at(static_cast<std::uint64_t>(any_number())); break;
        default: call.type = static_cast<Type>(any_number());
      }
    }
    const std::string words = refusal([&] { check_shape(call), check_addresses(call); });
    accepted += words.empty();
    require(words.empty() || words.find(": expected ") != std::string::npos, words);
  }
  require(accepted > 3000, "too few accepted");
  for (int trial = 0; trial < 100000; ++trial) {
    MovingRows all;
    all.sequences = any_number();
    all.tensors = static_cast<int>(between(1, 4));
    for (int i = 0; i < all.tensors; ++i) {
      all.rows[i] = {static_cast<std::uint64_t>(any_number()), any_number(), any_number(), any_number(), any_number(), any_number()};
      all.capacity[i] = any_number();
    }
    const int word = word_of(all.rows, all.tensors);
    const std::string words = refusal([&] { check(all, word); });
    require(words.empty() || words.find(": expected ") != std::string::npos, words);
  }
}

}  // namespace

int main() {
  const std::pair<const char*, void (*)()> tests[] = {
      {"plans", plans},     {"plans of rows", plans_of_rows}, {"spans", spans}, {"memory apart", memory_apart},
      {"rows apart", rows_apart}, {"tensors apart", tensors_apart}, {"words", words}, {"attention calls", attention_calls},
      {"other calls", other_calls}, {"anything", anything},
  };
  int failed = 0;
  for (const auto& [name, test] : tests) {
    try {
      test();
      std::printf("%s: right\n", name);
    } catch (const Failure& failure) {
      std::printf("%s: %s\n", name, failure.words.c_str());
      ++failed;
    }
  }
  return failed;
}
