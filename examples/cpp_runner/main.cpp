// Drives the denoising loop of a Wan transformer in C++, from an AOTInductor artifact, without Python.
//
//     denoise wan.pt2 inputs.pt latents.pt
//
// inputs.pt, written by torch.save in Python, holds a dictionary of tensors: "latents" (the initial noise),
// "prompt" and "negative" (text embeddings), "sigmas" (noise levels, steps + 1 of them, falling from 1 to 0) and
// "guidance" (a number). Each step is one of Euler with classifier-free guidance. The result is written to
// latents.pt.
//
// The artifact keeps no state: masks, anchors and counters go in with every call and come out of it. Where a
// Python pipeline has a clock that recognises branches, steps and videos, a loop in C++ knows them and writes
// them down in `haste_ctl`.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <dlfcn.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

// Columns of haste_ctl, int32 [8]; the same as haste_compile.kernels.layout.Ctl.
enum Ctl { kSlot, kEpoch, kStep, kDense, kForce, kColumns = 8 };

// Guidance branches: each has a slot of its own in the state.
enum Branch { kPrompt = 0, kNegative = 1 };

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}

const std::string& entry(const Metadata& metadata, const std::string& name) {
  const auto found = metadata.find(name);
  if (found == metadata.end()) throw std::runtime_error("the package was not written by haste: no " + name);
  return found->second;
}

at::ScalarType dtype_of(const std::string& name) {
  if (name == "int32") return at::kInt;
  if (name == "int64") return at::kLong;
  if (name == "float32") return at::kFloat;
  throw std::runtime_error("state of dtype " + name);
}

// The state of a first call, all zeros. The package says what it needs, a line for each tensor: its name, dtype
// and sizes.
std::vector<at::Tensor> fresh_state(const std::string& layout, at::Device device) {
  std::vector<at::Tensor> state;
  std::istringstream lines(layout);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, dtype;
    words >> name >> dtype;
    std::vector<int64_t> sizes;
    for (int64_t size; words >> size;) sizes.push_back(size);
    state.push_back(at::zeros(sizes, at::TensorOptions().dtype(dtype_of(dtype)).device(device)));
  }
  return state;
}

// For Hopper an artifact has a library beside it, with the attention kernel: wan.so of wan.pt2. Loading it makes
// its operator known to PyTorch, which the package then finds by name.
const std::string& with_library(const std::string& package) {
  const auto library = std::filesystem::absolute(package).replace_extension(".so");
  if (std::filesystem::exists(library) && dlopen(library.c_str(), RTLD_NOW) == nullptr)
    throw std::runtime_error(std::string("cannot load the artifact's library: ") + dlerror());
  return package;
}

// One transformer with the state of one video.
class Transformer {
 public:
  explicit Transformer(const std::string& path) : loader_(with_library(path)), metadata_(loader_.get_metadata()) {
    const bool cuda = entry(metadata_, "haste_device") == "cuda";
    device_ = at::Device(cuda ? at::kCUDA : at::kCPU);
    dense_steps_ = std::stoi(entry(metadata_, "haste_dense_steps"));
    rebuild_steps_ = std::stoi(entry(metadata_, "haste_rebuild_steps"));
    state_ = fresh_state(entry(metadata_, "haste_state"), device_);
  }

  at::Device device() const { return device_; }

  at::Tensor operator()(const at::Tensor& latents, const at::Tensor& timestep, const at::Tensor& text,
                        Branch branch, int step) {
    const auto ctl = at::zeros({kColumns}, at::kInt);
    auto column = ctl.accessor<int32_t, 1>();
    column[kSlot] = branch;
    column[kEpoch] = 1;  // a second video would be number 2, and reuse no mask of the first
    column[kStep] = step;
    column[kDense] = step < dense_steps_;
    column[kForce] = step < rebuild_steps_;
    std::vector<at::Tensor> inputs{latents, timestep, text, ctl.to(device_)};
    inputs.insert(inputs.end(), state_.begin(), state_.end());
    auto outputs = loader_.run(inputs);
    // On the CPU the new state follows the sample; on CUDA the state was updated where it lies.
    if (outputs.size() > 1) state_.assign(outputs.begin() + 1, outputs.end());
    return outputs.front();
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
  Metadata metadata_;
  at::Device device_{at::kCPU};
  int dense_steps_ = 0;
  int rebuild_steps_ = 0;
  std::vector<at::Tensor> state_;
};

at::Tensor denoise(Transformer& transformer, const c10::Dict<c10::IValue, c10::IValue>& inputs) {
  const auto tensor = [&](const char* name) { return inputs.at(name).toTensor().to(transformer.device()); };
  auto latents = tensor("latents");
  const auto prompt = tensor("prompt"), negative = tensor("negative");
  const auto sigmas = inputs.at("sigmas").toTensor();
  const double guidance = inputs.at("guidance").toDouble();
  for (int step = 0; step + 1 < sigmas.size(0); ++step) {
    const auto timestep = (1000 * sigmas[step]).expand({latents.size(0)}).contiguous().to(transformer.device());
    auto velocity = transformer(latents, timestep, prompt, kPrompt, step);
    const auto empty = transformer(latents, timestep, negative, kNegative, step);
    velocity = empty + guidance * (velocity - empty);
    latents = latents + (sigmas[step + 1] - sigmas[step]).to(transformer.device()) * velocity;
  }
  return latents.cpu();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: denoise ARTIFACT.pt2 INPUTS.pt RESULT.pt\n";
    return 2;
  }
  try {
    const at::InferenceMode guard;
    Transformer transformer(argv[1]);
    const auto inputs = torch::jit::pickle_load(read_file(argv[2])).toGenericDict();
    write_file(argv[3], torch::jit::pickle_save(denoise(transformer, inputs)));
  } catch (const std::exception& error) {
    std::cerr << "denoise: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
