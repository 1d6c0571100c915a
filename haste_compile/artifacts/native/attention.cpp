// Hopper's block-sparse attention as an operator of PyTorch, without Python: the machine code that Triton's
// compiler made of block_sparse_attention/hopper.py and tail_order.py, its TMA descriptors, its two launches.
//
// kernels.h, written at export, says what was compiled: the operator's name and schema, each kernel's name,
// machine code, shared memory and threads, what the descriptors hold (boxes innermost axis first), how many tiles
// go by length, and what sizes it is for. PyTorch is reached through its stable ABI alone, and CUDA through
// libcuda.so.1, which is opened at the first call: the library loads without a GPU.

#include <cuda.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "kernels.h"

asm(".pushsection .rodata\n"
    ".balign 64\n"
    "haste_order_cubin:\n"
    ".incbin \"" HASTE_ORDER_CUBIN "\"\n"
    ".balign 64\n"
    "haste_attention_cubin:\n"
    ".incbin \"" HASTE_ATTENTION_CUBIN "\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char haste_order_cubin[], haste_attention_cubin[];

namespace {

using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(HASTE_OPERATOR ": " + message);
}

void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

// The driver's functions that are needed, by name.
struct Driver {
  decltype(&cuCtxGetDevice) context_device;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuFuncSetAttribute) set_attribute;
  decltype(&cuGetErrorString) error_string;
  decltype(&cuLaunchKernel) launch;
  decltype(&cuModuleGetFunction) function;
  decltype(&cuModuleLoadData) load;
  decltype(&cuTensorMapEncodeTiled) encode;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) fail("libcuda.so.1 cannot be opened");
    find(library, "cuCtxGetDevice", context_device);
    find(library, "cuDeviceGetAttribute", attribute);
    find(library, "cuFuncSetAttribute", set_attribute);
    find(library, "cuGetErrorString", error_string);
    find(library, "cuLaunchKernel", launch);
    find(library, "cuModuleGetFunction", function);
    find(library, "cuModuleLoadData", load);
    find(library, "cuTensorMapEncodeTiled", encode);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) fail(std::string(name) + " is missing in libcuda.so.1: the driver is too old");
  }

  void check(CUresult result) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(result, &text);
    fail(std::string("CUDA: ") + (text == nullptr ? "unknown error" : text));
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

constexpr int kRank = 4;
constexpr int kItemBytes = 2;

// What the kernel takes for a tensor [B, H, N, D]: a TMA descriptor, then the shape, then the strides.
struct Descriptor {
  alignas(64) CUtensorMap map;
  std::array<int32_t, kRank> shape;
  std::array<int64_t, kRank> strides;

