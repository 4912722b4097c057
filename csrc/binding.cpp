// Python module dyrate_kernels._native. Arguments that live on the device are raw addresses, the stream is torch's current one:
// this file needs no torch to compile. With DYRATE_EMULATE it is the module of the tests, whose kernels run on the CPU.
//
// A class for each call of calls.h: the constructor takes the shape by keyword, checks and plans it once; `launch` takes the addresses
// (0: null) in the order of the struct, then the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"
#include "checks.h"
#include "plan.h"

#ifndef DYRATE_EMULATE
#include "probe.h"
#define DYRATE_MODULE _native
#else
#define DYRATE_MODULE _emulated
#endif

namespace py = pybind11;

namespace {

using namespace dyrate;

std::int64_t integer(py::handle value, const char* name) {
  if (!PyLong_Check(value.ptr())) throw py::type_error(std::string(name) + ": expected an int, got " + std::string(py::str(py::type::of(value))));
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

/// Keyword arguments, taken one by one; `finish` refuses those that are left.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  py::object take(const char* name) {
    if (!given_.contains(name)) throw py::type_error(std::string(name) + ": missing");
    taken_.insert(name);
    return given_[name];
  }
  int number(const char* name) {
    const std::int64_t value = integer(take(name), name);
    expect_range(name, value, INT32_MIN, INT32_MAX);
    return static_cast<int>(value);
  }
  float real(const char* name) {
    const py::object value = take(name);
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(number);
  }
  Type type(const char* name) { return static_cast<Type>(number(name)); }
  template <std::size_t kCount>
  void strides(const char* name, std::int64_t (&out)[kCount]) {
    const py::object value = take(name);
    if (!py::isinstance<py::tuple>(value)) throw py::type_error(std::string(name) + ": expected a tuple of ints");
    const py::tuple items = value;
    expect(items.size() == kCount, name, {"", kCount, " strides"}, items.size());
    for (std::size_t i = 0; i < kCount; ++i) stride(name, items[i], out[i]);
  }
  void stride(const char* name, std::int64_t& out) { stride(name, take(name), out); }
  void finish() const {
    for (auto item : given_) {
      const std::string name = py::str(item.first);
      if (!taken_.count(name)) throw py::type_error(name + ": not an argument of this call");
    }
  }

 private:
  static void stride(const char* name, py::handle value, std::int64_t& out) {
    out = integer(value, name);
    expect(out >= 0, name, "strides that are not negative", out);
  }
  py::kwargs given_;
  std::set<std::string> taken_;
};

/// The addresses of a launch, in order, then the stream.
class Addresses {
 public:
  Addresses(const py::args& given, std::size_t count) : given_(given) {
    if (given.size() != count + 1) {
      throw py::type_error("expected " + std::to_string(count) + " addresses and a stream, got " + std::to_string(given.size()) + " arguments");
    }
  }
  template <class Pointer>
  Addresses& operator>>(Pointer& out) {
    out = reinterpret_cast<Pointer>(static_cast<std::uintptr_t>(next()));
    return *this;
  }

 private:
  std::uint64_t next() {
    const std::int64_t value = integer(given_[at_], "an address");
    if (value < 0) refuse("addresses", "numbers that are not negative", "argument " + std::to_string(at_) + " of " + std::to_string(value));
    ++at_;
    return static_cast<std::uint64_t>(value);
  }
  py::args given_;
  std::size_t at_ = 0;
};

void succeed(Status status, const char* what) {
  if (status == 0) return;
#ifdef DYRATE_EMULATE
  throw std::runtime_error(std::string(what) + " failed: " + emulation::last_error());
#else
  throw std::runtime_error(std::string(what) + " did not launch: " + dyrate::describe(status));
#endif
}

struct Attention {
  AttentionCall call{};

