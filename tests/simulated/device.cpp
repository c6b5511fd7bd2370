// A simulated accelerator: PyTorch's backend for devices of others ("PrivateUse1"), on memory of the host.
//
// Its kernels are the CPU's, so its numbers are the CPU's too. What it shares with a real accelerator is what programs get
// wrong: its tensors do not mix with the CPU's, and a copy that is queued on a side stream has not happened until somebody
// waits for it. Memory that was not written yet, or was freed, holds 0xCD bytes.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSim, 0);

// --- Streams. Stream 0 works at once. On the others only copies from the host wait, until somebody waits for the stream.

struct Queue {
  int64_t done = 0;  // how many were ever run
  std::deque<std::function<void()>> waiting;
};

std::recursive_mutex mutex;
std::map<int64_t, Queue> queues;
std::atomic<int64_t> streams{0};
thread_local int64_t current = 0;
thread_local bool inside_kernel = false;

struct Transfer {
  std::string direction;
  int64_t nbytes;
  uint64_t thread;
  int64_t stream;
};
std::vector<Transfer> transfers;
std::atomic<int64_t> lent{0};

void run_until(int64_t stream, int64_t count) {
  // To be freed or held, memory that Python knows may need its lock, which whoever waits for ours would never give up.
  std::vector<std::function<void()>> freed_unlocked;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto& queue = queues[stream];
  while (queue.done < count && !queue.waiting.empty()) {
    freed_unlocked.push_back(std::move(queue.waiting.front()));
    queue.waiting.pop_front();
    freed_unlocked.back()();
    ++queue.done;
  }
}

int64_t queued(int64_t stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto& queue = queues[stream];
  return queue.done + static_cast<int64_t>(queue.waiting.size());
}

struct Event {
  int64_t stream;
  int64_t count;
  bool asked = false;
};

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  static c10::Stream stream_of(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  c10::Stream getStream(c10::Device) const override { return stream_of(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream_of(++streams); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = stream_of(current);
    current = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return queues[stream.id()].waiting.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override { run_until(stream.id(), queued(stream.id())); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    for (int64_t id = 0; id <= streams; ++id) run_until(id, queued(id));
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event != nullptr) delete static_cast<Event*>(*event);
    *event = new Event{stream.id(), queued(stream.id())};
  }
  void block(void* event, const c10::Stream&) const override { synchronizeEvent(event); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) run_until(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->count);
  }
  bool queryEvent(void* event) const override {  // done at the second question: both answers occur
    auto* recorded = static_cast<Event*>(event);
    if (recorded == nullptr || recorded->asked) {
      synchronizeEvent(event);
      return true;
    }
    recorded->asked = true;
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return queues[recorded->stream].done >= recorded->count;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};

// --- Memory.

// The size is kept in the 64 bytes before the memory, which is aligned for the widest vectors.
constexpr size_t kHead = 64;

void free_memory(void* memory) {
  auto* head = static_cast<char*>(memory) - kHead;
  std::memset(memory, 0xCD, *reinterpret_cast<size_t*>(head));
  std::free(head);
}

struct Allocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, [](void*) {}, kDevice};
    auto* head = static_cast<char*>(std::aligned_alloc(kHead, (nbytes + 2 * kHead - 1) / kHead * kHead));
    TORCH_CHECK(head != nullptr, "no memory");
    *reinterpret_cast<size_t*>(head) = nbytes;
    std::memset(head + kHead, 0xCD, nbytes);
    return {head + kHead, head + kHead, &free_memory, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

at::Tensor make_empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor make_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// A CPU tensor on the same memory.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  auto storage = tensor.storage();
  auto* held = new c10::Storage(storage);
  c10::DataPtr pointer(storage.mutable_data(), held, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                       c10::Device(c10::kCPU));
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  const bool from_host = self.device().is_cpu(), to_host = target.device().is_cpu();
  if (!inside_kernel && from_host != to_host) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    transfers.push_back({from_host ? "in" : "out", static_cast<int64_t>(self.nbytes()),
                         std::hash<std::thread::id>{}(std::this_thread::get_id()), current});
  }
  const bool plain = self.is_contiguous() && target.is_contiguous() && self.dtype() == target.dtype();
  if (from_host && non_blocking && current != 0 && plain && self.sizes() == target.sizes()) {
    std::function<void()> copy = [kept = c10::Storage(self.storage()), also = c10::Storage(target.storage()),
                                  from = self.const_data_ptr(), to = target.mutable_data_ptr(),
                                  nbytes = self.nbytes()] { std::memcpy(to, from, nbytes); };
    {
      std::lock_guard<std::recursive_mutex> lock(mutex);
      queues[current].waiting.push_back(std::move(copy));
    }
    return target;
  }
  run_until(current, queued(current));
  c10::InferenceMode mode(false);
  at::AutoDispatchBelowADInplaceOrView below;
  on_host(target).copy_(on_host(self));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  at::native::resize_(target, self.sizes(), std::nullopt);
  return copy_from(self, target, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto needed = static_cast<size_t>((self.storage_offset() + impl->numel()) * self.element_size());
  if (needed > self.storage().nbytes()) {
    auto memory = allocator.allocate(needed);
    if (self.storage().nbytes()) std::memcpy(memory.get(), self.storage().data(), self.storage().nbytes());
    impl->unsafe_storage().set_data_ptr(std::move(memory));
    impl->unsafe_storage().set_nbytes(needed);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.data() == nullptr || (stride.empty() && !size.empty())) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_source_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage(self, std::move(storage), 0, {count}, {});
}

