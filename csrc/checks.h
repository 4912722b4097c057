// What can be known of a call on the host, checked before it reaches a launcher: sizes, strides, extents, alignment, overlap.
// std::invalid_argument names the argument, what was expected and what came. Pure host code, tested on its own.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "calls.h"
#include "plan.h"

namespace dyrate {

constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // so that sums of rows stay below 2 ** 31
constexpr int kGridLimit = 65535;                          // blocks along y and z
constexpr std::uint64_t kAddressLimit = std::uint64_t{1} << 62;

/// Words and a number of a message, put together only where a check fails: a launch makes a hundred of them.
struct Said {
  const char* before;
  std::int64_t number = 0;
  const char* after = nullptr;  // null: no number
  Said(const char* words) : before(words) {}
  Said(const char* words, std::int64_t value, const char* rest = "") : before(words), number(value), after(rest) {}
  template <class Integer, class = std::enable_if_t<std::is_integral<Integer>::value>>
  Said(Integer value) : before(""), number(static_cast<std::int64_t>(value)), after("") {}
  std::string text() const { return after ? before + std::to_string(number) + after : before; }
};

[[noreturn]] inline void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

inline void expect(bool holds, const char* name, const Said& expected, const Said& got) {
  if (!holds) refuse(name, expected.text(), got.text());
}

inline void expect_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) refuse(name, std::to_string(low) + " .. " + std::to_string(high), std::to_string(value));
}

