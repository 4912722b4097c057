// Python module dyrate_kernels._native. Arguments that live on the device are raw addresses, the stream is torch's current one:
// this file needs no torch to compile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "probe.h"

namespace py = pybind11;

namespace {

py::list architectures() {
  py::list names;
  std::stringstream text(DYRATE_ARCHITECTURES);
  for (std::string name; std::getline(text, name, ',');) names.append(name);
  return names;
}

py::dict probe() {
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

void write_architecture(std::uintptr_t out, std::uintptr_t stream) {
  if (out == 0) throw std::invalid_argument("out must be the address of int32 [1] on the device, got 0");
  const cudaError_t status = dyrate::write_architecture(reinterpret_cast<int*>(out), reinterpret_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) {
    throw std::runtime_error("write_architecture did not launch: " + dyrate::describe(status));
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native extension of dyrate_kernels. Use it through dyrate_kernels.native.";
  module.def("probe", &probe, "Versions, devices and built architectures, as a dict. Never raises for want of a driver or device.");
  module.def("write_architecture", &write_architecture, py::arg("out"), py::arg("stream"),
             "Launch a kernel that writes the architecture it was compiled for (900 for sm_90) to out, int32 [1] on the device.");
}