  explicit Attention(const py::kwargs& given) {
    Fields fields(given);
    call.type = fields.type("type");
    call.batch = fields.number("batch");
    call.heads = fields.number("heads");
    call.kv_heads = fields.number("kv_heads");
    call.dim = fields.number("dim");
    call.value_dim = fields.number("value_dim");
    call.capacity = fields.number("capacity");
    call.visual_capacity = fields.number("visual_capacity");
    call.list_width = fields.number("list_width");
    call.window = fields.number("window");
    call.write_logits = fields.number("write_logits");
    call.scale = fields.real("scale");
    fields.strides("query_stride", call.query_stride);
    fields.strides("key_stride", call.key_stride);
    fields.strides("value_stride", call.value_stride);
    fields.strides("new_key_stride", call.new_key_stride);
    fields.strides("new_value_stride", call.new_value_stride);
    fields.stride("kept_stride", call.kept_stride);
    fields.stride("text_type_stride", call.text_type_stride);
    fields.stride("position_stride", call.position_stride);
    fields.stride("query_position_stride", call.query_position_stride);
    const Gpu gpu{fields.number("multiprocessors"), fields.number("capability"), fields.number("code")};
    expect_range("multiprocessors", gpu.multiprocessors, 1, 1 << 20);
    expect_range("capability", gpu.capability, 0, 9999);
    expect_range("code", gpu.code, 0, 9999);
    const AttentionSettings settings{fields.number("tensor_cores"), fields.number("stages"), fields.number("bulk")};
    expect_range("tensor_cores", settings.tensor_cores, 0, kGridLimit);
    expect_range("stages", settings.stages, 0, kMostStages);
    expect_range("bulk", settings.bulk, 0, 1);
    const int most_splits = fields.number("most_splits"), least_rows = fields.number("least_rows");  // 0: as planned
    fields.finish();
    // what the plan divides by and multiplies
    expect_range("batch", call.batch, 1, kGridLimit);
    expect_range("heads", call.heads, 1, kGridLimit);
    expect_range("kv_heads", call.kv_heads, 1, call.heads);
    expect_range("capacity", call.capacity, 0, kMostRows);
    expect_range("list_width", call.list_width, 0, kMostRows);
    expect_range("visual_capacity", call.visual_capacity, 0, call.capacity);
    plan_attention(call, gpu, settings);
    if (most_splits) call.max_splits = most_splits;
    if (least_rows) call.min_rows = least_rows;
    check_shape(call);
  }

  py::dict scratch() const {
    const AttentionScratch sizes = attention_scratch(call);
    py::dict result;
    result["part"] = sizes.part;
    result["part_stat"] = sizes.part_stat;
    result["head_stat"] = sizes.head_stat;
    result["logits"] = sizes.logits;
    result["counters"] = sizes.counters;
    return result;
  }

  void launch(const py::args& given) {
    AttentionCall now = call;
    Stream stream;
    Addresses(given, 19) >> now.query >> now.key >> now.value >> now.output >> now.n_visual >> now.n_text >> now.kept >> now.n_kept >>
        now.text_type >> now.position >> now.query_position >> now.new_key >> now.new_value >> now.part >> now.part_stat >> now.head_stat >>
        now.logits >> now.counters >> now.mass >> stream;
    check_addresses(now);
    succeed(decode_attention(now, stream), "decode_attention");
  }
};

struct Decide {
  DecideCall call{};

  explicit Decide(const py::kwargs& given) {
    Fields fields(given);
    call.batch = fields.number("batch");
    call.heads = fields.number("heads");
    call.visual_capacity = fields.number("visual_capacity");
    call.list_width = fields.number("list_width");
    call.logit_capacity = fields.number("logit_capacity");
    call.decide = fields.number("decide");
    call.classes = fields.number("classes");
    call.weight_type = fields.type("weight_type");
    call.bias_type = fields.type("bias_type");
    call.score_type = fields.type("score_type");
    fields.strides("weight_stride", call.weight_stride);
    fields.strides("bias_stride", call.bias_stride);
    fields.strides("score_stride", call.score_stride);
    fields.strides("alive_stride", call.alive_stride);
    fields.stride("kept_in_stride", call.kept_in_stride);
    fields.finish();
    check_shape(call);
  }

  void launch(const py::args& given) {
    DecideCall now = call;
    Stream stream;
    Addresses(given, 18) >> now.n_visual >> now.kept_in >> now.n_kept_in >> now.head_stat >> now.logits >> now.mass >> now.importance >>
        now.weight >> now.bias >> now.rates >> now.count >> now.max_kept >> now.score >> now.alive >> now.kept >> now.n_kept >> now.rate >>
        now.counters >> stream;
    check_addresses(now);
    succeed(decide(now, stream), "decide");
  }
};

struct Select {
  SelectCall call{};

