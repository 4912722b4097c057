#include "probe.h"

#include <cuda_runtime.h>

namespace dyrate {
namespace {

__global__ void write_architecture_kernel(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

// 0 when the runtime found no driver library to load; CUDA calls that a success.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

std::string describe(cudaError_t error) {
  // Without a driver the runtime complains of a driver that is too old.
  if (driver_version() == 0) return "no CUDA driver is installed";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

Probe probe() {
  Probe seen;
  cudaRuntimeGetVersion(&seen.runtime_version);
  seen.driver_version = driver_version();
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int index = 0; status == cudaSuccess && index < count; ++index) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, index);
    if (status == cudaSuccess) {
      seen.devices.push_back({index, properties.name, properties.major, properties.minor, properties.totalGlobalMem,
                              properties.multiProcessorCount});
    }
  }
  // The runtime keeps the last error for the thread; ours must not show up in somebody else's check.
  cudaGetLastError();
  if (status != cudaSuccess) {
    seen.error = describe(status);
  } else if (count == 0) {
    seen.error = "the CUDA driver sees no device";
  }
  return seen;
}

cudaError_t write_architecture(int* out, cudaStream_t stream) {
  write_architecture_kernel<<<1, 1, 0, stream>>>(out);
  return cudaGetLastError();
}

}  // namespace dyrate
