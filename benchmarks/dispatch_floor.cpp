// What the client does for an addition, in C++: for the benchmark dispatch_floor, to see what a compiled fast path
// could save. It looks the signature up, numbers a storage, records the call, and makes a tensor without memory whose
// end is recorded, too. Nothing is sent.

#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/TensorImpl.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
std::mutex lock;
std::vector<int64_t> records;
std::unordered_map<uint64_t, int64_t> templates;
int64_t next_id = 1;

void record(std::initializer_list<int64_t> fields) {
  std::lock_guard<std::mutex> guard(lock);
  if (records.size() > 1 << 16) records.clear();  // here a batch would be sent
  records.insert(records.end(), fields);
}

void freed(void* id) { record({-1, reinterpret_cast<int64_t>(id)}); }

at::Tensor make(c10::IntArrayRef size, at::ScalarType dtype) {
  auto id = reinterpret_cast<void*>(next_id++);
  int64_t nbytes = c10::elementSize(dtype);
  for (auto s : size) nbytes *= s;
  c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, c10::DataPtr(id, id, freed, kDevice));
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return tensor;
}

uint64_t mixed(uint64_t seed, uint64_t value) { return (seed ^ value) * 0x9E3779B97F4A7C15ull + (seed >> 29); }

uint64_t signature(uint64_t seed, const at::Tensor& t) {
  seed = mixed(seed, static_cast<uint64_t>(t.scalar_type()));
  for (auto s : t.sizes()) seed = mixed(seed, s);
  for (auto s : t.strides()) seed = mixed(seed, s);
  return mixed(seed, t.storage_offset());
}

int64_t id_of(const at::Tensor& t) { return reinterpret_cast<int64_t>(t.storage().data_ptr().get_context()); }

at::Tensor add(const at::Tensor& self, const at::Tensor& other, const at::Scalar& alpha) {
  auto key = signature(signature(1, self), other);
  auto found = templates.find(key);
  if (found == templates.end()) found = templates.emplace(key, templates.size()).first;
  auto result = make(self.sizes(), self.scalar_type());
  record({found->second, id_of(self), id_of(other), id_of(result)});
  return result;
}

at::Tensor made() { return make({4, 4}, at::kFloat); }

}  // namespace

TORCH_LIBRARY(gpupool_floor, m) { m.def("made() -> Tensor", made); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("add.Tensor", add); }
