// wgmma_sp_tma's instances for one storage of the weights; a file each, so that they compile side by side.
#include "launch.cuh"

int sparse24::launch_tma_int4(const Problem& p, const Launch& launch, void* stream) {
  return dispatch_tma_type<Format::kInt4>(p, launch, stream);
}
