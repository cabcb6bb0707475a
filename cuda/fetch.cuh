// Records from global to shared memory, asynchronously: one warp, one buffer for K and one for V.
//
// sm_90 and newer: one bulk copy per matrix, completion on an mbarrier, evict-first in L2 (a record is read once per
// step). Older: cp.async, 16 bytes per lane, one commit group per matrix. Copies are issued K, V, K, V … and awaited in
// that order; each is awaited before the next one of its buffer is issued.
#pragma once
#include <stdint.h>

#include "mma.cuh"

namespace kvarn {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Called by every thread that wrote to a buffer with ordinary stores, before the barrier behind which it is filled again.
__device__ __forceinline__ void fetch_after_writes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One word from global to shared memory, asynchronously; both at multiples of four bytes.
__device__ __forceinline__ void fetch_word(void* destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared_address(destination)), "l"(source) : "memory");
}

// Waits for the words that this thread fetched. Before sm_90 for the records under way too.
__device__ __forceinline__ void fetch_words_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes the barrier of a buffer; one lane calls, a barrier of the warp follows. `barrier`: a 64-bit word in shared memory.
__device__ __forceinline__ void fetch_init(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(barrier));
  asm volatile("fence.mbarrier_init.release.cluster;");
#endif
}

// Fills a buffer if there is `any` source. Every lane calls; everything read from the buffer before must have been read by
// all lanes.
template <int Bytes>
__device__ __forceinline__ void fetch_issue(uint32_t destination, uint32_t barrier, const unsigned char* source, bool any, int lane) {
  static_assert(Bytes % 16 == 0, "copies are of whole 16-byte words");
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  if (any && lane == 0) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(barrier), "r"(Bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(
            destination),
        "l"(source), "r"(Bytes), "r"(barrier), "l"(policy)
        : "memory");
  }
#else
  if (any) {
    for (int at = lane * 16; at < Bytes; at += 512)
      asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(destination + at), "l"(source + at) : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the oldest copy that is under way; one younger copy may be. `phase`: 0 for the first copy to a buffer, then 1,
// 0, …
__device__ __forceinline__ void fetch_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(phase)
                 : "memory");
  } while (!done);
#else
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncwarp();
#endif
}

}  // namespace kvarn
