// A simulated accelerator: PyTorch's backend for devices of others ("PrivateUse1"), on memory of the host.
//
// Its kernels are the CPU's, at work on the very memory and strides, so its numbers are the CPU's too. What it shares with a
// real accelerator is what programs get wrong: its tensors do not mix with the CPU's, and a copy that is queued on a side stream
// has not happened until somebody waits for it. What one stream does to the memory of another without waiting for it is noted
// as a race. Memory that was not written yet, or was freed, holds 0xCD bytes.

#define AT_PER_OPERATOR_HEADERS  // or all of ATen's are compiled
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/copy_native.h>
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
#include <set>
#include <thread>

namespace at::autocast {  // of ATen/autocast_mode.h, which takes ten seconds to compile
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType);
}

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

struct Transfer {
  std::string direction;
  int64_t nbytes;
  uint64_t thread;
  int64_t stream;
};
std::vector<Transfer> transfers;
std::atomic<int64_t> lent{0};

void count_transfer(const char* direction, size_t nbytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  transfers.push_back({direction, static_cast<int64_t>(nbytes),
                       std::hash<std::thread::id>{}(std::this_thread::get_id()), current});
}

void run_until(int64_t stream, int64_t count) {
  // To be freed, memory that Python knows may need its lock, which whoever waits for ours would never give up.
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

void run_all() {
  for (int64_t id = 0; id <= streams; ++id) run_until(id, queued(id));
}

// --- What is known to be done. Each operation has a number in its stream. A stream knows the operations of another that it has
// waited for, and everybody those that the host has waited for. An operation on memory that another stream has written, in one
// that is not known, is a race, however it turned out here; so is giving memory of a side stream back while another stream may
// be at work on it that it was not lent to. The default stream's own memory is not looked at when it is given back.

using Clock = std::map<int64_t, int64_t>;

struct Block {
  int64_t home, writer, written;
  Clock uses;
  std::set<int64_t> lent;
};

std::mutex ledger;  // nothing is waited for under it
std::map<const void*, Block> blocks;
std::map<int64_t, Clock> known;
Clock finished;
std::vector<std::string> races;

void join(Clock& clock, const Clock& other) {
  for (const auto& [stream, number] : other) clock[stream] = std::max(clock[stream], number);
}

Clock clock_of(int64_t stream) {
  std::lock_guard<std::mutex> lock(ledger);
  return known[stream];
}

void finish(const Clock& clock) {
  std::lock_guard<std::mutex> lock(ledger);
  join(finished, clock);
}

bool is_known(int64_t stream, int64_t other, int64_t number) {
  return stream == other || number <= std::max(known[stream][other], finished[other]);
}

void begin_operation() {
  std::lock_guard<std::mutex> lock(ledger);
  ++known[current][current];
}

void use_memory(const void* memory, bool writes, const std::string& name) {
  std::lock_guard<std::mutex> lock(ledger);
  const auto found = blocks.find(memory);
  if (found == blocks.end()) return;
  auto& block = found->second;
  if (!is_known(current, block.writer, block.written))
    races.push_back(name + " on stream " + std::to_string(current) + " does not wait for what stream " +
                    std::to_string(block.writer) + " writes");
  block.uses[current] = known[current][current];
  if (writes) {
    block.writer = current;
    block.written = known[current][current];
  }
}

void note_made(const void* memory) {
  std::lock_guard<std::mutex> lock(ledger);
  blocks[memory] = {current, current, known[current][current], {}, {}};
}

void note_freed(const void* memory) {
  std::lock_guard<std::mutex> lock(ledger);
  const auto found = blocks.find(memory);
  if (found == blocks.end()) return;
  const auto& block = found->second;
  for (const auto& [stream, number] : block.uses)
    if (block.home != 0 && !block.lent.count(stream) && !is_known(block.home, stream, number))
      races.push_back("memory of stream " + std::to_string(block.home) + " is given back while stream " +
                      std::to_string(stream) + " uses it");
  blocks.erase(found);
}

struct Event {
  Clock clock;
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
  void synchronizeStream(const c10::Stream& stream) const override {
    run_until(stream.id(), queued(stream.id()));
    finish(clock_of(stream.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    run_all();
    for (int64_t id = 0; id <= streams; ++id) finish(clock_of(id));
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event != nullptr) delete static_cast<Event*>(*event);
    *event = new Event{clock_of(stream.id()), stream.id(), queued(stream.id())};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    run_until(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->count);
    std::lock_guard<std::mutex> lock(ledger);
    join(known[stream.id()], static_cast<Event*>(event)->clock);
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    run_until(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->count);
    finish(static_cast<Event*>(event)->clock);
  }
  bool queryEvent(void* event) const override {  // done at the second question: both answers occur
    auto* recorded = static_cast<Event*>(event);
    if (recorded == nullptr || recorded->asked) {
      synchronizeEvent(event);
      return true;
    }
    recorded->asked = true;
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (queues[recorded->stream].done < recorded->count) return false;
    finish(recorded->clock);
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- Memory.

// The size is kept in the 64 bytes before the memory, which is aligned for the widest vectors.
constexpr size_t kHead = 64;

void* take_memory(size_t nbytes) {
  auto* head = static_cast<char*>(std::aligned_alloc(kHead, (nbytes + 2 * kHead - 1) / kHead * kHead));
  TORCH_CHECK(head != nullptr, "no memory");
  *reinterpret_cast<size_t*>(head) = nbytes;
  return std::memset(head + kHead, 0xCD, nbytes);
}

void free_memory(void* memory) {
  auto* head = static_cast<char*>(memory) - kHead;
  note_freed(memory);
  std::memset(memory, 0xCD, *reinterpret_cast<size_t*>(head));
  std::free(head);
}

struct Allocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, nullptr, [](void*) {}, kDevice};
    auto* memory = take_memory(nbytes);
    note_made(memory);
    return {memory, memory, &free_memory, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

std::mutex pinned_mutex;  // one of its own: memory is freed in places where nothing else may be waited for
std::map<const char*, size_t> pinned;

struct PinnedAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    auto* memory = take_memory(nbytes);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(memory)] = std::max<size_t>(nbytes, 1);
    return {memory, memory, &unpin, c10::Device(c10::kCPU)};
  }
  static void unpin(void* memory) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(static_cast<const char*>(memory));
    }
    free_memory(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
PinnedAllocator pinned_allocator;

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    auto after = pinned.upper_bound(static_cast<const char*>(pointer));
    if (after == pinned.begin()) return false;
    const auto& [start, nbytes] = *std::prev(after);
    return static_cast<const char*>(pointer) < start + nbytes;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  // The kernels are the CPU's, and so are the generators that they draw from.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
};

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

// --- The same memory, taken for the CPU's.

c10::Storage on_host(const c10::Storage& storage) {
  auto* held = new c10::Storage(storage);
  c10::DataPtr pointer(storage.mutable_data(), held, [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                       c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), c10::GetAllocator(c10::kCPU), true);
}

// A tensor like the other on another storage, without its history.
at::Tensor on_storage(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  result._set_conj(like.is_conj());
  result._set_neg(like.is_neg());
  return result;
}

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor.device().is_cpu() ? tensor : on_storage(tensor, on_host(tensor.storage()), c10::DispatchKey::CPU);
}