inline int type_size(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

inline void expect_type(const char* name, Type type, Type last) {
  expect_range(name, static_cast<int>(type), 0, static_cast<int>(last));
}

/// The memory between a tensor's first and last byte.
struct Span {
  const char* name;
  std::uint64_t begin = 0, end = 0;  // equal: nothing
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

struct Axis {
  std::int64_t size, stride;  // stride in elements
};

/// The span of a tensor; an address of 0 is accepted where it may be null.
inline Span span_of(const char* name, const void* pointer, std::int64_t item, std::initializer_list<Axis> axes, bool may_be_null = false) {
  const std::uint64_t address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address == 0) {
    expect(may_be_null, name, "the address of a tensor", "0");
    return {name};
  }
  expect(address < kAddressLimit, name, "an address", address);
  const std::int64_t alignment = item == 1 ? 1 : item;
  expect(address % static_cast<std::uint64_t>(alignment) == 0, name, {"an address that is a multiple of ", alignment}, address);
  std::uint64_t last = 0;  // element
  for (const Axis& axis : axes) {
    if (axis.size == 0) return {name};
    expect(axis.stride >= 0, name, "strides that are not negative", axis.stride);
    std::uint64_t reach = 0;
    const bool over = __builtin_mul_overflow(static_cast<std::uint64_t>(axis.size - 1), static_cast<std::uint64_t>(axis.stride), &reach) ||
                      __builtin_add_overflow(last, reach, &last) || last > kAddressLimit / 8;
    expect(!over, name, "a tensor that fits the address space", {"a stride of ", axis.stride});
  }
  const std::uint64_t end = address + (last + 1) * static_cast<std::uint64_t>(item);
  expect(end < kAddressLimit, name, "a tensor that ends inside the address space", end);
  return {name, address, end};
}

/// A tensor that is written: nothing else may lie in it.
inline void expect_apart(const Span& written, std::initializer_list<Span> others) {
  for (const Span& other : others) {
    if (written.overlaps(other)) refuse(written.name, std::string("memory apart from ") + other.name, "memory that both use");
  }
}

/// Tensors that are written: nothing else may lie in them, nor one in another.
template <std::size_t kCount>
void expect_apart(const Span (&written)[kCount], std::initializer_list<Span> others) {
  for (std::size_t i = 0; i < kCount; ++i) {
    expect_apart(written[i], others);
    for (std::size_t j = 0; j < i; ++j) expect_apart(written[i], {written[j]});
  }
}

/// Axes from the widest stride to the narrowest, those of one element left out.
template <std::size_t kCount>
struct Nest {
  Axis axis[kCount];
  std::size_t count = 0;
  explicit Nest(const Axis (&given)[kCount]) {
    for (const Axis& one : given) {
      if (one.size > 1) axis[count++] = one;
    }
    std::sort(axis, axis + count, [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
  }
  /// What the axes from `first` inward reach over, `row` elements each.
  std::int64_t extent(std::size_t first, std::int64_t row) const {
    for (std::size_t i = first; i < count; ++i) row += (axis[i].size - 1) * axis[i].stride;
    return row;
  }
};

/// Rows of a tensor that is written must not lie in each other: each stride steps over all that lies within.
template <std::size_t kCount>
void expect_distinct_rows(const char* name, std::int64_t row, const Axis (&axes)[kCount]) {
  const Nest<kCount> nest(axes);
  for (std::size_t i = 0; i < nest.count; ++i) {
    const std::int64_t inner = nest.extent(i + 1, row);
    expect(nest.axis[i].stride >= inner, name, {"strides that step over the ", inner, " elements within"}, nest.axis[i].stride);
  }
}

inline void check_shape(const AttentionCall& call) {
  expect_type("type", call.type, Type::kFloat32);
  expect_range("batch", call.batch, 1, kGridLimit);
  expect_range("heads", call.heads, 1, kGridLimit);
  expect_range("batch * heads", std::int64_t{call.batch} * call.heads, 1, INT32_MAX);
  expect_range("kv_heads", call.kv_heads, 1, call.heads);
  expect(call.heads % call.kv_heads == 0, "kv_heads", {"a divisor of the ", call.heads, " heads"}, call.kv_heads);
  expect_range("dim", call.dim, 1, kMostDim);
  expect_range("value_dim", call.value_dim, 1, kMostDim);
  expect_range("capacity", call.capacity, 0, kMostRows);
  expect_range("visual_capacity", call.visual_capacity, 0, call.capacity);
  expect_range("list_width", call.list_width, 0, kMostRows);
  expect_range("window", call.window, 0, INT32_MAX);
  expect_range("write_logits", call.write_logits, 0, 1);
  expect(call.scale == call.scale, "scale", "a number", "NaN");
  expect_range("max_splits", call.max_splits, 1, kSplitLimit);
  expect_range("min_rows", call.min_rows, 1, kMostRows);
  expect_range("logit_capacity", call.logit_capacity, readable_rows(call), INT32_MAX);
  for (const std::int64_t* strides : {call.query_stride, call.key_stride, call.value_stride}) {
    const int last = strides == call.query_stride ? 2 : 3;
    const int columns = strides == call.value_stride ? call.value_dim : call.dim;
    expect(columns == 1 || strides[last] == 1, strides == call.query_stride ? "query_stride" : strides == call.key_stride ? "key_stride" : "value_stride",
           "a last stride of 1", strides[last]);
  }
}

inline void check_addresses(const AttentionCall& call) {
  const std::int64_t item = type_size(call.type), b = call.batch, heads = call.heads;
  const std::int64_t text = call.capacity - call.visual_capacity;
  const Span query = span_of("query", call.query, item, {{b, call.query_stride[0]}, {heads, call.query_stride[1]}, {call.dim, 1}});
  const Span key = span_of("key", call.key, item, {{b, call.key_stride[0]}, {call.kv_heads, call.key_stride[1]}, {call.capacity, call.key_stride[2]}, {call.dim, 1}}, call.capacity == 0);
  const bool no_value = call.output == nullptr;
  const Span value = span_of("value", call.value, item, {{b, call.value_stride[0]}, {call.kv_heads, call.value_stride[1]}, {call.capacity, call.value_stride[2]}, {call.value_dim, 1}}, no_value || call.capacity == 0);
  const Span n_visual = span_of("n_visual", call.n_visual, 4, {{b, 1}});
  const Span n_text = span_of("n_text", call.n_text, 4, {{b, 1}});
  const bool listed = call.list_width > 0;
  const Span kept = span_of("kept", call.kept, 4, {{b, call.kept_stride}, {call.list_width, 1}}, !listed);
  const Span n_kept = span_of("n_kept", call.n_kept, 4, {{b, 1}}, !listed);
  expect(listed || (call.kept == nullptr && call.n_kept == nullptr), "kept", "0, as list_width is 0", "an address");
  const Span text_type = span_of("text_type", call.text_type, 1, {{b, call.text_type_stride}, {text, 1}}, call.mass == nullptr || text == 0);
  const Span position = span_of("position", call.position, 4, {{b, call.position_stride}, {call.capacity, 1}}, call.window == 0 || call.capacity == 0);
  const Span query_position = span_of("query_position", call.query_position, 4, {{b, call.query_position_stride}}, call.window == 0);
  expect((call.new_key == nullptr) == (call.new_value == nullptr), "new_key, new_value", "both or neither", "one");
  const Span new_key = span_of("new_key", call.new_key, item, {{b, call.new_key_stride[0]}, {call.kv_heads, call.new_key_stride[1]}, {call.dim, 1}}, true);
  const Span new_value = span_of("new_value", call.new_value, item, {{b, call.new_value_stride[0]}, {call.kv_heads, call.new_value_stride[1]}, {call.value_dim, 1}}, true);
  if (call.new_key) {
    expect(call.value != nullptr, "value", "the address of a tensor beside new_value", "0");
    expect_distinct_rows("key_stride", call.dim, {{b, call.key_stride[0]}, {call.kv_heads, call.key_stride[1]}, {call.capacity, call.key_stride[2]}});
    expect_distinct_rows("value_stride", call.value_dim, {{b, call.value_stride[0]}, {call.kv_heads, call.value_stride[1]}, {call.capacity, call.value_stride[2]}});
    for (const Span& written : {key, value}) {
      expect_apart(written, {query, n_visual, n_text, kept, n_kept, text_type, position, query_position, new_key, new_value});
    }
  }
  expect(call.mass == nullptr || call.write_logits, "mass", "0, as write_logits is 0", "an address");
  const AttentionScratch sizes = attention_scratch(call);
  const Span written[] = {
      span_of("output", call.output, item, {{b * heads * call.value_dim, 1}}, true),
      span_of("part", call.part, 4, {{sizes.part, 1}}, no_value),
      span_of("part_stat", call.part_stat, 4, {{sizes.part_stat, 1}}),
      span_of("head_stat", call.head_stat, 4, {{sizes.head_stat, 1}}, !call.write_logits),
      span_of("logits", call.logits, 4, {{sizes.logits, 1}}, !call.write_logits),
      span_of("counters", call.counters, 4, {{sizes.counters, 1}}),
      span_of("mass", call.mass, 4, {{b * heads * kTypes, 1}}, true),
  };
  expect_apart(written, {query, key, value, n_visual, n_text, kept, n_kept, text_type, position, query_position, new_key, new_value});
}

inline void check_shape(const DecideCall& call) {
  expect_range("batch", call.batch, 1, kGridLimit);
  expect_range("heads", call.heads, 1, kGridLimit);
  expect_range("batch * heads", std::int64_t{call.batch} * call.heads, 1, INT32_MAX);
  expect_range("visual_capacity", call.visual_capacity, 0, kMostRows);
  expect_range("list_width", call.list_width, 0, kMostRows);
  expect_range("logit_capacity", call.logit_capacity, call.list_width > 0 ? call.list_width : call.visual_capacity, INT32_MAX);
  expect_range("decide", call.decide, 0, 1);
  expect_range("classes", call.classes, 0, kMostRows);
  expect_type("weight_type", call.weight_type, Type::kFloat64);
  expect_type("bias_type", call.bias_type, Type::kFloat64);
  expect_type("score_type", call.score_type, Type::kFloat64);
}

inline void check_addresses(const DecideCall& call) {
  const std::int64_t b = call.batch, heads = call.heads, n = call.visual_capacity;
  const bool listed = call.list_width > 0, none = !call.decide;
  const Span n_visual = span_of("n_visual", call.n_visual, 4, {{b, 1}});
  const Span kept_in = span_of("kept_in", call.kept_in, 4, {{b, call.kept_in_stride}, {call.list_width, 1}}, !listed);
  const Span n_kept_in = span_of("n_kept_in", call.n_kept_in, 4, {{b, 1}}, !listed);
  expect(listed || (call.kept_in == nullptr && call.n_kept_in == nullptr), "kept_in", "0, as list_width is 0", "an address");
  const Span head_stat = span_of("head_stat", call.head_stat, 4, {{b * heads * 2, 1}});
  const Span logits = span_of("logits", call.logits, 4, {{b * heads * call.logit_capacity, 1}});
  const Span mass = span_of("mass", call.mass, 4, {{b * heads * kTypes, 1}}, none || call.classes == 0);
  const bool guess = none || call.classes == 0;
  const Span weight = span_of("weight", call.weight, type_size(call.weight_type), {{call.classes, call.weight_stride[0]}, {heads * kTypes, call.weight_stride[1]}}, guess);
  const Span bias = span_of("bias", call.bias, type_size(call.bias_type), {{b, call.bias_stride[0]}, {call.classes, call.bias_stride[1]}}, guess);
  const Span rates = span_of("rates", call.rates, 8, {{call.classes, 1}}, guess);
  const Span count = span_of("count", call.count, 4, {{b, 1}}, none || call.classes > 0);
  const Span max_kept = span_of("max_kept", call.max_kept, 4, {{b, 1}}, true);
  const Span score = span_of("score", call.score, type_size(call.score_type), {{b, call.score_stride[0]}, {n, call.score_stride[1]}}, true);
  const Span alive = span_of("alive", call.alive, 1, {{b, call.alive_stride[0]}, {n, call.alive_stride[1]}}, true);
  const Span written[] = {
      span_of("importance", call.importance, 4, {{b * n, 1}}, n == 0),
      span_of("kept", call.kept, 4, {{b * n, 1}}, none || n == 0),
      span_of("n_kept", call.n_kept, 4, {{b, 1}}, none),
      span_of("rate", call.rate, 8, {{b, 1}}, none),
      span_of("counters", call.counters, 4, {{b, 1}}, none),
  };
  expect_apart(written, {n_visual, kept_in, n_kept_in, head_stat, logits, mass, weight, bias, rates, count, max_kept, score, alive});
}

inline void check_shape(const SelectCall& call) {
  expect_range("batch", call.batch, 1, INT32_MAX);
  expect_range("tokens", call.tokens, 1, kMostRows);
  expect_type("score_type", call.score_type, Type::kFloat64);
}

inline void check_addresses(const SelectCall& call) {
  const std::int64_t b = call.batch, n = call.tokens;
  const Span score = span_of("score", call.score, type_size(call.score_type), {{b, call.score_stride[0]}, {n, call.score_stride[1]}});
  const Span alive = span_of("alive", call.alive, 1, {{b, call.alive_stride[0]}, {n, call.alive_stride[1]}}, true);
  const Span count = span_of("count", call.count, 4, {{b, 1}}), n_visual = span_of("n_visual", call.n_visual, 4, {{b, 1}});
  const Span kept = span_of("kept", call.kept, 4, {{b * n, 1}}), n_kept = span_of("n_kept", call.n_kept, 4, {{b, 1}});
  const Span written[] = {kept, n_kept};
  expect_apart(written, {score, alive, count, n_visual});
}

inline void check_shape(const PredictCall& call) {
  expect_range("batch", call.batch, 1, INT32_MAX);
  expect_range("features", call.features, 1, kMostRows);
  expect_range("classes", call.classes, 1, kMostRows);
  expect_type("mass_type", call.mass_type, Type::kFloat64);
  expect_type("weight_type", call.weight_type, Type::kFloat64);
  expect_type("bias_type", call.bias_type, Type::kFloat64);
}

inline void check_addresses(const PredictCall& call) {
  const std::int64_t b = call.batch, features = call.features, classes = call.classes;
  const Span mass = span_of("mass", call.mass, type_size(call.mass_type), {{b, features}, {features, 1}});
  const Span weight = span_of("weight", call.weight, type_size(call.weight_type), {{classes, call.weight_stride[0]}, {features, call.weight_stride[1]}});
  const Span bias = span_of("bias", call.bias, type_size(call.bias_type), {{b, call.bias_stride[0]}, {classes, call.bias_stride[1]}});
  const Span rates = span_of("rates", call.rates, 8, {{classes, 1}});
  const Span rate = span_of("rate", call.rate, 8, {{b, 1}}), index = span_of("index", call.index, 8, {{b, 1}});
  const Span written[] = {rate, index};
  expect_apart(written, {mass, weight, bias, rates});
}

/// Tensors whose rows move, with what only the host needs to know.
struct MovingRows {
  int tensors = 0;
  std::int64_t sequences = 0;
  Rows rows[kMostTensors];
  std::int64_t capacity[kMostTensors];  // rows of each sequence and head
  Span span[kMostTensors];

  std::array<Axis, 3> axes(int tensor) const {
    const Rows& its = rows[tensor];
    return {{{sequences, its.sequence_stride}, {its.heads, its.head_stride}, {capacity[tensor], its.row_stride}}};
  }
};

/// No byte of a tensor is one of the other. Tensors may be interleaved (keys and values of one buffer): seen modulo what all outer strides
/// are multiples of, the two take different places.
inline bool apart(const MovingRows& all, int first, int second) {
  if (!all.span[first].overlaps(all.span[second])) return true;
  if (all.rows[first].address > all.rows[second].address) std::swap(first, second);
  const std::array<Axis, 3> a = all.axes(first), b = all.axes(second);
  const Nest<3> outer({a[0], a[1], a[2]}), other({b[0], b[1], b[2]});
  const std::uint64_t distance = all.rows[second].address - all.rows[first].address;
  for (std::size_t level = 1; level <= 3; ++level) {
    std::int64_t step = 0;
    for (std::size_t i = 0; i < level && i < outer.count; ++i) step = std::gcd(step, outer.axis[i].stride);
    for (std::size_t i = 0; i < level && i < other.count; ++i) step = std::gcd(step, other.axis[i].stride);
    if (step == 0) return false;
    const std::int64_t place = static_cast<std::int64_t>(distance % static_cast<std::uint64_t>(step));
    if (place >= outer.extent(level, all.rows[first].row_bytes) && place + other.extent(level, all.rows[second].row_bytes) <= step) return true;
  }
  return false;
}

/// Checks the tensors and fills in their spans. \param word  that the kernel moves, bytes
inline void check(MovingRows& all, int word) {
  expect_range("rows", all.tensors, 1, kMostTensors);
  expect_range("batch", all.sequences, 1, kGridLimit);
  for (int i = 0; i < all.tensors; ++i) {
    const Rows& rows = all.rows[i];
    expect_range("rows: heads", rows.heads, 1, INT32_MAX);
    expect_range("rows: bytes of a row", rows.row_bytes, 1, std::int64_t{1} << 50);
    expect_range("rows: rows", all.capacity[i], 1, kMostRows);
    for (std::int64_t part : {rows.sequence_stride, rows.head_stride, rows.row_stride, rows.row_bytes}) {
      expect(part >= 0 && part % word == 0, "rows", {"strides and rows of whole words of ", word, " bytes"}, part);
    }
    expect(rows.address % static_cast<std::uint64_t>(word) == 0, "rows", {"an address that is a multiple of ", word}, rows.address);
    const std::array<Axis, 3> axes = all.axes(i);
    all.span[i] = span_of("rows", reinterpret_cast<const void*>(rows.address), 1, {axes[0], axes[1], axes[2], {rows.row_bytes, 1}});
    expect_distinct_rows("rows", rows.row_bytes, {axes[0], axes[1], axes[2]});
    for (int j = 0; j < i; ++j) expect(apart(all, i, j), "rows", "tensors apart from each other", {"tensors ", j, " and a later one in the same memory"});
  }
}

/// The word that all of these rows are made of: the largest power of two up to 16 that divides them.
inline int word_of(const Rows* rows, int tensors) {
  std::uint64_t bits = 16;
  for (int i = 0; i < tensors; ++i) {
    for (std::int64_t part : {rows[i].sequence_stride, rows[i].head_stride, rows[i].row_stride, rows[i].row_bytes}) {
      bits |= static_cast<std::uint64_t>(part);
    }
    bits |= rows[i].address;
  }
  return static_cast<int>(bits & (~bits + 1));
}

/// \param width  columns of kept
inline void check_addresses(const CompactCall& call, std::int64_t width, const MovingRows& all) {
  const Span kept = span_of("kept", call.kept, 4, {{call.batch, call.kept_stride}, {width, 1}});
  const Span n_kept = span_of("n_kept", call.n_kept, 4, {{call.batch, 1}}), n_visual = span_of("n_visual", call.n_visual, 4, {{call.batch, 1}});
  for (int i = 0; i < all.tensors; ++i) expect_apart(all.span[i], {kept, n_kept, n_visual});
}

inline void check_addresses(const ReorderCall& call, const MovingRows& all) {
  const Span index = span_of("index", call.index, 8, {{call.batch, 1}});
  for (int i = 0; i < all.tensors; ++i) expect_apart(all.span[i], {index});
}

}  // namespace dyrate
