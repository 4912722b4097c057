// What the CUDA driver and runtime say about this machine. No torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

namespace dyrate {

/// One CUDA device; memory in bytes.
struct Device {
  int index;
  std::string name;
  int major;
  int minor;
  std::size_t memory;
  int multiprocessors;
};

/// Versions are CUDA's own numbers (13000 is 13.0); driver_version is 0 when there is no driver.
/// error is empty when devices could be counted and there is at least one.
struct Probe {
  int driver_version = 0;
  int runtime_version = 0;
  std::vector<Device> devices;
  std::string error;
};

/// \brief Ask driver and runtime. Never fails for want of a driver or device: error says so.
/// Starts no context on any device.
Probe probe();

/// \brief An error in words; says so where the cause is that there is no driver at all.
std::string describe(cudaError_t error);

/// \brief Launch a kernel that writes the architecture it was compiled for (900 for sm_90), to check that this build has code
/// for the device.
/// \param out [1] int32, device memory
/// \param stream the current stream
/// \return the launch's error; what happens on the device shows at the next synchronisation
cudaError_t write_architecture(int* out, cudaStream_t stream);

}  // namespace dyrate