// What is called from here on is a kernel of the CPU, of which autograd, autocast and Python's modes have seen the outside.
struct Inside {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard rest{c10::autocast_dispatch_keyset | c10::python_ks};
};

void use(const at::Tensor& tensor, bool writes, const std::string& name) {
  if (!tensor.defined() || tensor.device() != kDevice) return;
  if (tensor.is_sparse()) {
    use(tensor._indices(), writes, name);
    use(tensor._values(), writes, name);
  } else if (tensor.layout() == at::kStrided) {
    use_memory(tensor.storage().data(), writes, name);
  }
}

void copy_now(const at::Tensor& source, const at::Tensor& target) {
  Inside inside;
  auto host = on_host(target);
  at::native::copy_(host, on_host(source), false);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  const bool from_host = self.device().is_cpu(), to_host = target.device().is_cpu();
  if (from_host != to_host) count_transfer(from_host ? "in" : "out", self.nbytes());
  begin_operation();
  use(self, false, "a copy");
  use(target, true, "a copy");
  if (!from_host || !non_blocking || current == 0) {
    run_until(current, queued(current));
    copy_now(self, target);
    if (from_host != to_host && !non_blocking) finish(clock_of(current));
    return target;
  }
  // As CUDA does: what has to be converted is, at once and on the host. Other memory is read when the copy is made.
  at::Tensor source;
  if (self.is_contiguous() && self.dtype() == target.dtype() && self.sizes() == target.sizes() && !self.is_conj() &&
      !self.is_neg()) {
    source = on_storage(self, on_host(self.storage()), c10::DispatchKey::CPU);
  } else {
    source = at::detail::empty_cpu(target.sizes(), target.scalar_type());
    copy_now(self, source);
  }
  // Of both, tensors and memory that Python does not know: to be held once more, as it is in a copy, that may need its lock too.
  std::function<void()> copy = [source, place = on_host(target)] { copy_now(source, place); };
  {  // and so does what is returned
    std::lock_guard<std::recursive_mutex> lock(mutex);
    queues[current].waiting.push_back(std::move(copy));
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto needed = static_cast<size_t>((self.storage_offset() + impl->numel()) * self.element_size());
  if (impl->numel() && needed > self.storage().nbytes()) {
    run_all();  // a queued copy may be to the memory that is given back here
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
  count_transfer("item", self.nbytes());
  begin_operation();
  use(self, false, "item");
  run_until(current, queued(current));
  finish(clock_of(current));
  Inside inside;
  return on_host(self).item();
}

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  ++lent;
  std::lock_guard<std::mutex> lock(ledger);
  const auto found = blocks.find(tensor.storage().data());
  if (found != blocks.end()) found->second.lent.insert(stream.id());
}

// --- All other operations: the CPU's kernel is called on the same memory.

class Call {
 public:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device() != kDevice) {
      pairs_.emplace_back(tensor, tensor);
      return tensor;
    }
    for (const auto& [original, alias] : pairs_)
      if (original.is_same(tensor)) return alias;
    at::Tensor alias;
    if (tensor.is_sparse()) {
      alias = sparse_like(tensor, to_host(sparse(tensor)->indices()), to_host(sparse(tensor)->values()),
                          c10::DispatchKey::SparseCPU);
    } else {
      TORCH_CHECK(tensor.layout() == at::kStrided, "the simulated accelerator has no tensors of layout ", tensor.layout());
      alias = on_storage(tensor, host_storage(tensor.storage()), c10::DispatchKey::CPU);
    }
    pairs_.emplace_back(tensor, alias);
    return alias;
  }

  // A result: one of the arguments, a view of one, or new memory.
  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& [original, alias] : pairs_)
      if (alias.is_same(tensor)) return original;
    if (tensor.is_sparse())
      return sparse_like(tensor, to_device(sparse(tensor)->indices()), to_device(sparse(tensor)->values()),
                         c10::DispatchKey::SparsePrivateUse1);
    return on_storage(tensor, device_storage(tensor.storage()), c10::DispatchKey::PrivateUse1);
  }

  // What the kernel did to an argument but for its memory: a new size, other memory, other rows.
  void write_back() {
    const auto pairs = pairs_;  // more come in
    for (const auto& [original, alias] : pairs) {
      if (original.is_same(alias)) continue;
      if (original.is_sparse()) {
        auto *to = sparse(original), *from = sparse(alias);
        auto indices = to_device(from->indices()), values = to_device(from->values());
        if (!indices.is_same(to->indices()) || !values.is_same(to->values()) || original.sizes() != alias.sizes()) {
          to->raw_resize_(from->sparse_dim(), from->dense_dim(), alias.sizes());
          to->set_indices_and_values_unsafe(indices, values);
        }
        to->set_coalesced(from->coalesced());
        continue;
      }
      auto* impl = original.unsafeGetTensorImpl();
      auto storage = device_storage(alias.storage());
      if (!storage.is_alias_of(original.storage())) impl->set_storage_keep_dtype(std::move(storage));
      if (original.sizes() != alias.sizes() || original.strides() != alias.strides() ||
          original.storage_offset() != alias.storage_offset())
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }

 private:
  static at::SparseTensorImpl* sparse(const at::Tensor& tensor) {
    return static_cast<at::SparseTensorImpl*>(tensor.unsafeGetTensorImpl());
  }

  static at::Tensor sparse_like(const at::Tensor& like, const at::Tensor& indices, const at::Tensor& values,
                                c10::DispatchKey key) {
    auto result = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), like.dtype());
    sparse(result)->raw_resize_(sparse(like)->sparse_dim(), sparse(like)->dense_dim(), like.sizes());
    sparse(result)->set_indices_and_values_unsafe(indices, values);
    sparse(result)->set_coalesced(sparse(like)->coalesced());
    return result;
  }

  c10::Storage host_storage(const c10::Storage& storage) {
    for (const auto& [original, alias] : storages_)
      if (original.is_alias_of(storage)) return alias;
    storages_.emplace_back(storage, on_host(storage));
    return storages_.back().second;
  }

  c10::Storage device_storage(const c10::Storage& storage) {
    for (const auto& [original, alias] : storages_) {
      if (!alias.is_alias_of(storage)) continue;
      if (original.data() != alias.data()) {  // grown
        run_all();
        c10::Storage grown(original);
        grown.unsafeGetStorageImpl()->set_data_ptr(moved(alias));
        grown.unsafeGetStorageImpl()->set_nbytes(alias.nbytes());
      }
      return original;
    }
    storages_.emplace_back(
        c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), moved(storage), &allocator, true), storage);
    return storages_.back().first;
  }

  static c10::DataPtr moved(const c10::Storage& storage) {
    auto memory = allocator.allocate(storage.nbytes());
    if (storage.nbytes()) std::memcpy(memory.get(), storage.data(), storage.nbytes());
    return memory;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// As an accelerator does: only a number from the host, a tensor without dimensions, may stand among its tensors, and the row
// numbers of `x[rows]`, which are a list of optional tensors.
void check_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  bool there = false, here = false;
  const auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    there = there || tensor.device() == kDevice;
    here = here || (tensor.device().is_cpu() && tensor.dim() > 0);
  };
  for (const auto& argument : arguments) {
    if (argument.isTensor()) look(argument.toTensor());
    if (argument.isTensorList())
      for (const at::Tensor& tensor : argument.toTensorList()) look(tensor);
  }
  TORCH_CHECK(!(there && here), "Expected all tensors to be on the same device, but found sim:0 and cpu, in ", name);
}

