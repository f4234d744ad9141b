// A libcuda.so.1 that does nothing, for what Triton 3.6 to 3.8 call of it: a kernel's launch costs
// the host what it costs beside a GPU, less the driver's own time.

#include "cuda.h"

static int context, module, function;
static long launches;

long stub_launches(void) { return launches; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "stub", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) { return *name = "stub", CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *current) {
  return *current = (CUcontext)&context, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  return *least = *greatest = 0, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 1 << 16, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  return *retained = (CUcontext)&context, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *loaded, const void *image) {
  return *loaded = (CUmodule)&module, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule loaded) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *found, CUmodule loaded, const char *name) {
  return *found = (CUfunction)&function, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction of) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction of, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction of, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction of, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuStreamGetCtx(CUstream stream, CUcontext *of) {
  return *of = (CUcontext)&context, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction of, void **arguments,
                          void **extra) {
  return ++launches, CUDA_SUCCESS;
}