at::Tensor strided_view(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(),
                                                         self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return result;
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return strided_view(self, size, stride, self.storage_offset());
}

at::Tensor viewed(const at::Tensor& self, c10::IntArrayRef size) {
  auto alias = at::cpu::view(on_host(self), size);
  return strided_view(self, alias.sizes(), alias.strides(), alias.storage_offset());
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (!inside_kernel)
      transfers.push_back({"item", static_cast<int64_t>(self.nbytes()),
                           std::hash<std::thread::id>{}(std::this_thread::get_id()), current});
  }
  return on_host(self).item();
}

void record_stream(at::Tensor&, c10::Stream) { ++lent; }

// As an accelerator does: only a number from the host, a tensor without dimensions, may stand among its tensors.
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t count) {
  const auto& name = op.schema().name();
  if (name.find("index") != std::string::npos) return;  // row numbers may be on the host
  bool there = false, here = false;
  const auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    there = there || tensor.device() == kDevice;
    here = here || (tensor.device().is_cpu() && tensor.dim() > 0);
  };
  for (size_t i = stack.size() - count; i < stack.size(); ++i) {
    if (stack[i].isTensor()) look(stack[i].toTensor());
    if (stack[i].isTensorList())
      for (const at::Tensor& tensor : stack[i].toTensorList()) look(tensor);
  }
  TORCH_CHECK(!(there && here), "Expected all tensors to be on the same device, but found sim:0 and cpu, in ", name);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack, op.schema().arguments().size());
  if (!inside_kernel) run_until(current, queued(current));
  struct Inside {
    bool before = std::exchange(inside_kernel, true);
    ~Inside() { inside_kernel = before; }
  } inside;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &make_empty);
  library.impl("empty_strided", &make_strided);
  library.impl("as_strided", &strided_view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("view", &viewed);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_source_storage);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("record_stream", &record_stream);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  module.def("transfers", [] {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    std::vector<std::tuple<std::string, int64_t, uint64_t, int64_t>> found;
    for (const auto& t : transfers) found.emplace_back(t.direction, t.nbytes, t.thread, t.stream);
    transfers.clear();
    return found;
  });
  module.def("this_thread", [] { return static_cast<uint64_t>(std::hash<std::thread::id>{}(std::this_thread::get_id())); });
  module.def("lent", [] { return lent.load(); });
}
