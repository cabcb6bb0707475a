// Launches that begin before the kernel in front of them has ended (programmatic dependent launch, sm_90 and newer).
//
// The host allows it (crates/kvarn-cuda/src/launch.rs) for kernels that are compiled for sm_90 or newer. Such a kernel reads
// nothing that the kernel in front of it may write, and writes nothing, before `wait_for_predecessor`. What was ready before
// that kernel began may be read: the arrays of a step, which are copied to the device before the step's first launch.
#pragma once

namespace kvarn {

// Returns when the kernels in front have ended and what they wrote is visible. Every thread that reads or writes calls it.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel behind begin once every block has come here or ended.
__device__ __forceinline__ void let_successor_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace kvarn