// The size of their results, or what they return, is up to the values: an accelerator's host waits for those.
const std::set<std::string> waiting_for_values{"aten::equal",      "aten::nonzero",    "aten::masked_select",
                                               "aten::_unique",    "aten::_unique2",   "aten::unique_dim",
                                               "aten::unique_consecutive"};

template <c10::DispatchKey key>
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  const auto arguments = c10::ArrayRef<c10::IValue>(*stack).slice(stack->size() - count);
  if (name == "aten::copy_" || name == "aten::copy_sparse_to_sparse_") {  // of sparse tensors
    const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
    if (to.device() != from.device()) {
      const auto& there = from.is_sparse() ? from : to;
      count_transfer(from.device().is_cpu() ? "in" : "out", there._indices().nbytes() + there._values().nbytes());
    }
  } else {
    check_devices(name, arguments);
  }
  if (waiting_for_values.count(name)) count_transfer("wait", 0);
  begin_operation();
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (alias != nullptr && !alias->isWrite()) continue;  // a view of it looks at no memory
    const auto& argument = arguments[i];
    if (argument.isTensor()) use(argument.toTensor(), alias != nullptr, name);
    if (argument.isTensorList())
      for (const at::Tensor& tensor : argument.toTensorList()) use(tensor, alias != nullptr, name);
    if (argument.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : argument.toOptionalTensorList())
        if (tensor) use(*tensor, alias != nullptr, name);
  }
  run_until(current, queued(current));
  if (waiting_for_values.count(name)) finish(clock_of(current));

  Call call;
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> aliases;
      for (const at::Tensor& tensor : value.toTensorList()) aliases.push_back(call.to_host(tensor));
      value = std::move(aliases);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> aliases;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        aliases.push_back(tensor ? std::make_optional(call.to_host(*tensor)) : std::nullopt);
      value = std::move(aliases);
    } else if (value.isDevice() && value.toDevice().type() == kSim) {
      value = c10::Device(c10::kCPU);
    }
  }
  {
    Inside inside;
    op.redispatchBoxed(c10::DispatchKeySet(key), stack);
  }
  call.write_back();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> results;
      for (const at::Tensor& tensor : value.toTensorList()) results.push_back(call.to_device(tensor));
      value = std::move(results);
    }
  }
}

