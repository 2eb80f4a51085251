// A loop on the device: a CUDA graph with conditional nodes, built for one solve.
//
//   enter                     sets the conditions
//   WHILE loop                conditions.loop
//     IF exact: product       conditions.exact;  without a narrow product the product itself
//     IF narrow: product      conditions.narrow
//     step                    sets the conditions for the next iteration
//
// The products are the library's: they are captured from a stream, and join as child graphs. The
// kernels are added as nodes. A graph that has been launched may be destroyed at once: CUDA keeps
// it until it has run.
//
// Compiled for CUDA 13; the lines for 12.4 to 12.9 differ in one call. No GPU has run this yet:
// what has not been seen to work is every call of the CUDA runtime in this file.

#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#include "loop_task.cuh"

namespace fastdeq {

// Whether the driver runs such graphs, which came with CUDA 12.4.
inline bool has_conditional_nodes() {
#if CUDART_VERSION >= 12040
  static const int version = [] {
    int found = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&found));
    return found;
  }();
  return version >= 12040;
#else
  return false;
#endif
}

#if CUDART_VERSION >= 12040

struct GraphDeleter {
  void operator()(cudaGraph_t graph) const { C10_CUDA_CHECK_WARN(cudaGraphDestroy(graph)); }
  void operator()(cudaGraphExec_t graph) const { C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(graph)); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, GraphDeleter>;
using ExecutableGraph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDeleter>;

// What `enqueue` gives to `stream`, which is not the default stream, as a graph.
inline Graph capture(cudaStream_t stream, const std::function<void()>& enqueue) {
  // Relaxed: the library may load a kernel or take memory at its first call.
  C10_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  cudaGraph_t captured = nullptr;
  try {
    enqueue();
  } catch (...) {
    C10_CUDA_CHECK_WARN(cudaStreamEndCapture(stream, &captured));
    if (captured != nullptr) GraphDeleter()(captured);
    throw;
  }
  C10_CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
  return Graph(captured);
}

struct KernelNode {
  const void* function;
  unsigned blocks, threads;
  size_t shared;
  std::vector<void*> arguments;  // addresses; read while the node is added
};

using Nodes = std::vector<cudaGraphNode_t>;

inline cudaGraphNode_t add_kernel(cudaGraph_t graph, const Nodes& after, KernelNode kernel) {
  cudaKernelNodeParams parameters = {};
  parameters.func = const_cast<void*>(kernel.function);
  parameters.gridDim = dim3(kernel.blocks);
  parameters.blockDim = dim3(kernel.threads);
  parameters.sharedMemBytes = unsigned(kernel.shared);
  parameters.kernelParams = kernel.arguments.data();
  cudaGraphNode_t node = nullptr;
  C10_CUDA_CHECK(cudaGraphAddKernelNode(&node, graph, after.data(), after.size(), &parameters));
  return node;
}

// Adds a copy of `child`.
inline cudaGraphNode_t add_child(cudaGraph_t graph, const Nodes& after, const Graph& child) {
  cudaGraphNode_t node = nullptr;
  C10_CUDA_CHECK(cudaGraphAddChildGraphNode(&node, graph, after.data(), after.size(), child.get()));
  return node;
}

struct ConditionalNode {
  cudaGraphNode_t node = nullptr;
  cudaGraph_t body = nullptr;  // belongs to the node
};

inline ConditionalNode add_conditional(cudaGraph_t graph, const Nodes& after,
                                       cudaGraphConditionalHandle handle,
                                       cudaGraphConditionalNodeType type) {
  cudaGraphNodeParams parameters = {};
  parameters.type = cudaGraphNodeTypeConditional;
  parameters.conditional.handle = handle;
  parameters.conditional.type = type;
  parameters.conditional.size = 1;
  ConditionalNode made;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(
      cudaGraphAddNode(&made.node, graph, after.data(), nullptr, after.size(), &parameters));
#else
  C10_CUDA_CHECK(cudaGraphAddNode(&made.node, graph, after.data(), after.size(), &parameters));
#endif
  made.body = parameters.conditional.phGraph_out[0];
  return made;
}

class DeviceLoop {
 public:
  // `choose`: there are products of both kinds.
  explicit DeviceLoop(bool choose) {
    cudaGraph_t created = nullptr;
    C10_CUDA_CHECK(cudaGraphCreate(&created, 0));
    graph_.reset(created);
    conditions_ = {true, choose, make_handle(), 0, 0};
    if (!choose) return;
    conditions_.exact = make_handle();
    conditions_.narrow = make_handle();
  }

  const cuda::Conditions& conditions() const { return conditions_; }

  // Kernels whose arguments have the conditions in them; `narrow` only where products are chosen.
  void build(const KernelNode& enter, const Graph& exact, const Graph& narrow,
             const KernelNode& step) {
    const cudaGraphNode_t first = add_kernel(graph_.get(), {}, enter);
    const cudaGraph_t body =
        add_conditional(graph_.get(), {first}, conditions_.loop, cudaGraphCondTypeWhile).body;
    Nodes products;
    if (conditions_.choose) {
      for (const bool is_exact : {true, false}) {
        const auto branch = add_conditional(
            body, products, is_exact ? conditions_.exact : conditions_.narrow, cudaGraphCondTypeIf);
        add_child(branch.body, {}, is_exact ? exact : narrow);
        products = {branch.node};
      }
    } else {
      products = {add_child(body, {}, exact)};
    }
    add_kernel(body, products, step);
  }

  void launch(cudaStream_t stream) {
    cudaGraphExec_t made = nullptr;
    C10_CUDA_CHECK(cudaGraphInstantiate(&made, graph_.get(), 0));
    const ExecutableGraph executable(made);
    C10_CUDA_CHECK(cudaGraphLaunch(executable.get(), stream));
  }

 private:
  cudaGraphConditionalHandle make_handle() {
    cudaGraphConditionalHandle handle = 0;
    C10_CUDA_CHECK(
        cudaGraphConditionalHandleCreate(&handle, graph_.get(), 0, cudaGraphCondAssignDefault));
    return handle;
  }

  Graph graph_;
  cuda::Conditions conditions_;
};

#endif

}  // namespace fastdeq