  Descriptor(void* address, const int64_t* sizes, const int64_t* steps, std::array<uint32_t, kRank> box) {
    uint64_t dims[kRank], bytes[kRank - 1];
    const uint32_t ones[kRank] = {1, 1, 1, 1};
    for (int axis = 0; axis < kRank; ++axis) {
      shape[axis] = static_cast<int32_t>(sizes[axis]);
      // The stride along an axis of one element is free, and some views put there what TMA does not take.
      strides[axis] = axis == kRank - 1 ? 1 : sizes[axis] > 1 ? steps[axis] : sizes[kRank - 1];
      dims[kRank - 1 - axis] = static_cast<uint64_t>(sizes[axis]);
      if (axis < kRank - 1) bytes[kRank - 2 - axis] = static_cast<uint64_t>(strides[axis]) * kItemBytes;
    }
    const Driver& cuda = driver();
    cuda.check(cuda.encode(&map, HASTE_DATA_TYPE, kRank, address, dims, bytes, box.data(), ones,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, HASTE_SWIZZLE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  }
};

// Pointers to the kernel's parameters, in its order.
struct Parameters {
  std::array<void*, 64> pointers{};
  size_t count = 0;

  void add(Descriptor& descriptor) {
    add(descriptor.map);
    for (auto& size : descriptor.shape) add(size);
    for (auto& step : descriptor.strides) add(step);
  }
  template <typename Value>
  void add(Value& value) {
    pointers[count++] = &value;
  }
};

// A kernel as the context of one device holds it.
struct Kernel {
  CUfunction function = nullptr;
  unsigned threads = 0, shared = 0;

  Kernel() = default;
  Kernel(const unsigned char* cubin, const char* name, unsigned threads, unsigned shared)
      : threads(threads), shared(shared) {
    const Driver& cuda = driver();
    CUmodule module = nullptr;
    cuda.check(cuda.load(&module, cubin));
    cuda.check(cuda.function(&function, module, name));
    cuda.check(cuda.set_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared));
  }

  template <typename... Values>
  void launch(unsigned programs, CUstream queue, Values&... values) const {
    CUdeviceptr no_scratch = 0, no_profile = 0;  // what Triton's kernels take last
    Parameters parameters;
    (parameters.add(values), ...);
    parameters.add(no_scratch);
    parameters.add(no_profile);
    const Driver& cuda = driver();
    cuda.check(cuda.launch(function, programs, 1, 1, threads, 1, 1, shared, queue, parameters.pointers.data(),
                           nullptr));
  }
};

// What a launch needs of one device.
struct Loaded {
  Kernel order, attention;
  unsigned multiprocessors = 0;
};

const Loaded& loaded_for(CUdevice device) {
  static std::mutex mutex;
  static std::array<Loaded, 64> by_device;
  require(device >= 0 && device < static_cast<CUdevice>(by_device.size()), "too many devices");
  const std::lock_guard lock(mutex);
  Loaded& found = by_device[device];
  if (found.multiprocessors == 0) {
    const Driver& cuda = driver();
    int major = 0, count = 0;
    cuda.check(cuda.attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device));
    require(major == 9, "made for a Hopper GPU");
    cuda.check(cuda.attribute(&count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device));
    found = {Kernel(haste_order_cubin, HASTE_ORDER_KERNEL, HASTE_ORDER_THREADS, HASTE_ORDER_SHARED),
             Kernel(haste_attention_cubin, HASTE_ATTENTION_KERNEL, HASTE_ATTENTION_THREADS, HASTE_ATTENTION_SHARED),
             static_cast<unsigned>(count)};
  }
  return found;
}

// The scratch, in bytes: what order the last tiles go in, the counter that all are fetched from, in cache lines of
// its own, then the logarithms, which no exported graph reads.
constexpr int64_t kCounterAt = HASTE_TAIL * sizeof(int32_t), kLogarithmsAt = kCounterAt + 256;
static_assert(kCounterAt > 0 && kCounterAt % 16 == 0, "the kernels are compiled for addresses of 16·n bytes");

}  // namespace

// Scratch for tensors of these sizes, in units of four bytes.
extern "C" __attribute__((visibility("default"))) int64_t haste_scratch(const int64_t* sizes) {
  return kLogarithmsAt / sizeof(float) + sizes[0] * sizes[1] * sizes[2];
}

// The launches alone, on the current context: tensors by address, sizes and strides in elements. What is wrong
// comes back as text in message, which is empty otherwise.
extern "C" __attribute__((visibility("default"))) void haste_launch(void* q, void* k, void* v, void* out, const int64_t* sizes, const int64_t* q_strides,
                             const int64_t* k_strides, const int64_t* v_strides, const int64_t* out_strides,
                             void* counts, void* indices, void* scratch, double scale, void* stream,
                             char* message, size_t message_bytes) {
  try {
    const Driver& cuda = driver();
    const auto queue = static_cast<CUstream>(stream);
    CUdevice device = 0;
    cuda.check(cuda.context_device(&device));
    const Loaded& kernels = loaded_for(device);
    Descriptor queries(q, sizes, q_strides, HASTE_QUERY_BOX), keys(k, sizes, k_strides, HASTE_KEY_BOX),
        values(v, sizes, v_strides, HASTE_KEY_BOX), output(out, sizes, out_strides, HASTE_QUERY_BOX);
    auto heads = static_cast<int32_t>(sizes[1]), tokens = static_cast<int32_t>(sizes[2]);
    int32_t blocks = (tokens + HASTE_BLOCK - 1) / HASTE_BLOCK;
    int32_t key_blocks = blocks, tiles = static_cast<int32_t>(sizes[0]) * heads * blocks;
    auto factor = static_cast<float>(scale);
    auto order = reinterpret_cast<CUdeviceptr>(scratch), counter = order + kCounterAt, lse = order + kLogarithmsAt;
    auto counts_at = reinterpret_cast<CUdeviceptr>(counts), indices_at = reinterpret_cast<CUdeviceptr>(indices);
    kernels.order.launch(HASTE_TAIL / HASTE_PART, queue, counts_at, order, counter, tiles);
    const unsigned programs = std::min(static_cast<unsigned>(tiles), kernels.multiprocessors);
    kernels.attention.launch(programs, queue, queries, keys, values, output, lse, counts_at, indices_at, order, counter,
                             heads, blocks, key_blocks, tokens, tiles, factor);
    if (message_bytes > 0) message[0] = 0;
  } catch (const std::exception& error) {
    std::string(error.what()).copy(message, message_bytes - 1);
    message[std::min(message_bytes - 1, std::string(error.what()).size())] = 0;
  }
}