  explicit Select(const py::kwargs& given) {
    Fields fields(given);
    call.batch = fields.number("batch");
    call.tokens = fields.number("tokens");
    call.score_type = fields.type("score_type");
    fields.strides("score_stride", call.score_stride);
    fields.strides("alive_stride", call.alive_stride);
    fields.finish();
    check_shape(call);
  }

  void launch(const py::args& given) {
    SelectCall now = call;
    Stream stream;
    Addresses(given, 6) >> now.score >> now.alive >> now.count >> now.n_visual >> now.kept >> now.n_kept >> stream;
    check_addresses(now);
    succeed(select_tokens(now, stream), "select_tokens");
  }
};

struct Predict {
  PredictCall call{};

  explicit Predict(const py::kwargs& given) {
    Fields fields(given);
    call.batch = fields.number("batch");
    call.features = fields.number("features");
    call.classes = fields.number("classes");
    call.mass_type = fields.type("mass_type");
    call.weight_type = fields.type("weight_type");
    call.bias_type = fields.type("bias_type");
    fields.strides("weight_stride", call.weight_stride);
    fields.strides("bias_stride", call.bias_stride);
    fields.finish();
    check_shape(call);
  }

  void launch(const py::args& given) {
    PredictCall now = call;
    Stream stream;
    Addresses(given, 6) >> now.mass >> now.weight >> now.bias >> now.rates >> now.rate >> now.index >> stream;
    check_addresses(now);
    succeed(predict_rate(now, stream), "predict_rate");
  }
};

/// From a tuple of (address, sequence_stride, head_stride, row_stride, heads, row_bytes, rows), strides in bytes.
MovingRows take_rows(const py::tuple& tensors, int batch) {
  expect_range("rows", static_cast<std::int64_t>(tensors.size()), 1, kMostTensors);
  MovingRows all;
  all.tensors = static_cast<int>(tensors.size());
  all.sequences = batch;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!py::isinstance<py::tuple>(tensors[i])) throw py::type_error("rows: expected a tuple of 7 ints for each tensor");
    const py::tuple line = tensors[i];
    expect(line.size() == 7, "rows", "7 numbers for each tensor", line.size());
    std::int64_t numbers[7];
    for (std::size_t j = 0; j < 7; ++j) {
      numbers[j] = integer(line[j], "rows");
      expect(numbers[j] >= 0, "rows", "numbers that are not negative", numbers[j]);
    }
    expect(numbers[0] > 0, "rows", "the address of a tensor", "0");
    all.rows[i] = {static_cast<std::uint64_t>(numbers[0]), numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    all.capacity[i] = numbers[6];
  }
  return all;
}

/// Hole filling in fixed tensors, which are checked once.
struct Compact {
  MovingRows moving;
  CompactCall call{};
  std::int64_t width;
  int movers;

  Compact(const py::tuple& tensors, int batch, std::int64_t kept_width, std::int64_t kept_stride)
      : moving(take_rows(tensors, batch)), width(kept_width) {
    call.word = word_of(moving.rows, moving.tensors);
    check(moving, call.word);
    for (int i = 0; i < moving.tensors; ++i) expect_range("rows: bytes of a row", moving.rows[i].row_bytes, 1, INT32_MAX);
    expect_range("width", width, 1, kMostRows);
    expect(kept_stride >= 0, "kept_stride", "a stride that is not negative", kept_stride);
    std::copy_n(moving.rows, moving.tensors, call.rows);
    call.tensors = moving.tensors;
    call.batch = batch;
    call.kept_stride = kept_stride;
    movers = compact_movers(batch, call.tensors, width);
  }

  void launch(const py::args& given) {
    CompactCall now = call;
    Stream stream;
    Addresses(given, 3) >> now.kept >> now.n_kept >> now.n_visual >> stream;
    check_addresses(now, width, moving);
    succeed(compact(now, movers, stream), "compact_");
  }
};

/// Reordering of fixed tensors, which are checked once.
struct Reorder {
  MovingRows moving;
  ReorderCall call{};
  int blocks;

  Reorder(const py::tuple& tensors, int batch) : moving(take_rows(tensors, batch)) {
    expect_range("batch", batch, 1, kMostReorderBatch);
    call.word = word_of(moving.rows, moving.tensors);
    check(moving, call.word);
    std::int64_t most = 1;
    for (int i = 0; i < moving.tensors; ++i) {
      const Rows& rows = call.rows[i] = moving.rows[i];
      expect(rows.heads == 1 && moving.capacity[i] == 1, "rows", "one head and one row a sequence", std::max(rows.heads, moving.capacity[i]));
      most = std::max(most, rows.row_bytes / call.word);
    }
    call.tensors = moving.tensors;
    call.batch = batch;
    blocks = reorder_blocks(batch, most);
  }

