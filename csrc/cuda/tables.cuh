// Small tables that a launch reads from its workspace: gathered on the host, sent in one copy.
#pragma once

#include <vector>

#include "device.cuh"

namespace fedcmt {
namespace cuda {

class Tables {
 public:
  // Appends the values and returns their place from the beginning of the tables, in bytes.
  template <typename T>
  int64_t add(const T* values, int64_t count) {
    const int64_t place = static_cast<int64_t>(image_.size());
    const char* bytes = reinterpret_cast<const char*>(values);
    if (count > 0) image_.insert(image_.end(), bytes, bytes + count * sizeof(T));
    image_.resize(divide_up(static_cast<int64_t>(image_.size()), kAlignment) * kAlignment);
    return place;
  }
  template <typename T>
  int64_t add(const std::vector<T>& values) {
    return add(values.data(), static_cast<int64_t>(values.size()));
  }

  int64_t bytes() const { return static_cast<int64_t>(image_.size()); }

  // The copy is staged by the driver: the image may be freed when this returns.
  cudaError_t upload(void* workspace, cudaStream_t stream) const {
    if (image_.empty()) return cudaSuccess;
    return cudaMemcpyAsync(workspace, image_.data(), image_.size(), cudaMemcpyHostToDevice, stream);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  std::vector<char> image_;
};

// What lies `place` bytes after the beginning of a workspace.
template <typename T>
T* at(void* workspace, int64_t place) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + place);
}

}  // namespace cuda
}  // namespace fedcmt