namespace {

void* current_stream(int32_t device) {
  using Query = AOTITorchError (*)(int32_t, void**);
  static const auto query = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Query>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  require(query != nullptr, "this PyTorch has no CUDA");
  void* stream = nullptr;
  require(query(device, &stream) == 0, "PyTorch has no current CUDA stream");
  return stream;
}

void check_rows(const Tensor& x, const Tensor& q) {
  require(x.dim() == kRank && x.size(3) == HASTE_DIM, "q, k, v must be [B, H, N, " HASTE_DIM_TEXT "]");
  for (int axis = 0; axis < kRank; ++axis) require(x.size(axis) == q.size(axis), "q, k, v differ in shape");
  require(x.scalar_type() == HASTE_SCALAR_TYPE, "q, k, v have another dtype than the one compiled for");
  bool ready = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int axis = 0; axis < kRank - 1; ++axis) ready = ready && (x.size(axis) == 1 || x.stride(axis) % 8 == 0);
  require(ready, "q, k, v need addresses and strides of 16·n bytes and the last stride 1");
}

// q, k, v [B, H, N, D]; counts int32 [B, H, Tq] and indices int32 [B, H, Tq, Tk], contiguous; returns the
// output [B, H, N, D], a transposed view of [B, N, H, D].
Tensor attend(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, double scale) {
  check_rows(q, q);
  check_rows(k, q);
  check_rows(v, q);
  const int64_t sizes[kRank] = {q.size(0), q.size(1), q.size(2), q.size(3)};
  const int64_t blocks = (sizes[2] + HASTE_BLOCK - 1) / HASTE_BLOCK;
  require((sizes[2] % HASTE_BLOCK != 0) == HASTE_RAGGED, "compiled for whole blocks or for ragged ones, not these");
  const auto int32 = torch::headeronly::ScalarType::Int;
  require(counts.scalar_type() == int32 && indices.scalar_type() == int32, "lists must be int32");
  require(counts.is_contiguous() && counts.numel() == sizes[0] * sizes[1] * blocks, "bad counts");
  require(indices.is_contiguous() && indices.numel() == counts.numel() * blocks, "bad indices");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto float32 = torch::headeronly::ScalarType::Float;
  Tensor out = torch::stable::transpose(torch::stable::new_empty(q, {sizes[0], sizes[2], sizes[1], sizes[3]}), 1, 2);
  Tensor scratch = torch::stable::new_empty(q, {haste_scratch(sizes)}, float32);
  std::array<std::array<int64_t, kRank>, 4> strides;
  const std::array<const Tensor*, 4> tensors = {&q, &k, &v, &out};
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int axis = 0; axis < kRank; ++axis) strides[i][axis] = tensors[i]->stride(axis);
  char message[512];
  haste_launch(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), sizes, strides[0].data(), strides[1].data(),
               strides[2].data(), strides[3].data(), counts.data_ptr(), indices.data_ptr(), scratch.data_ptr(), scale,
               current_stream(q.get_device_index()), message, sizeof message);
  if (message[0] != 0) fail(message);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(haste_native, library) {
  library.def(HASTE_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(haste_native, CUDA, library) {
  library.impl(HASTE_OPERATOR, TORCH_BOX(&attend));
}