  void launch(const py::args& given) {
    ReorderCall now = call;
    Stream stream;
    Addresses(given, 1) >> now.index >> stream;
    check_addresses(now, moving);
    succeed(reorder(now, blocks, stream), "reorder_");
  }
};

#ifndef DYRATE_EMULATE

py::list architectures() {
  py::list names;
  std::stringstream text(DYRATE_ARCHITECTURES);
  for (std::string name; std::getline(text, name, ',');) names.append(name);
  return names;
}

py::dict probe_machine() {
  dyrate::Probe seen;
  {
    // The first call loads the driver, which can take seconds.
    py::gil_scoped_release release;
    seen = dyrate::probe();
  }
  py::list devices;
  for (const dyrate::Device& device : seen.devices) {
    py::dict entry;
    entry["index"] = device.index;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["memory"] = device.memory;
    entry["multiprocessors"] = device.multiprocessors;
    devices.append(entry);
  }
  py::dict result;
  result["driver_version"] = seen.driver_version;
  result["runtime_version"] = seen.runtime_version;
  result["architectures"] = architectures();
  result["devices"] = devices;
  if (seen.error.empty()) {
    result["error"] = py::none();
  } else {
    result["error"] = seen.error;
  }
  return result;
}

void start_write_architecture(std::uintptr_t out, std::uintptr_t stream) {
  if (out == 0) throw std::invalid_argument("out must be the address of int32 [1] on the device, got 0");
  const cudaError_t status = dyrate::write_architecture(reinterpret_cast<int*>(out), reinterpret_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) {
    throw std::runtime_error("write_architecture did not launch: " + dyrate::describe(status));
  }
}

#endif

}  // namespace

PYBIND11_MODULE(DYRATE_MODULE, module) {
  module.doc() = "Native extension of dyrate_kernels. Use it through dyrate_kernels.native.";
#ifdef DYRATE_EMULATE
  module.attr("emulated") = true;
  module.def("configure", &emulation::configure, py::arg("order"), py::arg("seed"), py::arg("resident_blocks"));
  module.def("failure", &emulation::last_error);
#else
  module.attr("emulated") = false;
  module.def("probe", &probe_machine, "Versions, devices and built architectures, as a dict. Never raises for want of a driver or device.");
  module.def("write_architecture", &start_write_architecture, py::arg("out"), py::arg("stream"),
             "Launch a kernel that writes the architecture it was compiled for (900 for sm_90) to out, int32 [1] on the device.");
#endif
  module.attr("most_tensors") = kMostTensors;
  module.attr("most_reorder_batch") = kMostReorderBatch;
  module.attr("most_dim") = kMostDim;
  py::class_<Attention>(module, "Attention")
      .def(py::init<const py::kwargs&>())
      .def_property_readonly("scratch", &Attention::scratch)
      .def_property_readonly("logit_capacity", [](const Attention& self) { return self.call.logit_capacity; })
      .def_property_readonly("max_splits", [](const Attention& self) { return self.call.max_splits; })
      .def_property_readonly("unit", [](const Attention& self) { return self.call.unit; })
      .def_property_readonly("stages", [](const Attention& self) { return self.call.stages; })
      .def_property_readonly("bulk", [](const Attention& self) { return self.call.bulk; })
      .def("launch", &Attention::launch);
  py::class_<Decide>(module, "Decide").def(py::init<const py::kwargs&>()).def("launch", &Decide::launch);
  py::class_<Select>(module, "Select").def(py::init<const py::kwargs&>()).def("launch", &Select::launch);
  py::class_<Predict>(module, "Predict").def(py::init<const py::kwargs&>()).def("launch", &Predict::launch);
  py::class_<Compact>(module, "Compact")
      .def(py::init<const py::tuple&, int, std::int64_t, std::int64_t>(), py::arg("rows"), py::arg("batch"), py::arg("width"), py::arg("kept_stride"))
      .def("launch", &Compact::launch);
  py::class_<Reorder>(module, "Reorder")
      .def(py::init<const py::tuple&, int>(), py::arg("rows"), py::arg("batch"))
      .def("launch", &Reorder::launch);
}