void run_in_low_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().scalar_type() == at::kFloat)
      value = value.toTensor().to(at::autocast::get_autocast_dtype(kSim));
  }
  op.callBoxed(stack);
}

// Recurrent layers call one kernel for a step on devices that are not the CPU, which has none. They add the bias after the
// product and not to it, so their last bits are not the CPU's.
at::Tensor biased(const at::Tensor& gates, const std::optional<at::Tensor>& bias) {
  return bias && bias->defined() ? gates + *bias : gates;
}

std::tuple<at::Tensor, at::Tensor> gru_step(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& state,
                                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& other) {
  const auto in = biased(input, bias).chunk(3, 1), from = biased(hidden, other).chunk(3, 1);
  const auto reset = (from[0] + in[0]).sigmoid(), update = (from[1] + in[1]).sigmoid();
  const auto fresh = (in[2] + from[2] * reset).tanh();
  return {(state - fresh) * update + fresh, fresh.detach()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_step(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& cell,
                                                         const std::optional<at::Tensor>& bias,
                                                         const std::optional<at::Tensor>& other) {
  const auto gates = (biased(hidden, other) + biased(input, bias)).chunk(4, 1);
  const auto next = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * next.tanh(), next, gates[0].detach()};
}

}  // namespace

// A fallback comes after what torch makes of other operations, whose numbers may be others than the CPU's kernel's.
template <c10::DispatchKey key>
void implement(torch::Library& library, const std::vector<c10::DispatchKey>& before) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op->hasKernelForDispatchKey(key)) continue;
    for (const auto other : before) {
      if (!op->hasKernelForDispatchKey(other)) continue;
      const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host<key>>());
      break;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host<c10::DispatchKey::CPU>>());
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host<c10::DispatchKey::SparseCPU>>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  for (const auto* name : {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_in_low_precision>());
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, library) {
  implement<c10::DispatchKey::SparseCPU>(library, {c10::DispatchKey::SparseCPU});
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  implement<c10::DispatchKey::CPU>(
      library, {c10::DispatchKey::CompositeExplicitAutograd, c10::DispatchKey::CompositeExplicitAutogradNonFunctional,
                c10::DispatchKey::CompositeImplicitAutograd});
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
  library.impl("_thnn_fused_gru_cell", &gru_step);
  library.impl("_thnn_fused_lstm_cell", &lstm_step);
}

// Made of operations that autograd knows the derivatives of.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  library.impl("_thnn_fused_gru_cell", &gru_step);
  library.impl("_thnn_fused_lstm_cell", &lstm_step);
}

// A copy from a conjugate is made by what makes all copies; by default torch would make a copy of it first, and so on.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

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
  module.def("races", [] {
    std::lock_guard<std::mutex> lock(ledger);
    return std::exchange(races, {});
  });
  module.def("lent", [] { return lent.load(); });
}
